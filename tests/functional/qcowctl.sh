# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0-only
#
# For the tests of qcowctl to source: refusals, and processes that hold images.

# shellcheck source=tests/functional/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# refused DESC CODE REGEX ARG...: qcowctl ARG... exits with CODE, prints nothing on
# standard output and exactly one line on standard error, which matches REGEX.
refused() {
	local desc=$1 code=$2 regex=$3 status
	shift 3

	"$QCOWCTL" "$@" >"$WORK/.stdout" 2>"$WORK/.stderr" </dev/null
	status=$?
	if ((status == code)) && [[ ! -s $WORK/.stdout ]] &&
		(($(wc -l <"$WORK/.stderr") == 1)) &&
		[[ $(<"$WORK/.stderr") =~ ^qcowctl:\ .*$regex ]]; then
		pass "$desc"
		return 0
	fi
	fail "$desc"
	diag "qcowctl $*"
	diag "exit code $status, want $code; want match: $regex"
	diag "stdout: $(<"$WORK/.stdout")"
	diag "stderr: $(<"$WORK/.stderr")"
}

# hold ARG...: run qemu-io ARG..., which opens an image, until release.
hold() {
	local tries

	rm -f "$WORK/.hold"
	mkfifo "$WORK/.hold"
	qemu-io "$@" <"$WORK/.hold" >/dev/null 2>"$WORK/.err" &
	HOLDER=$!
	exec {HOLD_FD}>"$WORK/.hold"
	for ((tries = 0; tries < 200; tries++)); do
		if grep -qs OFDLCK /proc/"$HOLDER"/fdinfo/*; then
			return 0
		fi
		sleep 0.1
	done
	fail "hold $*"
	diag "$(<"$WORK/.err")"
	return 1
}

release() {
	exec {HOLD_FD}>&-
	wait "$HOLDER"
}

# backing IMAGE NAME [FORMAT]: a new image with any backing name in its header, and
# any format, or no format.
backing() {
	if [[ ! -e $WORK/.empty ]]; then
		qemu-img create -q -f qcow2 "$WORK/.empty" 1M
	fi
	cp "$WORK/.empty" "$1"
	qemu-img rebase -t unsafe -u -b "$2" -F "${3:-raw}" "$1"
	if [[ ! ${3-} ]]; then
		# Let the extension be an unknown one.
		poke "$1" 112 '\x11\x22\x33\x44'
	fi
}

# poke FILE OFFSET BYTES: overwrite a few bytes, given as printf takes them.
poke() {
	# shellcheck disable=SC2059
	printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
