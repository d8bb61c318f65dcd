/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Images for unit tests: made in memory, checked in memory, and put into files
 * in memory that remember what is done to them.
 *
 * A struct qcow_test_disk is the content of an image file in a plain buffer. It
 * is made and inspected with code of its own that shares nothing with the driver
 * but the structures of format.h, so a mistake in the driver's arithmetic does
 * not cancel itself out here.
 *
 * A struct qcow_test_file is a file on tmpfs with such a content. It can fail
 * writes and barriers, and it can keep a log of them, from which every content
 * that a power cut could have left behind is made and checked.
 *
 * Everything belongs to a test and goes away with it. What cannot be done fails
 * an assertion, so nothing here returns an error.
 */
#ifndef QCOW_IMAGE_BUILDER_H
#define QCOW_IMAGE_BUILDER_H

#include <kunit/test.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/spinlock.h>

#include "../../drivers/block/qcow/qcow.h"

/**
 * struct qcow_test_spec - what an image is to be like
 * @version: 2 or 3; 0 for 3
 * @cluster_bits: 0 for 16
 * @refcount_bits: width of a refcount; 0 for 16
 * @size: of the guest's disk, bytes
 * @reftable_clusters: 0 for 1
 * @room: how many clusters the buffer has space for; 0 for enough
 * @incompatible: feature bits
 * @compatible: feature bits
 * @autoclear: feature bits
 */
struct qcow_test_spec {
	u32 version;
	u32 cluster_bits;
	u32 refcount_bits;
	u64 size;
	u32 reftable_clusters;
	u32 room;
	u64 incompatible;
	u64 compatible;
	u64 autoclear;
};

/**
 * struct qcow_test_disk - the content of an image file
 * @test: whose
 * @bytes: the content
 * @size: length of the file in bytes
 * @room: length of @bytes
 * @cluster_bits: of the image
 * @packed: where the next compressed data goes, bytes; 0 for a new cluster
 * @memo: the compressed cluster that was read last
 */
struct qcow_test_disk {
	struct kunit *test;
	u8 *bytes;
	u64 size;
	u64 room;
	u32 cluster_bits;
	u64 packed;
	struct qcow_test_memo *memo;
};

/**
 * struct qcow_test_result - what is wrong with an image
 * @clusters: how many are in use
 * @data_clusters: how many of the guest's clusters have a place in the file
 * @leaks: clusters with a refcount that is too high
 * @errors: clusters with a refcount that is too low, and entries that are
 *	invalid
 * @copied_wrong: entries of the active tables with the COPIED flag, but with a
 *	refcount that is not one: they would be overwritten though shared
 * @copied_missing: entries of the active tables without the flag, with a
 *	refcount of one
 * @first: the first problem in words
 */
struct qcow_test_result {
	u64 clusters;
	u64 data_clusters;
	u64 leaks;
	u64 errors;
	u64 copied_wrong;
	u64 copied_missing;
	char first[96];
};

struct qcow_test_disk *qcow_test_disk_create(struct kunit *test,
					     const struct qcow_test_spec *spec);
void qcow_test_disk_free(struct qcow_test_disk *disk);
u64 qcow_test_disk_alloc(struct qcow_test_disk *disk, u64 clusters);
u64 qcow_test_disk_refcount(struct qcow_test_disk *disk, u64 cluster);
void qcow_test_disk_set_refcount(struct qcow_test_disk *disk, u64 cluster,
				 u64 count);
u64 qcow_test_disk_l1_entry(struct qcow_test_disk *disk, u64 guest_offset);
void qcow_test_disk_set_l1_entry(struct qcow_test_disk *disk, u64 guest_offset,
				 u64 entry);
u64 qcow_test_disk_entry(struct qcow_test_disk *disk, u64 guest_offset);
u64 qcow_test_disk_bitmap(struct qcow_test_disk *disk, u64 guest_offset);
void qcow_test_disk_map(struct qcow_test_disk *disk, u64 guest_offset,
			u64 entry);
void qcow_test_disk_map_sub(struct qcow_test_disk *disk, u64 guest_offset,
			    u64 entry, u64 bitmap);
u64 qcow_test_disk_add_data(struct qcow_test_disk *disk, u64 guest_offset,
			    u32 seed);
u32 qcow_test_compress(struct kunit *test, u32 type, const void *src, u32 length,
		       void *dst, u32 room);
