#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Persistent bitmaps: kept up while attached, so that an incremental backup by QEMU has what has changed and nothing else; those that are disabled or in use stay as they are.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 600

# shellcheck source=tests/functional/cells.sh
. "$(dirname "$0")/cells.sh"

need_driver
cd "$WORK" || exit

# bits IMAGE NAME: the ranges that a bitmap has set, as "START+LENGTH" in KiB, as QEMU
# tells those who ask for them over NBD
bits() {
	local pid

	rm -f nbd.sock
	qemu-nbd -f qcow2 -r -t -B "$2" -k "$PWD/nbd.sock" "$1" >nbd.log 2>&1 &
	pid=$!
	until [[ -S nbd.sock ]] || ! kill -0 $pid 2>/dev/null; do
		sleep 0.1
	done
	[[ -S nbd.sock ]] || cat nbd.log
	qemu-img map --output=json --image-opts "driver=nbd,server.type=unix,server.path=$PWD/nbd.sock,x-dirty-bitmap=qemu:dirty-bitmap:$2" |
		jq -r '[.[] | select(.data | not) | "\(.start / 1024)+\(.length / 1024)"] | join(" ")'
	kill $pid
	wait $pid 2>/dev/null
}

# flags IMAGE NAME: what QEMU says of a bitmap
flags() {
	qemu-img info -U --output=json "$1" |
		jq -r --arg name "$2" '."format-specific".data.bitmaps[] |
			select(.name == $name) | .flags | join(",")'
}

qemu-img create -q -f qcow2 image.qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 1 0 8M' image.qcow2
qemu-img bitmap --add image.qcow2 fine -g 4096
qemu-img bitmap --add image.qcow2 coarse -g 1M
qemu-img bitmap --add image.qcow2 off
qemu-io -f qcow2 -c 'write -q -P 2 24M 64k' image.qcow2
qemu-img bitmap --disable image.qcow2 off
qemu-img bitmap --clear image.qcow2 fine
qemu-img bitmap --clear image.qcow2 coarse
qemu-io -f qcow2 -c 'write -q -P 2 20M 64k' image.qcow2
cp image.qcow2 before.qcow2

# What changes the disk is in them, and nothing else is.
attach "$PWD/image.qcow2"
is "attached, they are in use" "$(flags image.qcow2 fine) $(flags image.qcow2 coarse)" \
	"in-use,auto in-use,auto"
is "qcowctl info lists them" "$(qcowctl info --json "$DEV" | jq -c '[.bitmaps[] | [.name, .granularity, .flags]]')" \
	'[["fine",4096,["in-use","auto"]],["coarse",1048576,["in-use","auto"]],["off",65536,[]]]'
like "in words, too" "$(qcowctl info "$DEV")" 'bitmaps 0:.*name +fine.*flags +.*in-use'
is "but for one that is disabled" "$(flags image.qcow2 off)" ""
ok "read" xfs_io -r -d -c 'pread -q 0 64M' "$DEV"
ok "write" xfs_io -d -c 'pwrite -q -S 3 4k 512' -c 'pwrite -q -S 3 32M 1536k' "$DEV"
ok "write zeroes" xfs_io -d -c 'fzero -k 40M 8k' "$DEV"
ok "discard" blkdiscard -o 4M -l 128k "$DEV"
cp image.qcow2 crash.qcow2
detach
check_clean image.qcow2
is "detached, they are not" "$(flags image.qcow2 fine) $(flags image.qcow2 coarse)" "auto auto"
is "the fine one has what was written" "$(bits image.qcow2 fine)" \
	"4+4 4096+128 20480+64 32768+1536 40960+8"
is "the coarse one has what it is in" "$(bits image.qcow2 coarse)" \
	"0+1024 4096+1024 20480+1024 32768+2048 40960+1024"
is "the disabled one has what it had" "$(bits image.qcow2 off)" "24576+64"
is "after a crash QEMU does not believe them" "$(flags crash.qcow2 fine)" "in-use,auto"
ok "and no table of it is wrong" is_consistent crash.qcow2
attach "$PWD/crash.qcow2"
ok "write again" xfs_io -d -c 'pwrite -q -S 4 8k 512' "$DEV"
detach
is "nor after another attach" "$(flags crash.qcow2 fine)" "in-use,auto"
ok "and no table of it is wrong then" is_consistent crash.qcow2

