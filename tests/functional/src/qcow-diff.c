// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcow-diff: random requests to a block device (or a file), each read checked
 * against a model of what the device may hold.
 *
 * Every 512-byte sector has a list of candidates: the requests whose result it
 * may hold now. A request that changes a sector becomes a candidate when it is
 * submitted. When it has completed, it retires those candidates that completed
 * before it was submitted; a read may return a retired candidate only if it was
 * submitted before the retiring request completed. So with one job the model is
 * exact, and with several it allows what the block layer allows: requests in
 * flight together may land in any order, per sector, and a read among them may
 * find a sector half written.
 *
 * A discard is advice: it becomes a candidate (zeroes) and retires nothing. So
 * does a request that failed, where --allow-enospc or --allow-errors permit
 * that. What a read finds while nothing else is under way to the sector is from
 * then on the only candidate: contents must not change by themselves.
 *
 * Data that a request writes names its request and sector, so a wrong sector
 * tells where it came from. One lock guards the model; it is not held over I/O.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/dm-ioctl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "history.h"

#define INITIAL		0u	/* candidate: contents from before the run */
#define MAX_JOBS	64
#define FIXED_CANDS	2
#define BUF_ALIGN	4096

static const char * const op_names[OP_KINDS] = {
	[OP_READ] = "read", [OP_WRITE] = "write", [OP_DSYNC] = "dsync",
	[OP_ZERO] = "zero", [OP_PUNCH] = "punch", [OP_ZEROOUT] = "zeroout",
	[OP_DISCARD] = "discard", [OP_FLUSH] = "flush",
};

static unsigned int weights[OP_KINDS] = {
	[OP_READ] = 30, [OP_WRITE] = 44, [OP_DSYNC] = 1, [OP_ZERO] = 6,
	[OP_PUNCH] = 6, [OP_ZEROOUT] = 2, [OP_DISCARD] = 8, [OP_FLUSH] = 3,
};

struct cand {
	uint64_t retired;	/* clock when something replaced it, 0: not yet */
	uint32_t op;		/* id, or INITIAL */
};

struct sector {
	struct cand *cand;
	uint64_t touched;	/* clock of the last begin or end of a change */
	uint16_t count;
	uint16_t room;		/* of @cand; FIXED_CANDS: part of fixed_cands */
	uint32_t inflight;
};

struct job {
	pthread_t thread;
	unsigned int index;
	uint64_t rng;
	uint64_t read_begin;	/* clock when the read under way began, or 0 */
	unsigned char *buf;
	uint64_t *found;
	uint64_t last_sector;	/* the last range that it changed */
	uint32_t last_count;
};

static struct {
	const char *target;
	const char *mirror_in;
	const char *mirror_out;
	const char *history;
	const char *mark;
	uint64_t seed;
	uint64_t ops;
	uint64_t max_io;
	uint64_t cluster;
	uint64_t hot;
	uint64_t corrupt_op;
	unsigned int jobs;
	bool buffered;
	bool allow_enospc;
	bool allow_errors;
	bool verify_only;
	bool no_final;
	bool fill;
	bool quiet;
} opt = {
	.seed = 1, .ops = 5000, .max_io = 1 << 20, .cluster = 65536, .jobs = 1,
};

static int fd = -1;
static int dm_fd = -1;
static bool is_block;
static uint64_t sectors;
static uint32_t unit = 1;		/* logical block size in sectors */
static unsigned char *initial;		/* NULL: zeroes */
static uint64_t initial_sectors;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t now;
static struct sector *model;
static struct cand *fixed_cands;
static struct history_op *log_ops;	/* indexed by id; 0 is not used */
static uint64_t next_id = 1;
static uint64_t max_id;
static struct job jobs[MAX_JOBS];
static uint64_t done[OP_KINDS], refused[OP_KINDS], failed[OP_KINDS];
static uint64_t bytes_checked;

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, "qcow-diff: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, "\n");
	va_end(ap);
	exit(2);
}

static void *need(void *p)
{
	if (!p)
		die("out of memory");
	return p;
}

static uint64_t rnd(struct job *job, uint64_t below)
{
	job->rng += 0x9e3779b97f4a7c15ull;
	return mix64(job->rng) % below;
}

/*
 * ---------------------------------------------------------------- the model
 * All of these are called with the lock held.
 */

static uint64_t oldest_read(void)
{
	uint64_t oldest = now + 1;
	unsigned int i;

	for (i = 0; i < opt.jobs; i++)
		if (jobs[i].read_begin && jobs[i].read_begin < oldest)
			oldest = jobs[i].read_begin;
	return oldest;
}

