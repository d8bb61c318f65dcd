#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Encrypted images: LUKS and legacy AES, read and written as QEMU does; keys, where they come from and that they go nowhere.
# kernels: 6.1 debug
# quick: 6.1
# cpus: 2
# timeout: 900

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit
# AES is slow where the CPU is emulated.
CELL_OPS=${QCOW_OPS:-${QUICK:+300}}
CELL_OPS=${CELL_OPS:-$((800 / SHARE))}

# create NAME FORMAT KEYFILE [OPTION,...] [ARGUMENT]...: an encrypted image of 8M, or SIZE
create() {
	local options=encrypt.format=$2,encrypt.key-secret=key

	[[ $2 != luks ]] || options+=,encrypt.iter-time=10
	qemu-img create -q --object "secret,id=key,file=$3" -f qcow2 \
		-o "$options${4:+,$4}" "${@:5}" "$1" "${SIZE:-8M}" >&2
}

# by_qemu NAME FORMAT KEYFILE COMMAND...: with qemu-io
by_qemu() {
	local name=$1 format=$2 key=$3 c=()
	shift 3

	while (($#)); do
		c+=(-c "$1")
		shift
	done
	qemu-io --object "secret,id=key,file=$key" "${c[@]}" --image-opts \
		"driver=qcow2,file.filename=$name,encrypt.format=$format,encrypt.key-secret=key"
}

# refused STATUS DESC REGEX COMMAND...: exit status, and one line that says why
refused() {
	"${@:4}" >.out 2>.err </dev/null
	is "$2: exit status" $? "$1"
	like "$2: it says why" "$(<.err)" "$3"
	is "$2: in a line" "$(grep -vc warning .err)" 1
}

# luks_header IMAGE: sets OFFSET and LENGTH of what its header extension points to
luks_header() {
	local at

	at=$(head -c 65536 "$1" | od -An -v -tx4 --endian=big -w4 | grep -n 0537be77)
	read -r OFFSET LENGTH < <(od -A n -t u8 --endian=big -j $(((${at%%:*} + 1) * 4)) -N 16 "$1")
}

# twins FORMAT IMAGE DESC: the driver writes to one copy, QEMU to another, and it is the same.
twins() {
	cp "$2" one.qcow2
	cp "$2" two.qcow2
	attach --key-file key one.qcow2
	ok "$3: write" xfs_io -d -c 'pwrite -q -S 0x5a -b 512k 4k 3M' -c 'pwrite -q -S 3 6M 512' \
		"$DEV"
	detach
	ok "$3: QEMU writes the same" by_qemu two.qcow2 "$1" key \
		'write -q -P 0x5a 4k 3M' 'write -q -P 3 6M 512'
	ok "$3: the files are identical" cmp one.qcow2 two.qcow2
	not_ok "$3: and have no plain text" grep -q ZZZZZZZZ one.qcow2
	attach --key-file key two.qcow2
	ok "$3: what QEMU wrote is read" cmp -i 4096:0 -n 3145728 "$DEV" zs
	detach
}

# What is in the file is what QEMU would have put there.
printf 'correct horse' >key
head -c 3M /dev/zero | tr '\0' Z >zs
create luks.empty luks key
create luks.full luks key preallocation=metadata
create aes.full aes key preallocation=metadata
for format in luks aes; do
	twins $format $format.full $format
done
attach --key-file key one.qcow2
like "legacy AES is warned of" "$(<"$WORK/.err")" 'insecure.*qemu-img convert'
is "in one line" "$(wc -l <"$WORK/.err")" 1
# The command that it names, with names filled in
read -ra convert < <(sed -n 's/.*convert it: //p' "$WORK/.err" | sed 's/KEYFILE/key/;s/NEW/new.qcow2/')
detach
ok "the command that converts it" "${convert[@]:-false}"
attach --key-file key new.qcow2
is "makes the same disk of it" "$(xfs_io -r -c 'pread -v 6M 512' "$DEV" | head -n 1)" \
	"00600000:  03 03 03 03 03 03 03 03 03 03 03 03 03 03 03 03  ................"
is "sysfs says that it is encrypted" "$(<"/sys/block/${DEV#/dev/}/qcow/encryption")" luks
detach

# Keys
cp luks.empty luks.qcow2
printf 'wrong' >wrong
refused 6 "a wrong passphrase" "luks.qcow2: that is not its passphrase" \
	qcowctl attach --key-file wrong luks.qcow2
refused 6 "none, and no terminal" "encrypted.*--key-file" qcowctl attach luks.qcow2
refused 5 "a key file that is not there" "nothere: cannot be read" \
	qcowctl attach --key-file nothere luks.qcow2
refused 6 "a key that is not there" "keyring has no key" \
	qcowctl attach --keyring nothere luks.qcow2
refused 2 "two sources" "exclude each other" \
	qcowctl attach --keyring nothere --key-file key luks.qcow2
refused 3 "compression" "is encrypted, and compressed clusters never are" \
	qcowctl attach --compress --key-file key luks.qcow2
is "nothing is attached" "$(qcowctl list -n)" ""
# shellcheck disable=SC2016 # for that shell to expand
is "from standard input" "$(qcowctl attach --key-file - --number 40 luks.qcow2 <key)" /dev/qcow40
qcowctl detach 40
# add_key(2)
if perl -e '@key = ("user", "qcow-test", "correct horse", 13, -4); exit(syscall(248, @key) <= 0)'; then
	is "from the keyring" "$(qcowctl attach --keyring qcow-test --number 40 luks.qcow2)" \
		/dev/qcow40
	qcowctl detach 40
fi
# type_slowly LINE...: the program that reads them throws away what comes too early.
type_slowly() {
	local line

	for line; do
		sleep 2
		echo "$line"
	done
	sleep 2
}
type_slowly 'correct horse' | script -qec 'qcowctl attach --number 40 luks.qcow2' /dev/null >.out
like "from the terminal" "$(<.out)" 'Passphrase of luks.qcow2: .*/dev/qcow40'
not_ok "where it is not shown" grep -q horse .out
qcowctl detach 40
type_slowly no 'correct horse' | script -qec 'qcowctl attach --number 40 luks.qcow2' /dev/null >.out
like "which asks again" "$(<.out)" 'not its passphrase.*/dev/qcow40'
qcowctl detach 40
qemu-img create -q -f qcow2 open.qcow2 8M
attach --key-file key open.qcow2
pass "a key file where nothing is encrypted does no harm"
detach

# Check and repair
attach --key-file key luks.qcow2
ok "check a device" qcowctl check --key-file key "$DEV"
detach
ok "check the image" qcowctl check --key-file key luks.qcow2
cp luks.empty lazy.qcow2
put_bytes lazy.qcow2 80 0000000000000001
attach --key-file key lazy.qcow2
ok "write" xfs_io -d -c 'pwrite -q -S 7 0 1M' -c fsync "$DEV"
cp lazy.qcow2 dirty.qcow2
detach
attach --key-file key dirty.qcow2
like "a dirty one is repaired" "$(<"$WORK/.err")" 'repaired'
is "and has its data" "$(xfs_io -r -c 'pread -v 1020k 512' "$DEV" | head -c 13)" "000ff000:  07"
detach

# Layers, each with a key of its own
printf 'the base' >base.key
printf 'the top' >top.key
create base.qcow2 luks base.key
by_qemu base.qcow2 luks base.key 'write -q -P 0x11 0 8M'
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2
create top.qcow2 luks top.key cluster_size=4k -b mid.qcow2 -F qcow2
refused 6 "layers: keys in the wrong order" "top.qcow2: that is not its passphrase" \
	qcowctl attach --key-file base.key --key-file top.key top.qcow2
refused 6 "layers: one key for both" "base.qcow2: that is not its passphrase" \
	qcowctl attach --key-file top.key top.qcow2
attach --key-file top.key --key-file base.key top.qcow2
ok "layers: write" xfs_io -d -c 'pwrite -q -S 0x22 1k 512' -c 'pwrite -q -S 0x23 1M 64k' "$DEV"
is "layers: copy on write" "$(xfs_io -r -c 'pread -v 0 4k' "$DEV" |
	sed -n 's/^[0-9a-f]*:  \(..\) .*/\1/p' | uniq -c | xargs)" "64 11 32 22 160 11"
ok "layers: two devices on one encrypted base" qcowctl attach --read-only --number 42 \
	--key-file base.key mid.qcow2
detach
qcowctl detach 42
is "layers: QEMU sees the same" "$(qemu-io --object secret,id=t,file=top.key \
	--object secret,id=b,file=base.key -c 'read -q -P 0x22 1k 512' -c 'read -q -P 0x11 0 1k' \
	-c 'read -q -P 0x23 1M 64k' -c 'read -q -P 0x11 1088k 1M' 'json:{"driver":"qcow2",
	"file.filename":"top.qcow2","encrypt.format":"luks","encrypt.key-secret":"t",
	"backing.driver":"qcow2","backing.file.filename":"mid.qcow2","backing.backing.driver":"qcow2",
	"backing.backing.file.filename":"base.qcow2","backing.backing.encrypt.format":"luks",
	"backing.backing.encrypt.key-secret":"b"}' 2>&1)" ""

# Compressed clusters are not encrypted.
cp luks.empty packed.qcow2
by_qemu packed.qcow2 luks key 'write -q -c -P 0x33 0 64k' 'write -q -P 0x44 64k 64k'
attach --key-file key packed.qcow2
is "a compressed cluster in it" "$(xfs_io -r -c 'pread -v 65024 1k' "$DEV" |
	sed -n 's/^[0-9a-f]*:  \(..\) .*/\1/p' | uniq -c | xargs)" "32 33 32 44"
