#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Images that QEMU made by chance, of all options and with a past of any kind, read as QEMU reads them, snapshots too, and can be written.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 1200
# memory: 2048

# usage: random-images.t [NUMBER]...
# QCOW_SOAK=1 makes 200 images, QCOW_IMAGES=N makes N, QCOW_SEED=N others; each
# can be made again by its number.
#
# cells.sh draws images as well, to vary how they are attached and written: what
# was in them before is the same for all. Here it is the past that varies.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

# draw N: sets DRAWN, 0 to N - 1
draw() {
	DRAWN=$(((RANDOM << 15 | RANDOM) % $1))
}

# draw_range SECTORS: sets RANGE, bytes "OFFSET LENGTH" within so many sectors
draw_range() {
	local at longest

	draw "$1"
	at=$DRAWN
	pick 8 128 128 1024 2048
	longest=$PICKED
	if ((longest > $1 - at)); then
		longest=$(($1 - at))
	fi
	draw "$longest"
	RANGE="$((at * 512)) $(((DRAWN + 1) * 512))"
}

# draw_clusters SECTORS CLUSTER: the same, of whole clusters
draw_clusters() {
	local clusters=$(($1 * 512 / $2)) at

	RANGE=
	((clusters)) || return
	draw "$clusters"
	at=$DRAWN
	draw $((clusters - at < 16 ? clusters - at : 16))
	RANGE="$((at * $2)) $(((DRAWN + 1) * $2))"
}

# draw_requests COUNT FILE SECTORS CLUSTER VERSION DATA: by one qemu-io. Those that
# the image cannot do, like compressing over what is there, fail.
draw_requests() {
	local i c=()

	for ((i = 0; i < $1; i++)); do
		draw_range "$3"
		draw 255
		pick write write write packed packed zero zero unmap discard discard
		case $PICKED in
		write) c+=(-c "write -P $((DRAWN + 1)) $RANGE") ;;
		packed)
			draw_clusters "$3" "$4"
			if [[ $RANGE && $6 == none ]]; then
				c+=(-c "write -c -P $((DRAWN % 255 + 1)) $RANGE")
			fi
			;;
		zero) c+=(-c "write -z $RANGE") ;;
		unmap) c+=(-c "write -z -u $RANGE") ;;
		discard) c+=(-c "discard $RANGE") ;;
		esac
	done
	printf '%s ' "$2:" "${c[@]}"
	echo
	qemu-io -f qcow2 -d unmap "${c[@]}" "$2" 2>&1 | grep -vE '^(wrote|discard) |ops; '
	return 0
}

# draw_base: a backing file or none; sets BASE and BASE_FMT
draw_base() {
	local layers i sectors cs name below=

	BASE='' BASE_FMT=
	pick 0 0 0 1 1 2 3
	layers=$PICKED
	for ((i = 0; i < layers; i++)); do
		draw 20000
		sectors=$((DRAWN + 2000))
		name=layer$i
		if ((i == 0)); then
			pick raw qcow2
			if [[ $PICKED == raw ]]; then
				draw 512
				echo "layer0: raw, $((sectors * 512 - DRAWN)) bytes"
				make_raw layer0 $((sectors * 512)) $DRAWN &&
					truncate -s $((sectors * 512 - DRAWN)) layer0 || return
				below=layer0 BASE=layer0 BASE_FMT=raw
				continue
			fi
		fi
		pick 512 4k 64k 256k
		cs=$PICKED
		pick compression_type=zlib compression_type=zstd lazy_refcounts=on compat=0.10
		if [[ $cs == *[46]*k ]]; then
			pick "$PICKED" extended_l2=on
			[[ $cs != 4k ]] || PICKED=compat=1.1
		fi
		echo "$name: qcow2, cluster_size=$cs,$PICKED, $((sectors * 512)) bytes"
		qemu-img create -q -f qcow2 ${below:+-b "$below" -F "$BASE_FMT"} \
			-o "cluster_size=$cs,$PICKED" $name $((sectors * 512)) || return
		draw_requests 8 $name $sectors "$(to_bytes "$cs")" 3 none
		below=$name BASE=$name BASE_FMT=qcow2
	done
}

# tried CMD...: what may fail in some images; it says so
tried() {
	echo "$*"
	"$@" || echo "... failed"
}

