#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Whatever qcowctl refuses, it refuses with the documented exit code and one line that says why.
# kernels: 6.1 debug
# quick: 6.1

# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit
# What changes PATH, or the process, needs it by its path.
program=$(type -P "$QCOWCTL")
qemu-img create -q -f raw base.raw 1M
qemu-img create -q -f qcow2 base.qcow2 1M
qemu-img create -q -f qcow2 ok.qcow2 1M

# Usage: 2
refused "no command" 2 "no command ''; try qcowctl --help"
refused "an unknown command" 2 "no command 'mount'; try" mount
refused "attach without an image" 2 "attach: too few operands; give IMAGE" attach
refused "attach two images" 2 "attach: too many operands" attach a b
refused "an unknown long option" 2 \
	"option --frobnicate cannot be understood; try qcowctl attach --help" attach --frobnicate ok.qcow2
refused "an unknown letter in a bundle" 2 "option -x " attach -rx ok.qcow2
refused "an option without its value" 2 "option --number needs a value" \
	attach ok.qcow2 --number
refused "a letter without its value" 2 "option -n needs a value" attach ok.qcow2 -n
refused "a value that is not wanted" 2 "option --read-only=yes " \
	attach --read-only=yes ok.qcow2
for n in x 1x -1 +1 ' 1' '' 0x1 2147483648 99999999999999999999; do
	refused "the device number '$n'" 2 "--number cannot be '${n/+/\\+}'; give a number from 0 on" \
		attach --number="$n" ok.qcow2
done
for n in x 1Z -1 1KK K '' 18446744073709551616 16777216T 1.5M; do
	refused "the cache size '$n'" 2 "--cache-size cannot be '$n'; give bytes, or a number" \
		attach --cache-size="$n" ok.qcow2
done
refused "an unknown discard mode" 2 "--discard cannot be 'on'" \
	attach --discard=on ok.qcow2
refused "an unknown I/O mode" 2 "--io cannot be 'fast'" attach --io=fast ok.qcow2
refused "the format raw" 2 "--format cannot be 'raw'; .*losetup" \
	attach -f raw base.raw
refused "an unknown format" 2 "--format cannot be 'vmdk'; only qcow2 can be attached" \
	attach --format=vmdk ok.qcow2
refused "an unknown backing format" 2 "--backing-format cannot be 'qcow'" \
	attach -F qcow ok.qcow2
refused "detach nothing" 2 "nothing to detach" detach
refused "detach all and one" 2 "detach: --all and 'qcow0' exclude" detach --all qcow0
refused "list something" 2 "list: too many operands; give none" list qcow0
refused "two sources of passphrases" 2 "--key-file and --keyring exclude" \
	attach --key-file=x --keyring=x ok.qcow2
refused "check a device with a data file" 2 "check: --data-file goes with an image only" \
	check --data-file=x 0
refused "an unknown column" 2 "list: no column 'nope'" list -o name,nope
refused "an empty column" 2 "no column ''" list -o name,
refused "info on nothing" 2 "info: too few operands" info
refused "version of something" 2 "version: too many operands" version 1

# Files: 5, 3
refused "an image that does not exist" 5 \
	"nope.qcow2: No such file or directory; check the image's name" attach nope.qcow2
refused "an empty name" 5 ": No such file" attach ''
refused "a file taken for a directory" 5 "Not a directory" attach ok.qcow2/x
refused "info on a file that does not exist" 5 \
	"nope: No such file or directory; name a device or a file" info nope
refused "a name with a line break is one line" 5 'a\\012b: No such file' \
	attach $'a\nb'
refused "a directory" 3 "neither a file nor a block device" attach .
mkfifo pipe
refused "a FIFO, without waiting for a writer" 3 "neither a file" attach pipe
refused "a character device" 3 "neither a file" attach /dev/null
refused "a raw image" 3 "not a qcow2 image; a raw image is attached with losetup" attach base.raw
: >empty
refused "an empty file" 3 "not a qcow2 image" attach empty

