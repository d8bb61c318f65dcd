// SPDX-License-Identifier: GPL-2.0-only
/*
 * device-churn SECONDS SEED DEVICES IMAGE...: threads that attach, detach, open, close,
 * read, write, freeze and look at devices, all at once.
 *
 * The first device shows the first IMAGE, and so on; an image has an owner, who attaches
 * it, writes, and reads what it wrote in any of the device's lives before. Others do all
 * but write, to any of the devices 0 to DEVICES - 1. What a call may return while that
 * goes on is known; anything else is said, and the end. Afterwards IMAGE.raw is what
 * IMAGE should have, and what was done how often is printed.
 *
 * Now and then all hold still for a moment, so that the module can be unloaded.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "../../../include/uapi/linux/qcow.h"

#define BLOCK		4096
#define WORDS		(BLOCK / sizeof(uint64_t))
#define BLOCKS		2048		/* of each image, at its start */
#define RUN		16		/* as many are written at a time */
#define MAX_IMAGES	8
#define OTHERS		4
#define PERIOD		4000		/* ms */
#define REST		500

enum {
	ATTACH, DETACH, DEFERRED, OPEN, READ, WRITE, ZERO, FREEZE, THAW, RESCAN, STATUS,
	SYSFS, ELSEWHERE, KINDS
};

static const char * const names[KINDS] = {
	"attach", "detach", "deferred", "open", "read", "write", "zero", "freeze", "thaw",
	"rescan", "status", "sysfs", "elsewhere",
};

static struct owner {
	pthread_t thread;
	const char *path;
	uint32_t index;
	uint32_t writes;
	uint32_t model[BLOCKS];	/* number of the write, 0 for zeroes */
} owners[MAX_IMAGES];

static atomic_ulong count[KINDS];
static atomic_bool failed;
static uint64_t end_ms;
static unsigned int devices, seed;

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static bool running(void)
{
	while (now_ms() % PERIOD < REST)
		usleep(20000);
	return now_ms() < end_ms && !failed;
}

static void __attribute__((format(printf, 1, 2))) bad(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	flockfile(stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	funlockfile(stderr);
	va_end(ap);
	failed = true;
}

/* may(RESULT, WHAT, DEVICE, ERRNO..., 0): did it succeed? Else it was one of these. */
static bool may(int result, int kind, unsigned int index, ...)
{
	int got = errno, allowed;
	va_list ap;

	if (result >= 0) {
		count[kind]++;
		return true;
	}
	va_start(ap, index);
	while ((allowed = va_arg(ap, int)) && allowed != got)
		;
	va_end(ap);
	if (!allowed)
		bad("%s of qcow%u: %s", names[kind], index, strerror(got));
	return false;
}

static int control(void)
{
	int fd = open("/dev/" QCOW_CONTROL_NAME, O_RDWR | O_CLOEXEC);

	if (fd < 0 && errno != ENOENT && errno != ENODEV && errno != ENXIO)
		bad("control node: %s", strerror(errno));
	return fd;
}

/*
 * Is what is open as fd the device index? Between the lookup of its name and the open, its
 * number may have gone to another device. Linux loads modules for numbers that are nobody's
 * and then looks again, so there is time.
 */
static bool is_device(int fd, unsigned int index)
{
	unsigned int major_nr, minor_nr;
	char path[64];
	struct stat st;
	bool same;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/block/qcow%u/dev", index);
	f = fopen(path, "re");
	if (!f)
		return false;
	same = fscanf(f, "%u:%u", &major_nr, &minor_nr) == 2 && !fstat(fd, &st) &&
	       st.st_rdev == makedev(major_nr, minor_nr);
	fclose(f);
	return same;
}

static int device(unsigned int index, int flags)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/qcow%u", index);
	fd = open(path, flags | O_CLOEXEC);
	if (!may(fd, OPEN, index, ENOENT, ENODEV, ENXIO, flags & O_EXCL ? EBUSY : 0, 0))
		return -1;
	if (is_device(fd, index))
		return fd;
	count[ELSEWHERE]++;
	close(fd);
	return -1;
}

