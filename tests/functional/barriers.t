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
need_fsyncs

# flushed: from here on all is clean; not so counts that may wait.
flushed() {
	[[ $kind == lazy_refcounts=on ]] || clean_since=$SECONDS
}

flush() {
	xfs_io -c fsync "$DEV"
}

# write_at OFFSET LENGTH: without a flush
write_at() {
	xfs_io -d -c "pwrite -q -b 64k $1 $2" "$DEV"
}

for options in data_file=image.qcow2.data cluster_size=64k cluster_size=4k lazy_refcounts=on \
	extended_l2=on; do
	kind=$options
	rm -f image.qcow2*
	qemu-img create -q -f qcow2 -o "$options" image.qcow2 64M
	files=1
	[[ $options != data_file=* ]] || files=2
	attach image.qcow2
	clean_since=$SECONDS
	ok "$kind: something to begin with" write_at 0 1M
	ok "$kind: a flush" flush
	fsyncs "$kind: flush" flush
	timely "$kind: a flush of nothing" test "$FSYNCS" -eq 1
	flushed
	fsyncs "$kind: write_at 64k 64k" write_at 64k 64k
	timely "$kind: data in its place takes none" test "$FSYNCS" -eq 0
	fsyncs "$kind: flush" flush
	timely "$kind: a flush of data in its place" test "$FSYNCS" -eq 1
	flushed
	fsyncs "$kind: write_at 1M 1M" write_at 1M 1M
	timely "$kind: nor do new clusters, until they are flushed" test "$FSYNCS" -eq 0
	fsyncs "$kind: flush" flush
	timely "$kind: a flush of new clusters takes two at most" test "$FSYNCS" -le $((2 * files))
	timely "$kind: and one at least" test "$FSYNCS" -ge 1
	flushed
	fsyncs "$kind: blkdiscard -o 1M -l 1M" blkdiscard -o 1M -l 1M "$DEV"
	timely "$kind: nor does a discard" test "$FSYNCS" -eq 0
	fsyncs "$kind: flush" flush
	timely "$kind: a flush of a discard takes two at most" test "$FSYNCS" -le $((2 * files))

	# 8 that write to new clusters and flush each time: some wait for the same commit.
	fsyncs "$kind: flushes" fio --name=many --filename="$DEV" --rw=randwrite --bs=64k --direct=1 --fsync=1 \
		--ioengine=psync --numjobs=8 --number_ios=16 --offset=8M --size=48M \
		--group_reporting --output=/dev/null
	diag "$FSYNCS barriers for 128 flushes"
	ok "$kind: many at the same time share them" test "$FSYNCS" -lt $((2 * files * 128))
	detach
	check_clean image.qcow2 "$kind"
done
no_kernel_report
done_testing
