#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# An image right on a partition, a mapped device or an NBD export: a file system in it, the device's end, who else may have it.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
mkdir mnt

# excl MODE DEVICE: can it be opened by who wants it alone?
excl() {
	perl -MFcntl -e 'sysopen(my $f, $ARGV[1], ($ARGV[0] eq "rw" ? O_RDWR : O_RDONLY) |
		O_EXCL) or die "$!\n"' "$1" "$2"
}

# refused DESC REGEX OPTION... DEVICE: attach says so in one line
refused() {
	local desc=$1 regex=$2
	shift 2

	if try_attach "$@"; then
		fail "$desc"
		detach
		return
	fi
	is "$desc" "$(wc -l <"$WORK/.err")" 1
	like "$desc: why" "$(<"$WORK/.err")" "$regex"
}

# full_at_end NAME DEVICE: the disk in it is larger than the device, 24 MiB
full_at_end() {
	local name=$1 dev=$2

	qemu-img create -q -f qcow2 -o cluster_size=64k "$dev" 96M || fail "$name: create"
	attach "$dev" || return
	make_raw first.raw 8M 5
	ok "$name: what fits is written" dd if=first.raw of="$DEV" bs=1M oflag=direct conv=fsync
	not_ok "$name: more than fits is not" \
		dd if=/dev/urandom of="$DEV" bs=256k seek=32 count=256 oflag=direct
	like "$name: that is ENOSPC" "$(<"$WORK/.out")" 'No space left on device'
	is "$name: it is no damage" "$(<"/sys/block/${DEV#/dev/}/qcow/damage")" ""
	ok "$name: a flush succeeds" xfs_io -c fsync "$DEV"
	ok "$name: what was there is read" cmp -n 8388608 first.raw "$DEV"
	ok "$name: and written over" xfs_io -d -c 'pwrite -q -S 7 1M 64k' -c fsync "$DEV"
	xfs_io -c 'pwrite -q -S 7 1M 64k' first.raw
	dd if="$DEV" of=full.raw bs=1M iflag=direct status=none
	detach
	ok "$name, full: the image has no error" is_consistent "$dev"
	same full.raw raw "$dev" qcow2 "$name, full"
	attach "$dev" || return
	ok "$name: attached again, it is all there" cmp -n 8388608 first.raw "$DEV"
	ok "$name: what is given back" blkdiscard -o 2M -l 4M "$DEV"
	ok "$name: is there for others" \
		dd if=first.raw of="$DEV" bs=64k seek=$((80 * 16)) count=48 oflag=direct conv=fsync
	dd if="$DEV" of=full.raw bs=1M iflag=direct status=none
	detach
	ok "$name, full again: the image has no error" is_consistent "$dev"
	same full.raw raw "$dev" qcow2 "$name, full again"
	ok "$name: the end is where it was" \
		test "$(qemu-img check -f qcow2 --output=json "$dev" |
			jq '."image-end-offset"')" -le "$(blockdev --getsize64 "$dev")"
}

