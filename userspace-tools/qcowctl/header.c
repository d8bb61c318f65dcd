// SPDX-License-Identifier: GPL-2.0-only
/*
 * A careful reader of the one thing that qcowctl needs from a qcow2 header: which
 * other files belong to the image. Nothing in the file is believed
 * before it was checked. Names follow docs/interop/qcow2 of QEMU.
 */
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "chain.h"
#include "util.h"

#define QCOW2_MAGIC		0x514649fb
#define EXT_END			0
#define EXT_BACKING_FORMAT	0xe2792aca
#define EXT_DATA_FILE		0x44415441
#define INCOMPAT_DATA_FILE	(1 << 2)

#define V2_HEADER_LENGTH	72
#define V3_HEADER_LENGTH	104
#define MIN_CLUSTER_BITS	9
#define MAX_CLUSTER_BITS	21
#define MAX_BACKING_NAME	1023
#define MAX_BACKING_FORMAT	15

static uint32_t get32(const unsigned char *p)
{
	uint32_t value;

	memcpy(&value, p, sizeof(value));
	return be32toh(value);
}

static uint64_t get64(const unsigned char *p)
{
	return (uint64_t)get32(p) << 32 | get32(p + 4);
}

/* Read @size bytes from the start; what is past the end of the file is zero. */
static int read_start(int fd, void *buf, size_t size)
{
	size_t done = 0;
	ssize_t n;

	memset(buf, 0, size);
	while (done < size) {
		n = pread(fd, (char *)buf + done, size - done, done);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			break;
		done += n;
	}
	return 0;
}

bool has_qcow2_magic(int fd)
{
	unsigned char magic[4];

	return !read_start(fd, magic, sizeof(magic)) &&
	       get32(magic) == QCOW2_MAGIC;
}

static int damaged(const char *path, const char *what, uint64_t value)
{
	return fail(EXIT_REFUSED, "%s: damaged header: %s %ju; see qemu-img check",
		    path, what, (uintmax_t)value);
}

/*
 * Find what names files among the extensions of @cluster, which lie in
 * [@offset, @end).
 */
static int read_extensions(const unsigned char *cluster, uint64_t offset,
			   uint64_t end, const char *path,
			   struct header *header)
{
	uint32_t type, length;

	while (end >= 8 && offset <= end - 8) {
		type = get32(cluster + offset);
		length = get32(cluster + offset + 4);
		offset += 8;
		if (type == EXT_END)
			break;
		if (length > end - offset)
			return damaged(path, "a header extension of length", length);
		if (type == EXT_BACKING_FORMAT) {
			if (length > MAX_BACKING_FORMAT)
				return damaged(path, "a backing format of length",
					       length);
			free(header->backing_format);
			header->backing_format =
				xstrndup((const char *)cluster + offset, length);
		}
		if (type == EXT_DATA_FILE) {
			free(header->data_name);
			header->data_name =
				xstrndup((const char *)cluster + offset, length);
		}
		offset += ((uint64_t)length + 7) & ~7ULL;
	}
	/* An empty one says nothing. */
	if (header->backing_format && !*header->backing_format) {
		free(header->backing_format);
		header->backing_format = NULL;
	}
	return EXIT_OK;
}

/* @cluster is the file's first cluster, of @size bytes. */
static int parse(const unsigned char *cluster, uint64_t size, const char *path,
		 struct header *header)
{
	uint32_t version = get32(cluster + 4);
	uint64_t name_offset = get64(cluster + 8);
	uint32_t name_size = get32(cluster + 16);
	uint64_t length = V2_HEADER_LENGTH;
	int ret;

	if (version >= 3) {
		length = get32(cluster + 100);
		if (length < V3_HEADER_LENGTH || length > size)
			return damaged(path, "header_length is", length);
		header->has_data_file = get64(cluster + 72) & INCOMPAT_DATA_FILE;
	}
	if (!name_offset)
		return header->has_data_file ?
		       read_extensions(cluster, length, size, path, header) :
		       EXIT_OK;
	if (name_offset < length || name_offset > size)
		return damaged(path, "backing_file_offset is", name_offset);
	if (name_size > MAX_BACKING_NAME || name_size > size - name_offset)
		return damaged(path, "backing_file_size is", name_size);

	ret = read_extensions(cluster, length, name_offset, path, header);
	if (ret)
		return ret;
	header->backing_name = xstrndup((const char *)cluster + name_offset,
					name_size);
	/* An empty name is none. */
	if (!*header->backing_name) {
		free(header->backing_name);
		header->backing_name = NULL;
	}
	return EXIT_OK;
}

int header_read(int fd, const char *path, bool top, struct header *header)
{
	autofree unsigned char *cluster = NULL;
	unsigned char start[24];
	uint32_t version, bits;
	int ret;

	*header = (struct header) { 0 };
	ret = read_start(fd, start, sizeof(start));
	if (ret)
		return fail(EXIT_SYSTEM, "%s: cannot read: %s", path, strerror(-ret));
	if (get32(start) != QCOW2_MAGIC && top)
		return fail(EXIT_REFUSED, "%s: not a qcow2 image; a raw image is attached with losetup",
			    path);
	if (get32(start) != QCOW2_MAGIC)
		return fail(EXIT_REFUSED, "%s: not a qcow2 image, though its overlay calls it one; if it is raw, correct the overlay with qemu-img rebase -u -F raw",
			    path);
	version = get32(start + 4);
	if (version != 2 && version != 3)
		return fail(EXIT_REFUSED, "%s: qcow2 version %u; only versions 2 and 3 can be attached",
			    path, version);
	bits = get32(start + 20);
	if (bits < MIN_CLUSTER_BITS || bits > MAX_CLUSTER_BITS)
		return damaged(path, "cluster_bits is", bits);

	cluster = xreallocarray(NULL, 1UL << bits, 1);
	ret = read_start(fd, cluster, 1UL << bits);
	if (ret)
		return fail(EXIT_SYSTEM, "%s: cannot read: %s", path, strerror(-ret));
	return parse(cluster, 1UL << bits, path, header);
}

void header_free(struct header *header)
{
	free(header->backing_name);
	free(header->backing_format);
	free(header->data_name);
	*header = (struct header) { 0 };
}
