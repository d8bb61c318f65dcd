#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# qcow-diff accepts a plain file, with one job or many, and notices one damaged bit.
# runs-on: host
# timeout: 120

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

make -s -C "$HERE/src" O="$WORK/bin" >&2 || skip_all "the programs do not build"
PATH=$WORK/bin:$PATH
cd "$WORK" || exit

fresh() {
	rm -f file
	truncate -s 8M file
}

for jobs in 1 4 16; do
	fresh
	ok "a plain file behaves, $jobs jobs" \
		qcow-diff --ops 3000 --jobs $jobs --mirror-out mirror file
	ok "the mirror is what it holds, $jobs jobs" cmp file mirror
done
fresh
ok "a plain file behaves, through the page cache" qcow-diff --ops 1000 --buffered file

fresh
qcow-diff --quiet --ops 500 --seed 2 --mirror-out one file
fresh
qcow-diff --quiet --ops 500 --seed 2 --mirror-out two file
ok "the same seed does the same" cmp one two

found=0
for op in 100 200 300 400 500 600 700 800 900 1000; do
	fresh
	qcow-diff --quiet --ops 1500 --corrupt-op $op file >/dev/null 2>&1
	(($? == 1)) && found=$((found + 1))
done
diag "found one damaged bit in $found of 10 runs (the others wrote over it first)"
ok "damage is found" test $found -ge 3

fresh
qcow-diff --quiet --ops 500 --mirror-out mirror file
printf x | dd of=file bs=1 seek=5000000 conv=notrunc status=none
not_ok "a file that is not its mirror is found" \
	qcow-diff --verify-only --mirror-in mirror file
done_testing
