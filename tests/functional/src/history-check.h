/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a disk may hold after a crash or an error, by the history of qcow-diff:
 * each sector what was durable or what was written after. The includer defines
 * PROGRAM.
 */
#ifndef QCOW_TEST_HISTORY_CHECK_H
#define QCOW_TEST_HISTORY_CHECK_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "history.h"

static struct history_header *head;
static struct history_op *ops;		/* from 1 */
static uint32_t **by_sector;		/* ids, 0 at the end */
static const unsigned char *initial;	/* the disk before */
static uint64_t initial_size;
static bool *marked;			/* known to be durable by itself */

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, PROGRAM ": ");
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

static void *map_file(const char *path, uint64_t *size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	off_t end = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
	void *p;

	if (end < 0)
		die("%s: %s", path, strerror(errno));
	*size = end;
	if (!*size)
		die("%s: empty", path);
	p = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (p == MAP_FAILED)
		die("%s: %s", path, strerror(errno));
	close(fd);
	return p;
}

static void load_history(const char *path)
{
	uint64_t size, id, s;
	uint32_t *count;

	head = map_file(path, &size);
	if (head->magic != HISTORY_MAGIC ||
	    size != sizeof(*head) + head->ops * sizeof(*ops))
		die("%s: not a history of qcow-diff", path);
	ops = (struct history_op *)(head + 1) - 1;
	marked = need(calloc(head->ops + 1, sizeof(*marked)));
	count = need(calloc(head->sectors, sizeof(*count)));
	by_sector = need(calloc(head->sectors, sizeof(*by_sector)));
	for (id = 1; id <= head->ops; id++)
		if (op_changes(ops[id].kind))
			for (s = 0; s < ops[id].sectors; s++)
				count[ops[id].sector + s]++;
	for (s = 0; s < head->sectors; s++) {
		by_sector[s] = need(calloc(count[s] + 1, sizeof(uint32_t)));
		count[s] = 0;
	}
	for (id = 1; id <= head->ops; id++) {
		if (!op_changes(ops[id].kind))
			continue;
		for (s = 0; s < ops[id].sectors; s++) {
			uint64_t at = ops[id].sector + s;

			by_sector[at][count[at]++] = id;
		}
	}
	free(count);
}

static void print_op(uint64_t id)
{
	const struct history_op *op = &ops[id];
	static const char * const names[OP_KINDS] = {
		"read", "write", "dsync", "zero", "punch", "zeroout", "discard",
		"flush",
	};

	printf("#   op %" PRIu64 " %s sectors %" PRIu64 "+%u clock %" PRIu64 "-%" PRIu64
	       "%s\n", id, names[op->kind], op->sector, op->sectors, op->begin,
	       op->end, op->error ? " failed" : "");
}

/*
 * Is sector @s of the disk, which reads @data, what it may be when all that
 * completed before @clock, and each marked request, was durable?
 */
static bool allowed(uint64_t s, const unsigned char *data, uint64_t clock,
		    uint64_t *found, uint64_t *floor)
{
	static const unsigned char zeroes[SECTOR_SIZE];
	bool zero = sector_is_zero(data);
	const uint32_t *id;

	*found = zero ? 0 : sector_op(data, head->seed, s);
	*floor = 0;
	for (id = by_sector[s]; *id; id++) {
		const struct history_op *op = &ops[*id];

		if (op->kind == OP_DISCARD || op->error || !op->end)
			continue;
		if ((op->end < clock || marked[*id]) && op->begin > *floor)
			*floor = op->begin;
	}
	if (*floor == 0 && !memcmp(data, (s + 1) * SECTOR_SIZE <= initial_size ?
				   initial + s * SECTOR_SIZE : zeroes, SECTOR_SIZE))
		return true;
	for (id = by_sector[s]; *id; id++) {
		const struct history_op *op = &ops[*id];
		bool writes = op->kind == OP_WRITE || op->kind == OP_DSYNC;

		if ((op->end && op->end < *floor) || op->error == EOPNOTSUPP)
			continue;
		if (writes ? *found == *id : zero)
			return true;
	}
	return false;
}

static bool check_disk(const char *raw, uint64_t clock, const char *what)
{
	static unsigned char *disk;	/* kept: new memory costs more than to read it */
	uint64_t size = head->sectors * SECTOR_SIZE, at = 0;
	uint64_t s, wrong = 0, found, floor;
	int fd = open(raw, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : 1;

	disk = disk ?: need(malloc(size));
	for (; at < size && n > 0; at += n)
		n = read(fd, disk + at, size - at);
	if (n <= 0) {
		printf("# %s: the disk cannot be read or is too short\n", what);
		return false;
	}
	close(fd);
	for (s = 0; s < head->sectors; s++) {
		const uint32_t *id;
		const unsigned char *data = disk + s * SECTOR_SIZE;

		if (allowed(s, data, clock, &found, &floor))
			continue;
		if (wrong++)
			continue;
		printf("# %s: sector %" PRIu64 " (byte %" PRIu64
		       ") is wrong: durable up to clock %" PRIu64
		       ", it must be from clock %" PRIu64 " or later; found ",
		       what, s, s * SECTOR_SIZE, clock, floor);
		if (found)
			printf("op %" PRIu64 "\n", found);
		else if (sector_is_zero(data))
			printf("zeroes\n");
		else
			printf("other data %016" PRIx64 " %016" PRIx64 " %016"
			       PRIx64 " %016" PRIx64 "\n",
			       ((const uint64_t *)data)[0], ((const uint64_t *)data)[1],
			       ((const uint64_t *)data)[2], ((const uint64_t *)data)[3]);
		for (id = by_sector[s]; *id; id++)
			print_op(*id);
	}
	if (wrong)
		printf("# %s: %" PRIu64 " sectors are wrong\n", what, wrong);
	return !wrong;
}

#endif
