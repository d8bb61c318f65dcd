#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Each block of Documentation/workflows.rst works, and each script in Documentation/examples.
# kernels: 6.1 debug
# quick: 6.1
# timeout: 900

# shellcheck source=tests/functional/common.sh
. "$(dirname "$0")/common.sh"

need_driver
documents=$(cd "$(dirname "$0")/../../Documentation" && pwd)
cd "$WORK" || exit

# There is no QEMU for machines here, but one that has the same block layer.
mkdir bin
cat >bin/qemu-system-x86_64 <<'EOF'
#!/bin/bash
blocks=()
while (($#)); do
	[[ $1 != -blockdev ]] || blocks+=(--blockdev "$2")
	shift
done
((${#blocks[@]})) || exit
echo '{"execute": "qmp_capabilities"} {"execute": "quit"}' |
	qemu-storage-daemon --chardev stdio,id=qmp --monitor chardev=qmp "${blocks[@]}"
EOF
chmod +x bin/qemu-system-x86_64
PATH=$WORK/bin:$PATH

# Files NNN.block and NNN.check, named by the line where they begin
awk '
	/^\.\. check: / {
		file = sprintf("%04d.check", NR)
		print substr($0, 11) >file
		next
	}
	/::$/ && !/^\.\. / { literal = 1; file = ""; next }
	literal && /^\t/ {
		if (!file)
			file = sprintf("%04d.block", NR)
		print substr($0, 2) >file
		next
	}
	literal && /^$/ { if (file) print "" >file; next }
	{ literal = 0 }
' "$documents/workflows.rst"

blocks=0
for step in [0-9]*; do
	line=$((10#${step%.*}))
	case $step in
	*.block)
		blocks=$((blocks + 1))
		ok "line $line: $(head -n 1 "$step")" bash -euo pipefail "$step"
		;;
	*)
		ok "line $line: $(head -n 1 "$step")" bash "$step"
		;;
	esac || { qcowctl detach --all 2>/dev/null; umount mnt 2>/dev/null; }
done
ok "there are some" test $blocks -ge 30
is "they leave no device" "$(qcowctl list -n)" ""
for example in "$documents"/examples/*.sh; do
	# shellcheck disable=SC2016 # for that shell to expand
	ok "${example##*/}" bash -c 'mkdir "$1" && cd "$1" && "$2"' - "${example##*/}.d" "$example"
	is "${example##*/} leaves no device" "$(qcowctl list -n)" ""
done
no_kernel_report
done_testing
