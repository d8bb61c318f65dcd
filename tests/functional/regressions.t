#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Bugs that other implementations of the format have had: what else would not notice them.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# Documentation/format-conformance.rst lists them with the tests that guard
# against each; here are those that no other test is about.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
far=(cluster_size=64k 'cluster_size=2M,compression_type=zstd')
large=(512:128G 64k:2P 2M:1E)
several=(cluster_size=512)
holes=('blkdiscard -l 5G' 'fallocate -z -l 5G')
if [[ ${QCOW_SOAK-} ]]; then
	far+=(cluster_size=4k)
	several+=('cluster_size=4k,refcount_bits=8')
	holes+=('blkdiscard -z -l 5G' 'fallocate -p -l 5G')
elif [[ $QUICK ]]; then
	far=(cluster_size=64k)
	large=(2M:1E)
	holes=('blkdiscard -l 5G')
fi

# word FILE OFFSET: eight bytes as a number
word() {
	echo $((0x$(od -An -v -tx8 --endian=big -j "$2" -N 8 "$1" | tr -d ' ')))
}

# bytes FROM COUNT UNIT: of the device, each value once
bytes() {
	dd if="$DEV" bs="$3" skip="$1" count="$2" iflag=direct status=none | tr -s '\0-\377' |
		od -An -v -tx1 -w1 | sort -u | tr -d ' \n'
}

freed() {
	cat "/sys/block/${DEV#/dev/}/qcow/clusters_freed"
}

# --- A request in flight to a cluster that is discarded and taken again
#
# One host cluster, 0x50000, is on storage that takes seconds for it, reads or
# writes; all else is fast. Both flushes are.
SLOW=4000

# slow_storage IMAGE READ-MS WRITE-MS
slow_storage() {
	local at=$((0x50000 >> 9)) n=128 sectors

	truncate -s 16M "$1"
	new_loop "$1" --direct-io=on || return
	sectors=$(blockdev --getsz "$LOOP")
	printf '%s\n' "0 $at linear $LOOP 0" \
		"$at $n delay $LOOP $at $2 $LOOP $at $3 $LOOP $at 0" \
		"$((at + n)) $((sectors - at - n)) linear $LOOP $((at + n))" |
		dmsetup create slow || return
	udevadm settle
}

slow_storage_gone() {
	udevadm settle
	dmsetup remove --retry slow
	losetup -d "$LOOP"
	LOOPS=()
}

# in_flight DESC READ-MS WRITE-MS OPTIONS PREPARE COMMAND: the xfs_io COMMAND is in
# flight to guest cluster 0 while that is discarded and other clusters are written.
in_flight() {
	local desc=$1 before pid image=slow.img began took

	rm -f $image
	qemu-img create -q -f qcow2 -o "$4" $image 8M
	qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' ${5:+-c "$5"} $image ||
		{ fail "$desc: prepare"; return; }
	is "$desc: it is where the storage is slow" \
		"$(($(word $image $((0x40000))) & ~(1 << 63 | 1)))" $((0x50000))
	if ! slow_storage $image "$2" "$3"; then
		fail "$desc: storage"
		return
	fi
	# udev would look at what is slow.
	udevadm control --stop-exec-queue
	attach /dev/mapper/slow
	before=$(freed)
	began=$(date +%s%N)
	xfs_io -d -c "$6" "$DEV" >inflight.out 2>&1 &
	pid=$!
	sleep 0.5
	# -f: it would look for a file system, where it is slow.
	blkdiscard -f -o 0 -l 64k "$DEV" 2>/dev/null
	xfs_io -c fsync "$DEV"
	if kill -0 $pid 2>/dev/null; then
		is "$desc: the cluster is not free while it is" "$(freed)" "$before"
	else
		pass "$desc: the discard waits for it"
	fi
	xfs_io -d -c 'pwrite -q -b 64k -S 0x61 1M 1M' -c fsync "$DEV"
	diag "discarded, flushed and written elsewhere after $((($(date +%s%N) - began) / 1000000)) ms"
	wait $pid
	took=$((($(date +%s%N) - began) / 1000000))
	ok "$desc: for as long as the storage takes ($took ms)" test $took -ge $SLOW
	is "$desc: what was written meanwhile is whole" "$(bytes 16 16 64k)" 61
	IN_FLIGHT=$(bytes 0 1 64k)
	udevadm control --start-exec-queue
	detach
	check_clean /dev/mapper/slow "$desc"
	is "$desc: and QEMU reads the same" \
		"$(qemu-io -r -f qcow2 -c 'read -P 0x61 1M 1M' /dev/mapper/slow | grep -c 'verification failed')" 0
	slow_storage_gone
}

