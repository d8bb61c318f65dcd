/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Attached devices: the calls of /dev/qcow-control that only ask, and who uses
 * a device or a file.
 *
 * What returns int returns 0 or -errno, and prints nothing.
 */
#ifndef QCOWCTL_CONTROL_H
#define QCOWCTL_CONTROL_H

#include <linux/qcow.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

/* Open the control node, for writing if @change: a descriptor, or -errno. */
int control_open(bool change);

/* Say why a call failed with @err, one that had nothing to do with a device. */
int control_error(int err);

/* The numbers of all devices, ascending; to be freed. */
int control_list(int control, int **indices, size_t *count);

/* -ENODEV where there is no such device. */
int control_status(int control, int index, struct qcow_status *status);

/* *@path is to be freed. -ENOENT past the end of the chain. */
int control_layer(int control, int index, unsigned int layer,
		  struct qcow_layer_status *status, char **path);

/*
 * The devices that have the file @st (named @path, if not NULL) as their image,
 * or with @any_layer anywhere in their chain.
 */
int control_find(int control, const struct stat *st, const char *path,
		 bool any_layer, int **indices, size_t *count);

/*
 * The number that "/dev/qcow7", "qcow7", "7" or a link to the node names, or -1
 * for any other @name.
 */
int device_number(const char *name);

/*
 * users.c: phrases to be freed, or NULL where nobody is to be seen.
 *
 * lock_holder: who has an advisory lock on @byte of the file @st, as "PID (command)"
 * or "/dev/qcowN".
 * device_holder: what keeps a device in use until somebody undoes it, a mount for
 * example: "mounted on /mnt".
 * device_openers: the processes that have it or a partition open.
 */
char *lock_holder(const struct stat *st, int byte);
char *device_holder(int index);
char *device_openers(int index);

#endif /* QCOWCTL_CONTROL_H */
