#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Clusters that QEMU compressed read right, and are replaced by what is written over them.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 1500
# memory: 2048

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

# Text, noise, the same byte over and over, zeroes, and an end that is no cluster
{
	seq 1 400000 | head -c 1500k
	head -c 500k /dev/urandom
	head -c 1500k /dev/zero | tr '\0' w
	head -c 900k /dev/zero
	seq 900000 990000 | head -c 601k
} >plain.raw
SIZE=$(stat -c %s plain.raw)

# pack IMAGE OPTIONS: compressing takes time, so it is done once for each.
pack() {
	if [[ ! -e $2.packed ]]; then
		qemu-img convert -c -f raw -O qcow2 -o "$2" plain.raw "$2.packed" || return
	fi
	cp "$2.packed" "$1"
}

# Through the page cache and around it
device_is() {
	cmp "$1" "$DEV" && qcow-diff --verify-only --mirror-in "$1" "$DEV"
}

# reads_right DESC OPTIONS
reads_right() {
	if ! pack x.qcow2 "$2" 2>"$WORK/.err"; then
		fail "$1: $(<"$WORK/.err")"
		return 1
	fi
	attach --read-only "$PWD/x.qcow2" || return
	ok "reads right: $1" device_is plain.raw
	detach
}

sizes=(512 4k 64k 2M)
if [[ $QUICK ]]; then
	sizes=(4k 2M)
fi
for size in "${sizes[@]}"; do
	reads_right "zlib, clusters of $size" "cluster_size=$size"
	reads_right "zstd, clusters of $size" "cluster_size=$size,compression_type=zstd"
done
like "they are compressed" "$(qemu-img check -f qcow2 x.qcow2)" '[1-9][0-9.]*% compressed'
reads_right "version 2" compat=0.10
reads_right "extended L2 entries" extended_l2=on,compression_type=zstd
reads_right "counts of one bit" refcount_bits=1

# word IMAGE OFFSET: eight bytes as a number
word() {
	echo $((0x$(od -An -v -tx1 -j "$2" -N 8 "$1" | tr -d ' \n')))
}

# l2_entry IMAGE N: where the first L2 table has entry N
l2_entry() {
	local l1

	l1=$(word "$1" 40)
	echo $((($(word "$1" "$l1") & 0xfffffffffffe00) + 8 * $2))
}

# Small reads of a cluster decompress it once, whoever makes them: udev too, which
# looks at a new device.
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
EVENT=/sys/kernel/tracing/events/qcow/qcow_unpack
if [[ -e $EVENT/enable ]]; then
	pack x.qcow2 cluster_size=64k
	# With clusters of 64 KiB the lowest 54 bits are the offset.
	at=$(($(word x.qcow2 "$(l2_entry x.qcow2 16)") & ((1 << 54) - 1)))
	echo >/sys/kernel/tracing/trace
	echo 1 >$EVENT/enable
	attach --read-only "$PWD/x.qcow2"
	for ((i = 0; i < 16; i++)); do
		dd if="$DEV" of=/dev/null bs=4k skip=256 count=16 iflag=direct status=none &
	done
	wait
	echo 0 >$EVENT/enable
	is "256 reads of one cluster decompress it once" \
		"$(grep -c "qcow_unpack:.* host_offset=$(printf '0x%x' "$at") " \
			/sys/kernel/tracing/trace)" 1
	detach
	# Which CPU takes what is chance; but not that it is the same one each time.
	for ((i = cpus = 0; i < 5 && cpus < $(nproc); i++)); do
		attach --read-only "$PWD/x.qcow2"
		udevadm settle
		echo >/sys/kernel/tracing/trace
		echo 1 >$EVENT/enable
		dd if="$DEV" of=/dev/null bs=1408k skip=1 count=1 iflag=direct status=none
		echo 0 >$EVENT/enable
		detach
		cpus=$(grep qcow_unpack: /sys/kernel/tracing/trace | grep -o '\[0[0-9]*\]' |
			sort -u | wc -l)
	done
	is "the clusters of one read are decompressed on all CPUs" "$cpus" "$(nproc)"
else
	skip "256 reads of one cluster decompress it once" "no trace events"
	skip "the clusters of one read are decompressed on all CPUs" "no trace events"
fi

# these_read FIRST [COUNT]: clusters of 64 KiB, without reading ahead of them
these_read() {
	cmp <(dd if="$DEV" bs=64k skip="$1" ${2:+count="$2"} iflag=direct status=none) \
		<(dd if=plain.raw bs=64k skip="$1" ${2:+count="$2"} status=none)
}

