// SPDX-License-Identifier: GPL-2.0-only
/*
 * A careful reader of what qcowctl needs from a qcow2 header: which other files
 * belong to the image, and how it is marked. Nothing in the file is believed before
 * it was checked. Names follow the specification of the format.
 */
#include <endian.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <json-c/json.h>

#include "qcowctl.h"

#define QCOW2_MAGIC		0x514649fb
#define EXT_END			0
#define EXT_BACKING_FORMAT	0xe2792aca
#define EXT_DATA_FILE		0x44415441
#define EXT_BITMAPS		0x23852875
#define EXT_ENCRYPTION		0x0537be77

#define V2_HEADER_LENGTH	72
#define V3_HEADER_LENGTH	104
#define MIN_CLUSTER_BITS	9
#define MAX_CLUSTER_BITS	21

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
static bool read_start(int fd, void *buf, size_t size)
{
	size_t done = 0;
	ssize_t n = 1;

	memset(buf, 0, size);
	for (; n > 0 && done < size; done += n)
		n = pread(fd, (char *)buf + done, size - done, done);
	return n >= 0;
}

bool has_qcow2_magic(int fd)
{
	unsigned char magic[4];

	return read_start(fd, magic, sizeof(magic)) && get32(magic) == QCOW2_MAGIC;
}

static int damaged(const char *path, const char *what, uint64_t value)
{
	return fail(EXIT_REFUSED, "%s: damaged header: %s %ju; see qemu-img check",
		    path, what, (uintmax_t)value);
}

/*
 * Find what names files, and whether there are bitmaps, among the extensions of
 * @cluster, which lie in [@offset, @end).
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
			if (length >= sizeof(header->backing_format))
				return damaged(path, "a backing format of length", length);
			snprintf(header->backing_format, sizeof(header->backing_format),
				 "%.*s", (int)length, cluster + offset);
		}
		if (type == EXT_DATA_FILE) {
			if (length >= sizeof(header->data_name))
				return damaged(path, "a name of a data file of length", length);
			snprintf(header->data_name, sizeof(header->data_name),
				 "%.*s", (int)length, cluster + offset);
		}
		if (type == EXT_ENCRYPTION && length >= 16) {
			header->luks_offset = get64(cluster + offset);
			header->luks_size = get64(cluster + offset + 8);
		}
		header->bitmaps |= type == EXT_BITMAPS;
		offset += ((uint64_t)length + 7) & ~7ULL;
	}
	return EXIT_OK;
}

/* @cluster is the file's first cluster, of @size bytes. */
static int parse(const unsigned char *cluster, uint64_t size, const char *path,
		 struct header *header)
{
	uint64_t length = V2_HEADER_LENGTH, end = size;
	uint64_t name_offset = get64(cluster + 8);
	uint32_t name_size = get32(cluster + 16);

	header->size = get64(cluster + 24);
	header->encryption = get32(cluster + 32);
	if (header->encryption > QCOW_ENCRYPTION_LUKS)
		return damaged(path, "crypt_method is", header->encryption);
	header->snapshots = get32(cluster + 60);
	if (get32(cluster + 4) >= 3) {
		length = get32(cluster + 100);
		if (length < V3_HEADER_LENGTH || length > size)
			return damaged(path, "header_length is", length);
		header->incompatible = get64(cluster + 72);
		header->autoclear = get64(cluster + 88);
	}
	if (name_offset) {
		if (name_offset < length || name_offset > size)
			return damaged(path, "backing_file_offset is", name_offset);
		if (name_size >= sizeof(header->backing_name) || name_size > size - name_offset)
			return damaged(path, "backing_file_size is", name_size);
		memcpy(header->backing_name, cluster + name_offset, name_size);
		end = name_offset;
	}
	/* Else there is nothing in them to look for. */
	if ((name_offset || header->incompatible & INCOMPAT_DATA_FILE || header->snapshots ||
	     header->encryption) &&
	    read_extensions(cluster, length, end, path, header))
		return EXIT_REFUSED;
	if (header->encryption == QCOW_ENCRYPTION_LUKS &&
	    (!header->luks_size || header->luks_size > MAX_LUKS_SIZE))
		return damaged(path, "a LUKS header of length", header->luks_size);
	return EXIT_OK;
}

int header_read(int fd, const char *path, bool top, struct header *header)
{
	autofree unsigned char *cluster = NULL;
	unsigned char start[24];
	uint32_t version, bits;

	*header = (struct header) { 0 };
	if (!read_start(fd, start, sizeof(start)))
		return fail(EXIT_SYSTEM, "%s: cannot read: %m", path);
	if (get32(start) != QCOW2_MAGIC)
		return fail(EXIT_REFUSED, top ?
			    "%s: not a qcow2 image; a raw image is attached with losetup" :
			    "%s: not a qcow2 image, though its overlay calls it one; if it is raw, correct the overlay with qemu-img rebase -u -F raw",
			    path);
	version = get32(start + 4);
	if (version != 2 && version != 3)
		return fail(EXIT_REFUSED, "%s: qcow2 version %u; only versions 2 and 3 can be attached",
			    path, version);
	bits = get32(start + 20);
	if (bits < MIN_CLUSTER_BITS || bits > MAX_CLUSTER_BITS)
		return damaged(path, "cluster_bits is", bits);

	cluster = xreallocarray(NULL, 1UL << bits, 1);
	if (!read_start(fd, cluster, 1UL << bits))
		return fail(EXIT_SYSTEM, "%s: cannot read: %m", path);
	return parse(cluster, 1UL << bits, path, header);
}

