// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl attach: opens and locks the chain, hands it to the driver. The driver
 * keeps the files open, and with them the locks; a qcowctl that is killed at any
 * point leaves nothing behind.
 *
 * qcowctl detach: finds the devices, removes them, and says what keeps them.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "qcowctl.h"

enum {
	READ_ONLY, SNAPSHOT, NUMBER, DISCARD, CACHE, CACHE_SIZE, IO, FORMAT, BACKING_FORMAT,
	DATA_FILE, KEY_FILE, KEYRING, NO_REPAIR, TEMP, AUTOCLEAR, COMPRESS, NO_INLINE,
	ATTACH_OPTIONS
};

static const struct option_help attach_options[ATTACH_OPTIONS + 1] = {
	[READ_ONLY] = { 'r', "read-only", NULL, "neither write the image nor need to" },
	[SNAPSHOT] = { SNAPSHOT, "snapshot", "ID|NAME", "show this internal snapshot, read-only" },
	[NUMBER] = { 'n', "number", "N", "make /dev/qcowN (default: the lowest free number)" },
	[DISCARD] = { DISCARD, "discard", "MODE", "unmap (default), ignore, keep" },
	[CACHE] = { CACHE, "cache", "MODE",
		"none, writeback, directsync, writethrough, unsafe: as for QEMU" },
	[CACHE_SIZE] = { CACHE_SIZE, "cache-size", "SIZE",
		"most memory for tables, in bytes or with k, M, G, T" },
	[IO] = { IO, "io", "MODE", "auto (default), direct, buffered" },
	[FORMAT] = { 'f', "format", "FORMAT", "format of IMAGE; only qcow2 can be attached" },
	[BACKING_FORMAT] = { 'F', "backing-format", "FORMAT",
		"raw, qcow2: of backing files where no header says it" },
	[DATA_FILE] = { DATA_FILE, "data-file", "FILE",
		"IMAGE's external data file (default: what its header says)" },
	[KEY_FILE] = { KEY_FILE, "key-file", "FILE",
		"has the passphrase of IMAGE; again: of the next encrypted backing file",
		.many = true },
	[KEYRING] = { KEYRING, "keyring", "NAME", "take it from the user key of this name" },
	[NO_REPAIR] = { NO_REPAIR, "no-repair", NULL,
		"refuse an image that was not closed cleanly" },
	[TEMP] = { TEMP, "temp", NULL, "keep what is written until detach only; IMAGE is read" },
	[AUTOCLEAR] = { AUTOCLEAR, "autoclear", NULL,
		"detach when it is no longer mounted, or otherwise used" },
	[COMPRESS] = { COMPRESS, "compress", "[=TYPE]",
		"compress new clusters; TYPE, zlib or zstd, is what IMAGE must be for" },
	[NO_INLINE] = { NO_INLINE, "no-inline", NULL,
		"serve each request by a worker, never at once" },
};

_Static_assert(ATTACH_OPTIONS <= MAX_OPTIONS, "room for the options");

/* By QCOW_IO_* */
static const char * const io_modes[3] = { "auto", "direct", "buffered" };

/* QEMU's cache modes, and what they are here */
static const char * const cache_modes[5] = {
	"none", "writeback", "directsync", "writethrough", "unsafe",
};

static const struct { __u32 io_mode, flags; } caching[5] = {
	{ QCOW_IO_DIRECT, 0 },
	{ QCOW_IO_BUFFERED, 0 },
	{ QCOW_IO_DIRECT, QCOW_ATTACH_WRITE_THROUGH },
	{ QCOW_IO_BUFFERED, QCOW_ATTACH_WRITE_THROUGH },
	{ QCOW_IO_BUFFERED, QCOW_ATTACH_NO_FLUSH },
};

static int bad_value(int option, const char *value, const char *hint)
{
	return fail(EXIT_USAGE, "attach: --%s cannot be '%s'; %s",
		    attach_options[option].name, value, hint);
}

