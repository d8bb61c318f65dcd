#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# qcowctl attaches what QEMU would open, shows it, and detaches it or says who is in the way.
# kernels: 6.1 debug
# quick: 6.1

# shellcheck source=tests/functional/qcowctl.sh
. "$(dirname "$0")/qcowctl.sh"

need_driver
cd "$WORK" || exit

# An attached device's value in info's JSON
info() {
	"$QCOWCTL" info --json "$DEV" | jq -r "$1"
}

# resolves NAME FORMAT WANT [OPTION]...: a backing name leads to the file WANT.
# Without FORMAT the header has none.
resolves() {
	local name=$1 format=$2 want=$3
	shift 3

	backing dir/top.qcow2 "$name" "$format"
	attach "$@" dir/top.qcow2 || return
	is "the backing name $name $*" "$(info '.chain[1] | .path, .format' | paste -sd' ')" "$want"
	detach
}

mkdir dir other
qemu-img create -q -f raw dir/base.raw 1M
qemu-img create -q -f qcow2 dir/base.qcow2 1M
qemu-img create -q -f raw cwd.raw 1M
qemu-img create -q -f qcow2 ok.qcow2 10M
backing chain.qcow2 dir/base.qcow2 qcow2

# Names
resolves base.raw raw "$WORK/dir/base.raw raw"
resolves base.qcow2 qcow2 "$WORK/dir/base.qcow2 qcow2"
resolves "$WORK/dir/base.qcow2" qcow2 "$WORK/dir/base.qcow2 qcow2"
resolves ../cwd.raw raw "$WORK/cwd.raw raw"
resolves file:cwd.raw raw "$WORK/cwd.raw raw"
resolves base.qcow2 raw "$WORK/dir/base.qcow2 raw"
resolves base.raw "" "$WORK/dir/base.raw raw" --backing-format=raw
resolves base.qcow2 "" "$WORK/dir/base.qcow2 qcow2" -F qcow2
resolves base.raw raw "$WORK/dir/base.raw raw" -F qcow2
resolves 'json:{"driver":"raw","file":{"driver":"file","filename":"cwd.raw"}}' raw \
	"$WORK/cwd.raw raw"
resolves 'json:{"driver":"raw","file.driver":"file","file.filename":"cwd.raw"}' "" \
	"$WORK/cwd.raw raw"
resolves "json:{'file':{'filename':'file:cwd.raw'}}" raw "$WORK/cwd.raw raw"
resolves 'json:{"driver":"file","filename":"cwd.raw"}' "" "$WORK/cwd.raw raw"
backing dir/top.qcow2 base.raw raw
ln -s ../dir/top.qcow2 other/link.qcow2
refused "a backing file is sought beside the link, not beside its target" 5 \
	"other/base.raw: No such file" attach other/link.qcow2

# A chain deeper than the soft limit of open files
prev=dir/base.raw format=raw
for ((i = 0; i < 30; i++)); do
	backing "deep$i.qcow2" "$prev" "$format"
	prev=deep$i.qcow2 format=qcow2
done
DEV=$(
	ulimit -Sn 16
	"$QCOWCTL" attach deep29.qcow2
)
is "more layers than the soft limit of open files" "$(info .depth)" 31
ok "detach them" "$QCOWCTL" detach "$DEV"

# attach
is "attach prints the device and nothing else" \
	"$("$QCOWCTL" attach -n 7 -r ok.qcow2 2>&1)" /dev/qcow7
ok "the node is there at once" test -b /dev/qcow7
refused "the number is taken" 4 "/dev/qcow7 is attached already" \
	attach --number=7 chain.qcow2
refused "the image is in use" 4 "/dev/qcow7 uses it and lets nobody write" attach ok.qcow2
ok "two devices read one image" "$QCOWCTL" attach -n 8 -r ok.qcow2
refused "the image names two devices" 2 "attached as /dev/qcow7, /dev/qcow8; name one of them" \
	detach ok.qcow2
ok "detach by number" "$QCOWCTL" detach 8
attach -n 9 chain.qcow2
refused "the image is being written" 4 "/dev/qcow9 has it open for writing" \
	attach -r chain.qcow2
refused "the backing file is in use" 4 "/dev/qcow9 uses it and lets nobody write" \
	attach dir/base.qcow2
qemu-img create -q -f qcow2 -o data_file=data.raw dir/ext.qcow2 1M
refused "a data file that is not there" 5 "dir/data.raw: .* it is the data file of dir/ext.qcow2" \
	attach dir/ext.qcow2
