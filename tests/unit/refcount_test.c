// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: refcounts of every width, and the allocator.
 *
 * What the allocator hands out is linked to nothing here, so in the image that
 * is left behind exactly those clusters are leaked. That is how their number is
 * checked.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/bitmap.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "image_builder.h"

/* ---- numbers in a block --------------------------------------------------- */

#define BLOCK_BYTES	64

static const u32 orders[] = { 0, 1, 2, 3, 4, 5, 6 };

static void order_desc(const u32 *order, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%u bits", 1U << *order);
}

KUNIT_ARRAY_PARAM(order, orders, order_desc);

static u64 max_count(u32 order)
{
	return order == 6 ? U64_MAX : (1ULL << (1U << order)) - 1;
}

/* The specification: below a byte from the lowest bit up, else big-endian. */
static u64 spec_load(const u8 *block, u32 order, u32 index)
{
	u32 width = 1U << order;
	u64 value = 0;
	u32 i;

	if (width < 8)
		return block[index * width / 8] >> (index * width % 8) &
		       max_count(order);
	for (i = 0; i < width / 8; i++)
		value = value << 8 | block[index * (width / 8) + i];
	return value;
}

static void counts_are_stored_as_specified(struct kunit *test)
{
	u32 order = *(const u32 *)test->param_value;
	u32 entries = BLOCK_BYTES * 8 >> order;
	u64 values[] = {
		0, 1, max_count(order), max_count(order) / 3,
		max_count(order) - max_count(order) / 3,
	};
	u8 backgrounds[] = { 0x00, 0xff, 0x5a };
	u8 *block = kunit_kzalloc(test, BLOCK_BYTES, GFP_KERNEL);
	u32 i, v;

	KUNIT_ASSERT_NOT_NULL(test, block);
	for (i = 0; i < entries; i++) {
		for (v = 0; v < ARRAY_SIZE(values); v++) {
			memset(block, backgrounds[v % ARRAY_SIZE(backgrounds)],
			       BLOCK_BYTES);
			qcow_refcount_store(block, order, i, values[v]);
			KUNIT_EXPECT_EQ(test, values[v],
					spec_load(block, order, i));
			KUNIT_EXPECT_EQ(test, values[v],
					qcow_refcount_load(block, order, i));
		}
	}
}

static void a_count_touches_no_neighbour(struct kunit *test)
{
	u32 order = *(const u32 *)test->param_value;
	u32 entries = BLOCK_BYTES * 8 >> order;
	u8 *block = kunit_kzalloc(test, BLOCK_BYTES, GFP_KERNEL);
	u32 i;

	KUNIT_ASSERT_NOT_NULL(test, block);
	/* forwards and backwards, so that each has been next to both */
	for (i = 0; i < entries; i++)
		qcow_refcount_store(block, order, i, i % 2 ? max_count(order) : 1);
	for (i = entries; i-- > 0; )
		qcow_refcount_store(block, order, i,
				    i % 3 ? max_count(order) - i % 2 : 0);
	for (i = 0; i < entries; i++)
		KUNIT_EXPECT_EQ(test, qcow_refcount_load(block, order, i),
				i % 3 ? max_count(order) - i % 2 : 0);
}

/* ---- counts of an image --------------------------------------------------- */

static void counts_of_an_image_are_found(struct kunit *test)
{
	u32 order = *(const u32 *)test->param_value;
	struct qcow_test_spec spec = {
		.cluster_bits = 9, .refcount_bits = 1U << order,
		.size = SZ_1M, .reftable_clusters = 2, .room = 3000,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 per_block = 512 * 8 >> order;
	u64 at[] = { 200, per_block - 1, per_block, 2 * per_block + 3, 5000 };
	struct qcow_image *image;
	u64 count;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(at); i++)
		qcow_test_disk_set_refcount(disk, at[i], max_count(order));
	image = qcow_test_image_open(qcow_test_file_create(disk), true);

	for (i = 0; i < ARRAY_SIZE(at); i++) {
		count = 77;
		KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, at[i], &count), 0);
		KUNIT_EXPECT_EQ_MSG(test, count, max_count(order),
				    "cluster %llu", at[i]);
	}
	for (i = 0; i < 4; i++) {
		KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, i, &count), 0);
		KUNIT_EXPECT_EQ_MSG(test, count, 1, "cluster %u", i);
	}
	/* No refcount block, no place in the table, no end of the numbers. */
	KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, per_block * 100, &count),
			0);
	KUNIT_EXPECT_EQ(test, count, 0);
	KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, per_block * 128, &count),
			0);
	KUNIT_EXPECT_EQ(test, count, 0);
	KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, QCOW_MAX_HOST_OFFSET >> 9,
						&count), 0);
	KUNIT_EXPECT_EQ(test, count, 0);
}

