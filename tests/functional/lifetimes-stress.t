#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# All that begins, ends or looks at a device, from many processes at once: each image has what its last writer wrote, and everything comes down.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 900

# QCOW_TIME=N for N seconds (25; 1800 with QCOW_SOAK=1), QCOW_SEED=N for others

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
seconds=${QCOW_TIME:-25} seed=${QCOW_SEED:-1}
if [[ ${QCOW_SOAK-} ]]; then
	seconds=${QCOW_TIME:-1800} seed=${QCOW_SEED:-$SRANDOM}
elif [[ $QUICK ]]; then
	seconds=${QCOW_TIME:-60}
fi
diag "seed $seed"
cpu=/sys/devices/system/cpu/cpu1/online

# Image N is only ever shown by device N. Each has an owner, the only one who writes to
# it, and who knows what it should have. Everybody may detach it.
#
#   0 1 2   belong to device-churn, which does all that is a matter of system calls, as
#           often as it can; 1 has lazy refcounts, 2 subclusters
#   3       has two partitions, which are written
#   4       has a file system
N=5
create=('cluster_size=64k' 'cluster_size=4k,lazy_refcounts=on' 'cluster_size=16k,extended_l2=on'
	'cluster_size=4k' 'cluster_size=64k')
for ((n = 0; n < N; n++)); do
	qemu-img create -q -f qcow2 -o "${create[n]}" $n.qcow2 32M
done
attach -n 3 "$WORK/3.qcow2"
printf 'label: gpt\nsize=8M\nsize=8M\n' | sfdisk -q "$DEV"
udevadm settle
dd if="$DEV" of=3.qcow2.raw bs=1M iflag=direct status=none
detach
attach -n 4 "$WORK/4.qcow2"
mkfs.ext4 -q "$DEV"
detach
mkdir mnt files

# What follows runs in processes of their own.

# tally WHAT [COUNT]
declare -A tallies=()
tally() {
	tallies[$1]=$((${tallies[$1]-0} + 1))
}
# bad WHAT...: this may not happen
bad() {
	echo "$me: $*" >>"$WORK/bad"
}
running() {
	((SECONDS < end)) && [[ ! -e bad ]]
}
# nap MILLISECONDS: up to that
nap() {
	local ms=$((RANDOM % $1))

	read -rt "$((ms / 1000)).$(printf %03d $((ms % 1000)))" <> <(:)
}
# Any of the images
some() {
	n=$((RANDOM % N)) dev=/dev/qcow$n
}
# tool WHAT CODES CMD...: qcowctl CMD exits with 0, which is counted, or one of CODES:
# 4 is busy, 5 that there is none, 6 that there is no driver
tool() {
	local what=$1 codes=$2 out status
	shift 2

	out=$(timeout -k 10 300 "$QCOWCTL" "$@" 2>&1)
	status=$?
	if ((status == 0)); then
		tally "$what"
	elif [[ $codes != *$status* ]] || ((status > 9)); then
		bad "$what: $* exits with $status: $out"
	fi
	return "$status"
}

attach_it() {
	local inline=()

	((RANDOM % 3)) || inline=(--no-inline)
	((RANDOM % 4)) || inline+=(--cache-size=64K)
	tool attach 46 attach -n "$1" "${inline[@]}" "$WORK/$1.qcow2"
}
detach_it() {
	case $((RANDOM % 4)) in
	0) tool detach 456 detach "$dev" ;;
	1) tool detach 456 detach "$WORK/$n.qcow2" ;;
	2) tool deferred 456 detach -d "$dev" ;;
	3) nap 200 ;;
	esac
}

