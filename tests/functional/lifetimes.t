#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Devices come and go against I/O, udev, killed tools and each other, and nothing stays behind.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 1500

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
many=24 overlays=50 total=$((1000 / SHARE)) tugs=30 kill_rounds=$((100 / SHARE))
if [[ $QUICK ]]; then
	many=8 overlays=6 total=40 tugs=10 kill_rounds=10
fi

devices() {
	find /sys/block -maxdepth 1 -name 'qcow*' -printf '%f\n' | sort
}

is "no device to begin with" "$(devices)" ""

# What attach promises at its return
sizes=(0 512 1048576 3221225472 1099511627776)
for size in "${sizes[@]}"; do
	qemu-img create -q -f qcow2 s.qcow2 "$size"
	attach "$WORK/s.qcow2"
	is "the node has its size when attach returns ($size)" \
		"$(blockdev --getsize64 "$DEV" 2>&1)" "$size"
	detach
done

qemu-img create -q -f qcow2 -o cluster_size=64k one.qcow2 32M
qemu-img create -q -f qcow2 -o cluster_size=64k two.qcow2 32M
attach -n 7 "$WORK/one.qcow2"
is "-n 7 gives number 7" "$DEV" /dev/qcow7
not_ok "a number in use is refused" "$QCOWCTL" attach -n 7 "$WORK/two.qcow2"
not_ok "an image in use is refused" "$QCOWCTL" attach "$WORK/one.qcow2"
is "and neither leaves a device" "$(devices)" qcow7
detach
is "detach takes the device away" "$(devices)" ""
not_ok "detaching what is not there fails" "$QCOWCTL" detach /dev/qcow7

# objects: how many the kernel has of the sizes that queues and devices have. What a
# CPU keeps for its next allocations counts as used until the cache is shrunk.
objects() {
	local size

	echo 2 >/proc/sys/vm/drop_caches
	sleep 1
	for size in 512 1k 2k 4k; do
		echo 1 >"/sys/kernel/slab/kmalloc-$size/shrink"
	done
	awk '/^kmalloc-(512|1k|2k|4k) / { n += $2 } END { print n }' /proc/slabinfo
}

# churn COUNT: one after the other
churn() {
	local i dev

	for ((i = 0; i < $1; i++)); do
		dev=$("$QCOWCTL" attach "$WORK/one.qcow2") && "$QCOWCTL" detach "$dev" || return
	done
	udevadm settle
}

# On the debug kernel kmemleak looks, and what is freed stays for a while.
if [[ ! $QUICK ]]; then
	ok "devices one after the other" churn 20
	before=$(objects)
	ok "and a hundred more" churn 100
	after=$(objects)
	ok "a hundred devices leave no memory behind" test $((after - before)) -lt 50
	diag "$before objects before, $after after"
fi

# Open devices
attach "$WORK/one.qcow2"
exec 8<>"$DEV"
not_ok "an open device does not detach" "$QCOWCTL" detach "$DEV"
like "because it is busy" "$("$QCOWCTL" detach "$DEV" 2>&1)" '[Bb]usy|in use|open in'
ok "and still works" dd if=/dev/zero of="$DEV" bs=64k count=4 oflag=direct conv=notrunc
not_ok "the module does not unload" rmmod qcow
ok "deferred detach of an open device succeeds" "$QCOWCTL" detach -d "$DEV"
is "which is still there" "/dev/$(devices)" "$DEV"
ok "and works for who has it open" dd of=/dev/fd/8 if=/dev/zero bs=64k count=1 conv=notrunc
exec 8>&-
for ((i = 0; i < 50; i++)); do
	[[ $(devices) ]] || break
	sleep 0.1
done
is "it goes at the last close" "$(devices)" ""
forget "$DEV"
check_clean one.qcow2 "after deferred detach"
ok "and QEMU can have the image" qemu-io -f qcow2 -c 'write -q 0 4k' one.qcow2

# Unload
attach "$WORK/one.qcow2"
not_ok "rmmod is refused while a device is attached" rmmod qcow
detach
ok "rmmod with no device" rmmod qcow
not_ok "the control node goes" test -e /dev/qcow-control
if [[ ${QCOW_KO-} ]]; then
	ok "the module loads again" insmod "$QCOW_KO"
else
	ok "the module loads again" modprobe qcow
fi
for ((i = 0; i < 50; i++)); do
	[[ ! -e /dev/qcow-control ]] || break
	sleep 0.1
