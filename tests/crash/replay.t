#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# After a power cut at any instant the image has no error, each sector holds what was flushed or what was written after, and it can be written on.
# runs-on: host
# timeout: 1800

# usage: replay.t [CASE]...
# QCOW_SOAK=1 draws a seed, adds cases, and makes more states of each.
# QCOW_STATES=N states of each case, and never less than one for each flush and half
# as many besides, QCOW_SEED=N another load,
# QCOW_KERNEL=NAME another kernel, QCOW_NO_INLINE=1 attach with --no-inline,
# QCOW_KEEP=DIR keeps what was recorded.

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/../functional/common.sh"

crash=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$crash/../.." && pwd)
states=${QCOW_STATES:-175}
seed=${QCOW_SEED:-1}
kernel=${QCOW_KERNEL:-6.1}
ops=${QCOW_OPS:-500}
mix=${QCOW_MIX:-read=4,write=50,zero=6,punch=6,discard=8,flush=8}
kept=2
if [[ ${QCOW_SOAK-} ]]; then
	states=${QCOW_STATES:-1000}
	seed=${QCOW_SEED:-$((SRANDOM % 1000000))}
	ops=${QCOW_OPS:-2000}
	kept=5
fi

# NAME  MODE  SIZE  IMAGE-OPTIONS  CHAIN  QCOW-DIFF-OPTIONS
# MODE is that of ./record. With +compress in CHAIN it is attached so; with +bitmap it
# has bitmaps, with +luks or +aes it is encrypted.
CASES=(
	'block-64k-lazy block 6M cluster_size=64k,lazy_refcounts=on none --jobs 1'
	'block-512-rc64-overlay block 4M cluster_size=512,refcount_bits=64 raw --jobs 1 --max-io 128k --fill'
	'block-4k-jobs-bitmap block 4M cluster_size=4k none+bitmap --jobs 4 --max-io 256k'
	'block-64k-ext-overlay-snapshot block 6M cluster_size=64k,extended_l2=on raw+snapshot --jobs 2'
	'block-4k-packed-overlay-snapshot block 4M cluster_size=4k qcow2+packed+compress+snapshot --jobs 2 --max-io 256k'
	'block-4k-fua block 4M cluster_size=4k none --jobs 2 --max-io 64k --fill --hot 1M --mix read=4,write=50,dsync=50,flush=3'
	'block-4k-luks-overlay block 4M cluster_size=4k raw+luks --jobs 1 --max-io 256k'
	'block-64k-aes-snapshot block 6M cluster_size=64k none+aes+snapshot --jobs 2'
	'pair-64k-overlay-bitmap pair 6M cluster_size=64k raw+bitmap --jobs 2'
	'file-64k-data-bitmap ext4 6M cluster_size=64k raw+bitmap+data --jobs 2'
	'file-4k-overlay-snapshot ext4 4M cluster_size=4k raw+snapshot --jobs 1 --max-io 256k'
	'file-4k-lazy-fua ext4 4M cluster_size=4k,lazy_refcounts=on none --jobs 1 --max-io 128k --mix read=4,write=50,zero=6,discard=6,dsync=10,flush=4'
	'xfs-4k xfs 4M cluster_size=4k none --jobs 2 --max-io 256k --ops 150'
)
if [[ ${QCOW_SOAK-} ]] || (($#)); then
	CASES+=(
		'block-64k block 12M cluster_size=64k none --jobs 1'
		'block-4k-compress block 6M cluster_size=4k none+compress --jobs 4 --max-io 256k'
		'block-512 block 4M cluster_size=512 none --jobs 1 --max-io 128k'
		'block-1k-rc64 block 18M cluster_size=1k,refcount_bits=64 raw --jobs 1 --max-io 128k --fill'
		'block-64k-overlay-snapshot block 6M cluster_size=64k raw+snapshot --jobs 2'
		'block-16k-lazy-ext block 6M cluster_size=16k,extended_l2=on,lazy_refcounts=on qcow2 --jobs 4'
		'block-2M-packed block 24M cluster_size=2M,compression_type=zstd packed --jobs 2'
		'block-4k-lazy-luks block 6M cluster_size=4k,lazy_refcounts=on none+luks --jobs 4 --max-io 256k'
		'pair-4k-lazy pair 4M cluster_size=4k,lazy_refcounts=on none --jobs 4 --max-io 256k'
		'pair-16k-ext pair 6M cluster_size=16k,extended_l2=on none --jobs 2'
		'file-64k-snapshot ext4 6M cluster_size=64k none+snapshot --jobs 2'
		'file-4k-data-lazy ext4 6M cluster_size=4k,lazy_refcounts=on none+data --jobs 4'
		'file-4k-data-raw ext4 6M cluster_size=4k,data_file_raw=on none+data --jobs 4'
		'file-4k-aes-packed ext4 4M cluster_size=4k packed+aes --jobs 2 --max-io 256k'
		'xfs-64k-data xfs 6M cluster_size=64k none+data --jobs 2'
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
again=$WORK/again
mkdir "$again"

# read_case CASE: sets the variables of one.
read_case() {
	read -r name mode size options chain args <<<"$1"
	read -ra args <<<"$args"
	dir=$WORK/$name
	# What QEMU needs to open the image, besides its file
	opened=''
	encrypt=''
	case $chain in
	*+luks*) encrypt=luks ;;
	*+aes*) encrypt=aes ;;
	esac
	[[ ! $encrypt ]] || opened+=,encrypt.format=$encrypt,encrypt.key-secret=key
	data=''
	if [[ $mode == pair || $chain == *+data* ]]; then
		data=1
	fi
}

# on_image PROGRAM ARGUMENT...: qemu-img or qemu-io on the image in this directory,
# whose name comes last.
on_image() {
	local secret=()

	[[ ! $encrypt ]] || secret=(--object 'secret,id=key,file=key')
	if [[ $1 == qemu-img ]]; then
		qemu-img "$2" "${secret[@]}" "${@:3}" "${image_json:?}"
	else
		qemu-io "${secret[@]}" "${@:2}" "${image_json:?}"
	fi
}

# make_storage: storage.raw, before.raw and initial.raw of the case
make_storage() (
	local base=() secret=() image_json how=$options

	mkdir "$dir" && cd "$dir" || exit
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
	image_json='"driver":"qcow2","file.filename":"image"'
	if [[ $encrypt ]]; then
		printf 'a passphrase' >key
		secret=(--object 'secret,id=key,file=key')
		how+=,encrypt.format=$encrypt,encrypt.key-secret=key
		[[ $encrypt != luks ]] || how+=,encrypt.iter-time=10
		image_json+=",\"encrypt.format\":\"$encrypt\",\"encrypt.key-secret\":\"key\""
	fi
	image_json="json:{$image_json}"
	[[ ! $data ]] || how+=,data_file=image.data
	qemu-img create -q "${secret[@]}" -f qcow2 "${base[@]}" -o "$how" image "$size"
	if [[ $chain == *packed* ]]; then
		truncate -s "$size" packed.raw
		qcow-diff --quiet --no-final --ops 60 --max-io 512k --seed 1002 \
			--mix write=3,punch=1 packed.raw
		on_image qemu-io -c "write -q -c -s packed.raw 0 $size"
		rm packed.raw
	fi
	if [[ $chain == *snapshot* ]]; then
		on_image qemu-io -c 'write -q -P 0x61 0 1M' -c 'write -q -P 0x62 2000k 1500k' \
			-c 'write -q -z 2200k 200k'
		on_image qemu-img snapshot -c one
		on_image qemu-io -c 'write -q -P 0x63 300k 300k'
	fi
	if [[ $chain == *+bitmap* ]]; then
		qemu-img bitmap --add -g 512 image map
		qemu-io -f qcow2 -c 'write -q -P 0x64 1M 64k' image
		qemu-img bitmap --add -g 64k image other
	fi
	qemu-img convert "${secret[@]}" -O raw "$image_json" initial.raw
	case $mode in
	block)
		mv image storage.raw
		truncate -s $(($(numfmt --from=iec "$size") * 2 + (20 << 20))) storage.raw
		;;
	pair)
		qemu-img amend -f qcow2 -o data_file=/dev/mapper/data image
		mv image storage.raw
		truncate -s 16M storage.raw
		truncate -s "$size" image.data
		cat image.data >>storage.raw
		;;
	ext4)
		mkdir files
		mv image* files/
		truncate -s 48M storage.raw
		mke2fs -q -t ext4 -b 4096 -J size=4 -E lazy_itable_init=0 -d files storage.raw
		rm -r files
		;;
	xfs)
		truncate -s 64M storage.raw
		printf '%s\n' / '0 0' 'd--755 0 0' "image ---644 0 0 $PWD/image" >files
		[[ ! $data ]] || echo "image.data ---644 0 0 $PWD/image.data" >>files
		echo '$' >>files
		mkfs.xfs --unsupported -q -p files -d agcount=1 storage.raw
		rm image*
		;;
	esac
	cp --sparse=always storage.raw before.raw
)