static void attach(const struct owner *o, bool no_inline)
{
	char message[256] = "";
	struct qcow_layer layer = { .format = QCOW_FORMAT_QCOW2 };
	struct qcow_attach args = {
		.size = sizeof(args), .index = o->index,
		.flags = no_inline ? QCOW_ATTACH_NO_INLINE : 0,
		.layer_count = 1, .layer_size = sizeof(layer),
		.layers = (uintptr_t)&layer, .message = (uintptr_t)message,
		.message_size = sizeof(message),
	};
	int fd = control();

	layer.fd = open(o->path, O_RDWR | O_CLOEXEC);
	if (layer.fd < 0)
		bad("%s: %s", o->path, strerror(errno));
	else if (fd >= 0 && !may(ioctl(fd, QCOW_CTL_ATTACH, &args), ATTACH, o->index,
				 EEXIST, EBUSY, 0) && failed)
		bad("%s", message);
	close(layer.fd);
	close(fd);
}

static void detach(unsigned int index, bool deferred)
{
	struct qcow_detach args = {
		.size = sizeof(args), .index = index,
		.flags = deferred ? QCOW_DETACH_DEFERRED : 0,
	};
	int fd = control();

	if (fd < 0)
		return;
	may(ioctl(fd, QCOW_CTL_DETACH, &args), deferred ? DEFERRED : DETACH, index, ENODEV,
	    EBUSY, 0);
	close(fd);
}

static void freeze(unsigned int index, unsigned int ms, bool thaw)
{
	struct qcow_freeze args = { .size = sizeof(args), .index = index, .timeout = 1 };
	struct qcow_thaw end = { .size = sizeof(end), .index = index };
	int fd = control();

	if (fd < 0)
		return;
	if (may(ioctl(fd, QCOW_CTL_FREEZE, &args), FREEZE, index, ENODEV, EBUSY, 0)) {
		usleep(ms * 1000);
		/* ENOENT: the time was over. */
		if (thaw)
			may(ioctl(fd, QCOW_CTL_THAW, &end), THAW, index, ENOENT, 0);
	}
	close(fd);
}

static void look(unsigned int index)
{
	char path[256];
	struct qcow_status status = { .size = sizeof(status), .index = index };
	struct qcow_layer_status layer = {
		.size = sizeof(layer), .index = index, .path = (uintptr_t)path,
		.path_size = sizeof(path),
	};
	int indices[16];
	struct qcow_list list = {
		.size = sizeof(list), .count = 16, .indices = (uintptr_t)indices,
	};
	int fd = control();

	if (fd < 0)
		return;
	may(ioctl(fd, QCOW_CTL_STATUS, &status), STATUS, index, ENODEV, 0);
	may(ioctl(fd, QCOW_CTL_LAYER, &layer), STATUS, index, ENODEV, 0);
	may(ioctl(fd, QCOW_CTL_LIST, &list), STATUS, index, 0);
	close(fd);
}

static void look_in_sysfs(unsigned int index)
{
	static const char * const files[] = { "image", "cache_size", "damage", "writes" };
	char path[64], buf[4096];
	size_t i;
	int fd;

	for (i = 0; i < sizeof(files) / sizeof(*files); i++) {
		snprintf(path, sizeof(path), "/sys/block/qcow%u/qcow/%s", index, files[i]);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return;
		may(read(fd, buf, sizeof(buf)), SYSFS, index, ENODEV, 0);
		close(fd);
	}
}

static void fill(uint64_t *at, uint64_t image, uint64_t write, uint64_t block)
{
	uint64_t i;

	for (i = 0; i < WORDS; i++)
		at[i] = write ? (image << 60 | write << 20 | block << 9 | i) *
				0x9e3779b97f4a7c15 : 0;
}

/* With the device open: what fails now is an error. */
static void use(struct owner *o, int fd, uint64_t *buf, unsigned int *rng)
{
	uint64_t want[WORDS];
	unsigned int i, n, steps = rand_r(rng) % 8;

	for (; steps && !failed; steps--) {
		uint32_t first = rand_r(rng) % (BLOCKS - RUN);
		uint64_t range[2] = { (uint64_t)first * BLOCK, 0 };

		n = 1 + rand_r(rng) % RUN;
		switch (rand_r(rng) % 8) {
		case 0:
			range[1] = (uint64_t)n * BLOCK;
			may(ioctl(fd, BLKZEROOUT, range), ZERO, o->index, 0);
			memset(&o->model[first], 0, n * sizeof(*o->model));
			break;
		case 1: case 2: case 3:
			o->writes++;
			for (i = 0; i < n; i++) {
				o->model[first + i] = o->writes;
				fill(buf + i * WORDS, o->index, o->writes, first + i);
			}
			if (pwrite(fd, buf, n * BLOCK, range[0]) != n * BLOCK)
				bad("write to qcow%u: %s", o->index, strerror(errno));
			count[WRITE]++;
			break;
		default:
			if (pread(fd, buf, n * BLOCK, range[0]) != n * BLOCK)
				bad("read of qcow%u: %s", o->index, strerror(errno));
			count[READ]++;
			for (i = 0; i < n; i++) {
				fill(want, o->index, o->model[first + i], first + i);
				if (memcmp(want, buf + i * WORDS, BLOCK) && !failed)
					bad("qcow%u: block %u is not of write %u", o->index,
					    first + i, o->model[first + i]);
			}
		}
	}
	if (!(rand_r(rng) % 4) && fsync(fd))
		bad("flush of qcow%u: %s", o->index, strerror(errno));
}

