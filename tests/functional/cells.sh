# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Cells of the differential test: make an image, run qcow-diff on the attached
# device, compare. A cell is a list KEY=VALUE,... and can be run alone by its
# name. Keys, with defaults:
#
#   v=3              version of the format
#   cs=64k           cluster size
#   ext=0            1: extended L2 entries, for subclusters
#   rc=16            refcount bits
#   pre=off          preallocation: off, metadata, falloc
#   chain=none       none; raw; qcow2 (base of another cluster size); short and
#                    long (a raw base that is shorter or longer); odd (one that
#                    does not end with a sector); deep (three layers, of which the
#                    middle one is shorter); zero (a qcow2 base with zero clusters
#                    over data); packed (a qcow2 base that is compressed)
#   data=none        none; file or raw: an external data file
#   enc=none         luks or aes: it is encrypted
#   packed=          zlib or zstd: QEMU wrote most of it compressed
#   snap=0           1: internal snapshots exist, so that clusters are shared
#   init=0           1: QEMU wrote data, zeroes and discards to it before
#   size=8M          bytes; need not be a multiple of anything
#   discard=unmap    option of qcowctl attach
#   io=auto          option of qcowctl attach; buffered puts the image on tmpfs
#   cache=           option --cache-size of qcowctl attach
#   compress=        zlib or zstd: option of qcowctl attach
#   inline=yes       no: option --no-inline of qcowctl attach
#   jobs=1           threads that race
#   dev=direct       buffered: I/O to the device through the page cache
#   hot=             only touch this much of the start
#   seed=, ops=      of qcow-diff
#
# QCOW_MIX in the environment is qcow-diff's --mix.

# shellcheck source=tests/functional/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CELL_OPS=${QCOW_OPS:-$((5000 / SHARE))}
OPS_DONE=0
CELLS_DONE=0

to_bytes() {
	case $1 in
	*k) echo $((${1%k} * 1024)) ;;
	*M) echo $((${1%M} * 1024 * 1024)) ;;
	*) echo "$1" ;;
	esac
}

# put_bytes FILE OFFSET HEX...: pokes bytes into a file.
put_bytes() {
	local file=$1 offset=$2 hex
	shift 2
	hex=$(printf '%s' "$@")

	# shellcheck disable=SC2001
	printf '%b' "$(sed 's/../\\x&/g' <<<"$hex")" |
		dd of="$file" bs=1 seek="$offset" conv=notrunc status=none
}

# A raw file of $2 bytes with data and holes, of seed $3.
make_raw() {
	truncate -s "$2" "$1" &&
		qcow-diff --quiet --no-final --buffered --ops 60 --max-io 512k --seed "$3" \
			--mix write=3,punch=1 "$1"
}

# on_image PROGRAM ARGUMENT...: qemu-img or qemu-io on the cell's image.qcow2, whose
# name comes last, or, where there is another file in the end, before that.
on_image() {
	local name=image.qcow2 secret=() behind=() program=()

	if [[ $enc != none ]]; then
		name='json:{"driver":"qcow2","file.filename":"image.qcow2",'
		name+="\"encrypt.format\":\"$enc\",\"encrypt.key-secret\":\"key\"}"
		secret=(--object 'secret,id=key,file=key')
	fi
	program=("$1")
	shift
	if [[ ${program[0]} == qemu-img ]]; then
		program+=("$1")
		shift
	fi
	if [[ ${program[1]-} == convert || ${program[1]-} == compare ]]; then
		behind=("${*: -1}")
		set -- "${@:1:$#-1}"
	fi
	"${program[@]}" "${secret[@]}" "$@" "$name" "${behind[@]}"
}

# is_clean_image: qemu-img check finds nothing at all in it.
is_clean_image() {
	on_image qemu-img check >.check 2>&1 && grep -q 'No errors were found' .check &&
		! grep -qi 'leak' .check && return 0
	cat .check
	return 1
}

