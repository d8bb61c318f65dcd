// SPDX-License-Identifier: GPL-2.0-only
/*
 * Opens an image and, name by name, its backing files. Each file is locked
 * before anything in it is believed, and stays open. Names and formats come from
 * headers alone; content decides about a format nowhere, or a guest could make
 * its raw disk look like a qcow2 image that names any file of the host.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "qcowctl.h"

/*
 * QEMU's image locks: byte 100 + P of the file says
 * "I use permission P", byte 200 + P says "nobody else may use P". Both are
 * shared OFD locks on one byte, so taking one never fails between QEMU's own;
 * a conflict is somebody else's lock on the opposite byte. Taking first and
 * probing afterwards makes that two racing openers may both fail, but never
 * both succeed.
 */

/* Permissions; WRITE_UNCHANGED (2) and GRAPH_MOD (4) are not ours to use. */
#define CONSISTENT_READ		0
#define WRITE			1
#define RESIZE			3

#define USES(perm)		(100 + (perm))
#define DENIES(perm)		(200 + (perm))

/*
 * What a writer takes and probes; a reader does with the first READER_LOCKS of
 * each. Writers are probed first: who writes is in the way of everybody, and
 * whoever only denies writing can be lived with by reading.
 */
static const int held[] = {
	USES(CONSISTENT_READ), DENIES(WRITE), DENIES(RESIZE), USES(WRITE), USES(RESIZE),
};

static const int probed[ARRAY_SIZE(held)] = {
	USES(WRITE), USES(RESIZE), DENIES(CONSISTENT_READ), DENIES(WRITE), DENIES(RESIZE),
};

#define READER_LOCKS	3

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
	return fail(EXIT_BUSY, "%s: %s has it open for writing; close it there", path, holder);
}

/* Take @byte, or probe it: 0, EAGAIN for a lock in the way, or another errno. */
static int lock_byte(int fd, int byte, bool probe)
{
	struct flock lock = {
		.l_type = probe ? F_WRLCK : F_RDLCK,
		.l_whence = SEEK_SET,
		.l_start = byte,
		.l_len = 1,
	};

	if (fcntl(fd, probe ? F_OFD_GETLK : F_OFD_SETLK, &lock))
		return errno == EACCES ? EAGAIN : errno;
	return probe && lock.l_type != F_UNLCK ? EAGAIN : 0;
}

/*
 * Lock a file as QEMU would, for one who writes it and has to be alone, or reads and
 * shares it with readers. The locks live as long as the open file, so as long as
 * the driver keeps it.
 */
static int lock_image(int fd, const char *path, bool write)
{
	size_t i, count = write ? ARRAY_SIZE(held) : READER_LOCKS;
	int byte, err = 0;

	for (i = 0; !err && i < 2 * count; i++) {
		byte = i < count ? held[i] : probed[i - count];
		err = lock_byte(fd, byte, i >= count);
	}
	if (err == EAGAIN)
		return conflict(path, byte);
	if (err == EINVAL || err == ENOLCK || err == ENOSYS || err == EOPNOTSUPP || err == ENOTTY)
		return fail(EXIT_OK, "warning: %s: its file system has no locks (%s); make sure that nothing else uses the file",
			    path, strerror(err));
	if (err)
		return fail(EXIT_SYSTEM, "%s: cannot lock: %s", path, strerror(err));
	return EXIT_OK;
}

static int open_failed(const struct chain *chain, const char *path, bool write,
		       const char *what)
{
	int code = exit_of_errno(errno);
	struct rlimit limit;

	if (errno == EMFILE && !getrlimit(RLIMIT_NOFILE, &limit))
		return fail(code, "%s: too many open files, %u of the chain are open already; raise the hard limit of %ju (ulimit -Hn)",
			    path, chain->file_count, (uintmax_t)limit.rlim_max);
	if (write && errno == EBUSY)
		return fail(code, "%s: the block device is in use, mounted or held; release it there",
			    path);
	if (write && errno == ETXTBSY)
		return conflict(path, DENIES(WRITE));
	if (write && code == EXIT_DENIED)
		return fail(code, "%s: cannot be opened for writing: %m; %s", path,
			    chain->must_write ? "make that possible, or leave out what writes" :
						"to attach it all the same, use --read-only");
	if (chain->image)
		return fail(code, "%s: %m; it is the %s of %s", path, what, chain->image);
	return fail(code, "%s: %m; check the image's name", path);
}

/*
 * Open a file of the chain and lock it. @what it is to chain->image, if not that. Not
 * O_CLOEXEC: should we be killed, the locks stay until a qemu-img that repairs it is gone.
 */
static int open_file(struct chain *chain, const char *path, bool write,
		     const char *what, int *fd)
{
	int flags = write ? O_RDWR : O_RDONLY;
	struct chain_file *files = chain->files;
	unsigned int i, count = chain->file_count;
	int at = open(path, O_PATH | O_CLOEXEC);
	autofree char *link = xasprintf("/proc/self/fd/%d", at);
	int read_only = 0;
	struct stat st;

	/* Look first: opening a FIFO would wait, opening a tape would wind it. */
	if (at < 0 || fstat(at, &st))
		return open_failed(chain, path, false, what);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return fail(EXIT_REFUSED, "%s: neither a file nor a block device; name an image",
			    path);
	if (write && S_ISBLK(st.st_mode))
		flags |= O_EXCL;
	*fd = open(link, flags);
	/* Linux opens devices for writing that cannot be written. */
	if (*fd >= 0 && write && !ioctl(*fd, BLKROGET, &read_only) && read_only) {
		close(*fd);
		*fd = -1;
		errno = EROFS;
	}
	if (*fd < 0 && write && !chain->must_write && !chain->image &&
	    exit_of_errno(errno) == EXIT_DENIED) {
		fail(EXIT_OK, "warning: %s: cannot be opened for writing: %m; attaching it read-only",
		     path);
		chain->read_only = true;
		write = false;
		*fd = open(link, O_RDONLY);
	}
	if (*fd < 0)
		return open_failed(chain, path, write, what);
	close(at);

	/* Before locking: our own locks on the file would be in the way. */
	for (i = 0; i < count; i++) {
		if (same_file(&files[i].st, &st))
			return fail(EXIT_REFUSED, "%s: the backing chain is a loop, this file is %s again, by way of %s; mend it with qemu-img rebase -u",
				    path, files[i].path, files[count - 1].path);
	}
	files = xreallocarray(files, count + 1, sizeof(*files));
	files[count] = (struct chain_file) { .path = path, .st = st };
	chain->files = files;
	chain->file_count++;
	return lock_image(*fd, path, write);
}