/* ---- the allocator -------------------------------------------------------- */

/* Clusters that were handed out, and that must not be again. */
struct taken {
	struct kunit *test;
	unsigned long *map;
	u64 limit;
	u64 count;
};

static void free_map(struct kunit_resource *res)
{
	vfree(res->data);
}

static int make_map(struct kunit_resource *res, void *context)
{
	res->data = vzalloc(*(u64 *)context / 8 + 8);
	return res->data ? 0 : -ENOMEM;
}

static struct taken *taken_init(struct kunit *test, u64 limit)
{
	struct taken *taken = kunit_kzalloc(test, sizeof(*taken), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, taken);
	taken->test = test;
	taken->limit = limit;
	taken->map = kunit_alloc_resource(test, make_map, free_map, GFP_KERNEL,
					  &limit);
	KUNIT_ASSERT_NOT_NULL(test, taken->map);
	return taken;
}

/*
 * All that has a refcount in the image is taken; but for the refcount table,
 * which is free once it has been replaced by a larger one.
 */
static struct taken *taken_in(struct qcow_test_disk *disk, u64 limit)
{
	struct taken *taken = taken_init(disk->test, limit);
	u64 i;

	for (i = 0; i < disk->size >> disk->cluster_bits; i++)
		if (i != 1 && qcow_test_disk_refcount(disk, i))
			set_bit(i, taken->map);
	return taken;
}

static void take(struct qcow_image *image, struct taken *taken, u64 cluster,
		 u64 count)
{
	u64 table = image->reftable_offset >> image->cluster_bits;
	struct kunit *test = taken->test;
	u64 i;

	KUNIT_EXPECT_NE(test, cluster, 0);
	KUNIT_EXPECT_TRUE(test, cluster + count <= table ||
			  cluster >= table + image->reftable_clusters);
	KUNIT_ASSERT_LE(test, cluster + count, taken->limit);
	for (i = 0; i < count; i++)
		if (test_and_set_bit(cluster + i, taken->map))
			KUNIT_FAIL(test, "cluster %llu is in use", cluster + i);
	taken->count += count;
}

/* Allocate, and see for oneself whether what is said to be zero is. */
static int alloc(struct kunit *test, struct qcow_image *image, u64 want,
		 u64 *cluster, u64 *got)
{
	bool zeroed = false;
	u8 *buf;
	u64 i;
	int err;

	err = qcow_alloc_clusters(image, want, cluster, got, &zeroed);
	if (err)
		return err;
	KUNIT_ASSERT_GE(test, *got, 1);
	KUNIT_ASSERT_LE(test, *got, want);
	KUNIT_EXPECT_GE(test, qcow_file_size(&image->file),
			(*cluster + *got) << image->cluster_bits);
	if (!zeroed)
		return 0;
	buf = kunit_kzalloc(test, BLOCK_BYTES * 8, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, buf);
	for (i = 0; i < *got; i++) {
		KUNIT_ASSERT_EQ(test, qcow_file_read(&image->file, buf, 512,
						     (*cluster + i) <<
						     image->cluster_bits), 0);
		if (memchr_inv(buf, 0, 512))
			KUNIT_FAIL(test, "cluster %llu is not zero",
				   *cluster + i);
	}
	kunit_kfree(test, buf);
	return 0;
}

