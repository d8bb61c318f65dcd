#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The guest runner does what it says, and tells a hang from a bug of the kernel; what make installs is all there.
# runs-on: host
# timeout: 900

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

tree=$(cd "$HERE/../.." && pwd)
run=$tree/tests/guest/run
cd "$WORK" || exit

before=$(find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'qcow-guest.*' | sort)
"$run" -d "$WORK" -- sh -c "echo out; echo err >&2; echo hi >'$WORK/file'; exit 7" >out 2>err
is "the exit status is that of the command" $? 7
is "so is standard output" "$(<out)" out
is "so is standard error" "$(grep -v '^[a-z-]*: ' err)" err
is "what it writes into a directory is here" "$(<file)" hi
"$run" -t 60 -- sleep 600 >out 2>err
is "a command that does not end" $? 124
like "is told" "$(<err)" 'no end after 60 seconds: sleep 600'
"$run" -- sh -c 'echo "<1>BUG: planted by the test" >/dev/kmsg' >out 2>err
is "what the kernel reports" $? 126
like "is shown" "$(<err)" 'BUG: planted by the test'
"$run" -- sh -c 'echo c >/proc/sysrq-trigger; sleep 60' >out 2>err
is "a guest that dies" $? 125
like "is told, too" "$(<err)" 'the guest died'
is "nothing is left behind" \
	"$(find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'qcow-guest.*' | sort)" "$before"

# The kernel that modules are built for here; those of Debian's are built in a chroot.
kernel=$("$tree/tests/guest/kernel" debug 2>/dev/null)/build
mkdir source
(cd "$tree" && cp -r Kbuild Makefile drivers include userspace-tools "$WORK/source")
ok "make" make -s -C source KDIR="$kernel"
ok "make install" make -s -C source install KDIR="$kernel" DESTDIR="$WORK/root"
for f in sbin/qcowctl include/linux/qcow.h share/man/man8/qcowctl.8; do
	ok "it installs $f" test -s "root/usr/local/$f"
done
is "and the module" "$(find root -name 'qcow.ko*' | wc -l)" 1
ok "make clean" make -s -C source clean KDIR="$kernel"
is "leaves no object" "$(find source -name '*.o' -o -name '*.ko' | wc -l)" 0
like "make help" "$(make -s -C source help)" 'make|install'
done_testing
