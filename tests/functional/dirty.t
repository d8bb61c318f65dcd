#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Lazy refcounts: the dirty bit is there while counts may be stale, and a repair finds all that was flushed.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"
# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit

# What QEMU says of the bit, while somebody has the image. (A warning of QEMU's about
# bitmaps ends without a newline, and would spoil the next result.)
bit() {
	qemu-img info -U --output=json "$1" 2>/dev/null | sed -n 's/.*"dirty-flag": \([a-z]*\).*/\1/p' |
		head -n 1
}

# The features of version 3, which are nothing in version 2
features() {
	od -An -v -tx8 --endian=big -j72 -N24 "$1" | tr -s ' \n' ' '
}

# write_some SEED: clusters that were not there, and a flush
write_some() {
	xfs_io -d -c "pwrite -q -S $1 $(($1 * 1024))k 300k" \
		-c "pwrite -q -S $1 $(($1 * 1024 + 777))k 4k" -c fsync "$DEV"
}

for options in lazy_refcounts=on lazy_refcounts=on,cluster_size=512 \
	lazy_refcounts=on,cluster_size=16k,extended_l2=on; do
	rm -f lazy.qcow2
	qemu-img create -q -f qcow2 -o "$options" lazy.qcow2 64M
	qemu-io -f qcow2 -c 'write -q -P 1 1M 300k' lazy.qcow2
	attach "$PWD/lazy.qcow2" || continue
	is "$options: attached, it is clean" "$(bit lazy.qcow2)" false
	xfs_io -d -c 'pwrite -q -S 1 1M 4k' -c fsync "$DEV"
	is "$options: an overwrite changes no count" "$(bit lazy.qcow2)" false

	# Counts are written after a few seconds: look before.
	for ((seed = 2; seed < 30; seed++)); do
		write_some $seed
		cp lazy.qcow2 crash.qcow2
		if ! qemu-img check -f qcow2 crash.qcow2 >check.out 2>&1 &&
			grep -q '^ERROR cluster' check.out; then
			break
		fi
	done
	is "$options: then it is dirty" "$(bit lazy.qcow2)" true
	is "$options: and so is what a crash leaves" "$(bit crash.qcow2)" true
	like "$options: there, counts are stale" "$(<check.out)" 'ERROR cluster .* refcount=0 reference=1'
	dev=$DEV
	not_ok "$options: it is not written before it is repaired" \
		try_attach --no-repair "$PWD/crash.qcow2"
	like "$options: and that is said" "$(<"$WORK/.err")" 'qcowctl check --repair'
	DEV=$dev
	ok "$options: QEMU repairs it" qemu-img check -q -f qcow2 -r all crash.qcow2
	is "$options: then it is clean" "$(bit crash.qcow2)" false
	check_clean crash.qcow2 "$options, repaired"
	qemu-img convert -f qcow2 -O raw crash.qcow2 crash.raw
	ok "$options: all that was flushed is there" cmp crash.raw "$DEV"

	ok "$options: it goes on being written" \
		qcow-diff --quiet --mirror-in crash.raw --seed "$seed" --ops 300 "$DEV"
	dd if="$DEV" of=want.raw bs=1M iflag=direct status=none
	detach
	is "$options: detached, it is clean" "$(bit lazy.qcow2)" false
	check_clean lazy.qcow2 "$options"
	same lazy.qcow2 qcow2 want.raw raw "$options"
done

