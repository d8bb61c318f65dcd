// SPDX-License-Identifier: GPL-2.0-only
/*
 * Snapshot table and bitmaps against images of any kind: libFuzzer calls this, or
 * fuzz_main.c.
 *
 * An input is a byte that says whether the image is to be written, and the image.
 * What is written lies in clusters that belong to the bitmaps.
 */
#include <stdlib.h>

#include "driver.h"

#define PROMISE(x)	do {							\
	if (!(x)) {								\
		fprintf(stderr, "broken promise: %s\n", #x);			\
		abort();							\
	}									\
} while (0)

/* So many clusters may be allocated. */
#define FREE_CLUSTERS	4

struct qcow_block *qcow_block_get(struct qcow_image *image, u64 host_offset)
{
	struct qcow_block *block = malloc(sizeof(*block));

	PROMISE(block && !(host_offset & (qcow_block_size(image) - 1)));
	block->data = malloc(qcow_block_size(image));
	PROMISE(block->data);
	qcow_file_read(&image->file, block->data, qcow_block_size(image), host_offset);
	return block;
}

void qcow_block_put(struct qcow_block *block)
{
	free(block->data);
	free(block);
}

int qcow_file_read(struct qcow_file *file, void *buf, size_t length, u64 host_offset)
{
	u64 has = host_offset < file->size ? file->size - host_offset : 0;

	PROMISE(!(host_offset % QCOW_SECTOR) && !(length % QCOW_SECTOR));
	PROMISE(host_offset <= S64_MAX - length);
	memset(buf, 0, length);
	if (has)
		memcpy(buf, file->data + host_offset, length < has ? length : has);
	return 0;
}

int qcow_file_write(struct qcow_file *file, const void *buf, size_t length, u64 host_offset)
{
	u64 cluster = host_offset >> file->cluster_bits;
	u64 last = (host_offset + length - 1) >> file->cluster_bits;

	PROMISE(!(host_offset % QCOW_SECTOR) && !(length % QCOW_SECTOR));
	PROMISE(length <= file->size && host_offset <= file->size - length);
	for (; cluster <= last; cluster++)
		PROMISE(file->kinds[cluster] == QCOW_METADATA_BITMAPS ||
			file->kinds[cluster] == QCOW_METADATA_BITMAP);
	memcpy(file->data + host_offset, buf, length);
	return 0;
}

int qcow_file_sync(struct qcow_file *file)
{
	return 0;
}

int qcow_refcount_get(struct qcow_image *image, u64 cluster, u64 *count)
{
	*count = cluster < image->file.size >> image->cluster_bits;
	return 0;
}

/* The last clusters are free. */
int qcow_alloc_clusters(struct qcow_image *image, u64 want, u64 *cluster, u64 *got,
			bool *zeroed)
{
	u64 clusters = image->file.size >> image->cluster_bits, i;

	for (i = clusters - FREE_CLUSTERS; i < clusters; i++) {
		if (image->file.kinds[i] >= 0)
			continue;
		*cluster = i;
		*got = 1;
		*zeroed = false;
		return 0;
	}
	return -ENOSPC;
}

int qcow_commit_all(struct qcow_image *image)
{
	return 0;
}

struct qcow_free *qcow_free_alloc(struct qcow_image *image)
{
	return malloc(sizeof(struct qcow_free));
}

void qcow_free_queue_locked(struct qcow_image *image, struct qcow_free *free_later)
{
	PROMISE(free_later->cluster && free_later->cluster < image->file.size >>
		image->cluster_bits);
	free(free_later);
}

static bool in_file(struct qcow_image *image, u64 host_offset, u64 length)
{
	return length && length <= image->file.size &&
	       host_offset <= image->file.size - length;
}

static void set_kind(struct qcow_image *image, int kind, u64 host_offset, u64 length)
{
	u64 cluster = host_offset >> image->cluster_bits;

	if (!in_file(image, host_offset, length))
		return;
	for (; cluster <= (host_offset + length - 1) >> image->cluster_bits; cluster++)
		if (kind < 0 || image->file.kinds[cluster] < 0)
			image->file.kinds[cluster] = kind;
}

void qcow_overlap_add(struct qcow_image *image, int kind, u64 host_offset, u64 length)
{
	set_kind(image, kind, host_offset, length);
}

