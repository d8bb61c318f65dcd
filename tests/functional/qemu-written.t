#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Images that QEMU wrote read the same through the device, and reading changes nothing.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

# Data, zero clusters with and without space, discarded clusters, small writes.
WRITES=(-c 'write -q -P 0x11 0 300k' -c 'write -q -P 0x12 1000k 1M'
	-c 'write -q -P 0x13 3333k 1k' -c 'write -q -P 0x14 3890k 7k')
ZEROES=(-c 'write -q -z 64k 70k' -c 'write -q -z -u 1100k 200k' -c 'write -q -z 2500k 300k'
	-c 'write -q -z -u 3000k 100k' -c 'discard -q 1500k 128k' -c 'write -q -P 0x15 1110k 3k')

# Through the page cache and around it
device_is() {
	cmp "$1" "$DEV" && qcow-diff --verify-only --mirror-in "$1" "$DEV"
}

# reads_like IMAGE DESC [ATTACH-OPTION]...: one result.
reads_like() {
	local image=$1 desc=$2 before
	shift 2

	if ! qemu-img convert -O raw -f qcow2 "$image" want.raw 2>"$WORK/.err"; then
		fail "$desc: qemu-img cannot read it: $(<"$WORK/.err")"
		return 1
	fi
	# The device has whole sectors only.
	truncate -s $(($(stat -c %s want.raw) / 512 * 512)) want.raw
	before=$(cksum <"$image")
	attach --read-only "$@" "$WORK/$image" || return
	ok "$desc" device_is want.raw
	detach
	is "$desc: attach, read, detach leave the file alone" "$(cksum <"$image")" "$before"
}

# made DESC SIZE QEMU-IMG-OPTIONS...
made() {
	local desc=$1 size=$2
	shift 2

	rm -f x.qcow2
	if ! qemu-img create -q -f qcow2 "$@" x.qcow2 "$size" 2>"$WORK/.err" ||
		! qemu-io -f qcow2 -d unmap "${WRITES[@]}" "${zeroes[@]}" x.qcow2 >"$WORK/.err" 2>&1; then
		fail "$desc: $(<"$WORK/.err")"
		return 1
	fi
	reads_like x.qcow2 "$desc"
}

zeroes=("${ZEROES[@]}")
sizes=(512 1k 2k 4k 64k 256k 1M 2M) widths=(1 2 4 8 32 64) depths=(3 64 512)
if [[ $QUICK ]]; then
	sizes=(512 2M) widths=(1 64) depths=(3)
fi
for size in "${sizes[@]}"; do
	made "cluster size $size" 5M -o cluster_size="$size"
done
for bits in "${widths[@]}"; do
	made "refcount bits $bits" 5M -o refcount_bits="$bits"
done
for pre in metadata falloc full; do
	made "preallocation $pre" 5M -o preallocation=$pre
done
made "lazy refcounts" 5M -o lazy_refcounts=on
made "a last cluster that is cut" 4000256
zeroes=()
made "version 2" 5M -o compat=0.10
made "version 2, small clusters" 5M -o compat=0.10,cluster_size=512
zeroes=("${ZEROES[@]}")

# A size that is no multiple of 512
made "size to patch" 4000256
put_bytes x.qcow2 24 "$(printf %016x 4000001)"
reads_like x.qcow2 "a size of no whole number of sectors"

# Internal snapshots: the active layer is what counts.
made "before snapshots" 5M
qemu-img snapshot -c a x.qcow2
qemu-io -f qcow2 -c 'write -q -P 0x21 200k 200k' -c 'write -q -z 1M 100k' x.qcow2
qemu-img snapshot -c b x.qcow2
qemu-io -f qcow2 -c 'write -q -P 0x22 250k 4k' x.qcow2
reads_like x.qcow2 "internal snapshots"
qemu-img snapshot -a a x.qcow2
reads_like x.qcow2 "an applied snapshot"
qemu-img snapshot -d b x.qcow2
reads_like x.qcow2 "a deleted snapshot"

# An image that grew, and one that shrank
made "before resize" 5M
qemu-img resize -q x.qcow2 9000448
reads_like x.qcow2 "grown"
qemu-img resize -q --shrink x.qcow2 2M
reads_like x.qcow2 "shrunk"

# Read cleanly what was left dirty.
made "before dirty" 5M
put_bytes x.qcow2 79 01
attach --read-only "$WORK/x.qcow2" &&
	ok "a dirty image reads" qcow-diff --verify-only --mirror-in want.raw "$DEV"
detach

