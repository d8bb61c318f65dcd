#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# What there is to be seen of a device: attributes, counters, trace events; FUA that reaches storage, and memory that is given back.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
TRACING=/sys/kernel/tracing
mountpoint -q $TRACING || mount -t tracefs tracefs $TRACING
[[ -e $TRACING/events/qcow ]] || skip_all "no trace events"

# record EVENT...: only these, from here on
record() {
	local event

	echo 0 >$TRACING/events/enable
	echo >$TRACING/trace
	for event; do
		echo 1 >"$TRACING/events/$event/enable"
	done
}

# seen REGEX: how many recorded events match
seen() {
	grep -cE "$1" $TRACING/trace
}

attribute() {
	cat "/sys/block/${DEV#/dev/}/qcow/$1"
}

# counts ATTRIBUTE COMMAND...: the command succeeds, and the attribute goes up
counts() {
	local before

	before=$(attribute "$1")
	ok "${*:2}" "${@:2}"
	ok "it counts in $1" test "$(attribute "$1")" -gt "$before"
}

# Attributes
qemu-img create -q -f qcow2 -o cluster_size=64k image.qcow2 64M
record qcow
attach --cache-size=64K image.qcow2
is "the attributes are those that are documented" \
	"$(find "/sys/block/${DEV#/dev/}/qcow" -type f -printf '%f\n' | sort)" \
	"$(sed -n 's,^What:.*/qcow/,,p' \
		"$TEST_TREE/Documentation/ABI/testing/sysfs-block-qcow" | sort)"
for pair in image="$WORK/image.qcow2" data_file= snapshot= damage= format_version=3 \
	virtual_size=67108864 cluster_size=65536 read_only=0 depth=1 \
	cache_limit=262144 errors=0; do
	is "sysfs: $pair" "$(attribute "${pair%%=*}")" "${pair#*=}"
done

# Counters, and events
direct=(xfs_io -d)
counts writes "${direct[@]}" -c 'pwrite -q 0 256k' "$DEV"
counts clusters_allocated "${direct[@]}" -c 'pwrite -q 256k 64k' "$DEV"
counts flushes xfs_io -c fsync "$DEV"
counts reads "${direct[@]}" -c 'pread -q 0 64k' "$DEV"
counts cache_hits "${direct[@]}" -c 'pread -q 64k 64k' "$DEV"
counts discards blkdiscard -o 0 -l 64k "$DEV"
counts zeroes blkdiscard -z -o 64k -l 64k "$DEV"
xfs_io -c fsync "$DEV"
ok "what is freed counts in clusters_freed" test "$(attribute clusters_freed)" -gt 0
ok "what is read of tables counts in cache_misses" test "$(attribute cache_misses)" -gt 0
detach
attach --compress image.qcow2
ok "write what can be compressed" "${direct[@]}" -c 'pwrite -q -b 64k 1M 64k' -c fsync "$DEV"
ok "read it" "${direct[@]}" -c 'pread -q 1M 4k' "$DEV"
ok "write in place" "${direct[@]}" -c 'pwrite -q 128k 4k' "$DEV"
detach
for event in map table_read allocate write_out commit free pack unpack; do
	ok "there is the event qcow_$event" test "$(seen ": qcow_$event: ")" -gt 0
done
like "a write in place is mapped" "$(<$TRACING/trace)" \
	'qcow_map: guest_offset=0x20000 type=data layer=0 host_offset=0x'
check_clean image.qcow2
# With clusters of 64 KiB the lowest 54 bits are the offset.
l1=$(od -An -tu8 --endian=big -j 40 -N 8 image.qcow2)
l2=$(($(od -An -td8 --endian=big -j $((l1)) -N 8 image.qcow2) & 0xfffffffffffe00))
at=$(($(od -An -td8 --endian=big -j $((l2 + 16 * 8)) -N 8 image.qcow2) & ((1 << 54) - 1)))
put_bytes image.qcow2 $at ffffffffffffffff
attach image.qcow2
before=$(attribute errors)
not_ok "read what is damaged" "${direct[@]}" -c 'pread -q 1M 4k' "$DEV"
ok "it counts in errors" test "$(attribute errors)" -gt "$before"
detach

# FUA. A file system asks for it where it overwrites; a write that is synchronous is
# one without FUA and a flush, where nothing is above the device.
mkdir mnt
truncate -s 80M image.raw
new_loop image.raw --direct-io=on
IFS=: read -r major minor < <(lsblk -dno MAJ:MIN "$LOOP" | tr -d ' ')
for io in direct buffered; do
	qemu-img create -q -f qcow2 -o cluster_size=64k "$LOOP" 48M
	attach --io=$io "$LOOP"
	mkfs.ext4 -q "$DEV"
	mount "$DEV" mnt
	xfs_io -f -d -c 'pwrite -q 0 1M' -c fsync mnt/file
	for what in "in place" "copy on write"; do
		if [[ $what == copy* ]]; then
			umount mnt
			detach
			qemu-img snapshot -c one "$LOOP"
			attach --io=$io "$LOOP"
			mount "$DEV" mnt
		fi
		# What is left to be written by the mount is of no interest.
		xfs_io -c fsync mnt/file
		sync -f mnt
		echo "dev == $((major << 20 | minor))" >$TRACING/events/block/block_bio_queue/filter
		record block/block_bio_queue block/block_rq_issue qcow/qcow_commit
		dd if=/dev/zero of=mnt/file bs=4k seek=16 count=1 oflag=direct,dsync \
			conv=notrunc status=none
		echo 0 >$TRACING/events/enable
		like "FUA, $io, $what: there is a request" "$(<$TRACING/trace)" \
			" block_rq_issue: [0-9,]+ WFS? "
		ok "FUA, $io, $what: storage is told" \
			test "$(seen ' block_bio_queue: [0-9,]+ (F|W[A-Z]*F)')" -gt 0
		if [[ $what == copy* ]]; then
			ok "FUA, $io, $what: so are the tables" \
				test "$(seen ': qcow_commit: ')" -gt 0
		fi
	done
	umount mnt
	detach
	check_clean "$LOOP" "FUA, $io"
done
echo 0 >$TRACING/events/block/block_bio_queue/filter

# Memory
qemu-img create -q -f qcow2 -o cluster_size=512,preallocation=metadata many.qcow2 64M
attach --cache-size=16M many.qcow2
ok "read all tables" dd if="$DEV" of=/dev/null bs=1M iflag=direct
before=$(attribute cache_size)
ok "they are cached" test "$before" -gt $((512 << 10))
echo 2 >/proc/sys/vm/drop_caches
ok "and given back" test "$(attribute cache_size)" -lt $((before / 2))
ok "they can be read again" dd if="$DEV" of=/dev/null bs=1M iflag=direct
detach
qemu-img create -q -f qcow2 packed.qcow2 1M
qemu-io -f qcow2 -c 'write -q -c -P 7 0 64k' packed.qcow2
attach --read-only packed.qcow2
udevadm settle
record qcow/qcow_unpack
"${direct[@]}" -c 'pread -q 0 4k' -c 'pread -q 4k 4k' "$DEV"
ok "a decompressed cluster is kept" test "$(seen ': qcow_unpack: ')" -le 1
echo 2 >/proc/sys/vm/drop_caches
record qcow/qcow_unpack
"${direct[@]}" -c 'pread -q 0 4k' -c 'pread -q 4k 4k' "$DEV"
is "and given back" "$(seen ': qcow_unpack: ')" 1
detach

echo 0 >$TRACING/events/enable
no_kernel_report
done_testing
