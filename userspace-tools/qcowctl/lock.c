// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU's image locks (block/file-posix.c of QEMU): byte 100 + P of the file says
 * "I use permission P", byte 200 + P says "nobody else may use P". Both are
 * shared OFD locks on one byte, so taking one never fails between QEMU's own;
 * a conflict is somebody else's lock on the opposite byte. Taking first and
 * probing afterwards makes that two racing openers may both fail, but never
 * both succeed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "chain.h"
#include "control.h"
#include "util.h"

/* Permissions; WRITE_UNCHANGED (2) and GRAPH_MOD (4) are not ours to use. */
#define CONSISTENT_READ		0
#define WRITE			1
#define RESIZE			3

#define USES(perm)		(100 + (perm))
#define DENIES(perm)		(200 + (perm))

struct lock_set {
	size_t holds;
	size_t probes;
	int hold[5];
	int probe[5];
};

/*
 * Each probes writers first: who writes is in the way of everybody, and whoever
 * only denies writing can be lived with by reading.
 */
static const struct lock_set writer = {
	.holds = 5,
	.hold = { USES(CONSISTENT_READ), USES(WRITE), USES(RESIZE),
		  DENIES(WRITE), DENIES(RESIZE) },
	.probes = 5,
	.probe = { USES(WRITE), USES(RESIZE), DENIES(CONSISTENT_READ),
		   DENIES(WRITE), DENIES(RESIZE) },
};

static const struct lock_set reader = {
	.holds = 3,
	.hold = { USES(CONSISTENT_READ), DENIES(WRITE), DENIES(RESIZE) },
	.probes = 3,
	.probe = { USES(WRITE), USES(RESIZE), DENIES(CONSISTENT_READ) },
};

static int ofd_lock(int fd, int cmd, short type, int byte, short *found)
{
	struct flock lock = {
		.l_type = type,
		.l_whence = SEEK_SET,
		.l_start = byte,
		.l_len = 1,
	};

	if (fcntl(fd, cmd, &lock))
		return -errno;
	*found = lock.l_type;
	return 0;
}

static int conflict(const char *path, int byte)
{
	autofree char *holder = NULL;
	struct stat st;

	if (!stat(path, &st))
		holder = lock_holder(&st, byte);
	if (!holder)
		holder = xstrdup("another process, not visible here,");

	if (byte == DENIES(WRITE) || byte == DENIES(RESIZE))
		return fail(EXIT_BUSY, "%s: %s uses it and lets nobody write; close it there, or attach with --read-only",
			    path, holder);
	if (byte == DENIES(CONSISTENT_READ))
		return fail(EXIT_BUSY, "%s: %s uses it and lets nobody read; close it there",
			    path, holder);
	return fail(EXIT_BUSY, "%s: %s has it open for writing; close it there",
		    path, holder);
}

int lock_denied(const char *path)
{
	return conflict(path, DENIES(WRITE));
}

static int no_locks(const char *path, int err)
{
	switch (err) {
	case EINVAL:
	case ENOLCK:
	case ENOSYS:
	case EOPNOTSUPP:
	case ENOTTY:
		warn("%s: its file system has no locks (%s); make sure that nothing else uses the file",
		     path, strerror(err));
		return EXIT_OK;
	default:
		return fail(EXIT_SYSTEM, "%s: cannot lock: %s", path,
			    strerror(err));
	}
}

int lock_image(int fd, const char *path, bool write)
{
	const struct lock_set *set = write ? &writer : &reader;
	short found = F_UNLCK;
	size_t i;
	int err;

	for (i = 0; i < set->holds; i++) {
		err = ofd_lock(fd, F_OFD_SETLK, F_RDLCK, set->hold[i], &found);
		if (err == -EAGAIN || err == -EACCES)
			return conflict(path, set->hold[i]);
		if (err)
			return no_locks(path, -err);
	}
	for (i = 0; i < set->probes; i++) {
		err = ofd_lock(fd, F_OFD_GETLK, F_WRLCK, set->probe[i], &found);
		if (err)
			return no_locks(path, -err);
		if (found != F_UNLCK)
			return conflict(path, set->probe[i]);
	}
	return EXIT_OK;
}