if modprobe -q dm-delay && dmsetup targets | grep -q '^delay'; then
	in_flight "a read in flight does not see another's data" $SLOW 0 cluster_size=64k \
		'' 'pread -v -b 64k 0 64k'
	like "that read is right" "$(grep -o '^[0-9a-f]*:  [0-9a-f ]*' inflight.out |
		sed 's/.*:  //; s/ /\n/g' | sort -u | paste -sd' ')" '^ ?(00|41|00 41)$'
	in_flight "a write in flight does not land in another's cluster" 0 $SLOW \
		cluster_size=64k '' 'pwrite -q -b 64k -S 0x51 0 64k'
	like "that write, or the discard, is there" "$IN_FLIGHT" '^(00|51)$'
	in_flight "a write in flight to a zero cluster that has a place" 0 $SLOW \
		cluster_size=64k 'write -q -z 0 64k' 'pwrite -q -b 64k -S 0x51 0 64k'
	like "that write to a zero cluster, or the discard, is there" "$IN_FLIGHT" '^(00|51)$'
	in_flight "a write in flight to a new subcluster" 0 $SLOW \
		cluster_size=64k,extended_l2=on 'write -q -z 32k 32k' \
		'pwrite -q -b 32k -S 0x51 32k 32k'
	like "that write to a subcluster, or the discard, is there" "$IN_FLIGHT" '^(00|0051|0041|004151|4151|51)$'
else
	skip "requests in flight to what is discarded" "no dm-delay"
fi

# --- Host offsets that need more than 32 bits
seq 1 400000 | head -c 2M >plain.raw
for options in "${far[@]}"; do
	rm -f far.qcow2
	# The tables know 4.5 GiB of clusters, which the file has as a hole.
	qemu-img create -q -f qcow2 -o "$options,preallocation=metadata" far.qcow2 4608M
	qemu-img resize -q -f qcow2 far.qcow2 4612M
	qemu-io -f qcow2 -c 'write -q -c -s plain.raw 4608M 2M' far.qcow2 >"$WORK/.out" 2>&1 ||
		fail "$options: write -c: $(<"$WORK/.out")"
	check=$(qemu-img check -f qcow2 --output=json far.qcow2)
	ok "$options: compressed data is behind 4 GiB" test \
		"$(jq '."image-end-offset"' <<<"$check")" -gt $((4608 << 20)) -a \
		"$(jq '."compressed-clusters"' <<<"$check")" -ge 1
	attach --read-only "$PWD/far.qcow2"
	ok "$options: compressed data behind 4 GiB is read" \
		cmp plain.raw <(dd if="$DEV" bs=1M skip=4608 count=2 iflag=direct status=none)
	detach
	attach "$PWD/far.qcow2"
	ok "$options: it is written over, and others beside it" \
		xfs_io -d -c 'pwrite -q -S 0x71 4718596k 12k' -c 'pwrite -q -S 0x72 4610M 2M' "$DEV"
	detach
	cp plain.raw want.raw
	xfs_io -c 'pwrite -q -S 0x71 4k 12k' -c 'pwrite -q -S 0x72 2M 2M' want.raw
	check_clean far.qcow2 "$options, behind 4 GiB"
	qemu-img dd -f qcow2 -O raw bs=1M skip=4608 count=4612 if=far.qcow2 of=got.raw
	ok "$options: QEMU reads the same behind 4 GiB" cmp want.raw got.raw