# replay_args: what replay needs for the case, but for the log
replay_args() {
	REPLAY=(replay --base "$dir/before.raw" --history "$dir/history" --initial
		"$dir/initial.raw" --seed "$seed" --name "$name")
	[[ ! $opened ]] || REPLAY+=(--options "$opened" --key "$dir/key")
	case $mode in
	pair) REPLAY+=(--split $((16 << 20))) ;;
	ext4 | xfs)
		REPLAY+=(--file /image)
		[[ ! $data ]] || REPLAY+=(--data /image.data)
		;;
	esac
}

# states_of: of the case; mounting in a guest takes its time.
states_of() {
	if [[ $mode == xfs ]]; then
		echo $(((states + 9) / 10))
	else
		echo "$states"
	fi
}

# prepare: make the image of the case, and say how to record it.
prepare() {
	local slot=$1 status attach=() load=() replay=()

	# Not as a condition: there `set -e` does nothing.
	make_storage >"$WORK/.out" 2>&1
	status=$?
	if ((status)); then
		fail "$name: make the image"
		diag "$(<"$WORK/.out")"
		return 1
	fi
	[[ $chain != *+compress* ]] || attach+=(--compress)
	[[ ! $encrypt ]] || attach+=(--key-file "$dir/key")
	printf '%s\n' "${attach[@]}" | sed '/^$/d' >"$again/$name.attach"
	[[ $mode != pair ]] || attach+=(--data-file /dev/mapper/data)
	load=(--seed "$seed" --ops "$ops" --mix "$mix"
		--cluster "$(sed 's/cluster_size=//; s/,.*//' <<<"$options")" "${args[@]}")
	if [[ $mode == xfs ]]; then
		mkdir "$dir/states"
		replay_args
		replay=("$WORK/${REPLAY[0]}" "${REPLAY[@]:1}" --states "$(states_of)"
			--extract "$dir/states")
	fi
	printf '%s=%q\n' mode "$mode" slot "$slot" split $((16 << 11)) \
		sectors $(($(stat -c %s "$dir/storage.raw") / 512)) >"$dir/load"
	printf '%s=(%s)\n' attach "${attach[*]@Q}" load "${load[*]@Q}" \
		replay "${replay[*]@Q}" >>"$dir/load"
	dd if="$dir/storage.raw" of="$WORK/storage.raw" bs=1M seek=$((slot * 64)) \
		conv=notrunc,sparse status=none
	rm "$dir/storage.raw"
}