/* Take @total clusters in requests of @want. */
static void take_many(struct qcow_image *image, struct taken *taken, u64 total,
		      u64 want)
{
	u64 cluster, got;

	for (; total; total -= got) {
		KUNIT_ASSERT_EQ(taken->test,
				alloc(taken->test, image, min(want, total),
				      &cluster, &got), 0);
		take(image, taken, cluster, got);
	}
}

static void give_back(struct kunit *test, struct qcow_image *image, u64 cluster,
		      u64 count)
{
	struct qcow_free *free = qcow_free_alloc(image);
	unsigned long flags;

	KUNIT_ASSERT_NOT_NULL(test, free);
	free->cluster = cluster;
	free->count = count;
	spin_lock_irqsave(&image->lock, flags);
	qcow_free_queue_locked(image, free);
	spin_unlock_irqrestore(&image->lock, flags);
}

/* After a clean detach exactly @leaks clusters are leaked, nothing is wrong. */
static void expect_leaks(struct qcow_test_disk *disk, u64 leaks)
{
	struct qcow_test_result result;

	qcow_test_disk_check(disk, &result);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.errors, 0, "%s", result.first);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.leaks, leaks, "%s", result.first);
	KUNIT_EXPECT_EQ(disk->test, result.copied_wrong, 0);
}

struct alloc_case {
	const char *name;
	u32 cluster_bits;
	u32 refcount_bits;
	u64 total;
	u64 want;
};

/*
 * With clusters of 512 bytes and refcounts of 64 bits a refcount block covers 64
 * clusters, and a refcount table of one cluster 4096.
 */
static const struct alloc_case alloc_cases[] = {
	{ "one cluster", 16, 16, 1, 1 },
	{ "one by one", 16, 16, 50, 1 },
	{ "at once", 16, 16, 50, 50 },
	{ "4 KiB clusters over refcount blocks", 12, 16, 5000, 1000 },
	{ "512 B clusters, 64 bits, over a refcount block", 9, 64, 200, 3 },
	{ "512 B clusters, 64 bits, over the refcount table", 9, 64, 9000, 17 },
	{ "512 B clusters, 64 bits, runs over blocks", 9, 64, 9000, 700 },
	{ "512 B clusters, 1 bit", 9, 1, 9000, 64 },
	{ "512 B clusters, 2 bits", 9, 2, 5000, 5 },
	{ "512 B clusters, 4 bits", 9, 4, 5000, 33 },
	{ "512 B clusters, 8 bits", 9, 8, 5000, 100 },
	{ "1 KiB clusters, 32 bits", 10, 32, 5000, 11 },
	{ "4 KiB clusters, 64 bits", 12, 64, 3000, 40 },
	{ "2 MiB clusters", 21, 16, 20, 7 },
};

static void alloc_desc(const struct alloc_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(alloc, alloc_cases, alloc_desc);

static void what_is_handed_out_is_counted(struct kunit *test)
{
	const struct alloc_case *c = test->param_value;
	struct qcow_test_spec spec = {
		.cluster_bits = c->cluster_bits,
		.refcount_bits = c->refcount_bits,
		.size = 8ULL << c->cluster_bits,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	struct taken *taken = taken_in(disk, 8 * c->total + 100000);
	u64 i, count;

	take_many(image, taken, c->total, c->want);
	for (i = 0; i < taken->limit; i++) {
		if (!test_bit(i, taken->map))
			continue;
		KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, i, &count), 0);
		KUNIT_EXPECT_EQ_MSG(test, count, 1, "cluster %llu", i);
	}
	expect_leaks(qcow_test_close_and_load(tf, image), c->total);
}

static void a_run_is_contiguous_where_there_is_room(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 first, got, next;

	KUNIT_ASSERT_EQ(test, alloc(test, image, 64, &first, &got), 0);
	KUNIT_EXPECT_EQ(test, got, 64);
	KUNIT_ASSERT_EQ(test, alloc(test, image, 64, &next, &got), 0);
	KUNIT_EXPECT_EQ(test, got, 64);
	KUNIT_EXPECT_EQ(test, next, first + 64);
}