# Nothing is lost where nothing is written, and more is added later.
attach "$PWD/image.qcow2"
detach
is "attached and detached, it is the same" "$(bits image.qcow2 fine)" \
	"4+4 4096+128 20480+64 32768+1536 40960+8"
attach --read-only "$PWD/image.qcow2"
is "read-only, they are not in use" "$(flags image.qcow2 fine)" "auto"
detach
attach "$PWD/image.qcow2"
ok "write more" xfs_io -d -c 'pwrite -q -S 5 8k 4k' -c 'pwrite -q -S 5 60M 4M' "$DEV"
detach
is "it is added" "$(bits image.qcow2 fine)" \
	"4+8 4096+128 20480+64 32768+1536 40960+8 61440+4096"
qemu-img bitmap --clear image.qcow2 fine
attach "$PWD/image.qcow2"
detach
is "cleared by QEMU, it stays clear" "$(bits image.qcow2 fine)" ""
check_clean image.qcow2

# Damaged ones
qemu-img create -q -f qcow2 good.qcow2 64M
qemu-img bitmap --add good.qcow2 map
qemu-img bitmap --add good.qcow2 other
qemu-io -f qcow2 -c 'write -q 0 1M' good.qcow2
at=$(head -c 65536 good.qcow2 | od -An -v -tx4 --endian=big -w4 | grep -n 23852875)
at=$(((${at%%:*} - 1) * 4))
directory=$((0x$(od -An -v -tx8 --endian=big -j $((at + 24)) -N 8 good.qcow2 | tr -d ' ')))
table=$((0x$(od -An -v -tx8 --endian=big -j $directory -N 8 good.qcow2 | tr -d ' ')))
l2=$((0x$(od -An -v -tx8 --endian=big -j $((0x30000)) -N 8 good.qcow2 | tr -d ' ') & ~(1 << 63)))
damaged() {
	cp good.qcow2 bad.qcow2
	put_bytes bad.qcow2 "$2" "$3"
	cp bad.qcow2 bad.before
	not_ok "$1: refused" try_attach "$PWD/bad.qcow2"
	like "$1: why" "$(<"$WORK/.err")" 'bitmaps are damaged'
	ok "$1: and left alone" cmp bad.qcow2 bad.before
	attach --read-only "$PWD/bad.qcow2"
	detach
}
cp good.qcow2 many.qcow2
entry=$(od -An -v -tx1 -j $directory -N 32 good.qcow2 | tr -d ' \n')
put_bytes many.qcow2 $directory "$(printf "$entry%.0s" {1..1025})"
put_bytes many.qcow2 $((at + 8)) 00000401
put_bytes many.qcow2 $((at + 16)) 0000000000008020
not_ok "more than anybody has: refused" try_attach "$PWD/many.qcow2"
like "more than anybody has: why" "$(<"$WORK/.err")" 'more than 1024 of its bitmaps are enabled'
damaged "more of them than there should be" $((at + 8)) 00000001
damaged "fewer of them than there should be" $((at + 8)) 00000003
damaged "a directory where an L1 table is" $((at + 24)) 0000000000030000
damaged "a table where an L2 table is" $directory "$(printf %016x "$l2")"
damaged "a table at 0" $directory 0000000000000000
damaged "a table that is not aligned" $((directory + 6)) 0200
damaged "a table behind the end" $directory 0000000100000000
damaged "a table of the wrong length" $((directory + 8)) 00000002
damaged "unknown flags" $((directory + 12)) 00000006
damaged "another type" $((directory + 16)) 02
damaged "a granularity of 256 bytes" $((directory + 17)) 08
damaged "a granularity of 2^40" $((directory + 17)) 28
damaged "no name" $((directory + 18)) 0000
damaged "a name that is too long" $((directory + 18)) ffff
damaged "extra data" $((directory + 20)) 00000008
damaged "bits behind the end" $table 0000000100000000
damaged "bits that are not aligned" $((table + 6)) 0200
damaged "reserved bits in the table" $table 80
damaged "bits where the table is" $table "$(printf %016x "$table")"
damaged "bits that are not counted" $((0x20000 + (table >> 16) * 2)) 0000