# Makes image.qcow2 in the current directory by the cell's variables.
make_image() {
	local bytes base='' base_fmt='' full cluster other options
	local c=() secret=()

	bytes=$(to_bytes "$size")
	full=$(((bytes + 511) / 512 * 512))
	cluster=$(to_bytes "$cs")
	# A base whose clusters are neither aligned nor equal to the image's.
	other=4096
	if ((cluster <= 4096)); then
		other=65536
	fi

	case $chain in
	none) ;;
	raw)
		make_raw base.raw "$full" 1001 || return
		base=base.raw base_fmt=raw
		;;
	short)
		make_raw base.raw $((full / 2 + 3 * 512)) 1002 || return
		base=base.raw base_fmt=raw
		;;
	odd)
		make_raw base.raw $((full / 2)) 1002 &&
			truncate -s -100 base.raw || return
		base=base.raw base_fmt=raw
		;;
	long)
		make_raw base.raw $((full + 1048576 + 512)) 1003 || return
		base=base.raw base_fmt=raw
		;;
	qcow2)
		make_raw tmp.raw "$full" 1004 &&
			qemu-img convert -f raw -O qcow2 -o "cluster_size=$other" \
				tmp.raw base.qcow2 || return
		base=base.qcow2 base_fmt=qcow2
		;;
	packed)
		make_raw tmp.raw "$full" 1006 &&
			qemu-img convert -c -f raw -O qcow2 \
				-o "cluster_size=$other,compression_type=zstd" \
				tmp.raw base.qcow2 && rm tmp.raw || return
		base=base.qcow2 base_fmt=qcow2
		;;
	deep | zero)
		make_raw low.raw "$full" 1005 &&
			qemu-img create -q -f qcow2 -b low.raw -F raw -o "cluster_size=$other" \
				base.qcow2 $((full * 3 / 4 / 512 * 512 - 512)) &&
			qemu-io -f qcow2 -c 'write -q -P 0x51 1000k 300k' \
				-c 'write -q -z 512k 200k' \
				-c 'write -q -z -u 2000k 777k' \
				-c 'write -q -P 0x52 2100k 5k' base.qcow2 || return
		base=base.qcow2 base_fmt=qcow2
		if [[ $chain == deep ]]; then
			qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 \
				-o cluster_size=16k mid.qcow2 "$full" &&
				qemu-io -f qcow2 -c 'write -q -P 0x53 3000k 99k' \
					-c 'write -q -z -u 1100k 100k' mid.qcow2 || return
			base=mid.qcow2
		fi
		;;
	*)
		echo "chain=$chain?"
		return 1
		;;
	esac

	options=cluster_size=$cs,refcount_bits=$rc,preallocation=$pre
	if [[ $v == 2 ]]; then
		options+=,compat=0.10
	else
		options+=,compat=1.1
	fi
	if ((ext)); then
		options+=,extended_l2=on
	fi
	case $data in
	file) options+=,data_file=image.qcow2.data ;;
	raw) options+=,data_file=image.qcow2.data,data_file_raw=on ;;
	esac
	if [[ $enc != none ]]; then
		printf 'a passphrase of %s' "$enc" >key
		secret=(--object 'secret,id=key,file=key')
		options+=,encrypt.format=$enc,encrypt.key-secret=key
	fi
	if [[ $enc == luks ]]; then
		options+=,encrypt.iter-time=10
	fi
	if [[ $packed == zstd || $compress == zstd ]]; then
		options+=,compression_type=zstd
	fi
	qemu-img create -q "${secret[@]}" -f qcow2 ${base:+-b "$base" -F "$base_fmt"} \
		-o "$options" image.qcow2 "$full" || return

	if [[ $packed ]]; then
		# Some of it noise, which is not made smaller.
		make_raw tmp.raw "$full" 1007 &&
			dd if=/dev/urandom of=tmp.raw bs=4k seek=700 count=40 \
				conv=notrunc status=none &&
			on_image qemu-io -c "write -q -c -s tmp.raw 0 \
				$((full * 3 / 4 / cluster * cluster))" && rm tmp.raw || return
	fi
	if ((init || snap)); then
		c=(-c 'write -q -P 0x61 0 100k' -c 'write -q -P 0x62 1500k 1M'
			-c 'write -q -P 0x63 3900k 3k')
		if [[ $v == 3 ]]; then
			c+=(-c 'write -q -z 1600k 130k' -c 'write -q -z -u 1800k 130k'
				-c 'discard -q 2M 256k')
		fi
		on_image qemu-io -d unmap "${c[@]}" || return
	fi
	if ((snap)); then
		on_image qemu-img snapshot -c one &&
			on_image qemu-io -c 'write -q -P 0x71 64k 64k' \
				-c 'write -q -P 0x72 1700k 10k' \
				-c 'write -q -P 0x73 3500k 200k' &&
			on_image qemu-img snapshot -c two || return
	fi
	if ((full != bytes)); then
		put_bytes image.qcow2 24 "$(printf %016x "$bytes")" || return
	fi
}