# check_case: the states of a case that was recorded
check_case() {
	local slot=$1 log n at of left from=()

	n=$(states_of)
	if ! is "$name: the load runs" "$([[ ! -e $dir/recorded ]] || echo 1)" 1; then
		return
	fi
	log=(--log "$WORK/log.raw" --log-at $((slot << 29)))
	replay_args
	[[ $mode != xfs ]] || from=(--extracted "$dir/states")
	"${REPLAY[@]}" "${log[@]}" "${from[@]}" --states "$n" --scratch "$fast" \
		--keep "$again" --kept "$kept" >"$WORK/.replay" 2>&1
	is "$name: the states after a power cut are good" $? 0
	diag "$(head -n 100 "$WORK/.replay")"
	read -r n at of _ left _ < <(sed -En \
		'/^# [0-9]+ distinct states/s/[^0-9]+/ /gp' "$WORK/.replay")
	is "$name: one is at each flush" "$((at + left)) of ${of:-none}" "$of of $of"
	((total += ${n:-0}))
	if [[ $options == *lazy_refcounts=on* ]]; then
		like "$name: some of them were repaired" "$(<"$WORK/.replay")" \
			' states were marked dirty'
	fi
	[[ $mode != xfs ]] || return
	"${REPLAY[@]}" "${log[@]}" --states 24 --forget-flush --scratch "$fast" \
		>"$WORK/.replay" 2>&1
	is "$name: the check can fail" $? 1
}

