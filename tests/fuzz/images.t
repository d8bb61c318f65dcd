#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Images of every feature, damaged in every structure: attach, reads and writes end well or with EIO, and where QEMU finds nothing wrong nothing is.
# runs-on: host
# timeout: 1800

# usage: images.t [NAME:SEED]...
# QCOW_IMAGES=N tries N damaged images, QCOW_SEED=N others; QCOW_SOAK=1 a thousand, with
# a seed by chance. QCOW_KERNEL=NAME is another kernel, QCOW_KEEP=DIR keeps all files.
#
# QEMU judges the damaged images here, where it is not emulated; a guest tries them
# (trials), and what it wrote is judged here again.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/../functional/cells.sh"

fuzz=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$fuzz/../.." && pwd)
kernel=${QCOW_KERNEL:-6.1}
seed=${QCOW_SEED:-1}
count=${QCOW_IMAGES:-46}
if [[ ${QCOW_SOAK-} ]]; then
	count=${QCOW_IMAGES:-1000}
	seed=${QCOW_SEED:-$((RANDOM << 15 | RANDOM))}
fi

# The valid images: cells, see cells.sh, and what else is to be done
# shellcheck disable=SC2054 # commas inside names
IMAGES=(
	v=2,init=1,snap=1
	v=2,cs=512,chain=raw,init=1
	v=3,cs=512,rc=64,init=1,snap=1
	v=3,cs=4k,rc=1,init=1,packed=zlib
	v=3,cs=4k,rc=8,chain=qcow2,init=1,snap=1+bitmaps
	v=3,cs=4k,chain=deep,packed=zlib
	v=3,init=1,snap=1,packed=zstd
	v=3,ext=1,init=1,snap=1
	v=3,ext=1,chain=raw,packed=zstd,init=1+bitmaps
	v=3,cs=16k,ext=1,rc=32,chain=zero,init=1+bitmaps
	v=3,init=1,chain=qcow2+bitmaps+lazy
	v=3,cs=4k,init=1+lazy+dirty
	v=3,cs=2M,size=8M,init=1,snap=1
	v=3,cs=2M,size=8M,ext=1,packed=zstd
	v=3,cs=1k,pre=metadata
	v=3,pre=falloc,snap=1
	v=3,cs=4k,pre=full,init=1
	v=3,data=file,init=1,chain=short+bitmaps
	v=3,cs=4k,data=raw,pre=metadata
	v=3,ext=1,data=file,init=1
	v=3,cs=4k,enc=aes,init=1,snap=1,packed=zlib
	v=2,enc=aes,chain=raw,init=1
	v=3,enc=luks,init=1,snap=1
)

# make_valid NAME: in the current directory
# shellcheck disable=SC2034 # for make_image
make_valid() {
	local v=3 cs=64k ext=0 rc=16 pre=off chain=none data=none enc=none snap=0 init=0
	local size=4M packed='' compress='' pair cell=${1%%+*}
	local -a pairs

	IFS=, read -ra pairs <<<"$cell"
	for pair in "${pairs[@]}"; do
		printf -v "${pair%%=*}" %s "${pair#*=}"
	done
	make_image || return
	if [[ $1 == *+bitmaps* ]]; then
		qemu-img bitmap --add -g 512 image.qcow2 one &&
			qemu-img bitmap --add image.qcow2 two &&
			qemu-io -f qcow2 -c 'write -q -P 0x75 700k 300k' image.qcow2 &&
			qemu-img bitmap --disable image.qcow2 two || return
	fi
	if [[ $1 == *+lazy* ]]; then
		qemu-img amend -f qcow2 -o lazy_refcounts=on image.qcow2 || return
	fi
	is_clean_image || return
	if [[ $1 == *+dirty* ]]; then
		put_bytes image.qcow2 79 01 || return
	fi
	echo "$enc" >.enc
	((!snap)) || : >.snapshot
}

