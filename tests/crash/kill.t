#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The machine is killed while databases on ext4 and XFS are at work: no transaction that was acknowledged is lost.
# runs-on: host
# timeout: 900

# A guest has two images on disks that outlive it, with a file system on each, and two
# SQLite databases on each of these, with a journal and with a write-ahead log. Its QEMU
# is killed at some instant; the next guest finds what is there, and goes on.
#
# What the guest had given to its disks stays in the page cache of this machine. So with
# direct I/O this shows that writes are given to the disk before they are acknowledged,
# not that they are flushed there; that is for replay.t. With buffered I/O, which every
# other guest uses, what was not flushed is in the memory of the guest, and is lost but
# for what writeback has happened to write.
#
# QCOW_KILLS=N kills (2), QCOW_SEED=N others, QCOW_KERNEL=NAME another kernel, QCOW_SOAK=1
# many, with another seed each time.

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/../functional/common.sh"

tree=$(cd "$(dirname "$0")/../.." && pwd)
kernel=${QCOW_KERNEL:-6.1}
kills=${QCOW_KILLS:-2} seed=${QCOW_SEED:-1}
if [[ ${QCOW_SOAK-} ]]; then
	kills=${QCOW_KILLS:-100} seed=${QCOW_SEED:-$SRANDOM}
fi
diag "seed $seed"
RANDOM=$((seed % 32768))
cd "$WORK" || exit

names=(ext4 xfs)
KINDS=(
	'cluster_size=64k'
	'cluster_size=4k,lazy_refcounts=on'
	'cluster_size=64k,extended_l2=on'
	'cluster_size=16k'
	'cluster_size=64k,lazy_refcounts=on'
	'cluster_size=512,refcount_bits=64'
)

# The number of the last transaction of each database that was acknowledged
declare -A acked=()

make_images() {
	local name kind

	acked=()
	for name in "${names[@]}"; do
		kind=${KINDS[RANDOM % ${#KINDS[@]}]}
		diag "$name on $kind"
		rm -f "$name.raw"
		qemu-img create -q -f qcow2 -o "$kind" "$name.raw" 400M
		truncate -s 1G "$name.raw"
		acked[$name-wal]=0 acked[$name-truncate]=0
	done
}

# sound IMAGE: it has no error, or one that is allowed where it is marked dirty; then it
# is mended.
sound() {
	if (($(od -An -tu1 -j79 -N1 "$1") & 1)); then
		qemu-img check -q -f qcow2 -r all "$1" || return
	fi
	is_consistent "$1"
}

# guest MORE [OPTION]...: in the background; GUEST, with its output in out and err
guest() {
	local name disks=()

	for name in "${names[@]}"; do
		disks+=(-D "$WORK/$name.raw")
	done
	: >out
	setpriv --pdeathsig TERM "$tree/tests/guest/run" -k "$kernel" -c 2 -t 240 "${disks[@]}" \
		-- tests/crash/transactions "$@" -- "${names[@]}" >out 2>err &
	GUEST=$!
}

# The QEMU of GUEST
qemu_of_guest() {
	local child

	child=$(pgrep -P "$GUEST" -x timeout) && pgrep -P "$child"
}

# found WHAT: what the guest found when it began is what should be there
found() {
	local name key check last good rows sum

	for name in "${names[@]}"; do
		is "$1: fsck of $name finds nothing" "$(grep -a "^fsck $name" out)" ""
		for key in "$name-wal" "$name-truncate"; do
			read -r _ _ check last good rows sum <<<"$(grep -a "^found $key " out)"
			is "$1: $key: integrity_check" "$check" ok
			ok "$1: $key: ${last:-nothing} is there, ${acked[$key]} was acknowledged" \
				test "${last:--1}" -ge "${acked[$key]}" -a "${last:--1}" -le $((acked[$key] + 1))
			# Both it and all of its parts
			is "$1: $key: good rows, rows, difference of the sum" "$good $rows $sum" \
				"$((last < 20 ? last : 20)) $((last < 20 ? last : 20)) 0"
		done
	done
	is "$1: the kernel says nothing" "$(grep -a '^kernel: ' out)" ""
}

# run_round KILLS
run_round() {
	local kills=$1 n i name key how more=first wait last

	make_images
	for ((n = 1; n <= kills; n++)); do
		how=buffered
		((n % 2)) || how=direct
		guest $more --io=$how
		for ((i = 0; i < 2000; i++)); do
			if grep -qa '^working' out || ! kill -0 "$GUEST" 2>/dev/null; then
				break
			fi
			sleep 0.1
		done
		wait=$((RANDOM % 6000 + 500))
		sleep "$((wait / 1000)).$(printf %03d $((wait % 1000)))"
		kill -9 "$(qemu_of_guest)"
		wait "$GUEST" 2>/dev/null
		is "kill $n: the guest died of it, $wait ms after it began" $? 125
		if ! like "kill $n: not before" "$(grep -a working out)" working; then
			diag "$(tail -n 50 out err)"
			return
		fi
		not_ok "kill $n: the kernel had no complaint" grep 'the kernel .* reported' err
		is "kill $n: nothing had ended or failed" "$(grep -aE '^(ended|Error|Runtime)' out)" ""
		[[ $more == first ]] || found "after kill $((n - 1))"
		for key in "${!acked[@]}"; do
			last=$(grep -a "^ack $key " out | tail -n 1)
			acked[$key]=${last##* }
		done
		diag "kill $n, with $how I/O; acknowledged: $(for key in "${!acked[@]}"; do
			echo "$key ${acked[$key]}"; done | sort | xargs)"
		for name in "${names[@]}"; do
			ok "kill $n: the image of $name is sound" sound "$name.raw"
		done
		# From then on clusters are shared.
		((n > 1)) || ok "a snapshot" qemu-img snapshot -c one "${names[RANDOM % 2]}.raw"
		more=again
	done
	guest last
	wait "$GUEST"
	is "the last guest is fine" $? 0 || diag "$(tail -n 50 out err)"
	found "in the end"
	for name in "${names[@]}"; do
		ok "in the end: the image of $name is sound" is_consistent "$name.raw"
	done
}

# More kills than that, and there are new images.
for ((left = kills; left > 0; left -= 10)); do
	run_round $((left < 10 ? left : 10))
done
diag "${SECONDS} s"
done_testing