# on_device NAME DEVICE
on_device() {
	local name=$1 dev=$2 sum

	# What was there before shows through nowhere.
	dd if=/dev/urandom of="$dev" bs=1M count=24 oflag=direct conv=fsync status=none
	qemu-img create -q -f qcow2 "$dev" 16M || fail "$name: create"
	attach "$dev" || return
	is "$name: the disk is empty" "$(tr -d '\0' <"$DEV" | wc -c)" 0
	ok "$name: mkfs" mkfs.ext4 -q -F "$DEV"
	ok "$name: mount" mount -o discard "$DEV" mnt
	head -c 3000000 /dev/urandom >kept
	cp kept mnt/
	head -c 4000000 /dev/urandom >mnt/goes
	sync -f mnt
	rm mnt/goes
	ok "$name: unmount" umount mnt
	ok "$name: fsck" e2fsck -fn "$DEV"
	dd if="$DEV" of=disk.raw bs=1M iflag=direct status=none
	ok "$name: random requests" qcow-diff --quiet --ops 400 --jobs 4 --max-io 256k \
		--mirror-in disk.raw --mirror-out mirror.raw "$DEV"

	# It belongs to one.
	sum=$DEV
	refused "$name: no second attach" 'in use|busy|has it open|Device or resource' "$dev"
	refused "$name: nor one to read" 'in use|busy|has it open|Device or resource' --read-only "$dev"
	DEV=$sum
	not_ok "$name: nor who asks for it alone" excl rw "$dev"
	not_ok "$name: no file system is made over it" mkfs.ext4 -q "$dev" </dev/null
	not_ok "$name: QEMU does not write it" qemu-io -f qcow2 -c 'write 0 64k' "$dev"
	detach
	ok "$name: then it is free" excl rw "$dev"
	check_clean "$dev" "$name"
	same mirror.raw raw "$dev" qcow2 "$name"

	# Where it is only read
	attach --read-only "$dev" || return
	sum=$DEV
	ok "$name: two may read" try_attach --read-only "$dev"
	ok "$name: the same" cmp "$sum" "$DEV"
	detach
	refused "$name: but none may write then" 'in use|busy|uses it|has it open|Device or resource' "$dev"
	detach "$sum"

	full_at_end "$name" "$dev"

	# A device that cannot be written
	qemu-img create -q -f qcow2 "$dev" 16M
	qemu-io -f qcow2 -c 'write -q -P 0x41 1M 1M' "$dev"
	blockdev --setro "$dev"
	sum=$(cksum <"$dev")
	attach "$dev"
	like "$name: read-only: that is said" "$(<"$WORK/.err")" \
		'^qcowctl: warning: .*cannot be opened for writing: Read-only file system; attaching it read-only$'
	is "$name: read-only: so is the disk" "$(blockdev --getro "$DEV")" 1
	is "$name: read-only: it reads" "$(dd if="$DEV" bs=1M skip=1 count=1 status=none |
		tr -d A | wc -c)" 0
	not_ok "$name: read-only: it is not written" \
		dd if=/dev/zero of="$DEV" bs=4k count=1 oflag=direct conv=notrunc
	detach
	is "$name: read-only: it is as it was" "$(cksum <"$dev")" "$sum"
	blockdev --setrw "$dev"
}

# A partition between two others
truncate -s 64M disk.img
new_loop -P disk.img
printf 'label: gpt\nsize=8M\nsize=24M\nsize=8M\n' >table
sfdisk -q "$LOOP" <table
udevadm settle
if [[ -b ${LOOP}p2 ]]; then
	dd if=/dev/urandom of="${LOOP}p1" bs=1M count=8 oflag=direct status=none
	dd if=/dev/urandom of="${LOOP}p3" bs=1M count=8 oflag=direct status=none
	sums=$(cksum "${LOOP}p1" "${LOOP}p3")
	on_device partition "${LOOP}p2"
	is "partition: those beside it are what they were" \
		"$(cksum "${LOOP}p1" "${LOOP}p3")" "$sums"
else
	skip "partition" "no partitions on loop devices"
fi

# A part of a disk, mapped as LVM does it
truncate -s 40M mapped.img
new_loop mapped.img
if modprobe -q dm-mod && dmsetup create slice --table "0 $((24 << 11)) linear $LOOP $((8 << 11))"; then
	udevadm settle
	dd if=/dev/urandom of="$LOOP" bs=1M count=40 oflag=direct conv=fsync status=none
	around() {
		dd if="$LOOP" bs=1M count=8 iflag=direct status=none
		dd if="$LOOP" bs=1M skip=32 iflag=direct status=none
	}
	sums=$(around | cksum)
	on_device mapped /dev/mapper/slice
	is "mapped: what is around it is what it was" "$(around | cksum)" "$sums"
	udevadm settle
	ok "mapped: nothing holds it" dmsetup remove --retry slice
else
	skip "mapped" "no device mapper"
fi

