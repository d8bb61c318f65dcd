#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# A device that is written is checked with writing frozen: writes wait and reads go on, and it ends whatever happens to the check.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"
# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit
# Where all takes long, who waits does so for longer than the kernel thinks right.
echo 600 2>/dev/null >/proc/sys/kernel/hung_task_timeout_secs
ops=$((3000 / SHARE)) checks=3
if [[ $QUICK ]]; then
	ops=400 checks=2
fi

# checked DESC CODE [OPTION]...: qcowctl check of DEV exits with CODE
checked() {
	local desc=$1 want=$2
	shift 2

	"$QCOWCTL" check "$@" "$DEV" >"$WORK/.out" 2>"$WORK/.err"
	is "$desc" $? "$want" || diag "$(<"$WORK/.out") $(<"$WORK/.err")"
}

# A qemu-img that says when it has begun, and waits as long as it is told to.
mkdir bin
cat >bin/qemu-img <<-END
	#!/bin/bash
	[[ ! -e $WORK/stubborn ]] || trap '' TERM
	echo \$\$ >$WORK/checking
	while [[ -e $WORK/hold ]]; do
		sleep 0.05
	done
	exec $(command -v qemu-img) "\$@"
END
chmod +x bin/qemu-img

# within SECONDS CMD...: it succeeds before that
within() {
	local tries=$(($1 * 10))
	shift

	for ((; tries; tries--)); do
		"$@" && return
		sleep 0.1
	done
	return 1
}

# begin_check [OPTION]...: a check of DEV that has frozen it, CHECK, until end_check;
# with time enough for the slowest kernel
begin_check() {
	rm -f checking
	: >hold
	PATH=$WORK/bin:$PATH "$QCOWCTL" check -t 600 "$@" "$DEV" >check.out 2>check.err &
	CHECK=$!
	if ! within 30 test -s checking; then
		fail "the check begins"
		diag "$(<check.err)"
	fi
}
# What it exits with
end_check() {
	rm -f hold
	wait "$CHECK"
}

check_waits() {
	[[ $(ps -o state= "$CHECK") == D ]]
}

