#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Each operation on the image's files fails in turn, and each allocation, and what the files are on goes away: who lost something is told, nothing else breaks, and the image has no error.
# kernels: 6.1+ debug
# quick: 6.1+
# timeout: 600

# usage: faults.t [SHAPE]...
# QCOW_SOAK=1 has each operation of the load fail, and each allocation; QCOW_SEED=N is
# another load, and without QCOW_SOAK=1 other operations.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
debug=/sys/kernel/debug/qcow
[[ -e $debug/fail-read ]] || skip_all "the module has no points where operations fail"
cd "$WORK" || exit

kinds=(read write sync fallocate truncate)
# How many of each are made to fail, for each shape; with QCOW_SOAK, all
declare -A points=([read]=1 [write]=2 [sync]=1 [fallocate]=1 [truncate]=1)
ops=6000
if [[ $QUICK ]]; then
	points=([read]=0 [write]=1 [sync]=1 [fallocate]=0 [truncate]=0)
	ops=1500
fi
seed=${QCOW_SEED:-1}
diag "seed $seed"
RANDOM=$((seed % 32768))

# ---- one operation that fails ---------------------------------------------

# new_shape SPEC: image.qcow2 in a directory of its own, which is where we are then,
# and what is needed to begin with it again and again. SPEC is like a cell's name
# (cells.sh); further keys are lazy=1, bitmap=1 and most=, the largest write.
new_shape() {
	local pair

	v=3 cs=64k ext=0 rc=16 pre=off chain=none data=none enc=none packed='' snap=0 init=0
	size=6M compress='' lazy='' bitmap='' most=128k
	for pair in ${1//,/ }; do
		printf -v "${pair%%=*}" %s "${pair#*=}"
	done
	options=(${compress:+"--compress=$compress"})
	mkdir "$WORK/shape.$((++shapes))" && cd "$WORK/shape.$shapes" && make_image || return
	[[ ! $lazy ]] || qemu-img amend -o lazy_refcounts=on image.qcow2 || return
	[[ ! $bitmap ]] || qemu-img bitmap --add image.qcow2 changes || return
	qemu-img convert -O raw image.qcow2 initial.raw || return
	mv image.qcow2 first
	[[ $data == none ]] || mv image.qcow2.data first.data
}

# The dirty bit is 1, the corrupt bit 2.
features() {
	echo $(($(od -An -tu1 -j 79 -N 1 image.qcow2) & 3))
}

wrong() {
	echo "$*"
	return 1
}

# load: attach, requests, detach, while some operation may fail, and then what there is
# to see. Says what is wrong, and sets @told: how many have been told of an error.
load() {
	local closed='' sync_failed='' before after

	told=0
	before=$(<"$debug/fail-sync")
	cp --sparse=always first image.qcow2
	[[ $data == none ]] || cp --sparse=always first.data image.qcow2.data
	if try_attach "${options[@]}" "$PWD/image.qcow2"; then
		qcow-diff --seed "$seed" --ops 100 --cluster "$cs" --max-io "$most" \
			--allow-errors --no-final --history history --mirror-in initial.raw \
			--mix read=15,write=45,dsync=3,zero=8,punch=6,discard=14,flush=9 \
			"$DEV" >diff.out 2>&1 || wrong "qcow-diff: $(<diff.out)" || return
		told=$(grep -o '[0-9]* failed' diff.out | awk '{ n += $1 } END { print n + 0 }')
		state=$("$QCOWCTL" list -n -o STATE)
		after=$(<"$debug/fail-sync")
		if ((before && !after)); then
			sync_failed=1
			[[ $state == failed ]] ||
				wrong "a barrier has failed, and the state is $state" || return
			! sync "$DEV" 2>/dev/null && ! sync "$DEV" 2>/dev/null ||
				wrong "a barrier has failed, and later ones do not" || return
		fi
		if try_detach; then
			closed=--closed
			[[ ! $sync_failed ]] ||
				wrong "a barrier has failed, and detach does not say so" || return
		else
			((++told))
			forget "$DEV"
		fi
		[[ ! -e /sys/block/${DEV#/dev/} ]] || wrong "the device is still there" || return
	else
		((++told))
		state=none
		rm -f history
	fi
	if (($(features))); then
		(($(features) == 1 && told)) && [[ $lazy ]] ||
			wrong "the header has the bits $(features)" || return
		is_consistent image.qcow2 >/dev/null ||
			qemu-img check -q -r all image.qcow2 >/dev/null 2>&1
	fi
	is_consistent "$PWD/image.qcow2" || return
	qemu-img convert -O raw image.qcow2 now.raw || return
	if [[ -e history ]]; then
		disk-check $closed history initial.raw now.raw
	else
		cmp initial.raw now.raw
	fi
}

# It can go on, with no fault.
go_on() {
	try_attach "${options[@]}" "$PWD/image.qcow2" || wrong "attach: $(<"$WORK/.err")" || return
	qcow-diff --quiet --seed 99 --ops 40 --cluster "$cs" --max-io 64k --mirror-in now.raw \
		--mirror-out later.raw "$DEV" || return
	try_detach || wrong "detach: $(<"$WORK/.err")" || return
	(($(features) == 0)) || wrong "the header has the bits $(features) in the end" || return
	is_consistent "$PWD/image.qcow2" || return
	[[ ! ${QCOW_SOAK-} ]] || qemu-img compare -F raw image.qcow2 later.raw
}

# fails KIND N ERROR: the Nth operation does.
fails() {
	local kind=$1 n=$2 status

	echo "$3" >$debug/fail-error
	echo "$n" >"$debug/fail-$kind"
	load >out 2>&1
	status=$?
	if (($(<"$debug/fail-$kind"))); then
		# It has been less this time: the kernel decides when to read.
		echo 0 >"$debug/fail-$kind"
	else
		((++faults[$kind]))
		((!told)) || ((++reported[$kind]))
	fi
	if ((status)); then
		try_detach
		return 1
	fi
	if [[ $kind == sync ]] && ((!told)); then
		wrong "nobody was told" >>out
		return
	fi
	# One request has hit it. After a failure of the header or a barrier all fail.
	if ((told > 1)) && [[ $state != failed ]]; then
		wrong "$told were told" >>out
		return
	fi
	# Takes as long as all of the above.
	if ((RANDOM % 3 == 0)) || [[ ${QCOW_SOAK-} ]]; then
		go_on >>out 2>&1
	fi
}

declare -A faults=() reported=()
shapes=0
# Those that are named, or all.
if ! (($#)); then
	set -- cs=64k cs=4k,chain=raw,snap=1 cs=512,rc=64,snap=1,init=1,most=512k \
		ext=1,init=1,chain=qcow2 compress=zlib,cs=16k data=file,init=1 lazy=1,cs=4k \
		bitmap=1,init=1
fi
for shape; do
	if ! new_shape "$shape" >"$WORK/.out" 2>&1; then
		fail "$shape: make the image"
		diag "$(<"$WORK/.out")"
		continue
	fi
	# First count.
	for kind in "${kinds[@]}"; do
		echo 1000000 >"$debug/fail-$kind"
	done
	load >out 2>&1
	status=$?
	declare -A total=()
	for kind in "${kinds[@]}"; do
		total[$kind]=$((1000000 - $(<"$debug/fail-$kind")))
		echo 0 >"$debug/fail-$kind"
	done
	if ! is "$shape: with no fault all is well" "$status $told" "0 0"; then
		diag "$(<out)"
		continue
	fi
	if [[ $shape == *rc=64* ]]; then
		ok "$shape: the refcount table grows" test "$(od -An -tx1 -j 48 -N 12 first)" \
			!= "$(od -An -tx1 -j 48 -N 12 image.qcow2)"
	fi
	for kind in "${kinds[@]}"; do
		count=${total[$kind]}
		want=${points[$kind]}
		if [[ ${QCOW_SOAK-} ]] || ((want > count)); then
			want=$count
		elif ((shapes % 2)); then
			# For these take turns; who has layers below reads more.
			[[ $kind != read && $kind != fallocate ]] || continue
		elif [[ $kind == truncate ]]; then
			continue
		fi
		((want)) || continue
		bad=0
		for ((i = 0; i < want; i++)); do
			# Spread over all of them
			n=$((want == count ? 1 + i : 1 + (i * count + RANDOM % count) / want))
			error=5
			if ((RANDOM % 2)) && [[ $kind == write || $kind == fallocate ]]; then
				error=28
			fi
			if ! fails "$kind" "$n" "$error"; then
				((bad++))
				diag "$shape: $kind $n of $count, error $error: $(head -n 40 out)"
			fi
		done
		is "$shape: of $count times $kind, $want that fail" "$bad" 0
	done
done
cd "$WORK" || exit
sum=0
for kind in "${kinds[@]}"; do
	((sum += ${faults[$kind]-0}))
	diag "$kind: ${faults[$kind]-0} failed, ${reported[$kind]-0} of them have been reported"
done
diag "totals: faults=$sum"
ok "some of the writes that failed were reported" test "${reported[write]-0}" -gt 0
is "each barrier that failed was reported" "${reported[sync]-0}" "${faults[sync]-0}"

# ---- what the files are on goes away ---------------------------------------

# vanishes NAME CMD...: a load on DEV, during which CMD takes something away. The load
# ends, and what it reads is right. There is initial.raw.
vanishes() {
	local name=$1 pid
	shift

	timeout 100 qcow-diff --ops "$ops" --jobs 4 --hot 5M --max-io 64k --seed "$seed" \
		--allow-errors --no-final --history history --mirror-in initial.raw "$DEV" \
		>diff.out 2>&1 &
	pid=$!
	sleep 0.3
	"$@" || fail "$name: $*"
	wait $pid
	is "$name: the load ends, and what it reads is right" "$?" 0 || diag "$(<diff.out)"
}

# vanished NAME STATUS: the device goes all the same, and detach ends with STATUS.
vanished() {
	timeout 60 "$QCOWCTL" detach "$DEV" 2>"$WORK/.err"
	is "$1: detach" $? "$2" || diag "$(<"$WORK/.err")"
	ok "$1: the device goes" test ! -e "/sys/block/${DEV#/dev/}"
	forget "$DEV"
}

# new_disk: a SCSI disk of 32 MiB, and its name, as DISK
new_disk() {
	local tries

	modprobe -q scsi_debug dev_size_mb=32 delay=0 || return
	for ((tries = 0; tries < 100; tries++)); do
		DISK=$(echo /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/*)
		DISK=/dev/${DISK##*/}
		[[ ! -b $DISK ]] || break
		sleep 0.1
	done
	udevadm settle
}
remove_disk() { echo 1 >"/sys/block/${DISK#/dev/}/device/delete"; }
# A device mapper's device can only be made to fail.
fail_disk() {
	dmsetup suspend --noflush --nolockfs faulty-base &&
		dmsetup load faulty-base --table "0 $sectors error" &&
		dmsetup resume faulty-base
}

# base_vanishes NAME BASE CMD...: the base of an overlay does. It held base.raw.
base_vanishes() {
	local name="$1 with the base is gone"

	cp base.raw initial.raw
	qemu-img create -q -f qcow2 -b "$2" -F raw image.qcow2 6M
	attach image.qcow2 || return
	vanishes "$name" "${@:3}"
	# Behind what the load touches, which may all be in the overlay by then.
	not_ok "$name: a read of what only it has fails" dd if="$DEV" of=/dev/null bs=64k \
		count=1 skip=90 iflag=direct
	ok "$name: a flush works" timeout 60 sync "$DEV"
	ok "$name: and a write of a whole cluster" dd if=/dev/zero of="$DEV" bs=64k count=1 \
		seek=95 oflag=direct status=none
	vanished "$name" 0
	qemu-img rebase -u -F raw -b base.raw image.qcow2
	ok "$name: the image has no error" is_consistent image.qcow2
	qemu-img convert -O raw image.qcow2 now.raw
	dd if=initial.raw of=now.raw bs=64k count=1 seek=95 skip=95 conv=notrunc status=none
	ok "$name: and holds all that was written, and the base otherwise" \
		disk-check --closed history initial.raw now.raw
}

mkdir gone && cd gone && make_raw base.raw 6M 1001 || exit
if new_disk; then
	# What is there is not zero, and what is not there any more is not either.
	qemu-img convert -f raw -O qcow2 base.raw "$DISK"
	cp base.raw initial.raw
	name="a SCSI disk with the image is gone"
	if attach "$DISK"; then
		vanishes "$name" remove_disk
		like "$name: and some of it has failed" "$(<diff.out)" ' failed'
		not_ok "$name: a read of it all fails" dd if="$DEV" of=/dev/null bs=1M iflag=direct
		is "$name: a flush fails" "$(timeout 60 sync "$DEV" 2>/dev/null; echo $?)" 1
		vanished "$name" 1
		udevadm settle
		ok "and nothing holds it any more" modprobe -r scsi_debug
	fi
	new_disk
	dd if=base.raw of="$DISK" bs=64k conv=fsync status=none
	base_vanishes "a SCSI disk" "$DISK" remove_disk
	udevadm settle
	ok "and nothing holds it any more" modprobe -r scsi_debug
else
	skip "a SCSI disk is gone" "no scsi_debug"
fi

# No error is told of what was to be written to a disk that has no length any more.
name="a disk that is gone, buffered"
qemu-img create -q -f qcow2 lost.qcow2 6M
truncate -s 2M lost.qcow2
new_loop lost.qcow2
attach --io=buffered "$LOOP"
ok "$name: write" xfs_io -d -c 'pwrite -q -b 64k 0 64k' -c fsync "$DEV"
ok "$name: write in place" xfs_io -d -c 'pwrite -q -b 64k 0 64k' "$DEV"
truncate -s 0 lost.qcow2
losetup -c "$LOOP"
is "$name: a flush fails" "$(timeout 60 sync "$DEV" 2>/dev/null; echo $?)" 1
vanished "$name" 1
losetup -d "$LOOP"
LOOPS=()
modprobe -q dm_mod
if [[ -e /dev/mapper/control ]]; then
	new_loop base.raw --direct-io=on
	sectors=$(blockdev --getsz "$LOOP")
	dmsetup create faulty-base --table "0 $sectors linear $LOOP 0" && udevadm settle
	base_vanishes "a device" /dev/mapper/faulty-base fail_disk
	udevadm settle
	dmsetup remove faulty-base
	losetup -d "$LOOP"
	LOOPS=()

	# The header is in the page cache, so it is the driver that waits.
	name="a disk that hangs"
	qemu-img create -q -f qcow2 hung.qcow2 6M
	truncate -s 1M hung.qcow2
	qemu-img create -q -f qcow2 other.qcow2 6M
	new_loop hung.qcow2
	dmsetup create hung --table "0 $(blockdev --getsz "$LOOP") linear $LOOP 0" && udevadm settle
	exec {hung}</dev/mapper/hung
	head -c 64k <&"$hung" >/dev/null
	attach other.qcow2
	dmsetup suspend --noflush --nolockfs hung
	"$QCOWCTL" attach --read-only /dev/mapper/hung >hung.dev 2>hung.err &
	pid=$!
	for ((tries = 0; tries < 300; tries++)); do
		[[ $(ps -o state= $pid) != D ]] || break
		sleep 0.1
	done
	is "$name: an attach of it waits" "$(ps -o state= $pid)" D
	vanished "$name, and another one" 0
	dmsetup resume hung
	wait $pid
	is "$name: the attach goes on" $? 0 || diag "$(<hung.err)"
	DEV=$(<hung.dev)
	DEVICES+=("$DEV")
	detach
	exec {hung}<&-
	udevadm settle
	dmsetup remove hung
	losetup -d "$LOOP"
	LOOPS=()
else
	skip "a device with the base is gone" "no device mapper"
fi
cd "$WORK" || exit

# ---- memory ----------------------------------------------------------------

# inject PERCENT: so many allocations fail, of those that are marked; 0 for none.
inject() {
	local point

	for point in failslab fail_page_alloc; do
		cd "/sys/kernel/debug/$point" || return
		echo 0 >verbose
		echo N >ignore-gfp-wait
		echo Y >task-filter
		echo "$1" >probability
		echo "$(($1 ? 1000000 : 0))" >./times
		cd - >/dev/null || return
	done
	echo 0 >/sys/kernel/debug/fail_page_alloc/min-order
}

# How many have failed
injected() {
	echo $((2000000 - $(</sys/kernel/debug/failslab/times) -
		$(</sys/kernel/debug/fail_page_alloc/times)))
}

# mark YES PID...: these processes, or not
mark() {
	local pid

	for pid in "${@:2}"; do
		echo "$1" 2>/dev/null >"/proc/$pid/make-it-fail"
	done
}

# kthreadd hands it on to new workers.
mark_workers() {
	# shellcheck disable=SC2046 # numbers
	mark "$1" $(pgrep -x kthreadd) $(pgrep ^kworker/)
}

# short_of_memory SPEC: a load while allocations fail, on an image in memory.
short_of_memory() {
	local pid n

	new_shape "$1" || return
	dd if=first of=/dev/ram0 bs=64k conv=notrunc status=none
	attach "${options[@]}" /dev/ram0 || return
	mark_workers 1
	inject 3
	qcow-diff --seed "$seed" --ops 2000 --jobs 4 --cluster "$cs" \
		--max-io 128k --allow-errors --no-final --history history \
		--mirror-in initial.raw "$DEV" >diff.out 2>&1 &
	pid=$!
	sleep 0.5
	# But for the one that opens files.
	# shellcheck disable=SC2046 # numbers
	mark 1 $(find "/proc/$pid/task" -mindepth 1 -maxdepth 1 ! -name "$pid" -printf '%f\n')
	wait $pid
	is "$1, short of memory: the load ends, and what it reads is right" $? 0 ||
		diag "$(tail -n 40 diff.out)"
	n=$(injected)
	inject 0
	mark_workers 0
	diag "$n allocations failed; $(tail -n 1 diff.out)"
	ok "$1, short of memory: allocations failed" test "$n" -gt 0
	detach
	ok "$1, short of memory: the image has no error" is_consistent /dev/ram0
	qemu-img convert -f qcow2 -O raw /dev/ram0 now.raw
	ok "$1, short of memory: it holds all that was written" \
		disk-check --closed history initial.raw now.raw
	attach "${options[@]}" /dev/ram0 || return
	ok "$1, short of memory: it can go on" qcow-diff --quiet --seed 99 --ops 200 \
		--cluster "$cs" --mirror-in now.raw --mirror-out later.raw "$DEV"
	detach
	ok "$1, short of memory: with no error in the end" is_consistent /dev/ram0
	same later.raw raw /dev/ram0 qcow2
}

if [[ ! -d /sys/kernel/debug/failslab || ! -d /sys/kernel/debug/fail_page_alloc ]]; then
	skip "memory" "the kernel does not have allocations fail"
else
	inject 0
	step=7
	[[ ! ${QCOW_SOAK-} ]] || step=1
	qemu-img create -q -f qcow2 -o lazy_refcounts=on image 64M
	qemu-io -f qcow2 -c 'write -q -P 0x41 0 300k' image
	cp image image.before
	ok "an attach and a detach work, or fail, with each allocation that fails" \
		fail-nth image "$step"
	diag "$(<"$WORK/.out")"
	ok "and leave the image as it was" cmp image image.before
	if modprobe -q brd rd_nr=1 rd_size=65536; then
		# What it has once got it keeps.
		dd if=/dev/zero of=/dev/ram0 bs=1M status=none 2>/dev/null
		for shape in cs=4k,snap=1 cs=64k,compress=zstd ext=1,init=1; do
			short_of_memory "$shape"
		done
		cd "$WORK" || exit
		udevadm settle
		modprobe -r brd
	else
		skip "a load that is short of memory" "no brd"
	fi
fi

no_kernel_report
done_testing