# leaks IMAGE-OPTIONS: how many clusters QEMU finds leaked, or what else it finds
leaks() {
	qemu-img check --output=json --object secret,id=key,file="$key" --image-opts "$1" \
		>"$WORK/.check" 2>&1
	case $? in
	0 | 3) sed -n '/"leaks"/!b;s/[^0-9]//g;p' "$WORK/.check" | grep . || echo 0 ;;
	*) cat "$WORK/.check" ;;
	esac
}

# check_again: those states of the case that the guest has written on
check_again() {
	local image state before after wrong='' n=0 key=/dev/null

	[[ ! $encrypt ]] || key=$dir/key
	for image in "$again/$name".*.image; do
		state=${image%.image}
		if [[ ! -e $state.final ]]; then
			wrong+="${state##*.}: it was not written; "
			continue
		fi
		before=$(<"$state.leaks")
		after=$(leaks "$(image_opts "$state")")
		[[ $after =~ ^[0-9]+$ ]] && ((after <= before)) ||
			wrong+="${state##*.}: $before leaks before, then $after; "
		qemu-img compare --object secret,id=key,file="$key" --image-opts \
			"$(image_opts "$state")" driver=raw,file.filename="$state.final" \
			>"$WORK/.check" 2>&1 || wrong+="${state##*.}: $(<"$WORK/.check"); "
		((n++))
	done
	is "$name: $n of them attached, read, written and detached" "$wrong" ''
}

image_opts() {
	local text=driver=qcow2,file.filename=$1.image$opened

	[[ ! $data ]] || text+=,data-file.driver=file,data-file.filename=$1.data
	echo "$text"
}

wanted=()
for case in "${CASES[@]}"; do
	if (($# == 0)) || [[ " $* " == *" ${case%% *} "* ]]; then
		wanted+=("$case")
	fi
done
diag "seed $seed"
total=0
dirs=()
truncate -s $((${#wanted[@]} * 64))M "$WORK/storage.raw"
truncate -s $((${#wanted[@]} * 512))M "$WORK/log.raw"
for slot in "${!wanted[@]}"; do
	read_case "${wanted[slot]}"
	! prepare "$slot" || dirs+=("$dir")
done
# shellcheck disable=SC2086 # options
ok "the guest records" "$tree/tests/guest/run" -k "$kernel" ${GUEST_ARGS-} \
	-t 3600 -d "$WORK" -D "$WORK/storage.raw" -D "$WORK/log.raw" \
	-- env QCOW_NO_INLINE="${QCOW_NO_INLINE-}" tests/crash/record "${dirs[@]}"
diag "$(<"$WORK/.out")"
diag "recorded after $SECONDS s"
for slot in "${!wanted[@]}"; do
	read_case "${wanted[slot]}"
	[[ ! -e $dir/load ]] || check_case "$slot"
done
diag "totals: states=$total"
(($#)) || ok "there are 200 at least" test "$total" -ge 200
diag "they are distinct; after $SECONDS s"

# Leaks are allowed after a power cut; more of them are not. Where the file had not grown
# yet, QEMU sees those behind its end only in one that has.
for case in "${wanted[@]}"; do
	read_case "$case"
	key=/dev/null
	[[ ! $encrypt ]] || key=$dir/key
	for image in "$again/$name".*.image; do
		[[ -e $image ]] || continue
		cp --sparse=always "$image" "$fast/grown.image"
		truncate -s +16M "$fast/grown.image"
		[[ ! $data ]] || cp --sparse=always "${image%.image}.data" "$fast/grown.data"
		leaks "$(image_opts "$fast/grown")" >"${image%.image}.leaks"
		rm "$fast"/grown.*
	done
done
# shellcheck disable=SC2086 # options
ok "a guest attaches some of them" "$tree/tests/guest/run" -k "$kernel" ${GUEST_ARGS-} \
	-t 3600 -d "$WORK" -- env QCOW_NO_INLINE="${QCOW_NO_INLINE-}" tests/crash/again "$again"
for case in "${wanted[@]}"; do
	read_case "$case"
	check_again
done
if [[ ${QCOW_KEEP-} ]]; then
	cp -r --sparse=always "$WORK/." "$QCOW_KEEP/"
fi
diag "$SECONDS s"
done_testing