# layers_stamp: changes when a file below the image does.
layers_stamp() {
	find . -type f ! -name 'image.qcow2*' ! -name 'mirror*' ! -name '.*' \
		-printf '%p %s %T@\n' | sort
}

# cell_steps: the cell in variables; its output is shown when it fails.
cell_steps() {
	local mirror=() before after args=() how=() out

	make_image || { echo "could not make the image"; return 1; }
	# What is only set aside does not decrypt to zeroes.
	if ((init || snap)) || [[ $packed || $chain != none || $enc$pre != none* ]]; then
		on_image qemu-img convert -O raw mirror-in.raw || return
		mirror=(--mirror-in mirror-in.raw)
	fi
	before=$(layers_stamp)

	[[ $inline == yes ]] || how=(--no-inline)
	[[ $enc == none ]] || how+=(--key-file key)
	if ! try_attach --discard="$discard" --io="$io" \
		${cache:+--cache-size "$cache"} ${compress:+--compress="$compress"} \
		"${how[@]}" \
		"$PWD/image.qcow2"; then
		cat "$WORK/.err"
		echo "attach failed"
		return 1
	fi
	if [[ $dev == buffered ]]; then
		args+=(--buffered)
	fi
	if [[ ${QCOW_MIX-} ]]; then
		args+=(--mix "$QCOW_MIX")
	fi
	if ! out=$(qcow-diff --seed "$seed" --ops "$ops" --jobs "$jobs" \
		--cluster "$cs" ${hot:+--hot "$hot"} "${args[@]}" "${mirror[@]}" \
		--mirror-out mirror.raw "$DEV" 2>&1); then
		printf '%s\n' "$out"
		echo "qcow-diff failed"
		try_detach
		return 1
	fi
	printf '%s\n' "$out"
	echo "cache_misses $(<"/sys/block/${DEV#/dev/}/qcow/cache_misses")"
	if ! try_detach; then
		cat "$WORK/.err"
		echo "detach failed"
		return 1
	fi
	if [[ $discard == ignore ]]; then
		if grep -q ' discard=[1-9]' <<<"$out" &&
			! grep -Eq ' discard=([0-9]+)\(\1 refused' <<<"$out"; then
			echo "--discard=ignore, but it has discard"
			return 1
		fi
	elif [[ $v == 2 && $chain != none ]]; then
		# Version 2 cannot say "zeroes" over a backing file.
		:
	elif grep -Eq ' discard=[0-9]+\([0-9]+ refused' <<<"$out"; then
		echo "discards were refused"
		return 1
	fi
	after=$(layers_stamp)
	if [[ $before != "$after" ]]; then
		echo "a file below the image changed: $before / $after"
		return 1
	fi
	is_clean_image || return
	on_image qemu-img compare -F raw mirror.raw || return
	if [[ $data == raw && $enc == none ]]; then
		cmp -n "$(stat -c %s mirror.raw)" mirror.raw image.qcow2.data || return
	fi
	if ((snap)); then
		# QEMU can still go back to the first snapshot. (For that a count
		# must have room for one more, and version 2 takes no change of
		# the size, which the snapshot has without the poke.)
		if ((rc >= 4)) &&
			((v == 3 || $(to_bytes "$size") % 512 == 0)); then
			on_image qemu-img snapshot -a one || return
		fi
		on_image qemu-img snapshot -d one &&
			on_image qemu-img snapshot -d two &&
			is_clean_image || return
	fi
}

# run_cell NAME: one result.
run_cell() {
	local v=3 cs=64k ext=0 rc=16 pre=off chain=none data=none enc=none snap=0 init=0 size=8M
	local packed='' discard=unmap io=auto cache='' compress='' jobs=1 dev=direct
	local inline=yes
	local hot='' seed=1
	local ops=$CELL_OPS pair dir status
	local -a pairs

	IFS=, read -ra pairs <<<"$1"
	for pair in "${pairs[@]}"; do
		case ${pair%%=*} in
		v | cs | ext | rc | pre | chain | data | enc | packed | snap | init | size | discard | \
			io | cache | compress | inline | jobs | dev | hot | seed | ops)
			printf -v "${pair%%=*}" %s "${pair#*=}"
			;;
		*)
			fail "$1: no such key: $pair"
			return 1
			;;
		esac
	done
	if [[ $io == buffered ]]; then
		dir=$(mktemp -d /tmp/cell.XXXXXX)
	else
		dir=$(mktemp -d "$WORK/cell.XXXXXX")
	fi
	pushd "$dir" >/dev/null || return
	cell_steps >"$WORK/.cell" 2>&1
	status=$?
	popd >/dev/null || return
	CELLS_DONE=$((CELLS_DONE + 1))
	OPS_DONE=$((OPS_DONE + ops))
	if ((status == 0)); then
		pass "$1"
		if [[ ${QCOW_VERBOSE-} ]]; then
			diag "$(<"$WORK/.cell")"
		fi
	else
		fail "$1"
		diag "again: differential.t $1"
		diag "$(head -n 80 "$WORK/.cell")"
		if [[ ${QCOW_KEEP-} ]]; then
			cp -r "$dir" "$QCOW_KEEP"
		fi
	fi
	rm -rf "$dir"
	return "$status"
}