# held NODE: it is open, as 9, so that it stays what it is, until `exec 9<&-`. Between the
# lookup of a name and the open, its number may have gone to another device.
held() {
	{ exec 9<"$1"; } 2>/dev/null &&
		[[ $(stat -Lc %Hr:%Lr /dev/fd/9) == "$(cat "/sys/class/block/${1##*/}/dev")" ]]
}
# written PART MIRROR-OFFSET SIZE: a write to it, where it is. With the device open, it is
# not detached, and the write may not fail.
written() {
	local length=$((RANDOM % 400 * 512 + 512)) offset out

	offset=$(((RANDOM << 15 | RANDOM) * 512 % ($3 - length) / 512 * 512))
	if ! held "$1"; then
		:
	elif out=$(xfs_io -d -c "pwrite -q -b 64k -S $((gen % 255 + 1)) $offset $length" \
		-c fsync "$1" 2>&1) && [[ ! $out ]]; then
		tally write
		xfs_io -c "pwrite -q -b 64k -S $((gen % 255 + 1)) $(($2 + offset)) $length" "$n.qcow2.raw"
		gen=$((gen + 1))
	else
		bad "write to $1: $out"
	fi
	exec 9<&-
}
partition_owner() {
	local i

	n=3 dev=/dev/qcow3
	attach_it 3
	for ((i = RANDOM % 4; i >= 0; i--)); do
		# As sfdisk puts them
		case $((RANDOM % 2)) in
		0) written "${dev}p1" 1048576 8388608 ;;
		1) written "${dev}p2" 9437184 8388608 ;;
		esac
	done
	detach_it
}
file_owner() {
	local out="" i name

	n=4 dev=/dev/qcow4
	attach_it 4
	# Whoever reads the partitions or looks at it exclusively is in the way.
	held "$dev" && out=$(mount "$dev" mnt 2>&1)
	exec 9<&-
	if mountpoint -q mnt; then
		tally mount
		for ((i = RANDOM % 3; i >= 0; i--)); do
			name=$((RANDOM % 6))
			head -c $((RANDOM * 10)) /dev/urandom >"files/$name"
			out=$(dd if="files/$name" of="mnt/$name" bs=64k conv=fsync status=none 2>&1) ||
				bad "file: $out"
			((RANDOM % 4)) || out=$(fstrim mnt 2>&1) || bad "fstrim: $out"
		done
		out=$(umount mnt 2>&1) || bad "umount: $out"
	elif [[ $out && $out != *busy* ]]; then
		bad "mount: $out"
	fi
	detach_it
}

detacher() {
	nap 1000
	some
	case $((RANDOM % 8)) in
	0) tool detach 456 detach --all ;;
	1) tool deferred 456 detach --deferred --all ;;
	2 | 3) tool deferred 456 detach -d "$n" ;;
	4 | 5) tool detach 456 detach "$dev" ;;
	6 | 7)
		# device-churn locks nothing, and qcowctl repairs what is dirty and not locked.
		n=$((3 + RANDOM % 2))
		timeout -s KILL "0.0$((RANDOM % 10))" "$QCOWCTL" attach -n "$n" "$WORK/$n.qcow2"
		timeout -s KILL "0.0$((RANDOM % 10))" "$QCOWCTL" detach "$n"
		tally killed
		;;
	esac >/dev/null 2>&1
}
unloader() {
	nap 800
	if ((RANDOM % 3 == 0)); then
		tool detach 456 detach --all
	fi
	rmmod qcow 2>/dev/null || return
	tally unload
	nap 200
	insmod "$QCOW_KO" || bad "insmod"
}
hotplugger() {
	nap 1000
	echo 0 >"$cpu" && tally offline
	nap 500
	echo 1 >"$cpu" || bad "CPU 1 stays off"
}
scanner() {
	some
	((RANDOM % 2)) || n=3 dev=/dev/qcow3
	nap 400
	case $((RANDOM % 4)) in
	0 | 1) blockdev --rereadpt "$dev" && tally reread ;;
	2) partx -u "$dev" && tally partx ;;
	3)
		partx -d "$dev"
		partx -a "$dev"
		;;
	esac 2>/dev/null
}
# What it says may be out of date before it is printed; what it has is not.
looker() {
	nap 300
	some
	case $((RANDOM % 6)) in
	0) tool list 6 list -o +openers,allocated >/dev/null ;;
	1) tool list 6 list --json >/dev/null ;;
	2) tool info 56 info "$dev" ;;
	3 | 4) tool check 456 check "$dev" ;;
	5)
		udevadm trigger --action=change --subsystem-match=block --sysname-match='qcow*'
		((RANDOM % 4)) || udevadm settle -t 20
		tally udev
		;;
	esac
}
reader() {
	cat /sys/block/qcow*/{stat,inflight,size,queue/*,qcow/*} >/dev/null 2>&1
	tally sysfs
	nap 400
}
# process NAME FUNCTION [ARGUMENT]: does that again and again
PIDS=()
process() {
	local me=$1 gen=1 key
	shift

	RANDOM=$(((seed + ${#PIDS[@]} * 101) % 32768))
	while running; do
		"$@"
	done >/dev/null
	for key in "${!tallies[@]}"; do
		echo "$key ${tallies[$key]}"
	done >"tally.$me"
}
begin() {
	process "$@" &
	PIDS+=($!)
}

end=$((SECONDS + seconds))
device-churn "$seconds" "$seed" $N 0.qcow2 1.qcow2 2.qcow2 >tally.churn 2>churn.err &
churn=$!
PIDS+=("$churn")
begin partitions partition_owner
begin files file_owner
for name in detacher unloader hotplugger scanner looker reader; do
	begin $name $name
done
# Each ends by itself, unless it is stuck.
stuck=
while ((SECONDS < end + 300)); do
	stuck=
	for pid in "${PIDS[@]}"; do
		! kill -0 "$pid" 2>/dev/null || stuck+=" $pid"
	done
	[[ $stuck ]] || break
	sleep 0.2
done
if ! is "all processes end" "$stuck" ""; then
	diag "$(ps -N --ppid 2 -o pid,ppid,stat,wchan:30,args)"
	echo w >/proc/sysrq-trigger
	diag "$(dmesg | tail -n 200)"
	exit 1
fi
wait "$churn"
is "device-churn finds what it wrote, and no call fails that may not" $? 0 || diag "$(<churn.err)"
wait
diag "$(cat tally.* | awk '{ n[$1] += $2 } END { for (k in n) print k, n[k] }' | sort | xargs)"
is "nothing went wrong that may not" "$(cat bad 2>/dev/null)" ""
is "none of them fell over" "$(compgen -G 'tally.*' | wc -l)" "${#PIDS[@]}"
for key in attach detach deferred open read write freeze rescan status sysfs offline; do
	ok "$key: that was done" grep -q "^$key [1-9]" tally.*
done
is "CPU 1 is on" "$(<$cpu)" 1

# It all comes down.
for ((i = 0; i < 100; i++)); do
	[[ $(compgen -G '/sys/block/qcow*') ]] || break
	"$QCOWCTL" detach --all
	sleep 0.1
done
is "all devices go" "$(compgen -G '/sys/block/qcow*')" ""
udevadm settle
for ((n = 0; n < N; n++)); do
	check_clean $n.qcow2
	((n == 4)) || same $n.qcow2.raw raw $n.qcow2 qcow2
done
attach --read-only "$WORK/4.qcow2"
e2fsck -fn "$DEV" >"$WORK/.out" 2>&1
is "fsck" $? 0
mount -o ro "$DEV" mnt
for name in files/*; do
	[[ -e $name ]] || break
	ok "${name##*/} has what was written last" cmp "$name" "mnt/${name##*/}"
done
umount mnt
detach
ok "the module unloads" rmmod qcow
insmod "$QCOW_KO"

no_kernel_report
done_testing
