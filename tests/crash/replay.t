#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# After a power cut at any instant the image has no error, and each sector holds what was flushed or what was written after.
# runs-on: host
# timeout: 1800

# usage: replay.t [CASE]...
# QCOW_SOAK=1 adds cases, and makes more states of each.
# QCOW_STATES=N states of each case (60), QCOW_SEED=N another load,
# QCOW_KERNEL=NAME another kernel, QCOW_KEEP=DIR keeps what was recorded.

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/../functional/common.sh"

crash=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$crash/../.." && pwd)
states=${QCOW_STATES:-60}
seed=${QCOW_SEED:-1}
kernel=${QCOW_KERNEL:-6.1}
ops=${QCOW_OPS:-1200}
mix=${QCOW_MIX:-read=8,write=50,zero=6,punch=6,discard=8,flush=8}
if [[ ${QCOW_SOAK-} ]]; then
	states=${QCOW_STATES:-1000}
	ops=${QCOW_OPS:-4000}
fi

# NAME  MODE  SIZE  IMAGE-OPTIONS  CHAIN  QCOW-DIFF-OPTIONS
# With +compress in CHAIN it is attached so; with +bitmap it has bitmaps.
CASES=(
	'block-64k-lazy block 12M cluster_size=64k,lazy_refcounts=on none --jobs 1'
	'block-512-rc64-overlay block 4M cluster_size=512,refcount_bits=64 raw --jobs 1 --max-io 128k'
	'block-4k-jobs-bitmap block 12M cluster_size=4k none+bitmap --jobs 4 --max-io 256k'
	'block-64k-ext-overlay-snapshot block 12M cluster_size=64k,extended_l2=on raw+snapshot --jobs 2'
	'block-4k-packed-overlay-snapshot block 12M cluster_size=4k qcow2+packed+compress+snapshot --jobs 2 --max-io 256k'
	'file-64k-data-bitmap file 12M cluster_size=64k,data_file=image.data raw+bitmap --jobs 2'
	'file-4k-overlay-snapshot file 12M cluster_size=4k raw+snapshot --jobs 1 --max-io 256k'
)
if [[ ${QCOW_SOAK-} ]] || (($#)); then
	CASES+=(
		'block-64k block 12M cluster_size=64k none --jobs 1'
		'block-4k-compress block 12M cluster_size=4k none+compress --jobs 4 --max-io 256k'
		'block-512 block 4M cluster_size=512 none --jobs 1 --max-io 128k'
		'block-1k-rc64 block 4M cluster_size=1k,refcount_bits=64 raw --jobs 1 --max-io 128k'
		'block-64k-overlay-snapshot block 12M cluster_size=64k raw+snapshot --jobs 2'
		'block-16k-lazy-ext block 12M cluster_size=16k,extended_l2=on,lazy_refcounts=on qcow2 --jobs 4'
		'block-2M-packed block 24M cluster_size=2M,compression_type=zstd packed --jobs 2'
		'file-64k-snapshot file 12M cluster_size=64k none+snapshot --jobs 2'
		'file-4k-data-lazy file 12M cluster_size=4k,lazy_refcounts=on,data_file=image.data,data_file_raw=on none --jobs 4'
	)
fi

cd "$tree" || exit
make -s -C "$crash" O="$WORK" || skip_all "replay does not build"
make -s -C "$tree/tests/functional/src" O="$WORK" || skip_all "qcow-diff does not build"
PATH=$WORK:$PATH
# States are made in memory where there is some.
fast=$WORK
if [[ -d /dev/shm ]]; then
	fast=$(mktemp -d /dev/shm/replay.XXXXXX)
	EXTRA+=("$fast")
fi

# make_storage DIR MODE SIZE OPTIONS CHAIN: storage.raw, initial.raw, log.raw
make_storage() (
	local mode=$2 size=$3 options=$4 chain=$5 base=()

	cd "$1" || exit
	set -e
	case $chain in
	raw* | qcow2*)
		truncate -s "$size" base.raw
		qcow-diff --quiet --no-final --ops 60 --max-io 512k --seed 1001 \
			--mix write=3,punch=1 base.raw
		base=(-b "$PWD/base.raw" -F raw)
		if [[ $chain == qcow2* ]]; then
			qemu-img convert -f raw -O qcow2 -o cluster_size=16k base.raw base.qcow2
			base=(-b "$PWD/base.qcow2" -F qcow2)
		fi
		;;
	esac
	qemu-img create -q -f qcow2 "${base[@]}" -o "$options" image "$size"
	if [[ $chain == *packed* ]]; then
		truncate -s "$size" packed.raw
		qcow-diff --quiet --no-final --ops 60 --max-io 512k --seed 1002 \
			--mix write=3,punch=1 packed.raw
		qemu-io -f qcow2 -c "write -q -c -s packed.raw 0 $size" image
		rm packed.raw
	fi
	if [[ $chain == *snapshot ]]; then
		qemu-io -f qcow2 -c 'write -q -P 0x61 0 1M' -c 'write -q -P 0x62 2000k 1500k' \
			-c 'write -q -z 2200k 200k' image
		qemu-img snapshot -c one image
		qemu-io -f qcow2 -c 'write -q -P 0x63 300k 300k' image
	fi
	if [[ $chain == *+bitmap* ]]; then
		qemu-img bitmap --add -g 512 image map
		qemu-io -f qcow2 -c 'write -q -P 0x64 1M 64k' image
		qemu-img bitmap --add -g 64k image other
	fi
	qemu-img convert -f qcow2 -O raw image initial.raw
	if [[ $mode == file ]]; then
		mkdir files
		mv image* files/
		truncate -s 64M storage.raw
		mke2fs -q -t ext4 -b 4096 -J size=4 -E lazy_itable_init=0 -d files storage.raw
		rm -r files
	else
		mv image storage.raw
		truncate -s 40M storage.raw
	fi
	cp --sparse=always storage.raw before.raw
	truncate -s 4G log.raw
)

run_case() {
	local name mode size options chain args dir file=() attach='' ok=1

	read -r name mode size options chain args <<<"$1"
	read -ra args <<<"$args"
	dir=$(mktemp -d "$WORK/$name.XXXXXX")
	if ! make_storage "$dir" "$mode" "$size" "$options" "$chain" >"$WORK/.out" 2>&1; then
		fail "$name: make the image"
		diag "$(<"$WORK/.out")"
		return 1
	fi
	if [[ $chain == *+compress* ]]; then
		attach=--compress
	fi
	if [[ $mode == file ]]; then
		file=(--file /image)
		[[ $options != *data_file=* ]] || file+=(--data /image.data)
	fi
	# shellcheck disable=SC2086
	if ! ok "$name: the load runs" "$tree/tests/guest/run" -k "$kernel" ${GUEST_ARGS-} \
		-t 300 -d "$dir" \
		-D "$dir/storage.raw" -D "$dir/log.raw" -- env ATTACH="${ATTACH-} $attach" \
		${GUEST_ENV-} tests/crash/record "$dir" "$mode" --seed "$seed" --ops "$ops" \
		--cluster "$(sed 's/cluster_size=//; s/,.*//' <<<"$options")" \
		--mix "$mix" "${args[@]}"; then
		ok=0
	fi
	diag "$(grep -a '^# qcow-diff' "$WORK/.out")"
	if ((ok)); then
		replay --log "$dir/log.raw" --base "$dir/before.raw" --history "$dir/history" \
			--initial "$dir/initial.raw" --states "$states" --seed "$seed" \
			--scratch "$fast" --name "$name" "${file[@]}" >"$WORK/.replay" 2>&1
		is "$name: $states states after a power cut are good" $? 0
		diag "$(head -n 100 "$WORK/.replay")"
		if [[ $options == *lazy_refcounts=on* ]]; then
			like "$name: some of them were repaired" "$(<"$WORK/.replay")" \
				' states were marked dirty'
		fi
		replay --log "$dir/log.raw" --base "$dir/before.raw" --history "$dir/history" \
			--initial "$dir/initial.raw" --states 24 --forget-flush \
			--scratch "$fast" --name "$name" "${file[@]}" >"$WORK/.replay" 2>&1
		is "$name: the check can fail" $? 1
	fi
	if [[ ${QCOW_KEEP-} ]]; then
		cp -r --sparse=always "$dir" "$QCOW_KEEP/"
	fi
	rm -rf "$dir"
}

for case in "${CASES[@]}"; do
	if (($#)) && [[ " $* " != *" ${case%% *} "* ]]; then
		continue
	fi
	run_case "$case"
done
diag "${SECONDS} s"
done_testing
