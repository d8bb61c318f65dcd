# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0-only
#
# For the tests to source: TAP output, a work directory, devices that go away
# at the end. A test says what holds with these:
#
#   ok DESC CMD...          CMD succeeds (not_ok: fails)
#   is DESC GOT WANT        the strings are equal
#   like DESC GOT REGEX     bash's regular expression matches
#   skip DESC REASON        one result that could not be had
#   skip_all REASON         the test does not apply here
#   pass DESC, fail DESC    a result found otherwise
#   done_testing            last line of each test
#
# and works with these, which count as a result only when they fail:
#
#   attach [OPTION]... IMAGE   sets DEV
#   detach [DEVICE]            of DEV
#
# and these, each a result:
#
#   check_clean IMAGE          qemu-img check finds nothing at all, not even leaks
#   same A FMT_A B FMT_B       equal contents for qemu-img compare

TESTS=0
FAILED=0
DONE=0
DEV=
DEVICES=()
LOOPS=()
# More directories to remove at the end
EXTRA=()
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LC_ALL=C

# Programs of src/: $TEST_BIN in the guest.
if [[ ! ${TEST_BIN-} ]]; then
	TEST_BIN=$HERE/src
fi
PATH=$TEST_BIN:$PATH:/usr/sbin:/sbin
QCOWCTL=${QCOWCTL:-qcowctl}
# What is done many times is done so many times less often: tests/run -q asks for 4.
export SHARE=${QCOW_SHARE:-1}
# The debug kernel is several times slower.
export QUICK=${QCOW_QUICK:-}
if [[ ${TEST_KERNEL-} == *debug* ]]; then
	QUICK=1 SHARE=1
fi

diag() {
	local line

	while IFS= read -r line; do
		printf '# %s\n' "$line"
	done <<<"$*"
}

pass() {
	TESTS=$((TESTS + 1))
	printf 'ok %d - %s\n' "$TESTS" "$1"
}

fail() {
	TESTS=$((TESTS + 1))
	FAILED=$((FAILED + 1))
	printf 'not ok %d - %s\n' "$TESTS" "$1"
	return 1
}

skip() {
	TESTS=$((TESTS + 1))
	printf 'ok %d - %s # SKIP %s\n' "$TESTS" "$1" "$2"
}

skip_all() {
	DONE=1
	printf '1..0 # SKIP %s\n' "$1"
	exit 0
}

ok() {
	local desc=$1 status
	shift

	"$@" >"$WORK/.out" 2>&1
	status=$?
	if ((status == 0)); then
		pass "$desc"
		return 0
	fi
	fail "$desc"
	diag "exit status $status of: $*"
	diag "$(tail -n 60 "$WORK/.out")"
	return 1
}

not_ok() {
	local desc=$1
	shift

	if "$@" >"$WORK/.out" 2>&1; then
		fail "$desc"
		diag "should have failed: $*"
		diag "$(tail -n 20 "$WORK/.out")"
		return 1
	fi
	pass "$desc"
}

is() {
	if [[ $2 == "$3" ]]; then
		pass "$1"
		return 0
	fi
	fail "$1"
	diag "got:  $2"
	diag "want: $3"
	return 1
}

like() {
	if [[ $2 =~ $3 ]]; then
		pass "$1"
		return 0
	fi
	fail "$1"
	diag "got:        $2"
	diag "want match: $3"
	return 1
}

done_testing() {
	DONE=1
	printf '1..%d\n' "$TESTS"
	((FAILED == 0))
	exit
}