/*
 * Names of backing files mean here what they mean to QEMU, or are refused:
 *
 *   base.img          beside the overlay: the directory part of the path that the
 *                     overlay was opened by, symbolic links not followed
 *   /dir/base.img     as it is
 *   file:base.img     QEMU takes it from the working directory
 *   json:{...}        likewise; a tree of options that comes down to one file
 *   nbd:...           any other protocol: refused
 *
 * Names of external data files likewise, but that a relative one is taken from
 * beside the image, too, where QEMU takes it from its working directory.
 */

static bool is_file_driver(const char *driver)
{
	return !strcmp(driver, "file") || !strcmp(driver, "host_device");
}

static int wrong_protocol(const char *whose, const char *protocol)
{
	return fail(EXIT_REFUSED, "%s is reached by the protocol '%s'; only local files and block devices can be attached",
		    whose, protocol);
}

int format_refused(const char *whose, const char *format)
{
	return fail(EXIT_REFUSED, "%s has the format '%s'; only raw and qcow2 can be attached",
		    whose, format);
}

/* True if QEMU reads @name as PROTOCOL:..., its path_has_protocol(). */
static bool has_protocol(const char *name)
{
	return name[strcspn(name, ":/")] == ':';
}

char *plain_path(const char *path)
{
	return xasprintf(has_protocol(path) || *path == '-' ? "./%s" : "%s", path);
}

/* @name has a protocol: leave the path behind it if that is a local one. */
static int strip_protocol(const char *whose, const char *name, char **path)
{
	int len = strcspn(name, ":");
	autofree char *protocol = xasprintf("%.*s", len, name);

	if (!is_file_driver(protocol))
		return wrong_protocol(whose, protocol);
	*path = xstrdup(name + len + 1);
	return EXIT_OK;
}

/* Take the string @key out of @options; NULL if there is none. To be freed. */
static char *take(struct json_object *options, const char *key)
{
	struct json_object *value = json_object_object_get(options, key);
	char *string;

	if (!json_object_is_type(value, json_type_string))
		return NULL;
	string = xstrdup(json_object_get_string(value));
	json_object_object_del(options, key);
	return string;
}

/* Turn "file": {"filename": ...} into the other way to write it, "file.filename". */
static void flatten(struct json_object *options)
{
	struct json_object *file = json_object_object_get(options, "file");

	if (!json_object_is_type(file, json_type_object))
		return;
	json_object_object_foreach(file, name, value) {
		autofree char *key = xasprintf("file.%s", name);

		json_object_object_add(options, key, json_object_get(value));
	}
	json_object_object_del(options, "file");
}

/* Reduce @options to one local file; what is left over in them is refused. */
static int reduce(const char *whose, struct json_object *options, char **path, int *format)
{
	autofree char *driver = take(options, "driver");
	autofree char *protocol = take(options, "file.driver");
	autofree char *filename = take(options, "file.filename");

	if (driver && format_of_name(driver)) {
		*format = format_of_name(driver);
	} else if (driver && !protocol && !filename) {
		/* The file itself, with no format driver on it: raw. */
		*format = QCOW_FORMAT_RAW;
		protocol = xstrdup(driver);
		filename = take(options, "filename");
	} else if (driver) {
		return format_refused(whose, driver);
	}
	if (protocol && !is_file_driver(protocol))
		return wrong_protocol(whose, protocol);
	json_object_object_foreach(options, key, value) {
		(void)value;
		return fail(EXIT_REFUSED, "%s has a json: name with the option '%s'; only driver, file.driver and file.filename, all strings, can be followed",
			    whose, key);
	}
	if (!filename || !*filename)
		return fail(EXIT_REFUSED, "%s has a json: name that has no file.filename; correct it with qemu-img rebase -u",
			    whose);
	if (!protocol && has_protocol(filename))
		return strip_protocol(whose, filename, path);
	*path = xstrdup(filename);
	return EXIT_OK;
}

static int resolve_json(const char *whose, const char *text, char **path, int *format)
{
	struct json_tokener *parser = json_tokener_new();
	struct json_object *options = NULL;
	size_t end = 0;
	int ret;

	if (parser) {
		options = json_tokener_parse_ex(parser, text, strlen(text));
		end = json_tokener_get_parse_end(parser);
		json_tokener_free(parser);
	}
	if (text[end] || !json_object_is_type(options, json_type_object))
		return fail(EXIT_REFUSED, "%s has a json: name that is not one JSON object; correct it with qemu-img rebase -u",
			    whose);
	flatten(options);
	ret = reduce(whose, options, path, format);
	json_object_put(options);
	return ret;
}

int backing_resolve(const char *image, const char *whose, const char *name,
		    char **path, int *format)
{
	const char *slash = strrchr(image, '/');
	int dir = slash && *name != '/' ? slash + 1 - image : 0;

	*format = 0;
	if (!strncmp(name, "json:", 5))
		return resolve_json(whose, name + 5, path, format);
	if (has_protocol(name))
		return strip_protocol(whose, name, path);
	*path = xasprintf("%.*s%s", dir, image, name);
	return EXIT_OK;
}
