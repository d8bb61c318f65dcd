#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Requests are held at the worst moment, others do what would do harm then, and they go on: each interleaving that the design says is safe.
# kernels: 6.1+ debug
# quick: 6.1+
# timeout: 600

# These are the races that other implementations have lost, one by one and the same
# in each run. races.t has all of them, and those that nobody thought of, by chance.
# QCOW_CASES, names of functions below that have cases, is for running those only.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
POINTS=/sys/kernel/debug/qcow
[[ -e $POINTS/hold-read ]] || skip_all "the module has no points to hold requests"
cd "$WORK" || exit
xfs_io -f -c 'pwrite -q -S 0x31 0 1M' base.raw
# For read to time out on: sleep would be a program to start.
mkfifo .nap
exec {NAP}<>.nap

CASE=
PIDS=()
# The image, the size of the disk, and options of attach
IMAGE=image.qcow2
SIZE=1M
HOW=()
BACKED=backing_file=base.raw,backing_fmt=raw

release_all() {
	local point

	for point in "$POINTS"/hold-*; do
		echo 0 >"$point"
	done
}

# udev would look at the device each time that it was written, and be held.
let_go() {
	local status=$?

	release_all
	udevadm control --start-exec-queue
	return "$status"
}
trap 'let_go; cleanup' EXIT
udevadm settle
udevadm control --stop-exec-queue

nap() {
	read -rt "$1" -u "$NAP"
}

# hold POINT: who comes there next is held
hold() {
	echo 1 >"$POINTS/hold-$1"
}

# release POINT: and goes on
release() {
	echo 0 >"$POINTS/hold-$1"
}

# held POINT: until somebody is
held() {
	local i state

	for ((i = 0; i < 3000; i++)); do
		read -r state <"$POINTS/hold-$1"
		((state != 2)) || return 0
		nap 0.05
	done
	release_all
	fail "$CASE: somebody comes to $1"
}

attribute() {
	local value

	read -r value <"/sys/block/${DEV#/dev/}/qcow/$1"
	echo "$value"
}

# request write BYTE OFFSET LENGTH, read OFFSET LENGTH [FILE], discard OFFSET LENGTH,
# zero OFFSET LENGTH, flush, detach: one, until it is complete
request() {
	case $1 in
	write) xfs_io -d -c "pwrite -q -b $4 -S 0x$2 $3 $4" "$DEV" ;;
	# dd would seek first, for which a discard must be over.
	read) disk-runs "$DEV" "$2" "$3" >"${4:-got}" ;;
	# -f: it would look for a file system.
	discard) blkdiscard -f -o "$2" -l "$3" "$DEV" ;;
	zero) blkdiscard -f -z -o "$2" -l "$3" "$DEV" ;;
	flush) xfs_io -c fsync "$DEV" ;;
	detach) "$QCOWCTL" detach "$DEV" ;;
	esac
}

# begin REQUEST: in the background
begin() {
	request "$@" >>.requests 2>&1 &
	PIDS+=($!)
}

# waits REQUEST: begin it; it has to wait for the one that is held
waits() {
	local counter=${1}s before i

	[[ $1 != zero ]] || counter=zeroes
	# The block layer lets one flush through at a time.
	if [[ $1 == flush || $1 == detach ]]; then
		begin "$@"
		nap 0.5
	else
		before=$(attribute "$counter")
		begin "$@"
		for ((i = 0; i < 600 && $(attribute "$counter") == before; i++)); do
			nap 0.05
		done
	fi
	nap 0.3
	ok "$CASE: $* waits" kill -0 "${PIDS[-1]}"
}

# passes REQUEST: it does not, and succeeds
passes() {
	local i

	begin "$@"
	for ((i = 0; i < 3000; i++)); do
		if ! kill -0 "${PIDS[-1]}" 2>/dev/null; then
			wait "${PIDS[-1]}" || fail "$CASE: $*: $(<.requests)"
			unset 'PIDS[-1]'
			return
		fi
		nap 0.02
	done
	release_all
	fail "$CASE: $* does not wait"
}

# finish: all that was begun is complete, and has succeeded
finish() {
	local pid

	for pid in "${PIDS[@]}"; do
		wait "$pid" || fail "$CASE: a request fails: $(<.requests)"
	done
	PIDS=()
}