# Many clusters of bits, written at random; and a size that is no multiple of anything
qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 33333760
qemu-img bitmap --add small.qcow2 map -g 512
attach "$PWD/small.qcow2"
qcow-diff --quiet --seed 5 --ops 500 --mix write=4,zero=1 --jobs 4 --mirror-out mirror.raw "$DEV"
is "random writes" $? 0
detach
check_clean small.qcow2 "random writes"
bits small.qcow2 map >ranges
# All that is not zero is in it.
perl -e 'open R, "ranges"; @r = map { [map { $_ * 1024 } split /\+/] } split / /, <R>;
	open F, "mirror.raw"; binmode F; $bad = 0;
	while (read F, $b, 512) {
		next if $b !~ /[^\0]/;
		$p = tell(F) - 512;
		$bad++ unless grep { $p >= $_->[0] && $p < $_->[0] + $_->[1] } @r;
	}
	exit !!$bad'
is "what they wrote is in the bitmap" $? 0

# An incremental backup has the disk as it is.
qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 0x11 0 64M' disk.qcow2
qemu-img bitmap --add disk.qcow2 backup
qemu-img convert -f qcow2 -O raw disk.qcow2 full.raw
attach "$PWD/disk.qcow2"
ok "mkfs" mkfs.ext4 -q -F -E nodiscard "$DEV"
mkdir mnt
mount "$DEV" mnt
ok "files" fio --name=files --directory=mnt --rw=randwrite --bs=4k --size=8M --fsync=32 \
	--output=/dev/null
umount mnt
detach
qemu-img create -q -f qcow2 -b full.raw -F raw increment.qcow2
# shellcheck disable=SC2094 # its answer is waited for
{
	echo '{"execute": "qmp_capabilities"}'
	echo '{"execute": "blockdev-backup", "arguments": {"job-id": "backup", "device": "disk",
		"target": "increment", "sync": "incremental", "bitmap": "backup"}}'
	until grep -q '"status": "null"' qmp.log 2>/dev/null; do
		sleep 0.2
	done
	echo '{"execute": "quit"}'
} | timeout 120 qemu-storage-daemon --chardev stdio,id=qmp --monitor chardev=qmp \
	--blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2 \
	--blockdev driver=qcow2,node-name=increment,file.driver=file,file.filename=increment.qcow2 \
	>qmp.log 2>&1
like "an incremental backup" "$(<qmp.log)" '"JOB_STATUS_CHANGE".*"concluded"'
ok "is less than half" test $((2 * $(stat -c %b increment.qcow2))) -lt "$(stat -c %b disk.qcow2)"
same increment.qcow2 qcow2 disk.qcow2 qcow2 "the backup"

# A refused attach leaves them alone, a cluster of ones in a table, too.
qemu-img create -q -f qcow2 -o cluster_size=512 ones.qcow2 64M
qemu-img bitmap --add ones.qcow2 map -g 512
qemu-io -f qcow2 -c 'write -q 0 4M' ones.qcow2
cp ones.qcow2 before.qcow2
not_ok "refused" try_attach --compress=zstd "$PWD/ones.qcow2"
ok "a refused attach leaves them alone" cmp ones.qcow2 before.qcow2

# More bits than an int can count, most of them in no cluster
qemu-img create -q -f qcow2 -o cluster_size=2M many.qcow2 1500G
qemu-img bitmap --add many.qcow2 map -g 512
attach "$PWD/many.qcow2"
ok "write far behind" xfs_io -d -c 'pwrite -q -S 3 1400G 4k' -c 'pwrite -q -S 3 0 512' "$DEV"
ok "discard a lot" blkdiscard -o 1G -l 2G "$DEV"
detach
is "2^31 bits and more" "$(bits many.qcow2 map)" "0+0.5 1048576+2097152 1468006400+4"
check_clean many.qcow2 "2^31 bits"