# Sets CELL to one of the values.
pick() {
	local values=("$@")

	PICKED=${values[RANDOM % ${#values[@]}]}
}

# draw_cell N: a cell by chance, which is the same for the same N.
draw_cell() {
	local v cs ext=0 rc=16 pre=off chain data=none snap=0 size

	RANDOM=$(($1 % 32768))
	: $RANDOM $RANDOM
	pick 3 3 3 2
	v=$PICKED
	pick 512 1k 2k 4k 4k 64k 64k 64k 1M 2M
	cs=$PICKED
	if ((v == 3)); then
		pick 1 2 4 8 16 16 32 64
		rc=$PICKED
	fi
	case $v-$cs in
	3-64k | 3-?M)
		pick 0 1
		ext=$PICKED
		;;
	esac
	pick none none none raw qcow2 short long deep zero packed
	chain=$PICKED
	if [[ $chain == none ]]; then
		pick off off metadata falloc
		pre=$PICKED
	fi
	if ((v == 3)); then
		pick none none none file raw
		data=$PICKED
	fi
	if [[ $data == raw ]]; then
		chain=none pre=metadata
	fi
	if ((rc > 1)) && [[ $data == none ]]; then
		pick 0 0 1
		snap=$PICKED
	fi
	pick 8M 8M 8388908 8389120 12345678 6M
	size=$PICKED
	if [[ $cs == 2M ]]; then
		pick 24M 20971000
		size=$PICKED
	fi
	CELL="v=$v,cs=$cs,ext=$ext,rc=$rc,pre=$pre,chain=$chain,data=$data,snap=$snap,size=$size"
	pick 0 1
	CELL+=",init=$PICKED"
	pick unmap unmap ignore keep
	CELL+=",discard=$PICKED"
	pick auto auto direct buffered
	CELL+=",io=$PICKED"
	pick 1 1 4 8
	CELL+=",jobs=$PICKED"
	if ((PICKED == 1)); then
		pick direct direct direct buffered
		CELL+=",dev=$PICKED"
	else
		pick '' 256k 1M
		CELL+="${PICKED:+,hot=$PICKED}"
	fi
	# A count that packing has filled has no room for a snapshot.
	if [[ $data$pre == noneoff ]] && ((!snap || rc >= 16)); then
		pick '' '' zlib zstd
		if ((v == 2)); then
			PICKED=${PICKED:+zlib}
		fi
		CELL+="${PICKED:+,packed=$PICKED}"
	fi
	if ((rc > 1)) && [[ $data == none ]]; then
		pick '' '' '' zlib zstd
		if ((v == 2)); then
			PICKED=${PICKED:+zlib}
		fi
		# An image is of one type.
		if [[ $CELL == *,packed=* ]]; then
			PICKED=${PICKED:+${CELL#*,packed=}}
		fi
		CELL+="${PICKED:+,compress=$PICKED}"
	fi
	pick yes yes yes no
	CELL+=",inline=$PICKED"
	CELL+=",seed=$1"
}
