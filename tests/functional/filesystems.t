#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# File systems, partitions, swap and fstrim work on the device as on any disk.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 900
# memory: 2048

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
modprobe -aq xfs btrfs
mkdir mnt

fio_size=24M
if [[ $QUICK ]]; then
	fio_size=6M
fi

# Random writes with checksums, some of them synced, read back by fio.
fio_verify() {
	fio --name=verify --directory="$1" --size="$fio_size" --rw=randwrite --bsrange=512-64k \
		--bs_unaligned=0 --blockalign=512 --ioengine=psync --fsync=32 --verify=crc32c \
		--do_verify=1 --verify_fatal=1 --randseed=7 --minimal
}

supported() {
	command -v "mkfs.$1" >/dev/null && { modprobe -q "$1" || grep -qw "$1" /proc/filesystems; }
}

fsck_of() {
	case $1 in
	ext4) e2fsck -fn "$2" ;;
	xfs) xfs_repair -n "$2" ;;
	btrfs) btrfs check "$2" ;;
	esac
}

# on_fs FS SHAPE SIZE: a file system on an empty image, or on an overlay of one.
on_fs() {
	local fs=$1 shape=$2 size=$3 force=-f
	local what="$fs on an $shape image"

	if ! supported "$fs"; then
		skip "$what" "this kernel or machine has no $fs"
		return
	fi
	if [[ $fs == ext4 ]]; then
		force=-F
	fi
	if [[ $shape == overlay ]]; then
		mv disk.qcow2 base.qcow2
		qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2
	else
		rm -f ./*.qcow2
		qemu-img create -q -f qcow2 disk.qcow2 "$size"
	fi
	attach "$WORK/disk.qcow2" || return
	if [[ $shape == empty ]]; then
		ok "$what: mkfs" "mkfs.$fs" -q $force "$DEV"
	fi
	ok "$what: mount" mount -o discard "$DEV" mnt
	if [[ $shape == overlay ]]; then
		ok "$what: the file below is what it was" cmp mnt/kept kept
		rm -f mnt/verify*
	fi
	ok "$what: fio writes and verifies" fio_verify mnt
	head -c 3000000 /dev/urandom >kept
	cp kept mnt/kept
	ok "$what: unmount" umount mnt
	ok "$what: fsck" fsck_of "$fs" "$DEV"
	detach
	check_clean disk.qcow2 "$what"
	attach --read-only "$WORK/disk.qcow2"
	mount -o ro "$DEV" mnt
	ok "$what: the file is there after detach and attach" cmp mnt/kept kept
	umount mnt
	detach
}

for shape in empty overlay; do
	on_fs ext4 $shape 128M
done
for fs in xfs:400M btrfs:256M; do
	for shape in empty overlay; do
		on_fs ${fs%:*} $shape ${fs#*:}
	done
done
rm -f ./*.qcow2

# Partitions
qemu-img create -q -f qcow2 part.qcow2 64M
attach "$WORK/part.qcow2"
name=${DEV#/dev/}
printf 'label: gpt\nsize=16M\nsize=8M\n' >table
ok "sfdisk" sfdisk -q "$DEV" <table
udevadm settle
ok "the first partition's node appears" test -b "${DEV}p1"
is "the second has its size" "$(blockdev --getsize64 "${DEV}p2")" $((8 << 20))
link=/dev/disk/by-uuid/3c5b2d6e-0f0a-4f5e-9d52-7a3c1b8e4f60
ok "mkfs on a partition" mkfs.ext4 -q -F -U ${link##*/} -L on-qcow "${DEV}p1"
ok "udev links UUID and label to it" \
	udevadm wait --timeout=60 $link /dev/disk/by-label/on-qcow
is "that is where they lead" "$(realpath $link /dev/disk/by-label/on-qcow)" \
	"${DEV}p1"$'\n'"${DEV}p1"
detach
udevadm settle
not_ok "the link goes at detach" test -L $link
not_ok "its node goes at detach" test -e "${DEV}p1"
not_ok "the disk goes at detach" test -e "/sys/block/$name"
attach "$WORK/part.qcow2"
# Not settle: they are there when attach returns.
is "partitions exist when attach returns" "$(blockdev --getsize64 "${DEV}p1" 2>&1)" $((16 << 20))
ok "and can be mounted" mount "${DEV}p1" mnt
not_ok "a mounted partition keeps the device busy" "$QCOWCTL" detach "$DEV"
umount mnt
detach
check_clean part.qcow2

