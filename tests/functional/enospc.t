#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Where the image cannot grow, writes fail with ENOSPC, nothing else breaks, and writing goes on when there is room again.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
modprobe loop 2>/dev/null
cd "$WORK" || exit
ops=$((2000 / SHARE))
if [[ $QUICK ]]; then
	ops=500
fi

# fill_and_free NAME DIR CLUSTER JOBS [ATTACH-OPTION]...
#
# DIR has room for 16 MiB, 11 of which a ballast file takes.
fill_and_free() {
	local name=$1 dir=$2 cluster=$3 jobs=$4 out
	shift 4

	qemu-img create -q -f qcow2 -o "cluster_size=$cluster" "$dir/image" 12M ||
		{ fail "$name: create"; return; }
	fallocate -l 11M "$dir/ballast" || dd if=/dev/zero of="$dir/ballast" bs=1M count=11 status=none
	attach "$@" "$dir/image" || return
	out=$(qcow-diff --fill --ops "$ops" --jobs "$jobs" --cluster "$cluster" --allow-enospc \
		--mix read=20,write=60,zero=4,flush=3 --max-io 256k \
		--mirror-out "full-$name.raw" "$DEV" 2>&1)
	is "$name: while full, reads are right and only ENOSPC is reported" $? 0
	diag "$out"
	like "$name: writes failed with ENOSPC" "$out" 'write=[0-9]+\([0-9]+ failed'
	rm "$dir/ballast"
	sync -f "$dir"
	out=$(qcow-diff --ops "$ops" --jobs "$jobs" --cluster "$cluster" --seed 2 --max-io 256k \
		--mirror-in "full-$name.raw" --mirror-out "end-$name.raw" "$DEV" 2>&1)
	is "$name: with room again all requests succeed" $? 0
	diag "$out"
	detach
	check_clean "$dir/image" "$name"
	same "end-$name.raw" raw "$dir/image" qcow2
	rm -f "$dir/image" "full-$name.raw" "end-$name.raw"
}

mkdir small mem
truncate -s 18M small.img
mkfs.ext4 -q -F -O ^has_journal -m 0 small.img
ok "mount a small ext4" mount -o loop small.img small
fill_and_free ext4-direct small 64k 1 --io=auto
fill_and_free ext4-small-clusters small 4k 4 --io=auto
fill_and_free ext4-buffered small 64k 4 --io=buffered
umount small
mount -t tmpfs -o size=17M none mem
fill_and_free tmpfs mem 64k 1 --io=auto
fill_and_free tmpfs-512 mem 512 4 --io=buffered
umount mem

# Clusters that are discarded make room for the next write, with no flush between.
write_text() {
	base64 -w 0 /dev/urandom | dd of="$DEV" bs=64k iflag=fullblock oflag=direct status=none "$@"
}
for option in --io=direct --io=buffered --compress; do
	mount -o loop small.img small
	fallocate -l 10M small/ballast
	qemu-img create -q -f qcow2 small/image 64M
	attach "$option" "$WORK/small/image"
	not_ok "$option: the file system is filled" write_text
	ok "$option: some of it is discarded" blkdiscard -l 4M "$DEV"
	ok "$option: at once there is room for other data" write_text seek=512 count=48
	detach
	check_clean small/image "$option: discarded, written"
	rm small/image small/ballast
	umount small
done

# Full at detach: either it has room for its tables, or it says that it has not.
mount -o loop small.img small
fallocate -l 10M small/ballast
qemu-img create -q -f qcow2 small/image 64M
attach "$WORK/small/image"
not_ok "more than fits is refused" dd if=/dev/zero of="$DEV" bs=64k oflag=direct conv=fsync
if try_detach; then
	check_clean small/image "full at detach"
else
	forget "$DEV"
	like "detach says that not all could be written" "$(<"$WORK/.err")" 'No space left'
	ok "the image has no error then" is_consistent small/image
fi
umount small

# A block device that is smaller than the image may become.
truncate -s 4M dev.img
new_loop dev.img
qemu-img create -q -f qcow2 -o cluster_size=64k "$LOOP" 64M
attach "$LOOP"
out=$(qcow-diff --ops "$ops" --allow-enospc --mix read=20,write=60,zero=4,flush=3,discard=4 \
	--max-io 256k --mirror-out dev.raw "$DEV" 2>&1)
is "on a small block device: only ENOSPC is reported" $? 0
diag "$out"
like "on a small block device: writes failed with ENOSPC" "$out" 'write=[0-9]+\([0-9]+ failed'
detach
check_clean "$LOOP" "on a block device"
same dev.raw raw "$LOOP" qcow2

# An image file that ends early: what is missing reads as zeroes.
qemu-img create -q -f qcow2 short.qcow2 8M
qemu-io -f qcow2 -c 'write -q -P 0x55 0 2M' short.qcow2
truncate -s -500001 short.qcow2
qemu-img convert -f qcow2 -O raw short.qcow2 short.raw
attach --read-only "$WORK/short.qcow2"
ok "data past the end of the file reads as zeroes" \
	qcow-diff --verify-only --mirror-in short.raw "$DEV"
detach
attach "$WORK/short.qcow2"
ok "an image with a short file can be written" \
	qcow-diff --ops 500 --mirror-in short.raw --mirror-out short2.raw "$DEV"
detach
check_clean short.qcow2
same short2.raw raw short.qcow2 qcow2

# Where nothing can be written.
qemu-img create -q -f qcow2 plain.qcow2 8M
qemu-io -f qcow2 -c 'write -q -P 0x56 64k 1M' plain.qcow2
qemu-img convert -f qcow2 -O raw plain.qcow2 plain.raw
mount -o loop small.img small
rm -f small/*
cp plain.qcow2 small/
mount -o remount,ro small
for option in '' --read-only; do
	# shellcheck disable=SC2086 # an option, or none
	attach $option "$WORK/small/plain.qcow2"
	if [[ ! $option ]]; then
		like "on a read-only file system, that is said" "$(<"$WORK/.err")" \
			'^qcowctl: warning: .*Read-only file system; attaching it read-only$'
	fi
	is "the device is read-only" "$(blockdev --getro "$DEV")" 1
	ok "and reads" qcow-diff --verify-only --mirror-in plain.raw "$DEV"
	not_ok "and does not write" \
		dd if=/dev/zero of="$DEV" bs=4k count=1 oflag=direct conv=notrunc
	detach
done
umount small

for bit in 01:dirty 02:corrupt 03:dirty-and-corrupt; do
	cp plain.qcow2 marked.qcow2
	put_bytes marked.qcow2 79 "${bit%%:*}"
	before=$(cksum <marked.qcow2)
	not_ok "an image marked ${bit#*:} is refused" try_attach --no-repair "$WORK/marked.qcow2"
	is "with one line that says why (${bit#*:})" "$(wc -l <"$WORK/.err")" 1
	like "which names the mark (${bit#*:})" "$(<"$WORK/.err")" '[Dd]irty|[Cc]orrupt'
	attach --read-only "$WORK/marked.qcow2"
	ok "and readable with --read-only (${bit#*:})" \
		qcow-diff --verify-only --mirror-in plain.raw "$DEV"
	detach
	is "which leaves the file as it was (${bit#*:})" "$(cksum <marked.qcow2)" "$before"
done

no_kernel_report
done_testing
