#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# A write that would hit metadata is stopped before it does, the corrupt bit is set, and reads go on.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

SIZE=1G

# Header 0, refcount table 0x10000, block 0x20000, L1 0x30000, L2 0x40000, data
# 0x50000 to 0x5ffff and 0x60000 to 0x6ffff.
make_good() {
	rm -f good.qcow2 &&
		qemu-img create -q -f qcow2 "$@" good.qcow2 "$SIZE" &&
		qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' \
			-c 'write -q -P 0x42 64k 64k' good.qcow2
}

# What udev is told, of one device
uevents() {
	udevadm monitor --kernel --property --subsystem-match=block >"$WORK/uevents" &
	monitor=$!
	sleep 1
}

# tables IMAGE: a sum of all but the feature bits, which an attach may change
tables() {
	{
		head -c 72 "$1"
		head -c $((0x50000)) "$1" | tail -c +97
	} | sha256sum
}

# stopped DESC SAYS COMMAND OFFSET HEX [OFFSET HEX]...: the xfs_io command on a
# device with such damage changes no table, and SAYS is what is told of it.
stopped() {
	local desc=$1 says=$2 command=$3 before number

	shift 3
	cp good.qcow2 bad.qcow2
	while (($#)); do
		put_bytes bad.qcow2 "$1" "$2"
		shift 2
	done
	before=$(tables bad.qcow2)
	if ! try_attach "$PWD/bad.qcow2"; then
		fail "$desc"
		diag "$(<"$WORK/.err")"
		return
	fi
	number=${DEV#/dev/}
	xfs_io -d -c "$command" -c fsync "$DEV" >"$WORK/.out" 2>&1
	# The bit is set by a worker.
	udevadm settle
	sleep 0.2
	like "$desc: sysfs says it" "$(<"/sys/block/$number/qcow/damage")" "$says"
	is "$desc: what is sound is still read" \
		"$(dd if="$DEV" bs=64k skip=1 count=1 iflag=direct status=none |
			tr -d B | wc -c)" 0
	not_ok "$desc: no more writes" \
		xfs_io -d -c 'pwrite -q 64k 4k' -c fsync "$DEV"
	like "$desc: the list says it" "$(qcowctl list)" corrupt
	like "$desc: info says what" "$(qcowctl info "$DEV")" "damage .*$says"
	like "$desc: so does the log" "$(dmesg | tail -n 40)" "the image is damaged: .*$says"
	try_detach || :
	is "$desc: no table has changed" "$(tables bad.qcow2)" "$before"
}

make_good
l2=$((0x40000)) counts=$((0x20000))
w='pwrite -q 0 64k'
stopped "data at the refcount table" 'refcount table at' "$w" $l2 8000000000010000
stopped "data at a refcount block" 'refcount block at' "$w" $l2 8000000000020000
stopped "data at the L1 table" 'L1 table at' "$w" $l2 8000000000030000
stopped "data at an L2 table" 'L2 table at' "$w" $l2 8000000000040000
stopped "space set aside at an L2 table" 'L2 table at' 'pwrite -q 0 4k' $l2 8000000000040001
stopped "zeroes at an L2 table" 'L2 table at' 'pwrite -q 0 512' $l2 8000000000040000
stopped "new cluster at the header" 'header' 'pwrite -q 8M 64k' $counts 0000
stopped "new cluster at the refcount table" 'refcount table at' 'pwrite -q 8M 64k' $((counts + 2)) 0000
stopped "new cluster at a refcount block" 'refcount block at' 'pwrite -q 8M 64k' $((counts + 4)) 0000
stopped "new cluster at the L1 table" 'L1 table at' 'pwrite -q 8M 64k' $((counts + 6)) 0000
stopped "new cluster at an L2 table" 'L2 table at' 'pwrite -q 8M 64k' $((counts + 8)) 0000
stopped "L2 table at the refcount table" 'L2 table at .* lies on top of refcount table' 'pwrite -q 600M 64k' $((0x30008)) 8000000000010000

stopped "L2 table to be copied at the refcount table" 'L2 table at .* lies on top of refcount table' \
	'pwrite -q 600M 64k' $((0x30008)) 0000000000010000
stopped "L2 table to be copied at the L1 table" 'L2 table at .* lies on top of L1 table' \
	'pwrite -q 600M 64k' $((0x30008)) 0000000000030000

# A guest's data would be believed to be a table there. Not in the part of the disk where
# udev looks.
SIZE=2G make_good
stopped "new cluster behind the end, at an L2 table" 'L2 table at' 'pwrite -q 8M 64k' \
	$((0x30008)) 8000000000070000
make_good
# Counts without end would take as little space as one block of them.
cp good.qcow2 bad.qcow2
put_bytes bad.qcow2 $((0x10008)) 0000000000020000
not_ok "two entries that lead to one refcount block" try_attach "$PWD/bad.qcow2"
like "that is said" "$(<"$WORK/.err")" 'two entries of its refcount table lead to the same'
ok "it is attached for reading" try_attach --read-only "$PWD/bad.qcow2"
detach

# Behind the end of the file there is nothing, however long the driver makes it: what
# it cuts off again at detach does not count.
stopped "an L2 table behind the end, read" 'L2 table for .* behind the end of the file' \
	'pread -q 600M 64k' $((0x30008)) 8000000000200000
cp good.qcow2 bad.qcow2
put_bytes bad.qcow2 $((l2 + 8 * 100)) 8000000000100000
attach "$PWD/bad.qcow2"
ok "a write that makes the file longer" xfs_io -d -c 'pwrite -q 8M 64k' -c fsync "$DEV"
ok "so that it has the place" test "$(stat -c %s bad.qcow2)" -gt $((0x110000))
not_ok "behind the end there is nothing all the same" \
	xfs_io -d -c 'pwrite -q 6400k 4k' "$DEV"
like "and that is damage" "$(<"/sys/block/${DEV#/dev/}/qcow/damage")" \
	'behind the end of the file'
try_detach || :

# What only some images have
word() {
	echo $((0x$(od -An -v -tx1 -j "$2" -N 8 "$1" | tr -d ' \n')))
}
entry_to() {
	printf '%016x' $((1 << 63 | $1))
}
make_good
qemu-img bitmap --add good.qcow2 map
qemu-img snapshot -c one good.qcow2
# Not shared any more
qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' good.qcow2
extension=$(grep -obaUP '\x23\x85\x28\x75' good.qcow2 | head -n 1 | cut -d : -f 1)
snapshots=$(word good.qcow2 64)
l2=$(($(word good.qcow2 $((0x30000))) & 0xfffffffffffe00))
stopped "data at the snapshot table" 'snapshot table at' "$w" $l2 "$(entry_to "$snapshots")"
stopped "data at a snapshot's L1 table" "snapshot's L1 table at" "$w" \
	$l2 "$(entry_to "$(word good.qcow2 "$snapshots")")"
stopped "data at the bitmap directory" 'bitmap directory at' "$w" \
	$l2 "$(entry_to "$(word good.qcow2 $((extension + 24)))")"
make_good
l2=$((0x40000))

# A table to which two entries lead, of which one lets it be copied, is not freed.
cp good.qcow2 bad.qcow2
put_bytes bad.qcow2 $((0x30008)) 0000000000040000
attach "$PWD/bad.qcow2"
xfs_io -d -c 'pwrite -q 600M 64k' -c fsync "$DEV"
sleep 1
like "a table of two: sysfs says it" \
	"$(<"/sys/block/${DEV#/dev/}/qcow/damage")" 'L2 table at'
try_detach || :
is "a table of two: it is counted" "$(od -An -tx1 -j $((counts + 8)) -N 2 bad.qcow2)" " 00 01"

# What is freed is not emptied.
cp good.qcow2 bad.qcow2
put_bytes bad.qcow2 $l2 8000000000030000
attach "$PWD/bad.qcow2"
blkdiscard -o 0 -l 64k "$DEV"
sync "$DEV"
sleep 1
like "a discard of a table: sysfs says it" \
	"$(<"/sys/block/${DEV#/dev/}/qcow/damage")" 'L1 table at'
try_detach || :
ok "a discard of a table: it is there" \
	cmp <(tail -c +$((0x30001)) good.qcow2 | head -c 65536) \
	<(tail -c +$((0x30001)) bad.qcow2 | head -c 65536)

# The corrupt bit is in the header, and udev was told.
cp good.qcow2 bad.qcow2
put_bytes bad.qcow2 $l2 8000000000030000
attach "$PWD/bad.qcow2"
uevents
xfs_io -d -c 'pwrite -q 0 4k' "$DEV" >/dev/null 2>&1
sleep 1
kill "$monitor"
like "a uevent says it" "$(<"$WORK/uevents")" QCOW_CORRUPT=1
like "and what it was" "$(<"$WORK/uevents")" 'QCOW_DAMAGE=.*would have hit the'
detach
like "QEMU sees the corrupt bit" "$(qemu-img info bad.qcow2)" 'corrupt: true'
not_ok "it is not attached for writing again" try_attach "$PWD/bad.qcow2"
like "it says what to do" "$(<"$WORK/.err")" 'qcowctl check --repair'
ok "it is attached for reading" try_attach --read-only "$PWD/bad.qcow2"
detach

no_kernel_report
done_testing