done

# Many at a time
attached=0
for ((i = 0; i < many; i++)); do
	qemu-img create -q -f qcow2 many$i.qcow2 8M
	try_attach "$WORK/many$i.qcow2" && attached=$((attached + 1))
done
is "$many devices at a time" "$attached" "$many"
is "with numbers from 0 on" "$(devices | sort -V | tr '\n' ' ')" \
	"$(seq -f 'qcow%g' -s ' ' 0 $((many - 1))) "
all_at_once() {
	local i pids=()

	for ((i = 0; i < many; i++)); do
		qcow-diff --quiet --ops 50 --seed "$i" "/dev/qcow$i" &
		pids+=($!)
	done
	wait "${pids[@]}"
}
ok "which all work at once" all_at_once
ok "detach --all" "$QCOWCTL" detach --all
DEVICES=()
is "takes them all away" "$(devices)" ""
bad=0
for ((i = 0; i < many; i++)); do
	is_clean many$i.qcow2 || bad=$((bad + 1))
done
is "with every image clean" "$bad" 0
rm -f many*.qcow2

# Many overlays on one base: its tables are in memory once.
qemu-img create -q -f qcow2 -o cluster_size=4k,preallocation=metadata base.qcow2 32M
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 ov0.qcow2
attached=0
used=()
for ((i = 0; i < overlays; i++)); do
	((i == 0)) || cp ov0.pristine ov$i.qcow2
	((i > 0)) || cp ov0.qcow2 ov0.pristine
	if try_attach "$WORK/ov$i.qcow2"; then
		attached=$((attached + 1))
		dd if="$DEV" of=/dev/null bs=1M count=32 iflag=direct status=none
		used+=("$(cat "/sys/block/${DEV#/dev/}/qcow/cache_size" 2>/dev/null)")
	fi
done
is "$overlays overlays on one base" "$attached" "$overlays"
diag "cache_size of the devices: ${used[*]}"
# 64 KiB of L2 tables in the base; an overlay has next to none of its own.
sum=0
for n in "${used[@]}"; do
	sum=$((sum + n))
done
if [[ ${used[0]} ]]; then
	ok "the base's tables are in memory once ($sum bytes in all)" \
		test "$sum" -lt $((overlays * 32768 + 262144))
else
	skip "the base's tables are in memory once" "no cache_size in sysfs"
fi
ok "detach --all overlays" "$QCOWCTL" detach --all
DEVICES=()
rm -f ov*.qcow2 base.qcow2
is "no device is left" "$(devices)" ""

# A thousand lifetimes: four loops, each with its image, against I/O and udev.
# Detach is deferred, as udev or the reader may have the device open: until they
# close it the image is busy, and attach is tried again.
churn() {
	local image=$1 count=$2 dev n tries

	for ((n = 0; n < count; n++)); do
		for ((tries = 0; tries < 500; tries++)); do
			dev=$("$QCOWCTL" attach "$image" 2>"$image.err") && break
			grep -qi 'busy\|in use\|lock\|open' "$image.err" ||
				{ echo "attach $n: $(<"$image.err")"; return 1; }
			sleep 0.02
		done
		[[ $dev ]] || { echo "attach $n: always busy: $(<"$image.err")"; return 1; }
		[[ $(blockdev --getsize64 "$dev") == 33554432 ]] ||
			{ echo "size of $dev in round $n"; return 1; }
		case $((n % 4)) in
		1)
			dd if=/dev/zero of="$dev" bs=4k count=1 seek=$((n % 1000)) \
				oflag=direct conv=notrunc status=none || { echo "write $n"; return 1; }
			;;
		2)
			dd if="$dev" of=/dev/null bs=64k count=8 status=none ||
				{ echo "read $n"; return 1; }
			;;
		3)
			# Someone who is still at it when detach comes.
			dd if="$dev" of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null &
			;;
		esac
		"$QCOWCTL" detach -d "$dev" || { echo "detach $n"; return 1; }
	done
	wait
}
for ((i = 0; i < 4; i++)); do
	qemu-img create -q -f qcow2 churn$i.qcow2 32M
