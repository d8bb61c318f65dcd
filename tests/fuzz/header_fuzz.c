// SPDX-License-Identifier: GPL-2.0-only
/*
 * The header parser against bytes of any kind: libFuzzer calls this, or fuzz_main.c.
 *
 * An input is a byte that says whether the image is to be written, and the start of
 * the image. What header.c promises of a header that it takes has to hold.
 */
#include <stdlib.h>

#include "header.h"

#define PROMISE(x)	do {							\
	if (!(x)) {								\
		fprintf(stderr, "header.c promised: %s\n", #x);			\
		abort();							\
	}									\
} while (0)

static bool table_is_good(u64 offset, u64 bytes, u32 cluster_size)
{
	return !bytes || (offset && !(offset & (cluster_size - 1)) &&
			  offset <= (u64)S64_MAX - bytes);
}

static void check_promises(const struct qcow_header *h, u32 cluster_size, bool writable)
{
	u32 shift = h->cluster_bits + h->l2_bits;

	PROMISE(h->version == 2 || h->version == 3);
	PROMISE(h->cluster_bits >= QCOW_MIN_CLUSTER_BITS &&
		h->cluster_bits <= QCOW_MAX_CLUSTER_BITS);
	PROMISE(h->refcount_order <= QCOW_MAX_REFCOUNT_ORDER);
	PROMISE(h->compression_type <= QCOW_COMPRESSION_ZSTD);
	PROMISE(h->crypt_method <= QCOW_CRYPT_LUKS);
	PROMISE(table_is_good(h->l1_table_offset, (u64)h->l1_size * 8, cluster_size));
	PROMISE(h->refcount_table_clusters);
	PROMISE(table_is_good(h->refcount_table_offset,
			      (u64)h->refcount_table_clusters * cluster_size, cluster_size));
	PROMISE(table_is_good(h->snapshots_offset, h->nb_snapshots, cluster_size));
	PROMISE(table_is_good(h->bitmap_directory_offset, h->bitmap_directory_size,
			      cluster_size));
	PROMISE(table_is_good(h->encryption_offset, h->encryption_size, cluster_size));
	PROMISE((h->crypt_method == QCOW_CRYPT_LUKS) == !!h->encryption_size);
	PROMISE((u64)h->l1_size << shift >= h->size || h->l1_size >> (63 - shift));
	PROMISE(h->backing_offset <= cluster_size &&
		h->backing_size <= cluster_size - h->backing_offset);
	PROMISE(!h->backing_size || h->backing_offset);
	PROMISE(memchr(h->backing_format, '\0', sizeof(h->backing_format)));
	PROMISE(!writable || !(h->incompatible & (QCOW_INCOMPAT_DIRTY | QCOW_INCOMPAT_CORRUPT)));
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
	struct qcow_message message = { "" };
	struct qcow_header header;
	u8 first[512] = { 0 };
	bool writable;
	u32 cluster_size;
	u8 *cluster;

	if (!size)
		return 0;
	writable = *data++ & 1;
	size--;
	memcpy(first, data, size < sizeof(first) ? size : sizeof(first));
	if (qcow_header_cluster_size(first, sizeof(first), &cluster_size, &message))
		return 0;
	/* Exactly as long as it may be read. */
	cluster = calloc(1, cluster_size);
	if (!cluster)
		return 0;
	memcpy(cluster, data, size < cluster_size ? size : cluster_size);
	if (!qcow_header_parse(cluster, cluster_size, writable, &header, &message))
		check_promises(&header, cluster_size, writable);
	else
		PROMISE(message.text[0]);
	PROMISE(memchr(message.text, '\0', sizeof(message.text)));
	free(cluster);
	return 0;
}
