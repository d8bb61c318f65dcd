#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# When the image's storage fails, requests fail, nothing that was flushed is lost, and the image has no error.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
modprobe dm-flakey 2>/dev/null || skip_all "no dm-flakey"
cd "$WORK" || exit

# storage FILE: /dev/mapper/faulty on it, which works
storage() {
	new_loop "$1" --direct-io=on || return
	sectors=$(blockdev --getsz "$LOOP")
	dmsetup create faulty --table "0 $sectors linear $LOOP 0" && udevadm settle
}
storage_gone() {
	local i

	udevadm settle
	for ((i = 0; i < 20; i++)); do
		dmsetup remove faulty 2>/dev/null && break
		sleep 0.1
	done
	losetup -d "$LOOP"
	LOOPS=()
}
set_storage() {
	dmsetup suspend --noflush --nolockfs faulty &&
		dmsetup load faulty --table "$1" &&
		dmsetup resume faulty
}
works() { set_storage "0 $sectors linear $LOOP 0"; }
# Always down: up for 0 s, down for 60 s
fails() { set_storage "0 $sectors flakey $LOOP 0 0 60 ${1+1 }${1-}"; }

rounds=12
ops=$((3000 / SHARE))
if [[ $QUICK ]]; then
	rounds=3
	ops=600
fi
if [[ ${QCOW_SOAK-} ]]; then
	rounds=60
fi

# faulted ROUND: a load, and a failure at some point of it.
faulted() {
	local i=$1 pid status how comes=$2 message
	local -a sizes=(64k 4k 512 64k) jobs=(1 4 1 4)
	local cs=${sizes[i % 4]} job=${jobs[i % 4]}
	local name="cluster size $cs, $job jobs"

	RANDOM=$((i + 1))
	rm -f image base.raw history initial.raw
	truncate -s 40M image
	if ((i % 3 == 1)); then
		make_raw base.raw 6M 1001
		qemu-img create -q -f qcow2 -b "$WORK/base.raw" -F raw -o "cluster_size=$cs" image 6M
		name+=", overlay"
	else
		qemu-img create -q -f qcow2 -o "cluster_size=$cs" image 6M
	fi
	if ((i % 3 == 2)); then
		qemu-io -f qcow2 -c 'write -q -P 0x61 0 2M' image
		qemu-img snapshot -c one image
		name+=", snapshot"
	fi
	qemu-img convert -f qcow2 -O raw image initial.raw
	truncate -s 40M image
	storage image || { fail "$name: storage"; return; }
	if ! attach /dev/mapper/faulty; then
		storage_gone
		return
	fi
	how=error_writes
	if ((i % 2)); then
		# Reads as well
		how=
	fi
	qcow-diff --ops "$ops" --jobs "$job" --cluster "$cs" --seed "$i" --allow-errors \
		--max-io 256k --no-final --history history --mirror-in initial.raw \
		--mix read=20,write=50,zero=5,punch=5,discard=8,flush=8 "$DEV" >diff.out 2>&1 &
	pid=$!
	sleep "0.$((RANDOM % 9))$((RANDOM % 10))"
	fails $how
	if ((comes)); then
		sleep 0.2
		works
		message="failing for a while"
	else
		message="failing from then on"
	fi
	wait $pid
	status=$?
	is "$name, $message: reads that succeed are right" "$status" 0
	diag "$(tail -n 40 diff.out)"
	"$QCOWCTL" detach "$DEV" >"$WORK/.err" 2>&1
	diag "detach: status $? $(<"$WORK/.err")"
	ok "$name, $message: the device goes" test ! -e "/sys/block/${DEV#/dev/}"
	forget "$DEV"
	works
	ok "$name, $message: the image has no error" is_consistent /dev/mapper/faulty
	if qemu-img convert -f qcow2 -O raw /dev/mapper/faulty now.raw 2>"$WORK/.err"; then
		ok "$name, $message: what was flushed is there" \
			disk-check history initial.raw now.raw
	else
		fail "$name, $message: QEMU reads the image"
		diag "$(<"$WORK/.err")"
	fi
	# And it can go on.
	if try_attach /dev/mapper/faulty; then
		ok "$name, $message: the image can be used again" \
			qcow-diff --ops 300 --seed 99 --cluster "$cs" --max-io 128k \
			--mirror-in now.raw --mirror-out later.raw "$DEV"
		detach
		ok "$name, $message: with no error in the end" is_consistent /dev/mapper/faulty
		same later.raw raw /dev/mapper/faulty qcow2
	else
		fail "$name, $message: the image attaches again"
		diag "$(<"$WORK/.err")"
	fi
	storage_gone
}

# Single bad sectors
bad_at() {
	local at=$(($1 / 512))

	set_storage "$(printf '%s\n' "0 $at linear $LOOP 0" "$at 1 error" \
		"$((at + 1)) $((sectors - at - 1)) linear $LOOP $((at + 1))")"
}
truncate -s 16M image
qemu-img create -q -f qcow2 image 8M
qemu-io -f qcow2 -c 'write -q -P 0x41 0 8M' image
truncate -s 16M image
storage image
attach /dev/mapper/faulty
# The first cluster's data is at 0x50000.
bad_at $((0x50000 + 8192))
read_at() {
	dd if="$DEV" of=/dev/null bs=4k skip=$(($1 / 4096)) count=1 iflag=direct status=none
}
not_ok "a bad sector gives an error to who reads it" read_at 8192
ok "what is beside it reads" read_at 4096
ok "and on the other side" read_at 12288
works
ok "when it is good again it reads" read_at 8192
detach
# An L2 table that cannot be read: 0x40000
bad_at $((0x40000))
if try_attach /dev/mapper/faulty; then
	not_ok "a bad L2 table gives an error to a read" read_at 0
	not_ok "and to a write" dd if=/dev/zero of="$DEV" bs=4k count=1 oflag=direct status=none
	works
	ok "when it is good again the read succeeds" read_at 0
	detach
	ok "and the image has no error" is_consistent /dev/mapper/faulty
else
	fail "attach reads no L2 table"
	diag "$(<"$WORK/.err")"
fi
# What cannot be written cannot be frozen either, and does not stay so.
if attach /dev/mapper/faulty; then
	for storage in "fails error_writes" works; do
		$storage
		"$QCOWCTL" check "$DEV" >"$WORK/.out" 2>"$WORK/.err"
		is "a check while storage $storage, behind a flush that failed: its exit code" $? 1
		like "and what it says" "$(<"$WORK/.err")" 'not everything can be written'
		is "and the state" "$("$QCOWCTL" list -n -o STATE)" failed
		not_ok "and writes fail at once" timeout 20 dd if=/dev/zero of="$DEV" bs=4k \
			count=1 oflag=direct status=none
	done
	"$QCOWCTL" detach "$DEV" 2>"$WORK/.err"
	is "a detach that cannot write: its exit code" $? 1
	like "and what it says" "$(<"$WORK/.err")" 'detached, but not everything could be written'
	ok "the device goes" test ! -e "/sys/block/${DEV#/dev/}"
	forget "$DEV"
	ok "and the image has no error" is_consistent /dev/mapper/faulty
fi
storage_gone

for ((round = 0; round < rounds; round++)); do
	faulted $round $((round / 2 % 2))
done

no_kernel_report
done_testing
