#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Requests that are served without a worker, in the context of whoever submits them: which ones are, and that it does that task no harm.
# kernels: all
# quick: 6.1
# cpus: 2
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
direct=(xfs_io -d)
mkdir low mnt

# What udev reads would count.
rules=/run/udev/rules.d/00-qcow-inline.rules
EXTRA+=("$rules")
mkdir -p "${rules%/*}"
echo 'KERNEL=="qcow*", OPTIONS:="nowatch", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1"' \
	>"$rules"
udevadm control --reload

# count ATTRIBUTE: of DEV
count() {
	cat "/sys/block/${DEV#/dev/}/qcow/$1"
}

# overwrite OFFSET LENGTH SIZE [PATTERN]: in pieces of SIZE. Who writes and waits, as
# xfs_io does, has Linux 6.1 hand a request over by a thread of its own.
overwrite() {
	fio --name=overwrite --filename="$DEV" --rw=write --direct=1 --ioengine=io_uring \
		--offset="$1" --size="$2" --bs="$3" --buffer_pattern="${4:-0xff}" --output=/dev/null
}

# inlined YES|NO DESC COMMAND...: it works, and its requests are served at once or
# by workers.
inlined() {
	local before

	# It looks at a new disk.
	udevadm settle
	before=$(($(count inlined)))
	ok "$2" "${@:3}"
	if [[ $1 == yes ]]; then
		ok "$2: without a worker" test "$(count inlined)" -gt "$before"
	else
		is "$2: by a worker" "$(count inlined)" "$before"
	fi
}

# Which requests
qemu-img create -q -f qcow2 -o cluster_size=64k image.qcow2 64M
attach image.qcow2
inlined no "a write that allocates" "${direct[@]}" -c 'pwrite -q -b 256k -S 1 0 256k' "$DEV"
# Some may have to wait, and then some more do as if.
for _ in 1 2 3; do
	ok "overwrite something" overwrite 4k 8k 4k 0x02
done
inlined yes "overwrites" overwrite 4k 8k 4k 0x02
ok "one over several clusters" "${direct[@]}" -c 'pwrite -q -b 100k -S 3 60k 100k' "$DEV"
inlined yes "a read" "${direct[@]}" -c 'pread -q 0 4k' "$DEV"
ok "read the tables" "${direct[@]}" -c 'pread -q 32M 4k' "$DEV"
inlined yes "a read of nothing" "${direct[@]}" -c 'pread -q -b 64k 32M 64k' "$DEV"
inlined yes "a read through the page cache" dd if="$DEV" of=/dev/null bs=64k count=4 status=none
inlined no "a read that is partly of nothing" "${direct[@]}" -c 'pread -q -b 128k 192k 128k' "$DEV"
inlined no "a discard" blkdiscard -f -o 192k -l 64k "$DEV"
ok "what was written is there" xfs_io -d -c 'pread -v 0 256k' "$DEV"
is "and nothing else" "$("${direct[@]}" -c 'pread -v 0 256k' "$DEV" | sed -n \
	's/^[0-9a-f]*:  \(..\) .*/\1/p' | uniq -c | awk '{ print $2 $1 }' | xargs)" \
	"01256 02512 013072 036400 012048 004096"
# The debug kernel counts how often each lock is taken. What each request enters is SRCU
# (the epoch) and per CPU (the gate), and no lock that others take, too.
if [[ -e /proc/lock_stat ]]; then
	before=$(($(count inlined)))
	echo 0 >/proc/lock_stat
	echo 1 >/proc/sys/kernel/lock_stat
	ok "requests of two at a time" fio --name=two --filename="$DEV" --rw=randrw --bs=4k \
		--direct=1 --ioengine=io_uring --iodepth=4 --numjobs=2 --size=128k --norandommap \
		--io_size=4M --output=/dev/null
	echo 0 >/proc/sys/kernel/lock_stat
	requests=$(($(count inlined) - before))
	ok "most of them without a worker ($requests)" test "$requests" -gt 1500
	# name: contended twice, waiting times four, bounces, how often
	sed -n 's/^ *\(&\(image\|cache\|unpack\|dev\)->[a-z_]*\(lock\|mutex\)\):/\1/p' \
		/proc/lock_stat | awk '{ print $9, $1 }' | sort -rn >locks
	most=$(awk 'NR == 1 { print $1 }' locks)
	ok "no lock of the driver is taken by each" test "${most:-0}" -lt $((requests / 10)) ||
		diag "$(head -n 5 locks)"
