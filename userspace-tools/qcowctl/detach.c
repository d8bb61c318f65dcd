// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl detach: finds the devices, removes them, and says what keeps them.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "control.h"
#include "util.h"

enum { DEFERRED, ALL };

static const struct option_help option_help[] = {
	[DEFERRED] = { 'd', "deferred", NULL,
		"if it is in use, detach when the last opener closes it" },
	[ALL] = { 'a', "all", NULL, "all devices" },
};

/* udev and others look at a device for a moment; that long we wait for them. */
#define RETRIES		40
#define RETRY_USEC	50000

static int busy(int index, const char *holder)
{
	autofree char *openers = NULL;

	if (holder)
		return fail(EXIT_BUSY, "/dev/qcow%d: %s; end that, or use --deferred",
			    index, holder);
	openers = device_openers(index);
	return fail(EXIT_BUSY, "/dev/qcow%d: open in %s; end that, or use --deferred",
		    index, openers ? openers : "what cannot be seen from here");
}

static int detach(int control, int index, bool deferred)
{
	struct qcow_detach call = {
		.size = sizeof(call),
		.flags = deferred ? QCOW_DETACH_DEFERRED : 0,
		.index = index,
	};
	struct qcow_status status;
	int err, tries = 0;

	for (;;) {
		autofree char *holder = NULL;

		err = ioctl(control, QCOW_CTL_DETACH, &call) ? errno : 0;
		if (err != EBUSY)
			break;
		holder = device_holder(index);
		if (holder || ++tries > RETRIES)
			return busy(index, holder);
		usleep(RETRY_USEC);
	}

	switch (err) {
	case 0:
		return EXIT_OK;
	case ENODEV:
	case ENXIO:
	case ENOENT:
		return fail(EXIT_ABSENT, "/dev/qcow%d: not attached; see qcowctl list",
			    index);
	case EPERM:
	case ENOTTY:
	case E2BIG:
		return control_error(err);
	}
	if (control_status(control, index, &status) == -ENODEV)
		return fail(EXIT_SYSTEM, "/dev/qcow%d: detached, but not everything could be written: %s; see the kernel log, then qemu-img check",
			    index, strerror(err));
	return fail(exit_of_errno(err), "/dev/qcow%d: still attached: %s; see the kernel log",
		    index, strerror(err));
}

/* The device that @name means. Return: an exit code, after a message if not OK. */
static int find_device(int control, const char *name, int *index)
{
	autofree int *indices = NULL;
	autofree char *list = NULL;
	struct stat st = { 0 };
	size_t count, i;
	int err, ret;

	*index = device_number(name);
	if (*index >= 0)
		return EXIT_OK;

	/* The kernel may know a name that is out of reach from here. */
	err = stat(name, &st) ? errno : 0;
	ret = control_find(control, &st, name, false, &indices, &count);
	if (ret)
		return control_error(-ret);
	if (!count && err)
		return fail(exit_of_errno(err), "%s: %s; name a device or its image, see qcowctl list",
			    name, strerror(err));
	if (!count)
		return fail(EXIT_ABSENT, "%s: not attached; see qcowctl list", name);
	*index = indices[0];
	if (count == 1)
		return EXIT_OK;
	for (i = 0; i < count; i++) {
		autofree char *device = xasprintf("/dev/qcow%d", indices[i]);

		list_append(&list, device);
	}
	return fail(EXIT_USAGE, "%s: attached as %s; name one of them", name, list);
}

static int detach_all(int control, bool deferred)
{
	autofree int *indices = NULL;
	int ret, first = EXIT_OK;
	size_t count, i;

	ret = control_list(control, &indices, &count);
	if (ret)
		return control_error(-ret);
	/* The other way round: a device may be the image of a later one. */
	for (i = count; i-- > 0; ) {
		ret = detach(control, indices[i], deferred);
		if (!first)
			first = ret;
	}
	return first;
}

static int run(const char * const *options, int count, char **operands)
{
	int control, index, i, ret, first = EXIT_OK;

	if (options[ALL] && count)
		return fail(EXIT_USAGE, "detach: --all and '%s' exclude each other; give one or the other",
			    operands[0]);
	if (!options[ALL] && !count)
		return fail(EXIT_USAGE, "detach: nothing to detach; name a device or an image, or give --all");

	control = control_open(true);
	if (control < 0)
		return control_error(-control);
	if (options[ALL])
		first = detach_all(control, options[DEFERRED]);
	for (i = 0; i < count; i++) {
		ret = find_device(control, operands[i], &index);
		if (!ret)
			ret = detach(control, index, options[DEFERRED]);
		if (!first)
			first = ret;
	}
	close(control);
	return first;
}

const struct command detach_command = {
	.name = "detach",
	.operands = "DEVICE|NUMBER|IMAGE...",
	.summary = "Detach devices; afterwards all is written and the images are free.",
	.options = option_help,
	.option_count = ARRAY_SIZE(option_help),
	.max = -1,
	.run = run,
};
