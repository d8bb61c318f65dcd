#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The snapshot table and the bitmaps, read by a program with sanitizers, survive any bytes, and nothing but bitmaps is written.
# runs-on: host
# timeout: 600

# QCOW_SOAK=1 has libFuzzer look for more, if there is clang: a million times.

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/../functional/common.sh"

fuzz=$(cd "$(dirname "$0")" && pwd)
cd "$WORK" || exit
ok "it builds as a program" make -s -C "$fuzz" O="$WORK" "$WORK/tables-inputs"

# Small images, so that changes hit something
mkdir seeds
for size in 512 1k 4k; do
	for version in 0.10 1.1; do
		image=seeds/$size-$version
		qemu-img create -q -f qcow2 -o "cluster_size=$size,compat=$version" "$image" 64k
		qemu-io -f qcow2 -c 'write -q 0 2k' "$image"
		qemu-img snapshot -c one "$image"
		if [[ $version == 1.1 ]]; then
			qemu-img bitmap --add -g 512 "$image" one
			qemu-img bitmap --add --disable "$image" two
			qemu-img bitmap --add "$image" three
			qemu-io -f qcow2 -c 'write -q 8k 2k' "$image"
		fi
		qemu-img snapshot -c two "$image"
	done
done

ok "images are read" ./tables-inputs seeds/*
ok "and a hundred thousand that are damaged" ./tables-inputs -f 32768 -n 16700 seeds/*
diag "$(<"$WORK/.out")"
if [[ ${QCOW_SOAK-} ]]; then
	if command -v clang >/dev/null; then
		ok "libFuzzer builds it" make -s -C "$fuzz" O="$WORK" "$WORK/tables-fuzz"
		mkdir corpus
		for f in seeds/*; do
			{ printf '\1'; cat "$f"; } >"corpus/${f##*/}"
		done
		ok "libFuzzer finds nothing" ./tables-fuzz -runs=1000000 -max_len=40000 -seed=1 corpus
		diag "$(tail -n 3 "$WORK/.out")"
	else
		skip "libFuzzer" "there is no clang"
	fi
fi
done_testing