/* Forgets retired candidates that no read under way could return. */
static void prune(struct sector *sec, uint64_t oldest)
{
	unsigned int i, kept = 0;

	for (i = 0; i < sec->count; i++)
		if (!sec->cand[i].retired || sec->cand[i].retired > oldest)
			sec->cand[kept++] = sec->cand[i];
	sec->count = kept;
}

static void add_cand(struct sector *sec, uint32_t id)
{
	if (sec->count == sec->room)
		prune(sec, oldest_read());
	if (sec->count == sec->room) {
		unsigned int room = sec->room * 2;
		struct cand *more = need(calloc(room, sizeof(*more)));

		memcpy(more, sec->cand, sec->count * sizeof(*more));
		if (sec->room != FIXED_CANDS)
			free(sec->cand);
		sec->cand = more;
		sec->room = room;
	}
	sec->cand[sec->count++] = (struct cand){ .op = id };
}

static bool completed_before(uint32_t id, uint64_t clock)
{
	return id == INITIAL || (log_ops[id].end && log_ops[id].end < clock);
}

static bool reads_zero(uint32_t id)
{
	return id != INITIAL && log_ops[id].kind != OP_WRITE &&
	       log_ops[id].kind != OP_DSYNC;
}

static void begin_change(uint32_t id)
{
	const struct history_op *op = &log_ops[id];
	uint64_t s;

	for (s = op->sector; s < op->sector + op->sectors; s++) {
		add_cand(&model[s], id);
		model[s].inflight++;
		model[s].touched = op->begin;
	}
}

static void drop_cand(struct sector *sec, uint32_t id)
{
	unsigned int i;

	for (i = 0; i < sec->count; i++) {
		if (sec->cand[i].op == id) {
			sec->cand[i] = sec->cand[--sec->count];
			return;
		}
	}
}

/* @nothing: the device refused it, so that it changed nothing. */
static void end_change(uint32_t id, bool nothing)
{
	const struct history_op *op = &log_ops[id];
	bool certain = !op->error && op->kind != OP_DISCARD;
	uint64_t s;

	for (s = op->sector; s < op->sector + op->sectors; s++) {
		struct sector *sec = &model[s];
		unsigned int i;

		sec->inflight--;
		sec->touched = op->end;
		if (nothing) {
			drop_cand(sec, id);
			continue;
		}
		for (i = 0; i < sec->count; i++) {
			struct cand *c = &sec->cand[i];

			if (c->op == id || c->retired ||
			    !completed_before(c->op, op->begin))
				continue;
			/* Of uncertain zeroes the last one speaks for all. */
			if (certain || (reads_zero(id) && reads_zero(c->op)))
				c->retired = op->end;
		}
	}
}

static bool may_be(uint32_t id, uint64_t s, const void *data, uint64_t found)
{
	static const unsigned char zeroes[SECTOR_SIZE];

	if (id == INITIAL)
		return !memcmp(data, initial && s < initial_sectors ?
			       initial + s * SECTOR_SIZE : zeroes, SECTOR_SIZE);
	if (reads_zero(id))
		return found == UINT64_MAX;
	return found == id;
}

static void print_op(uint64_t id)
{
	const struct history_op *op = &log_ops[id];

	fprintf(stderr, "#  op %" PRIu64 " %s sectors %" PRIu64 "+%u clock %" PRIu64 "-",
		id, op_names[op->kind], op->sector, op->sectors, op->begin);
	if (op->end)
		fprintf(stderr, "%" PRIu64, op->end);
	else
		fprintf(stderr, "(under way)");
	if (op->error)
		fprintf(stderr, " failed: %s", strerror(op->error));
	fprintf(stderr, "\n");
}

/*
 * Whether each word of @data is from one of those candidates that a read begun
 * at @begin may return. Storage that copies memory, a page cache for instance,
 * shows a read that races with a write some of the old and some of the new.
 */
