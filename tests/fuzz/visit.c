// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a guest may do to a disk whose image is damaged, and what may come of it:
 * success, or EIO, or ENOSPC, and nothing else.
 *
 *   visit [--sound] [--write SEED] [--before OUT] [--after OUT] DEVICE
 *	read all of it; write, zero, discard and flush by SEED; read it again. With
 *	--sound nothing is damaged: what was written must be there, and nothing else
 *	may have changed. OUT gets a hash of each piece that was read.
 *   visit --hash FILE OUT	the same of a file
 *   visit --compare A B	fails where they differ; what could not be read may
 *
 * Exit status: 0, or 1 for what must not be, after a line that says what.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR		512u
#define PIECE		4096u
#define STEP		(128u << 10)
/* Only so much of a disk is looked at. */
#define MOST		(16u << 20)
#define REQUESTS	24

static const char *name;
static int fd;
static uint64_t disk_size;	/* bytes */
static uint32_t size;		/* of that which is looked at */
static uint8_t *model;		/* what it holds, */
static uint8_t *known;		/* and by sector whether that is so */
static uint64_t state;
static unsigned int reads, reads_failed, writes, writes_failed;

static uint64_t draw(uint64_t below)
{
	uint64_t z = state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	return (z ^ z >> 31) % below;
}

static void *get_memory(size_t bytes)
{
	void *p = aligned_alloc(PIECE, bytes);

	if (!p)
		exit(2);
	return p;
}

static void die(const char *what)
{
	fprintf(stderr, "visit: %s: %s\n", what, strerror(errno));
	exit(2);
}

/* What a request must not fail with */
static void expect(const char *what, uint64_t at, uint64_t length)
{
	if (errno == EIO || errno == ENOSPC)
		return;
	fprintf(stderr, "%s: %s of %" PRIu64 " bytes at %" PRIu64 ": %s\n", name, what, length,
		at, strerror(errno));
	exit(1);
}

static bool read_at(void *buf, uint64_t at, uint32_t length)
{
	ssize_t n = pread(fd, buf, length, at);

	reads++;
	if (n == (ssize_t)length)
		return true;
	reads_failed++;
	if (n >= 0)
		errno = EIO;
	expect("read", at, length);
	return false;
}

/*
 * All of it, and by piece where that fails, but not too often; what cannot be read is
 * zero and not known.
 */
static void read_all(uint8_t *data, uint8_t *good)
{
	unsigned int most = reads_failed + 8 * STEP / PIECE;
	uint32_t at, piece, length, step;

	memset(data, 0, size);
	memset(good, 0, size / SECTOR);
	for (at = 0; at < size; at += length) {
		length = size - at < STEP ? size - at : STEP;
		if (read_at(data + at, at, length)) {
			memset(good + at / SECTOR, 1, length / SECTOR);
			continue;
		}
		for (piece = at; piece < at + length && reads_failed < most; piece += step) {
			step = at + length - piece < PIECE ? at + length - piece : PIECE;
			if (read_at(data + piece, piece, step))
				memset(good + piece / SECTOR, 1, step / SECTOR);
		}
	}
}

/* A word for each piece, 0 if a part of it is not known. */
static void write_hashes(const char *path, const uint8_t *data, const uint8_t *good)
{
	uint32_t at, length, i;
	uint64_t word, hash;
	FILE *f;

	if (!path)
		return;
	f = fopen(path, "wb");
	if (!f)
		die(path);
	for (at = 0; at < size; at += PIECE) {
		length = size - at < PIECE ? size - at : PIECE;
		hash = 0xcbf29ce484222325ULL + length;
		for (i = 0; i < length; i += sizeof(word)) {
			memcpy(&word, data + at + i, sizeof(word));
			hash = (hash ^ word) * 0x100000001b3ULL;
			hash ^= hash >> 29;
		}
		if (memchr(good + at / SECTOR, 0, length / SECTOR))
			hash = 0;
		else if (!hash)
			hash = 1;
		fwrite(&hash, sizeof(hash), 1, f);
	}
	if (fclose(f))
		die(path);
}