static void *own(void *arg)
{
	struct owner *o = arg;
	unsigned int rng = seed + o->index;
	uint64_t *buf = aligned_alloc(BLOCK, RUN * BLOCK);
	char path[4096];
	uint32_t block;
	int fd;

	while (buf && running()) {
		attach(o, rand_r(&rng) % 2);
		fd = device(o->index, O_RDWR | O_DIRECT);
		if (fd >= 0) {
			use(o, fd, buf, &rng);
			close(fd);
		}
		if (rand_r(&rng) % 2)
			detach(o->index, rand_r(&rng) % 2);
	}
	snprintf(path, sizeof(path), "%s.raw", o->path);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	for (block = 0; buf && block < BLOCKS; block++) {
		fill(buf, o->index, o->model[block], block);
		if (pwrite(fd, buf, BLOCK, (off_t)block * BLOCK) != BLOCK)
			bad("%s: %s", path, strerror(errno));
	}
	close(fd);
	free(buf);
	return NULL;
}

static void *other(void *arg)
{
	unsigned int rng = seed + 100 + (uintptr_t)arg;
	char buf[BLOCK];
	int fd;

	while (running()) {
		unsigned int index = rand_r(&rng) % devices;

		switch (rand_r(&rng) % 12) {
		case 0: case 1: case 2: case 3:
			fd = device(index, rand_r(&rng) % 4 ? O_RDONLY : O_RDONLY | O_EXCL);
			if (fd < 0)
				break;
			if (!(rand_r(&rng) % 4))
				detach(index, rand_r(&rng) % 2);
			usleep(rand_r(&rng) % 20000);
			if (pread(fd, buf, BLOCK, rand_r(&rng) % BLOCKS * BLOCK) != BLOCK)
				bad("read of qcow%u: %s", index, strerror(errno));
			close(fd);
			break;
		case 4: case 5:
			detach(index, false);
			break;
		case 6:
			detach(index, true);
			break;
		case 7:
			freeze(index, rand_r(&rng) % 8 ? rand_r(&rng) % 50 : 1200,
			       rand_r(&rng) % 2);
			break;
		case 8:
			fd = device(index, O_RDONLY);
			if (fd >= 0)
				may(ioctl(fd, BLKRRPART), RESCAN, index, EBUSY, EINVAL, ENXIO, 0);
			close(fd);
			break;
		case 9:
			look(index);
			break;
		case 10:
			look_in_sysfs(index);
			break;
		default:
			usleep(rand_r(&rng) % 50000);
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t others[OTHERS];
	int i, images = argc - 4;

	if (images < 1 || images > MAX_IMAGES) {
		fprintf(stderr, "usage: device-churn SECONDS SEED DEVICES IMAGE...\n");
		return 2;
	}
	end_ms = now_ms() + strtoull(argv[1], NULL, 0) * 1000;
	seed = strtoul(argv[2], NULL, 0);
	devices = strtoul(argv[3], NULL, 0);
	for (i = 0; i < images; i++) {
		owners[i].index = i;
		owners[i].path = argv[4 + i];
		pthread_create(&owners[i].thread, NULL, own, &owners[i]);
	}
	for (i = 0; i < OTHERS; i++)
		pthread_create(&others[i], NULL, other, (void *)(uintptr_t)i);
	for (i = 0; i < images; i++)
		pthread_join(owners[i].thread, NULL);
	for (i = 0; i < OTHERS; i++)
		pthread_join(others[i], NULL);
	for (i = 0; i < KINDS; i++)
		printf("%s %lu\n", names[i], count[i]);
	return failed;
}
