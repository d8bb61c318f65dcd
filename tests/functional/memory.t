#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Where memory is short, requests go on and lose nothing: swap on a device and on a file on it, writeback at the limit of a cgroup, the least table cache.
# kernels: 6.1 debug
# slow: soak-only
# cpus: 2
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
group=/sys/fs/cgroup/memory-test
grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null || skip_all "no cgroups for memory"
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir -p $group mnt
# What each of two programs takes, in MiB, in a cgroup with LIMIT
size=32 limit=20M rounds=1
# MiB of files
file=24
# Seconds
patience=60
if [[ ${QCOW_SOAK-} ]]; then
	size=128 limit=64M rounds=4 file=400
elif [[ $QUICK ]]; then
	size=16 limit=12M file=12 patience=180
fi

# limited LIMIT CMD...: with no more memory than that
limited() (
	echo "$1" >$group/memory.max && echo $BASHPID >$group/cgroup.procs || exit
	shift
	"$@"
)

# swapped: KiB that are on the device
swapped() {
	awk 'NR > 1 { n += $4 } END { print n + 0 }' /proc/swaps
}

# goes_on DESC CMD...: it succeeds, and while it runs DEV is never without progress for
# long. SWAPPED becomes the most that was swapped out.
goes_on() {
	local desc=$1 pid status reads writes now before='' still=0 began=$SECONDS
	shift

	SWAPPED=0
	"$@" >"$WORK/.out" 2>&1 &
	pid=$!
	while kill -0 $pid 2>/dev/null; do
		read -rt 1 <> <(:)
		read -r reads _ _ _ writes _ <"/sys/block/${DEV#/dev/}/stat"
		now=$(swapped)
		((SWAPPED = now > SWAPPED ? now : SWAPPED))
		now="$reads $writes $(cut -d ' ' -f 14,15 /proc/$pid/stat 2>/dev/null)"
		still=$((still + 1))
		[[ $now == "$before" ]] || still=0
		before=$now
		if ((still > patience)); then
			fail "$desc: it goes on"
			diag "nothing has happened for $still seconds; reads, writes, times: $now"
			diag "in flight: $(<"/sys/block/${DEV#/dev/}/inflight")"
			echo w >/proc/sysrq-trigger
			diag "$(dmesg | tail -n 150)"
			# Nothing that comes after it could be believed, or would end.
			exit 1
		fi
	done
	wait $pid
	status=$?
	diag "$desc: $((SECONDS - began)) s; the device has had $reads reads, $writes writes"
	is "$desc" "$status" 0 || diag "$(tail -n 20 "$WORK/.out")
		$(dmesg | grep -i 'out of memory\|oom-kill' | tail -n 3)"
	return "$status"
}

# several PROGRAM...: two of it at the same time
several() {
	local pids=() pid status=0

	"$@" 1 & pids+=($!)
	"$@" 2 & pids+=($!)
	for pid in "${pids[@]}"; do
		wait "$pid" || status=1
	done
	return "$status"
}

# on_swap DESC SWAP: swap on SWAP, a file or device on DEV, is used by more than fits
on_swap() {
	local what=$1 swap=$2 discard='' pid

	ok "$what: mkswap" mkswap "$swap"
	chmod 600 "$swap"
	# Discards of a file whose length is not a multiple of 2 MiB crash Linux 6.1.
	[[ ! -b $swap ]] || discard=-d
	ok "$what: swapon" swapon $discard "$swap" || return
	goes_on "$what: $((2 * size)) MiB in a cgroup with $limit are what they should be" \
		limited $limit several memory-check $size $rounds
	ok "$what: most of it was swapped out ($SWAPPED KiB)" test "$SWAPPED" -gt $((size * 1024))
	# What is swapped out has to come back, while it is used.
	limited $limit memory-check $size $((rounds * 4)) 3 >"$WORK/late" 2>&1 &
	pid=$!
	for ((i = 0; i < 600; i++)); do
		(($(swapped) < size * 256)) || break
		sleep 0.1
	done
	ok "$what: it is in use ($(swapped) KiB)" test "$(swapped)" -ge $((size * 256))
	echo max >$group/memory.max
	goes_on "$what: swapoff while it is in use" swapoff "$swap"
	wait $pid
	is "$what: and what was there comes back" $? 0 || diag "$(<"$WORK/late")"
}

# Swap on the device
# on_device DESC CREATE ATTACH...
on_device() {
	local what=$1 options=$2
	shift 2

	rm -f swap.qcow2
	# shellcheck disable=SC2086 # options
	qemu-img create -q -f qcow2 $options swap.qcow2 $((size * 3))M
	attach "$@" "$WORK/swap.qcow2" || return
	on_swap "$what" "$DEV"
	detach
	check_clean swap.qcow2 "$what"
}
on_device "a device with the least cache" "-o cluster_size=4k" --cache-size=64K
if [[ ${QCOW_SOAK-} ]]; then
	on_device "a device" "-o cluster_size=64k,extended_l2=on"
	on_device "a device, buffered" "-o lazy_refcounts=on" --io=buffered
fi

# Swap on a file on it
qemu-img create -q -f qcow2 swap.qcow2 $((size * 4 + 64))M
if attach "$WORK/swap.qcow2"; then
	mkfs.ext4 -q "$DEV"
	mount "$DEV" mnt
	fallocate -l $((size * 3))M mnt/swap
	on_swap "a file" mnt/swap
	umount mnt
	e2fsck -fn "$DEV" >"$WORK/.out" 2>&1
	is "a file: fsck" $? 0
	detach
	check_clean swap.qcow2 "a file"
fi
rm -f swap.qcow2

# Writeback in a cgroup that is at its limit
# write_file PATTERN FILE: more than fits
write_file() {
	dd if="$1" of="$2" bs=64k conv=fsync status=none && cmp "$1" "$2"
}
random_writes() {
	fio --name=memory --directory=mnt --size="${file}M" --rw=randwrite --bsrange=4k-64k \
		--ioengine=psync --thread --verify=crc32c --do_verify=1 --verify_fatal=1 \
		--randseed=7 --fsync=256 --minimal
}
head -c ${file}M /dev/urandom >pattern
for how in direct buffered; do
	qemu-img create -q -f qcow2 -o cluster_size=16k dirty.qcow2 $((file * 4 + 32))M
	attach --io=$how "$WORK/dirty.qcow2" || continue
	mkfs.ext4 -q "$DEV"
	mount "$DEV" mnt
	goes_on "$how: $file MiB are written and read in 12 MiB" \
		limited 12M write_file pattern mnt/file
	goes_on "$how: as they are at random in 24 MiB" limited 24M random_writes
	umount mnt
	e2fsck -fn "$DEV" >"$WORK/.out" 2>&1
	is "$how: fsck" $? 0
	detach
	check_clean dirty.qcow2 "$how"
	rm dirty.qcow2
done
rmdir $group

# The least cache, and more tables than it holds by far
CELL_OPS=500
if [[ ${QCOW_SOAK-} ]]; then
	CELL_OPS=20000
elif [[ $QUICK ]]; then
	CELL_OPS=150
fi
export QCOW_MIX=read=30,write=50,zero=5,punch=5,discard=5,flush=5
run_cell cs=512,size=96M,jobs=4,cache=64K
run_cell cs=4k,size=512M,jobs=8,cache=64K
run_cell cs=4k,size=256M,jobs=4,cache=64K,snap=1,chain=qcow2

no_kernel_report
done_testing