/* Request number @i that changes something */
static void change(unsigned int i)
{
	static uint8_t *buf;
	uint64_t range[2];
	uint32_t length, j;
	const char *what;
	int ret;

	if (!buf)
		buf = get_memory(STEP);
	length = SECTOR * (1 + draw(draw(3) ? 16 : STEP / SECTOR));
	range[0] = draw((draw(8) ? size : disk_size) / SECTOR) * SECTOR;
	/* Whole clusters, too */
	if (!draw(3)) {
		range[0] &= ~(uint64_t)0xffff;
		length = 0x10000;
	}
	if (length > disk_size - range[0])
		length = disk_size - range[0];
	range[1] = length;
	writes++;
	switch (draw(8)) {
	case 0:
		what = "discard";
		ret = ioctl(fd, BLKDISCARD, range);
		break;
	case 1:
		what = "zeroing";
		ret = ioctl(fd, BLKZEROOUT, range);
		memset(buf, 0, length);
		break;
	case 2:
		what = "flush";
		ret = fsync(fd);
		length = 0;
		break;
	default:
		what = "write";
		for (j = 0; j < length; j++)
			buf[j] = j / SECTOR + i + 1;
		ret = pwrite(fd, buf, length, range[0]) == (ssize_t)length ? 0 : -1;
	}
	if (ret) {
		writes_failed++;
		if (*what != 'd' || errno != EOPNOTSUPP)
			expect(what, range[0], length);
	}
	if (range[0] >= size)
		return;
	if (length > size - range[0])
		length = size - range[0];
	if (ret || *what == 'd')
		memset(known + range[0] / SECTOR, 0, length / SECTOR);
	else
		memset(known + range[0] / SECTOR, 1, length / SECTOR);
	memcpy(model + range[0], buf, length);
}

static int visit(bool sound, const char *seed, const char *before, const char *after)
{
	uint8_t *data, *good;
	unsigned int i;

	fd = open(name, (seed ? O_RDWR : O_RDONLY) | O_DIRECT);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &disk_size))
		die(name);
	size = disk_size < MOST ? disk_size : MOST;
	model = get_memory(MOST);
	known = get_memory(MOST / SECTOR);
	read_all(model, known);
	write_hashes(before, model, known);
	/* And something of the rest. */
	data = get_memory(MOST);
	good = get_memory(MOST / SECTOR);
	state = seed ? strtoull(seed, NULL, 0) : 0;
	for (i = 0; i < 16 && disk_size > size; i++)
		read_at(data, draw(disk_size / PIECE) * PIECE, SECTOR);
	if (seed && size) {
		for (i = 0; i < REQUESTS; i++)
			change(i);
		writes++;
		if (fsync(fd)) {
			writes_failed++;
			expect("flush", 0, 0);
		}
		read_all(data, good);
		write_hashes(after, data, good);
		for (i = 0; sound && i < size / SECTOR; i++) {
			if (!known[i] || !good[i] ||
			    !memcmp(data + i * SECTOR, model + i * SECTOR, SECTOR))
				continue;
			fprintf(stderr, "%s: sector %u has 0x%02x in front, and not 0x%02x\n", name,
				i, data[i * SECTOR], model[i * SECTOR]);
			return 1;
		}
	}
	printf("%u reads, %u failed; %u writes, %u failed\n", reads, reads_failed, writes,
	       writes_failed);
	return 0;
}

static int hash_file(const char *out)
{
	uint8_t *data = get_memory(MOST), *good = get_memory(MOST / SECTOR);
	ssize_t n;

	fd = open(name, O_RDONLY);
	if (fd < 0)
		die(name);
	memset(good, 1, MOST / SECTOR);
	while (size < MOST) {
		n = read(fd, data + size, MOST - size);
		if (n < 0)
			die(name);
		if (!n)
			break;
		size += n;
	}
	size -= size % SECTOR;
	write_hashes(out, data, good);
	return 0;
}

static int compare(const char *a, const char *b)
{
	FILE *one = fopen(a, "rb"), *two = fopen(b, "rb");
	uint64_t x, y, n = 0;
	size_t got, wanted;

	if (!one || !two)
		die(!one ? a : b);
	for (;; n++) {
		got = fread(&x, sizeof(x), 1, one);
		wanted = fread(&y, sizeof(y), 1, two);
		if (got != wanted) {
			fprintf(stderr, "one ends at %" PRIu64 "\n", n * PIECE);
			return 1;
		}
		if (!got)
			return 0;
		if (x && y && x != y) {
			fprintf(stderr, "they differ at %" PRIu64 "\n", n * PIECE);
			return 1;
		}
	}
}

int main(int argc, char **argv)
{
	const char *seed = NULL, *before = NULL, *after = NULL;
	bool sound = false;
	int i;

	if (argc == 4 && !strcmp(argv[1], "--hash")) {
		name = argv[2];
		return hash_file(argv[3]);
	}
	if (argc == 4 && !strcmp(argv[1], "--compare"))
		return compare(argv[2], argv[3]);
	for (i = 1; i < argc - 1; i++) {
		if (!strcmp(argv[i], "--sound"))
			sound = true;
		else if (!strcmp(argv[i], "--write"))
			seed = argv[++i];
		else if (!strcmp(argv[i], "--before"))
			before = argv[++i];
		else if (!strcmp(argv[i], "--after"))
			after = argv[++i];
		else
			break;
	}
	if (i != argc - 1) {
		fprintf(stderr, "visit: wrong usage; see the top of visit.c\n");
		return 2;
	}
	name = argv[i];
	return visit(sound, seed, before, after);
}
