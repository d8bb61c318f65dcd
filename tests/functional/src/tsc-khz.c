// SPDX-License-Identifier: GPL-2.0-only
/*
 * tsc-khz: print how fast the time stamp counter of this machine is, in kHz, which is
 * what an emulated one goes by, too. A guest that found out for itself, while others
 * keep its processor from it, may be wrong by any factor.
 */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#ifdef __x86_64__
#include <x86intrin.h>

struct sample {
	uint64_t ticks;
	int64_t ns;
};

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Of some, the one between whose two looks at the clock there was the least time. */
static struct sample take(void)
{
	int64_t before, after, best = INT64_MAX;
	struct sample sample = {};
	uint64_t ticks;
	int i;

	for (i = 0; i < 1000; i++) {
		before = now_ns();
		ticks = __rdtsc();
		after = now_ns();
		if (after - before >= best)
			continue;
		best = after - before;
		sample.ticks = ticks;
		sample.ns = before + best / 2;
	}
	return sample;
}

int main(void)
{
	const struct timespec while_ago = { .tv_nsec = 200000000 };
	struct sample from, to;

	from = take();
	nanosleep(&while_ago, NULL);
	to = take();
	printf("%.0f\n", (to.ticks - from.ticks) * 1e6 / (to.ns - from.ns));
	return 0;
}
#else
int main(void)
{
	fprintf(stderr, "tsc-khz: this processor has none\n");
	return 1;
}
#endif