ok "is written" xfs_io -d -c 'pwrite -q -S 0x55 0 512' "$DEV"
detach
is "and encrypted then" "$(by_qemu packed.qcow2 luks key 'read -q -P 0x55 0 512' \
	'read -q -P 0x33 512 65024')" ""

# Nothing is written over the LUKS header.
cp luks.full hit.qcow2
luks_header hit.qcow2
l1=$(od -A n -t u8 --endian=big -j 40 -N 8 hit.qcow2 | tr -d ' ')
l2=$(od -A n -t u8 --endian=big -j "$l1" -N 8 hit.qcow2 | tr -d ' ')
l2=$((l2 & 0x00fffffffffffe00))
put_bytes hit.qcow2 $l2 "$(printf %016x $((1 << 63 | (OFFSET + 65536))))"
attach --key-file key hit.qcow2
not_ok "a write that would hit the LUKS header" xfs_io -d -c 'pwrite -q 0 4k' "$DEV"
like "is stopped" "$(<"/sys/block/${DEV#/dev/}/qcow/damage")" 'encryption header'
detach

# Every mode of writing
for mode in directsync writethrough unsafe; do
	cp luks.full mode.qcow2
	attach --key-file key --cache=$mode mode.qcow2
	ok "$mode: write" xfs_io -d -c 'pwrite -q -S 0x66 -b 64k 0 1M' "$DEV"
	detach
	is "$mode: it is there" "$(by_qemu mode.qcow2 luks key 'read -q -P 0x66 0 1M')" ""
done

# What is emptied does not decrypt to zeroes: a power cut before the tables are durable
# leaves what was there. They may be, where they are in the file that is copied.
# cut NAME OPTIONS ATTACH COMMAND...: the command clears the first cluster.
cut() {
	local left

	create cut.qcow2 luks key "$2"
	attach --key-file key "$3" cut.qcow2
	ok "$1: write" xfs_io -d -c 'pwrite -q -S 0x77 -b 64k 0 64k' -c fsync "$DEV"
	cp cut.qcow2 crash.qcow2
	ok "$1" "${@:4}" "$DEV"
	if [[ -e cut.data ]]; then
		cp cut.data crash.data
	else
		cp cut.qcow2 crash.qcow2
	fi
	detach
	is "$1: it is cleared" "$(by_qemu cut.qcow2 luks key 'read -q -P 0 0 64k')" ""
	[[ ! -e cut.data ]] || mv crash.data cut.data
	left=$(by_qemu crash.qcow2 luks key 'read -q -P 0x77 0 64k')
	[[ ! $left ]] || left=$(by_qemu crash.qcow2 luks key 'read -q -P 0 0 64k')
	is "$1: a power cut leaves what was there, or zeroes" "$left" ""
	rm cut.*
}
cut "zeroes in a data file" data_file=cut.data --discard=unmap fallocate -p -o 0 -l 64k
cut "a discard that keeps clusters" '' --discard=keep blkdiscard -f -o 0 -l 64k

# A file system
cp luks.empty fs.qcow2
attach --key-file key fs.qcow2
ok "mkfs" mkfs.ext4 -q -F "$DEV"
mkdir mnt
mount "$DEV" mnt
ok "files" fio --name=files --directory=mnt --rw=randwrite --bs=4k --size=2M --verify=crc32c \
	--fsync=16 --output=/dev/null
umount mnt
ok "fsck" fsck.ext4 -fn "$DEV"
detach

# What else QEMU makes. The debug kernel has only AES, and libcryptsetup needs a kernel's for
# what OpenSSL does not have. (QEMU itself ends with an assertion for cbc with aes-192.)
more='cipher-alg=aes-192 cipher-alg=serpent-256 cipher-alg=twofish-256
	cipher-alg=cast5-128,cipher-mode=cbc'
[[ ! $QUICK ]] || more=
for cipher in cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha1 \
	cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512 $more; do
	create cipher.full luks key "preallocation=metadata,encrypt.${cipher//,/,encrypt.}"
	twins luks cipher.full "$cipher"
done

# Of a sector's number plain takes 32 bits. A raw data file has it at its place on the disk.
wrap=$((1 << 41))
options=encrypt.ivgen-alg=plain,cluster_size=2M,preallocation=metadata
options+=,data_file=plain.data,data_file_raw=on
SIZE=$((wrap + (2 << 20))) create plain.qcow2 luks key $options
attach --key-file key plain.qcow2
ok "plain: write where the number wraps" xfs_io -d -c "pwrite -q -S 0x5a $((wrap - 65536)) 128k" \
	-c 'pwrite -q -S 0x5a 0 64k' "$DEV"
detach
ok "plain: what follows is as at 0" cmp -i 0:$wrap -n 65536 plain.data plain.data
is "plain: QEMU reads it, and writes" "$(by_qemu plain.qcow2 luks key \
	"read -q -P 0x5a $((wrap - 65536)) 128k" "write -q -P 0x6b $wrap 64k" 2>&1)" ""
attach --key-file key plain.qcow2
is "plain: what QEMU wrote is read" "$(xfs_io -r -c "pread -v $wrap 64k" "$DEV" |
	sed -n 's/^[0-9a-f]*:  \(..\) .*/\1/p' | uniq -c | xargs)" "4096 6b"