# Headers: 3
damaged() {
	cp ok.qcow2 bad.qcow2
	poke bad.qcow2 "$3" "$4"
	refused "$1" 3 "bad.qcow2: $2" attach bad.qcow2
}
damaged "version 1" "qcow2 version 1; only" 7 '\x01'
damaged "version 4" "qcow2 version 4; only" 7 '\x04'
damaged "clusters of 256 bytes" "damaged header: cluster_bits is 8" 23 '\x08'
damaged "clusters of 4 MiB" "damaged header: cluster_bits is 22" 23 '\x16'
damaged "a header of 103 bytes" "damaged header: header_length is 103" 103 '\x67'
damaged "a header longer than a cluster" "damaged header: header_length is 65648" 101 '\x01'
damaged "an encryption that is not known" "damaged header: crypt_method is 3" 35 '\x03'
backing ok-chain.qcow2 base.raw raw
damaged_chain() {
	cp ok-chain.qcow2 bad.qcow2
	poke bad.qcow2 "$3" "$4"
	refused "$1" 3 "bad.qcow2: damaged header: $2" attach bad.qcow2
}
damaged_chain "a backing name far away" "backing_file_offset is 72057" 8 '\x01'
damaged_chain "a backing name in the header" "backing_file_offset is 8" \
	8 '\0\0\0\0\0\0\0\x08'
damaged_chain "a backing name beyond the cluster" "backing_file_size is 8" \
	8 '\0\0\0\0\0\0\xff\xf9'
damaged_chain "a backing name of 1024 bytes" "backing_file_size is 1024" \
	16 '\0\0\x04\0'
damaged_chain "an extension beyond the name" \
	"a header extension of length 4294967295" 116 '\xff\xff\xff\xff'
damaged_chain "a backing format of 16 bytes" "a backing format of length 16" \
	119 '\x10'
qemu-img create -q -f qcow2 -o data_file=data.raw data.qcow2 1M
poke data.qcow2 120 nbd:host
refused "a data file that is not local" 3 \
	"data.qcow2: its data file is reached by the protocol 'nbd'; only" attach data.qcow2
poke data.qcow2 118 '\x10'
refused "a name of a data file of 4 KiB and more" 3 \
	"damaged header: a name of a data file of length 41" attach data.qcow2
truncate -s 20 short.qcow2
poke short.qcow2 0 'QFI\xfb\0\0\0\x03'
refused "a header cut short" 3 "short.qcow2: damaged header" attach short.qcow2

# A device of which nothing can be read, or the beginning of the header only
cp ok.qcow2 disk.img
truncate -s 1M disk.img
new_loop disk.img
for table in "0 2048 error" "0 8 linear $LOOP 0"$'\n8 2040 error'; do
	if dmsetup create bad <<<"$table" 2>/dev/null; then
		refused "a bad disk: ${table//$'\n'/, }" 1 \
			"/dev/mapper/bad: cannot read: Input/output error" attach /dev/mapper/bad
		dmsetup remove --retry bad
	else
		skip "a bad disk: ${table//$'\n'/, }" "dmsetup fails"
	fi
done

# Encryption
printf 'correct horse' >key
qemu-img create -q -f qcow2 --object secret,id=key,file=key \
	-o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 luks.qcow2 1M