# qemu-img check -r by itself would delete the snapshots, as there are bitmaps.
qemu-img create -q -f qcow2 -o lazy_refcounts=on snap.qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 1 0 1M' snap.qcow2
qemu-img snapshot -c one snap.qcow2
qemu-img bitmap --add snap.qcow2 map
qemu-img bitmap --add --disable snap.qcow2 off
attach "$PWD/snap.qcow2"
write_some 2
cp snap.qcow2 crash.qcow2
detach
is "with a snapshot and a bitmap: it is dirty" "$(bit crash.qcow2)" true
attach "$PWD/crash.qcow2"
detach
like "repaired, it has the snapshot" "$(qemu-img snapshot -l crash.qcow2)" ' one '
check_clean crash.qcow2 "snapshot and bitmap"
ok "and that reads right" qemu-img convert -f qcow2 -l one -O raw crash.qcow2 one.raw
ok "all of it" qemu-io -r -f raw -c 'read -q -P 1 0 1M' one.raw
cp snap.qcow2 crash.qcow2
ok "nothing to repair where there are bitmaps" qcowctl check --repair crash.qcow2
like "it has the snapshot" "$(qemu-img snapshot -l crash.qcow2)" ' one '
# A cluster that is counted, and nobody's
cluster=$((($(stat -c %s crash.qcow2) + 65535) / 65536))
truncate -s $(((cluster + 1) * 65536)) crash.qcow2
put_bytes crash.qcow2 $((0x20000 + 2 * cluster)) 0001
not_ok "a leak where there are bitmaps is not repaired" qcowctl check --repair crash.qcow2
like "but why is said" "$(<"$WORK/.out")" 'has snapshots.*qemu-img bitmap --remove'
like "and it has the snapshot" "$(qemu-img snapshot -l crash.qcow2)" ' one '
cp snap.qcow2 crash.qcow2
qemu-img bitmap --add crash.qcow2 other 2>/dev/null
put_bytes crash.qcow2 88 8000000000000000
ok "a repair on demand" qcowctl check --repair crash.qcow2
like "keeps it, too" "$(qemu-img snapshot -l crash.qcow2)" ' one '
put_bytes crash.qcow2 79 02
ok "one that is marked corrupt is repaired" qcowctl check --repair crash.qcow2
like "and keeps it" "$(qemu-img snapshot -l crash.qcow2)" ' one '

# Where nobody asked for it, no bit
qemu-img create -q -f qcow2 eager.qcow2 64M
qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 64M
for image in eager old; do
	before=$(features $image.qcow2)
	attach "$PWD/$image.qcow2"
	write_some 3
	is "$image: the features stay" "$(features $image.qcow2)" "$before"
	cp $image.qcow2 crash.qcow2
	ok "$image: what a crash leaves has no errors" is_consistent crash.qcow2
	detach
	check_clean $image.qcow2
done

# An attach for writing repairs first, says so, and keeps out everybody else.
# stale FILE: an image that is marked dirty, and has a count that is too low
stale() {
	rm -f "$1"
	qemu-img create -q -f qcow2 -o lazy_refcounts=on "$1" 8M
	qemu-io -f qcow2 -c 'write -q -P 7 0 64k' "./$1"
	put_bytes "$1" 79 01
	put_bytes "$1" $((0x2000a)) 0000
	put_bytes "$1" $((0x20020)) 0001
	truncate -s 2M "$1"
}

stale 'a,b.qcow2'
if attach "$PWD/a,b.qcow2"; then
	said=$(<"$WORK/.err")
	like "an attach says that it repairs" "$said" 'marked dirty.*repairing it'
	like "and that it has" "$said" 'a,b.qcow2: repaired'
	ok "the data is there" cmp -n 65536 "$DEV" <(head -c 65536 /dev/zero | tr '\0' '\7')
	write_some 1
	detach
	check_clean a,b.qcow2
fi
stale locked.qcow2
before=$(cksum <locked.qcow2)
hold -r locked.qcow2
not_ok "not while somebody reads it" try_attach "$PWD/locked.qcow2"
release
is "which leaves it alone" "$(cksum <locked.qcow2)" "$before"
refused "--no-repair" 3 'marked dirty.*leave out --no-repair, run qcowctl check --repair .*locked.qcow2' \
	attach --no-repair locked.qcow2
said=$(env PATH=/nonexistent "$(command -v "$QCOWCTL")" attach locked.qcow2 2>&1)
is "without qemu-img: exit code" $? 3
like "without qemu-img: what to run is said" "$said" \
	'there is no qemu-img.*qemu-img check -f qcow2 -r all locked.qcow2'
is "all of which leaves it alone" "$(cksum <locked.qcow2)" "$before"
# One that is killed leaves its locks to the qemu-img that still works.
mkdir slow
printf '#!/bin/sh\ntrap "" TERM\ntouch "%s/started"\nsleep 5\n' "$PWD" >slow/qemu-img
chmod +x slow/qemu-img
PATH=$PWD/slow:$PATH "$QCOWCTL" attach locked.qcow2 >/dev/null 2>&1 &
pid=$!
for ((tries = 0; tries < 300; tries++)); do
	[[ ! -e started ]] || break
	sleep 0.1
