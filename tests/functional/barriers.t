#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# How many barriers of the file it takes for a flush: one if nothing has changed but data, at most two with new clusters, and one commit for many that flush at the same time.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 300

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

need_driver
cd "$WORK" || exit
events=/sys/kernel/tracing/events
barrier=ext4/ext4_sync_file_enter
if [[ ! -d $events/$barrier ]]; then
	mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
fi
[[ -d $events/$barrier ]] || skip_all "the kernel cannot count fsync"

# count COMMAND...: sets FSYNCS, how many of them the image's files have seen
count() {
	echo "$filter" >"$events/$barrier/filter"
	: >/sys/kernel/tracing/trace
	echo 1 >"$events/$barrier/enable"
	ok "$kind: $*" "$@"
	echo 0 >"$events/$barrier/enable"
	FSYNCS=$(grep -c 'ext4_sync_file_enter:' /sys/kernel/tracing/trace)
}

flush() {
	xfs_io -c fsync "$DEV"
}

# write_at OFFSET LENGTH: without a flush
write_at() {
	xfs_io -d -c "pwrite -q -b 64k $1 $2" "$DEV"
}

for options in cluster_size=64k cluster_size=4k lazy_refcounts=on extended_l2=on \
	data_file=image.data; do
	kind=$options
	rm -f image.qcow2 image.data
	qemu-img create -q -f qcow2 -o "$options" image.qcow2 64M
	filter="ino == $(stat -c %i image.qcow2)"
	files=1
	if [[ -e image.data ]]; then
		filter+=" || ino == $(stat -c %i image.data)"
		files=2
	fi
	attach image.qcow2
	ok "$kind: something to begin with" write_at 0 1M
	ok "$kind: a flush" flush
	count flush
	is "$kind: a flush of nothing" "$FSYNCS" 1
	count write_at 64k 64k
	is "$kind: data in its place takes none" "$FSYNCS" 0
	count flush
	is "$kind: a flush of data in its place" "$FSYNCS" 1
	count write_at 1M 1M
	is "$kind: nor do new clusters, until they are flushed" "$FSYNCS" 0
	count flush
	ok "$kind: a flush of new clusters takes two at most" test "$FSYNCS" -le $((2 * files))
	ok "$kind: and one at least" test "$FSYNCS" -ge 1
	count blkdiscard -o 1M -l 1M "$DEV"
	is "$kind: nor does a discard" "$FSYNCS" 0
	count flush
	ok "$kind: a flush of a discard takes two at most" test "$FSYNCS" -le $((2 * files))

	# 8 that write to new clusters and flush each time: some wait for the same commit.
	count fio --name=many --filename="$DEV" --rw=randwrite --bs=64k --direct=1 --fsync=1 \
		--ioengine=psync --numjobs=8 --number_ios=16 --offset=8M --size=48M \
		--group_reporting --output=/dev/null
	diag "$FSYNCS barriers for 128 flushes"
	ok "$kind: many at the same time share them" test "$FSYNCS" -lt $((2 * files * 128))
	detach
	check_clean image.qcow2 "$kind"
done
no_kernel_report
done_testing
