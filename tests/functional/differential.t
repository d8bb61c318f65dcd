#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Random requests to an attached image read back like a plain file, in every kind of image, and the image is what QEMU makes of it.
# kernels: 6.1 debug 6.12 7.x
# quick: 6.1
# cpus: 2
# timeout: 1500
# memory: 2048

# usage: differential.t [CELL]...
# QCOW_SOAK=1 runs 150 cells, QCOW_CELLS=N runs N, QCOW_SEED=N draws others.

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

# Each value of each key at least once; the first dozen are what the debug
# kernel runs.
FIXED=(
	'cs=64k'
	'cs=64k,jobs=4,hot=512k'
	'v=2,cs=4k,chain=raw'
	'cs=64k,ext=1,chain=raw,jobs=4,hot=512k'
	'cs=512,rc=64,init=1,jobs=4'
	'cs=4k,rc=1,chain=deep,init=1'
	'cs=64k,snap=1,jobs=4,hot=1M,inline=no'
	'cs=2M,size=24M,chain=qcow2,discard=keep'
	'cs=1k,rc=8,chain=short,io=buffered,size=8388908'
	'cs=64k,pre=metadata,discard=ignore,io=direct'
	'cs=2k,rc=2,chain=zero,snap=1,dev=buffered'
	'cs=4k,rc=32,pre=falloc,discard=keep,jobs=8'
	'v=2,cs=512,init=1,snap=1,size=4M,cache=64K'
	'cs=1M,size=20M,rc=4,snap=1'
	'cs=64k,chain=long,size=8389120,jobs=4'
	'cs=64k,chain=raw,dev=buffered'
	'cs=64k,chain=qcow2,snap=1,jobs=8,hot=256k'
	'cs=512,rc=1,pre=metadata,size=4M'
	'cs=512,rc=16,chain=deep,jobs=4,io=buffered'
	'v=2,cs=64k,pre=falloc,discard=keep'
	'v=2,cs=64k,chain=zero,jobs=4'
	'cs=64k,size=8388908,init=1'
	'cs=2M,size=20971000,init=1,jobs=4'
	'cs=4k,chain=short,discard=ignore,jobs=4'
	'cs=64k,chain=odd,jobs=4'
	'cs=4k,snap=1,io=direct,discard=keep,jobs=4'
	'cs=1M,size=16M,chain=raw,jobs=4,hot=4M'
	'cs=16k,ext=1,snap=1,init=1'
	'cs=2M,ext=1,size=20971000,chain=deep'
	'cs=64k,ext=1,pre=metadata,jobs=8,discard=keep,hot=1M'
	'cs=128k,ext=1,chain=zero,snap=1,jobs=4'
	'cs=64k,data=file,chain=raw,jobs=4,hot=1M'
	'cs=64k,data=raw,size=8388908'
	'cs=4k,data=file,discard=keep,init=1,io=buffered'
	'cs=64k,ext=1,data=raw,init=1,jobs=4'
	'cs=64k,compress=zstd,jobs=4'
	'cs=4k,compress=zlib,chain=raw,jobs=4,hot=1M'
	'cs=4k,rc=2,compress=zstd,io=direct,jobs=8,hot=512k'
)

need_driver
if (($#)); then
	for CELL in "$@"; do
		run_cell "$CELL"
	done
	done_testing
fi

count=${#FIXED[@]}
if [[ ${QCOW_SOAK-} ]]; then
	count=150
elif [[ $QUICK ]]; then
	count=12
	CELL_OPS=600
fi
count=${QCOW_CELLS:-$count}
base=${QCOW_SEED:-1}

for ((i = 0; i < count; i++)); do
	if ((i < ${#FIXED[@]})); then
		run_cell "${FIXED[i]},seed=$((base + i))"
	else
		draw_cell $((base * 1000 + i))
		run_cell "$CELL"
	fi
done
diag "totals: cells=$CELLS_DONE requests=$OPS_DONE"
no_kernel_report
done_testing
