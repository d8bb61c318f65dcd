#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# What is written with --temp goes at detach and never reaches the image; --autoclear detaches after use.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"
# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit
export TMPDIR=$WORK/tmp
mkdir "$TMPDIR" sub

# gone DEVICE: it goes, a moment later at most
gone() {
	local tries

	for ((tries = 0; tries < 100; tries++)); do
		if [[ ! -e /sys/block/${1#/dev/} ]]; then
			forget "$1"
			return 0
		fi
		sleep 0.1
	done
	return 1
}

qemu-img create -q -f qcow2 sub/base.qcow2 20M
qemu-io -f qcow2 -c 'write -q -P 1 1M 1M' sub/base.qcow2
(cd sub && qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 './a,b:c.qcow2')
qemu-io -f qcow2 -c 'write -q -P 2 2M 1M' "$PWD/sub/a,b:c.qcow2"
qemu-img convert -f qcow2 -O raw "$PWD/sub/a,b:c.qcow2" want.raw
before=$(cat sub/* | cksum)

for name in "$PWD/sub/a,b:c.qcow2" "./sub/a,b:c.qcow2"; do
	attach --temp "$name" || continue
	is "it shows the image" "$(cmp want.raw "$DEV" 2>&1)" ""
	is "it can be written" "$(blockdev --getro "$DEV")" 0
	is "by way of its backing files" "$(</sys/block/"${DEV#/dev/}"/qcow/depth)" 3
	is "no file is left anywhere" "$(ls -A "$TMPDIR")" ""
	cp want.raw wrote.raw
	xfs_io -d -c 'pwrite -q -S 3 1500k 1M' -c fsync "$DEV"
	xfs_io -c 'pwrite -q -S 3 1500k 1M' wrote.raw
	ok "what is written can be read" cmp wrote.raw "$DEV"
	not_ok "the image cannot be written meanwhile" qemu-io -f qcow2 -c 'write 0 1k' "$name"
	other=$DEV
	attach --temp "$name"
	ok "another one beside it starts from the image" cmp want.raw "$DEV"
	detach
	DEV=$other
	detach
	is "the image is as it was" "$(cat sub/* | cksum)" "$before"
done
refused "--temp and --read-only" 2 'goes without' attach --temp -r sub/base.qcow2
refused "--temp of no file" 5 'No such file' attach --temp gone.qcow2
TMPDIR=$WORK/nowhere refused "--temp without a directory for it" 1 'set TMPDIR' \
	attach --temp sub/base.qcow2

# Autoclear
attach --autoclear sub/base.qcow2
blkid -p "$DEV" >/dev/null
dd if="$DEV" of=/dev/null bs=1M count=1 status=none
udevadm settle
sleep 1
ok "it waits for its first use: looking is none" test -e "/sys/block/${DEV#/dev/}"
is "meanwhile nothing says that it goes" "$(qcowctl list -n -o STATE)" ok
exec 8<>"$DEV"
is "in use, that is said" "$(qcowctl list -n -o STATE)" detaching
exec 9<"$DEV"
exec 8>&-
sleep 1
ok "it waits for the last one to close it" test -e "/sys/block/${DEV#/dev/}"
exec 9>&-
ok "then it goes" gone "$DEV"
ok "and the image is free" qemu-io -f qcow2 -c 'write -q 0 1k' sub/base.qcow2

attach --autoclear --temp sub/base.qcow2
dd if=/dev/zero of="$DEV" bs=1M count=1 conv=notrunc status=none
ok "a write was a use" gone "$DEV"
attach sub/base.qcow2
mkfs.ext4 -q -F "$DEV"
detach
attach --autoclear --read-only sub/base.qcow2
mkdir mnt
ok "it is mounted" mount -o ro,noload "$DEV" mnt
umount mnt
ok "a mount was a use, a read-only one, too" gone "$DEV"

attach --autoclear sub/base.qcow2
ok "it can be detached before it is used" try_detach

no_kernel_report
done_testing