# reads WANT OFFSET LENGTH: at once, and that is what the guest sees
reads() {
	passes read "$2" "$3" seen
	like "$CASE: meanwhile $2 $3 reads as $1" "$(<seen)" "^($1)\$"
}

# place: what the file has where QEMU put cluster 0, if clusters have 64k
place() {
	dd if=image.qcow2 of=place.raw bs=64k count=1 skip=5 iflag=direct status=none
	disk-runs place.raw
}

freed() {
	attribute clusters_freed
}

# not_freed BEFORE: no cluster is given back
not_freed() {
	nap 0.3
	is "$CASE: nothing is freed meanwhile" "$(freed)" "$1"
}

# is_freed BEFORE: one is, now or soon
is_freed() {
	local i

	for ((i = 0; i < 3000; i++)); do
		(($(freed) == $1)) || break
		nap 0.05
	done
	ok "$CASE: it is freed afterwards" test "$(freed)" -gt "$1"
}

# crash WANT: were this moment the last one, the image would be consistent, and show that
crash() {
	cp image.qcow2 crash.qcow2
	ok "$CASE: a power cut here leaves leaks at most" is_consistent crash.qcow2
	qemu-img convert -f qcow2 -O raw crash.qcow2 crash.raw
	like "$CASE: and what was to be expected" "$(disk-runs crash.raw)" "^($1)\$"
}