state() {
	"$QCOWCTL" list -n -o NAME,STATE | awk -v dev="$DEV" '$1 == dev { print $2 }'
}
# write_at MIB SEED
write_at() {
	xfs_io -d -c "pwrite -q -S $2 $1M 300k" "$DEV"
}
read_some() {
	timeout 20 dd if="$DEV" of=/dev/null bs=64k count=32 iflag=direct status=none
}
gone() {
	[[ ! -e /sys/block/${DEV#/dev/} ]]
}
# dirty: does the header have the dirty bit?
dirty() {
	(($(od -An -tu1 -j79 -N1 "$1") & 1))
}

# Under load, what is checked has neither errors nor leaks. ATTACH: options of attach
ATTACH=()
checked_under_load() {
	local name=$1 load n bad=0 allocated
	shift

	rm -f load.qcow2 load.raw
	qemu-img create -q -f qcow2 "$@" load.qcow2 16M
	attach "${ATTACH[@]}" "$WORK/load.qcow2" || return
	qcow-diff --quiet --ops "$ops" --jobs 4 --mirror-out load.raw "$DEV" >load.out 2>&1 &
	load=$!
	allocated=/sys/block/${DEV#/dev/}/qcow/clusters_allocated
	# Before it is over, so no program is asked.
	within 20 eval "((\$(<$allocated) > 0))"
	for ((n = 0; n < checks; n++)); do
		kill -0 $load 2>/dev/null || break
		if ! "$QCOWCTL" check "$DEV" >check.out 2>&1 ||
			! grep -q 'No errors were found' check.out; then
			bad=$((bad + 1))
			diag "$(<check.out)"
		fi
	done
	is "$name: checked under load, it is clean each time" "$bad" 0
	ok "$name: there was load ($n checks)" test "$n" -gt 0
	wait $load
	is "$name: which goes on, and finds what it wrote" $? 0 || diag "$(<load.out)"
	is "$name: afterwards nothing is frozen" "$(state)" ok
	detach
	check_clean load.qcow2 "$name"
	same load.qcow2 qcow2 load.raw raw "$name"
}
checked_under_load "64k"
checked_under_load "512" -o cluster_size=512
checked_under_load "lazy" -o lazy_refcounts=on,cluster_size=4k
checked_under_load "subclusters" -o extended_l2=on,cluster_size=16k
rm -f data.raw
checked_under_load "data file" -o "data_file=$WORK/data.raw,cluster_size=4k"
ATTACH=(--compress)
checked_under_load "compressed" -o cluster_size=4k
ATTACH=()

# While it is frozen
qemu-img create -q -f qcow2 -o lazy_refcounts=on image.qcow2 64M
attach image.qcow2
write_at 1 1
write_at 1 2
ok "with lazy refcounts the image is dirty after a write" dirty image.qcow2
begin_check
is "the state says that it is frozen" "$(state)" frozen
not_ok "the dirty bit is cleared" dirty image.qcow2
sum=$(cksum <image.qcow2)
ok "a flush passes" timeout 20 xfs_io -d -c fsync "$DEV"
write_at 2 3 &
writer=$!
# More than there are tags
fio --name=many --filename="$DEV" --rw=randwrite --bs=4k --offset=8M --size=8M --direct=1 \
	--ioengine=libaio --iodepth=600 --verify=crc32c --verify_async=1 --output=fio.out &
many=$!
# The timed commit comes after five seconds.
sleep 7
is "the file stays as it is" "$(cksum <image.qcow2)" "$sum"
ok "a write waits" kill -0 $writer
ok "many do" kill -0 $many
ok "reads go on" read_some
inflight=$(awk '{ print $2 }' "/sys/block/${DEV#/dev/}/inflight")
ok "with hundreds of writes waiting ($inflight)" test "$inflight" -gt 120
checked "it is not frozen twice" 4
like "which is said" "$(<"$WORK/.err")" 'is being checked'
refused "it is not detached" 4 'frozen for a check' detach "$DEV"
# While this waits, the kernel lets nobody seek on the device.
blkdiscard -o 32M -l 1M "$DEV" &
discard=$!
sleep 1
ok "a discard waits" kill -0 $discard
is "the file is still as it was" "$(cksum <image.qcow2)" "$sum"
end_check
is "the check says that it is clean" $? 0
wait $writer
is "then the write is done" $? 0
wait $discard
is "and the discard" $? 0
wait $many
is "and all of those that waited" $? 0 || diag "$(<fio.out)"
is "the state is as before" "$(state)" ok
ok "the image is dirty again" dirty image.qcow2
checked "and is checked again" 0
not_ok "after which it is not" dirty image.qcow2
qemu-img convert -U -f qcow2 -O raw image.qcow2 image.raw
ok "what is in the file then is what the device shows" cmp image.raw "$DEV"

# Whatever ends qcowctl ends the freeze.
for signal in KILL TERM INT; do
	begin_check
	write_at 3 4 &
	writer=$!
	sleep 0.5
	ok "$signal: a write waits" kill -0 $writer
	if [[ $signal == INT ]]; then
		# Background jobs of a shell ignore it, so only the program that it runs
		kill -TERM "$(<checking)"
	else
		kill -$signal "$CHECK"
	fi
	wait "$CHECK" 2>/dev/null
	ok "$signal: it goes on when the check is killed" within 20 eval "! kill -0 $writer 2>/dev/null"
	wait $writer
	is "$signal: with success" $? 0
	is "$signal: the state is as before" "$(state)" ok
	ok "$signal: nothing is left running" within 20 eval "! kill -0 $(<checking) 2>/dev/null"
	rm -f hold
	checked "$signal: it can be checked again" 0
done

# So does time, even if nobody cares.
for stubborn in '' yes; do
	rm -f stubborn
	[[ ! $stubborn ]] || : >stubborn
	begin_check -t 2
	write_at 4 5 &
	writer=$!
	ok "${stubborn:+stubborn: }it is thawed after the timeout" \
		within 20 eval "! kill -0 $writer 2>/dev/null"
	wait $writer
	is "${stubborn:+stubborn: }the write is done" $? 0
	is "${stubborn:+stubborn: }the state is as before" "$(state)" ok
	end_check
	is "${stubborn:+stubborn: }the check fails" $? 4
	like "${stubborn:+stubborn: }and says why" "$(<check.err)" 'took longer than 2 seconds.*--timeout'
done
rm -f stubborn
refused "no timeout" 2 'timeout cannot be' check -t 0 "$DEV"
refused "a timeout that is no number" 2 'timeout cannot be' check -t 1h "$DEV"
refused "a timeout that is too long" 2 'timeout cannot be' check -t 3601 "$DEV"

# The calls themselves
# call MODE REQUEST FLAGS INDEX LAST...: each prints its errno, through one open file
call() {
	# shellcheck disable=SC2016
	perl -e 'my $mode = shift; open(my $f, $mode, "/dev/qcow-control") or die;
		while (@ARGV) {
			my ($nr, @args) = splice @ARGV, 0, 4;
			my $call = pack "LLlL", 16, @args;
			print ioctl($f, 0xbc00 + $nr, $call) ? 0 : $! + 0, " ";
		}' "$@"
}
n=${DEV#/dev/qcow}
is "freeze, freeze, thaw, thaw" "$(call '+<' 5 0 "$n" 0 5 0 "$n" 9 6 0 "$n" 0 6 0 "$n" 0)" "0 16 0 2 "
is "to close is to thaw" "$(call '+<' 5 0 "$n" 0)$(call '+<' 5 0 "$n" 3600)" "0 0 "
is "each needs to be writing" "$(call '<' 5 0 "$n" 0 6 0 "$n" 0)" "9 9 "
is "what is not known is refused" "$(call '+<' 5 1 "$n" 0 5 0 "$n" 3601 6 1 "$n" 0 6 0 "$n" 1)" \
	"22 22 22 22 "
is "no such device" "$(call '+<' 5 0 999 0 5 0 -1 0 6 0 999 0 6 0 -1 0)" "19 19 2 2 "
is "detach of a frozen device" "$(call '+<' 5 0 "$n" 0 1 0 "$n" 0 6 0 "$n" 0)" "0 16 0 "
is "nothing has changed" "$(state)" ok

# A detach that is put off waits for the thaw, too.
begin_check
ok "a frozen device is detached later" "$QCOWCTL" detach -d "$DEV"
is "until then it is there" "$(state)" "detaching,"
read_some
sleep 1
not_ok "also after somebody has closed it" gone
end_check
is "the check is not disturbed" $? 0
ok "then it goes" within 20 gone
forget "$DEV"
check_clean image.qcow2

attach --autoclear image.qcow2
begin_check
# Through the page cache: the last close writes it, with the disk's open_mutex held.
xfs_io -c 'pwrite -q -S 6 5M 300k' "$DEV" &
writer=$!
sleep 1
ok "autoclear: the last close waits" kill -0 $writer
end_check
is "autoclear: the check is not disturbed" $? 0
wait $writer
ok "autoclear: then it detaches" within 20 gone
forget "$DEV"
attach --autoclear image.qcow2
begin_check
xfs_io -d -c 'pread -q 0 4k' "$DEV"
not_ok "autoclear: not while it is frozen" gone
end_check
ok "autoclear: but when it is thawed" within 20 gone
forget "$DEV"
check_clean image.qcow2

# Read-only: nobody waits, so there is no hurry; and no detach.
attach --read-only image.qcow2
begin_check -t 1
sleep 2
is "read-only: the state" "$(state)" frozen
not_ok "read-only: it is not detached" "$QCOWCTL" detach "$DEV"
ok "read-only: reads go on" read_some
end_check
is "read-only: there is no timeout" $? 0
detach

# A check that still waits for a write, whose storage hangs, can be killed.
modprobe -q dm_mod
if [[ -e /dev/mapper/control ]]; then
	qemu-img create -q -f qcow2 -o preallocation=metadata hung.qcow2 8M
	truncate -s 16M hung.qcow2
	new_loop hung.qcow2 --direct-io=on
	dmsetup create hung --table "0 $((16 << 11)) linear $LOOP 0" && udevadm settle
	attach /dev/mapper/hung
	write_at 2 1
	# With the header in the page cache it is the driver that waits.
	head -c 64k /dev/mapper/hung >/dev/null
	dmsetup suspend --noflush --nolockfs hung
	write_at 2 2 &
	writer=$!
	sleep 1
	rm -f checking
	PATH=$WORK/bin:$PATH "$QCOWCTL" check "$DEV" >check.out 2>check.err &
	CHECK=$!
	ok "hung: the check waits" within 30 check_waits
	kill -KILL $CHECK
	ok "hung: until it is killed" within 20 eval "! kill -0 $CHECK 2>/dev/null"
	not_ok "hung: it has not begun" test -e checking
	dmsetup resume hung
	wait $CHECK 2>/dev/null
	wait $writer
	is "hung: the write is done" $? 0
	checked "hung: it can be checked again" 0
	detach
	udevadm settle
	dmsetup remove hung
	check_clean hung.qcow2
else
	skip "a check of a hung device is killed" "no device mapper"
fi

# A file system, and an image in it
qemu-img create -q -f qcow2 -o cluster_size=4k lower.qcow2 128M
attach lower.qcow2
lower=$DEV
mkfs.ext4 -q "$lower"
mkdir mnt
mount "$lower" mnt
qemu-img create -q -f qcow2 -o cluster_size=4k mnt/upper.qcow2 16M
attach mnt/upper.qcow2
qcow-diff --quiet --ops $((ops / 4)) --jobs 2 "$DEV" >load.out 2>&1 &
load=$!
for ((i = 0; i < 40; i++)); do
	dd if=/dev/urandom of=mnt/file$((i % 5)) bs=64k count=5 conv=fsync status=none
done &
files=$!
bad=0
for ((i = 0; i < checks; i++)); do
	"$QCOWCTL" check "$lower" >check.out 2>&1 || { bad=$((bad + 1)); diag "$(<check.out)"; }
	"$QCOWCTL" check "$DEV" >check.out 2>&1 || { bad=$((bad + 1)); diag "$(<check.out)"; }
done
is "a device on a file system on a device: each is clean under load" "$bad" 0
# The lower one is thawed by its timeout, for which the upper one waits.
upper=$DEV
DEV=$lower
begin_check -t 3
DEV=$upper
checked "with the lower one frozen, a check of the upper one waits" 0
end_check
wait $load
is "the load finds what it wrote" $? 0 || diag "$(<load.out)"
wait $files
is "the files are written" $? 0
detach "$upper"
check_clean mnt/upper.qcow2
umount mnt
detach "$lower"
check_clean lower.qcow2

# Damage: the count of the first table's cluster is too low.
qemu-img create -q -f qcow2 broken.qcow2 8M
qemu-io -f qcow2 -c 'write -q -P 7 0 64k' broken.qcow2
put_bytes broken.qcow2 $((0x2000a)) 0000
attach broken.qcow2
checked "damage is found" 3
like "and what to do is said" "$(<"$WORK/.err")" 'is damaged; detach it, and qcowctl check --repair'
checked "it is not repaired there" 4 --repair
like "nor is it said to be" "$(<"$WORK/.err")" 'detach it, and check'
detach

# A file that cannot be found by its name
attach --temp image.qcow2
checked "an image without a name cannot be checked" 5
like "which is said" "$(<"$WORK/.err")" 'cannot be reached'
is "and leaves nothing frozen" "$(state)" ok
detach

no_kernel_report
done_testing
