#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# An attached image is locked for QEMU's programs as if QEMU had it open, until it is detached.
# kernels: 6.1 debug
# quick: 6.1

# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit

WRITE='Failed to get "write" lock'
# What is only read is also kept from writers as a program is that runs.
DENIED="$WRITE|Text file busy"
SHARED='Failed to get shared "write" lock'

# locked WHAT MESSAGE CMD...: CMD fails with QEMU's MESSAGE.
locked() {
	local desc="$1: ${*:3}" message=$2
	shift 2

	if "$@" >"$WORK/.out" 2>&1 </dev/null; then
		fail "$desc is refused"
		return 1
	fi
	like "$desc is refused" "$(<"$WORK/.out")" "$message"
}

# bytes FILE: the bytes that are locked in it by OFD locks, sorted
bytes() {
	local inode first last

	inode=$(stat -c %i "$1")
	while read -r first last; do
		seq "$first" "$last"
	done < <(awk -v inode="$inode" '$2 == "OFDLCK" {
		split($6, id, ":")
		if (id[3] == inode && $4 == "READ")
			print $7, $8
	}' /proc/locks) | sort -nu | paste -sd' '
}

qemu-img create -q -f qcow2 base.qcow2 1M
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 image.qcow2
qemu-io -c 'write -P 1 0 64k' image.qcow2 >/dev/null
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 sibling.qcow2

readers=(
	'qemu-img info image.qcow2'
	'qemu-img check image.qcow2'
	'qemu-img map image.qcow2'
	'qemu-img compare image.qcow2 base.qcow2'
	'qemu-img convert -O raw image.qcow2 out.raw'
	'qemu-img measure -O qcow2 image.qcow2'
	'qemu-img dd if=image.qcow2 of=out.raw bs=64k count=1'
	'qemu-img bench -c 1 -f qcow2 image.qcow2'
	'qemu-img snapshot -l image.qcow2'
	'qemu-io -r -c quit image.qcow2'
)
forced=(
	'qemu-img info -U image.qcow2'
	'qemu-img check -U image.qcow2'
	'qemu-img map -U image.qcow2'
	'qemu-img compare -U image.qcow2 base.qcow2'
	'qemu-img convert -U -O raw image.qcow2 out.raw'
	'qemu-img measure -U -O qcow2 image.qcow2'
	'qemu-img dd -U if=image.qcow2 of=out.raw bs=64k count=1'
	'qemu-img bench -U -c 1 -f qcow2 image.qcow2'
	'qemu-img snapshot -U -l image.qcow2'
	'qemu-io -U -r -c quit image.qcow2'
)
writers=(
	'qemu-img check -r all image.qcow2'
	'qemu-img resize image.qcow2 2M'
	'qemu-img rebase -u -b base.qcow2 -F qcow2 image.qcow2'
	'qemu-img commit image.qcow2'
	'qemu-img amend -o lazy_refcounts=on image.qcow2'
	'qemu-img snapshot -c one image.qcow2'
	'qemu-img bench -w -c 1 -f qcow2 image.qcow2'
	'qemu-io -c quit image.qcow2'
	'qemu-io -f raw -c quit image.qcow2'
	'qemu-img create -f qcow2 image.qcow2 1M'
)
base_writers=(
	'qemu-io -c quit base.qcow2'
	'qemu-img resize base.qcow2 2M'
	'qemu-img commit sibling.qcow2'
)

# compare of unequal images exits with 1: only locks count.
allowed() {
	"$@" >"$WORK/.out" 2>&1 </dev/null
	(($? <= 1)) && ! grep -q 'Failed to get' "$WORK/.out"
}

attach image.qcow2 || done_testing
is "attached: the locks of a writer" "$(bytes image.qcow2)" "100 101 103 201 203"
is "attached: the backing file's are those of a reader" "$(bytes base.qcow2)" "100 201 203"
sum=$(sha256sum <base.qcow2)
for c in "${readers[@]}"; do
	# shellcheck disable=SC2086
	locked attached "$SHARED" $c
done
for c in "${forced[@]}"; do
	# shellcheck disable=SC2086
	ok "attached: $c" allowed $c
done
for c in "${writers[@]}"; do
	# shellcheck disable=SC2086
	locked attached "$WRITE" $c
done
for c in "${base_writers[@]}"; do
	# shellcheck disable=SC2086
	locked attached "$DENIED" $c
done
ok "attached: a new overlay" \
	qemu-img create -q -f qcow2 -b image.qcow2 -F qcow2 over.qcow2
ok "attached: an overlay with the same backing file, read" qemu-io -r -c quit sibling.qcow2
ok "attached: an overlay with the same backing file, written" qemu-io -c quit sibling.qcow2
detach
is "detached: no locks on the image" "$(bytes image.qcow2)" ""
is "detached: no locks on the backing file" "$(bytes base.qcow2)" ""
is "the backing file was not touched" "$(sha256sum <base.qcow2)" "$sum"
ok "detached: QEMU writes the image" qemu-io -c 'write 0 64k' image.qcow2

attach --read-only image.qcow2
is "read-only: the locks of a reader" "$(bytes image.qcow2)" "100 201 203"
for c in "${readers[@]}" "${forced[@]}"; do
	# shellcheck disable=SC2086
	ok "read-only: $c" allowed $c
done
for c in "${writers[@]}" "${base_writers[@]}"; do
	# shellcheck disable=SC2086
	locked read-only "$DENIED" $c
done
ok "read-only: a new overlay" \
	qemu-img create -q -f qcow2 -b image.qcow2 -F qcow2 over.qcow2
ok "read-only: an overlay on it, written" qemu-io -c quit over.qcow2
detach
is "detached: no locks" "$(bytes image.qcow2)" ""

# The other way round
hold image.qcow2
refused "attach what qemu-io writes" 4 "$HOLDER \(qemu-io\) has it open" attach image.qcow2
refused "the same read-only" 4 "$HOLDER \(qemu-io\) has it open" attach -r image.qcow2
is "a refusal leaves no lock behind" "$(bytes image.qcow2)" "100 101 103 201 203"
release
is "nor after that" "$(bytes image.qcow2)" ""
hold -r image.qcow2
refused "attach what qemu-io reads" 4 "$HOLDER \(qemu-io\) uses it" attach image.qcow2
attach --read-only image.qcow2 && pass "read-only beside a reader"
detach
release
hold -r -U image.qcow2
attach image.qcow2 && pass "attach what is read with --force-share"
detach
release
qemu-nbd --fork --pid-file="$WORK/nbd.pid" --socket="$WORK/nbd.sock" -t image.qcow2
refused "attach what qemu-nbd exports" 4 "$(<nbd.pid) \(qemu-nbd\) has it open" \
	attach image.qcow2
kill "$(<nbd.pid)"
for ((i = 0; i < 50; i++)); do
	[[ $(bytes image.qcow2) ]] || break
	sleep 0.1
done
hold base.qcow2
refused "attach an overlay whose backing file is written" 4 \
	"base.qcow2: $HOLDER \(qemu-io\) has it open" attach image.qcow2
release
attach image.qcow2 && pass "attach when they are gone"
detach
no_kernel_report
done_testing
