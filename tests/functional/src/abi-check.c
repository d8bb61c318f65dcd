// SPDX-License-Identifier: GPL-2.0-only
/*
 * abi-check IMAGE: what Documentation/abi.rst says of the calls, and that no tool of
 * today calls that way: sizes, unknown flags, reserved members, bad pointers. IMAGE
 * has a qcow2 backing file, which is IMAGE.base. Prints `ok - TEXT` or `not ok - TEXT`
 * for each case.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../../include/uapi/linux/qcow.h"

#define BIG		4096	/* the largest struct that any caller may have */
#define UNMAPPED	8	/* no pointer */

static int control;

static const struct call {
	const char *name;
	unsigned long number;
	size_t size;
} calls[] = {
	{ "ATTACH", QCOW_CTL_ATTACH, sizeof(struct qcow_attach) },
	{ "DETACH", QCOW_CTL_DETACH, sizeof(struct qcow_detach) },
	{ "STATUS", QCOW_CTL_STATUS, sizeof(struct qcow_status) },
	{ "LAYER", QCOW_CTL_LAYER, sizeof(struct qcow_layer_status) },
	{ "LIST", QCOW_CTL_LIST, sizeof(struct qcow_list) },
	{ "FREEZE", QCOW_CTL_FREEZE, sizeof(struct qcow_freeze) },
	{ "THAW", QCOW_CTL_THAW, sizeof(struct qcow_thaw) },
};

static void say(bool good, const char *what, const char *which)
{
	printf("%s - %zu bit: %s%s\n", good ? "ok" : "not ok", 8 * sizeof(long), what, which);
}

static int call(int fd, unsigned long number, void *args)
{
	return ioctl(fd, number, args) ? errno : 0;
}

/* That a call ends with the error @want, 0 for success. */
static void expect(int want, unsigned long number, void *args, const char *what,
		   const char *which)
{
	int got = call(control, number, args);

	say(got == want, what, which);
	if (got != want)
		printf("# got %s, want %s\n", strerrorname_np(got), strerrorname_np(want));
}

static uint64_t pointer(const void *p)
{
	return (uintptr_t)p;
}

static int open_or_die(const char *path, int flags)
{
	int fd = open(path, flags);

	if (fd < 0) {
		perror(path);
		exit(1);
	}
	return fd;
}

/* The struct that every caller has to get past, and what is said of its size. */
static void check_sizes(void)
{
	union {
		uint32_t size;
		struct { uint32_t size; int32_t index; } status;
		char bytes[2 * BIG];
	} args;
	size_t i;

	for (i = 0; i < sizeof(calls) / sizeof(*calls); i++) {
		const struct call *c = &calls[i];

		memset(&args, 0, sizeof(args));
		expect(EINVAL, c->number, &args, "a size of 0: ", c->name);
		args.size = 7;
		expect(EINVAL, c->number, &args, "a size of 7: ", c->name);
		args.size = BIG + 1;
		expect(E2BIG, c->number, &args, "a size of more than a page: ", c->name);
		args.size = c->size + 1;
		args.bytes[c->size] = 1;
		expect(E2BIG, c->number, &args, "something set that is not known: ", c->name);
		args.size = BIG;
		args.bytes[c->size] = 0;
		args.bytes[BIG - 1] = 1;
		expect(E2BIG, c->number, &args, "the same at the end of a page: ", c->name);
		expect(EFAULT, c->number, NULL, "no struct: ", c->name);
	}
	expect(ENOTTY, _IO(QCOW_IOCTL_MAGIC, 7), &args, "a call that there is not", "");
}

/* An attach that works, to be spoilt. */
static struct qcow_layer layers[2];
static char message[256];

static struct qcow_attach good(void)
{
	return (struct qcow_attach) {
		.size = sizeof(struct qcow_attach), .index = -1,
		.layer_count = 2, .layer_size = sizeof(*layers), .layers = pointer(layers),
		.message = pointer(message), .message_size = sizeof(message),
	};
}

#define REFUSED(error, what, ...) do {						\
	struct qcow_attach a = good();						\
										\
	__VA_ARGS__;								\
	expect(error, QCOW_CTL_ATTACH, &a, "ATTACH with ", what);		\
} while (0)

#define REFUSED_LAYER(error, what, ...) do {					\
	const struct qcow_layer saved = layers[1];				\
										\
	__VA_ARGS__;								\
	REFUSED(error, what, (void)0);						\
	layers[1] = saved;							\
} while (0)

