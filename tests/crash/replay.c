// SPDX-License-Identifier: GPL-2.0-only
/*
 * replay: what a power cut may have left, rebuilt and checked.
 *
 * From a log of dm-log-writes, which has every write to the image's storage,
 * and the history of qcow-diff, which has every request to the device above, it
 * makes states of the storage as a power cut may leave them: everything that a
 * completed flush covers, and of the writes after that any subset, torn at any
 * sector (with --file at any block of the file system). Each must pass `qemu-img
 * check` (leaks are allowed), and each sector of the disk in it must hold what was
 * durable or what was written after. Where the dirty bit is set, that is so after
 * `qemu-img check -r all`, which must leave nothing to complain of.
 *
 * The log: dm-log-writes puts a write into it when the next flush completes
 * (with FUA: when the write completes), then the flush, then the mark that
 * qcow-diff sets once the flush has returned to it. Between two flushes the
 * entries are in order of completion, so that a write which overlaps an earlier
 * one wins. Only a FUA write is out of order with the plain ones of its epoch;
 * an epoch where the two overlap is left out, and counted.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM "replay"
#include "../functional/src/history-check.h"

#define WRITE_LOG_MAGIC	0x6a736677736872ull
#define LOG_FLUSH	(1 << 0)
#define LOG_FUA		(1 << 1)
#define LOG_DISCARD	(1 << 2)
#define LOG_MARK	(1 << 3)

struct log_super {
	uint64_t magic;
	uint64_t version;
	uint64_t nr_entries;
	uint32_t sectorsize;
};

struct log_entry {
	uint64_t sector;
	uint64_t nr_sectors;
	uint64_t flags;
	uint64_t data_len;
};

struct entry {
	uint64_t offset;	/* bytes, on the storage */
	uint64_t length;
	const unsigned char *data;
	unsigned int flags;
	uint64_t op;		/* of a mark: what had completed */
};

/* The entries [first, flush) were under way, those before durable. */
struct epoch {
	size_t first;
	size_t flush;
	bool skip;
};

static struct {
	const char *log;
	const char *base;
	const char *history;
	const char *initial;
	const char *scratch;
	const char *file;
	const char *data;
	const char *name;
	uint64_t states;
	uint64_t seed;
	uint64_t only;
	unsigned int jobs;
	bool forget_flush;
} opt = {
	.scratch = "/dev/shm", .name = "state", .states = 200, .seed = 1,
	.only = UINT64_MAX, .jobs = 2,
};

static struct entry *entries;
static size_t entry_count;
static struct epoch *epochs;
static size_t epoch_count;

static unsigned char *durable;		/* the storage */
static unsigned char *state;
static uint64_t storage_size;

/* ------------------------------------------------------------- the inputs */

static void load_log(void)
{
	uint64_t size, at, n, unit;
	const unsigned char *log = map_file(opt.log, &size);
	const struct log_super *super = (const void *)log;

	if (le64toh(super->magic) != WRITE_LOG_MAGIC || le64toh(super->version) != 1)
		die("%s: not a log of dm-log-writes", opt.log);
	unit = le32toh(super->sectorsize);
	n = le64toh(super->nr_entries);
	entries = need(calloc(n + 1, sizeof(*entries)));
	for (at = unit; entry_count < n; entry_count++) {
		const struct log_entry *raw = (const void *)(log + at);
		struct entry *e = &entries[entry_count];

		if (at + unit > size)
			die("%s: it ends early", opt.log);
		e->flags = le64toh(raw->flags);
		e->offset = le64toh(raw->sector) * unit;
		e->length = le64toh(raw->nr_sectors) * unit;
		at += unit;
		if (e->flags & LOG_MARK) {
			char text[64] = "";

			memcpy(text, raw + 1, le64toh(raw->data_len) < 63 ?
			       le64toh(raw->data_len) : 63);
			if (sscanf(text, "op%" SCNu64, &e->op) != 1)
				e->op = 0;
			e->length = 0;
			continue;
		}
		if (!e->length)
			continue;
		if (e->offset + e->length > storage_size)
			die("%s: a write beyond the storage", opt.log);
		if (e->flags & LOG_DISCARD)
			continue;
		e->data = log + at;
		at += e->length;
		if (at > size)
			die("%s: it ends early", opt.log);
	}
}

