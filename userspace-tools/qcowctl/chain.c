// SPDX-License-Identifier: GPL-2.0-only
/*
 * Opens an image and, name by name, its backing files. Each file is locked
 * before anything in it is believed, and stays open. Names and formats come from
 * headers alone; content decides about a format nowhere, or a guest could make
 * its raw disk look like a qcow2 image that names any file of the host.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <linux/qcow.h>

#include "chain.h"
#include "util.h"

int format_of_name(const char *name)
{
	if (!strcmp(name, "raw"))
		return QCOW_FORMAT_RAW;
	if (!strcmp(name, "qcow2"))
		return QCOW_FORMAT_QCOW2;
	return 0;
}

const char *name_of_format(int format)
{
	return format == QCOW_FORMAT_RAW ? "raw" : "qcow2";
}

/* The image that was opened last, behind which there may be its data file. */
static struct chain_layer *last_image(const struct chain *chain)
{
	size_t i = chain->count - 1;

	while (chain->layers[i].data)
		i--;
	return &chain->layers[i];
}

static int open_failed(const struct chain *chain, const char *path, bool write,
		       bool data, int err)
{
	const char *why = strerror(err);
	struct rlimit limit;

	if (err == EMFILE && !getrlimit(RLIMIT_NOFILE, &limit))
		return fail(EXIT_SYSTEM, "%s: too many open files, %zu of the chain are open already; raise the hard limit of %ju (ulimit -Hn)",
			    path, chain->count, (uintmax_t)limit.rlim_max);
	if (write && err == EBUSY)
		return fail(EXIT_BUSY, "%s: the block device is in use, mounted or held; release it there",
			    path);
	if (write && err == ETXTBSY)
		return lock_denied(path);
	if (write && (err == EROFS || err == EACCES || err == EPERM))
		return fail(exit_of_errno(err), "%s: cannot be opened for writing: %s; to attach it all the same, use --read-only",
			    path, why);
	if (chain->count)
		return fail(exit_of_errno(err), "%s: %s; it is the %s file of %s",
			    path, why, data ? "data" : "backing",
			    last_image(chain)->path);
	return fail(exit_of_errno(err), "%s: %s; check the image's name", path, why);
}

static int open_layer(struct chain *chain, const char *path, bool write,
		      bool data)
{
	struct chain_layer *layer;
	int flags = O_CLOEXEC | (write ? O_RDWR : O_RDONLY);
	struct stat st;
	size_t i;
	int fd;

	/* Look first: opening a FIFO would wait, opening a tape would wind it. */
	if (stat(path, &st))
		return open_failed(chain, path, false, data, errno);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return fail(EXIT_REFUSED, "%s: neither a file nor a block device; name an image",
			    path);
	if (write && S_ISBLK(st.st_mode))
		flags |= O_EXCL;
	fd = open(path, flags);
	if (fd < 0)
		return open_failed(chain, path, write, data, errno);

	chain->layers = xreallocarray(chain->layers, chain->count + 1,
				      sizeof(*chain->layers));
	layer = &chain->layers[chain->count++];
	*layer = (struct chain_layer) {
		.path = xstrdup(path), .fd = fd, .data = data,
	};
	if (fstat(fd, &layer->st))
		return fail(EXIT_SYSTEM, "%s: %s", path, strerror(errno));

	/* Before locking: our own locks on the file would be in the way. */
	for (i = 0; i + 1 < chain->count; i++) {
		if (same_file(&chain->layers[i].st, &layer->st))
			return fail(EXIT_REFUSED, "%s: the backing chain is a loop, this file is %s again, by way of %s; mend it with qemu-img rebase -u",
				    path, chain->layers[i].path,
				    chain->layers[chain->count - 2].path);
	}
	return lock_image(fd, path, write);
}