# Damage to compressed data fails the requests that meet it, nothing else.
# damaged TYPE
damaged() {
	local entry at

	pack x.qcow2 "cluster_size=64k,compression_type=$1" || return
	# With clusters of 64 KiB the lowest 54 bits are the offset.
	entry=$(word x.qcow2 "$(l2_entry x.qcow2 3)")
	at=$((entry & ((1 << 54) - 1)))
	put_bytes x.qcow2 $((at + 1000)) "$(printf 'ff00%.0s' {1..200})"

	attach "$PWD/x.qcow2" || return
	not_ok "$1: damaged data cannot be read" \
		dd if="$DEV" of=/dev/null bs=64k skip=3 count=1 iflag=direct
	like "$1: that is an I/O error" "$(<"$WORK/.out")" 'Input/output'
	not_ok "$1: and not be copied" xfs_io -d -c 'pwrite -q 200k 4k' "$DEV"
	ok "$1: what lies before can be read" these_read 0 3
	ok "$1: and what lies behind" these_read 4
	ok "$1: others can be written" xfs_io -d -c 'pwrite -q -S 1 256k 4k' "$DEV"
	ok "$1: it can be replaced as a whole" xfs_io -d -c 'pwrite -q -b 64k -S 2 192k 64k' "$DEV"
	detach
	check_clean x.qcow2 "$1, damaged data"
	is "$1: the image is not marked corrupt" "$(($(word x.qcow2 72) & 2))" 0
	cp plain.raw want.raw
	xfs_io -c 'pwrite -q -S 1 256k 4k' -c 'pwrite -q -S 2 192k 64k' want.raw
	same want.raw raw x.qcow2 qcow2 "$1, replaced"
}
damaged zlib
damaged zstd

# A file that ends where its last data does, at any byte
qemu-img create -q -f qcow2 end.qcow2 1M
for ((i = 0; i < 3; i++)); do
	qemu-io -f qcow2 -c "write -q -c -P $i $((i * 64))k 64k" end.qcow2
	attach --read-only end.qcow2
	ok "compressed data at the end of a file of $(stat -c %s end.qcow2) bytes" \
		cmp -n 65536 <(head -c 65536 /dev/zero | tr '\0' "\\$i") \
		<(dd if="$DEV" bs=64k skip=$i count=1 iflag=direct status=none)
	detach
done

# Without the last bytes of the file the data is right (its end mark may be all that is
# missing), or cannot be read; also when the file has become longer.
base64 -w 0 /dev/urandom | head -c 64k >letters
cuts_are_noticed() {
	local desc=$1 cut bad='' n=0
	shift

	for cut in 1 5 20 100 1000; do
		cp whole.qcow2 cut.qcow2
		truncate -s -$cut cut.qcow2
		try_attach "$@" "$PWD/cut.qcow2" || bad+="$cut: $(<"$WORK/.err") "
		[[ $desc != *written ]] || xfs_io -d -c 'pwrite -q -b 1M 2M 8M' -c fsync "$DEV"
		if dd if="$DEV" of=read bs=64k count=1 iflag=direct status=none 2>/dev/null; then
			cmp -s letters read || bad+="$cut: it reads otherwise "
		else
			n=$((n + 1))
		fi
		detach
	done
	is "cut data is not made up ($desc, $n of 5 cannot be read)" "$bad" ''
	ok "cut data cannot be read ($desc)" test $n -ge 3
}
for type in zlib zstd; do
	qemu-img create -q -f qcow2 -o compression_type=$type whole.qcow2 16M
	qemu-io -f qcow2 -c 'write -q -c -s letters 0 64k' whole.qcow2
	cuts_are_noticed $type --read-only
	cuts_are_noticed "$type, writable"
	cuts_are_noticed "$type, written"
done