/* Set the second layer's key. */
static void set_key(const char *cipher, unsigned int key_size)
{
	static char key[1024];

	layers[1].flags |= QCOW_LAYER_KEY;
	layers[1].cipher = pointer(cipher);
	layers[1].cipher_size = strlen(cipher);
	layers[1].key = pointer(key);
	layers[1].key_size = key_size;
}

static void check_keys(void)
{
	const struct qcow_layer before = layers[1];
	char long_name[130];

	memset(long_name, 'x', sizeof(long_name));
	long_name[129] = '\0';
	/* Refused before anything is looked at, and so without a message */
	message[0] = '\0';
	REFUSED_LAYER(EINVAL, "a key without its flag", layers[1].key = pointer("k"));
	REFUSED_LAYER(EINVAL, "a cipher without the flag", layers[1].cipher_size = 1);
	REFUSED_LAYER(EINVAL, "a key of no bytes", set_key("aes-xts-plain64", 0));
	REFUSED_LAYER(EINVAL, "a key of 513 bytes", set_key("aes-xts-plain64", 513));
	REFUSED_LAYER(EINVAL, "a cipher without a name", set_key("", 64));
	REFUSED_LAYER(EINVAL, "a cipher with a name of 129 bytes", set_key(long_name, 64));
	REFUSED_LAYER(EFAULT, "a key that is nowhere", set_key("aes-xts-plain64", 64);
		      layers[1].key = UNMAPPED);
	REFUSED_LAYER(EFAULT, "a cipher that is nowhere", set_key("aes-xts-plain64", 64);
		      layers[1].cipher = UNMAPPED);
	REFUSED_LAYER(EINVAL, "a cipher with a zero byte", set_key("aes-xts-plain64", 64);
		      layers[1].cipher = pointer("aes\0xts-plain64"));
	REFUSED_LAYER(EINVAL, "a key for a raw image", set_key("aes-xts-plain64", 64);
		      layers[1].format = QCOW_FORMAT_RAW);
	say(!*message, "these are refused without a message", message);
	REFUSED_LAYER(EINVAL, "a key for an image that is not encrypted",
		      set_key("aes-xts-plain64", 64));

	layers[1].fd = 12;
	REFUSED_LAYER(ENOKEY, "an encrypted image without a key", (void)0);
	REFUSED_LAYER(EOPNOTSUPP, "a cipher that does not exist", set_key("rot13-xts-plain64", 64));
	REFUSED_LAYER(EINVAL, "a key of the wrong length", set_key("aes-xts-plain64", 13));
	REFUSED_LAYER(EINVAL, "a cipher without a mode", set_key("aes", 64));
	REFUSED_LAYER(EINVAL, "a cipher without a generator", set_key("aes-cbc", 32));
	REFUSED_LAYER(EINVAL, "a generator that is not known", set_key("aes-cbc-benbi", 32));
	REFUSED_LAYER(EINVAL, "essiv without a hash", set_key("aes-cbc-essiv", 32));
	REFUSED_LAYER(EINVAL, "a cipher that would be another one",
		      set_key("aes),ecb(aes-xts-plain64", 64));
	layers[1].fd = 13;
	REFUSED_LAYER(EINVAL, "another cipher for legacy AES", set_key("aes-xts-plain64", 64));
	REFUSED_LAYER(EINVAL, "a longer key for legacy AES", set_key("aes-cbc-plain64", 32));
	layers[1] = before;
}