# draw_action: one thing that happened to the image
draw_action() {
	pick requests requests requests requests snapshot snapshot delete grow rebase \
		commit bitmap
	case $PICKED in
	requests)
		draw 6
		draw_requests $((DRAWN + 2)) image.qcow2 "$sectors" "$cluster" "$v" "$data"
		;;
	snapshot)
		if [[ $data == none ]]; then
			snapshots=$((snapshots + 1))
			tried qemu-img snapshot -c "snap$snapshots" image.qcow2
		fi
		;;
	delete)
		if ((snapshots)); then
			draw $snapshots
			tried qemu-img snapshot -d "snap$((DRAWN + 1))" image.qcow2 2>/dev/null
		fi
		;;
	grow)
		if [[ ! $(snapshot_names) ]]; then
			draw 3000
			tried qemu-img resize -q image.qcow2 "+$(((DRAWN + 1) * 512))" &&
				sectors=$(($(qemu-img info --output=json image.qcow2 |
					jq '."virtual-size"') / 512))
		fi
		;;
	rebase)
		if [[ $data != raw && $BASE ]]; then
			# To the layer below, or to none at all
			pick '' layer0
			if [[ $PICKED == "$BASE" || ! $PICKED ]]; then
				tried qemu-img rebase -b '' image.qcow2
				BASE=
			else
				tried qemu-img rebase -b layer0 \
					-F "$(qemu-img info --output=json layer0 | jq -r .format)" image.qcow2
				BASE=layer0
			fi
		fi
		;;
	commit)
		rm -f above.qcow2
		qemu-img create -q -f qcow2 -b image.qcow2 -F qcow2 above.qcow2 &&
			draw_requests 4 above.qcow2 "$sectors" 65536 3 none &&
			tried qemu-img commit -q above.qcow2
		rm -f above.qcow2
		;;
	bitmap)
		if ((v == 3)); then
			bitmaps=$((bitmaps + 1))
			tried qemu-img bitmap --add image.qcow2 "bitmap$bitmaps"
		fi
		;;
	esac
}

snapshot_names() {
	qemu-img info --output=json image.qcow2 | jq -r '.snapshots // [] | .[].name'
}

bitmap_states() {
	qemu-img info --output=json image.qcow2 | jq -c '."format-specific".data.bitmaps'
}

# draw_image: image.qcow2, and all that belongs to it, in the current directory
draw_image() {
	local v cs cluster options pre data=none odd i count

	pick 3 3 3 3 2
	v=$PICKED
	pick 512 1k 4k 16k 64k 64k 256k 2M
	cs=$PICKED
	cluster=$(to_bytes "$cs")
	draw_base || return
	draw 16000
	sectors=$((DRAWN + 2000))
	options=cluster_size=$cs
	if ((v == 2)); then
		options+=,compat=0.10
	else
		pick 1 2 4 8 16 16 32 64
		options+=,refcount_bits=$PICKED
		pick off on
		options+=,lazy_refcounts=$PICKED
		pick zlib zstd
		options+=,compression_type=$PICKED
		if ((cluster >= 16384)); then
			pick off on
			options+=,extended_l2=$PICKED
		fi
		pick none none none file raw
		data=$PICKED
		if [[ $data != none ]]; then
			options+=,data_file=image.qcow2.data
		fi
		if [[ $data == raw ]]; then
			BASE=''
			options+=,data_file_raw=on
		fi
	fi
	pick off off metadata falloc full
	pre=$PICKED
	if [[ $BASE && $options != *extended_l2=on* ]] ||
		[[ $data == raw && $pre == off ]]; then
		pre=off
		[[ $data != raw ]] || pre=metadata
	fi
	options+=,preallocation=$pre
	echo "image.qcow2: $options, ${BASE:-no base}, $((sectors * 512)) bytes"
	qemu-img create -q -f qcow2 ${BASE:+-b "$BASE" -F "$BASE_FMT"} -o "$options" \
		image.qcow2 $((sectors * 512)) || return

	snapshots=0 bitmaps=0
	draw 12
	count=$((DRAWN + 4))
	for ((i = 0; i < count; i++)); do
		draw_action || return
	done
	# Actions that failed leave leaks.
	if ! is_clean image.qcow2 >/dev/null; then
		for ((i = 1; i <= bitmaps; i++)); do
			qemu-img bitmap --remove image.qcow2 "bitmap$i"
		done
		bitmaps=0
		qemu-img check -q -r leaks image.qcow2
	fi
	is_clean image.qcow2 || { echo "QEMU left that"; return 1; }
	draw 4
	odd=$DRAWN
	if ((odd == 0)) && [[ ! $(snapshot_names) ]]; then
		echo "a size that is 300 bytes less"
		put_bytes image.qcow2 24 "$(printf %016x $((sectors * 512 - 300)))"
		sectors=$((sectors - 1))
	fi
	DATA=$data
}

# reads_as RAW ATTACH-OPTION...: the device reads like that file
reads_as() {
	local raw=$1 status
	shift

	if ! try_attach "$@" "$PWD/image.qcow2"; then
		cat "$WORK/.err"
		return 1
	fi
	qcow-diff --quiet --verify-only --mirror-in "$raw" "$DEV"
	status=$?
	try_detach || return
	return $status
}

