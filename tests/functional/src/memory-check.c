// SPDX-License-Identifier: GPL-2.0-only
/*
 * memory-check MIB ROUNDS SEED: anonymous memory, of which each page is filled, in
 * every round, with what no other page and no other round has, after what the round
 * before wrote there was checked. Pages come in an order that is not theirs. MIB is a
 * power of two.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE	4096
#define WORDS	(PAGE / sizeof(uint64_t))
/* So many pages are in order: what is swapped out together comes back together. */
#define RUN	8
#define STRIDE	40503

static uint64_t word(uint64_t seed, uint64_t round, uint64_t page, uint64_t i)
{
	return (seed << 56 | round << 40 | page << 10 | i) * 0x9e3779b97f4a7c15;
}

static void check(const uint64_t *at, uint64_t seed, uint64_t round, uint64_t page)
{
	uint64_t i;

	for (i = 0; i < WORDS; i++) {
		uint64_t want = round ? word(seed, round, page, i) : 0;

		if (at[i] == want)
			continue;
		printf("page %" PRIu64 ", word %" PRIu64 ", written in round %" PRIu64
		       ": is %016" PRIx64 ", should be %016" PRIx64 "\n",
		       page, i, round, at[i], want);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	uint64_t size, runs, pages, rounds, seed, round, n, i;
	uint64_t *memory;

	if (argc != 4) {
		fprintf(stderr, "usage: memory-check MIB ROUNDS SEED\n");
		return 2;
	}
	size = strtoull(argv[1], NULL, 0) << 20;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 2;
	}
	rounds = strtoull(argv[2], NULL, 0);
	seed = strtoull(argv[3], NULL, 0);
	pages = size / PAGE;
	runs = pages / RUN;
	for (round = 1; round <= rounds + 1; round++) {
		for (n = 0; n < pages; n++) {
			uint64_t page = n / RUN * STRIDE % runs * RUN + n % RUN;
			uint64_t *at = memory + page * WORDS;

			check(at, seed, round - 1, page);
			if (round > rounds)
				continue;
			for (i = 0; i < WORDS; i++)
				at[i] = word(seed, round, page, i);
		}
	}
	printf("%" PRIu64 " pages, %" PRIu64 " rounds\n", pages, rounds);
	return 0;
}