# Data may end before the sectors that its entry names do, and so may the file. If the
# file ends first, that is damage to this data alone; zlib would make something of
# zeroes in its place.
# past_end TYPE: the last data of the image goes on behind the end of the file
past_end() {
	local n entry at=0 last entries

	pack x.qcow2 "cluster_size=64k,compression_type=$1" || return
	mapfile -t entries < <(od -An -v -tx8 --endian=big -w8 -j "$(l2_entry x.qcow2 0)" \
		-N $((8 * (SIZE >> 16))) x.qcow2 | sed 's/^ */0x/')
	for ((n = 0; n < SIZE >> 16; n++)); do
		entry=$((entries[n]))
		if ((entry >> 62 == 1 && (entry & ((1 << 54) - 1)) > at)); then
			at=$((entry & ((1 << 54) - 1))) last=$n
		fi
	done
	entry=$(word x.qcow2 "$(l2_entry x.qcow2 "$last")")
	put_bytes x.qcow2 "$(l2_entry x.qcow2 "$last")" \
		"$(printf %016x $((entry | 255 << 54)))"
	attach "$PWD/x.qcow2" || return
	ok "$1: data whose last sectors are behind the end is read" these_read "$last" 1
	# Nobody has counted what it would go on in. Others get that, and keep it.
	xfs_io -d -c 'pwrite -q -b 256k -S 4 0 256k' \
		-c "pwrite -q -b 64k -S 5 $((last << 16)) 64k" -c fsync "$DEV"
	sleep 1
	xfs_io -d -c 'pwrite -q -b 256k -S 6 256k 256k' -c fsync "$DEV"
	cp plain.raw want.raw
	xfs_io -c 'pwrite -q -S 4 0 256k' -c "pwrite -q -S 5 $((last << 16)) 64k" \
		-c 'pwrite -q -S 6 256k 256k' want.raw
	ok "$1: nothing of others is freed with it" cmp want.raw "$DEV"
	detach
	is "$1: it is no damage" "$(($(word x.qcow2 72) & 2))" 0
	ok "$1: and at worst leaks are left" is_consistent x.qcow2

	pack x.qcow2 "cluster_size=64k,compression_type=$1"
	truncate -s $((at + 700)) x.qcow2
	attach "$PWD/x.qcow2" || return
	not_ok "$1: data that the file cuts off cannot be read" \
		dd if="$DEV" of=/dev/null bs=64k skip="$last" count=1 iflag=direct
	ok "$1: what lies before it can" these_read 0 "$last"
	ok "$1: others can be written" xfs_io -d -c 'pwrite -q -S 1 0 64k' -c fsync "$DEV"
	ok "$1: it can be replaced as a whole" \
		xfs_io -d -c "pwrite -q -b 64k -S 2 $((last << 16)) 64k" -c fsync "$DEV"
	detach
	ok "$1: at worst leaks are left of data that was cut off" is_consistent x.qcow2
}
past_end zlib
past_end zstd

# Where none of it is in the file, the entry is wrong.
pack x.qcow2 cluster_size=64k
put_bytes x.qcow2 "$(l2_entry x.qcow2 5)" 4000000010000000
attach --read-only "$PWD/x.qcow2"
not_ok "compressed data behind the end of the file cannot be read" \
	dd if="$DEV" of=/dev/null bs=64k skip=5 count=1 iflag=direct
detach
attach "$PWD/x.qcow2"
not_ok "nor in an image that is written" \
	dd if="$DEV" of=/dev/null bs=64k skip=5 count=1 iflag=direct
not_ok "which takes no more writes" xfs_io -d -c 'pwrite -q 0 4k' -c fsync "$DEV"
ok "and can still be read" these_read 0 5
detach

# Small clusters leave the offset more than the 56 bits that it may have. Who did
# not look at those above would read this.
pack x.qcow2 cluster_size=512
at=$(l2_entry x.qcow2 5)
entry=$(word x.qcow2 "$at")
is "an entry of a small compressed cluster" $((entry >> 61)) 2
for bit in 56 60; do
	pack x.qcow2 cluster_size=512
	put_bytes x.qcow2 "$at" "$(printf %016x $((entry | 1 << bit)))"
	attach --read-only "$PWD/x.qcow2"
	not_ok "compressed data at an offset with bit $bit cannot be read" \
		dd if="$DEV" of=/dev/null bs=512 skip=5 count=1 iflag=direct
	ok "what lies before can, with bit $bit" cmp <(head -c 2560 plain.raw) \
		<(dd if="$DEV" bs=512 count=5 iflag=direct status=none)
	detach
	attach "$PWD/x.qcow2"
	not_ok "nor can it be written over, with bit $bit" \
		xfs_io -d -c 'pwrite -q 2560 512' -c fsync "$DEV"
	detach
done

# The bitmap of an extended entry means nothing while the cluster is compressed.
pack x.qcow2 cluster_size=64k,extended_l2=on
cp x.qcow2 odd.qcow2
n=2
for bitmap in 00000000ffffffff ffffffff00000000 ffffffffffffffff; do
	put_bytes odd.qcow2 $(($(l2_entry odd.qcow2 $((2 * n))) + 8)) $bitmap
	is "cluster $n is compressed" \
		$(($(word odd.qcow2 "$(l2_entry odd.qcow2 $((2 * n)))") >> 62 & 3)) 1
	n=$((n + 1))