static bool overlap(const struct entry *a, const struct entry *b)
{
	return a->offset < b->offset + b->length && b->offset < a->offset + a->length;
}

static void find_epochs(void)
{
	size_t i, first = 0, a, b;

	epochs = need(calloc(entry_count + 1, sizeof(*epochs)));
	for (i = 0; i < entry_count; i++) {
		if (!(entries[i].flags & LOG_FLUSH))
			continue;
		epochs[epoch_count++] = (struct epoch){ .first = first, .flush = i };
		first = i;	/* its own data, if any, is the next epoch's */
	}
	for (i = 0; i < epoch_count; i++) {
		struct epoch *e = &epochs[i];

		for (a = e->first; a < e->flush && !e->skip; a++) {
			if (!(entries[a].flags & LOG_FUA))
				continue;
			for (b = e->first; b < e->flush; b++)
				if (b != a && overlap(&entries[a], &entries[b]))
					e->skip = true;
		}
	}
}

/* ---------------------------------------------------------------- a state */

static uint64_t rng;

static uint64_t rnd(uint64_t below)
{
	rng += 0x9e3779b97f4a7c15ull;
	return mix64(rng) % below;
}

static void apply_sectors(unsigned char *to, const struct entry *e, uint64_t from,
			  uint64_t length)
{
	if (e->flags & LOG_DISCARD)
		/* What a discarded range reads as is for the device to say. */
		memset(to + e->offset + from, 0, length);
	else if (e->data)
		memcpy(to + e->offset + from, e->data + from, length);
}

static void apply(unsigned char *to, const struct entry *e)
{
	apply_sectors(to, e, 0, e->length);
}

static const char * const ways[] = {
	"none", "all", "half", "torn at sectors", "all but one", "only one",
	"a prefix", "a suffix", "one in eight", "seven in eight",
};
#define WAYS (sizeof(ways) / sizeof(ways[0]))

/* Makes a state of epoch @e in state[]; returns what was done. */
static const char *make_state(const struct epoch *e)
{
	size_t i, n = e->flush - e->first, one = n ? rnd(n) : 0;
	unsigned int way = rnd(WAYS);
	/* ext4 counts on its blocks being written whole. */
	uint64_t unit = opt.file ? 4096 : SECTOR_SIZE;

	memcpy(state, durable, storage_size);
	for (i = 0; i < n; i++) {
		const struct entry *w = &entries[e->first + i];
		bool in = false;
		uint64_t at;

		if (!w->length)
			continue;
		switch (way) {
		case 1:
			in = true;
			break;
		case 2:
			in = rnd(2);
			break;
		case 3:
			if (w->flags & LOG_FUA)
				break;
			for (at = 0; at < w->length; at += unit)
				if (rnd(2))
					apply_sectors(state, w, at,
						      w->length - at < unit ?
						      w->length - at : unit);
			break;
		case 4:
			in = i != one;
			break;
		case 5:
			in = i == one;
			break;
		case 6:
			in = i < one;
			break;
		case 7:
			in = i >= one;
			break;
		case 8:
			in = !rnd(8);
			break;
		case 9:
			in = rnd(8);
			break;
		}
		if (in || (w->flags & LOG_FUA))
			apply(state, w);
	}
	return ways[way];
}

static void save(const char *path, const void *data, uint64_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	const unsigned char *p = data;

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	while (size) {
		ssize_t n = write(fd, p, size);

		if (n <= 0)
			die("%s: %s", path, strerror(errno));
		p += n;
		size -= n;
	}
	close(fd);
}

