// SPDX-License-Identifier: GPL-2.0-only
/*
 * replay: what a power cut may have left, rebuilt and checked.
 *
 * From a log of dm-log-writes, which has every write to the image's storage,
 * and the history of qcow-diff, which has every request to the device above, it
 * makes states of the storage as a power cut may leave them: everything that a
 * completed flush covers, each FUA write that has completed, and of the other
 * writes since that flush any subset, torn at any sector (with --file at any block
 * of the file system). Each must pass `qemu-img check` (leaks are allowed), and each
 * sector of the disk in it must hold what was durable or what was written after.
 * Where the dirty bit is set, that is so after `qemu-img check -r all`, which must
 * leave nothing to complain of.
 *
 * The log: dm-log-writes puts a write into it when the next flush completes
 * (with FUA: when the write completes), then the flush, then the mark that
 * qcow-diff sets once the flush has returned to it. Between two flushes (an epoch)
 * the entries are in order of completion, so that a write which overlaps an earlier
 * one wins. Only FUA writes are out of order with the plain ones of their epoch.
 * Where the two overlap, the data tells which requests of the guest's they come
 * from, and the history which was first. An epoch where that cannot be told is left
 * out, and counted.
 *
 * There is one file with the state, which is mapped. From one state to the next only
 * what differs is written, and a state that has been checked is not checked again.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
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
	size_t at;		/* place in the log */
};

struct mark {
	size_t at;
	uint64_t op;		/* what had completed */
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
	const char *options;
	const char *key;
	const char *extract;
	const char *extracted;
	const char *keep;
	uint64_t log_at;
	uint64_t split;
	uint64_t states;
	uint64_t kept;
	uint64_t seed;
	uint64_t only;
	bool forget_flush;
} opt = {
	.scratch = "/dev/shm", .name = "state", .options = "", .states = 200,
	.seed = 1, .only = UINT64_MAX,
};

static struct entry *entries;
static size_t entry_count;
static struct mark *marks;
static size_t mark_count;
static struct epoch *epochs;
static size_t epoch_count;

static unsigned char *durable;		/* the storage as of a flush */
static unsigned char *state;		/* and as a power cut leaves it: a file */
static char state_path[512];
static uint64_t storage_size;

/* ------------------------------------------------------------- the inputs */