cleanup() {
	local status=$? dir dirs dev

	trap - EXIT INT TERM
	# Whatever is mounted or swapped on from here.
	mapfile -t dirs < <(sed -n 's/^[^ ]* \([^ ]*\) .*/\1/p' /proc/mounts | tac)
	for dir in "${dirs[@]}"; do
		if [[ $dir == "$WORK"/* ]]; then
			umount "$dir" 2>/dev/null || umount -l "$dir"
		fi
	done
	for dev in "${DEVICES[@]}"; do
		swapoff "$dev" 2>/dev/null
		"$QCOWCTL" detach "$dev" >/dev/null 2>&1 ||
			diag "could not detach $dev at the end"
	done
	for dev in "${LOOPS[@]}"; do
		losetup -d "$dev"
	done
	rm -rf "$WORK" "${EXTRA[@]}"
	if ((!DONE)); then
		printf 'Bail out! the test stopped before its end, status %d\n' "$status"
		exit 1
	fi
	exit "$status"
}

trap cleanup EXIT
trap 'exit 130' INT TERM
if mountpoint -q /scratch; then
	WORK=$(mktemp -d /scratch/work.XXXXXX)
else
	WORK=$(mktemp -d)
fi
export WORK

# new_loop FILE [OPTION]...: sets LOOP, which goes away at the end
new_loop() {
	modprobe loop 2>/dev/null
	LOOP=$(losetup -f --show "$@") && LOOPS+=("$LOOP")
}

# Takes a device off the list of those to detach at the end.
forget() {
	local dev keep=()

	for dev in "${DEVICES[@]}"; do
		if [[ $dev != "$1" ]]; then
			keep+=("$dev")
		fi
	done
	DEVICES=("${keep[@]}")
}

# The work of attach and detach without a result.
try_attach() {
	if ! DEV=$("$QCOWCTL" attach ${QCOW_NO_INLINE:+--no-inline} "$@" \
		2>"$WORK/.err"); then
		DEV=
		return 1
	fi
	DEVICES+=("$DEV")
}

# A device that udev or a late close holds is busy for a moment: not longer.
try_detach() {
	local dev=${1:-$DEV} tries

	for ((tries = 0; tries < 50; tries++)); do
		if "$QCOWCTL" detach "$dev" 2>"$WORK/.err"; then
			forget "$dev"
			return 0
		fi
		if ! grep -qi 'busy\|in use\|open in' "$WORK/.err"; then
			return 1
		fi
		sleep 0.1
	done
	return 1
}

attach() {
	try_attach "$@" && return 0
	fail "attach $*"
	diag "$(<"$WORK/.err")"
	return 1
}

detach() {
	try_detach "${1:-$DEV}" && return 0
	fail "detach ${1:-$DEV}"
	diag "$(<"$WORK/.err")"
	return 1
}

is_clean() {
	qemu-img check -f qcow2 "$1" >"$WORK/.check" 2>&1 &&
		grep -q 'No errors were found' "$WORK/.check" &&
		! grep -qi 'leak' "$WORK/.check" && return 0
	cat "$WORK/.check"
	return 1
}

# No corruption; leaked clusters are allowed.
is_consistent() {
	qemu-img check -f qcow2 "$1" >"$WORK/.check" 2>&1
	case $? in
	0 | 3) return 0 ;;
	esac
	cat "$WORK/.check"
	return 1
}

# need_fsyncs: or the test does not apply here
need_fsyncs() {
	[[ -d /sys/kernel/tracing/events ]] ||
		mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
	[[ -d /sys/kernel/tracing/events/ext4/ext4_sync_file_enter ]] ||
		skip_all "the kernel cannot count fsync"
}

# fsyncs DESC CMD...: CMD succeeds; FSYNCS becomes the number of barriers that the files
# image.qcow2* on ext4 have seen meanwhile.
fsyncs() {
	local event=/sys/kernel/tracing/events/ext4/ext4_sync_file_enter f filter=''

	for f in image.qcow2*; do
		filter+="${filter:+ || }ino == $(stat -c %i "$f")"
	done
	echo "$filter" >$event/filter
	: >/sys/kernel/tracing/trace
	echo 1 >$event/enable
	ok "$@"
	echo 0 >$event/enable
	# shellcheck disable=SC2034 # for the test
	FSYNCS=$(grep -c 'ext4_sync_file_enter:' /sys/kernel/tracing/trace)
}

# timely DESC CMD...: CMD succeeds, or the result is skipped. Five seconds after the first
# change since all was clean, which the test has in clean_since, there is a commit, whose
# barriers count, too.
clean_since=0
timely() {
	if ((SECONDS - clean_since >= 4)); then
		skip "$1" "too slow"
	else
		ok "$@"
	fi
}

check_clean() {
	ok "qemu-img check finds nothing in ${1##*/}${2:+ ($2)}" is_clean "$1"
}

same() {
	ok "${1##*/} and ${3##*/} hold the same${5:+ ($5)}" \
		qemu-img compare -U -f "$2" -F "$4" "$1" "$3"
}

# Everything the kernel had to complain about since the last call, or the start.
KMSG_SEEN=$(dmesg 2>/dev/null | wc -l)
kernel_reports() {
	local all

	all=$(dmesg | sed 's/^\[[^]]*\] //')
	printf '%s\n' "$all" | tail -n "+$((KMSG_SEEN + 1))" |
		grep -E 'BUG:|WARNING:|KASAN|UBSAN|Oops|general protection|lockdep|possible (circular|recursive)|inconsistent lock|suspicious RCU|INFO: task|kmemleak|sleeping function|refcount_t' |
		grep -v 'kmemleak: Cannot allocate'
	KMSG_SEEN=$(printf '%s\n' "$all" | wc -l)
}

no_kernel_report() {
	local reports

	kernel_reports >"$WORK/.kmsg"
	reports=$(<"$WORK/.kmsg")
	is "${1:-the kernel reports nothing}" "$reports" ""
}

need_driver() {
	if [[ ! -e /dev/qcow-control ]]; then
		modprobe qcow 2>/dev/null ||
			{ [[ ${QCOW_KO-} ]] && insmod "$QCOW_KO"; } ||
			skip_all "no /dev/qcow-control"
	fi
}