attach --data-file=data.raw dir/ext.qcow2
is "--data-file: sysfs has it" "$(</sys/block/"${DEV#/dev/}"/qcow/data_file)" "$WORK/data.raw"
not_ok "the data file is locked" qemu-io -f raw -c 'write 0 512' data.raw
ok "detach by image, with a data file" "$QCOWCTL" detach dir/ext.qcow2
mv data.raw dir
ok "a relative data file is looked for beside the image" \
	"$QCOWCTL" attach -n 11 dir/ext.qcow2
ok "detach it by number" "$QCOWCTL" detach 11
qemu-img create -q -f qcow2 -o data_file="$WORK/dir/../elsewhere.raw" dir/far.qcow2 1M
truncate -s 100 elsewhere.raw
refused "a data file in another directory, for writing" 3 \
	"dir/far.qcow2: its header would have .*elsewhere.raw written, .* use --data-file .*elsewhere.raw" \
	attach dir/far.qcow2
qemu-img create -q -f qcow2 -o data_file=beside.raw dir/link.qcow2 1M
ln -s ../elsewhere.raw dir/beside.raw
refused "one that a link leads to" 3 "would have dir/beside.raw written" attach dir/link.qcow2
is "it is left alone" "$(stat -c %s elsewhere.raw)" 100
ok "which may be read" "$QCOWCTL" attach -n 11 --read-only dir/far.qcow2
ok "detach it" "$QCOWCTL" detach 11
ok "and written, if that is asked for" \
	"$QCOWCTL" attach -n 11 --data-file=elsewhere.raw dir/far.qcow2
ok "detach it again" "$QCOWCTL" detach 11
refused "a data file that is not wanted" 3 "has its data in itself; leave out --data-file" \
	attach --data-file=dir/data.raw dir/top.qcow2
DEV=/dev/qcow9
"$QCOWCTL" attach dir/top.qcow2 >/dev/full 2>.full
is "attach, but the name cannot be printed: the exit code" $? 1
like "attach, but the name cannot be printed: it is told" "$(<.full)" \
	'^qcowctl: standard output: .* dir/top.qcow2 is attached as /dev/qcow[0-9]+$'
ok "detach by image" "$QCOWCTL" detach dir/top.qcow2

# list and info
is "list" "$("$QCOWCTL" list -n -o name,size,ro,depth,image | tr -s ' ')" \
	"/dev/qcow7 10M yes 1 $WORK/ok.qcow2
/dev/qcow9 1M no 2 $WORK/chain.qcow2"
like "list has headings" "$("$QCOWCTL" list)" '^NAME +SIZE RO +DEPTH STATE +IMAGE'
is "list --bytes" "$("$QCOWCTL" list -nb -o size | tr -d ' ' | paste -sd' ')" \
	"10485760 1048576"
is "list --json" "$("$QCOWCTL" list --json -o NAME,size,ro,depth | jq -c .devices)" \
	'[{"name":"/dev/qcow7","size":10485760,"ro":true,"depth":1},{"name":"/dev/qcow9","size":1048576,"ro":false,"depth":2}]'
is "list -o +COLUMN adds" "$("$QCOWCTL" list --json -o +maj:min,cluster | jq -c '.devices[0] | keys_unsorted')" \
	'["name","size","ro","depth","state","image","maj:min","cluster"]'
is "maj:min" "$("$QCOWCTL" list -n -o maj:min | head -n 1)" "$(</sys/block/qcow7/dev)"
columns=$("$QCOWCTL" list --help | sed -n '/^Columns:/,$p' | tail -n +2 | tr -d ' \n')
is "every column has a value" \
	"$("$QCOWCTL" list --json -o "$columns" | jq '[.devices[0][] | select(. == null)] | length')" 0
is "info --json: the chain" "$(info '.chain | map(.path) | join(" ")')" \
	"$WORK/chain.qcow2 $WORK/dir/base.qcow2"
like "info" "$("$QCOWCTL" info 9)" 'size +1M \(1048576 bytes\)'

# Devices that are not there
refused "detach what is not attached" 5 "/dev/qcow77: not attached" detach 77
refused "detach an image that is not attached" 5 "cwd.raw: not attached" detach cwd.raw
refused "detach a name that does not exist" 5 "nope: No such file or directory; name a device or its image" \
	detach nope
refused "info on what is not attached" 5 "/dev/qcow77: not attached" info qcow77

# Names of a device
ok "detach by path" "$QCOWCTL" detach /dev/qcow7
attach -n 7 -r ok.qcow2
ok "detach by name" "$QCOWCTL" detach qcow7
forget /dev/qcow7
attach -n 7 -r ok.qcow2
ln -s /dev/qcow7 link
ok "detach by a link to the node" "$QCOWCTL" detach link
forget /dev/qcow7
ln ok.qcow2 hard.qcow2
attach -n 7 ok.qcow2
ok "detach by another name of the image" "$QCOWCTL" detach hard.qcow2
forget /dev/qcow7
odd=$'new\nline.qcow2'
cp ok.qcow2 "$odd"
attach -n 7 "$odd"
is "a name of two lines is one in the list" \
	"$("$QCOWCTL" list -n -o name,image | grep -cE '^/dev/qcow7 .*/new(\\x0a|\\012)line\.qcow2$')" 1
ok "it can be checked, by its device" "$QCOWCTL" check 7
ok "and be detached by that name" "$QCOWCTL" detach "$odd"
forget /dev/qcow7

# Who is in the way
attach -n 7 ok.qcow2
mkfs.ext4 -q /dev/qcow7
mkdir "m t"
mount /dev/qcow7 "m t"
refused "detach what is mounted" 4 "qcow7: mounted on $WORK/m t; .*--deferred" detach 7
umount "m t"
mkswap /dev/qcow7 >/dev/null
swapon /dev/qcow7
refused "detach what is swapped on" 4 "in use as swap \(/dev/qcow7\)" detach 7
swapoff /dev/qcow7
if echo "0 8 linear /dev/qcow7 0" | dmsetup create held 2>/dev/null; then
	refused "detach what device mapper holds" 4 "held by dm-[0-9]+ \(held\)" detach 7
	dmsetup remove held
else
	skip "detach what device mapper holds" "dmsetup fails"
fi
sleep 100 3</dev/qcow7 &
sleep 0.2
refused "detach what a process has open" 4 "open in $! \(sleep\); end that" detach 7
ok "detach when the last opener closes" "$QCOWCTL" detach --deferred 7
is "until then it is shown so" "$("$QCOWCTL" list -n -o state | head -n 1)" detaching
kill $!
wait $! 2>/dev/null
for ((i = 0; i < 50; i++)); do
	[[ -e /sys/block/qcow7 ]] || break
	sleep 0.1
done
not_ok "and then it is gone" "$QCOWCTL" info 7
forget /dev/qcow7
attach -n 7 ok.qcow2
sleep 1 3</dev/qcow7 &
sleep 0.2
ok "detach waits a moment for who only looks" "$QCOWCTL" detach 7
wait $!
forget /dev/qcow7
attach -n 7 ok.qcow2
backing over.qcow2 /dev/qcow7 raw
attach -n 6 over.qcow2
refused "detach a layer of another device" 4 "qcow7: held by /dev/qcow6" detach 7
detach /dev/qcow6
backing over.qcow2 /dev/qcow9 raw

# A file system on others says that it can do direct I/O, and then cannot.
mkdir mem merged
mount -t tmpfs none mem
mkdir mem/{low,up,work}
cp ok.qcow2 mem/low/
mount -t overlay -o lowerdir=mem/low,upperdir=mem/up,workdir=mem/work none merged
attach merged/ok.qcow2
is "on overlayfs: the I/O that works is used" "$(info .io)" buffered
ok "on overlayfs: it can be written" xfs_io -d -c 'pwrite -q -S 7 0 64k' "$DEV"
detach
check_clean merged/ok.qcow2
umount merged mem

# Completion in bash, which takes --option=VALUE for three words
completes() {
	local want=$1
	shift

	is "completion: $*" "$(
		compopt() { :; }
		PATH=$(dirname "$(type -P "$QCOWCTL")"):$PATH
		# shellcheck source=userspace-tools/completions/qcowctl
		. "$TEST_TREE/userspace-tools/completions/qcowctl"
		COMP_WORDS=(qcowctl "$@") COMP_CWORD=$#
		_qcowctl
		echo "${COMPREPLY[*]}"
	)" "$want"
}
completes attach at
completes --discard attach --disc
completes unmap attach --discard un
completes "zlib zstd" attach --compress = z
completes "auto direct buffered" attach --io =

# Rights
like "list as somebody else" \
	"$(setpriv --reuid=65534 --clear-groups "$(type -P "$QCOWCTL")" list 2>&1; echo $?)" \
	$'^qcowctl: /dev/qcow-control: .*; you must be root\n6$'

# All
ok "detach --all" "$QCOWCTL" detach --all
is "nothing is left" "$("$QCOWCTL" list; echo $?)" 0
is "nothing is left, in JSON" "$("$QCOWCTL" list --json | jq -c .)" '{"devices":[]}'
ok "detach --all of nothing" "$QCOWCTL" detach --all
forget /dev/qcow9
no_kernel_report
done_testing