done
rm -f far.qcow2

# --- A layer that is shorter than those above and below it
make_raw base.raw 8M 11
# The end is in a cluster, and on the edge of one.
for middle in 3000320 2097152; do
	rm -f middle.qcow2 top.qcow2
	qemu-img create -q -f qcow2 -b base.raw -F raw middle.qcow2 $middle
	qemu-io -f qcow2 -c 'write -q -P 0x21 1000k 5k' middle.qcow2
	qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 -o cluster_size=16k top.qcow2 8M
	qemu-io -f qcow2 -c 'write -q -P 0x22 3M 5k' top.qcow2
	qemu-img convert -f qcow2 -O raw top.qcow2 want.raw
	attach "$PWD/top.qcow2"
	ok "what a shorter middle layer of $middle bytes cuts off is not seen" cmp want.raw "$DEV"
	ok "nor when it is written around" qcow-diff --quiet --ops 150 --max-io 64k \
		--mirror-in want.raw --mirror-out mirror.raw "$DEV"
	detach
	check_clean top.qcow2 "over a shorter middle layer"
	same mirror.raw raw top.qcow2 qcow2 "over a shorter middle layer"
done
# And one that has become longer
rm -f top.qcow2
qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2 1000448
qemu-img resize -q top.qcow2 6M
qemu-img convert -f qcow2 -O raw top.qcow2 want.raw
attach "$PWD/top.qcow2"
ok "an overlay that grew does not show what was behind its end" cmp want.raw "$DEV"
is "but zeroes" "$(bytes 1 5 1M)" 00
detach

