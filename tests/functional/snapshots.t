#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# An internal snapshot is attached by ID or name, shows what it was taken of, and stays that way.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 450

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

# shows DESC IMAGE SNAPSHOT [RAW]: what qemu-img makes of the snapshot, or RAW
shows() {
	local raw=${4-}

	if [[ ! $raw ]]; then
		raw=want.raw
		qemu-img convert -f qcow2 -l "snapshot.name=$3" -O raw "$2" $raw
	fi
	if ! attach --snapshot="$3" "$2"; then
		return
	fi
	is "$1: the size" "$(blockdev --getsize64 "$DEV")" "$(stat -c %s "$raw")"
	is "$1: read-only" "$(blockdev --getro "$DEV")" 1
	ok "$1: the content" cmp "$raw" "$DEV"
	is "$1: sysfs" "$(</sys/block/"${DEV#/dev/}"/qcow/snapshot)" "$3"
	detach
}

# refused DESC CODE REGEX ARGUMENT...
refused() {
	local desc=$1 code=$2 regex=$3 status

	shift 3
	"$QCOWCTL" attach "$@" >/dev/null 2>"$WORK/.err"
	status=$?
	is "$desc: exit code" "$status" "$code"
	like "$desc: message" "$(<"$WORK/.err")" "$regex"
	is "$desc: one line" "$(wc -l <"$WORK/.err")" 1
}

# Three snapshots; the names of two are the IDs of others.
for options in compat=0.10 compat=1.1,cluster_size=512 \
	compat=1.1,cluster_size=16k,extended_l2=on; do
	rm -f snap.qcow2
	qemu-img create -q -f qcow2 -o "$options" snap.qcow2 2M
	qemu-io -f qcow2 -c 'write -q -P 1 0 300k' snap.qcow2
	qemu-img snapshot -c one snap.qcow2
	qemu-io -f qcow2 -c 'write -q -P 2 100k 1M' -c 'discard -q 0 64k' snap.qcow2
	qemu-img convert -f qcow2 -O raw snap.qcow2 second.raw
	qemu-img snapshot -c 3 snap.qcow2
	qemu-io -f qcow2 -c 'write -q -P 3 0 2M' snap.qcow2
	qemu-img convert -f qcow2 -O raw snap.qcow2 third.raw
	qemu-img snapshot -c 'a b' snap.qcow2
	shows "$options, by name" snap.qcow2 one
	shows "$options, by ID" snap.qcow2 2 second.raw
	shows "$options, an ID goes before a name" snap.qcow2 3 third.raw
	shows "$options, a name with a space" snap.qcow2 'a b'
done

for option in --read-only ''; do
	# shellcheck disable=SC2086 # an option, or none
	attach $option snap.qcow2
	is "info of a device lists them (${option:-writable})" \
		"$("$QCOWCTL" info --json "$DEV" | jq -c '.snapshots | map([.id, .name])')" \
		'[["1","one"],["2","3"],["3","a b"]]'
	like "with their dates (${option:-writable})" "$("$QCOWCTL" info "$DEV")" \
		"snapshots 0:
  id +1
  name +one
  date +20[0-9-]*T[0-9:]*Z"
	like "without qemu-img that is said (${option:-writable})" \
		"$(env PATH=/nonexistent "$(command -v "$QCOWCTL")" info --json "$DEV" 2>&1 >none)" \
		'^qcowctl: warning: .*snap.qcow2: qemu-img cannot say which snapshots and bitmaps it has; install qemu-utils$'
	is "and they are left out (${option:-writable})" "$(jq 'has("snapshots")' none)" false
	detach
done

refused "no such snapshot" 5 "no snapshot with the ID or the name 'four'" \
	--snapshot=four snap.qcow2
refused "no name" 2 "needs the ID or the name" --snapshot= snap.qcow2

# Snapshots of another size, and above a backing file
qemu-img create -q -f qcow2 size.qcow2 1M
qemu-io -f qcow2 -c 'write -q -P 4 512k 512k' size.qcow2
qemu-img convert -f qcow2 -O raw size.qcow2 small.raw
qemu-img snapshot -c small size.qcow2
qemu-img resize -q size.qcow2 70M
qemu-io -f qcow2 -c 'write -q -P 5 60M 64k' size.qcow2
qemu-img convert -f qcow2 -O raw size.qcow2 large.raw
qemu-img snapshot -c large size.qcow2
qemu-img resize -q --shrink size.qcow2 5M
# (Of these qemu-img shows as much as the disk has now.)
shows "smaller than the disk" size.qcow2 small small.raw
shows "larger than the disk" size.qcow2 large large.raw
qemu-img create -q -f qcow2 -b third.raw -F raw top.qcow2 3M
qemu-io -f qcow2 -c 'write -q -P 6 0 64k' top.qcow2
qemu-img snapshot -c above top.qcow2
qemu-img snapshot -c $'red\033[31m\302\233' top.qcow2
qemu-io -f qcow2 -c 'write -q -z 0 3M' top.qcow2
shows "above a backing file" top.qcow2 above
attach --read-only top.qcow2
is "control characters in a name are escaped" "$("$QCOWCTL" info "$DEV" | grep -o 'red.*')" \
	'red\033[31m\302\233'
detach

# Beside each other
attach --read-only size.qcow2
disk=$DEV
attach --snapshot small size.qcow2
small=$DEV
attach --snapshot small size.qcow2
again=$DEV
is "disk and snapshots beside each other" \
	"$(blockdev --getsize64 "$disk" "$small" "$again" | paste -sd' ')" \
	"5242880 1048576 1048576"
not_ok "not beside a writer" try_attach size.qcow2
for DEV in "$disk" "$small" "$again"; do
	detach
done

# The table may be anything.
table=$((0x$(od -An -tx8 --endian=big -j64 -N8 size.qcow2 | tr -d ' ')))
damaged() {
	cp size.qcow2 bad.qcow2
	put_bytes bad.qcow2 $((table + $2)) "$3"
	refused "$1" 3 "$4" --snapshot=small bad.qcow2
}
damaged "L1 table not aligned" 0 0000000000040001 'l1_table_offset is 262145'
damaged "L1 table at 2^63" 0 8000000000000000 'l1_table_offset is 9223372036854775808'
damaged "L1 table of 2^32-1 entries" 8 ffffffff 'l1_size is 4294967295'
damaged "L1 table too small" 8 00000000 'too small'
damaged "extra data of 2^32-1 bytes" 36 ffffffff 'extra data'
damaged "a disk of 2^64-1 bytes" 48 ffffffffffffffff 'too big'
cp size.qcow2 bad.qcow2
put_bytes bad.qcow2 60 00010000
refused "more entries than there are" 5 'no snapshot' --snapshot=x bad.qcow2

# A write to the disk, attached meanwhile, does not show.
attach size.qcow2
ok "the disk beside it" qcow-diff --quiet --seed 7 --ops 500 "$DEV"
detach
shows "after writes to the disk" size.qcow2 small small.raw
ok "the image is clean" is_clean size.qcow2

# The flag COPIED in a snapshot's tables means nothing, there or not.
word() {
	echo $((0x$(od -An -v -tx8 --endian=big -j "$2" -N 8 "$1" | tr -d ' ')))
}
# copied FILE OFFSET ENTRIES: turns the flag of each entry that has an offset
copied() {
	local i entry

	for ((i = 0; i < $3; i++)); do
		entry=$(word "$1" $(($2 + 8 * i)))
		if ((entry & 0xfffffffffffe00)); then
			put_bytes "$1" $(($2 + 8 * i)) "$(printf %016x $((entry ^ 1 << 63)))"
		fi
	done
}
qemu-img create -q -f qcow2 shared.qcow2 4M
qemu-io -f qcow2 -c 'write -q -P 1 0 1M' shared.qcow2
qemu-img snapshot -c old shared.qcow2
qemu-img convert -f qcow2 -O raw shared.qcow2 old.raw
attach shared.qcow2
# The tables are known before they are copied.
ok "the disk that shares all: read" dd if="$DEV" of=/dev/null bs=64k count=1 iflag=direct status=none
ok "the disk that shares all" qcow-diff --quiet --seed 9 --ops 300 --max-io 128k \
	--mirror-in old.raw --mirror-out mirror.raw "$DEV"
detach
check_clean shared.qcow2 "a snapshot that shares all"
same mirror.raw raw shared.qcow2 qcow2 "beside a snapshot that shares all"
shows "that shares all, after writes to the disk" shared.qcow2 old old.raw

qemu-img create -q -f qcow2 flags.qcow2 4M
qemu-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -z 512k 64k' flags.qcow2
qemu-img snapshot -c old flags.qcow2
qemu-img convert -f qcow2 -O raw flags.qcow2 old.raw
# Half of it is no longer shared, nor is the L2 table.
qemu-io -f qcow2 -c 'write -q -P 2 256k 512k' flags.qcow2
l1=$(word flags.qcow2 "$(word flags.qcow2 64)")
l2=$(($(word flags.qcow2 "$l1") & 0xfffffffffffe00))
copied flags.qcow2 "$l2" 64
copied flags.qcow2 "$l1" 1
qemu-img convert -f qcow2 -O raw flags.qcow2 now.raw
shows "with other flags" flags.qcow2 old old.raw
attach flags.qcow2
ok "the disk beside a snapshot with other flags" qcow-diff --quiet --seed 8 --ops 300 \
	--max-io 128k --mirror-in now.raw --mirror-out mirror.raw "$DEV"
detach
check_clean flags.qcow2 "a snapshot with other flags"
same mirror.raw raw flags.qcow2 qcow2 "beside a snapshot with other flags"
shows "with other flags, after writes to the disk" flags.qcow2 old old.raw
ok "QEMU goes back to it" qemu-img snapshot -a old flags.qcow2
same old.raw raw flags.qcow2 qcow2 "gone back"
check_clean flags.qcow2 "gone back"

no_kernel_report
done_testing
