#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The driver works on this kernel: a file system on an image, and a few random cells.
# kernels: all
# cpus: 2
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
# What was said before the module was there is not about it.
kernel_reports >/dev/null

cd "$WORK" || exit
qemu-img create -q -f qcow2 fs.qcow2 64M
attach "$WORK/fs.qcow2" || done_testing
is "the node has its size when attach returns" "$(blockdev --getsize64 "$DEV")" 67108864
ok "mkfs.ext4" mkfs.ext4 -q -F "$DEV"
mkdir mnt
ok "mount" mount "$DEV" mnt
ok "copy files in" cp -r /etc mnt/
ok "unmount" umount mnt
ok "fsck finds a clean file system" e2fsck -fn "$DEV"
ok "copy the device" dd if="$DEV" of=copy.raw bs=1M iflag=direct status=none
detach
check_clean fs.qcow2
same copy.raw raw fs.qcow2 qcow2

# limits DESC WANT OPTION... IMAGE: what file systems go by
limits() {
	local desc=$1 want=$2 queue

	shift 2
	attach "$@" || return
	queue=/sys/block/${DEV#/dev/}/queue
	is "limits, $desc" "$(cd "$queue" && cat logical_block_size \
		physical_block_size optimal_io_size discard_granularity write_cache \
		fua rotational | paste -sd' ')" "$want"
	if [[ $desc == *discard* ]]; then
		is "limits, $desc: none" "$(<"$queue/discard_max_bytes")" 0
	elif [[ $desc != *read-only* ]]; then
		ok "limits, $desc: a discard of 1 GiB" \
			test "$(<"$queue/discard_max_bytes")" -ge $((1 << 30))
		ok "limits, $desc: 1 GiB of zeroes" \
			test "$(<"$queue/write_zeroes_max_bytes")" -ge $((1 << 30))
	fi
	ok "limits, $desc: requests of 1 MiB" test "$(<"$queue/max_hw_sectors_kb")" -ge 1024
	detach
}
qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 1M
limits "clusters of 64 KiB" "512 4096 65536 65536 write back 1 0" "$WORK/fs.qcow2"
limits "clusters of 512 bytes" "512 512 512 512 write back 1 0" "$WORK/small.qcow2"
limits "without discard" "512 4096 65536 0 write back 1 0" --discard=ignore "$WORK/fs.qcow2"
limits "read-only" "512 4096 65536 0 write through 0 0" --read-only "$WORK/fs.qcow2"

# What is different from one kernel to the next: partitions, and who has it open
attach "$WORK/fs.qcow2"
echo 'size=16M' | sfdisk -q --label gpt "$DEV" 2>/dev/null
detach
attach "$WORK/fs.qcow2"
is "partitions are there when attach returns" \
	"$(blockdev --getsize64 "${DEV}p1")" 16777216
detach
attach --autoclear "$WORK/fs.qcow2"
udevadm settle
exec 8<>"$DEV"
ok "autoclear: it stays while it is open" test -e "/sys/block/${DEV#/dev/}"
exec 8>&-
for ((i = 0; i < 100; i++)); do
	[[ -e /sys/block/${DEV#/dev/} ]] || break
	sleep 0.1
done
not_ok "autoclear: it goes with the last close" test -e "/sys/block/${DEV#/dev/}"
forget "$DEV"
check_clean fs.qcow2 "with a partition"

CELL_OPS=1000
run_cell cs=64k,seed=1
run_cell cs=4k,chain=qcow2,init=1,seed=2
run_cell cs=64k,jobs=4,hot=1M,snap=1,seed=3
run_cell cs=512,rc=8,io=buffered,jobs=4,size=2M,seed=4
run_cell cs=64k,ext=1,packed=zstd,compress=zstd,seed=5
run_cell cs=16k,packed=zlib,compress=zlib,jobs=4,seed=6
run_cell cs=64k,data=raw,seed=7

ok "the module unloads" rmmod qcow
no_kernel_report
done_testing