luks=$((16#$(od -An -tx1 -j120 -N8 luks.qcow2 | tr -d ' ')))
# damaged_luks DESC CODE REGEX OFFSET BYTES
damaged_luks() {
	cp luks.qcow2 bad.qcow2
	poke bad.qcow2 "$4" "$5"
	refused "$1" "$2" "bad.qcow2: $3" attach --key-file key bad.qcow2
}
damaged_luks "a LUKS header of 128 MiB" 3 "damaged header: a LUKS header of length 13" \
	132 '\x08'
damaged_luks "a LUKS header behind the end of the file" 1 \
	"its LUKS header cannot be read: No data available; see qemu-img check" 124 '\x7f'
damaged_luks "something else in its place" 3 "its LUKS header is damaged, or not one of LUKS 1" \
	$luks X
damaged_luks "no key slot in use" 1 "libcryptsetup cannot unlock it, with the cipher .*: No such file" \
	$((luks + 208)) '\0\0\xde\xad'
cp luks.qcow2 bad.qcow2
poke bad.qcow2 132 '\x04\0\0\0'
is "no memory for a LUKS header of 64 MiB" \
	"$(ulimit -v 65536; "$QCOWCTL" attach --key-file key bad.qcow2 2>&1; echo $?)" \
	"qcowctl: out of memory
1"
is "--temp: the overlay is not encrypted; and without qemu-img there is none" \
	"$(PATH=$WORK TMPDIR=$WORK "$program" attach --temp luks.qcow2 2>&1; echo $?)" \
	"qcowctl: warning: luks.qcow2: what is written with --temp is not encrypted, and goes to a file in $WORK
qcowctl: luks.qcow2: qemu-img cannot make an overlay of it; see above, or install qemu-utils
3"

# Backing files
backing top.qcow2 nope.raw raw
refused "a backing file that does not exist" 5 \
	"nope.raw: No such file.*; it is the backing file of top.qcow2" attach top.qcow2
backing top.qcow2 base.raw qcow2
refused "raw that is called qcow2" 3 \
	"base.raw: not a qcow2 image, though its overlay calls it one" attach top.qcow2
backing top.qcow2 base.raw vmdk
refused "a backing format that is neither" 3 "has the format 'vmdk'; only raw and qcow2" \
	attach top.qcow2
backing top.qcow2 base.raw
refused "no format, raw content" 3 \
	"qemu-img rebase -u -b base.raw -F raw top.qcow2 " attach top.qcow2
backing top.qcow2 base.qcow2
refused "no format, qcow2 content" 3 \
	"qemu-img rebase -u -b base.qcow2 -F qcow2 top.qcow2 " attach top.qcow2
mkdir "a b"
backing "a b/it's.qcow2" ../base.raw
refused "the command that mends it is quoted" 3 \
	"-b ../base.raw -F raw 'a b/it'\\\\''s.qcow2' " attach "a b/it's.qcow2"
command=$("$QCOWCTL" attach "a b/it's.qcow2" 2>&1 |
	sed 's/.*run: \(.*\) (or use.*/\1/')
ok "the command that mends it works" bash -c "$command"
is "and the format is there afterwards" \
	"$(qemu-img info --output=json "a b/it's.qcow2" | jq -r '.["backing-filename-format"]')" raw
backing ./a:b.qcow2 base.raw
refused "a name that QEMU would take for a protocol" 3 \
	"-F raw ./a:b.qcow2 " attach a:b.qcow2

# protocol NAME PROTOCOL
protocol() {
	backing top.qcow2 "$1" raw
	refused "the backing name $1" 3 "top.qcow2: .* is reached by the protocol '$2'; only local" \
		attach top.qcow2
}
protocol nbd://host/export nbd
protocol nbd:unix:/run/nbd.sock nbd
protocol http://host/base.img http
protocol rbd:pool/image rbd
protocol sub:dir/base.img sub
protocol 'json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}' nbd
protocol 'json:{"driver":"raw","file.filename":"nbd://host/x"}' nbd
protocol 'json:{"driver":"nbd","host":"h"}' nbd

# json NAME REGEX
json() {
	backing top.qcow2 "json:$1" "${3:-raw}"
	refused "the backing name json:$1" 3 "top.qcow2: .*$2" attach top.qcow2
}
json '{"driver":"raw"}' 'has no file.filename'
json '{"driver":"raw","file":{"driver":"file"}}' 'has no file.filename'
json '{"driver":"raw","file":{"driver":"file","filename":3}}' "'file.filename'"
json '{"driver":"raw","file":"node0"}' "the option 'file'"
json '{"driver":"raw","offset":512,"file.filename":"base.raw"}' "with the option 'offset'"
json '{"driver":"qcow2","backing":null,"file.filename":"base.qcow2"}' \
	"the option 'backing'" qcow2
json '{"driver":"vmdk","file.filename":"base.raw"}' "the format 'vmdk'"
json '{"driver":"qcow2","file.filename":"base.qcow2"}' 'is called both raw and qcow2'
json '[1]' 'not one JSON object'
json '{"driver":"raw"' 'not one JSON object'
json '{"driver":"raw"}x' 'not one JSON object'

# Loops
backing self.qcow2 self.qcow2 qcow2
refused "an image that backs itself" 3 \
	"self.qcow2: the backing chain is a loop, this file is self.qcow2 again" \
	attach self.qcow2
backing one.qcow2 two.qcow2 qcow2
backing two.qcow2 "$WORK/one.qcow2" qcow2
refused "a loop of two, by another name" 3 \
	"/one.qcow2: .* loop, this file is one.qcow2 again, by way of two.qcow2" \
	attach one.qcow2
backing three.qcow2 one.qcow2 qcow2
refused "a loop further down" 3 "one.qcow2: .* is one.qcow2 again" attach three.qcow2

# A chain longer than the limit of open files
prev=base.raw format=raw
for ((i = 0; i < 12; i++)); do
	backing "deep$i.qcow2" "$prev" "$format"
	prev=deep$i.qcow2 format=qcow2
done
(
	ulimit -n 10
	"$QCOWCTL" attach deep11.qcow2
) >"$WORK/.out" 2>&1
is "too many files: the exit code" $? 1
like "too many files: the limit is named" "$(<"$WORK/.out")" \
	'too many open files, [0-9]+ of the chain .* hard limit of 10'

# Opening for writing: 6, 4
cp "$(type -P sleep)" running
./running 60 &
refused "a file that cannot be written, being run" 4 \
	"lets nobody write; .*--read-only" attach running
kill $!
wait $! 2>/dev/null
mkdir ro
if mount -t tmpfs ro ro 2>/dev/null; then
	cp ok.qcow2 ro/
	mount -o remount,ro ro
	refused "an image on a read-only file system, with --compress" 6 \
		"cannot be opened for writing: Read-only file system; make that possible" \
		attach --compress=zlib ro/ok.qcow2
	qemu-img create -q -f qcow2 -o data_file=ro-data.raw ro-data.qcow2 1M
	mount -o remount,rw ro
	cp ro-data.raw ro/
	mount -o remount,ro ro
	refused "a data file on a read-only file system" 6 \
		"ro/ro-data.raw: cannot be opened for writing: .*; to attach .* --read-only" \
		attach --data-file=ro/ro-data.raw ro-data.qcow2
	refused "repairing one there" 6 "cannot be opened for writing: .*make that" \
		check --repair ro/ok.qcow2
	umount ro
else
	skip "an image on a read-only file system" "mount fails"
fi
truncate -s 64M fs.raw
mkfs.ext4 -q fs.raw
modprobe loop 2>/dev/null
if loop=$(losetup --find --show fs.raw 2>/dev/null) && mount "$loop" ro; then
	refused "a block device that is mounted" 4 \
		"$loop: the block device is in use" attach "$loop"
	umount ro
	losetup -d "$loop"
else
	skip "a block device that is mounted" "no loop device"
fi

# Locks: 4
hold ok.qcow2
refused "an image that QEMU writes" 4 \
	"ok.qcow2: $HOLDER \(qemu-io\) has it open for writing" attach ok.qcow2
# alone DESC REGEX ARGUMENT...: what qcowctl says that sees no process but itself
alone() {
	if [[ -e /proc/self/ns/pid ]]; then
		like "$1" "$(unshare --pid --fork --mount-proc "$program" "${@:3}" 2>&1)" "$2"
	else
		skip "$1" "no namespaces for processes"
	fi
}
alone "or somebody that cannot be seen" \
	'ok.qcow2: another process, not visible here, has it open for writing' attach ok.qcow2
refused "an image that QEMU writes, read-only" 4 \
	"$HOLDER \(qemu-io\) has it open for writing" attach --read-only ok.qcow2
release
hold -r ok.qcow2
refused "an image that QEMU reads" 4 \
	"$HOLDER \(qemu-io\) uses it and lets nobody write; .*--read-only" attach ok.qcow2
release
backing top.qcow2 base.qcow2 qcow2
hold base.qcow2
refused "a backing file that QEMU writes" 4 \
	"base.qcow2: $HOLDER \(qemu-io\) has it open for writing" attach top.qcow2
release

# A reader's lock on byte 200: nobody else may read.
coproc perl -e 'open(F, "<", "ok.qcow2"); $lock = pack("ssx4qqix4", 0, 0, 200, 1, 0);
	fcntl(F, 37, $lock) or die; syswrite STDOUT, "locked\n"; <STDIN>'
read -ru "${COPROC[0]}"
refused "an image that nobody else may read" 4 \
	"ok.qcow2: $COPROC_PID \(perl\) uses it and lets nobody read; close it there" attach ok.qcow2
kill "$COPROC_PID"
wait "$COPROC_PID" 2>/dev/null

# fails PATH CALL DESC CODE REGEX ARG...: refused, as a system call on PATH fails: CALL is
# what strace takes.
fails() {
	printf '#!/bin/sh\nexec strace -qq -o /dev/null -P "%s" -e inject=%s "%s" "$@"\n' \
		"$1" "$2" "$program" >failing
	chmod +x failing
	QCOWCTL=./failing refused "${@:3}"
}
fails "$WORK/ok.qcow2" fcntl:error=EIO "locks that fail" 1 \
	"ok.qcow2: cannot lock: Input/output error" attach ok.qcow2
said=$(strace -qq -o /dev/null -P "$WORK/ok.qcow2" -e inject=fcntl:error=ENOLCK \
	"$program" check ok.qcow2 2>&1)
is "a file system without locks: check works" $? 0
like "and tells" "$said" \
	'warning: ok.qcow2: its file system has no locks \(No locks available\); make sure'

# Damage that stays: 3, 1
qemu-img create -q -f qcow2 -o lazy_refcounts=on stays.qcow2 1M
qemu-img snapshot -c one stays.qcow2
# The L1 table is where no table may be, and the image is marked dirty.
poke stays.qcow2 46 '\x02'
poke stays.qcow2 79 '\x01'
# last_line DESC CODE REGEX ARG...: of qcowctl ARG..., for which QEMU says something, too
last_line() {
	local status

	"$QCOWCTL" "${@:4}" >"$WORK/.out" 2>&1
	status=$?
	is "$1: exit code" $status "$2"
	like "$1" "$(tail -n 1 "$WORK/.out")" "^qcowctl: $3"
}
last_line "a repair that fails" 3 \
	"stays.qcow2: cannot be repaired; see what qcowctl check stays.qcow2 says" attach stays.qcow2
last_line "which says" 1 "stays.qcow2: qemu-img could not check it; see above" check stays.qcow2
poke stays.qcow2 88 '\x80'
last_line "one that might delete snapshots" 3 \
	"stays.qcow2: has snapshots, .* qemu-io cannot open it to prevent that; repair a copy" \
	check --repair stays.qcow2
qemu-img create -q -f qcow2 stays.qcow2 1M
qemu-io -f qcow2 -c 'write -q 0 64k' stays.qcow2
# Data that is not at a cluster
poke stays.qcow2 $((0x40006)) '\x02'
last_line "errors" 3 "stays.qcow2: is damaged; qcowctl check --repair mends what can be" \
	check stays.qcow2
last_line "and not all can be repaired" 3 \
	"stays.qcow2: is damaged; not all of it could be repaired" check --repair stays.qcow2
cp ok.qcow2 stays.qcow2
truncate -s 1M stays.qcow2
poke stays.qcow2 $((0x20010)) '\0\x01'
last_line "a leak" 7 \
	"stays.qcow2: has leaked clusters, .* do no harm; qcowctl check --repair frees" \
	check stays.qcow2

# With the driver: 4, 6, 1
qemu-img create -q -f qcow2 big.qcow2 10M
attach -n 7 big.qcow2
mkfs.ext4 -q /dev/qcow7
# shellcheck disable=SC2016 # for that shell to expand
unshare --mount sh -c 'mount /dev/qcow7 ro && : >mounted && exec sleep 100' &
for ((tries = 0; tries < 100; tries++)); do
	[[ ! -e mounted ]] || break
	sleep 0.1
done
refused "detach what is mounted elsewhere" 4 \
	"qcow7: mounted on $WORK/ro for process $!; end that, or use --deferred" detach 7
kill $!
wait $! 2>/dev/null
exec {opener}</dev/qcow7
alone "detach what is open in a process that is not to be seen" \
	'qcow7: open in what cannot be seen from here; end that, or use --deferred' detach 7
exec {opener}<&-
mkswap /dev/qcow7 >/dev/null
swapon /dev/qcow7
refused "check what is swapped on" 4 \
	"qcow7: in use as swap, which must not wait for a check; swapoff /dev/qcow7 first" check 7
swapoff /dev/qcow7
control=/dev/qcow-control
fails $control ioctl:error=EIO "a driver that fails" 1 "$control: Input/output error" list
fails $control ioctl:error=ENOTTY "another driver" 6 \
	"$control: Inappropriate .*; the module does not fit this qcowctl" list
fails $control ioctl:error=ENOMEM "a driver that does not say why" 1 \
	"ok.qcow2: the driver refused it: Cannot allocate memory; the kernel log may say more" \
	attach ok.qcow2
# The list of devices comes first.
fails $control ioctl:error=EINVAL:when=2 "a detach that fails" 1 \
	"qcow7: still attached: Invalid argument; see the kernel log" detach 7
detach /dev/qcow7
# While a check waits for the passphrase, another device gets the number.
attach -n 7 --key-file key luks.qcow2
mkfifo keys
"$QCOWCTL" check --key-file keys 7 >/dev/null 2>.again &
exec {keys}>keys
detach /dev/qcow7
attach -n 7 ok.qcow2
cat key >&"$keys"
exec {keys}>&-
wait $!
is "check what has become another device: the exit code" $? 4
is "check what has become another device" "$(<.again)" \
	"qcowctl: /dev/qcow7: was just attached anew; try again"
detach /dev/qcow7

# Without the driver: 6
loaded=
[[ ! -e /dev/qcow-control || ! ${QCOW_KO-} ]] || { rmmod qcow && loaded=1; }
if [[ -e /dev/qcow-control ]]; then
	skip "without the driver" "the driver is loaded"
else
	for command in "attach ok.qcow2" "detach 0" "detach -a" list "info 0"; do
		# shellcheck disable=SC2086
		refused "$command without the driver" 6 "module loaded\? modprobe qcow" \
			$command
	done
fi
[[ ! $loaded ]] || insmod "$QCOW_KO"

# No errors: 0
for command in "" attach detach list info check version; do
	# shellcheck disable=SC2086
	like "qcowctl $command --help" "$("$QCOWCTL" $command --help)" '^Usage: qcowctl '
done
like "version" "$("$QCOWCTL" version)" $'^qcowctl [0-9.]+\nmodule '
like "--version" "$("$QCOWCTL" --version)" '^qcowctl [0-9.]+'
"$QCOWCTL" --help >/dev/full 2>.full
is "a full standard output: the exit code" $? 1
like "a full standard output is told" "$(<.full)" \
	'^qcowctl: standard output: No space left on device; mend that and try'
ok "info on a file is qemu-img info" \
	cmp <("$QCOWCTL" info ok.qcow2) <(qemu-img info ok.qcow2)
is "info --json on a file" "$("$QCOWCTL" info -J ok.qcow2 | jq -r .format)" qcow2
hold ok.qcow2
not_ok "info on a file that is written" "$QCOWCTL" info ok.qcow2
ok "info --force-share on a file that is written" "$QCOWCTL" info -U ok.qcow2
release
is "check without qemu-img" "$(PATH=$WORK "$program" check ok.qcow2 2>&1; echo $?)" \
	"qcowctl: ok.qcow2: cannot run qemu-img, which checks images; install qemu-utils
1"
mkdir not-to-run
touch not-to-run/qemu-img
is "check with a qemu-img that cannot be run" \
	"$(PATH=$WORK/not-to-run "$program" check ok.qcow2 2>&1; echo $?)" \
	"qcowctl: ok.qcow2: cannot run qemu-img, which checks images; install qemu-utils
1"
is "info on a file without qemu-img" \
	"$(PATH=$WORK "$program" info ok.qcow2 2>&1; echo $?)" \
	"qcowctl: ok.qcow2: cannot run qemu-img, which reads files: No such file or directory; install qemu-utils
1"
done_testing