/* The place of an option's value in @names, which is its number in the ABI. */
static int choose(int option, const char *value, const char * const *names, __u32 count,
		  __u32 *choice)
{
	for (*choice = 0; value && *choice < count; ++*choice) {
		if (!strcmp(value, names[*choice]))
			return EXIT_OK;
	}
	return value ? bad_value(option, value, "try qcowctl attach --help") : EXIT_OK;
}

static int set_options(const char * const *values, struct qcow_attach *call,
		       struct chain *chain)
{
	const char *format = values[FORMAT], *backing = values[BACKING_FORMAT];
	const char *snapshot = values[SNAPSHOT];
	uint64_t cache_limit = 0;
	int number = -1, ret;
	__u32 cache;

	if (values[TEMP] && (values[READ_ONLY] || snapshot || values[DATA_FILE]))
		return fail(EXIT_USAGE, "attach: --temp goes without --read-only, --snapshot and --data-file; leave them out");
	if (values[COMPRESS] && (values[READ_ONLY] || snapshot))
		return fail(EXIT_USAGE, "attach: --compress is about writing; leave it out, or --read-only and --snapshot");
	if (values[CACHE] && values[IO])
		return fail(EXIT_USAGE, "attach: --cache says how files are read and written; leave out --io");
	if (values[KEY_FILE] && values[KEYRING])
		return fail(EXIT_USAGE, "attach: --key-file and --keyring exclude each other; give one or the other");
	if (snapshot && (!*snapshot || strlen(snapshot) > UINT16_MAX))
		return fail(EXIT_USAGE, "attach: --snapshot needs the ID or the name of a snapshot; see qemu-img snapshot -l");
	if (values[NUMBER] && !parse_number(values[NUMBER], &number))
		return bad_value(NUMBER, values[NUMBER], "give a number from 0 on");
	if (values[CACHE_SIZE] && !parse_size(values[CACHE_SIZE], &cache_limit))
		return bad_value(CACHE_SIZE, values[CACHE_SIZE],
				 "give bytes, or a number with K, M, G or T");
	if (format && strcmp(format, "qcow2"))
		return bad_value(FORMAT, format, strcmp(format, "raw") ?
				 "only qcow2 can be attached" :
				 "a raw image is attached with losetup");
	if (backing && !format_of_name(backing))
		return bad_value(BACKING_FORMAT, backing, "only raw and qcow2 can be attached");
	*chain = (struct chain) {
		.read_only = values[READ_ONLY] || snapshot,
		.must_write = values[COMPRESS],
		.data_file = values[DATA_FILE],
		.key_files = values[KEY_FILE],
		.keyring = values[KEYRING],
		.backing_format = backing ? format_of_name(backing) : 0,
	};
	*call = (struct qcow_attach) {
		.size = sizeof(*call),
		.flags = (values[AUTOCLEAR] ? QCOW_ATTACH_AUTOCLEAR : 0) |
			 (values[NO_INLINE] ? QCOW_ATTACH_NO_INLINE : 0),
		.index = number,
		.cache_limit = cache_limit,
		.snapshot = (uintptr_t)snapshot,
		.snapshot_size = snapshot ? strlen(snapshot) : 0,
	};
	ret = choose(DISCARD, values[DISCARD], discard_names, 3, &call->discard) ?:
	      choose(IO, values[IO], io_modes, 3, &call->io_mode) ?:
	      choose(COMPRESS, values[COMPRESS], compress_names, 4, &call->compress) ?:
	      choose(CACHE, values[CACHE], cache_modes, 5, &cache);
	if (!ret && values[CACHE]) {
		call->io_mode = caching[cache].io_mode;
		call->flags |= caching[cache].flags;
	}
	return ret;
}

static int attach_failed(const char *image, int wanted, const char *message)
{
	int code = exit_of_errno(errno);

	if (errno == EINVAL || errno == EOPNOTSUPP || errno == EUCLEAN ||
	    errno == EFBIG || errno == EACCES || errno == ELOOP)
		code = EXIT_REFUSED;
	if (errno == EEXIST && wanted >= 0)
		return fail(code, "%s: /dev/qcow%d is attached already; leave out --number, or detach it",
			    image, wanted);
	if (*message)
		return fail(code, "%s: %s", image, message);
	if (errno == EPERM || errno == ENOTTY || errno == E2BIG)
		return control_error();
	return fail(code, "%s: the driver refused it: %m; the kernel log may say more", image);
}