u64 qcow_test_disk_pack(struct qcow_test_disk *disk, u64 guest_offset,
			const void *data, u32 length);
u64 qcow_test_disk_add_packed(struct qcow_test_disk *disk, u64 guest_offset,
			      u32 seed);
void qcow_test_disk_snapshot(struct qcow_test_disk *disk);
void qcow_test_disk_check(struct qcow_test_disk *disk,
			  struct qcow_test_result *result);
void qcow_test_disk_expect_clean(struct qcow_test_disk *disk);
bool qcow_test_disk_read(struct qcow_test_disk *disk, u64 guest_offset,
			 u8 *sector);

/* What qcow_test_seed() says of data that nobody wrote. */
#define QCOW_TEST_GARBAGE	U32_MAX

void qcow_test_fill(void *buf, u64 guest_offset, u64 length, u32 seed);
bool qcow_test_filled(const void *buf, u64 guest_offset, u64 length, u32 seed);
u32 qcow_test_seed(const void *sector, u64 guest_offset);

/* struct qcow_test_event.kind */
enum qcow_test_event_kind {
	QCOW_TEST_WRITE,
	QCOW_TEST_PUNCH,
	QCOW_TEST_SYNC,
	QCOW_TEST_MARK,
};

/**
 * struct qcow_test_event - something that was done to a file
 * @node: in the file's log
 * @kind: what
 * @offset: where; for a mark, what it marks
 * @length: how much
 * @data: what was written
 */
struct qcow_test_event {
	struct list_head node;
	enum qcow_test_event_kind kind;
	u64 offset;
	u64 length;
	u8 data[];
};

/**
 * struct qcow_test_file - a file in memory
 * @test: whose
 * @base: the file; I/O on it is neither logged nor failed
 * @cluster_bits: of the image in it
 * @lock: a spinlock, as the driver's completions may log
 * @log: of struct qcow_test_event
 * @logging: keep the log
 * @writes: how many there have been
 * @syncs: how many barriers there have been
 * @write_budget: so many writes work and then none does; negative for all
 * @write_error: what they fail with
 * @sync_error: what barriers fail with, or 0
 * @read_budget: so many reads work and then none does; negative for all
 * @read_error: what they fail with
 */
struct qcow_test_file {
	struct kunit *test;
	struct file *base;
	u32 cluster_bits;
	spinlock_t lock;	/* guards what follows */
	struct list_head log;
	bool logging;
	u64 writes;
	u64 syncs;
	s64 write_budget;
	int write_error;
	int sync_error;
	s64 read_budget;
	int read_error;
};

struct qcow_test_file *qcow_test_file_create(struct qcow_test_disk *disk);
struct qcow_test_file *qcow_test_raw_create(struct kunit *test, u64 size,
					    u32 seed);
struct file *qcow_test_file_open(struct qcow_test_file *tf, bool writable);
struct qcow_test_disk *qcow_test_file_load(struct qcow_test_file *tf);
void qcow_test_file_log(struct qcow_test_file *tf, bool on);
void qcow_test_file_mark(struct qcow_test_file *tf, u64 mark);

typedef void (*qcow_test_crash_fn)(struct qcow_test_disk *disk, u64 mark,
				   void *private);
u64 qcow_test_crashes(struct qcow_test_file *tf,
		      struct qcow_test_disk *before, u32 subsets,
		      qcow_test_crash_fn check, void *private);

struct qcow_image *qcow_test_image_open(struct qcow_test_file *tf,
					bool writable);
struct qcow_image *qcow_test_image_open_cached(struct qcow_test_file *tf,
					       bool writable, u64 limit);
struct qcow_image *qcow_test_snapshot_open(struct qcow_test_file *tf,
					   const char *snapshot);
struct qcow_image *qcow_test_raw_open(struct qcow_test_file *tf);
int qcow_test_try_open(struct qcow_test_file *tf, const char *snapshot,
		       bool writable, struct qcow_message *msg);
struct qcow_chain *qcow_test_chain(struct kunit *test, struct qcow_image *top,
				   struct qcow_image *below,
				   struct qcow_image *bottom);
int qcow_test_image_close(struct kunit *test, struct qcow_image *image);
struct qcow_test_disk *qcow_test_close_and_load(struct qcow_test_file *tf,
						struct qcow_image *image);

#endif /* QCOW_IMAGE_BUILDER_H */
