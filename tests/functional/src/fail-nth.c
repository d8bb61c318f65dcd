// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail-nth IMAGE [STEP]: attach and detach IMAGE, a qcow2 file, over and over, with the
 * Nth allocation of the system call failing: N is 1, 1 + STEP and so on until there are
 * no more. Each call works or says ENOMEM or so; where the attach does not work there is
 * no device, and after the detach neither. For a kernel with CONFIG_FAILSLAB, whose
 * failslab and fail_page_alloc have been told which allocations count.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../../../include/uapi/linux/qcow.h"

#define INDEX	77
#define DEVICE	"/sys/block/qcow77"

static int control;
static int fail_nth;

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, "fail-nth: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, "\n");
	va_end(ap);
	exit(1);
}

static void set_nth(unsigned int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u\n", n);

	if (pwrite(fail_nth, text, len, 0) != len)
		die("fail-nth: %s", strerror(errno));
}

/*
 * call - a system call in which the Nth allocation fails, or none with 0. *@reached
 * says if there were as many. Returns 0 or the errno.
 */
static int call(unsigned long number, void *args, unsigned int n, int *reached)
{
	char text[16] = "";
	int err;

	set_nth(n);
	err = ioctl(control, number, args) ? errno : 0;
	if (pread(fail_nth, text, sizeof(text) - 1, 0) <= 0)
		die("fail-nth: %s", strerror(errno));
	set_nth(0);
	*reached = n && !atoi(text);
	return err;
}

static int attach(const char *path, unsigned int n, int *reached)
{
	struct qcow_layer layer = {
		.fd = open(path, O_RDWR | O_CLOEXEC), .format = QCOW_FORMAT_QCOW2,
	};
	struct qcow_attach args = {
		.size = sizeof(args), .index = INDEX, .layer_count = 1,
		.layer_size = sizeof(layer), .layers = (uintptr_t)&layer,
	};
	int err;

	if (layer.fd < 0)
		die("%s: %s", path, strerror(errno));
	err = call(QCOW_CTL_ATTACH, &args, n, reached);
	close(layer.fd);
	if (err && !access(DEVICE, F_OK))
		die("%s at allocation %u, and there is a device", strerror(err), n);
	return err;
}

/* udev may have it open for a moment. */
static int detach(unsigned int n, int *reached)
{
	struct qcow_detach args = { .size = sizeof(args), .index = INDEX };
	int err, tries;

	for (tries = 0; tries < 1000; tries++) {
		err = call(QCOW_CTL_DETACH, &args, n, reached);
		if (err != EBUSY)
			break;
		usleep(5000);
	}
	return err;
}

int main(int argc, char **argv)
{
	unsigned int step = argc > 2 ? atoi(argv[2]) : 1;
	unsigned int n, refused = 0;
	int err, reached, ignored;

	if (argc < 2 || !step)
		die("usage: fail-nth IMAGE [STEP]");
	control = open("/dev/" QCOW_CONTROL_NAME, O_RDWR | O_CLOEXEC);
	fail_nth = open("/proc/self/fail-nth", O_RDWR | O_CLOEXEC);
	if (control < 0 || fail_nth < 0)
		die("/dev/" QCOW_CONTROL_NAME ", /proc/self/fail-nth: %s", strerror(errno));

	for (n = 1, reached = 1; reached; n += step) {
		err = attach(argv[1], n, &reached);
		if (err && !reached)
			die("attach, with no failure: %s", strerror(err));
		if (err) {
			refused++;
			continue;
		}
		err = detach(0, &ignored);
		if (err)
			die("detach, after allocation %u of the attach: %s", n, strerror(err));
		if (!access(DEVICE, F_OK))
			die("allocation %u of the attach: the device stays", n);
	}
	printf("attach: up to allocation %u, %u of those tried refuse it\n", n - step, refused);

	for (n = 1, reached = 1, refused = 0; reached; n += step) {
		err = attach(argv[1], 0, &ignored);
		if (err)
			die("attach before detach %u: %s", n, strerror(err));
		err = detach(n, &reached);
		if (err && !reached)
			die("detach, with no failure: %s", strerror(err));
		refused += !!err;
		/* It is there and can be detached, or it is gone. */
		if (!access(DEVICE, F_OK)) {
			if (!err)
				die("detach, allocation %u: the device stays", n);
			err = detach(0, &ignored);
			if (err || !access(DEVICE, F_OK))
				die("detach, again, after allocation %u: %s", n, strerror(err));
		}
	}
	printf("detach: up to allocation %u, %u of those tried say so\n", n - step, refused);
	return 0;
}
