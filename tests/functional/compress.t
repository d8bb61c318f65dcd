#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# With --compress what is written to new clusters is compressed, so that QEMU reads it and finds nothing wrong.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 900

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

need_driver
cd "$WORK" || exit

MiB=$((1024 * 1024))

# What a user would copy: text, programs, noise, holes. Not a whole cluster.
{
	seq 1 300000
	head -c 300k /dev/urandom
	head -c 1M "$(command -v qemu-img)"
	head -c 500k /dev/zero
	seq 7 90000
} >plain
truncate -s %512 plain
SIZE=$(stat -c %s plain)

# compressed IMAGE: the share of its clusters that are, in percent without a fraction
compressed() {
	qemu-img check -f qcow2 "$1" | sed -n 's/.* \([0-9]*\)\.[0-9]*% compressed.*/\1/p'
}

# A tree in a file system
for type in zlib zstd; do
	qemu-img create -q -f qcow2 -o "compression_type=$type" x.qcow2 64M
	attach --compress="$type" "$PWD/x.qcow2"
	is "$type: list says so" "$(qcowctl list -n -o compress)" "$type"
	ok "$type: mkfs" mkfs.ext4 -q -E nodiscard "$DEV"
	mkdir -p mnt
	mount "$DEV" mnt
	for i in 1 2 3; do
		cp plain "mnt/copy$i"
	done
	sync -f mnt
	echo 3 >/proc/sys/vm/drop_caches
	ok "$type: it reads right" cmp plain mnt/copy2
	umount mnt
	ok "$type: fsck" fsck.ext4 -fn "$DEV"
	dd if="$DEV" of=x.raw bs=1M iflag=direct status=none
	detach
	check_clean x.qcow2
	same x.raw raw x.qcow2 qcow2
	ok "$type: most of it is compressed" [ "$(compressed x.qcow2)" -ge 50 ]
	qemu-img convert -f raw -O qcow2 x.raw all.qcow2
	ok "$type: it takes less than two thirds" \
		[ $((3 * $(stat -c %b x.qcow2))) -lt $((2 * $(stat -c %b all.qcow2))) ]
done

# Every size of clusters; the last one is cut short by the end of the disk
for cs in 512 4k 64k 512k 1M 2M; do
	size=$SIZE
	# Many small ones take the debug kernel long.
	[[ $cs != 512 ]] || size=$MiB
	head -c "$size" plain >part
	qemu-img create -q -f qcow2 -o "cluster_size=$cs,compression_type=zstd" x.qcow2 "$size"
	attach --compress "$PWD/x.qcow2"
	dd if=part of="$DEV" bs=2M oflag=direct status=none
	ok "$cs: reads right" cmp part "$DEV"
	detach
	check_clean x.qcow2
	same part raw x.qcow2 qcow2
	ok "$cs: some of it is compressed" [ "$(compressed x.qcow2)" -gt 9 ]
done

# Large ones through the page cache, from where they come in many pieces
for cs in 1M 2M; do
	qemu-img create -q -f qcow2 -o "cluster_size=$cs" x.qcow2 16M
	attach --compress "$PWD/x.qcow2"
	yes | head -c 16M | dd of="$DEV" bs=64k iflag=fullblock conv=fsync status=none
	detach
	check_clean x.qcow2
	yes | head -c 16M >text
	same text raw x.qcow2 qcow2
	ok "$cs, buffered: half of it at least is compressed" [ "$(compressed x.qcow2)" -ge 50 ]
done

# allocated: how many clusters the driver has taken
allocated() {
	cat "/sys/block/${DEV#/dev/}/qcow/clusters_allocated"
}

# What is compressed, and what is not.
qemu-img create -q -f qcow2 -o preallocation=metadata p.qcow2 1M
qemu-img create -q -f qcow2 x.qcow2 1M
yes | head -c 256k >text
head -c 64k /dev/urandom >noise

attach --compress "$PWD/p.qcow2"
dd if=text of="$DEV" bs=64k oflag=direct status=none
detach
is "what has a place already is written there" "$(compressed p.qcow2)" 0
check_clean p.qcow2