fi
queue=/sys/block/${DEV#/dev/}/queue/scheduler
modprobe -q mq-deadline
if grep -qw mq-deadline "$queue"; then
	echo mq-deadline >"$queue"
	inlined no "with an I/O scheduler: a read" "${direct[@]}" -c 'pread -q 0 4k' "$DEV"
	echo none >"$queue"
fi
# What is waited for may be a table of a file system, with locks held for it.
blockdev --flushbufs "$DEV"
inlined no "one page through the page cache" xfs_io -r -c 'mmap -r 0 64k' -c 'madvise -r' \
	-c 'mread 4k 4k' "$DEV"
# What the driver reads for a task is not what the task has read.
if [[ -e /proc/self/io ]]; then
	# shellcheck disable=SC2016 # for that shell to expand
	is "what a task has read counts once" "$(bash -c '
		has_read() {
			sed -n "s/^read_bytes: //p" /proc/$$/io
		}
		before=$(has_read)
		xfs_io -d -c "pread -q -b 64k 0 64k" "$1"
		echo $(($(has_read) - before))' - "$DEV")" 65536
fi
detach
check_clean image.qcow2

attach --no-inline image.qcow2
inlined no "--no-inline: an overwrite" overwrite 4k 8k 4k 0x02
inlined no "--no-inline: a read" "${direct[@]}" -c 'pread -q 0 4k' "$DEV"
detach
attach --io=buffered image.qcow2
inlined no "buffered: an overwrite" overwrite 4k 8k 4k 0x02
detach

# The table of a backing file, and of the disk, has to be in memory.
qemu-img create -q -f qcow2 -b image.qcow2 -F qcow2 top.qcow2
attach --read-only top.qcow2
ok "read something once" "${direct[@]}" -c 'pread -q 0 4k' "$DEV"
inlined yes "a read from a backing file" "${direct[@]}" -c 'pread -q 64k 4k' "$DEV"
is "is right" "$("${direct[@]}" -c 'pread -v 64k 512' "$DEV" | head -c 13)" "00010000:  03"
detach

# The task
qemu-img create -q -f qcow2 -o preallocation=metadata image.qcow2 64M
attach image.qcow2
ok "fill it" "${direct[@]}" -c 'pwrite -q -b 1M 0 64M' "$DEV"
inlined yes "overwrites of several clusters" overwrite 60k 8M 256k
# shellcheck disable=SC2016
inlined no "a limit for the size of files is not for the image" \
	bash -c 'ulimit -f 8192; exec fio --name=limit --filename="$1" --rw=write --bs=4k --direct=1 \
		--ioengine=io_uring --offset=48M --size=64k --output=/dev/null' - "$DEV"
# shellcheck disable=SC2016
inlined yes "it does not matter for reads" \
	bash -c 'ulimit -f 1024; exec xfs_io -d -c "pread -q 48M 4k" "$1"' - "$DEV"
# As many as can be collected, for one queue and for two
ok "requests that are collected" fio --name=batch --filename="$DEV" --rw=randrw --bs=4k \
	--direct=1 --ioengine=io_uring --iodepth=32 --iodepth_batch_submit=32 --size=32M \
	--io_size=16M --verify=crc32c --output=/dev/null
detach

# No lock that they all take: those of the driver that were taken so often
busy_locks() {
	awk -F: -v least="$1" '/&(image|cache|unpack)->|&dev->gate/ {
		split($2, n, " ")
		if (n[8] >= least) {
			sub(/^ */, "", $1)
			print $1
		}
	}' /proc/lock_stat
}
if [[ -e /proc/lock_stat ]]; then
	echo 1 >/proc/sys/kernel/lock_stat
	attach image.qcow2
	for rw in randread randwrite; do
		ok "read the tables" "${direct[@]}" -c 'pread -q -b 1M 0 64M' "$DEV"
		before=$(count inlined)
		echo 0 >/proc/lock_stat
		ok "2000 requests of $rw" fio --name=locks --filename="$DEV" --rw=$rw --bs=4k \
			--direct=1 --ioengine=io_uring --iodepth=8 --number_ios=2000 --output=/dev/null
		ok "$rw: without a worker" test "$(count inlined)" -ge $((before + 1900))
		is "$rw: no lock of the driver is taken by all of them" "$(busy_locks 1000)" ""
	done
	echo 0 >/proc/lock_stat
	ok "discard" blkdiscard -f -l 1M "$DEV"
	ok "allocate" "${direct[@]}" -c 'pwrite -q -b 64k 0 1M' "$DEV"
	like "where they are taken, that is counted" "$(busy_locks 16)" 'image->lock'
	detach
	echo 0 >/proc/sys/kernel/lock_stat
else
	skip "no lock that all take" "no lock_stat"
fi