static void load_log(void)
{
	uint64_t size, at, n, i, unit, op;
	const unsigned char *log = map_file(opt.log, &size);
	const struct log_super *super;

	if (opt.log_at >= size)
		die("%s: too short", opt.log);
	log += opt.log_at;
	size -= opt.log_at;
	super = (const void *)log;
	if (le64toh(super->magic) != WRITE_LOG_MAGIC || le64toh(super->version) != 1)
		die("%s: not a log of dm-log-writes", opt.log);
	unit = le32toh(super->sectorsize);
	n = le64toh(super->nr_entries);
	entries = need(calloc(n + 1, sizeof(*entries)));
	marks = need(calloc(n + 1, sizeof(*marks)));
	for (i = 0, at = unit; i < n; i++) {
		const struct log_entry *raw = (const void *)(log + at);
		struct entry *e = &entries[entry_count];

		if (at + unit > size)
			die("%s: it ends early", opt.log);
		*e = (struct entry){
			.flags = le64toh(raw->flags), .at = i,
			.offset = le64toh(raw->sector) * unit,
			.length = le64toh(raw->nr_sectors) * unit,
		};
		at += unit;
		if (e->flags & LOG_MARK) {
			char text[64] = "";

			memcpy(text, raw + 1, le64toh(raw->data_len) < 63 ?
			       le64toh(raw->data_len) : 63);
			if (sscanf(text, "op%" SCNu64, &op) == 1)
				marks[mark_count++] = (struct mark){ i, op };
			continue;
		}
		entry_count++;
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
	return a->length && b->length && a->offset < b->offset + b->length &&
	       b->offset < a->offset + a->length;
}

/* The request whose data @e has at byte @at of the storage, or NULL. */
static const struct history_op *op_at(const struct entry *e, uint64_t at)
{
	uint64_t words[SECTOR_WORDS], id;

	if (!e->data)
		return NULL;
	memcpy(words, e->data + (at - e->offset), SECTOR_SIZE);
	id = sector_op(words, head->seed, words[3]);
	return id && id <= head->ops ? &ops[id] : NULL;
}

/* Does plain write @p come before @fua? -1: that cannot be told. */
static int is_before(const struct entry *p, const struct entry *fua)
{
	uint64_t at = fua->offset > p->offset ? fua->offset : p->offset;
	const struct history_op *a = op_at(p, at), *b = op_at(fua, at);

	if (!a || !b)
		return -1;
	return a->end && a->end < b->begin;
}

/*
 * Puts the FUA writes of epoch @e behind those of its plain ones that overlap them
 * and came before. False if that cannot be told.
 */
static bool order_epoch(const struct epoch *e)
{
	size_t first = e->first + !!(entries[e->first].flags & LOG_FLUSH);
	size_t n = e->flush - first, p = 0, last, f, i;
	struct entry *old = need(malloc((n + 1) * sizeof(*old)));
	struct entry *to = entries + first;
	bool told = true;

	memcpy(old, to, n * sizeof(*old));
	for (f = 0; f < n; f++) {
		if (!(old[f].flags & LOG_FUA))
			continue;
		for (last = i = p; i < n; i++) {
			int before;

			if ((old[i].flags & LOG_FUA) || !overlap(&old[f], &old[i]))
				continue;
			before = is_before(&old[i], &old[f]);
			if (before > 0)
				last = i + 1;
			else if (before < 0)
				told = false;
		}
		for (; p < last; p++)
			if (!(old[p].flags & LOG_FUA))
				*to++ = old[p];
		*to++ = old[f];
	}
	for (; p < n; p++)
		if (!(old[p].flags & LOG_FUA))
			*to++ = old[p];
	free(old);
	return told;
}

static void find_epochs(void)
{
	size_t i, first = 0;

	epochs = need(calloc(entry_count + 1, sizeof(*epochs)));
	for (i = 0; i < entry_count; i++) {
		if (!(entries[i].flags & LOG_FLUSH))
			continue;
		epochs[epoch_count++] = (struct epoch){ .first = first, .flush = i };
		first = i;	/* its own data, if any, is the next epoch's */
	}
	for (i = 0; i < epoch_count; i++)
		epochs[i].skip = !order_epoch(&epochs[i]);
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

/* ext4 and XFS count on their blocks being written whole. */
static uint64_t tear_unit(void)
{
	return opt.file ? 4096 : SECTOR_SIZE;
}

static void apply_torn(const struct entry *e)
{
	uint64_t at, unit = tear_unit();

	for (at = 0; at < e->length; at += unit)
		if (rnd(2))
			apply_sectors(state, e, at, e->length - at < unit ?
				      e->length - at : unit);
}

static const char * const ways[] = {
	"half", "torn at sectors", "all but one", "only one", "a prefix", "a suffix",
	"one in eight", "seven in eight", "all",
};
#define WAYS (sizeof(ways) / sizeof(ways[0]))

/* The FUA writes of epoch @e have completed, the others not: state[] is that. */
static void make_boundary(const struct epoch *e)
{
	size_t i;

	for (i = e->first; i < e->flush; i++)
		if (entries[i].flags & LOG_FUA)
			apply(state, &entries[i]);
}

/* Those before @fua, which is torn, have completed. */
static void make_fua(const struct epoch *e, const struct entry *fua)
{
	size_t i;

	for (i = e->first; i < e->flush; i++)
		if ((entries[i].flags & LOG_FUA) && entries[i].at < fua->at)
			apply(state, &entries[i]);
	apply_torn(fua);
}

/* Besides, some of the others have; returns what was done. */
static const char *make_subset(const struct epoch *e)
{
	size_t i, n = e->flush - e->first, one = n ? rnd(n) : 0;
	unsigned int way = rnd(WAYS);

	for (i = 0; i < n; i++) {
		const struct entry *w = &entries[e->first + i];
		bool in = false;

		if (!w->length)
			continue;
		switch (way) {
		case 0:
			in = rnd(2);
			break;
		case 1:
			if (!(w->flags & LOG_FUA))
				apply_torn(w);
			break;
		case 2:
			in = i != one;
			break;
		case 3:
			in = i == one;
			break;
		case 4:
			in = i < one;
			break;
		case 5:
			in = i >= one;
			break;
		case 6:
			in = !rnd(8);
			break;
		case 7:
			in = rnd(8);
			break;
		case 8:
			in = true;
			break;
		}
		if (in || (w->flags & LOG_FUA))
			apply(state, w);
	}
	return ways[way];
}

/* state[] is durable[] again, after make_*(). */
static void undo(const struct epoch *e)
{
	size_t i;

	for (i = e->first; i < e->flush; i++)
		memcpy(state + entries[i].offset, durable + entries[i].offset,
		       entries[i].length);
}

/* The same after somebody else wrote to the file. */
static void undo_all(void)
{
	uint64_t at;

	if (truncate(state_path, storage_size))
		die("%s: %s", state_path, strerror(errno));
	for (at = 0; at < storage_size; at += 4096)
		if (memcmp(state + at, durable + at, 4096))
			memcpy(state + at, durable + at, 4096);
}

/*
 * The sum of the hashes of all sectors tells states apart. That of durable[] is kept,
 * and for a state what its epoch may have changed is looked at.
 */
static uint64_t *sector_hash;
static uint64_t durable_hash;
static uint32_t *hashed;		/* the last turn in which a sector was */
static uint32_t turn;

static uint64_t hash_sector(const unsigned char *data, uint64_t sector)
{
	const uint64_t *word = (const void *)(data + sector * SECTOR_SIZE);
	uint64_t hash = mix64(sector);
	unsigned int i;

	for (i = 0; i < SECTOR_WORDS; i++)
		hash = (hash ^ word[i]) * 0x9fb21c651e98df25ull;
	return mix64(hash);
}

static uint64_t state_hash(const struct epoch *e)
{
	uint64_t hash = durable_hash, s;
	size_t i;

	turn++;
	for (i = e->first; i < e->flush; i++) {
		const struct entry *w = &entries[i];

		for (s = w->offset / SECTOR_SIZE;
		     s < (w->offset + w->length) / SECTOR_SIZE; s++) {
			if (hashed[s] == turn)
				continue;
			hashed[s] = turn;
			hash += hash_sector(state, s) - sector_hash[s];
		}
	}
	return hash;
}

/* Makes @e durable. */
static void advance(const struct entry *e)
{
	uint64_t s;

	apply(durable, e);
	apply(state, e);
	for (s = e->offset / SECTOR_SIZE; s < (e->offset + e->length) / SECTOR_SIZE; s++) {
		durable_hash -= sector_hash[s];
		sector_hash[s] = hash_sector(durable, s);
		durable_hash += sector_hash[s];
	}
}

/* The states that were checked, and how much had to be durable in them. */
static struct seen {
	uint64_t hash;
	uint64_t marks;
} *seen;
static uint64_t seen_size;
static uint64_t distinct;

/* Was state @hash checked, with @mark_at marks at least? From now on it is. */
static bool is_seen(uint64_t hash, uint64_t mark_at)
{
	uint64_t i;

	hash |= !hash;
	for (i = hash % seen_size; seen[i].hash; i = (i + 1) % seen_size) {
		if (seen[i].hash != hash)
			continue;
		if (seen[i].marks >= mark_at)
			return true;
		seen[i].marks = mark_at;
		return false;
	}
	seen[i] = (struct seen){ hash, mark_at };
	distinct++;
	return false;
}

/* A file with holes where @data is zero. */
static void save(const char *path, const unsigned char *data, uint64_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	uint64_t at;

	if (fd < 0 || ftruncate(fd, size))
		die("%s: %s", path, strerror(errno));
	for (at = 0; at < size; at += 4096) {
		uint64_t n = size - at < 4096 ? size - at : 4096;

		if ((data[at] || memcmp(data + at, data + at + 1, n - 1)) &&
		    pwrite(fd, data + at, n, at) != (ssize_t)n)
			die("%s: %s", path, strerror(errno));
	}
	close(fd);
}

static void save_file(const char *path, const char *from)
{
	uint64_t size;
	unsigned char *data = map_file(from, &size);

	save(path, data, size);
	munmap(data, size);
}

/* ------------------------------------------------------------- the programs */

static char out_path[512];

/* run PROGRAM ARGUMENT... NULL: its exit status; what it says goes to out_path. */
static int run(const char *program, ...)
{
	static struct {
		char name[16];
		int fd;
	} servers[4];
	char text[4096], number[16];
	uint32_t length;
	const char *word;
	int i, status, pair[2];
	va_list ap;

	for (i = 0; servers[i].name[0]; i++)
		if (!strcmp(servers[i].name, program))
			break;
	if (!servers[i].name[0]) {
		snprintf(servers[i].name, sizeof(servers[i].name), "%s", program);
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			die("socketpair: %s", strerror(errno));
		servers[i].fd = pair[0];
		if (!fork()) {
			snprintf(number, sizeof(number), "%d", dup(pair[1]));
			setenv("FORKER_FD", number, 1);
			setenv("LD_PRELOAD", FORKER, 1);
			setenv("LD_BIND_NOW", "1", 1);
			execlp(program, program, NULL);
			_exit(127);
		}
		close(pair[1]);
	}
	length = snprintf(text, sizeof(text), "%s", out_path) + 1;
	va_start(ap, program);
	for (word = program; word; word = va_arg(ap, const char *)) {
		if (length + strlen(word) + 1 > sizeof(text))
			die("%s: too many arguments", program);
		length += sprintf(text + length, "%s", word) + 1;
	}
	va_end(ap);
	if (write(servers[i].fd, &length, sizeof(length)) != sizeof(length) ||
	    write(servers[i].fd, text, length) != (ssize_t)length ||
	    recv(servers[i].fd, &status, sizeof(status), MSG_WAITALL) != sizeof(status))
		die("%s does not run", program);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

static int shell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static int shell(const char *fmt, ...)
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

static void show(void)
{
	fflush(stdout);
	shell("head -n 20 '%s' | sed 's/^/# /'", out_path);
}

/* ---------------------------------------------------------------- its check */

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

/* Gets file @name out of the ext4 that is the state to @to. */
static bool dump(const char *name, const char *to)
{
	char command[1100];

	snprintf(command, sizeof(command), "dump \"%s\" \"%s\"", name, to);
	return !run("debugfs", "-R", command, state_path, NULL) && !access(to, R_OK);
}

/* Mounts the state and copies its files to opt.extract, for another run. */
static bool extract(uint64_t k)
{
	char path[400];
	bool good;

	snprintf(path, sizeof(path), "%s/%" PRIu64, opt.extract, k);
	shell("mkdir -p /run/replay");
	good = !shell("mount -o loop '%s' /run/replay", state_path);
	if (good) {
		good = !shell("cp --sparse=always /run/replay%s '%s.image'",
			      opt.file, path);
		if (opt.data)
			good &= !shell("cp --sparse=always /run/replay%s '%s.data'",
				       opt.data, path);
		good &= !shell("umount /run/replay");
	}
	if (!good)
		printf("# state %" PRIu64 ": the file system gives no image\n", k);
	undo_all();
	return good;
}

static void keep(uint64_t k, const char *image, const char *data, const char *raw)
{
	char path[512];

	snprintf(path, sizeof(path), "%s/%s.%" PRIu64 ".raw", opt.keep, opt.name, k);
	save_file(path, raw);
	strcpy(strrchr(path, '.'), ".image");
	if (opt.split)
		save(path, state, opt.split);
	else
		save_file(path, image);
	strcpy(strrchr(path, '.'), ".data");
	if (opt.split)
		save(path, state + opt.split, storage_size - opt.split);
	else if (opt.data)
		save_file(path, data);
}

/*
 * Checks state[]; @clock: requests that completed before are durable. *@dirty
 * counts those with the dirty bit.
 */
static bool check_state(uint64_t k, uint64_t clock, unsigned int *dirty, bool kept)
{
	char image[512], data[512], raw[512], path[480], what[32];
	char opened[2200], secret[600];
	int status, leaks = 3;
	bool good = true, changed = false;
	FILE *f;

	snprintf(what, sizeof(what), "state %" PRIu64, k);
	snprintf(path, sizeof(path), "%s/%s", opt.scratch, opt.name);
	snprintf(image, sizeof(image), "%s.image", path);
	snprintf(data, sizeof(data), "%s.data", path);
	snprintf(raw, sizeof(raw), "%s.raw", path);
	if (opt.extracted) {
		snprintf(image, sizeof(image), "%s/%" PRIu64 ".image", opt.extracted, k);
		snprintf(data, sizeof(data), "%s/%" PRIu64 ".data", opt.extracted, k);
		if (access(image, R_OK)) {
			printf("# state %" PRIu64 ": the file system gave no image\n", k);
			return false;
		}
	} else if (opt.file) {
		/* A file on ext4: its journal first. */
		changed = true;
		status = run("e2fsck", "-fy", state_path, NULL);
		if (status > 1) {
			printf("# state %" PRIu64 ": e2fsck gives %d\n", k, status);
			show();
			good = false;
		}
		if (!dump(opt.file, image) || (opt.data && !dump(opt.data, data))) {
			printf("# state %" PRIu64 ": the file system gives no image\n", k);
			show();
			undo_all();
			return false;
		}
	} else {
		snprintf(image, sizeof(image), "%s", state_path);
	}
	f = need(fmemopen(opened, sizeof(opened), "w"));
	fprintf(f, "driver=qcow2%s", opt.options);
	if (opt.split) {
		fprintf(f, ",file.driver=raw,file.size=%" PRIu64, opt.split);
		fprintf(f, ",file.file.driver=file,file.file.locking=off");
		fprintf(f, ",file.file.filename=%s", image);
		fprintf(f, ",data-file.driver=raw,data-file.offset=%" PRIu64, opt.split);
		fprintf(f, ",data-file.file.driver=file,data-file.file.locking=off");
		fprintf(f, ",data-file.file.filename=%s", image);
	} else {
		fprintf(f, ",file.filename=%s", image);
		if (opt.data)
			fprintf(f, ",data-file.driver=file,data-file.filename=%s", data);
	}
	fclose(f);
	snprintf(secret, sizeof(secret), "secret,id=key,file=%s", opt.key ?: "/dev/null");
	if (is_dirty(image)) {
		++*dirty;
		leaks = 0;
		changed = true;
		status = run("qemu-img", "check", "-r", "all", "--object", secret,
			     "--image-opts", opened, NULL);
		if (status || is_dirty(image)) {
			printf("# state %" PRIu64 ": qemu-img check -r all gives %d\n",
			       k, status);
			show();
			good = false;
		}
	}
	status = run("qemu-img", "check", "--object", secret, "--image-opts", opened, NULL);
	if (status && status != leaks) {
		printf("# state %" PRIu64 ": qemu-img check gives %d\n", k, status);
		show();
		good = false;
	}
	status = run("qemu-img", "convert", "--object", secret, "--image-opts", "-m", "1",
		     "-O", "raw", opened, raw, NULL);
	if (status) {
		printf("# state %" PRIu64 ": the image cannot be read\n", k);
		show();
		good = false;
	} else if (!check_disk(raw, clock, what)) {
		good = false;
	}
	if (good && kept)
		keep(k, image, data, raw);
	if (!good && opt.only != UINT64_MAX) {
		snprintf(path, sizeof(path), "%s/failed.%s.%" PRIu64, opt.scratch, opt.name, k);
		save_file(path, image);
		printf("# state %" PRIu64 " is kept: %s\n", k, path);
	}
	if (opt.file && !opt.extracted) {
		unlink(image);
		unlink(data);
	}
	unlink(raw);
	if (changed && !opt.extracted)
		undo_all();
	return good;
}

/* ------------------------------------------------------------ all of them */

static unsigned int bad, dirty;
static uint64_t clock_now;		/* what completed before is durable */
static size_t marks_done;

/* What had been told to be durable before entry @at of the log. */
static void tell_marks(size_t at)
{
	for (; marks_done < mark_count && marks[marks_done].at < at; marks_done++) {
		uint64_t op = marks[marks_done].op;

		if (!op || op > head->ops)
			continue;
		if (ops[op].kind == OP_FLUSH && ops[op].begin > clock_now)
			clock_now = ops[op].begin;
		if (ops[op].kind == OP_DSYNC)
			marked[op] = true;
	}
}

/* state[] is state @k, of epoch @which; looks at it, unless it has been. */
static bool do_state(uint64_t k, size_t which, const char *way)
{
	static uint64_t next_kept;
	const struct epoch *e = &epochs[which];
	uint64_t clock = clock_now;
	bool kept = opt.keep && k >= next_kept;
	size_t i;

	if (is_seen(state_hash(e), marks_done)) {
		undo(e);
		return false;
	}
	if (opt.only != UINT64_MAX && k != opt.only) {
		undo(e);
		return true;
	}
	if (opt.forget_flush) {
		/* Pretend more had been flushed: this must be found. */
		for (i = marks_done; i < mark_count; i++)
			if (marks[i].op && ops[marks[i].op].kind == OP_FLUSH)
				break;
		if (i < mark_count)
			clock = ops[marks[i].op].begin;
	}
	if (kept)
		next_kept += opt.states / opt.kept;
	if (opt.extract ? !extract(k) : !check_state(k, clock, &dirty, kept)) {
		bad++;
		printf("# state %" PRIu64 ": epoch %zu of %zu, entries %zu to %zu of %zu, kept: %s\n",
		       k, which, epoch_count, e->first, e->flush, entry_count, way);
	}
	fflush(stdout);
	undo(e);
	return true;
}

/*
 * Where the image begins where the storage does, an epoch that has its header in it
 * gets one more state: nothing but the header has arrived. It leads to new tables, and
 * is written so rarely that chance does not meet that.
 */
static uint64_t do_header(uint64_t k, size_t which)
{
	const struct epoch *e = &epochs[which];
	bool any = false;
	size_t i;

	if (opt.file)
		return 0;
	make_boundary(e);
	for (i = e->first; i < e->flush; i++) {
		if (entries[i].length && !entries[i].offset) {
			apply(state, &entries[i]);
			any = true;
		}
	}
	if (any)
		return do_state(k, which, "only the header");
	undo(e);
	return 0;
}

/*
 * Of each epoch: states within a FUA write, the state at the flush before it, subsets
 * of it. Each has the same share, and what others left of theirs.
 */
static void run_states(size_t *boundaries, uint64_t *within, size_t *skipped)
{
	uint64_t k = 0, share, due, tries, before;
	size_t applied = 0, which, i, fuas;

	for (which = 0; which < epoch_count && bad < 5; which++) {
		const struct epoch *e = &epochs[which];

		for (; applied < e->first; applied++)
			if (entries[applied].length)
				advance(&entries[applied]);
		share = (which + 1) * opt.states / epoch_count;
		if (e->skip) {
			++*skipped;
			continue;
		}
		due = share > distinct ? share - distinct : 0;
		/* At most half of its share, by where they are in the log. */
		for (fuas = 0, i = e->first; i < e->flush; i++)
			fuas += !!(entries[i].flags & LOG_FUA);
		before = distinct;
		for (i = e->first; i < e->flush && distinct - before < due / 2; i++) {
			if (!(entries[i].flags & LOG_FUA))
				continue;
			rng = mix64(opt.seed ^ mix64(entries[i].at));
			if (fuas > due / 2 && rnd(fuas) >= due / 2)
				continue;
			tell_marks(entries[i].at);
			make_fua(e, &entries[i]);
			k += do_state(k, which, "a torn FUA write");
		}
		*within += distinct - before;
		tell_marks(entries[e->flush].at);
		make_boundary(e);
		k += do_state(k, which, "nothing after the flush");
		++*boundaries;
		k += do_header(k, which);
		for (tries = 4 * due; distinct < share && tries; tries--) {
			const char *way;

			rng = mix64(opt.seed ^ mix64(k ^ tries << 32));
			way = make_subset(e);
			k += do_state(k, which, way);
		}
	}
}

static double seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "log", 1, NULL, 'l' }, { "base", 1, NULL, 'b' },
		{ "history", 1, NULL, 'h' }, { "initial", 1, NULL, 'i' },
		{ "scratch", 1, NULL, 's' }, { "states", 1, NULL, 'n' },
		{ "seed", 1, NULL, 'r' }, { "log-at", 1, NULL, 'a' },
		{ "only", 1, NULL, 'o' }, { "file", 1, NULL, 'f' },
		{ "name", 1, NULL, 'm' }, { "data", 1, NULL, 'd' },
		{ "split", 1, NULL, 'p' }, { "options", 1, NULL, 'O' },
		{ "key", 1, NULL, 'k' }, { "extract", 1, NULL, 'x' },
		{ "extracted", 1, NULL, 'X' }, { "keep", 1, NULL, 'K' },
		{ "kept", 1, NULL, 'N' },
		{ "forget-flush", 0, NULL, 'F' },
		{ NULL, 0, NULL, 0 },
	};
	size_t skipped = 0, boundaries = 0;
	uint64_t within = 0, s;
	double start = seconds();
	unsigned char *base;
	int c, fd;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 'l':
			opt.log = optarg;
			break;
		case 'a':
			opt.log_at = strtoull(optarg, NULL, 0);
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
		case 'p':
			opt.split = strtoull(optarg, NULL, 0);
			break;
		case 'O':
			opt.options = optarg;
			break;
		case 'k':
			opt.key = optarg;
			break;
		case 'x':
			opt.extract = optarg;
			break;
		case 'X':
			opt.extracted = optarg;
			break;
		case 'K':
			opt.keep = optarg;
			break;
		case 'N':
			opt.kept = strtoull(optarg, NULL, 0);
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
	if (optind != argc || !opt.log || !opt.base || !opt.history || !opt.states) {
		fprintf(stderr,
			"usage: replay --log FILE --base STORAGE --history FILE [--initial RAW]\n"
			"  [--states N] [--seed N] [--scratch DIR] [--name NAME]\n"
			"                   N is at least one and a half for each flush\n"
			"  [--log-at BYTES] where in the log's file it is\n"
			"  [--file PATH]    the image is this file of a file system on the storage\n"
			"  [--data PATH]    and this one is its external data file\n"
			"  [--split BYTES]  the image is that much of the storage, the rest is its\n"
			"                   external data file\n"
			"  [--options TEXT] more for QEMU to open the image, from the comma on\n"
			"  [--key FILE]     with the passphrase: the secret of id `key`\n"
			"  [--extract DIR]  mount each state and copy the files there, no more\n"
			"  [--extracted DIR] and use these\n"
			"  [--keep DIR --kept N] keep about so many good images and their contents\n"
			"  [--only STATE]   only this one, and keep its image if it fails\n"
			"  [--forget-flush] expect too much (to test this program)\n");
		return 2;
	}
	if (!opt.kept || opt.kept > opt.states)
		opt.kept = 1;
	base = map_file(opt.base, &storage_size);
	if (storage_size % 4096)
		die("%s: not a multiple of 4096 bytes", opt.base);
	durable = need(malloc(storage_size));
	memcpy(durable, base, storage_size);
	munmap(base, storage_size);
	snprintf(out_path, sizeof(out_path), "%s/%s.out", opt.scratch, opt.name);
	snprintf(state_path, sizeof(state_path), "%s/%s.state", opt.scratch, opt.name);
	save(state_path, durable, storage_size);
	fd = open(state_path, O_RDWR | O_CLOEXEC);
	state = fd < 0 ? MAP_FAILED :
		mmap(NULL, storage_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
		     fd, 0);
	if (state == MAP_FAILED)
		die("%s: %s", state_path, strerror(errno));
	hashed = need(calloc(storage_size / SECTOR_SIZE, sizeof(*hashed)));
	sector_hash = need(calloc(storage_size / SECTOR_SIZE, sizeof(*sector_hash)));
	for (s = 0; s < storage_size / SECTOR_SIZE; s++) {
		sector_hash[s] = hash_sector(durable, s);
		durable_hash += sector_hash[s];
	}
	if (opt.initial)
		initial = map_file(opt.initial, &initial_size);
	load_history(opt.history);
	load_log();
	find_epochs();
	if (!epoch_count)
		die("there is no flush in the log");
	/* One for each flush, and half as many besides, at least. */
	if (opt.states < epoch_count * 3 / 2)
		opt.states = epoch_count * 3 / 2;
	seen_size = opt.states * 4 + 1;
	seen = need(calloc(seen_size, sizeof(*seen)));
	run_states(&boundaries, &within, &skipped);
	printf("# log: %zu writes and flushes, %zu flushes, %zu marks; history: %" PRIu64
	       " requests\n", entry_count, epoch_count, mark_count, head->ops);
	printf("# %" PRIu64 " distinct states, at %zu of %zu flushes, %" PRIu64
	       " in a FUA write; %zu flushes left out; %u failed; %.1f s\n",
	       distinct, boundaries, epoch_count, within, skipped, bad, seconds() - start);
	if (dirty)
		printf("# %u states were marked dirty\n", dirty);
	unlink(state_path);
	unlink(out_path);
	if (skipped * 2 > epoch_count)
		die("more than half of the flushes had to be left out");
	return bad != 0;
}