static void check_attach_refusals(void)
{
	struct { struct qcow_layer layer; uint64_t more; } wide[2] = {
		{ .layer = layers[0] }, { .layer = layers[1], .more = 1 },
	};
	const struct qcow_layer image = layers[0];
	int fd;

	REFUSED(EINVAL, "an unknown flag", a.flags = 1U << 31);
	REFUSED(EINVAL, "index -2", a.index = -2);
	REFUSED(EINVAL, "an unknown discard mode", a.discard = QCOW_DISCARD_KEEP + 1);
	REFUSED(EINVAL, "an unknown I/O mode", a.io_mode = QCOW_IO_BUFFERED + 1);
	REFUSED(EINVAL, "an unknown compression", a.compress = QCOW_COMPRESS_ZSTD + 1);
	REFUSED(EINVAL, "compression, and read-only", a.compress = QCOW_COMPRESS_IMAGE;
		a.flags = QCOW_ATTACH_READ_ONLY);
	REFUSED(EINVAL, "no layers", a.layer_count = 0);
	REFUSED(EINVAL, "65536 layers", a.layer_count = 65536);
	REFUSED(EINVAL, "layers of 15 bytes", a.layer_size = 15);
	REFUSED(E2BIG, "layers of more than a page", a.layer_size = BIG + 1);
	REFUSED(E2BIG, "a layer that says more than is known",
		a.layer_size = sizeof(*wide); a.layers = pointer(wide));
	REFUSED(EFAULT, "layers that are nowhere", a.layers = UNMAPPED);
	REFUSED(EFAULT, "a message that goes nowhere", a.message = UNMAPPED);
	REFUSED(EINVAL, "a snapshot, and writable", a.snapshot = pointer("1");
		a.snapshot_size = 1);
	REFUSED(EINVAL, "a snapshot of no length", a.snapshot = pointer("1");
		a.flags = QCOW_ATTACH_READ_ONLY);
	REFUSED(EINVAL, "a length and no snapshot", a.snapshot_size = 1;
		a.flags = QCOW_ATTACH_READ_ONLY);
	REFUSED(EINVAL, "a snapshot with a zero byte", a.snapshot = pointer("1\0002");
		a.snapshot_size = 3; a.flags = QCOW_ATTACH_READ_ONLY);
	REFUSED(EINVAL, "a snapshot's name of 64 KiB", a.snapshot = pointer("1");
		a.snapshot_size = 65536; a.flags = QCOW_ATTACH_READ_ONLY);
	REFUSED(ETXTBSY, "an image open for writing, and read-only",
		a.flags = QCOW_ATTACH_READ_ONLY);

	REFUSED_LAYER(EINVAL, "an unknown flag of a layer", layers[1].flags = 1U << 31);
	REFUSED_LAYER(EINVAL, "a data file without its flag", layers[1].data_fd = 1);
	REFUSED_LAYER(EINVAL, "format 0", layers[1].format = 0);
	REFUSED_LAYER(EINVAL, "format 3", layers[1].format = 3);
	REFUSED_LAYER(EBADF, "a descriptor that is not open", layers[1].fd = 9999);
	REFUSED_LAYER(EBADF, "descriptor -1", layers[1].fd = -1);
	fd = open_or_die("/proc/self/fd/10", O_RDWR);
	REFUSED_LAYER(ETXTBSY, "a backing file open for writing", layers[1].fd = fd);
	close(fd);
	REFUSED_LAYER(EINVAL, "a pipe", int p[2]; layers[1].fd = pipe(p) ? -1 : p[0]);

	check_keys();

	layers[0].fd = 11;
	REFUSED(EBADF, "an image that is open for reading only", (void)0);
	layers[0] = image;
	layers[0].format = QCOW_FORMAT_RAW;
	message[0] = 'x';
	REFUSED(EINVAL, "a raw image", (void)0);
	layers[0] = image;

	layers[0].fd = 14;
	layers[0].data_fd = 15;
	layers[0].flags = QCOW_LAYER_DATA_FILE;
	REFUSED(EINVAL, "a raw data file and a backing file", (void)0);
	say(strstr(message, "excludes a backing file"), "and it says so", message);
	layers[0] = image;

	/* The reason, cut to the room that there is */
	layers[1].fd = layers[0].fd;
	message[0] = '\0';
	REFUSED(ELOOP, "the same file twice", (void)0);
	say(strlen(message) > 16, "the message says why", "");
	memset(message, 'x', sizeof(message));
	REFUSED(ELOOP, "room for 8 bytes of message", a.message_size = 8);
	say(strlen(message) == 7 && message[8] == 'x', "a message is cut, and terminated", "");
	REFUSED(ELOOP, "no message", a.message_size = 0; a.message = UNMAPPED);
	layers[1] = wide[1].layer;
}