# --- Requests, and disks, as large as they get
qemu-img create -q -f qcow2 empty.qcow2 1T
size=$(stat -c %s empty.qcow2)
attach "$PWD/empty.qcow2"
ok "a discard of a disk with nothing in it" blkdiscard "$DEV"
xfs_io -c fsync "$DEV"
is "takes no clusters" "$(<"/sys/block/${DEV#/dev/}/qcow/clusters_allocated")" 0
detach
is "and does not make the file longer" "$(stat -c %s empty.qcow2)" "$size"
check_clean empty.qcow2

# Where a file that grows ends within a block, ext4 may write all of that back later, as
# it was then, over what is being written to it directly.
qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 8M
attach "$PWD/small.qcow2"
odd=$(($(stat -c %s small.qcow2) % 4096))
for ((i = 0; i < 8; i++)); do
	xfs_io -d -c "pwrite -q ${i}M 1M" "$DEV"
	odd+=" $(($(stat -c %s small.qcow2) % 4096))"
done
is "a file always grows to whole blocks" "$odd" "0 0 0 0 0 0 0 0 0"
detach
check_clean small.qcow2

# Also where a write fills the last cluster, of which only the beginning was in the file.
qemu-img create -q -f qcow2 -o extended_l2=on part.qcow2 8M
qemu-io -f qcow2 -c 'write -q 0 512' part.qcow2
was=$(stat -c %s part.qcow2)
ok "a file that has a part of its last cluster ($was bytes)" test $((was % 65536)) -ne 0
attach "$PWD/part.qcow2"
odd=$(($(stat -c %s part.qcow2) % 65536))
xfs_io -d -c 'pwrite -q 2k 512' "$DEV"
is "it has all of it before it is written" "$odd $(($(stat -c %s part.qcow2) % 65536))" "0 0"
detach
check_clean part.qcow2

# What it was made longer by for that is cut off again, if no cluster was taken there.
qemu-img create -q -f qcow2 -o cluster_size=2k,refcount_bits=1 small.qcow2 8M
for ((i = 0; i < 8; i++)); do
	attach "$PWD/small.qcow2"
	xfs_io -d -c "pwrite -q -S $((i == 0)) $((i * 2048)) 2048" "$DEV"
	detach
done
check_clean small.qcow2
attach --read-only "$PWD/small.qcow2"
ok "clusters of zeroes at the end of the file are still there" cmp -n 14336 -i 2048:0 "$DEV" /dev/zero
detach

# Parts of it that have data: around 2 GiB, around 4 GiB, and behind all of it
marks=(1M 2047M 4095M 5500M)
marked() {
	local mark

	for mark in "${marks[@]}"; do
		bytes "${mark%M}" 2 1M
		echo
	done | paste -sd' '
}
qemu-img create -q -f qcow2 huge.qcow2 6G
attach "$PWD/huge.qcow2"
for how in "${holes[@]}"; do
	for mark in "${marks[@]}"; do
		xfs_io -d -c "pwrite -q -b 1M -S 0x31 $mark 2M" "$DEV"
	done
	is "$how: before" "$(marked)" "31 31 31 31"
	# shellcheck disable=SC2086
	ok "$how" $how "$DEV"
	is "$how: is of 5 GiB and no more" "$(marked)" "00 00 00 31"
done
detach
check_clean huge.qcow2

for shape in "${large[@]}"; do
	cs=${shape%:*} size=${shape#*:}
	rm -f large.qcow2
	qemu-img create -q -f qcow2 -o cluster_size="$cs" large.qcow2 "$size"
	attach "$PWD/large.qcow2" || continue
	end=$(blockdev --getsize64 "$DEV")
	is "a disk of $size: the size" "$end" "$(word large.qcow2 24)"
	ok "a disk of $size: it is written at its end, its middle and its start" xfs_io -d \
		-c "pwrite -q -b 64k -S 0x81 $((end - 65536)) 64k" \
		-c "pwrite -q -b 64k -S 0x82 $((end / 2 - 4096)) 64k" \
		-c 'pwrite -q -b 64k -S 0x83 0 64k' "$DEV"
	ok "a disk of $size: its end is zeroed" blkdiscard -z -o $((end - 65536)) "$DEV"
	ok "a disk of $size: and its last sector written" xfs_io -d -c "pwrite -q -S 0x84 $((end - 512)) 512" "$DEV"
	detach
	check_clean large.qcow2 "a disk of $size"
	out=$(qemu-io -r -f qcow2 -c 'read -P 0x83 0 64k' -c "read -P 0x82 $((end / 2 - 4096)) 64k" \
		-c "read -P 0 $((end - 65536)) 65024" -c "read -P 0x84 $((end - 512)) 512" large.qcow2 2>&1)
	is "a disk of $size: QEMU finds it" "$(grep -c '^read ' <<<"$out") $(grep -ci 'fail' <<<"$out")" "4 0"
done
rm -f large.qcow2 huge.qcow2

# --- Snapshots whose L1 tables are longer and shorter than the disk's
for options in "${several[@]}"; do
	rm -f snap.qcow2
	qemu-img create -q -f qcow2 -o "$options" snap.qcow2 1M
	n=0
	for size in 1M 9M 3M 6M; do
		qemu-img resize -q --shrink snap.qcow2 $size
		qemu-io -f qcow2 -c "write -q -P 0x5$n ${n}00k 300k" \
			-c "write -q -P 0x6$n $((${size%M} * 1024 - 100))k 100k" \
			-c "write -q -z $((n * 100 + 50))k 64k" snap.qcow2
		qemu-img convert -f qcow2 -O raw snap.qcow2 $n.raw
		qemu-img snapshot -c s$n snap.qcow2
		n=$((n + 1))
	done
	qemu-img resize -q --shrink snap.qcow2 4M
	# QEMU leaves the table as long as it was: let it be shorter than those of two.
	cs=$(to_bytes "$(sed 's/cluster_size=//; s/,.*//' <<<"$options")")
	put_bytes snap.qcow2 36 "$(printf %08x $((4194304 * 8 / (cs * cs))))"
	qemu-img check -q -r leaks snap.qcow2 >/dev/null 2>&1
	# shows WHEN
	shows() {
		local i

		for ((i = 0; i < n; i++)); do
			attach --snapshot=s$i "$PWD/snap.qcow2" || return
			ok "$options: snapshot $i $1" cmp $i.raw "$DEV"
			detach
		done
	}
	shows "shows what it was taken of"
	qemu-img convert -f qcow2 -O raw snap.qcow2 want.raw
	attach "$PWD/snap.qcow2"
	ok "$options: the disk is written" qcow-diff --quiet --ops 300 --jobs 4 --max-io 64k \
		--mirror-in want.raw --mirror-out mirror.raw "$DEV"
	detach
	check_clean snap.qcow2 "$options, with four snapshots"
	same mirror.raw raw snap.qcow2 qcow2 "$options, with four snapshots"
	shows "is as it was after writes to the disk"
	for i in 1 0 3 2; do
		ok "$options: QEMU goes back to snapshot $i" qemu-img snapshot -a s$i snap.qcow2
		same $i.raw raw snap.qcow2 qcow2 "$options"
		attach "$PWD/snap.qcow2"
		ok "$options: which is written" qcow-diff --quiet --seed 9 --ops 100 --max-io 64k \
			--mirror-in $i.raw --mirror-out mirror.raw "$DEV"
		detach
		check_clean snap.qcow2 "$options, gone back to $i"
		same mirror.raw raw snap.qcow2 qcow2 "$options, gone back to $i"
	done
	shows "is as it was in the end"
done

# --- A table's entry is written, and nothing beside it
qemu-img create -q -f qcow2 around.qcow2 1G
truncate -s 262144 around.qcow2
put_bytes around.qcow2 $((0x30010)) "$(printf 'ee%.0s' {1..4080})"
attach "$PWD/around.qcow2"
xfs_io -d -c 'pwrite -q -S 0x11 0 4k' -c 'pwrite -q -S 0x12 600M 4k' -c fsync "$DEV"
detach
is "an L1 entry is written, and nothing behind the table" \
	"$(od -An -v -tx1 -w1 -j $((0x30010)) -N 4080 around.qcow2 | sort -u | tr -d ' \n')" ee
ok "both entries are there" test "$(word around.qcow2 $((0x30000)))" -ne 0 -a \
	"$(word around.qcow2 $((0x30008)))" -ne 0
check_clean around.qcow2

# --- A file that grows, with writes in any order, on file systems that allocate late
for fs in xfs:400M btrfs:256M; do
	name=${fs%:*}
	if ! command -v "mkfs.$name" >/dev/null || ! modprobe -q "$name"; then
		skip "an image on $name" "there is no $name"
		continue
	fi
	rm -f fs.img
	truncate -s "${fs#*:}" fs.img
	mkdir -p fs
	"mkfs.$name" -q -f fs.img >/dev/null 2>&1
	if ! mount -o loop fs.img fs; then
		fail "mount $name"
		continue
	fi
	qemu-img create -q -f qcow2 fs/image 16M
	attach "$PWD/fs/image"
	c=()
	for ((i = 255; i >= 0; i--)); do
		c+=(-c "pwrite -q -S 0x91 $((4096 + 4 * i))k 4k")
	done
	ok "an image on $name: parts of clusters from the last to the first" \
		xfs_io -d "${c[@]}" -c fsync "$DEV"
	is "an image on $name: they are all there" "$(bytes 4 1 1M)" 91
	dd if="$DEV" of=want.raw bs=1M iflag=direct status=none
	ok "an image on $name: many at once" qcow-diff --quiet --jobs 8 --ops 800 --max-io 32k \
		--mix read=10,write=70,zero=5,punch=5,discard=5,flush=5 \
		--mirror-in want.raw --mirror-out mirror.raw "$DEV"
	detach
	check_clean fs/image "on $name"
	same mirror.raw raw fs/image qcow2 "on $name"
	umount fs
done

no_kernel_report
done_testing
