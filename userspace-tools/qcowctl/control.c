// SPDX-License-Identifier: GPL-2.0-only
/*
 * Calls on /dev/qcow-control, and names of devices and of what their options say.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

#include "qcowctl.h"

#define CONTROL_NODE	"/dev/" QCOW_CONTROL_NAME

const char * const discard_names[3] = {
	[QCOW_DISCARD_UNMAP] = "unmap",
	[QCOW_DISCARD_IGNORE] = "ignore",
	[QCOW_DISCARD_KEEP] = "keep",
};

/* By QCOW_COMPRESS_*; an option without a value is "" */
const char * const compress_names[4] = { "none", "", "zlib", "zstd" };

static int control = -1;

int format_of_name(const char *name)
{
	if (!strcmp(name, "raw"))
		return QCOW_FORMAT_RAW;
	return strcmp(name, "qcow2") ? 0 : QCOW_FORMAT_QCOW2;
}

const char *name_of_format(int format)
{
	return format == QCOW_FORMAT_RAW ? "raw" : "qcow2";
}

bool control_open(void)
{
	if (control < 0)
		control = open(CONTROL_NODE, O_RDWR | O_CLOEXEC);
	return control >= 0;
}

int control_error(void)
{
	if (errno == ENOENT || errno == ENODEV || errno == ENXIO)
		return fail(EXIT_DENIED, CONTROL_NODE ": %m; is the module loaded? modprobe qcow");
	if (errno == EPERM || errno == EACCES)
		return fail(EXIT_DENIED, CONTROL_NODE ": %m; you must be root");
	if (errno == ENOTTY || errno == E2BIG)
		return fail(EXIT_DENIED, CONTROL_NODE ": %m; the module does not fit this qcowctl, see qcowctl version");
	return fail(EXIT_SYSTEM, CONTROL_NODE ": %m");
}

int control_call(unsigned int request, void *call)
{
	return ioctl(control, request, call) ? errno : 0;
}

int *control_list(void)
{
	struct qcow_list call = { .size = sizeof(call) };
	int *indices = NULL;
	size_t count = 0;

	do {
		call.count = 64;
		indices = xreallocarray(indices, count + call.count + 1, sizeof(*indices));
		call.indices = (uintptr_t)(indices + count);
		if (control_call(QCOW_CTL_LIST, &call)) {
			free(indices);
			return NULL;
		}
		count += call.count;
	} while (call.cursor >= 0);
	indices[count] = -1;
	return indices;
}

const char *control_layer(int index, unsigned int layer, struct qcow_layer_status *status)
{
	static char path[16 * PATH_MAX];	/* the kernel's own limit is lower */

	*status = (struct qcow_layer_status) {
		.size = sizeof(*status),
		.index = index,
		.layer = layer,
		.path_size = sizeof(path),
		.path = (uintptr_t)path,
	};
	return control_call(QCOW_CTL_LAYER, status) ? NULL : path;
}

/* Is a layer of the device, its image or any, @st, or named @path? */
static bool has_file(int index, const struct stat *st, const char *path, bool any_layer)
{
	struct qcow_layer_status status;
	struct stat layer_st;
	const char *layer;
	unsigned int i;

	/* The device may go away meanwhile: an error ends its chain. */
	for (i = 0; !i || any_layer; i++) {
		layer = control_layer(index, i, &status);
		if (!layer)
			return false;
		if (stat(layer, &layer_st) ? path && !strcmp(layer, path) :
					     same_file(&layer_st, st))
			return true;
	}
	return false;
}

int *control_find(const struct stat *st, const char *path, bool any_layer)
{
	autofree char *real = path ? realpath(path, NULL) : NULL;
	int *indices = control_list();
	int *in, *out = indices;

	for (in = indices; in && *in >= 0; in++) {
		if (has_file(*in, st, real ?: path, any_layer))
			*out++ = *in;
	}
	if (indices)
		*out = -1;
	return indices;
}

/* The number in "qcow7", or -1. */
static int number_of_name(const char *name)
{
	int number;

	return !strncmp(name, "qcow", 4) && parse_number(name + 4, &number) ? number : -1;
}

int device_number(const char *name)
{
	autofree char *link = NULL, *target = NULL;
	struct stat st;
	int index;

	if (parse_number(name, &index))
		return index;
	index = number_of_name(!strncmp(name, "/dev/", 5) ? name + 5 : name);
	if (index >= 0 || stat(name, &st) || !S_ISBLK(st.st_mode))
		return index;
	link = xasprintf("/sys/dev/block/%u:%u", major(st.st_rdev), minor(st.st_rdev));
	target = realpath(link, NULL);
	return target ? number_of_name(strrchr(target, '/') + 1) : -1;
}

char *attribute(int index, const char *name)
{
	autofree char *path = xasprintf("/sys/block/qcow%d/qcow/%s", index, name);

	return read_text(path);
}

int not_attached(const char *name)
{
	return fail(EXIT_ABSENT, "%s: not attached; see qcowctl list", name);
}
