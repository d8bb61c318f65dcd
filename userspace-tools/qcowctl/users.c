// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who uses a file or a device. Only asked once something is in the way, so this
 * may take its time; whatever cannot be read is passed over.
 */
#include <glob.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "qcowctl.h"

/* True if @dev is the disk /dev/qcow@index or one of its partitions. */
static bool on_disk(dev_t dev, int index)
{
	autofree char *link = xasprintf("/sys/dev/block/%u:%u", major(dev), minor(dev));
	autofree char *disk = xasprintf("/block/qcow%d", index);
	autofree char *target = realpath(link, NULL);
	const char *tail = target ? strstr(target, disk) : NULL;

	return tail && (!tail[strlen(disk)] || tail[strlen(disk)] == '/');
}

/* Has process @pid a lock on @byte of its file @fd? */
static bool has_lock(int pid, int fd, int byte)
{
	autofree char *path = xasprintf("/proc/%d/fdinfo/%d", pid, fd);
	autofree char *line = NULL;
	FILE *f = fopen(path, "re");
	bool found = false;
	long long start;
	size_t size = 0;
	char last[32];

	/* lock:	1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101 */
	while (f && !found && getline(&line, &size, f) >= 0)
		found = sscanf(line, "lock: %*s %*s %*s %*s %*s %*s %lld %31s",
			       &start, last) == 2 && start <= byte &&
			(!strcmp(last, "EOF") || atoll(last) >= byte);
	if (f)
		fclose(f);
	return found;
}

/*
 * The other processes that have a lock on byte @number of @file or, without a
 * @file, have the disk /dev/qcow@number open: "12 (cat), 13 (dd)", or NULL.
 */
static char *find_processes(const struct stat *file, int number)
{
	int pid, fd, last = getpid();
	char *found = NULL;
	struct stat st;
	glob_t fds;
	size_t i;

	glob("/proc/[0-9]*/fd/*", 0, NULL, &fds);
	for (i = 0; i < fds.gl_pathc; i++) {
		autofree char *path = NULL, *comm = NULL, *item = NULL;

		/* Sorted: the files of a process stand together. */
		if (sscanf(fds.gl_pathv[i], "/proc/%d/fd/%d", &pid, &fd) != 2 ||
		    pid == last || pid == getpid() || stat(fds.gl_pathv[i], &st))
			continue;
		if (file ? !same_file(&st, file) || !has_lock(pid, fd, number) :
			   !S_ISBLK(st.st_mode) || !on_disk(st.st_rdev, number))
			continue;
		last = pid;
		path = xasprintf("/proc/%d/comm", pid);
		comm = read_text(path);
		item = xasprintf("%d (%s)", pid, comm ?: "?");
		list_append(&found, item);
	}
	globfree(&fds);
	return found;
}

/* The qcow device that has the file @st in its chain, or NULL. */
static char *device_on(const struct stat *st)
{
	autofree int *indices = control_open() ? control_find(st, NULL, true) : NULL;

	return indices && *indices >= 0 ? xasprintf("/dev/qcow%d", *indices) : NULL;
}

char *lock_holder(const struct stat *st, int byte)
{
	return find_processes(st, byte) ?: device_on(st);
}

/* Where the table @path has the disk or a partition of it as a source, or NULL. */
static char *find_in_table(const char *path, int index, bool swap)
{
	FILE *table = setmntent(path, "re");
	struct mntent *entry;
	char *found = NULL;
	struct stat st;

	while (table && !found && (entry = getmntent(table))) {
		/* btrfs shows device numbers of its own; so go by the names. */
		if (*entry->mnt_fsname == '/' && !stat(entry->mnt_fsname, &st) &&
		    S_ISBLK(st.st_mode) && on_disk(st.st_rdev, index))
			found = xstrdup(swap ? entry->mnt_fsname : entry->mnt_dir);
	}
	if (table)
		endmntent(table);
	return found;
}

/* "mounted on /mnt", here or else in the mount namespace of some other process. */
static char *mounted(int index)
{
	char *found = NULL;
	glob_t tables;
	size_t i;

	glob("/proc/{self,[0-9]*}/mounts", GLOB_BRACE, NULL, &tables);
	for (i = 0; !found && i < tables.gl_pathc; i++) {
		int pid = atoi(tables.gl_pathv[i] + strlen("/proc/"));
		autofree char *where = find_in_table(tables.gl_pathv[i], index, false);

		if (where)
			found = xasprintf(pid ? "mounted on %s for process %d" :
						"mounted on %s", where, pid);
	}
	globfree(&tables);
	return found;
}

/* "held by dm-0 (vg-root)" for what sits on the disk or its partitions. */
static char *holders(int index)
{
	autofree char *pattern = xasprintf("/sys/block/qcow%d/{,qcow%dp*/}holders/*",
				  index, index);
	char *found = NULL;
	glob_t matches;
	size_t i;

	glob(pattern, GLOB_BRACE, NULL, &matches);
	for (i = 0; i < matches.gl_pathc; i++) {
		const char *holder = strrchr(matches.gl_pathv[i], '/') + 1;
		autofree char *path = xasprintf("%s/dm/name", matches.gl_pathv[i]);
		autofree char *name = read_text(path);
		autofree char *item = xasprintf(name ? "held by %s (%s)" : "held by %s",
						holder, name);

		list_append(&found, item);
	}
	globfree(&matches);
	return found;
}

char *device_swap(int index)
{
	return find_in_table("/proc/swaps", index, true);
}

char *device_holder(int index)
{
	autofree char *node = xasprintf("/dev/qcow%d", index);
	autofree char *swap = device_swap(index);
	autofree char *device = NULL;
	char *found = mounted(index);
	struct stat st;

	if (!found && swap)
		found = xasprintf("in use as swap (%s)", swap);
	if (!found)
		found = holders(index);
	/* It may be a layer of another device. */
	if (!found && !stat(node, &st) && S_ISBLK(st.st_mode))
		device = device_on(&st);
	return device ? xasprintf("held by %s", device) : found;
}

char *device_openers(int index)
{
	autofree char *found = find_processes(NULL, index);

	return xasprintf("open in %s", found ?: "what cannot be seen from here");
}
