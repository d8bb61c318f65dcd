#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# With an external data file each cluster is where the guest has it or not there at all, and the file is as long as the disk.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

# Header 0, refcount table 0x10000, block 0x20000, L1 0x30000, L2 0x40000; guest
# clusters 0 and 1 are in the data file.
L2=$((0x40000))
qemu-img create -q -f qcow2 -o data_file=data.raw good.qcow2 1M
qemu-io -f qcow2 -c 'write -q -P 0x41 0 64k' -c 'write -q -P 0x42 64k 64k' good.qcow2
cp data.raw good.raw

# entry HEX: the L2 entry of guest cluster 0
entry() {
	cp good.qcow2 x.qcow2
	cp good.raw data.raw
	put_bytes x.qcow2 $L2 "$1"
	attach "$PWD/x.qcow2"
}

# cluster N: what it reads as, each byte once
cluster() {
	dd if="$DEV" bs=64k skip="$1" count=1 iflag=direct status=none | od -An -v -tx1 -w1 |
		sort -u | tr -d ' \n'
}

entry 8000000000000000
is "offset 0 with the flag is guest cluster 0" "$(cluster 0)" 41
ok "which is written in place" xfs_io -d -c 'pwrite -q -S 0x51 0 4k' "$DEV"
detach
is "where it is" "$(od -An -tx1 -N 1 data.raw | tr -d ' ')" 51
check_clean x.qcow2 "written in place"

entry 0000000000000000
is "offset 0 without the flag is nothing, whatever the file has" "$(cluster 0)" 00
ok "and is written with what it shows" xfs_io -d -c 'pwrite -q -S 0x51 4k 4k' "$DEV"
is "around the data are zeroes" "$(cluster 0)" 0051
detach
is "also in the file" "$(od -An -tx1 -N 1 data.raw | tr -d ' ')" 00
check_clean x.qcow2 "written around"

entry 8000000000000001
is "a zero cluster is zero, whatever the file has" "$(cluster 0)" 00
detach

# Raw data is what the guest has, also where L2 says zero or nothing.
for bytes in 8000000000000001 0000000000000001 0000000000000000; do
	cp good.qcow2 x.qcow2
	cp good.raw data.raw
	put_bytes x.qcow2 88 0000000000000002
	put_bytes x.qcow2 $L2 $bytes
	attach "$PWD/x.qcow2"
	ok "raw, entry $bytes: zeroes are written" blkdiscard -z -o 4k -l 8k "$DEV"
	ok "raw, entry $bytes: a discard" blkdiscard -o 64k -l 64k "$DEV"
	detach
	is "raw, entry $bytes: the file has zeroes there" \
		"$(head -c 12k data.raw | tail -c 8k | tr -d '\0' | wc -c)" 0
	is "raw, entry $bytes: and what was discarded" \
		"$(head -c 128k data.raw | tail -c 64k | tr -d '\0' | wc -c)" 0
	check_clean x.qcow2 "raw, entry $bytes"
done

# A table that is copied keeps what says that guest cluster 0 is there.
cp good.qcow2 x.qcow2
cp good.raw data.raw
put_bytes x.qcow2 $((0x30000)) 0000000000040000
attach "$PWD/x.qcow2"
ok "an L2 table is copied" xfs_io -d -c 'pwrite -q 512k 4k' -c fsync "$DEV"
is "guest cluster 0 is there" "$(cluster 0)" 41
detach
attach "$PWD/x.qcow2"
is "and stays" "$(cluster 0)" 41
detach

# stopped DESC HEX
stopped() {
	entry "$2"
	not_ok "$1: it cannot be read" dd if="$DEV" of=/dev/null bs=64k count=1 iflag=direct
	not_ok "$1: nor written" xfs_io -d -c 'pwrite -q 0 4k' "$DEV"
	is "$1: others can be read" "$(cluster 1)" 42
	try_detach || :
	ok "$1: the data is what it was" cmp good.raw data.raw
}
stopped "a cluster that is elsewhere" 8000000000010000
stopped "a cluster that is not aligned" 8000000000000200
stopped "a compressed cluster" 4000000000050000

# Which file
cp good.qcow2 x.qcow2
at=$(head -c 65536 x.qcow2 | od -An -v -tx4 --endian=big -w4 | grep -n 44415441)
put_bytes x.qcow2 $(((${at%%:*} - 1) * 4)) 12345678
cp good.raw data.raw
not_ok "without its name in the header it is not attached" try_attach "$PWD/x.qcow2"
like "which says what to do" "$(<"$WORK/.err")" 'use --data-file'
attach --data-file=data.raw "$PWD/x.qcow2"
is "it is, where the name is given" "$(cluster 1)" 42
detach
not_ok "nor is it checked" qcowctl check x.qcow2
ok "it is, where the name is given to the check" qcowctl check --data-file=data.raw x.qcow2

# What is raw has no backing file: not in the header, where QEMU puts none.
rm -f over.qcow2
truncate -s 1M below.raw
qemu-img create -q -f qcow2 -b below.raw -F raw -o data_file=over.raw over.qcow2
attach --read-only "$PWD/over.qcow2" && pass "a data file and a backing file"
detach
put_bytes over.qcow2 88 0000000000000002
for option in --read-only ''; do
	not_ok "a raw data file and a backing file are refused${option:+, $option}" \
		try_attach ${option:+"$option"} "$PWD/over.qcow2"
	like "and that is said${option:+, $option}" "$(<"$WORK/.err")" 'raw.*backing'
done

# A file that is too short
cp good.qcow2 x.qcow2
truncate -s 65000 data.raw
attach --read-only "$PWD/x.qcow2"
is "behind its end the file is zero" "$(cluster 1)" 00
detach
is "who only reads does not make it longer" "$(stat -c %s data.raw)" 65000
attach "$PWD/x.qcow2"
is "who writes makes it as long as the disk" "$(stat -c %s data.raw)" 1048576
is "with zeroes" "$(cluster 1)" 00
ok "the last sector can be written" xfs_io -d -c 'pwrite -q -S 0x52 1023k 1k' "$DEV"
detach
check_clean x.qcow2 "with a file that was too short"
is "it is not longer than the disk" "$(stat -c %s data.raw)" 1048576

# A flush is one of the data, too, where no table has changed.
if modprobe dm-flakey 2>/dev/null; then
	cp good.raw data.raw
	new_loop data.raw
	table="0 $(blockdev --getsz "$LOOP")"
	dmsetup create data --table "$table linear $LOOP 0"
	udevadm settle
	cp good.qcow2 x.qcow2
	attach --data-file=/dev/mapper/data "$PWD/x.qcow2"
	ok "a flush" xfs_io -d -c 'pwrite -q 0 4k' -c fsync "$DEV"
	dmsetup suspend --noflush data
	dmsetup load data --table "$table flakey $LOOP 0 0 60 1 error_writes"
	dmsetup resume data
	not_ok "a flush that fails in the data file fails" xfs_io -d -c fsync "$DEV"
	try_detach || forget "$DEV"
	udevadm settle
	dmsetup remove data
else
	skip "a flush that fails in the data file fails" "no dm-flakey"
fi

no_kernel_report
done_testing