# snapshots_read: each as qemu-img reads it
snapshots_read() {
	local name

	for name in $(snapshot_names); do
		echo "snapshot $name"
		qemu-img convert -f qcow2 -l "snapshot.name=$name" -O raw image.qcow2 \
			".$name" || return
		reads_as ".$name" --snapshot="$name" || return
		SNAPSHOTS_READ=$((SNAPSHOTS_READ + 1))
	done
}

# snapshots_kept: qemu-img reads each as it did then
snapshots_kept() {
	local name

	for name in $(snapshot_names); do
		echo "snapshot $name, after writes"
		qemu-img convert -f qcow2 -l "snapshot.name=$name" -O raw image.qcow2 .now ||
			return
		cmp ".$name" .now || return
	done
}

image_steps() {
	local sectors snapshots bitmaps before states sum jobs cache cs

	RANDOM=$(($1 % 32768))
	: $RANDOM $RANDOM
	draw_image || return
	qemu-img convert -f qcow2 -O raw image.qcow2 want.raw || return
	truncate -s $((sectors * 512)) want.raw
	# QEMU lets a raw data file keep what is discarded.
	if [[ $DATA == raw ]] && ! cmp -n $((sectors * 512)) want.raw image.qcow2.data; then
		DATA=stale
	fi
	states=$(bitmap_states)
	before=$(layers_stamp)
	sum=$(cat image.qcow2* | cksum)
	reads_as want.raw --read-only || { echo "it reads otherwise"; return 1; }
	snapshots_read || { echo "that reads otherwise"; return 1; }
	if [[ $(cat image.qcow2* | cksum) != "$sum" ]]; then
		echo "reading changed it"
		return 1
	fi

	pick 1 4
	jobs=$PICKED
	pick '' 64K
	cache=$PICKED
	pick unmap unmap keep ignore
	echo "attach --discard=$PICKED ${cache:+--cache-size=$cache}, $jobs jobs"
	if ! try_attach --discard="$PICKED" ${cache:+--cache-size="$cache"} \
		"$PWD/image.qcow2"; then
		cat "$WORK/.err"
		return 1
	fi
	cs=$(<"/sys/block/${DEV#/dev/}/qcow/cluster_size")
	if ! qcow-diff --seed "$1" --ops "$ops" --jobs "$jobs" --max-io 256k --cluster "$cs" \
		--mirror-in want.raw --mirror-out mirror.raw "$DEV"; then
		try_detach
		return 1
	fi
	try_detach || { cat "$WORK/.err"; return 1; }
	if [[ $(layers_stamp) != "$before" ]]; then
		echo "a file below the image changed"
		return 1
	fi
	if [[ $(bitmap_states) != "$states" ]]; then
		echo "the bitmaps are $(bitmap_states), and were $states"
		return 1
	fi
	is_clean image.qcow2 &&
		qemu-img compare -f raw -F qcow2 mirror.raw image.qcow2 || return
	if [[ $DATA == raw ]]; then
		cmp -n "$(stat -c %s mirror.raw)" mirror.raw image.qcow2.data || return
	fi
	snapshots_kept
}

# one_image NUMBER: one result
one_image() {
	local dir status

	dir=$(mktemp -d "$WORK/image.XXXXXX")
	pushd "$dir" >/dev/null || return
	image_steps "$1" >"$WORK/.image" 2>&1
	status=$?
	popd >/dev/null || return
	IMAGES=$((IMAGES + 1))
	if ((status == 0)); then
		pass "image $1: $(sed -n 's/^image.qcow2: \(cluster.*\)/\1/p' "$WORK/.image")"
		if [[ ${QCOW_VERBOSE-} ]]; then
			diag "$(<"$WORK/.image")"
		fi
	else
		fail "image $1"
		diag "again: random-images.t $1"
		diag "$(head -n 120 "$WORK/.image")"
		if [[ ${QCOW_KEEP-} ]]; then
			cp -r "$dir" "$QCOW_KEEP"
		fi
	fi
	rm -rf "$dir"
}

need_driver
IMAGES=0 SNAPSHOTS_READ=0
ops=300 count=$((20 / SHARE))
if [[ ${QCOW_SOAK-} ]]; then
	count=200
elif [[ $QUICK ]]; then
	count=5 ops=150
fi
count=${QCOW_IMAGES:-$count}
if (($#)); then
	for number; do
		one_image "$number"
	done
else
	for ((number = 0; number < count; number++)); do
		one_image $((${QCOW_SEED:-1} * 1000 + number))
	done
fi
diag "totals: images=$IMAGES requests=$((IMAGES * ops)) snapshots=$SNAPSHOTS_READ"
no_kernel_report
done_testing
