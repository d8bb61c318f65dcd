// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who uses a file or a device. Only asked once something is in the way, so this
 * may take its time; whatever cannot be read is passed over.
 */
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "control.h"
#include "util.h"

/* What is looked for in a line of a file: returns a phrase, or NULL. */
typedef char *(*line_match)(char *line, int index);

static char *search_lines(const char *path, line_match match, int index)
{
	FILE *f = fopen(path, "re");
	autofree char *line = NULL;
	char *found = NULL;
	size_t size = 0;

	while (f && !found && getline(&line, &size, f) >= 0)
		found = match(line, index);
	if (f)
		fclose(f);
	return found;
}

/* Is the open file /proc/PID/fd/N, which is @st, one that is looked for? */
typedef bool (*fd_match)(int pid, int fd, const struct stat *st, const void *arg);

/* The other processes with such an open file: "12 (cat), 13 (dd)", or NULL. */
static char *find_processes(fd_match match, const void *arg)
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
		    pid == last || pid == getpid() ||
		    stat(fds.gl_pathv[i], &st) || !match(pid, fd, &st, arg))
			continue;
		last = pid;
		path = xasprintf("/proc/%d/comm", pid);
		comm = read_line(path);
		item = xasprintf("%d (%s)", pid, comm ? comm : "?");
		list_append(&found, item);
	}
	globfree(&fds);
	return found;
}

/* lock:	1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101 */
static char *lock_line(char *line, int byte)
{
	long long start;
	char last[32];

	if (sscanf(line, "lock: %*s %*s %*s %*s %*s %*s %lld %31s", &start, last) != 2 ||
	    start > byte || (strcmp(last, "EOF") && atoll(last) < byte))
		return NULL;
	return xstrdup(line);
}

struct locked_byte {
	const struct stat *st;
	int byte;
};

static bool has_lock(int pid, int fd, const struct stat *st, const void *arg)
{
	const struct locked_byte *locked = arg;
	autofree char *path = xasprintf("/proc/%d/fdinfo/%d", pid, fd);
	autofree char *found = NULL;

	if (same_file(st, locked->st))
		found = search_lines(path, lock_line, locked->byte);
	return found;
}

/* The qcow device that has the file @st in its chain, or NULL. */
static char *device_on(const struct stat *st)
{
	int control = control_open(false);
	autofree int *indices = NULL;
	char *found = NULL;
	size_t count;

	if (control < 0)
		return NULL;
	if (!control_find(control, st, NULL, true, &indices, &count) && count)
		found = xasprintf("/dev/qcow%d", indices[0]);
	close(control);
	return found;
}

char *lock_holder(const struct stat *st, int byte)
{
	struct locked_byte locked = { .st = st, .byte = byte };
	char *found = find_processes(has_lock, &locked);

	return found ? found : device_on(st);
}

/* True if @dev is the disk /dev/qcow@index or one of its partitions. */
static bool on_disk(dev_t dev, int index)
{
	autofree char *link = xasprintf("/sys/dev/block/%u:%u", major(dev), minor(dev));
	autofree char *disk = xasprintf("/block/qcow%d", index);
	autofree char *target = realpath(link, NULL);
	const char *tail = target ? strstr(target, disk) : NULL;

	return tail && (!tail[strlen(disk)] || tail[strlen(disk)] == '/');
}

/* The same for a path such as "/dev/qcow0p1" in /proc/swaps or a mount table. */
static bool path_on_disk(const char *path, int index)
{
	struct stat st;

	return *path == '/' && !stat(path, &st) && S_ISBLK(st.st_mode) &&
	       on_disk(st.st_rdev, index);
}

/* Undo the \040 of the tables in /proc, in place. */
static char *unescape(char *s)
{
	char *in = s, *out = s;
	unsigned int c;

	while (*in) {
		if (sscanf(in, "\\%3o", &c) == 1) {
			*out++ = c;
			in += 4;
		} else {
			*out++ = *in++;
		}
	}
	*out = '\0';
	return s;
}

/* ID PARENT MAJ:MIN ROOT WHERE OPTIONS... - TYPE SOURCE OPTIONS */
static char *mount_line(char *line, int index)
{
	autofree char *where = NULL, *source = NULL;
	char *tail = strstr(line, " - ");
	unsigned int maj, min;

	if (!tail || sscanf(line, "%*d %*d %u:%u %*s %ms", &maj, &min, &where) != 3)
		return NULL;
	sscanf(tail, " - %*s %ms", &source);
	/* btrfs shows a number of its own; the source names the disk. */
	if (on_disk(makedev(maj, min), index) ||
	    (source && path_on_disk(unescape(source), index)))
		return xasprintf("mounted on %s", unescape(where));
	return NULL;
}

/* /dev/qcow0p1    partition    1048572    0    -2 */
static char *swap_line(char *line, int index)
{
	line[strcspn(line, " \t\n")] = '\0';
	if (!path_on_disk(unescape(line), index))
		return NULL;
	return xasprintf("in use as swap (%s)", line);
}

static char *mounted(int index)
{
	char *where = search_lines("/proc/self/mountinfo", mount_line, index);
	glob_t tables;
	size_t i;

	if (where)
		return where;
	/* Not here; in the mount namespace of some other process? */
	glob("/proc/[0-9]*/mountinfo", 0, NULL, &tables);
	for (i = 0; !where && i < tables.gl_pathc; i++) {
		autofree char *found = search_lines(tables.gl_pathv[i], mount_line,
						    index);

		if (found)
			where = xasprintf("%s for process %d", found,
					  atoi(tables.gl_pathv[i] + strlen("/proc/")));
	}
	globfree(&tables);
	return where;
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
		autofree char *name = read_line(path);
		autofree char *item = NULL;

		item = xasprintf(name ? "held by %s (%s)" : "held by %s", holder, name);
		list_append(&found, item);
	}
	globfree(&matches);
	return found;
}

char *device_holder(int index)
{
	autofree char *node = xasprintf("/dev/qcow%d", index);
	autofree char *device = NULL;
	char *found = mounted(index);
	struct stat st;

	if (!found)
		found = search_lines("/proc/swaps", swap_line, index);
	if (!found)
		found = holders(index);
	/* It may be a layer of another device. */
	if (!found && !stat(node, &st) && S_ISBLK(st.st_mode))
		device = device_on(&st);
	return device ? xasprintf("held by %s", device) : found;
}

static bool has_device(int pid, int fd, const struct stat *st, const void *arg)
{
	(void)pid;
	(void)fd;
	return S_ISBLK(st->st_mode) && on_disk(st->st_rdev, *(const int *)arg);
}

char *device_openers(int index)
{
	return find_processes(has_device, &index);
}