# A file system that is frozen holds up writes to it, but not reads
truncate -s 200M low.img
for fs in ext4 xfs btrfs; do
	if [[ $fs == ext4 && $TEST_KERNEL == uml ]]; then
		continue
	fi
	modprobe -q $fs
	if ! grep -qw $fs /proc/filesystems; then
		continue
	fi
	truncate -s 0 low.img
	truncate -s 400M low.img
	case $fs in
	ext4) mkfs.ext4 -q low.img ;;
	*) mkfs.$fs -q -f low.img ;;
	esac
	new_loop low.img
	mount "$LOOP" low || continue
	qemu-img create -q -f qcow2 -o preallocation=metadata low/image.qcow2 64M
	attach low/image.qcow2
	ok "$fs: fill it" "${direct[@]}" -c 'pwrite -q -b 1M 0 64M' -c fsync "$DEV"
	fsfreeze -f low
	"${direct[@]}" -c 'pwrite -q -S 7 0 4k' "$DEV" &
	writer=$!
	ok "$fs is frozen: a read is served" "${direct[@]}" -c 'pread -q 1M 4k' "$DEV"
	sleep 0.5
	ok "$fs is frozen: a write waits" kill -0 $writer
	fsfreeze -u low
	wait $writer
	is "$fs is thawed: it succeeds" $? 0
	# The file is locked again and again, which those who may not wait cannot have.
	(
		trap 'exit 0' TERM
		while :; do
			blkdiscard -o 32M -l 16M "$DEV"
			"${direct[@]}" -c 'pwrite -q -b 1M 32M 16M' "$DEV"
		done >/dev/null 2>&1
	) &
	locker=$!
	before=$(($(count inlined)))
	ok "$fs: nothing is lost where one has to wait" fio --name=contended \
		--filename="$DEV" --rw=randrw --bs=4k --direct=1 --ioengine=io_uring \
		--iodepth=16 --size=32M --io_size=16M --verify=crc32c --output=/dev/null
	kill $locker
	wait $locker
	if [[ $fs != btrfs ]]; then
		ok "$fs: but some need not" test "$(count inlined)" -gt "$before"
	fi
	detach
	check_clean low/image.qcow2 "$fs"
	umount low
	losetup -d "$LOOP"
	unset 'LOOPS[-1]'
done

# One device on another, with the same file system on both
truncate -s 0 image.qcow2
qemu-img create -q -f qcow2 image.qcow2 1G
attach image.qcow2
outer=$DEV
for fs in ext4 xfs; do
	modprobe -q $fs
	grep -qw $fs /proc/filesystems || continue
	"mkfs.$fs" -q "$([[ $fs == ext4 ]] && echo -F || echo -f)" "$outer"
	mount "$outer" low
	qemu-img create -q -f qcow2 -o preallocation=metadata low/inner.qcow2 400M
	attach low/inner.qcow2
	"mkfs.$fs" -q "$DEV"
	mount "$DEV" mnt
	ok "$fs on $fs: files" fio --name=files --directory=mnt --rw=randrw --bs=4k \
		--ioengine=io_uring --iodepth=8 --size=32M --direct=1 --verify=crc32c \
		--fsync=64 --output=/dev/null
	ok "$fs on $fs: files, through the page cache" fio --name=cached --directory=mnt \
		--rw=randwrite --bs=16k --size=64M --verify=crc32c --end_fsync=1 \
		--output=/dev/null
	ok "$fs on $fs: some of it without workers" test "$(count inlined)" -gt 0
	umount mnt
	detach
	check_clean low/inner.qcow2 "$fs on $fs"
	umount low
done
detach "$outer"
check_clean image.qcow2

# Whose cgroup it is charged to
if grep -qw io /sys/fs/cgroup/cgroup.controllers 2>/dev/null; then
	new_loop low.img --direct-io=on
	number=$(lsblk -dno MAJ:MIN "$LOOP" | tr -d ' ')
	qemu-img create -q -f qcow2 -o preallocation=metadata "$LOOP" 64M
	attach "$LOOP"
	ok "fill it" "${direct[@]}" -c 'pwrite -q -b 1M 0 64M' "$DEV"
	echo +io >/sys/fs/cgroup/cgroup.subtree_control
	mkdir /sys/fs/cgroup/inline
	# shellcheck disable=SC2016 # for that shell to expand
	inlined yes "in a cgroup: an overwrite" bash -c 'echo $$ >/sys/fs/cgroup/inline/cgroup.procs
		exec fio --name=cgroup --filename="$1" --rw=write --bs=64k --direct=1 --iodepth=1 \
			--ioengine=io_uring --offset=0 --size=1M --output=/dev/null' - "$DEV"
	like "it is charged with what reaches the device below" \
		"$(grep "^$number " /sys/fs/cgroup/inline/io.stat)" 'wbytes=1048576 '
	rmdir /sys/fs/cgroup/inline
	detach
else
	skip "what a cgroup is charged with" "no io controller"
fi
rm "$rules"
udevadm control --reload
no_kernel_report
done_testing