/* What a device answers, and to whom. */
static void check_device(int index)
{
	union {
		struct qcow_status s;
		unsigned char bytes[BIG];
	} status;
	char path[4096];
	struct qcow_layer_status layer = {
		.size = sizeof(layer), .index = index,
		.path = pointer(path), .path_size = sizeof(path),
	};
	struct qcow_list list = { .size = sizeof(list) };
	struct qcow_detach detach = { .size = sizeof(detach), .index = index };
	struct qcow_freeze freeze = { .size = sizeof(freeze), .index = index };
	struct qcow_thaw thaw = { .size = sizeof(thaw), .index = index };
	int32_t indices[4] = { -7, -7, -7, -7 };
	size_t i;

	/* A smaller struct, and a larger one */
	memset(&status, 0xee, sizeof(status));
	status.s.size = offsetof(struct qcow_status, virtual_size);
	status.s.index = index;
	expect(0, QCOW_CTL_STATUS, &status, "STATUS of an older caller", "");
	say(status.s.size == offsetof(struct qcow_status, virtual_size) &&
	    status.s.layer_count == 2 && status.bytes[status.s.size] == 0xee,
	    "the reply is cut to what that knows", "");
	memset(&status, 0, sizeof(status));
	status.s.size = BIG;
	status.s.index = index;
	expect(0, QCOW_CTL_STATUS, &status, "STATUS of a newer caller", "");
	say(status.s.size == BIG && status.s.virtual_size == 1 << 20 &&
	    status.s.version == 3 && status.s.cluster_size == 65536 &&
	    status.s.refcount_bits == 16 && !status.bytes[sizeof(status.s)],
	    "the reply is what it is, and no more", "");
	status.s.size = sizeof(status.s);
	status.s.reserved2 = 1;
	expect(EINVAL, QCOW_CTL_STATUS, &status, "STATUS with a reserved member", "");
	status.s.reserved2 = 0;
	status.s.snapshot = UNMAPPED;
	status.s.snapshot_size = 8;
	expect(EFAULT, QCOW_CTL_STATUS, &status, "STATUS with nowhere for the snapshot", "");
	status.s.snapshot_size = 0;
	status.s.index = -1;
	expect(ENODEV, QCOW_CTL_STATUS, &status, "STATUS of device -1", "");
	status.s.index = INT32_MAX;
	expect(ENODEV, QCOW_CTL_STATUS, &status, "STATUS of a device that there is not", "");

	expect(0, QCOW_CTL_LAYER, &layer, "LAYER", "");
	say(*path == '/' && layer.format == QCOW_FORMAT_QCOW2 && layer.path_size == sizeof(path),
	    "it gives the path", "");
	layer.path_size = 3;
	expect(ENAMETOOLONG, QCOW_CTL_LAYER, &layer, "LAYER with room for 3 bytes", "");
	layer.path_size = 0;
	layer.path = UNMAPPED;
	expect(0, QCOW_CTL_LAYER, &layer, "LAYER without the path", "");
	layer.reserved = 1;
	expect(EINVAL, QCOW_CTL_LAYER, &layer, "LAYER with something reserved", "");
	layer.reserved = 0;
	say(layer.encryption == QCOW_ENCRYPTION_NONE, "LAYER says that it is not encrypted", "");
	layer.layer = 2;
	expect(ENOENT, QCOW_CTL_LAYER, &layer, "LAYER 2 of 2", "");

	expect(0, QCOW_CTL_LIST, &list, "LIST with no room", "");
	say(!list.count && list.cursor == index, "says that there are more", "");
	list.cursor = 0;
	list.count = 4;
	list.indices = pointer(indices);
	expect(0, QCOW_CTL_LIST, &list, "LIST", "");
	say(list.count == 1 && list.cursor == -1 && indices[0] == index && indices[1] == -7,
	    "lists the one that there is", "");
	list.cursor = index + 1;
	list.count = 4;
	expect(0, QCOW_CTL_LIST, &list, "LIST behind the last one", "");
	say(!list.count && list.cursor == -1, "has nothing", "");
	list.cursor = -1;
	expect(EINVAL, QCOW_CTL_LIST, &list, "LIST from -1", "");
	list.cursor = 0;
	list.count = 4;
	list.indices = UNMAPPED;
	expect(EFAULT, QCOW_CTL_LIST, &list, "LIST to nowhere", "");
	list.reserved = 1;
	expect(EINVAL, QCOW_CTL_LIST, &list, "LIST with a reserved member", "");

	freeze.flags = 1;
	expect(EINVAL, QCOW_CTL_FREEZE, &freeze, "FREEZE with an unknown flag", "");
	freeze.flags = 0;
	freeze.timeout = QCOW_FREEZE_TIMEOUT_MAX + 1;
	expect(EINVAL, QCOW_CTL_FREEZE, &freeze, "FREEZE for too long", "");
	thaw.flags = 1;
	expect(EINVAL, QCOW_CTL_THAW, &thaw, "THAW with an unknown flag", "");
	thaw.flags = 0;
	thaw.reserved = 1;
	expect(EINVAL, QCOW_CTL_THAW, &thaw, "THAW with a reserved member", "");
	thaw.reserved = 0;
	expect(ENOENT, QCOW_CTL_THAW, &thaw, "THAW of what is not frozen", "");

	REFUSED(EEXIST, "an index that is taken", a.index = index);
	REFUSED(EBUSY, "an image that is attached", (void)0);

	detach.flags = 1U << 31;
	expect(EINVAL, QCOW_CTL_DETACH, &detach, "DETACH with an unknown flag", "");
	detach.flags = 0;
	detach.reserved = 1;
	expect(EINVAL, QCOW_CTL_DETACH, &detach, "DETACH with a reserved member", "");
	detach.reserved = 0;

	/* Open for reading */
	control = open_or_die("/dev/" QCOW_CONTROL_NAME, O_RDONLY);
	status.s.index = index;
	expect(0, QCOW_CTL_STATUS, &status, "a node open for reading: STATUS", "");
	REFUSED(EBADF, "a node open for reading", (void)0);
	expect(EBADF, QCOW_CTL_DETACH, &detach, "a node open for reading: DETACH", "");
	expect(EBADF, QCOW_CTL_FREEZE, &freeze, "a node open for reading: FREEZE", "");
	expect(EBADF, QCOW_CTL_THAW, &thaw, "a node open for reading: THAW", "");
	close(control);
	control = open_or_die("/dev/" QCOW_CONTROL_NAME, O_RDWR);

	/* A node that was opened by somebody who may */
	fflush(stdout);
	if (!fork()) {
		if (setgid(65534) || setuid(65534))
			_exit(1);
		for (i = 0; i < sizeof(calls) / sizeof(*calls); i++)
			expect(EPERM, calls[i].number, &detach, "without CAP_SYS_ADMIN: ",
			       calls[i].name);
		exit(0);
	}
	wait(NULL);
}