# Swap
qemu-img create -q -f qcow2 swap.qcow2 64M
attach "$WORK/swap.qcow2"
ok "mkswap" mkswap -U ${link##*/} "$DEV"
ok "udev links its UUID to the disk" udevadm wait --timeout=60 $link
ok "swapon" swapon "$DEV"
not_ok "swap keeps the device busy" "$QCOWCTL" detach "$DEV"
not_ok "and from being checked" "$QCOWCTL" check "$DEV"
like "which is said" "$(<"$WORK/.out")" "in use as swap, .*; swapoff $DEV first"
cat >swapper <<'END'
my @page = map { chr(65 + $_ % 26) x 1000000 } 0 .. 29;
for my $round (1 .. 2) {
	for my $i (0 .. 29) {
		die "memory $i changed\n" if $page[$i] ne chr(65 + $i % 26) x 1000000;
	}
}
open(my $swaps, "<", "/proc/swaps") or die;
my ($used) = map { (split)[3] } grep { /qcow/ } <$swaps>;
die "nothing was swapped out\n" unless $used;
END
swap_out() (
	mkdir -p /sys/fs/cgroup/swaptest &&
		echo +memory >/sys/fs/cgroup/cgroup.subtree_control &&
		echo 12M >/sys/fs/cgroup/swaptest/memory.high &&
		echo "$BASHPID" >/sys/fs/cgroup/swaptest/cgroup.procs &&
		perl swapper
)
ok "memory goes out to swap and comes back" swap_out
ok "swapoff" swapoff "$DEV"
rmdir /sys/fs/cgroup/swaptest 2>/dev/null
detach
check_clean swap.qcow2

# Space comes back.
disk_used() {
	sync -f "$1"
	echo $(($(stat -c %b "$1") * 512))
}

qemu-img create -q -f qcow2 trim.qcow2 256M
attach --discard=unmap "$WORK/trim.qcow2"
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$DEV"
mount "$DEV" mnt
fill=40M
rounds=10
if [[ $QUICK ]]; then
	fill=8M
	rounds=4
fi
empty=$(disk_used trim.qcow2)
head -c $fill /dev/urandom >mnt/file
sync -f mnt
full=$(disk_used trim.qcow2)
first=$(stat -c %s trim.qcow2)
rm mnt/file
sync -f mnt
ok "fstrim" fstrim mnt
sync -f mnt
blockdev --flushbufs "$DEV"
trimmed=$(disk_used trim.qcow2)
diag "image on disk: empty $empty, with a file $full, trimmed $trimmed"
ok "fstrim lowers what the image takes on disk" test $((full - trimmed)) -ge $(((full - empty) * 3 / 4))
lengths=()
for ((i = 0; i < rounds; i++)); do
	head -c $fill /dev/urandom >mnt/file
	sync -f mnt
	rm mnt/file
	sync -f mnt
	fstrim mnt
	lengths+=("$(stat -c %s trim.qcow2)")
done
umount mnt
detach
last=$(stat -c %s trim.qcow2)
used=$(disk_used trim.qcow2)
diag "file length after each round $first ${lengths[*]}, at the end $last; on disk $used"
# What one round frees can be taken again after the commit that follows: the next
# round may come before it, so there may be one file more, but never two.
ok "write, delete and fstrim again and again does not grow the file" \
	test "$last" -le $((first + (${fill%M} << 20) * 17 / 16))
ok "nor what it takes on disk" test "$used" -le $((trimmed + (full - empty) / 4))
check_clean trim.qcow2

# Zeroing without unmapping keeps the space, as fallocate promises.
qemu-img create -q -f qcow2 -o preallocation=metadata pre.qcow2 8M
attach "$WORK/pre.qcow2"
ok "fallocate --zero-range" fallocate -z -o 1M -l 2M "$DEV"
ok "fallocate --punch-hole" fallocate -p -o 4M -l 1M "$DEV"
detach
map=$(qemu-img map --output=json pre.qcow2)
zeroed() {
	jq -r --argjson at "$1" 'map(select(.start <= $at and .start + .length > $at))[0] |
		"zero=\(.zero) offset=\(.offset != null)"' <<<"$map"
}
is "zeroing without unmap keeps the clusters" "$(zeroed $((2 << 20)))" "zero=true offset=true"
is "zeroing with unmap frees them" "$(zeroed $(((4 << 20) + 65536)))" "zero=true offset=false"
is "what was not zeroed keeps its clusters" "$(zeroed $((6 << 20)) | sed 's/zero=[a-z]* //')" "offset=true"
check_clean pre.qcow2

# --discard=keep: the clusters stay, the space goes.
qemu-img create -q -f qcow2 keep.qcow2 16M
attach --discard=keep "$WORK/keep.qcow2"
dd if=/dev/urandom of="$DEV" bs=1M count=8 oflag=direct conv=fsync status=none
before=$(disk_used keep.qcow2)
ok "discard with --discard=keep" blkdiscard -o 1M -l 6M "$DEV"
blockdev --flushbufs "$DEV"
detach
after=$(disk_used keep.qcow2)
diag "on disk before the discard $before, after $after"
ok "punches the file" test $((before - after)) -ge $((5 << 20))
map=$(qemu-img map --output=json keep.qcow2)
is "and keeps the mapping" "$(zeroed $((2 << 20)))" "zero=true offset=true"
check_clean keep.qcow2

no_kernel_report
done_testing
