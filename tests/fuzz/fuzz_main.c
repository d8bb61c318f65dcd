// SPDX-License-Identifier: GPL-2.0-only
/*
 * What calls a fuzz target where libFuzzer does not: each file that is named is an
 * input, and is then changed at random, the same way each time, so many times as -n
 * says; most often in the first bytes, so many as -f says.
 */
#include <stdlib.h>

#include "format.h"

#define MOST	((64u << 10) + 1)

static u64 state = 1;
/* Most of what matters is in so many bytes. */
static size_t front = 160;

static u32 draw(u32 below)
{
	state = state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (state >> 33) % below;
}

/* A byte, a bit, or a number that is at the edge of something. */
static void change(u8 *data, size_t size)
{
	static const u64 edges[] = {
		0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff,
		1ULL << 56, 1ULL << 62, 1ULL << 63, ~0ULL, ~0xffffULL,
	};
	size_t at = draw(draw(4) ? (size < front ? size : front) : size);
	u64 edge = edges[draw(sizeof(edges) / sizeof(*edges))];
	int i, width = 1 << draw(4);

	if (draw(3) == 0) {
		data[at] ^= 1 << draw(8);
	} else if (draw(2)) {
		data[at] = draw(256);
	} else {
		at &= ~(size_t)(width - 1);
		for (i = 0; i < width && at + i < size; i++)
			data[at + i] = edge >> 8 * (width - 1 - i);
	}
}

int main(int argc, char **argv)
{
	int i, n = 0, changes;
	unsigned long done = 0;

	for (i = 1; i < argc; i++) {
		static u8 input[MOST], changed[MOST];
		size_t size;
		FILE *f;

		if (!strcmp(argv[i], "-n") && i + 1 < argc) {
			n = atoi(argv[++i]);
			continue;
		}
		if (!strcmp(argv[i], "-f") && i + 1 < argc) {
			front = atoi(argv[++i]);
			continue;
		}
		f = fopen(argv[i], "rb");
		if (!f) {
			perror(argv[i]);
			return 2;
		}
		size = 1 + fread(input + 1, 1, sizeof(input) - 1, f);
		fclose(f);
		for (int k = 0; k <= n; k++, done++) {
			memcpy(changed, input, size);
			changed[0] = k;
			for (changes = k ? 1 + draw(6) : 0; changes; changes--)
				change(changed + 1, size - 1);
			LLVMFuzzerTestOneInput(changed, size);
		}
	}
	printf("%lu inputs\n", done);
	return !done;
}
