#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# throw-away.sh [TEMPLATE [COMMAND...]]: run COMMAND in a file system whose changes are
# gone afterwards, as a CI system does for each job. Without TEMPLATE, one is made.
set -eu

template=${1:-template.qcow2}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- sh -c 'echo was here >file; ls -l'
if [ ! -e "$template" ]; then
	qemu-img create -q -f qcow2 "$template" 256M
	device=$(qcowctl attach "$template")
	mkfs.ext4 -q "$device"
	qcowctl detach "$device"
fi

# Nothing of it has to survive a crash; and it is detached when it is unmounted.
device=$(qcowctl attach --temp --autoclear --cache=unsafe "$template")
directory=$(mktemp -d)
mount "$device" "$directory"
status=0
(cd "$directory" && "$@") || status=$?
umount "$directory"
rmdir "$directory"
exit $status
