#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# No field of an image, whatever its value, does worse than fail the attach or the request that meets it.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
# A file system of its own: it can be unmounted when nothing holds a file of it.
truncate -s 64M "$WORK/fs.img"
mkfs.ext4 -q -F "$WORK/fs.img"
mkdir "$WORK/fs"
modprobe -q loop
mount -o loop "$WORK/fs.img" "$WORK/fs" || skip_all "no loop device"
cd "$WORK/fs" || exit

# Header 0, refcount table 0x10000, block 0x20000, L1 0x30000, L2 0x40000, data
# 0x50000 to 0x5ffff and 0x60000 to 0x6ffff.
make_good() {
	qemu-img create -q -f qcow2 -o compat="$1" good.qcow2 64M &&
		qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' \
			-c 'write -q -P 0x42 64k 64k' good.qcow2
}

# make_bad OFFSET HEX [OFFSET HEX]...
make_bad() {
	cp good.qcow2 bad.qcow2
	while (($#)); do
		put_bytes bad.qcow2 "$1" "$2"
		shift 2
	done
}

# noticed DESC SAYS COMMAND OFFSET HEX: the xfs_io command meets the damage, and SAYS
# is what is told of it.
noticed() {
	local desc=$1 says=$2 command=$3

	make_bad "$4" "$5"
	attach "$PWD/bad.qcow2" || return
	xfs_io -d -c "$command" -c fsync "$DEV" >/dev/null 2>&1
	like "noticed: $desc" "$(<"/sys/block/${DEV#/dev/}/qcow/damage")" "$says"
	try_detach || forget "$DEV"
}

make_good 1.1
r='pread -q 0 4k' w='pwrite -q 8M 64k'
noticed "L1 entry not aligned" 'L1 entry .* not a cluster' "$r" $((0x30000)) 8000000000040200
noticed "L1 entry beyond the file" 'L2 table .* behind the end' "$r" $((0x30000)) 8000000010000000
noticed "L2 entry not aligned" 'L2 entry .* not valid' "$r" $((0x40000)) 8000000000050200
noticed "L2 entry beyond the file" 'mapped to .* behind the end' "$r" $((0x40000)) 8000000010000000
noticed "refcount table entry not aligned" 'refcount table entry 0' "$w" $((0x10000)) 0000000000020200
noticed "refcount table entry beyond the file" 'refcount table entry 0' "$w" $((0x10000)) 0000000010000000
for field in "L1 table:40" "refcount table:48"; do
	make_bad "${field#*:}" 0000000010000000
	not_ok "not written: ${field%:*} beyond the file" try_attach "$PWD/bad.qcow2"
	like "not written: ${field%:*} beyond the file, and why" "$(<"$WORK/.err")" 'cut short'
done

# The header, field by field: refused at attach, in one line, read-only or not.
ways=("" --read-only)
versions=(1.1 0.10)
if [[ $QUICK ]]; then
	ways=("") versions=(1.1)
fi
# refused DESC OFFSET HEX [OFFSET HEX]...
refused() {
	local desc=$1 option result=ok
	shift

	make_bad "$@"
	for option in "${ways[@]}"; do
		if try_attach ${option:+"$option"} "$PWD/bad.qcow2"; then
			result="attached with '$option'"
			try_detach
		elif (($(wc -l <"$WORK/.err") != 1)); then
			result="not one line: $(<"$WORK/.err")"
		fi
	done
	is "refused: $desc" "$result" ok
	diag "$(<"$WORK/.err")"
}

make_good 1.1
refused "magic" 0 00
refused "version 1" 4 00000001
refused "version 4" 4 00000004
refused "version 2^32-1" 4 ffffffff
refused "backing file offset beyond the first cluster" 8 0000000000010001 16 00000004
refused "backing file offset 2^64-1" 8 ffffffffffffffff 16 00000004
refused "backing file name of 1024 bytes" 8 0000000000000200 16 00000400
refused "backing file name that leaves the first cluster" 8 000000000000fff0 16 00000100
refused "cluster bits 0" 20 00000000
refused "cluster bits 8" 20 00000008
refused "cluster bits 22" 20 00000016
refused "cluster bits 63" 20 0000003f
refused "cluster bits 2^32-1" 20 ffffffff
refused "size 2^64-1" 24 ffffffffffffffff
refused "size 2^63" 24 8000000000000000
refused "size that the L1 table does not cover" 24 0000000100000000
refused "encryption method 3" 32 00000003
refused "L1 size 0" 36 00000000
refused "L1 table of more than 32 MiB" 36 00400001
refused "L1 size 2^32-1" 36 ffffffff
refused "L1 offset 0" 40 0000000000000000
refused "L1 offset not aligned" 40 0000000000030200
refused "L1 offset 2^64-2^16" 40 ffffffffffff0000
refused "L1 offset 2^63" 40 8000000000000000
refused "refcount table not aligned" 48 0000000000010200
refused "refcount table at 2^64-2^16" 48 ffffffffffff0000
refused "refcount table of 0 clusters" 56 00000000
refused "refcount table of more than 8 MiB" 56 00000081
refused "refcount table of 2^32-1 clusters" 56 ffffffff
refused "65537 snapshots" 60 00010001 64 0000000000070000
refused "snapshot table not aligned" 60 00000001 64 0000000000070200
refused "incompatible bit 2, external data file" 72 0000000000000004
refused "incompatible bit 3, without the compression type" 72 0000000000000008
refused "incompatible bit 5" 72 0000000000000020
refused "incompatible bit 63" 72 8000000000000000
refused "refcount order 7" 96 00000007
refused "refcount order 2^32-1" 96 ffffffff
refused "header length 96" 100 00000060
refused "header length 103" 100 00000067
refused "header length beyond the cluster" 100 00010008
refused "header length 2^32-1" 100 ffffffff
refused "compression type 1 without its bit" 104 01
refused "compression type 7" 72 0000000000000008 104 07
refused "header extension longer than the cluster" 112 12345678 116 00010000
refused "header extension of 2^32-1 bytes" 112 12345678 116 ffffffff
bitmaps=(88 0000000000000001 112 23852875 116 00000018 120 0000000100000000)
refused "bitmap directory that wraps" "${bitmaps[@]}" 128 0000000000020000 136 ffffffffffff0000
refused "bitmap directory at the header" "${bitmaps[@]}" 128 0000000000000018 136 0000000000000000
refused "backing format of 2^32-8 bytes" 112 e2792aca 116 fffffff8
: >bad.qcow2
refused_empty() {
	not_ok "refused: $1" try_attach "$PWD/bad.qcow2"
	diag "$(<"$WORK/.err")"
}
refused_empty "empty file"
head -c 71 good.qcow2 >bad.qcow2
refused_empty "half a header"
head -c 512 /dev/urandom >bad.qcow2
refused_empty "noise"

# A compressed cluster reads right.
head -c 65536 /dev/zero | tr '\0' C >plain
head -c 1M /dev/urandom >>plain
qemu-img convert -c -f raw -O qcow2 plain comp.qcow2
if attach --read-only "$PWD/comp.qcow2"; then
	ok "a compressed cluster reads right" cmp -n 1048576 "$DEV" plain
	detach
fi

# The tables. Attach may refuse; where it does not, requests that meet the
# damage fail or read zeroes, the rest works, and what was not damaged stays.
# survives DESC OFFSET HEX [OFFSET HEX]...
survives() {
	local desc=$1 result=ok got
	shift

	make_bad "$@"
	if try_attach "$PWD/bad.qcow2"; then
		# Each of these may fail, and the next is tried all the same.
		timeout 60 xfs_io -d -c 'pread -q -b 64k 0 64k' -c 'pread -q -b 64k 64k 960k' \
			-c 'pwrite -q 0 4k' -c 'pwrite -q -b 64k 2560k 1280k' -c fsync \
			-c 'fpunch 16k 256k' -c 'fpunch 128k 1M' \
			-c 'pwrite -q -b 64k 57600k 1280k' -c fsync "$DEV" >/dev/null 2>&1
		if (($? == 124)); then
			result="requests hang"
		fi
		try_detach || result="detach: $(<"$WORK/.err")"
		forget "$DEV"
	elif (($(wc -l <"$WORK/.err") != 1)); then
		result="not one line: $(<"$WORK/.err")"
	fi
	got=$(head -c 4 bad.qcow2 | od -An -tx1 | tr -d ' ')
	if [[ $got != 514649fb ]]; then
		result="the header was overwritten: $got"
	fi
	is "survived: $desc" "$result" ok
}

for version in "${versions[@]}"; do
	make_good "$version"
	t=$((0x30000)) l2=$((0x40000))
	survives "$version L1 entry not aligned" $t 8000000000040200
	survives "$version L1 entry with reserved bits" $t ff00000000040000
	survives "$version L1 entry with low reserved bits" $t 80000000000401ff
	survives "$version L1 entry beyond the file" $t 8000000010000000
	survives "$version L1 entry at 2^56-2^16" $t 80ffffffffff0000
	survives "$version L1 entry that is the header" $t 8000000000000000
	survives "$version L1 entry that is the L1 table" $t 8000000000030000
	survives "$version L1 entry that is the refcount table" $t 8000000000010000
	survives "$version L1 entry that is the refcount block" $t 8000000000020000
	survives "$version two L1 entries for one L2 table" $((t + 8)) 8000000000040000
	survives "$version L2 entry not aligned" $l2 8000000000050200
	survives "$version L2 entry with reserved bits" $l2 bf00000000050000
	survives "$version L2 entry with low reserved bits" $l2 80000000000501fe
	survives "$version L2 entry with the zero bit" $l2 8000000000050001
	survives "$version L2 entry beyond the file" $l2 8000000010000000
	survives "$version L2 entry at 2^56-2^16" $l2 80ffffffffff0000
	survives "$version L2 entry that is the header" $l2 8000000000000000
	survives "$version L2 entry that is the L1 table" $l2 8000000000030000
	survives "$version L2 entry that is its L2 table" $l2 8000000000040000
	survives "$version L2 entry that is the refcount table" $l2 8000000000010000
	survives "$version L2 entry that is the refcount block" $l2 8000000000020000
	survives "$version two L2 entries for one cluster" $l2 8000000000060000
	survives "$version compressed entry beyond the file" $l2 4000000010000000
	survives "$version compressed entry of greatest size" $l2 7fffffffffffffff
	survives "$version compressed entry with the copied bit" $l2 c000000000050000
	survives "$version refcount table entry 0" $((0x10000)) 0000000000000000
	survives "$version refcount table entry not aligned" $((0x10000)) 0000000000020200
	survives "$version refcount table entry with reserved bits" $((0x10000)) 00000000000201ff
	survives "$version refcount table entry beyond the file" $((0x10000)) 0000000010000000
	survives "$version refcount table entry at 2^64-2^16" $((0x10000)) ffffffffffff0000
	survives "$version refcount table entry that is the header" $((0x10000)) 0000000000000000
	survives "$version refcount table entry that is the L1 table" $((0x10000)) 0000000000030000
	survives "$version refcount of the header 0" $((0x20000)) 0000
	survives "$version refcount of the L1 table 0" $((0x20006)) 0000
	survives "$version refcount of the L2 table 0" $((0x20008)) 0000
	survives "$version refcounts of the data 0" $((0x2000a)) 00000000
	survives "$version refcount of the data 2^16-1" $((0x2000a)) ffff
	survives "$version all refcounts 0" $((0x20000)) 0000000000000000000000000000
	survives "$version L1 table beyond the file" 40 0000000010000000
	survives "$version L1 table that is the refcount table" 40 0000000000010000
	survives "$version L1 table that is the first cluster of data" 40 0000000000050000
	survives "$version refcount table beyond the file" 48 0000000010000000
	survives "$version refcount table that is the L1 table" 48 0000000000030000
	survives "$version refcount table that is the header" 48 0000000000000000
	survives "$version snapshots beyond the file" 60 00000005 64 0000000010000000
	survives "$version size 0" 24 0000000000000000
	survives "$version size 1" 24 0000000000000001
done

cd /
ok "no file of a failed attach is still open" umount "$WORK/fs"
no_kernel_report
done_testing