void qcow_overlap_remove(struct qcow_image *image, u64 host_offset, u64 length)
{
	set_kind(image, -1, host_offset, length);
}

bool qcow_overlap_is_only(struct qcow_image *image, int kind, u64 host_offset, u64 length)
{
	u64 cluster = host_offset >> image->cluster_bits;

	PROMISE(in_file(image, host_offset, length));
	for (; cluster <= (host_offset + length - 1) >> image->cluster_bits; cluster++)
		if (image->file.kinds[cluster] != kind)
			return false;
	return true;
}

int qcow_overlap_expect(struct qcow_image *image, int kind, u64 host_offset)
{
	return qcow_overlap_is_only(image, kind, host_offset, 1) ? 0 : -EIO;
}

static void try_snapshots(struct qcow_image *image)
{
	struct qcow_header header = image->header;
	struct qcow_snapshot snapshot = {};
	struct qcow_message message = { "" };
	u64 before;
	u32 i;

	/* More of the same takes time. */
	if (header.nb_snapshots > 64)
		return;
	for (i = 0; i < header.nb_snapshots; i++) {
		before = snapshot.next;
		if (qcow_snapshot_next(image, &snapshot, &message)) {
			PROMISE(message.text[0]);
			break;
		}
		PROMISE(snapshot.next > before &&
			snapshot.next - header.snapshots_offset <= 64 << 20);
		PROMISE(snapshot.id_offset + snapshot.id_size + snapshot.name_size <=
			snapshot.next);
	}
	if (!qcow_snapshot_select(image, "1", &message)) {
		PROMISE(image->header.l1_size <= QCOW_MAX_L1_BYTES / 8);
		PROMISE(!(image->header.l1_table_offset & (qcow_cluster_size(image) - 1)));
		PROMISE(image->header.l1_table_offset <= S64_MAX - QCOW_MAX_L1_BYTES);
		PROMISE(!qcow_header_check_size(&image->header, NULL));
	} else {
		PROMISE(message.text[0]);
	}
	image->header = header;
}

static void try_bitmaps(struct qcow_image *image)
{
	struct qcow_message message = { "" };

	/* Memory for more is bounded elsewhere. */
	if (image->size > 16 << 20 || image->header.bitmap_directory_size > 1 << 20)
		return;
	if (qcow_bitmaps_load(image, &message)) {
		PROMISE(message.text[0] && !image->bitmaps);
		return;
	}
	qcow_bitmaps_mark(image);
	if (image->bitmaps && image->size) {
		qcow_bitmaps_set(image, 0, 512);
		qcow_bitmaps_set(image, image->size / 2, image->size - image->size / 2);
	}
	qcow_bitmaps_store(image);
	qcow_bitmaps_exit(image);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
	struct qcow_image image = { .writable = size && *data & 1 };
	u8 first[QCOW_SECTOR] = { 0 };
	u32 cluster_size;
	size_t clusters;

	if (!size)
		return 0;
	data++;
	size--;
	memcpy(first, data, size < sizeof(first) ? size : sizeof(first));
	/* Larger clusters are the same, and take time. */
	if (qcow_header_cluster_size(first, sizeof(first), &cluster_size, NULL) ||
	    cluster_size > 4096)
		return 0;
	clusters = (size + cluster_size - 1) / cluster_size + FREE_CLUSTERS;
	image.file.size = clusters * cluster_size;
	image.file.data = calloc(clusters, cluster_size);
	image.file.kinds = malloc(clusters);
	PROMISE(image.file.data && image.file.kinds);
	memcpy(image.file.data, data, size);
	memset(image.file.kinds, -1, clusters);
	image.file.kinds[0] = QCOW_METADATA_HEADER;
	if (!qcow_header_parse(image.file.data, cluster_size, image.writable, &image.header,
			       NULL)) {
		image.cluster_bits = image.header.cluster_bits;
		image.file.cluster_bits = image.cluster_bits;
		image.block_bits = image.cluster_bits;
		image.size = image.header.size & ~511ULL;
		qcow_overlap_add(&image, QCOW_METADATA_BITMAPS,
				 image.header.bitmap_directory_offset,
				 image.header.bitmap_directory_size);
		try_snapshots(&image);
		try_bitmaps(&image);
	}
	free(image.file.data);
	free(image.file.kinds);
	return 0;
}