# What the disk below prefers reaches who uses the image: a stripe of whole clusters
# does, and others do not.
truncate -s 96M stripes.img
new_loop stripes.img
if modprobe -q dm-mod && dmsetup create stripes \
	--table "0 $((96 << 11)) striped 3 256 $LOOP 0 $LOOP $((32 << 11)) $LOOP $((64 << 11))"; then
	udevadm settle
	for row in 64k:393216 128k:393216 256k:262144; do
		qemu-img create -q -f qcow2 -o "cluster_size=${row%:*}" /dev/mapper/stripes 8M
		attach /dev/mapper/stripes
		is "stripes, clusters of ${row%:*}: preferred I/O" \
			"$(<"/sys/block/${DEV#/dev/}/queue/optimal_io_size")" "${row#*:}"
		detach
	done
	dmsetup remove --retry stripes
else
	skip "stripes" "no device mapper"
fi

# So do sectors of 16 KiB, up to the size of a cluster.
if modprobe -q scsi_debug dev_size_mb=16 physblk_exp=5 && udevadm settle &&
	sectors=$(lsblk -pndo NAME,MODEL | sed -n 's/ *scsi_debug *$//p') && [[ -b $sectors ]]; then
	for row in 512:512 4k:4096 64k:16384; do
		qemu-img create -q -f qcow2 -o "cluster_size=${row%:*}" "$sectors" 1M
		attach "$sectors"
		is "sectors of 16 KiB, clusters of ${row%:*}: the physical ones" \
			"$(<"/sys/block/${DEV#/dev/}/queue/physical_block_size")" "${row#*:}"
		detach
	done
	udevadm settle
	modprobe -qr scsi_debug || :
else
	skip "sectors of 16 KiB" "no scsi_debug"
fi

# An export
if modprobe -q nbd nbds_max=1; then
	truncate -s 24M export.img
	ok "nbd: connect" qemu-nbd -c /dev/nbd0 -f raw --cache=none --discard=unmap export.img
	for ((i = 0; i < 50 && $(blockdev --getsize64 /dev/nbd0) == 0; i++)); do
		sleep 0.1
	done
	udevadm settle
	on_device nbd /dev/nbd0
	ok "nbd: disconnect" qemu-nbd -d /dev/nbd0
else
	skip "nbd" "no nbd"
fi

# Sectors of 4 KiB: direct I/O is of 512 bytes.
truncate -s 24M sectors.img
new_loop --sector-size 4096 sectors.img
qemu-img create -q -f qcow2 "$LOOP" 16M
refused "sectors of 4 KiB: direct I/O" 'does not allow direct I/O of 512 bytes' \
	--io=direct "$LOOP"
attach "$LOOP"
is "sectors of 4 KiB: it goes through the page cache" \
	"$(qcowctl list -n -o IO | tr -d ' ')" buffered
ok "sectors of 4 KiB: single ones of 512 bytes" xfs_io -d -c 'pwrite -q 512 512' \
	-c 'pwrite -q 1M 3k' -c fsync "$DEV"
detach
check_clean "$LOOP" "sectors of 4 KiB"

# A device that cannot discard: clusters are freed all the same, and reused.
null=/sys/kernel/config/nullb/nullb0
if modprobe -q null_blk nr_devices=0 &&
	{ mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config; } &&
	mkdir $null; then
	echo 24 >$null/size
	echo 1 >$null/memory_backed
	echo 1 >$null/power
	udevadm settle
	disk=/dev/nullb0
	ok "no holes: a disk" test -b $disk
	qemu-img create -q -f qcow2 $disk 96M
	attach $disk
	before=$(dmesg | grep -c 'cannot punch holes')
	ok "no holes: there is room for 16 MiB" xfs_io -d -c 'pwrite -q -b 1M 0 16M' -c fsync "$DEV"
	for at in 32 48 64 0; do
		ok "no holes: a discard for the room of 16 MiB" blkdiscard "$DEV"
		ok "no holes: which can be had at $at MiB" \
			xfs_io -d -c "pwrite -q -b 1M -S $at ${at}M 16M" -c fsync "$DEV"
	done
	is "no holes: the kernel says so, once" \
		"$(($(dmesg | grep -c 'cannot punch holes') - before))" 1
	freed=$(<"/sys/block/${DEV#/dev/}/qcow/clusters_freed")
	ok "no holes: what was discarded is free" test "$freed" -ge 1024
	detach
	check_clean $disk "no holes"
	echo 0 >$null/power
	rmdir $null
else
	skip "no holes" "no null_blk"
fi

no_kernel_report
done_testing