# Backing files
qemu-img convert -f qcow2 -O raw x.qcow2 base.raw
mkdir -p sub
cp base.raw sub/
# backed DESC NAME FORMAT [SIZE]
backed() {
	rm -f ov.qcow2
	if qemu-img create -q -f qcow2 -u -b "$2" -F "$3" ov.qcow2 "${4:-5M}" &&
		qemu-io -f qcow2 -d unmap -c 'write -q -P 0x31 500k 100k' \
			-c 'write -q -z 700k 70k' -c 'write -q -z -u 850k 70k' ov.qcow2; then
		reads_like ov.qcow2 "$1"
	else
		fail "$1: create"
	fi
}
made "a base" 5M -o cluster_size=4k
cp x.qcow2 base.qcow2
cp x.qcow2 sub/
backed "a raw base" base.raw raw
backed "a raw base, shorter" base.raw raw 9M
backed "a raw base, longer" base.raw raw 1M
truncate -s 1000001 odd.raw
head -c 1000001 base.raw >odd.raw
backed "a raw base of odd length" odd.raw raw
: >empty.raw
backed "an empty base" empty.raw raw
backed "a qcow2 base" base.qcow2 qcow2
backed "a qcow2 base, shorter" base.qcow2 qcow2 9M
backed "a qcow2 base, longer" base.qcow2 qcow2 1M
backed "a base by its full name" "$WORK/base.qcow2" qcow2
backed "a base in another directory" sub/x.qcow2 qcow2
backed "a base named file:" "file:$WORK/base.qcow2" qcow2
backed "a base named json:" \
	"json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"$WORK/base.qcow2\"}}" qcow2
(
	cd sub && qemu-img create -q -f qcow2 -b x.qcow2 -F qcow2 mid.qcow2 &&
		qemu-io -f qcow2 -c 'write -q -P 0x41 700k 100k' mid.qcow2
)
backed "names relative to the file that has them" sub/mid.qcow2 qcow2
ln -s sub/mid.qcow2 link.qcow2
backed "a base through a symbolic link" "$WORK/sub/mid.qcow2" qcow2

# A base whose format is not said: QEMU would guess, which is not safe.
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 ov.qcow2
qemu-img rebase -q -u -b base.qcow2 -F '' ov.qcow2 2>/dev/null ||
	put_bytes ov.qcow2 112 12345678
not_ok "a base whose format is not said is refused" try_attach --read-only "$WORK/ov.qcow2"
diag "$(<"$WORK/.err")"
attach --read-only -F qcow2 "$WORK/ov.qcow2"
qemu-img convert -f qcow2 -O raw base.qcow2 want.raw
ok "and taken with -F" qcow-diff --verify-only --mirror-in want.raw "$DEV"
detach

# A chain with a loop in it
qemu-img create -q -f qcow2 -u -b loop2.qcow2 -F qcow2 loop1.qcow2 1M
qemu-img create -q -f qcow2 -u -b loop1.qcow2 -F qcow2 loop2.qcow2 1M
not_ok "a chain that loops is refused" try_attach --read-only "$WORK/loop1.qcow2"
diag "$(<"$WORK/.err")"
qemu-img create -q -f qcow2 -u -b gone.qcow2 -F qcow2 orphan.qcow2 1M
not_ok "a chain with a file missing is refused" try_attach --read-only "$WORK/orphan.qcow2"
like "and the file is named" "$(<"$WORK/.err")" 'gone\.qcow2'

# Deep chains: src/make-chain.c says what is in them.
mkdir deep
deep_chain() {
	rm -f deep/*
	qemu-img create -q -f qcow2 -o cluster_size=4k deep/L000.qcow2 4M
	qemu-io -f qcow2 -c 'write -q -P 0x77 0 4M' deep/L000.qcow2
	qemu-img create -q -f qcow2 -o cluster_size=4k -b L000.qcow2 -F qcow2 deep/template 4M
	qemu-io -f qcow2 -c 'write -q -P 0x5a 0 512' deep/template
	make-chain deep/template "$1" deep
	rm deep/template
	cp "deep/L$(printf %03d $(($1 - 1))).qcow2" deep/top.qcow2
}
for depth in "${depths[@]}"; do
	deep_chain "$depth"
	if ((depth <= 64)); then
		is_clean deep/top.qcow2 || fail "the chain is not what this test means it to be"
		reads_like deep/top.qcow2 "a chain of $depth"
	else
		# qemu-img takes too long; the contents follow from how it was made.
		qemu-img convert -f qcow2 -O raw deep/L000.qcow2 want.raw
		for ((i = 1; i < depth; i++)); do
			{
				printf 'layer %04d' "$i"
				head -c 502 /dev/zero | tr '\0' Z
				head -c 3584 /dev/zero | tr '\0' w
			} | dd of=want.raw bs=4k seek=$((i % 500)) conv=notrunc status=none
		done
		attach --read-only "$WORK/deep/top.qcow2" &&
			ok "a chain of $depth" qcow-diff --verify-only --mirror-in want.raw "$DEV"
		detach
	fi
done

# When it is known where each cluster is, only the L1 tables below are left in memory.
attach --read-only "$WORK/deep/top.qcow2" && cat "$DEV" >/dev/null
is "tables of a chain of $depth: those of its top, and an L1 table for each file" \
	"$(<"/sys/block/${DEV#/dev/}/qcow/cache_size")" $(((depth + 2) * 4096))
detach

no_kernel_report
done_testing