/* Say that no header names the format of the last layer, and what would. */
static int format_missing(const struct chain *chain, const char *name)
{
	const struct chain_layer *layer = &chain->layers[chain->count - 1];
	const struct chain_layer *overlay = layer[-1].data ? layer - 2 : layer - 1;
	autofree char *plain = plain_path(overlay->path);
	autofree char *image = shell_quote(plain);
	autofree char *backing = shell_quote(name);
	int hint = has_qcow2_magic(layer->fd) ? QCOW_FORMAT_QCOW2 : QCOW_FORMAT_RAW;

	return fail(EXIT_REFUSED, "%s: its header does not say which format its backing file has; if that is %s, run: qemu-img rebase -u -b %s -F %s %s (or use --backing-format)",
		    overlay->path, name_of_format(hint), backing,
		    name_of_format(hint), image);
}

/*
 * Find what the @header of the last layer leads to: *@next becomes the path of the
 * backing file, *@format its format, or 0 if nothing says.
 */
static int follow(const struct chain *chain, const struct header *header,
		  char **next, int *format)
{
	const char *path = last_image(chain)->path;
	int declared = 0;
	int ret;

	if (header->backing_format) {
		declared = format_of_name(header->backing_format);
		if (!declared)
			return fail(EXIT_REFUSED, "%s: its backing file has the format '%s'; only raw and qcow2 can be attached",
				    path, header->backing_format);
	}
	ret = backing_resolve(path, "backing file", header->backing_name, next,
			      format);
	if (!ret && declared && *format && declared != *format)
		return fail(EXIT_REFUSED, "%s: it calls its backing file both %s and %s; mend it with qemu-img rebase -u",
			    path, name_of_format(declared), name_of_format(*format));
	if (declared)
		*format = declared;
	return ret;
}

/* Open the data file of the last image, where @given or its header says it is. */
static int open_data_file(struct chain *chain, const struct header *header,
			  const char *given, bool write)
{
	const char *path = chain->layers[chain->count - 1].path;
	autofree char *found = NULL;
	int format;
	int ret;

	if (given && !header->has_data_file)
		return fail(EXIT_REFUSED, "%s: has its data in itself; leave out --data-file",
			    path);
	if (!header->has_data_file)
		return EXIT_OK;
	if (!given && (!header->data_name || !*header->data_name))
		return fail(EXIT_REFUSED, "%s: its header does not say where its external data file is; use --data-file",
			    path);
	if (given)
		return open_layer(chain, given, write, true);
	ret = backing_resolve(path, "data file", header->data_name, &found,
			      &format);
	return ret ?: open_layer(chain, found, write, true);
}

int chain_open(struct chain *chain, const char *image, bool read_only,
	       const char *data_file, int backing_format)
{
	struct header header = { 0 };
	int format = QCOW_FORMAT_QCOW2;
	char *path = xstrdup(image);
	char *next;
	struct rlimit limit;
	int ret;

	*chain = (struct chain) { 0 };
	/* A chain may be longer than the soft limit; nothing else runs here. */
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}

	for (;;) {
		bool top = !chain->count;
		bool write = top && !read_only;

		ret = open_layer(chain, path, write, false);
		if (ret)
			break;
		if (!format)
			format = backing_format;
		if (!format) {
			ret = format_missing(chain, header.backing_name);
			break;
		}
		chain->layers[chain->count - 1].format = format;
		header_free(&header);
		if (format == QCOW_FORMAT_RAW)
			break;
		ret = header_read(chain->layers[chain->count - 1].fd, path, top,
				  &header);
		if (!ret)
			ret = open_data_file(chain, &header,
					     top ? data_file : NULL, write);
		if (ret || !header.backing_name)
			break;
		next = NULL;
		ret = follow(chain, &header, &next, &format);
		free(path);
		path = next;
		if (ret)
			break;
	}
	header_free(&header);
	free(path);
	return ret;
}

void chain_close(struct chain *chain)
{
	size_t i;

	for (i = 0; i < chain->count; i++) {
		close(chain->layers[i].fd);
		free(chain->layers[i].path);
	}
	free(chain->layers);
}
