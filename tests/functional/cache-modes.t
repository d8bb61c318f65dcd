#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Cache modes: how the image's file is read and written, what the device says of its write cache, and how often the file is made durable.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

need_driver
cd "$WORK" || exit
need_fsyncs

write_some() {
	xfs_io -d -c 'pwrite -q -S 7 -b 64k 0 512k' "$DEV"
}

flush() {
	xfs_io -d -c fsync "$DEV"
}

# Of what was written
cached_pages() {
	xfs_io -r -c "mmap -r $place 512k" -c mincore image.qcow2 |
		awk '{ pages += $4 } END { print pages + 0 }'
}

for mode in none writeback directsync writethrough unsafe; do
	qemu-img create -q -f qcow2 -o preallocation=full image.qcow2 16M
	place=$(qemu-img map --output=json image.qcow2 | jq '.[0].offset')
	sync image.qcow2
	echo 3 >/proc/sys/vm/drop_caches
	attach --cache=$mode image.qcow2
	in=/sys/block/${DEV#/dev/}
	is "$mode: sysfs says so" "$(<"$in/qcow/cache_mode")" $mode
	is "$mode: qcowctl info says so" "$(qcowctl info --json "$DEV" | jq -r '."cache-mode"')" \
		$mode
	case $mode in
	none | writeback | unsafe) want='write back' ;;
	*) want='write through' ;;
	esac
	is "$mode: the device's write cache" "$(<"$in/queue/write_cache")" "$want"

	fsyncs "$mode: write" write_some
	case $mode in
	none | writeback | unsafe) is "$mode: writes make nothing durable" "$FSYNCS" 0 ;;
	directsync) is "$mode: each write is durable" "$FSYNCS" 8 ;;
	writethrough) ok "$mode: each write is durable" test "$FSYNCS" -ge 8 ;;
	esac
	fsyncs "$mode: flush" flush
	case $mode in
	none | writeback) is "$mode: a flush makes it durable" "$FSYNCS" 1 ;;
	*) is "$mode: a flush does nothing" "$FSYNCS" 0 ;;
	esac
	case $mode in
	none | directsync)
		ok "$mode: the data is not in the page cache" test "$(cached_pages)" -eq 0
		;;
	*)
		ok "$mode: the data is in the page cache" test "$(cached_pages)" -eq 128
		;;
	esac

	# What allocates takes a commit.
	clean_since=$SECONDS
	ok "$mode: a discard" blkdiscard -f -o 1M -l 1M "$DEV"
	fsyncs "$mode: allocate" xfs_io -d -c 'pwrite -q -S 8 -b 64k 1M 64k' "$DEV"
	case $mode in
	none | writeback | unsafe)
		timely "$mode: nor does a write that allocates" test "$FSYNCS" -eq 0
		;;
	*) ok "$mode: and one that allocates" test "$FSYNCS" -ge 1 ;;
	esac
	fsyncs "$mode: detach" detach
	if [[ $mode == unsafe ]]; then
		is "$mode: nor does a detach" "$FSYNCS" 0
	else
		ok "$mode: a detach does" test "$FSYNCS" -ge 1
	fi
	check_clean image.qcow2 $mode
	is "$mode: the data is there" "$(qemu-io -f qcow2 -c 'read -q -P 7 0 512k' \
		-c 'read -q -P 8 1M 64k' image.qcow2 2>&1)" ""
done

qcowctl attach --cache=none --io=direct image.qcow2 2>.err
is "--cache and --io: exit status" $? 2
like "--cache and --io: why" "$(<.err)" 'leave out --io'
qcowctl attach --cache=fast image.qcow2 2>.err
is "a mode that there is not: exit status" $? 2
like "a mode that there is not: why" "$(<.err)" "--cache cannot be 'fast'"
no_kernel_report
done_testing