static bool may_be_torn(const struct sector *sec, uint64_t s, const uint64_t *data,
			uint64_t begin)
{
	uint64_t want[SECTOR_WORDS];
	bool known[SECTOR_WORDS] = { false };
	unsigned int i, n;

	for (i = 0; i < sec->count; i++) {
		uint32_t id = sec->cand[i].op;

		if (sec->cand[i].retired && sec->cand[i].retired <= begin)
			continue;
		memset(want, 0, sizeof(want));
		if (id != INITIAL && !reads_zero(id))
			sector_fill(want, opt.seed, id, s);
		else if (id == INITIAL && initial && s < initial_sectors)
			memcpy(want, initial + s * SECTOR_SIZE, SECTOR_SIZE);
		for (n = 0; n < SECTOR_WORDS; n++)
			known[n] |= data[n] == want[n];
	}
	return !memchr(known, false, sizeof(known));
}

static void __attribute__((noreturn))
mismatch(uint64_t s, const void *data, uint64_t begin, uint64_t end,
	 uint64_t found)
{
	const struct sector *sec = &model[s];
	const uint64_t *word = data;
	uint64_t id, shown = 0, any = 0;
	unsigned int i;

	fprintf(stderr, "# MISMATCH seed %" PRIu64 " sector %" PRIu64
		" (byte %" PRIu64 ", cluster %" PRIu64 " + %" PRIu64
		") read at clock %" PRIu64 "-%" PRIu64 "\n", opt.seed, s,
		s * SECTOR_SIZE, s * SECTOR_SIZE / opt.cluster,
		s * SECTOR_SIZE % opt.cluster, begin, end);
	if (found == UINT64_MAX)
		fprintf(stderr, "# found: zeroes\n");
	else if (found)
		fprintf(stderr, "# found: data of op %" PRIu64 "\n", found);
	else if (word[0] == SECTOR_MAGIC)
		fprintf(stderr, "# found: data of op %" PRIu64 " seed %" PRIu64
			" for sector %" PRIu64 " (whole: %s)\n", word[2], word[1],
			word[3], sector_op(data, word[1], word[3]) ? "yes" : "no");
	else if (may_be(INITIAL, s, data, found))
		fprintf(stderr, "# found: what was there before the run\n");
	else
		fprintf(stderr, "# found: unknown data %016" PRIx64 " %016" PRIx64
			" %016" PRIx64 " %016" PRIx64 "\n", word[0], word[1],
			word[2], word[3]);
	fprintf(stderr, "# allowed:\n");
	for (i = 0; i < sec->count; i++) {
		if (sec->cand[i].retired && sec->cand[i].retired <= begin)
			continue;
		if (sec->cand[i].op == INITIAL)
			fprintf(stderr, "#  what was there before the run\n");
		else
			print_op(sec->cand[i].op);
	}
	for (id = 1; id < next_id; id++)
		any += log_ops[id].kind != OP_FLUSH && s >= log_ops[id].sector &&
		       s < log_ops[id].sector + log_ops[id].sectors;
	fprintf(stderr, "# requests to this sector (%" PRIu64 ", last 30):\n", any);
	for (id = 1; id < next_id; id++) {
		if (log_ops[id].kind == OP_FLUSH || s < log_ops[id].sector ||
		    s >= log_ops[id].sector + log_ops[id].sectors)
			continue;
		if (shown++ + 30 >= any)
			print_op(id);
	}
	fflush(NULL);
	_exit(1);
}

/* The sectors [@s, @s + @count) were read at clock @begin; found[] is filled. */
static void check_read(uint64_t s, uint32_t count, const unsigned char *data,
		       uint64_t begin, const uint64_t *found)
{
	uint64_t end = ++now;
	uint32_t n;

	for (n = 0; n < count; n++, s++, data += SECTOR_SIZE) {
		struct sector *sec = &model[s];
		unsigned int i, hit = sec->count;

		for (i = 0; i < sec->count; i++) {
			const struct cand *c = &sec->cand[i];

			if (c->retired && c->retired <= begin)
				continue;
			if (!may_be(c->op, s, data, found[n]))
				continue;
			hit = i;
			if (!c->retired)
				break;
		}
		if (hit == sec->count &&
		    (sec->inflight || sec->touched >= begin) &&
		    may_be_torn(sec, s, (const uint64_t *)data, begin))
			continue;
		if (hit == sec->count)
			mismatch(s, data, begin, end, found[n]);
		if (sec->count > 1 && !sec->inflight && sec->touched < begin) {
			/* Quiet: this is what the sector holds. */
			if (sec->cand[hit].retired)
				mismatch(s, data, begin, end, found[n]);
			for (i = 0; i < sec->count; i++)
				if (i != hit && !sec->cand[i].retired)
					sec->cand[i].retired = end;
			prune(sec, oldest_read());
		}
	}
	bytes_checked += (uint64_t)count * SECTOR_SIZE;
}

