#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# What the driver does not know is in an image byte for byte after writing, and what it cannot keep true is taken back before.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
ops=400
if [[ $QUICK ]]; then
	ops=200
fi

# word FILE OFFSET: eight bytes as hexadecimal digits
word() {
	od -An -v -tx8 --endian=big -j "$2" -N 8 "$1" | tr -d ' '
}

# Where fields are
SIZE=24 REFCOUNT_TABLE=48 SNAPSHOTS=64 AUTOCLEAR=88

# insert FILE AT HEX: bytes between the header and the extensions, which move, and
# the backing file's name with them
insert() {
	local length=$((${#3} / 2)) name rest

	name=$((0x$(word "$1" 8)))
	# QEMU's extensions and the name are not longer than that.
	rest=$(od -An -v -tx1 -j "$2" -N $((room > 1024 ? 800 : room - $2 - length)) "$1" |
		tr -d ' \n')
	put_bytes "$1" "$2" "$3" "$rest"
	if ((name)); then
		put_bytes "$1" 8 "$(printf %016x $((name + length)))"
	fi
}

# header FILE FIELD...: all of the first cluster, but for fields of 8 bytes
header() {
	local field

	head -c "$room" "$1" >.header
	shift
	for field; do
		put_bytes .header "$field" 0000000000000000
	done
	sha256sum <.header
}

# changed A B: the bytes that differ, counted from 0
changed() {
	cmp -l "$1" "$2" | awk '{ print $1 - 1 }' | paste -sd' '
}

# kept DESC OFFSET: a cluster is what it was before
kept() {
	local length=$(($(stat -c %s before.qcow2) - $2))

	ok "$1 is what it was" \
		cmp -i "$2" -n $((length < 65536 ? length : 65536)) before.qcow2 x.qcow2
}

# random DESC IMAGE: random requests, after which the device is detached
random() {
	qemu-img convert -f qcow2 -O raw -U "$2" .mirror 2>/dev/null
	ok "$1: random requests" qcow-diff --quiet --seed 5 --ops $ops --mirror-in .mirror \
		--mirror-out mirror.raw "$DEV"
	detach
	same mirror.raw raw "$2" qcow2 "$1"
}

truncate -s 5M base.raw
xfs_io -c 'pwrite -q -S 0x77 0 5M' base.raw

# Everything that nobody knows, in one header: fields of 32 bytes behind the last
# known one, an extension of 13 bytes, all compatible bits but that of lazy
# refcounts, all autoclear bits but that of raw data; and a size of an odd length.
fields=$(printf '%02x' {161..192})
extension=123456780000000d$(printf '%02x' {1..13})5a5a5a
for options in cluster_size=64k cluster_size=512,refcount_bits=64; do
	room=65536 length=8388608 change=("$AUTOCLEAR")
	if [[ $options == *512* ]]; then
		# There the refcount table is soon too small.
		room=512 change+=("$REFCOUNT_TABLE" $((REFCOUNT_TABLE + 4)))
	fi
	rm -f x.qcow2
	qemu-img create -q -f qcow2 -b base.raw -F raw -o "$options" x.qcow2 $length
	insert x.qcow2 112 "$fields$extension"
	put_bytes x.qcow2 100 00000090
	put_bytes x.qcow2 80 fffffffffffffffe fffffffffffffffd
	put_bytes x.qcow2 $SIZE "$(printf %016x $((length - 211)))"
	cp x.qcow2 before.qcow2
	check_clean x.qcow2 "$options, as it was made"

	attach --read-only "$PWD/x.qcow2"
	dd if="$DEV" of=/dev/null bs=1M status=none
	detach
	is "$options: reading changes nothing" "$(changed before.qcow2 x.qcow2)" ""

	not_ok "$options: an attach that is refused" \
		qcowctl attach --compress=zstd "$PWD/x.qcow2"
	is "$options: changes nothing" "$(changed before.qcow2 x.qcow2)" ""

	attach "$PWD/x.qcow2"
	is "$options: before the first write, the autoclear bits are taken back" \
		"$(word x.qcow2 $AUTOCLEAR)" 0000000000000000
	is "$options: and nothing else is written" "$(changed before.qcow2 x.qcow2)" \
		"88 89 90 91 92 93 94 95"
	random "$options" x.qcow2
	is "$options: the header is what it was" "$(header x.qcow2 "${change[@]}")" \
		"$(header before.qcow2 "${change[@]}")"
	check_clean x.qcow2 "$options"
	like "$options: QEMU still knows all of it" "$(qemu-img info x.qcow2)" \
		'backing file: base.raw.*backing file format: raw'
done

# The refcount table moves; nothing but the fields that say where it is changes.
attach "$PWD/x.qcow2"
ok "more than the refcount table covers" xfs_io -d -c 'pwrite -q -b 1M -S 6 0 5M' "$DEV"
detach
ok "the refcount table has moved" test "$(word x.qcow2 $REFCOUNT_TABLE)" != \
	"$(word before.qcow2 $REFCOUNT_TABLE)"
is "the rest of the header is what it was" "$(header x.qcow2 "${change[@]}")" \
	"$(header before.qcow2 "${change[@]}")"
check_clean x.qcow2 "with another refcount table"

# The header is written one sector at a time, the first one: when the autoclear bits
# go, when the dirty bit comes and goes, and when the refcount table moves.
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
EVENT=/sys/kernel/tracing/events/block/block_bio_queue
if [[ -e $EVENT/enable ]]; then
	truncate -s 16M header.img
	new_loop header.img --direct-io=on
	# There the refcount table is full after 2 MiB.
	qemu-img create -q -f qcow2 -o cluster_size=512,lazy_refcounts=on,refcount_bits=64 \
		"$LOOP" 8M
	put_bytes "$LOOP" $AUTOCLEAR 8000000000000000
	udevadm settle
	blockdev --flushbufs "$LOOP"
	IFS=: read -r major minor < <(lsblk -dno MAJ:MIN "$LOOP" | tr -d ' ')
	# Flushes are of no sectors.
	echo "dev == $((major << 20 | minor)) && sector == 0 && nr_sector != 0" >$EVENT/filter
	echo >/sys/kernel/tracing/trace
	echo 1 >$EVENT/enable
	attach "$LOOP"
	xfs_io -d -c 'pwrite -q -b 1M 0 5M' -c fsync "$DEV"
	detach
	echo 0 >$EVENT/enable
	echo 0 >$EVENT/filter
	writes=$(sed -n 's/.*block_bio_queue: [0-9,]* \([A-Z]*W[A-Z]*\) \([0-9]* + [0-9]*\) .*/\2/p' \
		/sys/kernel/tracing/trace)
	diag "writes to the header:" "$(paste -sd, <<<"$writes")"
	ok "the header was written, several times" test "$(wc -l <<<"$writes")" -ge 4
	is "each time one sector" "$(sort -u <<<"$writes")" "0 + 1"
	check_clean "$LOOP" "with a header that was written"
else
	skip "the header is written one sector at a time" "no trace events"
fi

# Version 2 stays version 2: no feature bits, which would be the data of an
# extension, no zero flags, no corrupt bit.
room=4096
extension=1234567800000028$(printf 'ff%.0s' {1..40})
zero_flags() {
	od -An -v -tx8 --endian=big -w8 -j $((0x$(word "$1" $((0x$(word "$1" 40)))) & ~(1 << 63))) \
		-N 4096 "$1" | grep -c '1$'
}
for chain in none raw; do
	rm -f x.qcow2
	if [[ $chain == raw ]]; then
		base=(-b base.raw -F raw)
	else
		base=()
	fi
	qemu-img create -q -f qcow2 "${base[@]}" -o compat=0.10,cluster_size=4k x.qcow2 2M
	insert x.qcow2 72 "$extension"
	qemu-io -f qcow2 -c 'write -q -P 1 100k 900k' x.qcow2
	qemu-img snapshot -c one x.qcow2
	cp x.qcow2 before.qcow2
	attach "$PWD/x.qcow2"
	xfs_io -d -c 'fzero -k 64k 256k' -c 'fpunch 512k 256k' -c fsync "$DEV" \
		>/dev/null 2>&1
	if [[ $chain == raw ]]; then
		is "version 2 above $chain: it has no discard" \
			"$(<"/sys/block/${DEV#/dev/}/queue/discard_max_bytes")" 0
	fi
	random "version 2 above $chain" x.qcow2
	is "version 2 above $chain: the header is what it was" "$(header x.qcow2)" \
		"$(header before.qcow2)"
	is "version 2 above $chain: no entry has the zero flag" "$(zero_flags x.qcow2)" 0
	check_clean x.qcow2 "version 2 above $chain"
done
table=$((0x$(word x.qcow2 40)))
put_bytes x.qcow2 $(((0x$(word x.qcow2 $table) & ~(1 << 63)) + 8)) "80$(printf %014x $table)"
before=$(header x.qcow2)
attach "$PWD/x.qcow2"
not_ok "version 2, damaged: a write over a table is stopped" \
	xfs_io -d -c 'pwrite -q 4k 4k' "$DEV"
sleep 0.2
like "version 2, damaged: sysfs says it" "$(<"/sys/block/${DEV#/dev/}/qcow/damage")" 'L1 table'
try_detach || :
is "version 2, damaged: no bit says it" "$(header x.qcow2)" "$before"

# Snapshots: their table and their tables are nobody's to change.
room=65536
rm -f x.qcow2
qemu-img create -q -f qcow2 x.qcow2 4M
qemu-io -f qcow2 -c 'write -q -P 1 0 2M' x.qcow2
qemu-img snapshot -c one x.qcow2
qemu-io -f qcow2 -c 'write -q -P 2 1M 2M' x.qcow2
qemu-img snapshot -c two x.qcow2
cp x.qcow2 before.qcow2
attach "$PWD/x.qcow2"
random "with snapshots" x.qcow2
is "with snapshots: the header is what it was" "$(header x.qcow2)" "$(header before.qcow2)"
table=$((0x$(word x.qcow2 $SNAPSHOTS)))
kept "with snapshots: their table" $table
l1=$((0x$(word x.qcow2 $table)))
kept "with snapshots: the L1 table of one" $l1
kept "with snapshots: its L2 table" $((0x$(word x.qcow2 $l1) & ~(1 << 63)))

# Bitmaps: marked as in use, and nothing is put where they are. What they say is for
# bitmaps.t.
rm -f x.qcow2
qemu-img create -q -f qcow2 x.qcow2 4M
qemu-img bitmap --add x.qcow2 changes
qemu-io -f qcow2 -c 'write -q -P 1 0 2M' x.qcow2
cp x.qcow2 before.qcow2
attach --read-only "$PWD/x.qcow2"
detach
is "with a bitmap: reading changes nothing" "$(changed before.qcow2 x.qcow2)" ""
like "with a bitmap: QEMU has it" "$(qemu-img info x.qcow2)" 'name: changes'
attach "$PWD/x.qcow2"
at=$(head -c 65536 x.qcow2 | od -An -v -tx4 --endian=big -w4 | grep -n 23852875)
at=$(((${at%%:*} - 1) * 4))
at=$((0x$(word x.qcow2 $((at + 24)))))
is "with a bitmap: it is marked before the first write" \
	"$(word before.qcow2 $((at + 8))) $(word x.qcow2 $((at + 8)))" \
	"0000000100000002 0000000100000003"
random "with a bitmap" x.qcow2
is "with a bitmap: the header is what it was" "$(header x.qcow2)" \
	"$(header before.qcow2)"
is "with a bitmap: the mark is gone" "$(word x.qcow2 $((at + 8)))" 0000000100000002
kept "with a bitmap: its directory" $at
check_clean x.qcow2 "with a bitmap"
like "with a bitmap: QEMU has it still" "$(qemu-img info x.qcow2)" 'name: changes'

# Somebody who does not know of bitmaps has written to it: they are out of date, and
# where they are is theirs.
put_bytes x.qcow2 $AUTOCLEAR 0000000000000000
cp x.qcow2 before.qcow2
attach "$PWD/x.qcow2"
random "with a stale bitmap" x.qcow2
is "with a stale bitmap: the header is what it was" "$(header x.qcow2)" \
	"$(header before.qcow2)"
kept "with a stale bitmap: its directory" $at
table=$((0x$(word x.qcow2 $at)))
kept "with a stale bitmap: its table" $table
data=$((0x$(word x.qcow2 $table)))
ok "with a stale bitmap: it has bits" test $data -gt 65535
kept "with a stale bitmap: its bits" $data

# The one autoclear bit that is kept true stays.
rm -f x.qcow2
qemu-img create -q -f qcow2 -o data_file=x.data,data_file_raw=on x.qcow2 4M
put_bytes x.qcow2 $AUTOCLEAR 0000000000000022
attach "$PWD/x.qcow2"
is "raw data: of the autoclear bits one stays" "$(word x.qcow2 $AUTOCLEAR)" 0000000000000002
random "raw data" x.qcow2
is "raw data: it is still there" "$(word x.qcow2 $AUTOCLEAR)" 0000000000000002

# Zeroes are of subclusters, and make bits; discards are of clusters, and those that
# cover none change nothing.
rm -f x.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on x.qcow2 1M
qemu-io -f qcow2 -c 'write -q -P 7 0 256k' x.qcow2
l2=$((0x$(word x.qcow2 $((0x$(word x.qcow2 40)))) & ~(1 << 63)))
# entry N: of guest cluster N, without its place
entry() {
	echo "$(((0x$(word x.qcow2 $((l2 + 16 * $1))) & 0xfffffffffffe00) != 0))" \
		"$(word x.qcow2 $((l2 + 16 * $1 + 8)))"
}
attach "$PWD/x.qcow2"
# Subclusters have 2 KiB. 0: two of them, and parts of their neighbours. 1: most of
# it. 2: all of it, and the start of 3.
xfs_io -d -c 'fzero -k 5k 6k' "$DEV"
blkdiscard -o 66k -l 60k "$DEV"
blkdiscard -o 128k -l 66k "$DEV"
xfs_io -c fsync "$DEV"
is "zeroes over parts of a cluster" "$(entry 0)" "1 00000018ffffffe7"
is "a discard of less than a cluster" "$(entry 1)" "1 00000000ffffffff"
is "a discard of a cluster" "$(entry 2)" "0 ffffffff00000000"
is "and of the start of the next" "$(entry 3)" "1 00000000ffffffff"
detach
cp x.qcow2 before.qcow2
ok "QEMU reads the same" qemu-io -r -f qcow2 -c 'read -q -P 7 0 5k' -c 'read -q -P 0 5k 6k' \
	-c 'read -q -P 7 11k 117k' -c 'read -q -P 0 128k 64k' -c 'read -q -P 7 192k 64k' x.qcow2
check_clean x.qcow2 "zeroes and discards"

# What lies behind the end of the disk in its last cluster is zero, should it grow.
rm -f x.qcow2
qemu-img create -q -f qcow2 -b base.raw -F raw x.qcow2 $((100 * 1024))
attach "$PWD/x.qcow2"
xfs_io -d -c 'pwrite -q -S 9 99k 1k' -c fsync "$DEV"
detach
put_bytes x.qcow2 $SIZE "$(printf %016x $((128 * 1024)))"
qemu-img convert -f qcow2 -O raw x.qcow2 grown.raw
ok "behind the end of the disk there are zeroes" \
	cmp -i $((100 * 1024)):0 -n $((28 * 1024)) grown.raw /dev/zero

no_kernel_report
done_testing