done
kill -KILL $pid
wait $pid
not_ok "a repair that goes on keeps others out" qemu-io -f qcow2 -c quit locked.qcow2
for ((tries = 0; tries < 300; tries++)); do
	! qemu-io -f qcow2 -r -c quit locked.qcow2 2>/dev/null || break
	sleep 0.2
done
ok "until it ends" test $tries -lt 300
# What is repaired is what is locked, whoever has got its name meanwhile.
stale moved.qcow2
mkdir moving
printf '%s\n' '#!/bin/sh' "cd '$PWD' && mv moved.qcow2 moved-away.qcow2 && echo other >moved.qcow2" \
	"exec '$(command -v qemu-img)' \"\$@\"" >moving/qemu-img
chmod +x moving/qemu-img
ok "check --repair of an image that is moved" \
	env PATH="$PWD/moving:$PATH" "$(command -v "$QCOWCTL")" check --repair moved.qcow2
is "the other one is left alone" "$(<moved.qcow2)" other
check_clean moved-away.qcow2
put_bytes locked.qcow2 79 03
before=$(cksum <locked.qcow2)
refused "damage is not repaired unasked" 3 'marked corrupt' attach locked.qcow2
is "it is left alone" "$(cksum <locked.qcow2)" "$before"

# The same with a data file, which QEMU looks for in its working directory
qemu-img create -q -f qcow2 -o "lazy_refcounts=on,data_file=$WORK/lazy.raw" \
	data.qcow2 8M
put_bytes data.qcow2 79 01
attach "$PWD/data.qcow2" && write_some 1
detach
check_clean data.qcow2

# qcowctl check
checked() {
	local desc=$1 want=$2
	shift 2

	"$QCOWCTL" check "$@" >"$WORK/.out" 2>"$WORK/.err"
	is "$desc" $? "$want"
}
stale locked.qcow2
cp locked.qcow2 errors.qcow2
checked "check: errors" 3 errors.qcow2
like "check: what to do" "$(<"$WORK/.err")" 'check --repair'
checked "check: repair" 0 --repair errors.qcow2
checked "check: nothing is wrong" 0 errors.qcow2
qemu-img create -q -f qcow2 errors.qcow2 8M
put_bytes errors.qcow2 $((0x20020)) 0001
truncate -s 2M errors.qcow2
checked "check: leaks" 7 errors.qcow2
checked "check: no such file" 5 gone.qcow2
attach --read-only "$PWD/errors.qcow2"
checked "check: of a read-only device" 7 "$DEV"
checked "check: no repair of a device" 4 --repair "$DEV"
checked "check: no repair of its image" 4 --repair errors.qcow2
detach
attach "$PWD/errors.qcow2"
checked "check: of a device that is written" 7 "$DEV"
like "check: what to do then" "$(<"$WORK/.err")" 'detach it, and qcowctl check --repair'
checked "check: not of its image" 4 errors.qcow2
# What timeout(1) and the shell say where they cannot run it is no result of a check.
no_qemu() (
	rm -rf no-qemu && mkdir no-qemu && cd no-qemu || exit
	ln -s "$(command -v timeout)" .
	"$@"
)
# checked_without NAME WANT
checked_without() {
	local QCOWCTL=$qcowctl

	PATH=$WORK/no-qemu checked "check: of a device, $1" 1 "$DEV"
	like "check: $1 is said" "$(<"$WORK/.err")" "$2"
}
qcowctl=$(command -v "$QCOWCTL")
no_qemu true
checked_without "no qemu-img" 'cannot run qemu-img.*install qemu-utils'
no_qemu touch qemu-img
checked_without "one that cannot be run" 'could not check it'
# shellcheck disable=SC2016
no_qemu sh -c 'printf "#!/bin/sh\nkill -KILL \$\$\n" >qemu-img && chmod +x qemu-img'
checked_without "one that is killed" 'could not check it'
detach

no_kernel_report
done_testing