/* Is the open file in the directory of the image, or below that? */
static bool is_beside(const char *image, int fd)
{
	autofree char *link = xasprintf("/proc/self/fd/%d", fd);
	autofree char *path = realpath(link, NULL), *whole = realpath(image, NULL);
	struct stat st;

	return path && whole && !fstat(fd, &st) && S_ISREG(st.st_mode) &&
	       !strncmp(path, whole, strrchr(whole, '/') + 1 - whole);
}

/*
 * Open the data file of the last image, where @given or its header says it is. Whoever
 * made the header must not have us write just anywhere.
 */
static int open_data_file(struct chain *chain, const struct header *header,
			  const char *given, bool write)
{
	struct qcow_layer *layer = &chain->layers[chain->layer_count - 1];
	autofree char *whose = xasprintf("%s: its data file", chain->image);
	bool has = header->incompatible & INCOMPAT_DATA_FILE;
	int format = 0, ret = EXIT_OK;
	char *path;

	if (given && !has)
		return fail(EXIT_REFUSED, "%s: has its data in itself; leave out --data-file",
			    chain->image);
	if (!has)
		return EXIT_OK;
	if (!given && !*header->data_name)
		return fail(EXIT_REFUSED, "%s: its header does not say where its external data file is; use --data-file",
			    chain->image);
	if (!given)
		ret = backing_resolve(chain->image, whose, header->data_name, &path, &format);
	if (!ret && !given && format == QCOW_FORMAT_QCOW2)
		return format_refused(whose, "qcow2");
	layer->flags |= QCOW_LAYER_DATA_FILE;
	ret = ret ?: open_file(chain, given ?: path, write, "data file", &layer->data_fd);
	if (!ret && write && !given && !is_beside(chain->image, layer->data_fd)) {
		autofree char *word = shell_quote(path);

		return fail(EXIT_REFUSED, "%s: its header would have %s written, which is not in its directory; if that is right, use --data-file %s",
			    chain->image, path, word);
	}
	return ret;
}

/* Say that no header names the format of the backing file @fd, and what would. */
static int format_missing(const struct chain *chain, const char *name, int fd)
{
	autofree char *plain = plain_path(chain->image);
	autofree char *image = shell_quote(plain);
	autofree char *backing = shell_quote(name);
	const char *hint = has_qcow2_magic(fd) ? "qcow2" : "raw";

	return fail(EXIT_REFUSED, "%s: its header does not say which format its backing file has; if that is %s, run: qemu-img rebase -u -b %s -F %s %s (or use --backing-format)",
		    chain->image, hint, backing, hint, image);
}

/*
 * Find what the @header of the last image leads to: *@path becomes that of the
 * backing file, *@format its format, or 0 if nothing says.
 */
static int follow(const struct chain *chain, const struct header *header,
		  char **path, int *format)
{
	autofree char *whose = xasprintf("%s: its backing file", chain->image);
	int declared = format_of_name(header->backing_format);
	int ret;

	if (*header->backing_format && !declared)
		return format_refused(whose, header->backing_format);
	ret = backing_resolve(chain->image, whose, header->backing_name, path, format);
	if (!ret && declared && *format && declared != *format)
		return fail(EXIT_REFUSED, "%s is called both %s and %s; mend it with qemu-img rebase -u",
			    whose, name_of_format(declared), name_of_format(*format));
	*format = declared ?: *format;
	return ret;
}

int chain_open(struct chain *chain, const char *image)
{
	int fd, ret, format = QCOW_FORMAT_QCOW2;
	bool top = true, write;
	char *path = xstrdup(image);
	struct qcow_layer *layer;
	struct header header;
	struct rlimit limit;

	/* A chain may be longer than the soft limit; nothing else runs here. */
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}

	for (;;) {
		ret = open_file(chain, path, top && !chain->read_only, "backing file", &fd);
		if (ret)
			return ret;
		write = top && !chain->read_only;
		format = format ?: chain->backing_format;
		if (!format)
			return format_missing(chain, header.backing_name, fd);
		chain->layers = xreallocarray(chain->layers, chain->layer_count + 1,
					      sizeof(*chain->layers));
		layer = &chain->layers[chain->layer_count++];
		*layer = (struct qcow_layer) { .fd = fd, .format = format };
		chain->image = path;
		if (format == QCOW_FORMAT_RAW)
			return EXIT_OK;
		ret = header_read(fd, path, top, &header) ?:
		      (header.encryption && (top || !chain->image_only) ?
		       key_unlock(chain, &header, layer) : EXIT_OK) ?:
		      open_data_file(chain, &header, top ? chain->data_file : NULL, write);
		if (ret || !*header.backing_name)
			return ret;
		ret = follow(chain, &header, &path, &format);
		if (ret)
			return ret;
		top = false;
	}
}
