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

# Others may run guests, too.
TMPDIR=$(mktemp -d)
EXTRA+=("$TMPDIR")
export TMPDIR
"$run" -d "$WORK" -- sh -c "echo out; echo err >&2; echo hi >'$WORK/file'; exit 7" >out 2>err
is "the exit status is that of the command" $? 7
is "so is standard output" "$(<out)" out
is "so is standard error" "$(grep -v '^[a-z-]*: ' err)" err
is "what it writes into a directory is here" "$(<file)" hi
"$run" -t 60 -- sleep 600 >out 2>err
is "a command that does not end" $? 124
like "is told" "$(<err)" 'no end after 60 seconds: sleep 600'
like "with what its CPUs did" "$(<err)" 'NMI received'
make -s -C "$HERE/src" O="$WORK" "$WORK/tsc-khz"
khz=$("$WORK/tsc-khz")
"$run" -- dmesg >out 2>err
# Some kernels say so twice: what the processor seems to do, and then what the TSC does.
detected=$(sed -n 's/.*tsc: Detected \([0-9.]*\) .*/\1/p' out | tail -n 1)
ok "its clock is as fast as ours" awk -v is="$detected" -v ours="$khz" \
	'BEGIN { ratio = is * 1000 / ours; exit !(ratio > 0.99 && ratio < 1.01) }' ||
	diag "$detected MHz, not $khz kHz"
"$run" -- sh -c 'echo "<1>BUG: planted by the test" >/dev/kmsg' >out 2>err
is "what the kernel reports" $? 126
like "is shown" "$(<err)" 'BUG: planted by the test'
# What else counts, line by line as kernels print it, and what does not
# shellcheck source=tests/guest/lib.sh
. "$tree/tests/guest/lib.sh"
grep -vE "$report" >missed <<'END'
BUG: KASAN: slab-use-after-free in qcow_map+0x12/0x40 [qcow]
BUG: KFENCE: out-of-bounds read in qcow_map+0x12/0x40 [qcow]
BUG: sleeping function called from invalid context at mm/page_alloc.c:1
unreferenced object 0xffff888003a4c000 (size 512):
UBSAN: shift-out-of-bounds in drivers/block/qcow/map.c:1:2
WARNING: CPU: 0 PID: 1 at drivers/block/qcow/map.c:1 qcow_map+0x12/0x40 [qcow]
WARNING: possible circular locking dependency detected
WARNING: possible recursive locking detected
WARNING: inconsistent lock state
WARNING: bad unlock balance detected!
WARNING: suspicious RCU usage
[ BUG: Invalid wait context ]
INFO: trying to register non-static key.
INFO: task qcow-diff:123 blocked for more than 120 seconds.
watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [qcow-diff:123]
rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
rcu: INFO: rcu_sched self-detected stall on CPU
refcount_t: underflow; use-after-free.
list_del corruption. prev->next should be ffff888003a4c000, but was 0
general protection fault, probably for non-canonical address 0x6b6b6b6b6b6b6b6b
Kernel panic - not syncing: Fatal exception
END
is "reports of KASAN, lockdep, kmemleak and others are known" "$(<missed)" ''
grep -E "$report" >found <<'END'
kmemleak: Kernel memory leak detector initialized (mem pool available: 15679)
Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar
rcu: Preemptible hierarchical RCU implementation.
qcow: module verification failed: signature and/or required key missing - tainting kernel
qcow0: I/O error
END
is "and nothing else" "$(<found)" ''
"$run" -- sh -c 'echo c >/proc/sysrq-trigger; sleep 60' >out 2>err
is "a guest that dies" $? 125
like "is told, too" "$(<err)" 'the guest died'
is "nothing is left behind" "$(ls -A "$TMPDIR")" ''

# The kernel that modules are built for here; those of Debian's are built in a chroot.
kernel=$("$tree/tests/guest/kernel" debug 2>/dev/null)/build
mkdir source
(cd "$tree" && cp -r Kbuild Makefile drivers include userspace-tools "$WORK/source")
ok "make" make -s -C source KDIR="$kernel"
ok "make install" make -s -C source install KDIR="$kernel" DESTDIR="$WORK/root"
for f in local/sbin/qcowctl local/include/linux/qcow.h local/share/man/man8/qcowctl.8 \
	local/share/bash-completion/completions/qcowctl lib/udev/rules.d/60-qcow.rules; do
	ok "it installs $f" test -s "root/usr/$f"
done
is "and the module" "$(find root -name 'qcow.ko*' | wc -l)" 1
ok "make clean" make -s -C source clean KDIR="$kernel"
is "leaves no object" "$(find source -name '*.o' -o -name '*.ko' | wc -l)" 0
like "make help" "$(make -s -C source help)" 'make|install'
done_testing
