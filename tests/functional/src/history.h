/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What qcow-diff did, as it tells the crash test, and the contents of the
 * sectors that it writes.
 *
 * A history file is one struct history_header, then @ops structs history_op in
 * the order of their ids, the first with id 1. Native byte order: it is read on
 * the machine that the guest ran on.
 */
#ifndef QCOW_TEST_HISTORY_H
#define QCOW_TEST_HISTORY_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SECTOR_SIZE	512u
#define SECTOR_WORDS	(SECTOR_SIZE / 8)
#define SECTOR_MAGIC	0x71636f7764696666ull	/* "qcowdiff" */
#define HISTORY_MAGIC	0x71636f7768697374ull	/* "qcowhist" */

enum op_kind {
	OP_READ,
	OP_WRITE,
	OP_DSYNC,	/* a write that is durable when it returns */
	OP_ZERO,	/* write zeroes, keep the space */
	OP_PUNCH,	/* write zeroes, may unmap */
	OP_ZEROOUT,	/* BLKZEROOUT */
	OP_DISCARD,
	OP_FLUSH,
	OP_KINDS,
};

struct history_header {
	uint64_t magic;
	uint64_t seed;
	uint64_t sectors;	/* size of the device */
	uint64_t ops;
};

/*
 * @begin and @end are readings of one logical clock, taken before the system
 * call and after it; @end is 0 if the call did not return.
 */
struct history_op {
	uint64_t begin;
	uint64_t end;
	uint64_t sector;
	uint32_t sectors;
	uint16_t kind;
	int16_t error;		/* 0 or an errno */
};

static inline uint64_t mix64(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* The contents that op @id of the run with @seed gives @sector. */
static inline void sector_fill(void *buf, uint64_t seed, uint64_t id,
			       uint64_t sector)
{
	uint64_t *word = buf;
	uint64_t key = mix64(seed ^ mix64(id ^ mix64(sector)));
	unsigned int i;

	word[0] = SECTOR_MAGIC;
	word[1] = seed;
	word[2] = id;
	word[3] = sector;
	for (i = 4; i < SECTOR_WORDS; i++)
		word[i] = key + i * 0x9e3779b97f4a7c15ull;
}

static inline bool sector_is_zero(const void *buf)
{
	const uint64_t *word = buf;
	uint64_t any = 0;
	unsigned int i;

	for (i = 0; i < SECTOR_WORDS; i++)
		any |= word[i];
	return !any;
}

/* The op that wrote @buf to @sector, or 0 if it is the work of none. */
static inline uint64_t sector_op(const void *buf, uint64_t seed, uint64_t sector)
{
	const uint64_t *word = buf;
	uint64_t want[SECTOR_WORDS];

	if (word[0] != SECTOR_MAGIC || word[1] != seed || word[3] != sector)
		return 0;
	sector_fill(want, seed, word[2], sector);
	return memcmp(buf, want, SECTOR_SIZE) ? 0 : word[2];
}

static inline bool op_changes(unsigned int kind)
{
	return kind >= OP_WRITE && kind <= OP_DISCARD;
}

#endif