detach

# Those that are refused, by the tool and by the driver
create ecb.qcow2 luks key encrypt.cipher-mode=ecb
refused 1 "ECB" 'aes-ecb' qcowctl attach --key-file key ecb.qcow2
cp luks.empty benbi.qcow2
luks_header benbi.qcow2
truncate -s 4M header
cryptsetup luksFormat -q --type luks1 --cipher aes-cbc-benbi --key-size 256 \
	--pbkdf-force-iterations 1000 --key-file key header
dd if=header of=benbi.qcow2 bs=64k count="$LENGTH" seek="$OFFSET" conv=notrunc status=none \
	iflag=count_bytes oflag=seek_bytes
refused 3 "another generator" 'aes-cbc-benbi' qcowctl attach --key-file key benbi.qcow2

# Keys go nowhere. In 8 bytes each: a passphrase, which is the key of an AES image as it is,
# and the key of a LUKS one.
printf vq9zWk3T-p7LxRb2 >secret
create secret.luks luks secret
create secret.aes aes secret
luks_header secret.luks
dd if=secret.luks of=secret.header bs=64k skip="$OFFSET" count="$LENGTH" status=none \
	iflag=skip_bytes,count_bytes
truncate -s 4M secret.header
ok "the key of a volume" cryptsetup luksDump -q --dump-volume-key --volume-key-file volume.key \
	--key-file secret secret.header