# race CASE OPTIONS [COMMAND]...: a new image, which qemu-io has prepared; with `snapshot`
# as the last command, it has one
race() {
	local command commands=()

	CASE=$1${HOW:+, ${HOW[*]}}
	rm -f image.qcow2*
	qemu-img create -q -f qcow2 -o "$2" "$IMAGE" "$SIZE"
	for command in "${@:3}"; do
		[[ $command != snapshot ]] || continue
		commands+=(-c "$command")
	done
	((!${#commands[@]})) || qemu-io -f qcow2 "${commands[@]}" "$IMAGE"
	[[ ${*: -1} != snapshot ]] || qemu-img snapshot -c one image.qcow2
	attach "${HOW[@]}" "$IMAGE"
}

read_all() {
	dd if="$DEV" of=mirror.raw bs="$SIZE" count=1 iflag=direct status=none
}

# after WANT: this is what read_all has read, before the detach, and QEMU reads it too
after() {
	like "$CASE: all is as it should be" "$(disk-runs mirror.raw)" "^($1)\$"
	check_clean "$IMAGE" "$CASE"
	same mirror.raw raw "$IMAGE" qcow2 "$CASE"
}

# over WANT: that with a detach
over() {
	read_all
	detach
	after "$1"
}

# snapshot_is WANT: the snapshot has not changed
snapshot_is() {
	qemu-img convert -f qcow2 -l snapshot.name=one -O raw image.qcow2 snapshot.raw
	is "$CASE: the snapshot is as it was" "$(disk-runs snapshot.raw)" "$1"
}

# --- A cluster is discarded, and others take what is free, while it is in use

# in_flight CASE POINT OPTIONS PREPARE CLEAR HOW WANT REQUEST: the request to cluster 0 is
# held at POINT. The cluster is cleared (by a discard or zero), which passes or waits, and
# others are written. WANT is what cluster 0 has in the end.
in_flight() {
	local before was frees=1

	race "$1" "$3" 'write -q -P 0x41 0 64k' ${4:+"$4"}
	[[ $5 == discard && ${HOW[*]} != *keep* && $3 != *data_file* ]] || frees=0
	before=$(freed)
	was=$(place)
	hold "$2"
	begin "${@:8}"
	held "$2"
	"$6" "$5" 0 64k
	passes flush
	((!frees)) || not_freed "$before"
	passes write 61 64k 192k
	reads 61:192k 64k 192k
	((!frees)) || is "$CASE: its place is left alone" "$(place)" "$was"
	release "$2"
	finish
	if ((frees)); then
		passes flush
		is_freed "$before"
	fi
	passes write 71 256k 64k
	((!frees)) || is "$CASE: and taken after that" "$(place)" 71:64k
	over "$7 61:192k 71:64k 00:704k"
}

in_use() {
	local how

	for how in '' --no-inline; do
		HOW=(${how:+"$how"})
		in_flight "a read in flight" read cluster_size=64k '' \
			discard passes 00:64k read 0 64k
		is "$CASE: it does not see another's data" "$(<got)" 41:64k
		in_flight "a write in place" overwrite cluster_size=64k '' \
			discard passes '(00|51):64k' write 51 0 64k
	done
	HOW=(--discard=keep)
	in_flight "a write in place" overwrite cluster_size=64k '' \
		discard waits '(00|51):64k' write 51 0 64k
	HOW=()
	in_flight "a write in place to what is zeroed" overwrite cluster_size=64k '' \
		zero waits '(00|51):64k' write 51 0 64k
	in_flight "a write in place to a data file" overwrite \
		cluster_size=64k,data_file=image.qcow2.data '' \
		discard waits '(00|51):64k' write 51 0 64k
	in_flight "a write to a zero cluster that has a place" allocate cluster_size=64k \
		'write -q -z 0 64k' discard waits 00:64k write 51 0 64k
	in_flight "a write to a new subcluster" allocate cluster_size=64k,extended_l2=on \
		'write -q -z 32k 32k' discard waits 00:64k write 51 32k 32k
}

# --- What is freed is not given out before it is punched, and its count is lowered

freed_and() {
	local point before

	for point in reclaim punch count-drop; do
		race "freed, and held at $point" cluster_size=64k 'write -q -P 0x41 0 64k'
		before=$(freed)
		hold "$point"
		passes discard 0 64k
		passes flush
		held "$point"
		passes write 61 64k 192k
		passes write 52 0 64k
		passes flush
		is "$CASE: it is not free" "$(freed)" "$before"
		release "$point"
		is_freed "$before"
		passes write 71 256k 64k
		is "$CASE: the next one takes its place" "$(place)" 71:64k
		over '52:64k 61:192k 71:64k 00:704k'
	done

	race "freed, and a detach" cluster_size=64k 'write -q -P 0x41 0 64k'
	hold reclaim
	passes discard 0 64k
	passes flush
	held reclaim
	read_all
	waits detach
	release reclaim
	finish
	forget "$DEV"
	after 00:1024k

	# With room for a header, refcounts, L1, one L2 table, and eleven clusters of data
	truncate -s 1M small.img
	new_loop small.img
	IMAGE=$LOOP
	race "freed, and no other space" cluster_size=64k 'write -q -P 0x41 0 704k'
	hold reclaim
	passes discard 0 64k
	passes flush
	held reclaim
	waits write 61 704k 64k
	reads 41:64k 640k 64k
	release reclaim
	finish
	over '00:64k 41:640k 61:64k 00:256k'
	IMAGE=image.qcow2
}

# --- Two that allocate in the same cluster

# both CASE OPTIONS PREPARE SEEN FIRST SECOND WANT: the first write is held when it has
# its cluster, so the second one waits; others do not. SEEN is what cluster 0 shows
# meanwhile. Writes are BYTE OFFSET LENGTH.
both() {
	local first second

	read -ra first <<<"$5"
	read -ra second <<<"$6"
	race "$1" "$2" ${3:+"$3"}
	hold allocate
	begin write "${first[@]}"
	held allocate
	reads "$4" 0 64k
	waits write "${second[@]}"
	passes write 71 64k 4k
	passes flush
	crash "$4 71:4k .*"
	release allocate
	finish
	over "$7 71:4k .*"
}

allocating() {
	both "two parts of a cluster" cluster_size=64k '' 00:64k \
		'51 0 4k' '52 4k 4k' '51:4k 52:4k 00:56k'
	both "two parts of a cluster, the last one first" "cluster_size=64k,$BACKED" '' \
		31:64k '51 60k 4k' '52 0 4k' '52:4k 31:56k 51:4k'
	both "two parts of a subcluster" "cluster_size=64k,extended_l2=on,$BACKED" '' 31:64k \
		'51 0 512' '52 1k 1k' '51:512 31:512 52:1k 31:62k'
	both "two subclusters" cluster_size=64k,extended_l2=on '' 00:64k \
		'51 4k 1k' '52 0 2k' '52:2k 00:2k 51:1k 00:59k'
	both "two parts of a compressed cluster" cluster_size=64k \
		'write -q -c -P 0x41 0 64k' 41:64k \
		'51 8k 4k' '52 0 4k' '52:4k 41:4k 51:4k 41:52k'

	race "a new subcluster beside one that is written" \
		cluster_size=64k,extended_l2=on 'write -q -P 0x41 0 2k'
	hold allocate
	begin write 51 1k 2k
	held allocate
	passes write 52 0 1k
	release allocate
	finish
	over '52:1k 51:2k 00:1021k'
}

# --- Copy on write, and who reads what is copied

# copied CASE OPTIONS OLD WRITE WANT COMMAND...: a write is held when it has its copy
copied() {
	local write

	read -ra write <<<"$4"
	race "$1" "$2" "${@:6}"
	hold allocate
	begin write "${write[@]}"
	held allocate
	reads "$3:1024k" 0 1M
	passes flush
	crash "$3:1024k"
	release allocate
	finish
	over "$5"
}

copies() {
	copied "a copy from the backing file" "cluster_size=64k,$BACKED" 31 \
		'51 20k 4k' '31:20k 51:4k 31:1000k'
	copied "a long copy from the backing file" "cluster_size=1M,$BACKED" 31 \
		'51 400k 200k' '31:400k 51:200k 31:424k'
	is "the backing file is as it was" "$(disk-runs base.raw)" 31:1024k
	copied "a copy from what a snapshot has" cluster_size=64k 41 \
		'51 20k 4k' '41:20k 51:4k 41:1000k' 'write -q -P 0x41 0 1M' snapshot
	snapshot_is 41:1024k
}

# --- Tables are copied, read and evicted

tables() {
	# A table of 1k is for 128k.
	race "a copy of a table that a snapshot has" cluster_size=1k \
		'write -q -P 0x41 0 1M' snapshot
	hold table-made
	begin write 51 0 4k
	held table-made
	reads 41:64k 0 64k
	waits write 52 64k 4k
	passes flush
	crash 41:1024k
	release table-made
	finish
	over '51:4k 41:60k 52:4k 41:956k'
	snapshot_is 41:1024k

	# A table of 512 bytes is for 32k, so with this cache they come and go.
	SIZE=4M
	HOW=(--cache-size=64K)
	race "a table that is read" cluster_size=512 'write -q -P 0x41 0 1M' \
		'write -q -P 0x41 2M 1M'
	hold table-read
	begin write 51 513k 512
	held table-read
	waits write 52 514k 512
	waits read 513k 512
	ok "$CASE: others are read and written meanwhile" xfs_io -d \
		-c 'pwrite -q -b 64k -S 0x61 1M 1M' -c 'pread -q -b 64k 2M 2M' \
		-c 'pwrite -q -b 64k -S 0x62 3M 1M' -c fsync -c 'pread -q -b 64k 1M 1M' "$DEV"
	release table-read
	finish
	like "$CASE: who waited reads what is there" "$(<got)" '^(41|51):512$'
	over '41:513k 51:512 41:512 52:512 41:521728 61:1024k 41:1024k 62:1024k'
	HOW=()
	SIZE=1M
}

# --- Refcounts grow

refcounts() {
	SIZE=4M
	# A block of 512 bytes is for 32k, a table of 512 bytes for 2M.
	race "a new refcount block" cluster_size=512,refcount_bits=64 \
		'write -q -P 0x41 3M 64k'
	hold refblock-made
	begin write 51 0 256k
	held refblock-made
	waits write 52 512k 64k
	passes write 42 3M 64k
	passes flush
	crash '.* 42:64k 00:960k'
	release refblock-made
	finish
	over '51:256k 00:256k 52:64k 00:2496k 42:64k 00:960k'

	race "a longer refcount table" cluster_size=512,refcount_bits=64 \
		'write -q -P 0x41 2M 1800k'
	hold reftable-made
	begin write 51 0 256k
	held reftable-made
	waits write 52 512k 64k
	passes write 42 2M 64k
	reads 42:64k 2M 64k
	waits flush
	crash '.* 42:64k 41:1736k 00:248k'
	release reftable-made
	finish
	over '51:256k 00:256k 52:64k 00:1472k 42:64k 41:1736k 00:248k'
	SIZE=1M
}

# --- A flush, and what is written after it has begun

flushes() {
	local point before

	for point in commit-counts commit-links; do
		race "a flush, held at $point" cluster_size=64k 'write -q -P 0x41 0 192k'
		before=$(freed)
		hold "$point"
		passes write 51 192k 64k
		begin flush
		held "$point"
		passes discard 0 64k
		passes write 52 64k 64k
		passes write 61 256k 4k
		reads '00:64k 52:64k 41:64k 51:64k 61:4k' 0 260k
		not_freed "$before"
		waits flush
		crash '41:64k 52:64k 41:64k 00:832k'
		release "$point"
		finish
		is_freed "$before"
		crash '00:64k 52:64k 41:64k 51:64k 61:4k 00:764k'
		over '00:64k 52:64k 41:64k 51:64k 61:4k 00:764k'
	done

	# What was discarded after the flush had begun is not free when that is over.
	race "a flush, and a discard that it does not have" cluster_size=64k \
		'write -q -P 0x41 0 64k'
	hold commit-links
	passes write 51 64k 64k
	begin flush
	held commit-links
	passes discard 0 64k
	release commit-links
	finish
	nap 0.3
	passes write 61 128k 128k
	crash '(41|00):64k 51:64k (61:128k 00:768k|00:896k)'
	over '00:64k 51:64k 61:128k 00:768k'
}

# --- Compressed data that is read, and discarded or written

# Attach has the first one decompressed, as it looks for partitions.
compressed() {
	local before how

	for how in 'discard 64k 64k' 'write 51 64k 64k'; do
		race "a compressed cluster, and $how" cluster_size=64k \
			'write -q -c -P 0x41 64k 64k'
		before=$(freed)
		hold unpack
		begin read 64k 64k
		held unpack
		# shellcheck disable=SC2086
		passes $how
		passes flush
		not_freed "$before"
		passes write 61 128k 192k
		release unpack
		finish
		is "$CASE: who reads it sees it" "$(<got)" 41:64k
		is_freed "$before"
		over '(00:128k|00:64k 51:64k) 61:192k 00:704k'
	done

	race "a compressed cluster, and a part of it" cluster_size=64k \
		'write -q -c -P 0x41 64k 64k'
	hold unpack
	begin read 64k 4k
	held unpack
	waits write 51 68k 4k
	release unpack
	finish
	is "$CASE: who reads it sees it" "$(<got)" 41:4k
	over '00:64k 41:4k 51:4k 41:56k 00:896k'
}

# --- A discard that has changed the entry, and a write to the same cluster

cleared() {
	local how

	for how in keep unmap; do
		HOW=("--discard=$how")
		race "cleared" cluster_size=64k 'write -q -P 0x41 0 64k'
		hold cleared
		begin discard 0 64k
		held cleared
		reads 00:64k 0 64k
		waits write 51 4k 4k
		passes write 61 64k 64k
		passes flush
		release cleared
		finish
		over '00:4k 51:4k 00:56k 61:64k 00:896k'
	done
	HOW=()
}

# --- An L1 entry without COPIED, where it should be, and a write in place below it

without_flag() {
	local l1

	CASE="an L1 entry that lacks its flag"
	rm -f image.qcow2*
	qemu-img create -q -f qcow2 -o cluster_size=64k "$IMAGE" "$SIZE"
	qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' "$IMAGE"
	l1=$((0x$(od -An -v -tx1 -j 40 -N 8 "$IMAGE" | tr -d ' ')))
	is "$CASE: it had it" "$(od -An -v -tx1 -j "$l1" -N 1 "$IMAGE")" " 80"
	put_bytes "$IMAGE" "$l1" 00
	attach "$IMAGE"
	hold overwrite
	begin write 51 0 4k
	held overwrite
	# This needs the table for itself.
	passes write 61 512k 4k
	passes write 71 8k 4k
	release overwrite
	finish
	over '51:4k 41:4k 71:4k 41:52k 00:448k 61:4k 00:508k'
}

for part in ${QCOW_CASES:-in_use freed_and allocating copies tables refcounts flushes
	compressed cleared without_flag}; do
	"$part"
done
no_kernel_report
done_testing
