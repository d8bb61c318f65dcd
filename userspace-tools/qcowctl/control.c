// SPDX-License-Identifier: GPL-2.0-only
/*
 * Calls on /dev/qcow-control that only ask, and names of devices.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "control.h"
#include "util.h"

#define CONTROL_NODE	"/dev/" QCOW_CONTROL_NAME

int control_open(bool change)
{
	int fd = open(CONTROL_NODE, (change ? O_RDWR : O_RDONLY) | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

int control_error(int err)
{
	switch (err) {
	case ENOENT:
	case ENODEV:
	case ENXIO:
		return fail(EXIT_DENIED, CONTROL_NODE ": %s; is the module loaded? modprobe qcow",
			    strerror(err));
	case EPERM:
	case EACCES:
		return fail(EXIT_DENIED, CONTROL_NODE ": %s; you must be root",
			    strerror(err));
	case ENOTTY:
	case E2BIG:
		return fail(EXIT_DENIED, CONTROL_NODE ": %s; the module does not fit this qcowctl, see qcowctl version",
			    strerror(err));
	default:
		return fail(EXIT_SYSTEM, CONTROL_NODE ": %s", strerror(err));
	}
}

int control_list(int control, int **indices, size_t *count)
{
	__s32 batch[64];
	struct qcow_list list = {
		.size = sizeof(list),
		.indices = (uintptr_t)batch,
	};
	__u32 i;

	*indices = NULL;
	*count = 0;
	do {
		list.count = ARRAY_SIZE(batch);
		if (ioctl(control, QCOW_CTL_LIST, &list)) {
			free(*indices);
			*indices = NULL;
			return -errno;
		}
		*indices = xreallocarray(*indices, *count + list.count,
					 sizeof(**indices));
		for (i = 0; i < list.count && i < ARRAY_SIZE(batch); i++)
			(*indices)[(*count)++] = batch[i];
	} while (list.cursor >= 0);
	return 0;
}

int control_status(int control, int index, struct qcow_status *status)
{
	*status = (struct qcow_status) {
		.size = sizeof(*status),
		.index = index,
	};
	if (!ioctl(control, QCOW_CTL_STATUS, status))
		return 0;
	return errno == ENXIO || errno == ENOENT ? -ENODEV : -errno;
}

int control_layer(int control, int index, unsigned int layer,
		  struct qcow_layer_status *status, char **path)
{
	const size_t size = 16 * PATH_MAX;	/* the kernel's own limit is lower */

	*path = xreallocarray(NULL, size, 1);
	*status = (struct qcow_layer_status) {
		.size = sizeof(*status),
		.index = index,
		.layer = layer,
		.path_size = size,
		.path = (uintptr_t)*path,
	};
	if (!ioctl(control, QCOW_CTL_LAYER, status))
		return 0;
	free(*path);
	*path = NULL;
	return -errno;
}

static bool is_file(const char *layer_path, const struct stat *st,
		    const char *path)
{
	struct stat layer_st;

	if (!stat(layer_path, &layer_st))
		return same_file(&layer_st, st);
	return path && !strcmp(layer_path, path);
}

int control_find(int control, const struct stat *st, const char *path,
		 bool any_layer, int **indices, size_t *count)
{
	autofree char *real = path ? realpath(path, NULL) : NULL;
	const char *wanted = real ? real : path;
	struct qcow_layer_status status;
	size_t all, i, n = 0;
	unsigned int layer;
	bool found;
	int ret;

	ret = control_list(control, indices, &all);
	for (i = 0; !ret && i < all; i++) {
		found = false;
		/* A device may go away meanwhile: an error ends its chain. */
		for (layer = 0; !found && (any_layer || !layer); layer++) {
			autofree char *layer_path = NULL;

			if (control_layer(control, (*indices)[i], layer, &status,
					  &layer_path))
				break;
			found = is_file(layer_path, st, wanted);
		}
		if (found)
			(*indices)[n++] = (*indices)[i];
	}
	*count = n;
	return ret;
}

/* The number in "qcow7", or -1. */
static int number_of_name(const char *name)
{
	uint64_t number;

	if (strncmp(name, "qcow", 4) || !parse_number(name + 4, INT_MAX, &number))
		return -1;
	return number;
}

int device_number(const char *name)
{
	autofree char *link = NULL, *target = NULL;
	uint64_t number;
	struct stat st;
	int index;

	if (parse_number(name, INT_MAX, &number))
		return number;
	index = number_of_name(!strncmp(name, "/dev/", 5) ? name + 5 : name);
	if (index >= 0 || stat(name, &st) || !S_ISBLK(st.st_mode))
		return index;
	link = xasprintf("/sys/dev/block/%u:%u", major(st.st_rdev),
			 minor(st.st_rdev));
	target = realpath(link, NULL);
	return target ? number_of_name(strrchr(target, '/') + 1) : -1;
}