done
churn_all() {
	local i pid pids=() status=0

	for ((i = 0; i < 4; i++)); do
		churn "$WORK/churn$i.qcow2" $((total / 4)) &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do
		wait "$pid" || status=1
	done
	return "$status"
}
start=$SECONDS
ok "$total lifetimes in four loops" churn_all
diag "$total lifetimes took $((SECONDS - start)) s"
for ((i = 0; i < 50; i++)); do
	[[ $(devices) ]] || break
	sleep 0.1
done
is "none is left" "$(devices)" ""
bad=0
for ((i = 0; i < 4; i++)); do
	is_clean churn$i.qcow2 || bad=$((bad + 1))
done
is "with every image clean" "$bad" 0

# Attach and detach of one image by two at once: one wins, nothing breaks.
tug() {
	local i

	for ((i = 0; i < tugs; i++)); do
		"$QCOWCTL" attach "$WORK/one.qcow2" >/dev/null 2>&1
		"$QCOWCTL" detach "$WORK/one.qcow2" >/dev/null 2>&1
	done
	return 0
}
tug_of_war() {
	local pids=()

	tug & pids+=($!)
	tug & pids+=($!)
	tug & pids+=($!)
	wait "${pids[@]}"
	for ((i = 0; i < 50; i++)); do
		[[ $(devices) ]] || return 0
		"$QCOWCTL" detach --all
		sleep 0.1
	done
}
ok "three that attach and detach one image" tug_of_war
is "leave no device" "$(devices)" ""
check_clean one.qcow2 "after the tug of war"

# A tool that is killed leaves nothing, or a device that detaches. It is killed
# about when the device comes: the next one later if there was none yet, else sooner;
# and until both have happened.
start=${EPOCHREALTIME/./}
attach "$WORK/two.qcow2"
took=$((${EPOCHREALTIME/./} - start))
detach
us=$((took * 3 / 4)) none=0 made=0 stuck=0
for ((i = 0; i < kill_rounds || ((!none || !made) && i < 10 * kill_rounds); i++)); do
	"$QCOWCTL" attach "$WORK/two.qcow2" >/dev/null 2>&1 &
	pid=$!
	read -rt "$((us / 1000000)).$(printf %06d $((us % 1000000)))" <> <(:)
	kill -9 $pid 2>/dev/null
	wait $pid 2>/dev/null
	status=$?
	if [[ $(devices) ]]; then
		((status != 137)) || made=$((made + 1))
		us=$((us - took * (RANDOM % 20) / 100))
		((us > 0)) || us=0
		for ((j = 0; j < 50; j++)); do
			"$QCOWCTL" detach --all >/dev/null 2>&1 && break
			sleep 0.05
		done
	else
		((status != 137)) || none=$((none + 1))
		us=$((us + took * (RANDOM % 20) / 100))
	fi
	for ((j = 0; j < 20; j++)); do
		qemu-io -f qcow2 -c 'write -q 0 512' two.qcow2 >/dev/null 2>&1 && break
		sleep 0.05
	done
	((j < 20)) || stuck=$((stuck + 1))
done
diag "of $i, $none were killed before there was a device, $made after"
ok "some are killed before there is a device" test "$none" -gt 0
ok "and some after" test "$made" -gt 0
is "a killed tool leaves the image free" "$stuck" 0
is "and no device" "$(devices)" ""
check_clean two.qcow2 "after the killings"

# A detach that is killed goes on to its end, with the page cache in between, too.
bad=0
for ((i = 1; i <= 5; i++)); do
	attach --io=buffered two.qcow2 || break
	xfs_io -d -c "pwrite -q -S $i 0 8M" "$DEV"
	"$QCOWCTL" detach "$DEV" >/dev/null 2>&1 &
	pid=$!
	read -rt "0.0$i" <> <(:)
	kill -9 $pid 2>/dev/null
	wait $pid 2>/dev/null
	# Unless it had not even begun
	for ((j = 0; j < 100; j++)); do
		[[ $(devices) ]] || break
		"$QCOWCTL" detach "$DEV" >/dev/null 2>&1
		sleep 0.1
	done
	if [[ $(devices) ]] || ! is_clean two.qcow2 >/dev/null ||
		! qemu-io -f qcow2 -c "read -q -P $i 0 8M" two.qcow2; then
		bad=$((bad + 1))
	fi
	forget "$DEV"
done
is "a killed detach loses nothing" "$bad" 0
ok "the module unloads, so nothing holds it" rmmod qcow
if [[ ${QCOW_KO-} ]]; then
	insmod "$QCOW_KO"
fi

no_kernel_report
done_testing