static void clusters_in_use_are_not_handed_out(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 12, .size = SZ_1M, .room = 600,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 first = qcow_test_disk_alloc(disk, 300) >> 12;
	struct qcow_test_file *tf;
	struct qcow_image *image;
	struct taken *taken;
	u64 i;

	/* Leave holes of one to seven clusters between those in use. */
	for (i = 0; i < 300; i++)
		if (i % 11 < i % 7 + 1)
			qcow_test_disk_set_refcount(disk, first + i, 0);
		else
			qcow_test_disk_set_refcount(disk, first + i, 1 + i % 3);
	tf = qcow_test_file_create(disk);
	image = qcow_test_image_open(tf, true);
	taken = taken_in(disk, 10000);
	take_many(image, taken, 500, 4);
}

static void freed_clusters_wait_for_a_commit(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	struct taken *taken = taken_in(disk, 1000);
	u64 cluster, got, i, count;

	KUNIT_ASSERT_EQ(test, alloc(test, image, 8, &cluster, &got), 0);
	KUNIT_ASSERT_EQ(test, got, 8);
	take(image, taken, cluster, got);
	KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);

	give_back(test, image, cluster, 8);
	/* Still in use as far as the allocator knows. */
	take_many(image, taken, 20, 4);

	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	for (i = 0; i < 8; i++) {
		KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, cluster + i,
							&count), 0);
		KUNIT_EXPECT_EQ_MSG(test, count, 0, "cluster %llu", cluster + i);
	}
	expect_leaks(qcow_test_close_and_load(tf, image), 20);
}

static void everything_can_be_given_back(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 9, .refcount_bits = 64, .size = SZ_1M,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got, total;

	for (total = 0; total < 6000; total += got) {
		KUNIT_ASSERT_EQ(test, alloc(test, image, 50, &cluster, &got), 0);
		give_back(test, image, cluster, got);
		if (total % 7 == 0)
			KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);
	}
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	expect_leaks(qcow_test_close_and_load(tf, image), 0);
}

static void what_was_freed_is_used_again(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got, round, last = 0;

	/* With one cluster in use at a time the file does not grow for ever. */
	for (round = 0; round < 1500; round++) {
		KUNIT_ASSERT_EQ(test, alloc(test, image, 1, &cluster, &got), 0);
		last = max(last, cluster);
		give_back(test, image, cluster, 1);
		if (round % 10 == 0)
			KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	}
	KUNIT_EXPECT_LT(test, last, 1000);
}

static u64 count_of(struct kunit *test, struct qcow_image *image, u64 cluster)
{
	u64 count = 0;

	KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, cluster, &count), 0);
	return count;
}

static u64 take_bytes(struct kunit *test, struct qcow_image *image, u32 size)
{
	u64 host_offset = 0;

	KUNIT_ASSERT_EQ(test, qcow_alloc_bytes(image, size, &host_offset), 0);
	return host_offset;
}

static void bytes_are_packed_and_count_where_they_lie(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 12, .refcount_bits = 2, .size = SZ_1M,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image =
		qcow_test_image_open(qcow_test_file_create(disk), true);
	u64 first = take_bytes(test, image, 1000), next, other, got;
	u64 cluster = first >> 12;

	KUNIT_EXPECT_EQ(test, first & 4095, 0);
	/* Over the border of two clusters that follow each other */
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 3500), first + 1000);
	KUNIT_EXPECT_EQ(test, count_of(test, image, cluster), 2);
	KUNIT_EXPECT_EQ(test, count_of(test, image, cluster + 1), 1);
	/* Two bits have room for three. */
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 10), first + 4500);
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 20), first + 4510);
	KUNIT_EXPECT_EQ(test, count_of(test, image, cluster + 1), 3);
	next = take_bytes(test, image, 30);
	KUNIT_EXPECT_EQ(test, next, first + 2 * 4096);

	/* Not on across a cluster that is somebody else's */
	KUNIT_ASSERT_EQ(test, alloc(test, image, 1, &other, &got), 0);
	KUNIT_EXPECT_EQ(test, other, (next >> 12) + 1);
	first = take_bytes(test, image, 4090);
	KUNIT_EXPECT_EQ(test, first, (other + 1) << 12);
	KUNIT_EXPECT_EQ(test, count_of(test, image, next >> 12), 1);
	/* To the very end of a cluster; then a new one */
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 6), first + 4090);
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 6), first + 4096);

	/* Nothing joins what is about to be freed. */
	qcow_alloc_forget(image, (first >> 12) + 2, 100);
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 6), first + 4096 + 6);
	qcow_alloc_forget(image, (first >> 12) + 1, 1);
	KUNIT_EXPECT_EQ(test, take_bytes(test, image, 6), first + 2 * 4096);
}

