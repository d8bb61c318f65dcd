#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The control node treats callers of other sizes, unknown flags, bad pointers and those who may not as Documentation/abi.rst says, and 32-bit callers like others.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 300

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

need_driver
cd "$WORK" || exit
qemu-img create -q -f qcow2 image.base 1M
for format in luks aes; do
	qemu-img create -q --object secret,id=key,data=abc -f qcow2 \
		-o "encrypt.format=$format,encrypt.key-secret=key$([[ $format != luks ]] ||
			echo ,encrypt.iter-time=10)" "image.$format" 1M
done
qemu-img create -q -f qcow2 -b image.base -F qcow2 image
qemu-img create -q -f qcow2 -o data_file=image.data,data_file_raw=on image.raw-data 1M

for program in abi-check abi-check-32; do
	"$program" image >out 2>err
	status=$?
	if ((status == 126)); then
		skip "$program" "this kernel does not execute it"
		continue
	fi
	is "$program comes to its end" "$status $(<err)" "0 "
	while read -r line; do
		case $line in
		'ok - '*) pass "${line#ok - }" ;;
		'not ok - '*) fail "${line#not ok - }" ;;
		*) diag "$line" ;;
		esac
	done <out
	check_clean image "$program"
done
no_kernel_report
done_testing