static int run(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static int run(const char *fmt, ...)
{
	char command[4096];
	va_list ap;
	int status;

	va_start(ap, fmt);
	vsnprintf(command, sizeof(command), fmt, ap);
	va_end(ap);
	status = system(command);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

static void show(const char *out)
{
	fflush(stdout);
	run("head -n 20 '%s' | sed 's/^/# /'", out);
}

/* Is the dirty bit set in the header of the image @path? */
static bool is_dirty(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	unsigned char c = 0;

	if (fd < 0 || pread(fd, &c, 1, 79) != 1)
		c = 0;
	close(fd);
	return c & 1;
}

/*
 * Checks state[]; @clock: requests that completed before are durable. *@dirty
 * counts those with the dirty bit.
 */
static bool check_state(uint64_t k, uint64_t clock, unsigned int *dirty)
{
	char image[512], data[512], raw[512], out[512], path[480], what[32];
	char opened[1200];
	int status, leaks = 3;
	bool good = true;

	snprintf(what, sizeof(what), "state %" PRIu64, k);
	snprintf(path, sizeof(path), "%s/%s.%" PRIu64, opt.scratch, opt.name, k);
	snprintf(image, sizeof(image), "%s.image", path);
	snprintf(data, sizeof(data), "%s.data", path);
	snprintf(opened, sizeof(opened), "driver=qcow2,file.filename=%s%s%s", image,
		 opt.data ? ",data-file.driver=file,data-file.filename=" : "",
		 opt.data ? data : "");
	snprintf(raw, sizeof(raw), "%s.raw", path);
	snprintf(out, sizeof(out), "%s.out", path);
	if (opt.file) {
		/* A file on ext4: its journal first. */
		save(path, state, storage_size);
		status = run("e2fsck -fy '%s' >'%s' 2>&1", path, out);
		if (status > 1) {
			printf("# state %" PRIu64 ": e2fsck gives %d\n", k, status);
			good = false;
		}
		status = run("debugfs -R 'dump \"%s\" \"%s\"' '%s' >'%s' 2>&1",
			     opt.file, image, path, out);
		if (opt.data)
			status = run("debugfs -R 'dump \"%s\" \"%s\"' '%s' >'%s' 2>&1",
				     opt.data, data, path, out);
		unlink(path);
	} else {
		save(image, state, storage_size);
	}
	if (is_dirty(image)) {
		++*dirty;
		leaks = 0;
		status = run("qemu-img check -r all --image-opts '%s' >'%s' 2>&1",
			     opened, out);
		if (status || is_dirty(image)) {
			printf("# state %" PRIu64 ": qemu-img check -r all gives %d\n",
			       k, status);
			show(out);
			good = false;
		}
	}
	status = run("qemu-img check --image-opts '%s' >'%s' 2>&1", opened, out);
	if (status && status != leaks) {
		printf("# state %" PRIu64 ": qemu-img check gives %d\n", k, status);
		show(out);
		good = false;
	}
	status = run("qemu-img convert --image-opts -O raw '%s' '%s' >'%s' 2>&1",
		     opened, raw, out);
	if (status) {
		printf("# state %" PRIu64 ": the image cannot be read\n", k);
		show(out);
		good = false;
	} else if (!check_disk(raw, clock, what)) {
		good = false;
	}
	if (good || opt.only == UINT64_MAX)
		unlink(image);
	else
		printf("# state %" PRIu64 " is kept: %s\n", k, image);
	unlink(data);
	unlink(raw);
	unlink(out);
	return good;
}

/* ------------------------------------------------------------ all of them */

/* Does the states whose number is @part modulo opt.jobs; returns how many fail. */
static unsigned int run_states(unsigned int part)
{
	uint64_t k, clock = 0;
	unsigned int bad = 0, dirty = 0;
	size_t applied = 0, seen = 0;

	for (k = 0; k < opt.states; k++) {
		size_t which = k * epoch_count / opt.states, i;
		const struct epoch *e = &epochs[which];
		const char *way;

		if (k % opt.jobs != part || e->skip)
			continue;
		if (opt.only != UINT64_MAX && k != opt.only)
			continue;
		/* The storage as of the flush that began this epoch. */
		for (; applied < e->first; applied++)
			if (entries[applied].length)
				apply(durable, &entries[applied]);
		/* What had been told to be durable before its end. */
		for (; seen < e->flush; seen++) {
			const struct entry *m = &entries[seen];

			if (!(m->flags & LOG_MARK) || !m->op || m->op > head->ops)
				continue;
			if (ops[m->op].kind == OP_FLUSH && ops[m->op].begin > clock)
				clock = ops[m->op].begin;
			if (ops[m->op].kind == OP_DSYNC)
				marked[m->op] = true;
		}
		if (opt.forget_flush) {
			/* Pretend more had been flushed: this must be found. */
			for (i = e->flush; i < entry_count; i++)
				if (entries[i].op && ops[entries[i].op].kind == OP_FLUSH)
					break;
			if (i < entry_count)
				clock = ops[entries[i].op].begin;
		}
		rng = mix64(opt.seed ^ mix64(k));
		way = make_state(e);
		if (check_state(k, clock, &dirty))
			continue;
		bad++;
		printf("# state %" PRIu64 ": epoch %zu of %zu, entries %zu to %zu of %zu, kept: %s\n",
		       k, which, epoch_count, e->first, e->flush,
		       entry_count, way);
		fflush(stdout);
		if (bad >= 5)
			break;
	}
	if (dirty)
		printf("# %u states were marked dirty\n", dirty);
	fflush(stdout);
	return bad;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "log", 1, NULL, 'l' }, { "base", 1, NULL, 'b' },
		{ "history", 1, NULL, 'h' }, { "initial", 1, NULL, 'i' },
		{ "scratch", 1, NULL, 's' }, { "states", 1, NULL, 'n' },
		{ "seed", 1, NULL, 'r' }, { "jobs", 1, NULL, 'j' },
		{ "only", 1, NULL, 'o' }, { "file", 1, NULL, 'f' },
		{ "name", 1, NULL, 'm' }, { "data", 1, NULL, 'd' },
		{ "forget-flush", 0, NULL, 'F' },
		{ NULL, 0, NULL, 0 },
	};
	uint64_t skipped = 0, size, k;
	unsigned int part, bad = 0;
	unsigned char *base;
	int c, status;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 'l':
			opt.log = optarg;
			break;
		case 'b':
			opt.base = optarg;
			break;
		case 'h':
			opt.history = optarg;
			break;
		case 'i':
			opt.initial = optarg;
			break;
		case 's':
			opt.scratch = optarg;
			break;
		case 'f':
			opt.file = optarg;
			break;
		case 'd':
			opt.data = optarg;
			break;
		case 'm':
			opt.name = optarg;
			break;
		case 'n':
			opt.states = strtoull(optarg, NULL, 0);
			break;
		case 'r':
			opt.seed = strtoull(optarg, NULL, 0);
			break;
		case 'j':
			opt.jobs = strtoul(optarg, NULL, 0);
			break;
		case 'o':
			opt.only = strtoull(optarg, NULL, 0);
			break;
		case 'F':
			opt.forget_flush = true;
			break;
		default:
			optind = argc + 1;
		}
	}
	if (optind != argc || !opt.log || !opt.base || !opt.history || !opt.jobs) {
		fprintf(stderr,
			"usage: replay --log FILE --base STORAGE --history FILE [--initial RAW]\n"
			"  [--states N] [--seed N] [--jobs N] [--scratch DIR] [--name NAME]\n"
			"  [--file PATH]    the image is this file of an ext4 on the storage\n"
			"  [--data PATH]    and this one is its external data file\n"
			"  [--only STATE]   only this one, and keep its image if it fails\n"
			"  [--forget-flush] expect too much (to test this program)\n");
		return 2;
	}
	base = map_file(opt.base, &storage_size);
	durable = need(malloc(storage_size));
	state = need(malloc(storage_size));
	memcpy(durable, base, storage_size);
	if (opt.initial)
		initial = map_file(opt.initial, &initial_size);
	load_log();
	find_epochs();
	load_history(opt.history);
	if (!epoch_count)
		die("there is no flush in the log");
	for (k = 0; k < opt.states; k++)
		skipped += epochs[k * epoch_count / opt.states].skip;
	for (size = 0, k = 0; k < entry_count; k++)
		size += entries[k].op != 0;
	printf("# log: %zu entries, %zu flushes, %" PRIu64 " marks; history: %" PRIu64
	       " requests; %" PRIu64 " states, %" PRIu64 " of them left out\n",
	       entry_count, epoch_count, size, head->ops, opt.states, skipped);
	fflush(stdout);
	for (part = 0; part < opt.jobs; part++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork: %s", strerror(errno));
		if (!pid)
			exit(run_states(part) ? 1 : 0);
	}
	for (part = 0; part < opt.jobs; part++) {
		if (wait(&status) < 0 || !WIFEXITED(status))
			die("a worker died");
		bad |= WEXITSTATUS(status);
	}
	if (skipped * 2 > opt.states)
		die("more than half of the states had to be left out");
	return bad;
}