# clone_bitmap IMAGE COUNT DISABLED: so many copies of its only bitmap, the last few of them
# disabled. QEMU counts what they take.
clone_bitmap() {
	# shellcheck disable=SC2016 # for perl
	perl -e '
		my ($name, $count, $disabled) = @ARGV;
		my $align = sub { ($_[0] + 511) & ~511 };
		open my $f, "+<", $name or die;
		my $get = sub { my $s; seek $f, $_[0], 0; read $f, $s, $_[1]; $s };
		my $put = sub { seek $f, $_[0], 0; print $f $_[1] };
		my $at = unpack "N", $get->(100, 4);
		for (;;) {
			my ($type, $length) = unpack "NN", $get->($at, 8);
			last if $type == 0x23852875;
			die if !$type;
			$at += 8 + ($length + 7 & ~7);
		}
		my $entry = $get->(unpack "Q>Q>", $get->($at + 24, 8) . $get->($at + 16, 8));
		my $end = $align->(-s $f);
		my $all = "";
		for my $i (0 .. $count - 1) {
			substr $entry, 0, 8, pack "Q>", $end + 512 * $i;
			substr $entry, 12, 4, pack "N", $i >= $count - $disabled ? 0 : 2;
			substr $entry, 24, 4, sprintf "%04d", $i;
			$all .= $entry;
		}
		my $directory = $end + 512 * $count;
		$put->($directory, $all);
		$put->($align->($directory + length $all) - 1, "\0");
		$put->($at + 8, pack "NNQ>Q>", $count, 0, length $all, $directory);' "$@"
	qemu-img check -q -r all "$1" 2>/dev/null
}
qemu-img create -q -f qcow2 -o cluster_size=512 limit.qcow2 64M
qemu-img bitmap --add limit.qcow2 name
cp limit.qcow2 most.qcow2
clone_bitmap limit.qcow2 1025 0
clone_bitmap most.qcow2 1030 6
not_ok "1025 that are enabled are refused" try_attach "$PWD/limit.qcow2"
like "and what to do is said" "$(<"$WORK/.err")" \
	'more than 1024 of its bitmaps are enabled; attach it read-only, or disable some'
"$QCOWCTL" attach "$PWD/limit.qcow2" 2>/dev/null
is "as what is not supported" $? 3
ok "1024 are not, whatever others there are" try_attach "$PWD/most.qcow2"
detach
check_clean most.qcow2 "1024 bitmaps"
is "they are kept up" "$(qemu-img info --output=json most.qcow2 |
	jq '[."format-specific".data.bitmaps[].flags | select(. == ["auto"])] | length')" 1024

# With subclusters, tiny counts, a data file
for options in extended_l2=on refcount_bits=1,cluster_size=4k lazy_refcounts=on \
	data_file=with.data; do
	rm -f with.qcow2 with.data
	qemu-img create -q -f qcow2 -o "$options" with.qcow2 64M
	qemu-img bitmap --add with.qcow2 map
	attach "$PWD/with.qcow2"
	ok "$options: write" xfs_io -d -c 'pwrite -q -S 3 1M 64k' -c 'pwrite -q -S 3 33M 1M' "$DEV"
	detach
	is "$options: it is in the bitmap" "$(bits with.qcow2 map)" "1024+64 33792+1024"
	check_clean with.qcow2 "$options"
done

# No room for them: the rest is written, and QEMU is told.
truncate -s 12M small.img
mkfs.ext4 -q -F -b 1024 -O ^has_journal small.img
new_loop small.img
mkdir small
mount "$LOOP" small
qemu-img create -q -f qcow2 -o cluster_size=4k small/full.qcow2 1G
qemu-img bitmap --add small/full.qcow2 map -g 512
attach "$PWD/small/full.qcow2"
ok "write here and there" xfs_io -d -c 'pwrite -q 0 4k' -c 'pwrite -q 100M 4k' -c 'pwrite -q 200M 4k' \
	-c 'pwrite -q 300M 4k' -c 'pwrite -q 400M 4k' -c fsync "$DEV"
dd if=/dev/zero of=small/filler bs=64k status=none 2>/dev/null
try_detach
is "no room for the bits: detach says so" $? 1
forget "$DEV"
like "and what" "$(<"$WORK/.err")" 'not everything could be written'
umount small
mount "$LOOP" small
is "the bitmap is not believed" "$(flags small/full.qcow2 map)" "in-use,auto"
is "and nothing is wrong with the image" \
	"$(is_consistent small/full.qcow2 2>&1)" ""
is "nor lost" "$(qemu-io -r -f qcow2 -c 'read -q -P 0xcd 200M 4k' small/full.qcow2 2>&1)" ""
umount small

no_kernel_report
done_testing
