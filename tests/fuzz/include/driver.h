/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What snapshot.c and bitmap.c need of qcow.h and of the kernel, for a program: an
 * image is a buffer. Included before them, it takes the place of qcow.h.
 */
#ifndef QCOW_H
#define QCOW_H

#include <stdlib.h>

#include "kernel.h"
#include "header.h"

#define SZ_64K			(64u << 10)
#define GFP_KERNEL		0
#define GFP_KERNEL_ACCOUNT	0
#define __GFP_RETRY_MAYFAIL	0
#define __GFP_NOWARN		0
#define BITS_PER_LONG		64
#define BIT(n)			(1UL << (n))
#define current			NULL

#define cpu_to_be32(x)		htobe32(x)
#define cpu_to_be64(x)		htobe64(x)
#define round_up(x, to)		(((x) + (to) - 1) & ~((typeof(x))(to) - 1))
#define min(a, b)		((a) < (b) ? (a) : (b))
#define DIV_ROUND_UP_ULL(a, b)	(((u64)(a) + (b) - 1) / (b))
#define struct_size(p, member, n)	(sizeof(*(p)) + (n) * sizeof(*(p)->member))
#define READ_ONCE(x)		(x)
#define WRITE_ONCE(x, value)	((x) = (value))
#define IS_ERR(p)		((unsigned long)(p) >= (unsigned long)-4095)
#define PTR_ERR(p)		((long)(p))
#define ERR_PTR(err)		((void *)(long)(err))
#define pr_err(...)		do { } while (0)
#define cond_resched()		do { } while (0)
#define fatal_signal_pending(task)	0
#define spin_lock_irq(lock)	((void)(lock))
#define spin_unlock_irq(lock)	((void)(lock))

#define kmalloc(size, gfp)	malloc(size)
#define kvmalloc(size, gfp)	malloc(size)
#define kvzalloc(size, gfp)	calloc(1, size)
#define kfree(p)		free(p)
#define kvfree(p)		free(p)

static inline void set_bit_le(unsigned int bit, unsigned long *words)
{
	((u8 *)words)[bit / 8] |= 1 << bit % 8;
}

static inline const void *memchr_inv(const void *p, int c, size_t size)
{
	const u8 *bytes = p;

	for (; size; bytes++, size--)
		if (*bytes != (u8)c)
			return bytes;
	return NULL;
}

#define QCOW_SECTOR		512u

enum qcow_metadata {
	QCOW_METADATA_HEADER,
	QCOW_METADATA_BITMAPS,
	QCOW_METADATA_BITMAP,
};

struct qcow_bitmaps;

/* @kinds: of each cluster, -1 for none */
struct qcow_file {
	u8 *data;
	u64 size;
	signed char *kinds;
	u32 cluster_bits;
};

struct qcow_image {
	struct qcow_header header;
	struct qcow_bitmaps *bitmaps;
	struct qcow_file file;
	bool writable;
	bool failed;
	int lock;
	u64 size;
	u32 cluster_bits;
	u32 block_bits;
};

struct qcow_block {
	void *data;
};

struct qcow_free {
	u64 cluster;
	u64 count;
	bool punch;
};

struct qcow_snapshot {
	u64 l1_table_offset;
	u32 l1_size;
	bool has_size;
	u64 size;
	u64 id_offset;
	u32 id_size;
	u32 name_size;
	u64 next;
};

static inline u32 qcow_cluster_size(const struct qcow_image *image)
{
	return 1U << image->cluster_bits;
}

static inline u32 qcow_block_size(const struct qcow_image *image)
{
	return 1U << image->block_bits;
}

static inline bool qcow_image_has(const struct qcow_image *image, u64 host_offset, u64 length)
{
	u64 end = round_up((u64)image->file.size, (u64)qcow_cluster_size(image));

	return length <= end && host_offset <= end - length;
}

static inline int qcow_image_error(const struct qcow_image *image)
{
	return image->failed ? -EIO : 0;
}

#define qcow_image_fail(image, ...)	((image)->failed = true)

struct qcow_block *qcow_block_get(struct qcow_image *image, u64 host_offset);
void qcow_block_put(struct qcow_block *block);
int qcow_file_read(struct qcow_file *file, void *buf, size_t length, u64 host_offset);
int qcow_file_write(struct qcow_file *file, const void *buf, size_t length, u64 host_offset);
int qcow_file_sync(struct qcow_file *file);
int qcow_refcount_get(struct qcow_image *image, u64 cluster, u64 *count);
int qcow_alloc_clusters(struct qcow_image *image, u64 want, u64 *cluster, u64 *got,
			bool *zeroed);
int qcow_commit_all(struct qcow_image *image);
struct qcow_free *qcow_free_alloc(struct qcow_image *image);
void qcow_free_queue_locked(struct qcow_image *image, struct qcow_free *free);
void qcow_overlap_add(struct qcow_image *image, int kind, u64 host_offset, u64 length);
void qcow_overlap_remove(struct qcow_image *image, u64 host_offset, u64 length);
bool qcow_overlap_is_only(struct qcow_image *image, int kind, u64 host_offset, u64 length);
int qcow_overlap_expect(struct qcow_image *image, int kind, u64 host_offset);

int qcow_snapshot_next(struct qcow_image *image, struct qcow_snapshot *snapshot,
		       struct qcow_message *msg);
int qcow_snapshot_select(struct qcow_image *image, const char *wanted,
			 struct qcow_message *msg);
int qcow_bitmaps_load(struct qcow_image *image, struct qcow_message *msg);
int qcow_bitmaps_mark(struct qcow_image *image);
void qcow_bitmaps_set(struct qcow_image *image, u64 guest_offset, u64 length);
int qcow_bitmaps_store(struct qcow_image *image);
void qcow_bitmaps_exit(struct qcow_image *image);

#endif /* QCOW_H */