static void a_shared_cluster_survives_one_drop(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 cluster = qcow_test_disk_alloc(disk, 1) >> 16;
	struct qcow_image *image;
	u64 count;

	qcow_test_disk_set_refcount(disk, cluster, 3);
	image = qcow_test_image_open(qcow_test_file_create(disk), true);

	give_back(test, image, cluster, 1);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, cluster, &count), 0);
	KUNIT_EXPECT_EQ(test, count, 2);
	give_back(test, image, cluster, 1);
	give_back(test, image, cluster, 1);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, cluster, &count), 0);
	KUNIT_EXPECT_EQ(test, count, 0);
}

static void a_count_below_zero_is_damage(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image;

	image = qcow_test_image_open(qcow_test_file_create(disk), true);
	give_back(test, image, 15, 1);
	qcow_commit_all(image);
	KUNIT_EXPECT_TRUE(test, image->corrupt);
	KUNIT_EXPECT_NE(test, qcow_image_error(image), 0);
}

struct damage_case {
	const char *name;
	u64 entry;		/* of the refcount table, for cluster 0 and on */
};

static const struct damage_case damage_cases[] = {
	{ "not aligned", 2 * 65536 + 512 },
	{ "reserved bits", 2 * 65536 + 1 },
	{ "on the header, with a reserved bit", 1 },
	{ "beyond all files", 1ULL << 63 },
	{ "none, where the header is counted", 0 },
};

static void damage_desc(const struct damage_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(damage, damage_cases, damage_desc);

static void a_bad_refcount_table_stops_allocation(struct kunit *test)
{
	const struct damage_case *c = test->param_value;
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_message msg = {};
	struct qcow_image *image;
	__be64 entry = cpu_to_be64(c->entry);
	u64 cluster, got;

	memcpy(disk->bytes + 65536, &entry, sizeof(entry));
	tf = qcow_test_file_create(disk);
	/* It may be noticed as early as that. */
	if (qcow_test_try_open(tf, NULL, true, &msg))
		return;
	image = qcow_test_image_open(tf, true);
	KUNIT_EXPECT_NE(test, alloc(test, image, 1, &cluster, &got), 0);
	KUNIT_EXPECT_TRUE(test, image->corrupt);
	KUNIT_EXPECT_EQ(test, qcow_test_image_close(test, image), 0);
	/* It may be marked corrupt, and is otherwise what it was. */
	disk = qcow_test_file_load(tf);
	KUNIT_EXPECT_EQ(test, memcmp(disk->bytes, "QFI\xfb", 4), 0);
}

static void the_cluster_of_the_header_is_not_handed_out(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image;
	u64 cluster, got;

	qcow_test_disk_set_refcount(disk, 0, 0);
	image = qcow_test_image_open(qcow_test_file_create(disk), true);
	KUNIT_EXPECT_EQ(test, alloc(test, image, 1, &cluster, &got), -EIO);
	KUNIT_EXPECT_TRUE(test, image->corrupt);
}

static void a_read_error_is_told_and_harmless(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got, count;

	qcow_cache_drop_all(image);
	tf->read_budget = 0;
	KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, 1, &count), -EIO);
	KUNIT_EXPECT_EQ(test, alloc(test, image, 1, &cluster, &got), -EIO);
	tf->read_budget = -1;
	KUNIT_EXPECT_FALSE(test, image->corrupt);
	KUNIT_EXPECT_EQ(test, qcow_refcount_get(image, 1, &count), 0);
	KUNIT_EXPECT_EQ(test, count, 1);
	KUNIT_EXPECT_EQ(test, alloc(test, image, 1, &cluster, &got), 0);
	expect_leaks(qcow_test_close_and_load(tf, image), 1);
}