/* Attach in one way that is fine, and detach. */
static void check_attach(struct qcow_attach *args, bool look, const char *what)
{
	struct qcow_detach detach = { .size = sizeof(detach) };

	expect(0, QCOW_CTL_ATTACH, args, what, "");
	/* The caller of size 8 is not told: it is the first one. */
	detach.index = args->size > offsetof(struct qcow_attach, index) ? args->index : 0;
	say(detach.index == 0, what, ": as the first one");
	if (look)
		check_device(detach.index);
	/* udev may have it open for a moment. */
	while (call(control, QCOW_CTL_DETACH, &detach) == EBUSY)
		usleep(10000);
	expect(ENODEV, QCOW_CTL_DETACH, &detach, "it is gone after: ", what);
}

int main(int argc, char **argv)
{
	struct { struct qcow_layer layer; uint64_t more; } wide[2] = {};
	struct {
		struct qcow_attach known;
		uint64_t more[3];
	} newer = {};
	struct qcow_attach args;
	char base[4096];

	if (argc != 2) {
		fprintf(stderr, "usage: abi-check IMAGE\n");
		return 2;
	}
	control = open_or_die("/dev/" QCOW_CONTROL_NAME, O_RDWR);
	snprintf(base, sizeof(base), "%s.base", argv[1]);
	layers[0].fd = open_or_die(argv[1], O_RDWR);
	layers[1].fd = open_or_die(base, O_RDONLY);
	layers[0].format = QCOW_FORMAT_QCOW2;
	layers[1].format = QCOW_FORMAT_QCOW2;
	/* By known numbers, for those who open them again */
	dup2(layers[1].fd, 10);
	dup2(open_or_die(argv[1], O_RDONLY), 11);
	snprintf(base, sizeof(base), "%s.luks", argv[1]);
	dup2(open_or_die(base, O_RDONLY), 12);
	snprintf(base, sizeof(base), "%s.aes", argv[1]);
	dup2(open_or_die(base, O_RDONLY), 13);
	snprintf(base, sizeof(base), "%s.raw-data", argv[1]);
	dup2(open_or_die(base, O_RDWR), 14);
	snprintf(base, sizeof(base), "%s.data", argv[1]);
	dup2(open_or_die(base, O_RDWR), 15);

	check_sizes();
	check_attach_refusals();

	args = good();
	check_attach(&args, true, "ATTACH");
	args = good();
	args.size = offsetof(struct qcow_attach, cache_limit);
	args.message_size = 0;
	check_attach(&args, false, "ATTACH of an older caller");
	newer.known = good();
	newer.known.size = sizeof(newer);
	check_attach(&newer.known, false, "ATTACH of a newer caller");
	wide[0].layer = layers[0];
	wide[1].layer = layers[1];
	args = good();
	args.layers = pointer(wide);
	args.layer_size = sizeof(*wide);
	check_attach(&args, false, "ATTACH with layers of a newer caller");
	return 0;
}
