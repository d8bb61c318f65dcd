# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the scripts of tests/guest share: where things are, and how to make a
# thing in the cache once.

# shellcheck disable=SC2034 # for those who source this
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
guest=$tree/tests/guest
cache=${QCOW_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qcow}
# What is built from this tree; another checkout has its own.
built=$cache/built/$(sha256sum <<<"$tree" | cut -c1-12)
mkdir -p "$cache/locks" "$built"

# What a kernel prints when something is wrong with it
report='BUG: |WARNING: |Oops|general protection fault|kernel BUG at|KASAN: '
report+='|UBSAN: |possible (circular|recursive) locking|suspicious RCU usage'
report+='|inconsistent lock state|INFO: task .* blocked|hung_task|soft lockup'
report+='|hard LOCKUP|rcu.*detected (stall|expedited)|unreferenced object'
report+='|Kernel panic|ODEBUG: |list_(add|del) corruption'
report+='|refcount_t: |bad unlock balance|held lock freed|invalid wait context'
report+='|nested lock was not taken|workqueue lockup|non-static key'

say()
{
	echo "${0##*/}: $*" >&2
}

die()
{
	say "$*"
	exit 1
}

as_root()
{
	if ((EUID == 0)); then
		"$@"
	else
		sudo "$@"
	fi
}

# lock NAME: from here to the end of this shell nobody else is past lock NAME.
lock()
{
	exec {lock_fd}>"$cache/locks/$1"
	flock -n "$lock_fd" && return
	say "waiting for another process that prepares $1"
	flock "$lock_fd"
}

# hash_of: a short name for the contents of standard input.
hash_of()
{
	sha256sum | cut -c1-16
}

# pack DIR: the files in DIR as an initramfs on standard output.
pack()
{
	(cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z |
		cpio --null --create --format=newc --owner=0:0 --quiet)
}

# archives SUITE: the lines of a sources.list for Debian's SUITE, taken from
# wherever this machine's apt has Debian.
archives()
{
	local base=${1%-backports} main security

	main=$(uri_of Debian)
	security=$(uri_of Debian-Security)
	[[ $main ]] || die "this machine's apt knows no Debian archive"
	echo "deb $main $base main"
	[[ ! $security ]] || echo "deb $security $base-security main"
	[[ $base == "$1" ]] || echo "deb $main $1 main"
}

uri_of()
{
	# shellcheck disable=SC2016 # for apt to expand
	apt-get indextargets --format '$(LABEL) $(REPO_URI)' \
		'Created-By: Packages' | awk -v l="$1" '$1 == l && !n++ { print $2 }'
}
