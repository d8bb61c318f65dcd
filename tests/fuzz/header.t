#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The header parser, as a program with sanitizers, survives any bytes, and what it promises of a header that it takes holds.
# runs-on: host
# timeout: 1200

# QCOW_SOAK=1 has libFuzzer look for more, if there is clang: a million times.

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/../functional/common.sh"

fuzz=$(cd "$(dirname "$0")" && pwd)
cd "$WORK" || exit
ok "it builds as a program" make -s -C "$fuzz" O="$WORK" "$WORK/header-inputs"

# The start of images of every kind
mkdir seeds
number=0
keep_seed() {
	number=$((number + 1))
	head -c 4096 image >seeds/$number
}
seed() {
	qemu-img create -q -f qcow2 "$@" 64M >/dev/null 2>&1 || return
	keep_seed
}
for options in compat=0.10 compat=1.1 cluster_size=512 cluster_size=2M extended_l2=on \
	lazy_refcounts=on refcount_bits=1 refcount_bits=64 compression_type=zstd \
	data_file=data data_file=data,data_file_raw=on; do
	rm -f image data
	seed -o "$options" image
	rm -f image data
	[[ $options == *raw* ]] || seed -o "$options" -b "$WORK/base" -u -F raw image
done
for format in aes luks; do
	rm -f image
	seed --object secret,id=key,data=abc -o "encrypt.format=$format,encrypt.key-secret=key$(
		[[ $format == aes ]] || echo ,encrypt.iter-time=10)" image
done
rm -f image
qemu-img create -q -f qcow2 image 64M
qemu-img bitmap --add image map
qemu-img snapshot -c one image
keep_seed
ok "there are images of all kinds" test $number -ge 20

ok "they are parsed" ./header-inputs seeds/*
ok "and a million that are damaged" ./header-inputs -n $((1000000 / number)) seeds/*
diag "$(<"$WORK/.out")"
if [[ ${QCOW_SOAK-} ]]; then
	if command -v clang >/dev/null; then
		ok "libFuzzer builds it" make -s -C "$fuzz" O="$WORK" "$WORK/header-fuzz"
		mkdir corpus
		for f in seeds/*; do
			{ printf '\1'; cat "$f"; } >"corpus/${f##*/}"
		done
		ok "libFuzzer finds nothing" ./header-fuzz -runs=1000000 -max_len=4097 -seed=1 corpus
		diag "$(tail -n 3 "$WORK/.out")"
	else
		skip "libFuzzer" "there is no clang"
	fi
fi
done_testing