static void after_a_failed_barrier_nothing_is_allocated(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got;

	KUNIT_ASSERT_EQ(test, alloc(test, image, 1, &cluster, &got), 0);
	tf->sync_error = -EIO;
	KUNIT_EXPECT_NE(test, qcow_commit(image), 0);
	/* A barrier that works again proves nothing. */
	tf->sync_error = 0;
	KUNIT_EXPECT_NE(test, qcow_commit(image), 0);
	KUNIT_EXPECT_NE(test, qcow_image_error(image), 0);
}

/* Also where what was taken ends just where the next block begins. */
static void refcount_blocks_are_made_in_a_row(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_64K };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got, count;

	do {
		KUNIT_ASSERT_EQ(test, alloc(test, image, 256, &cluster, &got), 0);
	} while (cluster + got < 256);
	KUNIT_ASSERT_EQ(test, cluster + got, 256);
	/* It counts itself, and lies where what it counts begins. */
	KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, 256, &count), 0);
	KUNIT_EXPECT_EQ(test, count, 1);
	KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);
	expect_leaks(qcow_test_close_and_load(tf, image), 256 - (disk->size >> 9));
}

/* What was in flight when a block was made need not have its entry. */
static void a_commit_that_began_before_makes_no_block_reachable(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_64K };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got;

	KUNIT_ASSERT_EQ(test, alloc(test, image, 1, &cluster, &got), 0);
	KUNIT_ASSERT_EQ(test, image->pending_first, 1);
	KUNIT_ASSERT_GT(test, image->pending_end, 1);
	image->pending_ticket++;
	KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);
	KUNIT_EXPECT_EQ(test, image->pending_first, 1);
	KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);
	KUNIT_EXPECT_EQ(test, image->pending_first, image->pending_end);
}

/*
 * The allocator is sent to the end of what the refcount table covers, as getting
 * there would take 32 GiB. The last growth may add little to the table.
 */
static void the_table_grows_to_its_limit_and_not_beyond(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 9, .refcount_bits = 64, .size = SZ_64K,
		.reftable_clusters = 16384 - 1, .room = 20000,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 i, j, cluster, got, count, offset;
	int err = 0;

	for (i = 0; i < 3 && !err; i++) {
		image->alloc_cursor = (u64)image->reftable_clusters * 64 * 64;
		err = alloc(test, image, 1, &cluster, &got);
		KUNIT_EXPECT_LE(test, image->reftable_clusters, 16384);
		offset = image->reftable_offset >> 9;
		for (j = 0; j < image->reftable_clusters; j += 1000) {
			KUNIT_ASSERT_EQ(test, qcow_refcount_get(image, offset + j,
								&count), 0);
			KUNIT_EXPECT_EQ_MSG(test, count, 1, "table cluster %llu",
					    j);
		}
	}
	KUNIT_EXPECT_EQ(test, err, -ENOSPC);
	KUNIT_EXPECT_EQ(test, qcow_image_error(image), 0);
}

/* A crash may leave a few; more would take the allocator long to get past. */
static void what_is_counted_far_behind_the_end_is_damage(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 21, .size = SZ_16M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image;
	u64 i, cluster, got;

	/* In blocks of 4 KiB, of which the third begins 8 GiB into the file. */
	for (i = disk->size >> 21; i < 4200; i++)
		qcow_test_disk_set_refcount(disk, i, 1);
	image = qcow_test_image_open(qcow_test_file_create(disk), true);
	KUNIT_EXPECT_EQ(test, alloc(test, image, 1, &cluster, &got), -EIO);
	KUNIT_EXPECT_TRUE(test, image->corrupt);
	KUNIT_EXPECT_LT(test, qcow_file_size(&image->file), SZ_1G);
}

