#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# overlay.sh [GOLDEN]: a disk that begins as GOLDEN and keeps its own changes, in
# overlay.qcow2. Without GOLDEN, one is made.
set -eu

golden=${1:-golden.qcow2}
if [ ! -e "$golden" ]; then
	qemu-img create -q -f qcow2 "$golden" 256M
	device=$(qcowctl attach "$golden")
	mkfs.ext4 -q "$device"
	qcowctl detach "$device"
fi
# Who writes to it from now on destroys the overlays.
chmod a-w "$golden"

[ -e overlay.qcow2 ] || qemu-img create -q -f qcow2 -b "$golden" -F qcow2 overlay.qcow2
device=$(qcowctl attach overlay.qcow2)
trap 'qcowctl detach "$device"' EXIT
directory=$(mktemp -d)
mount "$device" "$directory"
date >>"$directory/log"
cat "$directory/log"
umount "$directory"
rmdir "$directory"
