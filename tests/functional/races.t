#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Requests that race for the same few clusters, freed and taken again all the time, never see or leave each other's data.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

# What QEMU itself gets wrong: a write in flight to a cluster that a discard
# frees and another write takes; a write to a zero cluster in flight while it is
# discarded; the punch of a freed cluster that comes after it was taken again.
# A few clusters, many jobs, and as many discards as writes make that likely.

need_driver
CELL_OPS=$((10000 / SHARE))
if [[ ${QCOW_SOAK-} ]]; then
	CELL_OPS=100000
elif [[ $QUICK ]]; then
	CELL_OPS=1000
fi

QCOW_MIX=read=15,write=40,discard=30,punch=6,zero=8,flush=1
run_cell cs=64k,size=2M,hot=128k,jobs=16
run_cell cs=4k,size=1M,hot=16k,jobs=16
run_cell cs=512,size=1M,hot=4k,jobs=8
run_cell cs=64k,size=2M,hot=128k,jobs=16,io=buffered
run_cell cs=64k,size=4M,hot=256k,jobs=8,discard=keep
# A cluster that is cleared but kept, and used again under a write in flight.
run_cell cs=2M,size=8M,hot=256k,jobs=8,discard=keep
QCOW_MIX=read=10,write=40,discard=20,zero=25,flush=5
run_cell cs=64k,size=4M,hot=256k,jobs=16,snap=1
run_cell cs=4k,size=4M,hot=64k,jobs=16,snap=1,chain=raw
run_cell cs=64k,size=4M,hot=192k,jobs=8,chain=qcow2,init=1
# The least cache there is, of 64 blocks, and tables that take 150 and 260: they come
# and go under the requests. Without that, each would be read once at most.
QCOW_MIX=read=20,write=40,discard=20,zero=10,flush=10
for cell in cs=512,size=6M cs=1k,rc=64,size=8M; do
	run_cell $cell,jobs=8,cache=64K
	ok "$cell: tables are read again" \
		test "$(sed -n 's/^cache_misses //p' "$WORK/.cell")" -gt 400
done
diag "totals: cells=$CELLS_DONE requests=$OPS_DONE"
no_kernel_report
done_testing