/* Entries have 56 bits for an offset. A refcount table may cover more. */
static void nothing_is_taken_where_no_entry_reaches(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 21, .size = SZ_16M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	u64 cluster, got;

	image->alloc_cursor = QCOW_MAX_HOST_OFFSET >> 21;
	KUNIT_ASSERT_EQ(test, alloc(test, image, 4, &cluster, &got), 0);
	KUNIT_EXPECT_LT(test, cluster, 1000);
	expect_leaks(qcow_test_close_and_load(tf, image), got);
}

/*
 * The allocator's own crash safety: whatever a power cut leaves behind, what is
 * reachable has a refcount. Nothing but refcount blocks and the refcount table
 * becomes reachable here.
 */
static void expect_no_errors(struct qcow_test_disk *disk, u64 mark,
			     void *private)
{
	struct qcow_test_result result;

	qcow_test_disk_check(disk, &result);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.errors, 0, "after %llu: %s", mark,
			    result.first);
}

static void growing_is_safe_at_any_instant(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 9, .refcount_bits = 64, .size = SZ_64K,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	struct qcow_image *image = qcow_test_image_open(tf, true);
	struct taken *taken = taken_in(disk, 100000);
	u64 states, i;

	qcow_test_file_log(tf, true);
	for (i = 0; i < 15; i++) {
		take_many(image, taken, 300, 30);
		KUNIT_ASSERT_EQ(test, qcow_commit(image), 0);
		qcow_test_file_mark(tf, i);
	}
	KUNIT_ASSERT_EQ(test, qcow_test_image_close(test, image), 0);
	qcow_test_file_log(tf, false);
	states = qcow_test_crashes(tf, disk, 4, expect_no_errors, NULL);
	kunit_info(test, "%llu states of a crash\n", states);
	KUNIT_EXPECT_GT(test, states, 100);
}

static struct kunit_case refcount_test_cases[] = {
	KUNIT_CASE_PARAM(counts_are_stored_as_specified, order_gen_params),
	KUNIT_CASE_PARAM(a_count_touches_no_neighbour, order_gen_params),
	KUNIT_CASE_PARAM(counts_of_an_image_are_found, order_gen_params),
	KUNIT_CASE_PARAM(what_is_handed_out_is_counted, alloc_gen_params),
	KUNIT_CASE(a_run_is_contiguous_where_there_is_room),
	KUNIT_CASE(clusters_in_use_are_not_handed_out),
	KUNIT_CASE(freed_clusters_wait_for_a_commit),
	KUNIT_CASE(everything_can_be_given_back),
	KUNIT_CASE(what_was_freed_is_used_again),
	KUNIT_CASE(bytes_are_packed_and_count_where_they_lie),
	KUNIT_CASE(a_shared_cluster_survives_one_drop),
	KUNIT_CASE(a_count_below_zero_is_damage),
	KUNIT_CASE_PARAM(a_bad_refcount_table_stops_allocation,
			 damage_gen_params),
	KUNIT_CASE(the_cluster_of_the_header_is_not_handed_out),
	KUNIT_CASE(a_read_error_is_told_and_harmless),
	KUNIT_CASE(after_a_failed_barrier_nothing_is_allocated),
	KUNIT_CASE(refcount_blocks_are_made_in_a_row),
	KUNIT_CASE(a_commit_that_began_before_makes_no_block_reachable),
	KUNIT_CASE(the_table_grows_to_its_limit_and_not_beyond),
	KUNIT_CASE(what_is_counted_far_behind_the_end_is_damage),
	KUNIT_CASE(nothing_is_taken_where_no_entry_reaches),
	KUNIT_CASE(growing_is_safe_at_any_instant),
	{}
};

static struct kunit_suite refcount_test_suite = {
	.name = "qcow-refcount",
	.test_cases = refcount_test_cases,
};

kunit_test_suite(refcount_test_suite);
