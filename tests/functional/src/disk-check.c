// SPDX-License-Identifier: GPL-2.0-only
/*
 * disk-check [--closed] HISTORY INITIAL DISK: does DISK, a raw file, hold what it
 * may after the requests in HISTORY (of qcow-diff) some of which failed? All that
 * completed before a flush that succeeded must be there; with --closed, all that
 * completed.
 */
#define PROGRAM "disk-check"
#include "history-check.h"

int main(int argc, char **argv)
{
	bool closed = argc > 1 && !strcmp(argv[1], "--closed");
	uint64_t id, clock = 0, flushes = 0;

	argv += closed;
	if (argc - closed != 4) {
		fprintf(stderr, "usage: disk-check [--closed] HISTORY INITIAL DISK\n");
		return 2;
	}
	load_history(argv[1]);
	initial = map_file(argv[2], &initial_size);
	for (id = 1; id <= head->ops; id++) {
		if (ops[id].error || !ops[id].end)
			continue;
		if (ops[id].kind == OP_FLUSH) {
			flushes++;
			if (ops[id].begin > clock)
				clock = ops[id].begin;
		}
		if (ops[id].kind == OP_DSYNC)
			marked[id] = true;
	}
	printf("# %" PRIu64 " requests, %" PRIu64 " good flushes, the last at clock %" PRIu64 "\n",
	       head->ops, flushes, clock);
	if (closed)
		clock = UINT64_MAX;
	return check_disk(argv[3], clock, argv[3]) ? 0 : 1;
}