/*
 * Make an overlay of @image that nobody else can find, in a file without a name:
 * it is gone when the driver closes it, or when we are killed. *@path becomes one
 * by which this process and its children can open it.
 */
static int make_overlay(const char *image, const char **path)
{
	const char *tmp = getenv("TMPDIR");
	const char *dir = tmp && *tmp ? tmp : "/var/tmp";
	autofree char *cwd = *image == '/' ? NULL : getcwd(NULL, 0);
	/* Symbolic links stay: names in IMAGE are relative to where they are. */
	autofree char *backing = xasprintf("%s%s%s", cwd ?: "", cwd ? "/" : "", image);
	char *argv[] = {
		"qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2",
		"-b", backing, "-u", NULL, NULL, NULL
	};
	struct header header;
	int fd, ret;

	fd = open(image, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fail(exit_of_errno(errno), "%s: %m; check the image's name", image);
	ret = header_read(fd, image, true, &header);
	close(fd);
	if (ret)
		return ret;
	if (header.encryption)
		fail(EXIT_OK, "warning: %s: what is written with --temp is not encrypted, and goes to a file in %s",
		     image, dir);
	fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		return fail(EXIT_SYSTEM, "%s: cannot make a file without a name: %m; set TMPDIR to another directory",
			    dir);
	argv[ARRAY_SIZE(argv) - 3] = xasprintf("/proc/%d/fd/%d", getpid(), fd);
	*path = argv[ARRAY_SIZE(argv) - 3];
	/* The size is given, so that qemu-img need not open the image (-u). */
	argv[ARRAY_SIZE(argv) - 2] = xasprintf("%ju", (uintmax_t)(header.size + 511) / 512 * 512);
	if (run_program(argv, false))
		return fail(EXIT_REFUSED, "%s: qemu-img cannot make an overlay of it; see above, or install qemu-utils",
			    image);
	return EXIT_OK;
}

static int attach(const char * const *values, char **operands)
{
	const char *image = operands[0], *opened = image;
	struct qcow_attach call;
	char message[1024] = "";
	struct chain chain;
	int ret, wanted;

	ret = set_options(values, &call, &chain);
	if (!ret && values[TEMP])
		ret = make_overlay(image, &opened);
	ret = ret ?: chain_open(&chain, opened);
	if (!ret && !chain.read_only)
		ret = repair_dirty(&chain, values[NO_REPAIR]);
	if (ret)
		return ret;
	if (!control_open())
		return control_error();
	wanted = call.index;
	call.flags |= chain.read_only ? QCOW_ATTACH_READ_ONLY : 0;
	call.layers = (uintptr_t)chain.layers;
	call.layer_count = chain.layer_count;
	call.layer_size = sizeof(*chain.layers);
	call.message = (uintptr_t)message;
	call.message_size = sizeof(message);
	ret = control_call(QCOW_CTL_ATTACH, &call);
	errno = ret;
	if (ret)
		return attach_failed(image, wanted, message);
	printf("/dev/qcow%d\n", call.index);
	if (fflush(stdout))
		return fail(EXIT_SYSTEM, "standard output: %m; %s is attached as /dev/qcow%d",
			    image, call.index);
	return EXIT_OK;
}

const struct command attach_command = {
	.name = "attach",
	.operands = "IMAGE",
	.summary = "Attach a qcow2 image and print the path of its block device.",
	.options = attach_options,
	.min = 1, .max = 1,
	.run = attach,
};

enum { DEFERRED, ALL, DETACH_OPTIONS };

static const struct option_help detach_options[DETACH_OPTIONS + 1] = {
	[DEFERRED] = { 'd', "deferred", NULL,
		"if it is in use, detach when the last opener closes it" },
	[ALL] = { 'a', "all", NULL, "all devices" },
};

/* udev and others look at a device for a moment; that long we wait for them. */
#define RETRIES		40
#define RETRY_USEC	50000

static int detach_one(int index, bool deferred)
{
	autofree char *name = xasprintf("/dev/qcow%d", index);
	struct qcow_detach call = {
		.size = sizeof(call),
		.flags = deferred ? QCOW_DETACH_DEFERRED : 0,
		.index = index,
	};
	struct qcow_status status = { .size = sizeof(status), .index = index };
	int err, tries = 0;

	while ((err = control_call(QCOW_CTL_DETACH, &call)) == EBUSY) {
		autofree char *holder = device_holder(index);

		if (holder || ++tries > RETRIES) {
			if (!holder && !control_call(QCOW_CTL_STATUS, &status) &&
			    status.flags & QCOW_STATUS_FROZEN)
				holder = xstrdup("frozen for a check of its image");
			holder = holder ?: device_openers(index);
			return fail(EXIT_BUSY, "%s: %s; end that, or use --deferred",
				    name, holder);
		}
		usleep(RETRY_USEC);
	}
	if (!err)
		return EXIT_OK;
	if (err == ENODEV)
		return not_attached(name);
	if (err == EPERM || err == ENOTTY || err == E2BIG)
		return control_error();
	if (control_call(QCOW_CTL_STATUS, &status) == ENODEV)
		return fail(EXIT_SYSTEM, "%s: detached, but not everything could be written: %s; see the kernel log, then qemu-img check",
			    name, strerror(err));
	return fail(exit_of_errno(err), "%s: still attached: %s; see the kernel log",
		    name, strerror(err));
}

/* The devices that @name means, which has to be one. */
static int find_device(const char *name, int *index)
{
	autofree int *indices = NULL;
	autofree char *list = NULL;
	struct stat st = { 0 };
	int i, err;

	*index = device_number(name);
	if (*index >= 0)
		return EXIT_OK;

	/* The kernel may know a name that is out of reach from here. */
	err = stat(name, &st) ? errno : 0;
	indices = control_find(&st, name, false);
	if (!indices)
		return control_error();
	*index = indices[0];
	if (*index < 0 && err)
		return fail(exit_of_errno(err), "%s: %s; name a device or its image, see qcowctl list",
			    name, strerror(err));
	if (*index < 0)
		return not_attached(name);
	if (indices[1] < 0)
		return EXIT_OK;
	for (i = 0; indices[i] >= 0; i++) {
		autofree char *device = xasprintf("/dev/qcow%d", indices[i]);

		list_append(&list, device);
	}
	return fail(EXIT_USAGE, "%s: attached as %s; name one of them", name, list);
}

static int detach(const char * const *values, char **operands)
{
	bool deferred = values[DEFERRED];
	int index, ret, first = EXIT_OK;
	autofree int *indices = NULL;
	size_t i = 0;

	if (values[ALL] && *operands)
		return fail(EXIT_USAGE, "detach: --all and '%s' exclude each other; give one or the other",
			    *operands);
	if (!values[ALL] && !*operands)
		return fail(EXIT_USAGE, "detach: nothing to detach; name a device or an image, or give --all");
	indices = control_open() ? control_list() : NULL;
	if (!indices)
		return control_error();
	while (values[ALL] && indices[i] >= 0)
		i++;
	/* The other way round: a device may be the image of a later one. */
	while (i-- > 0) {
		ret = detach_one(indices[i], deferred);
		first = first ?: ret;
	}
	for (; *operands; operands++) {
		ret = find_device(*operands, &index) ?: detach_one(index, deferred);
		first = first ?: ret;
	}
	return first;
}

const struct command detach_command = {
	.name = "detach",
	.operands = "DEVICE|NUMBER|IMAGE...",
	.summary = "Detach devices; afterwards all is written and the images are free.",
	.options = detach_options,
	.max = -1,
	.run = detach,
};
