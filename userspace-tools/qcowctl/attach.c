// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl attach: opens and locks the chain, hands it to the driver. The driver
 * keeps the files open, and with them the locks; a qcowctl that is killed at any
 * point leaves nothing behind.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "chain.h"
#include "control.h"
#include "util.h"

enum {
	READ_ONLY, SNAPSHOT, NUMBER, DISCARD, CACHE_SIZE, IO, FORMAT, BACKING_FORMAT,
	DATA_FILE, NO_REPAIR, TEMP, AUTOCLEAR,
};

static const struct option_help option_help[] = {
	[READ_ONLY] = { 'r', "read-only", NULL,
		"neither write the image nor need to" },
	[SNAPSHOT] = { 0, "snapshot", "ID|NAME",
		"show this internal snapshot, read-only" },
	[NUMBER] = { 'n', "number", "N",
		"make /dev/qcowN (default: the lowest free number)" },
	[DISCARD] = { 0, "discard", "MODE",
		"unmap (default), ignore, keep" },
	[CACHE_SIZE] = { 0, "cache-size", "SIZE",
		"most memory for tables, in bytes or with k, M, G" },
	[IO] = { 0, "io", "MODE",
		"auto (default), direct, buffered" },
	[FORMAT] = { 'f', "format", "FORMAT",
		"format of IMAGE; only qcow2 can be attached" },
	[BACKING_FORMAT] = { 'F', "backing-format", "FORMAT",
		"raw, qcow2: of backing files where no header says it" },
	[DATA_FILE] = { 0, "data-file", "FILE",
		"IMAGE's external data file (default: what its header says)" },
	[NO_REPAIR] = { 0, "no-repair", NULL,
		"refuse an image that was not closed cleanly" },
	[TEMP] = { 0, "temp", NULL,
		"keep what is written until detach only; IMAGE is read" },
	[AUTOCLEAR] = { 0, "autoclear", NULL,
		"detach when it is no longer mounted, or otherwise used" },
};

_Static_assert(ARRAY_SIZE(option_help) <= MAX_OPTIONS, "room for the options");

/* The place of option @which's value in @names, which is its number in the ABI. */
static int choose(int which, const char *value, const char * const *names,
		  int count, __u32 *choice)
{
	int i;

	for (i = 0; value && i < count; i++) {
		if (!strcmp(value, names[i])) {
			*choice = i;
			return EXIT_OK;
		}
	}
	if (!value)
		return EXIT_OK;
	return fail(EXIT_USAGE, "attach: --%s cannot be '%s'; try qcowctl attach --help",
		    option_help[which].name, value);
}

static int set_options(const char * const *options, struct qcow_attach *call)
{
	static const char * const discards[] = {
		[QCOW_DISCARD_UNMAP] = "unmap",
		[QCOW_DISCARD_IGNORE] = "ignore",
		[QCOW_DISCARD_KEEP] = "keep",
	};
	static const char * const io_modes[] = {
		[QCOW_IO_AUTO] = "auto",
		[QCOW_IO_DIRECT] = "direct",
		[QCOW_IO_BUFFERED] = "buffered",
	};
	uint64_t number;
	int ret;

	call->index = -1;
	if (options[READ_ONLY] || options[SNAPSHOT])
		call->flags |= QCOW_ATTACH_READ_ONLY;
	if (options[AUTOCLEAR])
		call->flags |= QCOW_ATTACH_AUTOCLEAR;
	if (options[TEMP] && (call->flags & QCOW_ATTACH_READ_ONLY || options[DATA_FILE]))
		return fail(EXIT_USAGE, "attach: --temp goes without --read-only, --snapshot and --data-file; leave them out");
	if (options[SNAPSHOT]) {
		call->snapshot = (uintptr_t)options[SNAPSHOT];
		call->snapshot_size = strlen(options[SNAPSHOT]);
		if (!call->snapshot_size || call->snapshot_size > UINT16_MAX)
			return fail(EXIT_USAGE, "attach: --snapshot needs the ID or the name of a snapshot; see qemu-img snapshot -l");
	}
	if (options[NUMBER]) {
		if (!parse_number(options[NUMBER], INT_MAX, &number))
			return fail(EXIT_USAGE, "attach: --number cannot be '%s'; give a number from 0 on",
				    options[NUMBER]);
		call->index = number;
	}
	if (options[CACHE_SIZE]) {
		if (!parse_size(options[CACHE_SIZE], &number))
			return fail(EXIT_USAGE, "attach: --cache-size cannot be '%s'; give bytes, or a number with K, M or G",
				    options[CACHE_SIZE]);
		call->cache_limit = number;
	}
	if (options[FORMAT] && !strcmp(options[FORMAT], "raw"))
		return fail(EXIT_USAGE, "attach: --format cannot be 'raw'; a raw image is attached with losetup");
	if (options[FORMAT] && strcmp(options[FORMAT], "qcow2"))
		return fail(EXIT_USAGE, "attach: --format cannot be '%s'; only qcow2 can be attached",
			    options[FORMAT]);
	if (options[BACKING_FORMAT] && !format_of_name(options[BACKING_FORMAT]))
		return fail(EXIT_USAGE, "attach: --backing-format cannot be '%s'; only raw and qcow2 can be attached",
			    options[BACKING_FORMAT]);
	ret = choose(DISCARD, options[DISCARD], discards, ARRAY_SIZE(discards),
		     &call->discard);
	if (!ret)
		ret = choose(IO, options[IO], io_modes, ARRAY_SIZE(io_modes),
			     &call->io_mode);
	return ret;
}

