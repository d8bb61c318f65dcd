// SPDX-License-Identifier: GPL-2.0-only
/*
 * A plugin for QEMU's emulation: how many instructions the guest executed at each
 * address, from one mark to the next. A mark is an instruction that does nothing, with a
 * number in it that no other has; see tests/functional/src/profile-mark.c.
 *
 * For each period between two marks it writes lines to the file that it is given:
 *
 *   PERIOD ADDRESS INSTRUCTIONS
 *
 * one for each block of code (which has no jump inside), at the address of its first
 * instruction. A block that is left before its end, by a page fault, counts as a whole.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT int qemu_plugin_version = 1;

/* nopl 0x776f6371(%rax) */
static const unsigned char mark[] = { 0x0f, 0x1f, 0x80, 0x71, 0x63, 0x6f, 0x77 };

struct block {
	struct block *next;
	uint64_t address;
	uint64_t count;
};

/* The guest has one CPU, so nothing here is done twice at a time. */
static struct block *blocks;
static unsigned int period;
static FILE *out;

static void at_mark(unsigned int cpu, void *data)
{
	struct block *block;

	(void)cpu;
	(void)data;
	for (block = blocks; block; block = block->next) {
		if (period && block->count)
			fprintf(out, "%u %016" PRIx64 " %" PRIu64 "\n", period,
				block->address, block->count);
		block->count = 0;
	}
	fflush(out);
	period++;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t n = qemu_plugin_tb_n_insns(tb), i;
	struct block *block = calloc(1, sizeof(*block));

	(void)id;
	if (!block)
		abort();
	block->address = qemu_plugin_tb_vaddr(tb);
	block->next = blocks;
	blocks = block;
	/* 0 is the operation: add */
	qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &block->count, n);
	for (i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

		if (qemu_plugin_insn_size(insn) == sizeof(mark) &&
		    !memcmp(qemu_plugin_insn_data(insn), mark, sizeof(mark)))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, at_mark, 0, NULL);
	}
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc,
			       char **argv)
{
	(void)info;
	if (argc != 1 || strncmp(argv[0], "out=", 4))
		return -1;
	out = fopen(argv[0] + 4, "w");
	if (!out)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