/* ------------------------------------------------------------------- the I/O */

static uint64_t start_op(struct job *job, enum op_kind kind, uint64_t s,
			 uint32_t count)
{
	uint64_t id;

	pthread_mutex_lock(&lock);
	if (next_id > max_id)
		die("the log of requests is full");
	id = next_id++;
	log_ops[id] = (struct history_op){
		.begin = ++now, .sector = s, .sectors = count, .kind = kind,
	};
	if (op_changes(kind))
		begin_change(id);
	if (kind == OP_READ)
		job->read_begin = log_ops[id].begin;
	pthread_mutex_unlock(&lock);
	return id;
}

static int do_range(enum op_kind kind, uint64_t offset, uint64_t length)
{
	uint64_t range[2] = { offset, length };

	switch (kind) {
	case OP_PUNCH:
		if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       offset, length))
			return 0;
		break;
	case OP_DISCARD:
		if (is_block ? !ioctl(fd, BLKDISCARD, range) :
		    !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       offset, length))
			return 0;
		break;
	case OP_ZEROOUT:
		if (is_block) {
			if (!ioctl(fd, BLKZEROOUT, range))
				return 0;
			break;
		}
		/* fallthrough */
	default:
		if (!fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
			       offset, length))
			return 0;
	}
	return errno;
}