static int attach_failed(const char *image, int wanted, const char *message,
			 int err)
{
	enum qcowctl_exit code;

	switch (err) {
	case EINVAL:
	case EOPNOTSUPP:
	case EUCLEAN:
	case EFBIG:
	case EACCES:
	case ELOOP:
		code = EXIT_REFUSED;
		break;
	default:
		code = exit_of_errno(err);
	}
	if (err == EEXIST && wanted >= 0)
		return fail(code, "%s: /dev/qcow%d is attached already; leave out --number, or detach it",
			    image, wanted);
	if (*message)
		return fail(code, "%s: %s", image, message);
	if (err == EPERM || err == ENOTTY || err == E2BIG)
		return control_error(err);
	return fail(code, "%s: the driver refused it: %s; the kernel log may say more",
		    image, strerror(err));
}

static int attach(const char *image, const struct chain *chain,
		  struct qcow_attach *call)
{
	autofree struct qcow_layer *layers = NULL;
	int wanted = call->index;
	char message[1024] = "";
	int control, err = 0;
	struct qcow_layer *layer;
	size_t i;

	control = control_open(true);
	if (control < 0)
		return control_error(-control);

	layers = xreallocarray(NULL, chain->count, sizeof(*layers));
	layer = layers;
	for (i = 0; i < chain->count; i++) {
		if (chain->layers[i].data) {
			layer[-1].flags |= QCOW_LAYER_DATA_FILE;
			layer[-1].data_fd = chain->layers[i].fd;
			continue;
		}
		*layer++ = (struct qcow_layer) {
			.fd = chain->layers[i].fd,
			.format = chain->layers[i].format,
		};
	}
	call->layer_count = layer - layers;
	call->layer_size = sizeof(*layers);
	call->layers = (uintptr_t)layers;
	call->message_size = sizeof(message);
	call->message = (uintptr_t)message;
	if (ioctl(control, QCOW_CTL_ATTACH, call))
		err = errno;
	close(control);

	if (err) {
		message[sizeof(message) - 1] = '\0';
		return attach_failed(image, wanted, message, err);
	}
	printf("/dev/qcow%d\n", call->index);
	if (fflush(stdout))
		return fail(EXIT_SYSTEM, "standard output: %s; %s is attached as /dev/qcow%d",
			    strerror(errno), image, call->index);
	return EXIT_OK;
}

/*
 * Make an overlay of @image that nobody else can find, in a file without a name:
 * it is gone when the driver closes it, or when we are killed. *@path becomes one
 * by which this process and its children can open it.
 */
static int make_overlay(const char *image, char **path)
{
	const char *tmp = getenv("TMPDIR");
	const char *dir = tmp && *tmp ? tmp : "/var/tmp";
	autofree char *cwd = *image == '/' ? NULL : getcwd(NULL, 0);
	/* Symbolic links stay: names in IMAGE are relative to where they are. */
	autofree char *backing = xasprintf("%s%s%s", cwd ? cwd : "",
					   cwd ? "/" : "", image);
	char *argv[] = {
		"qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2",
		"-b", backing, NULL, NULL
	};
	int fd;

	if (access(image, R_OK))
		return fail(exit_of_errno(errno), "%s: %s; check the image's name",
			    image, strerror(errno));
	fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		return fail(EXIT_SYSTEM, "%s: cannot make a file without a name: %s; set TMPDIR to another directory",
			    dir, strerror(errno));
	*path = xasprintf("/proc/%d/fd/%d", getpid(), fd);
	argv[ARRAY_SIZE(argv) - 2] = *path;
	if (run_program(argv, false))
		return fail(EXIT_REFUSED, "%s: qemu-img cannot make an overlay of it; see above, or install qemu-utils",
			    image);
	return EXIT_OK;
}

static int run(const char * const *options, int count, char **operands)
{
	struct qcow_attach call = { .size = sizeof(call) };
	const char *format = options[BACKING_FORMAT];
	char *image = operands[0];
	struct chain chain;
	int ret;

	(void)count;
	ret = set_options(options, &call);
	if (ret)
		return ret;
	ret = options[TEMP] ? make_overlay(operands[0], &image) : EXIT_OK;
	if (ret)
		return ret;
	ret = chain_open(&chain, image,
			 call.flags & QCOW_ATTACH_READ_ONLY,
			 options[DATA_FILE],
			 format ? format_of_name(format) : 0);
	if (!ret && !(call.flags & QCOW_ATTACH_READ_ONLY))
		ret = repair_dirty(chain.layers[0].fd, image,
				   chain.count > 1 && chain.layers[1].data ?
				   chain.layers[1].path : NULL,
				   options[NO_REPAIR]);
	if (!ret)
		ret = attach(operands[0], &chain, &call);
	chain_close(&chain);
	return ret;
}

const struct command attach_command = {
	.name = "attach",
	.operands = "IMAGE",
	.summary = "Attach a qcow2 image and print the path of its block device.",
	.options = option_help,
	.option_count = ARRAY_SIZE(option_help),
	.min = 1,
	.max = 1,
	.run = run,
};