is "has 64 bytes" "$(stat -c %s volume.key)" 64

# leaks FILE...: those that have a part of either, as it is or in hexadecimal
leaks() {
	# shellcheck disable=SC2016 # for perl
	perl -e '
		sub all { open my $f, "<", shift or return ""; local $/; <$f> // "" }
		my @parts = map { unpack "(a8)*", all($_) } "secret", "volume.key";
		for my $name (@ARGV) {
			my $text = all($name);
			(my $hex = lc $text) =~ s/0x//g;
			$hex =~ tr/0-9a-f//cd;
			print "$name\n" if grep { index($text, $_) >= 0 ||
				index($hex, unpack "H*", $_) >= 0 } @parts;
		}' "$@"
}

# look: leaks of all that is to be seen of the device; sets LOOKED to how many files that is
look() {
	local name=${DEV#/dev/} files columns

	columns=$(qcowctl list --help | sed -n '/^  [A-Z]/p' | tr -d ' \n')
	mkdir -p seen
	dmesg >seen/dmesg
	cat /sys/kernel/tracing/trace >seen/trace
	cat /proc/keys >seen/keys
	cp .err seen/attach
	qcowctl info "$DEV" >seen/info
	qcowctl info --json "$DEV" >seen/info.json
	qcowctl list -o "$columns" >seen/list
	qcowctl list --json -o "$columns" >seen/list.json
	mapfile -t files < <(find seen "$1" "/sys/block/$name/" /sys/module/qcow \
		/sys/kernel/debug/{qcow,"block/$name"} -type f 2>/dev/null)
	LOOKED=${#files[@]}
	leaks "${files[@]}" >found
}

echo 1 >/sys/kernel/tracing/events/qcow/enable
for format in luks aes; do
	attach --key-file secret secret.$format
	ok "$format: write and read" xfs_io -d -c 'pwrite -q 4k 1M' -c fsync -c 'pread -q 0 2M' "$DEV"
	look secret.$format
	ok "$format: there is much to be seen" test "$LOOKED" -gt 100
	like "$format: with events" "$(<seen/trace)" 'qcow_map:.*qcow_commit:'
	is "$format: and no list is empty" "$(find seen -size 0 ! -name attach)" ""
	is "$format: the keys are nowhere" "$(<found)" ""
	[[ $format != aes ]] || echo "planted: $(<secret)" >/dev/kmsg
	[[ $format != aes ]] || look secret.$format
	detach
done
echo 0 >/sys/kernel/tracing/events/qcow/enable
is "but where one is, that is seen" "$(<found)" seen/dmesg
cp volume.key raw
od -An -v -tx1 volume.key | sed -n 2p >spaced
od -An -v -tx1 volume.key | tr -d ' \n' | tr a-f A-F >upper
sed 's/ / 0x/g' spaced >prefixed
is "in any form" "$(leaks raw zs spaced upper prefixed | xargs)" "raw spaced upper prefixed"

# The format: everything by the differential test. It takes QEMU seconds to make a LUKS
# header, and the AES of old takes the same paths, but for the place that counts.
for cell in cs=4k,chain=raw,init=1 ext=1,chain=zero,snap=1 data=file,chain=packed,jobs=4 \
	packed=zstd,snap=1,io=buffered,jobs=8,hot=1M; do
	run_cell "enc=luks,$cell"
done
for cell in v=2,init=1,snap=1 v=2,discard=keep,jobs=4 cs=4k,rc=1,chain=deep \
	ext=1,init=1,packed=zlib cs=512,chain=qcow2,init=1 \
	cs=2M,size=24M,init=1,discard=keep ext=1,cs=16k,data=raw,pre=metadata \
	chain=short,size=8389120 pre=falloc,discard=ignore,inline=no; do
	run_cell "enc=aes,$cell"
done

no_kernel_report
done_testing