static int do_write(enum op_kind kind, const unsigned char *buf, uint64_t offset,
		    uint64_t length)
{
	while (length) {
		struct iovec iov = { (void *)buf, length };
		ssize_t n = pwritev2(fd, &iov, 1, offset,
				     kind == OP_DSYNC ? RWF_DSYNC : 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : EIO;
		buf += n;
		offset += n;
		length -= n;
	}
	return 0;
}

static int do_read(unsigned char *buf, uint64_t offset, uint64_t length)
{
	while (length) {
		ssize_t n = pread(fd, buf, length, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : ENODATA;
		buf += n;
		offset += n;
		length -= n;
	}
	return 0;
}

/* Writes "op@id" into the log of the dm-log-writes device opt.mark. */
static void mark(uint64_t id)
{
	struct {
		struct dm_ioctl io;
		struct dm_target_msg msg;
		char text[64];
	} m = { 0 };

	m.io.version[0] = DM_VERSION_MAJOR;
	m.io.data_size = sizeof(m);
	m.io.data_start = (char *)&m.msg - (char *)&m;
	snprintf(m.io.name, sizeof(m.io.name), "%s", opt.mark);
	snprintf(m.msg.message, sizeof(m.text), "mark op%" PRIu64, id);
	if (ioctl(dm_fd, DM_TARGET_MSG, &m))
		die("mark: %s", strerror(errno));
}

static void run_op(struct job *job, enum op_kind kind, uint64_t s, uint32_t count)
{
	uint64_t offset = s * SECTOR_SIZE, length = (uint64_t)count * SECTOR_SIZE;
	unsigned char *buf = job->buf + rnd(job, 8) * SECTOR_SIZE * unit;
	uint64_t id = start_op(job, kind, s, count), bad = 0;
	bool nothing = false;
	uint32_t i;
	int err;

	switch (kind) {
	case OP_READ:
		memset(buf, 0xa5, length);
		err = do_read(buf, offset, length);
		for (i = 0; !err && i < count; i++) {
			unsigned char *data = buf + i * SECTOR_SIZE;

			job->found[i] = sector_is_zero(data) ? UINT64_MAX :
					sector_op(data, opt.seed, s + i);
		}
		break;
	case OP_WRITE:
	case OP_DSYNC:
		for (i = 0; i < count; i++)
			sector_fill(buf + i * SECTOR_SIZE, opt.seed, id, s + i);
		if (opt.corrupt_op && id >= opt.corrupt_op) {
			opt.corrupt_op = 0;
			buf[length / 2] ^= 1;
		}
		err = do_write(kind, buf, offset, length);
		break;
	case OP_FLUSH:
		err = fsync(fd) ? errno : 0;
		break;
	default:
		/*
		 * The kernel drops these pages from its cache first, dirty or
		 * not, also when the device then refuses the request.
		 */
		if (opt.buffered && fsync(fd))
			die("fsync: %s", strerror(errno));
		err = do_range(kind, offset, length);
		if (err == EOPNOTSUPP) {
			nothing = true;
			bad = 1;
			err = 0;
		}
	}

	pthread_mutex_lock(&lock);
	log_ops[id].end = ++now;
	log_ops[id].error = nothing ? EOPNOTSUPP : err;
	if (op_changes(kind))
		end_change(id, nothing);
	if (kind == OP_READ && !err)
		check_read(s, count, buf, log_ops[id].begin, job->found);
	job->read_begin = 0;
	done[kind]++;
	refused[kind] += bad;
	if (err) {
		failed[kind]++;
		if (!opt.allow_errors && (err != ENOSPC || !opt.allow_enospc)) {
			fprintf(stderr, "# I/O ERROR seed %" PRIu64 ": %s\n",
				opt.seed, strerror(err));
			print_op(id);
			fflush(NULL);
			_exit(1);
		}
	}
	pthread_mutex_unlock(&lock);

	if (opt.mark && !err && (kind == OP_FLUSH || kind == OP_DSYNC))
		mark(id);
}

/* ------------------------------------------------------------- the load */

static enum op_kind draw_kind(struct job *job)
{
	unsigned int total = 0, kind, at;

	for (kind = 0; kind < OP_KINDS; kind++)
		total += weights[kind];
	at = rnd(job, total);
	for (kind = 0; at >= weights[kind]; kind++)
		at -= weights[kind];
	return kind;
}

/*
 * Sizes: mostly small, some of a few clusters, few large. Places: half of them
 * around cluster boundaries, some in a hot range at the start (all, with
 * --hot), some at the very end.
 */
static void draw_range(struct job *job, enum op_kind kind, uint64_t *s,
		       uint32_t *count)
{
	uint64_t cluster = opt.cluster / SECTOR_SIZE, max = opt.max_io / SECTOR_SIZE;
	uint64_t limit = sectors / unit, size, start, hot;

	if (kind >= OP_ZERO && kind <= OP_DISCARD)
		max *= 2;
	cluster = cluster > unit ? cluster / unit : 1;
	max = max > unit ? max / unit : 1;

	switch (rnd(job, 10)) {
	case 0 ... 4:
		size = 1 + rnd(job, 16);
		break;
	case 5 ... 7:
		size = 1 + rnd(job, cluster * 5 / 2 + 1);
		if (size > 256 && rnd(job, 4))
			size = 1 + size % 256;
		break;
	case 8:
		size = cluster * (1 + rnd(job, 3));
		break;
	default:
		size = 1 + rnd(job, max);
	}
	if (size > max)
		size = 1 + size % max;
	if (size > limit)
		size = limit;

	hot = opt.hot ? opt.hot / SECTOR_SIZE / unit : 4 * cluster;
	if (!hot || hot > limit)
		hot = limit;
	switch (rnd(job, 10)) {
	case 0 ... 4:
		start = rnd(job, opt.hot ? hot : limit) / cluster * cluster;
		if (rnd(job, 2))
			start += rnd(job, 8);
		else if (start > 8)
			start -= rnd(job, 8);
		break;
	case 5 ... 6:
		start = rnd(job, hot);
		break;
	case 7:
		start = opt.hot ? rnd(job, hot) : limit - size - rnd(job, 4);
		break;
	default:
		start = rnd(job, opt.hot ? hot : limit);
	}
	if (start > limit - size)
		start = limit - size;
	if (opt.buffered && kind >= OP_ZERO && kind <= OP_DISCARD) {
		/* Part of a page would leave the rest of it in the cache. */
		uint64_t page = 4096 / SECTOR_SIZE / unit;

		page = page ? page : 1;
		if (limit > page)
			limit -= limit % page;
		start = start / page * page;
		size = (size + page - 1) / page * page;
		if (size > limit)
			size = limit;
		if (start + size > limit)
			start = limit - size;
	}
	*s = start * unit;
	*count = size * unit;
}

/* What this job changed last, with a little on both sides. */
static void draw_around_last(struct job *job, uint64_t *s, uint32_t *count)
{
	uint64_t max = opt.max_io / SECTOR_SIZE / unit * unit;
	uint64_t before = rnd(job, 16) * unit;
	uint64_t end = job->last_sector + job->last_count + rnd(job, 16) * unit;

	*s = job->last_sector > before ? job->last_sector - before : 0;
	if (end > sectors / unit * unit)
		end = sectors / unit * unit;
	if (end - *s > max)
		end = *s + max;
	*count = end - *s;
}

static void *job_main(void *arg)
{
	struct job *job = arg;
	uint64_t n = opt.ops / opt.jobs;

	if (job->index < opt.ops % opt.jobs)
		n++;
	while (n--) {
		enum op_kind kind = draw_kind(job);
		uint32_t count = 0;
		uint64_t s = 0;

		/*
		 * dm-log-writes cannot tell what two flushes at a time have
		 * made durable: with marks only one job flushes.
		 */
		if (opt.mark && job->index &&
		    (kind == OP_FLUSH || kind == OP_DSYNC))
			kind = OP_WRITE;
		if (job->last_count && weights[OP_READ] && !rnd(job, 3)) {
			/* Look soon, before something else covers it up. */
			kind = OP_READ;
			draw_around_last(job, &s, &count);
			job->last_count = 0;
		} else if (kind != OP_FLUSH) {
			draw_range(job, kind, &s, &count);
		}
		run_op(job, kind, s, count);
		if (op_changes(kind)) {
			job->last_sector = s;
			job->last_count = count;
		}
	}
	return NULL;
}

/* Reads it all, which checks it and settles what discards left open. */
static void read_all(struct job *job, int out)
{
	uint64_t step = opt.max_io / SECTOR_SIZE, s;
	uint32_t count;

	step = step / unit ? step / unit * unit : unit;
	for (s = 0; s < sectors; s += count) {
		uint64_t id = next_id;

		count = sectors - s < step ? sectors - s : step;
		run_op(job, OP_READ, s, count);
		/* The log is for what the load did. */
		next_id = id;
		if (out >= 0) {
			unsigned char *buf = job->buf;
			uint32_t length = count * SECTOR_SIZE;
			uint64_t offset = s * SECTOR_SIZE;

			if (do_read(buf, offset, length))
				die("second read: %s", strerror(errno));
			for (; length; length -= SECTOR_SIZE,
			     offset += SECTOR_SIZE, buf += SECTOR_SIZE)
				if (!sector_is_zero(buf) &&
				    pwrite(out, buf, SECTOR_SIZE, offset) != SECTOR_SIZE)
					die("%s: %s", opt.mirror_out, strerror(errno));
		}
	}
}

static void write_history(void)
{
	struct history_header h = {
		.magic = HISTORY_MAGIC, .seed = opt.seed, .sectors = sectors,
		.ops = next_id - 1,
	};
	FILE *f = fopen(opt.history, "w");

	if (!f || fwrite(&h, sizeof(h), 1, f) != 1 ||
	    fwrite(log_ops + 1, sizeof(*log_ops), h.ops, f) != h.ops || fclose(f))
		die("%s: %s", opt.history, strerror(errno));
}

/* ------------------------------------------------------------------ set-up */

static void load_initial(void)
{
	uint64_t at;
	off_t size;
	int in;

	in = open(opt.mirror_in, O_RDONLY | O_CLOEXEC);
	size = in < 0 ? -1 : lseek(in, 0, SEEK_END);
	if (size < 0)
		die("%s: %s", opt.mirror_in, strerror(errno));
	initial_sectors = size / SECTOR_SIZE;
	if (initial_sectors > sectors)
		initial_sectors = sectors;
	initial = need(malloc(initial_sectors * SECTOR_SIZE + 1));
	for (at = 0; at < initial_sectors * SECTOR_SIZE;) {
		ssize_t n = pread(in, initial + at, initial_sectors * SECTOR_SIZE - at, at);

		if (n <= 0)
			die("%s: %s", opt.mirror_in, n ? strerror(errno) : "short");
		at += n;
	}
	close(in);
}

static void open_target(void)
{
	int flags = O_CLOEXEC | (opt.buffered ? 0 : O_DIRECT);
	struct stat st;
	uint64_t size;
	int block;

	fd = open(opt.target, flags | (opt.verify_only ? O_RDONLY : O_RDWR));
	if (fd < 0)
		die("%s: %s", opt.target, strerror(errno));
	if (fstat(fd, &st))
		die("%s: %s", opt.target, strerror(errno));
	is_block = S_ISBLK(st.st_mode);
	size = st.st_size;
	if (is_block) {
		if (ioctl(fd, BLKGETSIZE64, &size) || ioctl(fd, BLKSSZGET, &block))
			die("%s: %s", opt.target, strerror(errno));
		unit = block / SECTOR_SIZE;
	}
	sectors = size / SECTOR_SIZE;
	if (!sectors)
		die("%s: empty", opt.target);
}

static void set_mix(char *text)
{
	static char *names[OP_KINDS + 1];
	char *value;
	int kind;

	for (kind = 0; kind < OP_KINDS; kind++) {
		names[kind] = (char *)op_names[kind];
		weights[kind] = 0;
	}
	while (*text) {
		kind = getsubopt(&text, names, &value);
		if (kind < 0 || !value)
			die("--mix: want KIND=WEIGHT,...");
		weights[kind] = strtoul(value, NULL, 0);
	}
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t n = strtoull(text, &end, 0);

	switch (*end) {
	case 'k':
		n <<= 10;
		end++;
		break;
	case 'M':
		n <<= 20;
		end++;
		break;
	}
	if (end == text || *end)
		die("%s: not a number", text);
	return n;
}

static void usage(FILE *f)
{
	fputs("usage: qcow-diff [OPTION]... TARGET\n"
	      "  --seed N --ops N --jobs N        what to run (1, 5000, 1)\n"
	      "  --max-io SIZE --cluster SIZE     sizes (1M, 64k)\n"
	      "  --hot SIZE                       only touch the first SIZE bytes\n"
	      "  --mix KIND=WEIGHT,...            kinds: read write dsync zero punch\n"
	      "                                   zeroout discard flush\n"
	      "  --buffered                       through the page cache\n"
	      "  --allow-enospc                   requests may fail with ENOSPC\n"
	      "  --allow-errors                   requests may fail\n"
	      "  --mirror-in FILE                 what TARGET holds (zeroes)\n"
	      "  --mirror-out FILE                write what it holds at the end\n"
	      "  --verify-only                    compare TARGET with --mirror-in\n"
	      "  --fill                           write all of TARGET once, first\n"
	      "  --history FILE                   write the log of all requests\n"
	      "  --mark NAME                      mark flushes in dm-log-writes NAME\n"
	      "  --no-final                       do not read everything at the end\n"
	      "  --corrupt-op ID                  damage the data of a write (to test this)\n"
	      "  --quiet\n"
	      "exit: 0 good, 1 wrong data or I/O error, 2 could not run\n", f);
}

static void parse(int argc, char **argv)
{
	enum {
		SEED = 256, OPS, JOBS, MAX_IO, CLUSTER, HOT, MIX, BUFFERED,
		ALLOW_ENOSPC, ALLOW_ERRORS, MIRROR_IN, MIRROR_OUT,
		VERIFY_ONLY, HISTORY, MARK, NO_FINAL, CORRUPT_OP, QUIET, HELP, FILL,
	};
	static const struct option options[] = {
		{ "seed", 1, NULL, SEED }, { "ops", 1, NULL, OPS },
		{ "jobs", 1, NULL, JOBS }, { "max-io", 1, NULL, MAX_IO },
		{ "cluster", 1, NULL, CLUSTER }, { "hot", 1, NULL, HOT },
		{ "mix", 1, NULL, MIX }, { "buffered", 0, NULL, BUFFERED },
		{ "allow-enospc", 0, NULL, ALLOW_ENOSPC },
		{ "allow-errors", 0, NULL, ALLOW_ERRORS },
		{ "mirror-in", 1, NULL, MIRROR_IN },
		{ "mirror-out", 1, NULL, MIRROR_OUT },
		{ "verify-only", 0, NULL, VERIFY_ONLY },
		{ "history", 1, NULL, HISTORY }, { "mark", 1, NULL, MARK },
		{ "no-final", 0, NULL, NO_FINAL },
		{ "corrupt-op", 1, NULL, CORRUPT_OP },
		{ "quiet", 0, NULL, QUIET }, { "help", 0, NULL, HELP },
		{ "fill", 0, NULL, FILL },
		{ NULL, 0, NULL, 0 },
	};
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case SEED:
			opt.seed = number(optarg);
			break;
		case OPS:
			opt.ops = number(optarg);
			break;
		case JOBS:
			opt.jobs = number(optarg);
			break;
		case MAX_IO:
			opt.max_io = number(optarg);
			break;
		case CLUSTER:
			opt.cluster = number(optarg);
			break;
		case HOT:
			opt.hot = number(optarg);
			break;
		case MIX:
			set_mix(optarg);
			break;
		case BUFFERED:
			opt.buffered = true;
			break;
		case ALLOW_ENOSPC:
			opt.allow_enospc = true;
			break;
		case ALLOW_ERRORS:
			opt.allow_errors = true;
			break;
		case MIRROR_IN:
			opt.mirror_in = optarg;
			break;
		case MIRROR_OUT:
			opt.mirror_out = optarg;
			break;
		case VERIFY_ONLY:
			opt.verify_only = true;
			break;
		case HISTORY:
			opt.history = optarg;
			break;
		case MARK:
			opt.mark = optarg;
			break;
		case NO_FINAL:
			opt.no_final = true;
			break;
		case CORRUPT_OP:
			opt.corrupt_op = number(optarg);
			break;
		case QUIET:
			opt.quiet = true;
			break;
		case FILL:
			opt.fill = true;
			break;
		case HELP:
			usage(stdout);
			exit(0);
		default:
			usage(stderr);
			exit(2);
		}
	}
	if (optind + 1 != argc) {
		usage(stderr);
		exit(2);
	}
	opt.target = argv[optind];
	if (!opt.jobs || opt.jobs > MAX_JOBS)
		die("--jobs: 1 to %d", MAX_JOBS);
	if (opt.max_io < SECTOR_SIZE || opt.cluster < SECTOR_SIZE)
		die("--max-io, --cluster: at least %u", SECTOR_SIZE);
	if (opt.verify_only)
		opt.ops = 0;
}