attach --compress "$PWD/x.qcow2"
dd if=noise of="$DEV" bs=64k oflag=direct status=none
is "noise is not" "$(allocated)" 2
dd if=text of="$DEV" bs=64k seek=1 count=4 oflag=direct status=none
is "four clusters of text take one" "$(allocated)" 3
dd if=text of="$DEV" bs=4k seek=80 count=1 oflag=direct status=none
is "a part of a cluster takes all of it" "$(allocated)" 4
dd if=noise of="$DEV" bs=4k seek=17 count=1 oflag=direct status=none
is "and so does a part of a compressed one" "$(allocated)" 5
dd if=text of="$DEV" bs=64k seek=1 count=1 oflag=direct status=none
is "which is written in place from then on" "$(allocated)" 5
blkdiscard -o 0 -l $((5 * 65536)) "$DEV"
dd if=text of="$DEV" bs=64k seek=1 count=2 oflag=direct status=none
# A commit in between has freed the one that they were in.
ok "what was discarded is compressed again" [ "$(allocated)" -le 6 ]
dd if="$DEV" of=x.raw bs=64k iflag=direct status=none
detach
check_clean x.qcow2
same x.raw raw x.qcow2 qcow2
is "two of three are compressed" "$(compressed x.qcow2)" 66

# QEMU goes on with it.
ok "QEMU writes over it" qemu-io -f qcow2 -c 'write -P 7 80k 100k' x.qcow2
ok "QEMU compresses into it" qemu-io -f qcow2 -c 'write -c -P 9 512k 128k' x.qcow2
check_clean x.qcow2

# An overlay: the base is not asked for what is written as a whole.
qemu-img convert -f raw -O qcow2 plain base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 x.qcow2
attach --compress "$PWD/x.qcow2"
dd if=text of="$DEV" bs=64k seek=3 oflag=direct status=none
dd if=text of="$DEV" bs=4k count=3 oflag=direct status=none
detach
check_clean x.qcow2
cp plain want
dd if=text of=want bs=64k seek=3 conv=notrunc status=none
dd if=text of=want bs=4k count=3 conv=notrunc status=none
same want raw x.qcow2 qcow2
is "one of two is compressed, and all of its neighbours" "$(compressed x.qcow2)" 80

# Several writers, and what they wrote is read back.
if command -v fio >/dev/null; then
	qemu-img create -q -f qcow2 -o cluster_size=16k,compression_type=zstd x.qcow2 32M
	attach --compress "$PWD/x.qcow2"
	ok "fio finds what it wrote" fio --name=x --filename="$DEV" --rw=randwrite \
		--bsrange=4k-256k --size=24M --io_size=24M --ioengine=libaio --iodepth=16 \
		--direct=1 --verify=crc32c --verify_fatal=1 \
		--buffer_compress_percentage=70 --refill_buffers --minimal
	detach
	check_clean x.qcow2
fi

# No space left: what was written before is good.
truncate -s 12M small.img
mkfs.ext4 -q -F -O ^has_journal -m 0 small.img
mkdir small
new_loop small.img
mount "$LOOP" small
qemu-img create -q -f qcow2 small/x.qcow2 64M
attach --compress "$PWD/small/x.qcow2"
head -c $((12 * MiB)) /dev/urandom | base64 -w 0 >letters
not_ok "there is no space for all of it" dd if=letters of="$DEV" bs=64k oflag=direct
like "that is said" "$(<"$WORK/.out")" "No space left"
blkdiscard -o $((2 * MiB)) -l $((30 * MiB)) "$DEV"
ok "after a discard there is" dd if=text of="$DEV" bs=64k seek=100 oflag=direct,sync
cmp -n $((2 * MiB)) letters "$DEV"
is "what was written first is there" $? 0
detach
ok "the image has no error" is_consistent small/x.qcow2
umount small

# What is refused
refused() {
	local desc=$1 want=$2

	shift 2
	not_ok "$desc: refused" qcowctl attach "$@"
	like "$desc: why" "$(<"$WORK/.out")" "$want"
}
qemu-img create -q -f qcow2 x.qcow2 1M
refused "another type" "was made for zlib" --compress=zstd "$PWD/x.qcow2"
refused "no such type" "--compress cannot be 'lzo'" --compress=lzo "$PWD/x.qcow2"
refused "read-only" "--compress is about writing" --compress --read-only "$PWD/x.qcow2"
qemu-img create -q -f qcow2 -o refcount_bits=1 x.qcow2 1M
refused "counts of one bit" "refcounts of 1 bit" --compress "$PWD/x.qcow2"
qemu-img create -q -f qcow2 -o data_file=x.data x.qcow2 1M
refused "a data file" "external data file" --compress "$PWD/x.qcow2"
qemu-img create -q -f qcow2 -o compat=0.10 x.qcow2 1M
attach --compress "$PWD/x.qcow2"
dd if=text of="$DEV" bs=64k oflag=direct status=none
detach
check_clean x.qcow2
same text raw x.qcow2 qcow2 2>/dev/null
is "version 2: all of it is compressed" "$(compressed x.qcow2)" 100

no_kernel_report
done_testing
