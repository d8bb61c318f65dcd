#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# import.sh [SOURCE]: a qcow2 image of a disk image of any format that qemu-img knows,
# checked against it, and still sparse. Without SOURCE, one is made.
set -eu

source=${1:-source.vmdk}
[ -e "$source" ] || qemu-img create -q -f vmdk "$source" 64M
image=${source%.*}.qcow2

size=$(qemu-img info --output=json "$source" | jq '."virtual-size"')
qemu-img create -q -f qcow2 "$image" "$size"
device=$(qcowctl attach "$image")
trap 'qcowctl detach "$device"' EXIT
qemu-img convert -n --target-is-zero -O raw "$source" "$device"
trap - EXIT
qcowctl detach "$device"
qemu-img compare "$source" "$image"
qemu-img check -q "$image"
du -h "$image"