static double seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	double start = seconds();
	uint64_t s;
	unsigned int i;
	int out = -1;

	parse(argc, argv);
	open_target();
	if (opt.mirror_in)
		load_initial();
	if (opt.mirror_out) {
		out = open(opt.mirror_out, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
		if (out < 0 || ftruncate(out, sectors * SECTOR_SIZE))
			die("%s: %s", opt.mirror_out, strerror(errno));
	}
	if (opt.mark) {
		dm_fd = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
		if (dm_fd < 0)
			die("/dev/mapper/control: %s", strerror(errno));
	}

	/* One more for the final read, which uses one id over and over. */
	max_id = opt.ops + sectors * SECTOR_SIZE / opt.max_io + 2;
	if (max_id > UINT32_MAX)
		die("--ops: too many");
	log_ops = need(calloc(max_id + 1, sizeof(*log_ops)));
	model = need(calloc(sectors, sizeof(*model)));
	fixed_cands = need(calloc(sectors * FIXED_CANDS, sizeof(*fixed_cands)));
	for (s = 0; s < sectors; s++) {
		model[s].cand = fixed_cands + s * FIXED_CANDS;
		model[s].room = FIXED_CANDS;
		add_cand(&model[s], INITIAL);
	}
	for (i = 0; i < opt.jobs; i++) {
		void *buf;

		/* Room for a start at any of 8 logical blocks. */
		if (posix_memalign(&buf, BUF_ALIGN,
				   opt.max_io + 8 * SECTOR_SIZE * unit + BUF_ALIGN))
			die("out of memory");
		jobs[i].buf = buf;
		jobs[i].found = need(calloc(opt.max_io / SECTOR_SIZE + unit,
					    sizeof(uint64_t)));
		jobs[i].index = i;
		jobs[i].rng = mix64(opt.seed * MAX_JOBS + i);
	}

	if (opt.fill) {
		uint64_t step = opt.max_io / SECTOR_SIZE / unit * unit;

		for (s = 0; s < sectors; s += step)
			run_op(&jobs[0], OP_WRITE, s,
			       sectors - s < step ? sectors - s : step);
	}
	if (opt.jobs == 1) {
		job_main(&jobs[0]);
	} else {
		for (i = 0; i < opt.jobs; i++)
			if (pthread_create(&jobs[i].thread, NULL, job_main, &jobs[i]))
				die("pthread_create: %s", strerror(errno));
		for (i = 0; i < opt.jobs; i++)
			pthread_join(jobs[i].thread, NULL);
	}
	if (!opt.verify_only && !opt.no_final)
		run_op(&jobs[0], OP_FLUSH, 0, 0);
	if (opt.history)
		write_history();
	if (!opt.no_final)
		read_all(&jobs[0], out);
	if (out >= 0 && close(out))
		die("%s: %s", opt.mirror_out, strerror(errno));

	if (!opt.quiet) {
		printf("# qcow-diff seed=%" PRIu64, opt.seed);
		for (i = 0; i < OP_KINDS; i++) {
			printf(" %s=%" PRIu64, op_names[i], done[i]);
			if (failed[i])
				printf("(%" PRIu64 " failed)", failed[i]);
			if (refused[i])
				printf("(%" PRIu64 " refused)", refused[i]);
		}
		printf(" checked=%" PRIu64 "MiB %.1fs\n", bytes_checked >> 20,
		       seconds() - start);
	}
	close(fd);
	return 0;
}