# judge FILE: sets VERDICT on image.qcow2 in the current directory, of which FILE was
# damaged; what QEMU reads goes to .qemu.
judge() {
	local enc status bytes

	read -r enc <.enc
	VERDICT=bad
	# Not for longer than 20 seconds
	(ulimit -t 20 && on_image qemu-img check) >.check 2>&1
	status=$?
	bytes=$(od -An -tu8 --endian=big -j24 -N8 image.qcow2 | tr -d ' ')
	# Not where it cannot be opened, or it would take the disk a day
	((status != 1)) && [[ $bytes && ${#bytes} -lt 10 ]] || return 0
	(ulimit -t 20 && on_image qemu-img convert -O raw .raw) >.convert 2>&1 ||
		return 0
	visit --hash .raw .qemu || return
	VERDICT=readable
	if ((status == 0 || status == 3)) &&
		{ [[ $1 == image.qcow2 ]] || is_consistent "$1" >/dev/null; }; then
		VERDICT=sound
		[[ ! -e .snapshot ]] || {
			on_image qemu-img convert -l snapshot.id=1 -O raw .raw &&
				visit --hash .raw .qemu.snapshot
		} >.convert 2>&1 || VERDICT=readable
	fi
}

# compare NAME SEED: what the guest left of it and QEMU agree
compare() {
	local enc out=$dir/out/$1.$2 status

	read -r enc <"$dir/images/$1/.enc"
	[[ ! -e $out/before ]] ||
		visit --compare "$out/before" "$dir/judged/$1.$2" || return
	[[ ! -e $out/snapshot ]] ||
		visit --compare "$out/snapshot" "$dir/judged/$1.$2.snapshot" || return
	[[ -e $out/image.qcow2 ]] || return 0
	cp -rn "$dir/images/$1/." "$out/"
	cd "$out" || return
	on_image qemu-img check >.check 2>&1
	status=$?
	if ((status != 0 && status != 3)); then
		cat .check
		return 1
	fi
	on_image qemu-img convert -O raw .raw && visit --hash .raw .qemu &&
		visit --compare after .qemu
}

cd "$WORK" || exit
dir=$WORK/trials
mkdir -p "$dir"/{bin,images,out,judged}
ok "mutate and visit build" make -s -C "$fuzz" O="$dir/bin" || done_testing
make -s -C "$tree/tests/functional/src" O="$WORK/bin" "$WORK/bin/qcow-diff" || skip_all "qcow-diff does not build"
PATH=$dir/bin:$WORK/bin:$PATH

for name in "${IMAGES[@]}"; do
	mkdir "$dir/images/$name"
	cd "$dir/images/$name" || exit
	ok "valid: $name" make_valid "$name"
done

# trials: NAME SEED in turn, but LUKS takes a second to open
trials=()
if (($#)); then
	for name; do
		trials+=("${name%:*} ${name##*:}")
	done
else
	for ((i = 0; i < count; i++)); do
		name=${IMAGES[i % ${#IMAGES[@]}]}
		[[ $name != *luks* ]] || ((i / ${#IMAGES[@]} % 4 == 0)) || continue
		trials+=("$name $((seed * 100000 + i))")
	done
fi

declare -A verdicts=([sound]=0 [readable]=0 [bad]=0)
for trial in "${trials[@]}"; do
	read -r name number <<<"$trial"
	rm -rf "$WORK/now"
	cp -r --sparse=always "$dir/images/$name" "$WORK/now"
	cd "$WORK/now" || exit
	file=image.qcow2
	[[ ! -e base.qcow2 ]] || ((number % 4)) || file=base.qcow2
	if ! mutate --seed "$number" $file >"$dir/judged/$name.$number.log" || ! judge $file; then
		fail "$name $number: it is damaged, and judged"
		continue
	fi
	[[ ! -e .qemu ]] || mv .qemu "$dir/judged/$name.$number"
	[[ ! -e .qemu.snapshot ]] || mv .qemu.snapshot "$dir/judged/$name.$number.snapshot"
	verdicts[$VERDICT]=$((verdicts[$VERDICT] + 1))
	echo "$name $number $file $VERDICT" >>"$dir/list"
done
cd "$WORK" || exit
diag "${#trials[@]} damaged images, seed $seed; QEMU: ${verdicts[sound]} sound," \
	"${verdicts[readable]} damaged but read, ${verdicts[bad]} neither; after ${SECONDS} s"

limit=$((120 + ${#trials[@]} * 4))
[[ $kernel != debug ]] || limit=$((limit * 4))
ok "the guest gets through" "$tree/tests/guest/run" -k "$kernel" -c 1 -t $limit \
	-d "$dir" -- tests/fuzz/trials "$dir"
grep -a '^WRONG: ' "$WORK/.out" >"$WORK/wrong"
is "nothing but errors came of it" "$(<"$WORK/wrong")" ""
while read -r _ name number _; do
	[[ ! -e $dir/judged/$name.${number%:}.log ]] ||
		diag "$name:${number%:}: $(<"$dir/judged/$name.${number%:}.log")"
done <"$WORK/wrong"
grep -aE ' (sound|readable|bad) (rw|ro|refused)' "$WORK/.out" >"$WORK/results"
is "each was tried" "$(wc -l <"$WORK/results")" "${#trials[@]}" ||
	diag "the last ones: $(tail -n 6 "$WORK/results")"

differ=
while read -r name number _; do
	if ! (compare "$name" "$number") >"$WORK/.compare" 2>&1; then
		differ+="$name:$number "
		diag "$name:$number: $(<"$dir/judged/$name.$number.log")"
		diag "$(head -n 20 "$WORK/.compare")"
	fi
done <"$WORK/results"
is "QEMU reads the same, and finds nothing wrong with what was written" "$differ" ""

tried() {
	grep -cE " (sound|readable|bad) $1" "$WORK/results"
}
diag "totals: images=${#trials[@]} written=$(tried rw) only-read=$(tried ro)" \
	"refused=$(tried refused)"
diag "$(tried '.* [1-9][0-9]* failed') met the damage"
diag "$(grep -a '^MEMORY' "$WORK/.out")"
[[ ! ${QCOW_KEEP-} ]] || cp -r "$dir" "$WORK/results" "$WORK/.out" "$QCOW_KEEP/"
diag "${SECONDS} s; again: QCOW_KERNEL=$kernel images.t NAME:SEED"
done_testing