done
cp plain.raw want.raw
attach --read-only "$PWD/odd.qcow2"
ok "compressed clusters with a bitmap are read" device_is plain.raw
detach
attach "$PWD/odd.qcow2"
ok "and written, in part" xfs_io -d -c 'pwrite -q -S 5 130k 4k' -c 'pwrite -q -S 6 190k 10k' \
	-c 'pwrite -q -S 7 300k 1k' "$DEV"
detach
xfs_io -c 'pwrite -q -S 5 130k 4k' -c 'pwrite -q -S 6 190k 10k' -c 'pwrite -q -S 7 300k 1k' \
	want.raw
for ((n = 2; n < 5; n++)); do
	is "then the bitmap of cluster $n says what there is" \
		"$(printf %016x "$(word odd.qcow2 $(($(l2_entry odd.qcow2 $((2 * n))) + 8)))")" \
		00000000ffffffff
done
check_clean odd.qcow2 "compressed clusters with a bitmap"
same want.raw raw odd.qcow2 qcow2 "compressed clusters with a bitmap"

# What becomes of compressed clusters, and of the host clusters they share
# changes DESC OPTIONS XFS_IO-COMMAND...
changes() {
	local desc=$1 options=$2 c=()
	shift 2

	for cmd; do
		c+=(-c "$cmd")
	done
	pack x.qcow2 "$options" || return
	cp plain.raw want.raw
	attach "$PWD/x.qcow2" || return
	ok "$desc" xfs_io -d "${c[@]}" "$DEV"
	detach
	xfs_io "${c[@]}" want.raw
	check_clean x.qcow2 "$desc"
	same want.raw raw x.qcow2 qcow2 "$desc"
}
kinds=('cluster_size=64k' 'cluster_size=4k,refcount_bits=2' 'cluster_size=64k,extended_l2=on')
if [[ ! $QUICK ]]; then
	kinds+=('cluster_size=64k,compression_type=zstd,refcount_bits=64' 'cluster_size=2M')
fi
for options in "${kinds[@]}"; do
	changes "$options: a sector" "$options" 'pwrite -q -S 3 100k 512'
	changes "$options: to the end" "$options" "pwrite -q -S 3 $((SIZE - 1536)) 1536"
	changes "$options: many" "$options" 'pwrite -q -S 3 33k 1111k' 'pwrite -q -S 4 4k 2M'
	changes "$options: all" "$options" "pwrite -q -b 1M -S 3 0 $SIZE"
	changes "$options: zeroes" "$options" 'fzero -k 65k 900k' 'fzero -k 3000k 4k'
	changes "$options: punched" "$options" 'fpunch 65k 900k' 'fpunch 2M 1M' 'fpunch 3k 2k'
done
changes "version 2: written and punched" compat=0.10 'pwrite -q -S 3 33k 1111k' 'fpunch 2M 2M'

# Freed clusters are used again, and what was decompressed from them is forgotten.
pack x.qcow2 cluster_size=4k
attach "$PWD/x.qcow2"
cmp plain.raw "$DEV"
xfs_io -d -c 'fpunch 0 2M' -c fsync "$DEV"
sleep 1
xfs_io -d -c 'pwrite -q -b 64k -S 9 0 2M' -c fsync "$DEV"
detach
cp plain.raw want.raw
xfs_io -c 'pwrite -q -S 9 0 2M' want.raw
check_clean x.qcow2 "after reuse"
same want.raw raw x.qcow2 qcow2 "after reuse"

# Random requests
cells=(
	'cs=64k,packed=zlib'
	'cs=4k,packed=zstd,jobs=4,hot=512k'
	'cs=64k,chain=packed,jobs=4'
	'cs=64k,packed=zlib,snap=1,jobs=4'
	'cs=2M,size=24M,packed=zstd'
	'v=2,cs=64k,packed=zlib,chain=raw'
	'cs=64k,ext=1,packed=zlib,jobs=4'
	'cs=512,packed=zlib,chain=packed,rc=64,jobs=4,size=4M'
	'cs=4k,packed=zlib,rc=1,discard=keep'
	'cs=16k,ext=1,packed=zstd,chain=packed,snap=1,jobs=8'
	'cs=64k,packed=zlib,io=buffered,dev=buffered,size=8388908'
	'cs=1M,packed=zstd,chain=packed,size=16M,jobs=4,cache=256K'
)
if [[ $QUICK ]]; then
	cells=("${cells[@]:0:7}")
	CELL_OPS=500
else
	CELL_OPS=$((1500 / SHARE))
fi
for cell in "${cells[@]}"; do
	run_cell "$cell"
done

no_kernel_report
done_testing
