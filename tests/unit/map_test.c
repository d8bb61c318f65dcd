// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: from guest offsets to extents, in one image and through chains.
 */
#include <kunit/test.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "image_builder.h"

#define COPIED		QCOW_OFLAG_COPIED
#define NO_HOST		U64_MAX

/* Expect one extent at a guest offset, of at least the length given. */
static void expect_extent(struct kunit *test, struct qcow_image *image,
			  u64 guest_offset, u64 length,
			  enum qcow_extent_type type, u64 host_offset,
			  u64 min_length)
{
	struct qcow_extent extent = {};

	KUNIT_ASSERT_EQ_MSG(test, qcow_map_layer(image, guest_offset, length,
						 &extent), 0,
			    "at 0x%llx", guest_offset);
	KUNIT_EXPECT_EQ_MSG(test, extent.type, type, "at 0x%llx", guest_offset);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, image);
	KUNIT_EXPECT_GE_MSG(test, extent.length, min_length, "at 0x%llx",
			    guest_offset);
	KUNIT_EXPECT_LE_MSG(test, extent.length, length, "at 0x%llx",
			    guest_offset);
	if (host_offset != NO_HOST)
		KUNIT_EXPECT_EQ_MSG(test, extent.host_offset, host_offset,
				    "at 0x%llx", guest_offset);
}

/* ---- arithmetic ----------------------------------------------------------- */

static const u32 cluster_sizes[] = {
	9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
};

static void cluster_size_desc(const u32 *bits, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%u bytes", 1U << *bits);
}

KUNIT_ARRAY_PARAM(cluster_size, cluster_sizes, cluster_size_desc);

static void every_offset_is_found(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	u64 cs = 1ULL << bits, per_l2 = 1ULL << (2 * bits - 3);
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = 2 * per_l2 + 3 * cs + 512,
	};
	u64 guest[] = {
		0, 2 * cs, per_l2 - cs, per_l2, per_l2 + cs, 2 * per_l2 - 2 * cs,
		2 * per_l2, 2 * per_l2 + 3 * cs,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 host[ARRAY_SIZE(guest)];
	struct qcow_image *image;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(guest); i++) {
		host[i] = qcow_test_disk_alloc(disk, 1);
		qcow_test_disk_map(disk, guest[i], host[i] | COPIED);
	}
	image = qcow_test_image_open(qcow_test_file_create(disk), false);
	KUNIT_EXPECT_EQ(test, image->size, spec.size);

	for (i = 0; i < ARRAY_SIZE(guest) - 1; i++) {
		expect_extent(test, image, guest[i], cs, QCOW_EXTENT_DATA,
			      host[i], cs);
		expect_extent(test, image, guest[i] + cs - 512, 512,
			      QCOW_EXTENT_DATA, host[i] + cs - 512, 512);
	}
	/* The last cluster is there for 512 bytes only. */
	expect_extent(test, image, guest[i], 512, QCOW_EXTENT_DATA, host[i], 512);

	expect_extent(test, image, cs, cs, QCOW_EXTENT_UNALLOCATED, NO_HOST, 512);
	expect_extent(test, image, per_l2 - 2 * cs, cs, QCOW_EXTENT_UNALLOCATED,
		      NO_HOST, 512);
	expect_extent(test, image, 2 * per_l2 - cs, cs, QCOW_EXTENT_UNALLOCATED,
		      NO_HOST, 512);
	expect_extent(test, image, 2 * per_l2 + cs, cs, QCOW_EXTENT_UNALLOCATED,
		      NO_HOST, 512);
}

static void a_missing_l2_table_is_unallocated(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image;

	image = qcow_test_image_open(qcow_test_file_create(disk), false);
	expect_extent(test, image, 0, SZ_1M, QCOW_EXTENT_UNALLOCATED, NO_HOST,
		      512);
	expect_extent(test, image, SZ_1M - 512, 512, QCOW_EXTENT_UNALLOCATED,
		      NO_HOST, 512);
}

/* ---- entries -------------------------------------------------------------- */

/* Offsets are those of an image with 64 KiB clusters: L2 at 4, data at 5. */
#define L2_AT		(4ULL << 16)
#define DATA_AT		(5ULL << 16)

struct entry_case {
	const char *name;
	u32 version;
	bool l1;		/* the entry is one of the L1 table */
	u64 entry;
	int error;
	enum qcow_extent_type type;
	bool in_place;
};

static const struct entry_case entry_cases[] = {
	{ .name = "0 is unallocated", .type = QCOW_EXTENT_UNALLOCATED },
	{ .name = "COPIED without a cluster", .entry = COPIED,
	  .type = QCOW_EXTENT_UNALLOCATED },
	{ .name = "data", .entry = DATA_AT | COPIED, .type = QCOW_EXTENT_DATA,
	  .in_place = true },
	{ .name = "shared data", .entry = DATA_AT, .type = QCOW_EXTENT_DATA },
	{ .name = "zero", .entry = QCOW_OFLAG_ZERO, .type = QCOW_EXTENT_ZERO },
	{ .name = "zero with a cluster",
	  .entry = DATA_AT | COPIED | QCOW_OFLAG_ZERO, .type = QCOW_EXTENT_ZERO },
	{ .name = "zero with a shared cluster",
	  .entry = DATA_AT | QCOW_OFLAG_ZERO, .type = QCOW_EXTENT_ZERO },
	{ .name = "data in v2", .version = 2, .entry = DATA_AT | COPIED,
	  .type = QCOW_EXTENT_DATA, .in_place = true },
	{ .name = "zero in v2", .version = 2, .entry = QCOW_OFLAG_ZERO,
	  .error = -EIO },
	{ .name = "zero with a cluster in v2", .version = 2,
	  .entry = DATA_AT | COPIED | QCOW_OFLAG_ZERO, .error = -EIO },
	{ .name = "data that is not aligned", .entry = DATA_AT | COPIED | 512,
	  .error = -EIO },
	{ .name = "zero with a cluster that is not aligned",
	  .entry = DATA_AT | COPIED | 512 | QCOW_OFLAG_ZERO, .error = -EIO },
	{ .name = "reserved bit 1", .entry = DATA_AT | COPIED | 2,
	  .error = -EIO },
	{ .name = "reserved bit 8", .entry = DATA_AT | COPIED | 0x100,
	  .error = -EIO },
	{ .name = "reserved bit 56", .entry = DATA_AT | COPIED | BIT_ULL(56),
	  .error = -EIO },
	{ .name = "reserved bit 61", .entry = DATA_AT | COPIED | BIT_ULL(61),
	  .error = -EIO },
	{ .name = "compressed", .entry = QCOW_OFLAG_COMPRESSED | DATA_AT,
	  .type = QCOW_EXTENT_COMPRESSED },
	{ .name = "compressed at any byte",
	  .entry = QCOW_OFLAG_COMPRESSED | (DATA_AT + 12345),
	  .type = QCOW_EXTENT_COMPRESSED },
	{ .name = "compressed, up to behind the end of the file",
	  .entry = QCOW_OFLAG_COMPRESSED | 255ULL << 54 | DATA_AT,
	  .type = QCOW_EXTENT_COMPRESSED },
	{ .name = "compressed, COPIED",
	  .entry = QCOW_OFLAG_COMPRESSED | DATA_AT | COPIED, .error = -EIO },
	{ .name = "compressed, in the header",
	  .entry = QCOW_OFLAG_COMPRESSED | 0xffff, .error = -EIO },
	{ .name = "all bits", .entry = U64_MAX & ~QCOW_OFLAG_COMPRESSED, .error = -EIO },

	{ .name = "L1: shared L2 table", .l1 = true, .entry = L2_AT,
	  .type = QCOW_EXTENT_DATA },
	{ .name = "L1: none", .l1 = true, .entry = 0,
	  .type = QCOW_EXTENT_UNALLOCATED },
	{ .name = "L1: COPIED without a table", .l1 = true, .entry = COPIED,
	  .type = QCOW_EXTENT_UNALLOCATED },
	{ .name = "L1: not aligned", .l1 = true, .entry = (L2_AT + 512) | COPIED,
	  .error = -EIO },
	{ .name = "L1: reserved bit 0", .l1 = true, .entry = L2_AT | COPIED | 1,
	  .error = -EIO },
	{ .name = "L1: reserved bit 56", .l1 = true,
	  .entry = L2_AT | COPIED | BIT_ULL(56), .error = -EIO },
	{ .name = "L1: reserved bit 62", .l1 = true,
	  .entry = L2_AT | COPIED | BIT_ULL(62), .error = -EIO },
	{ .name = "L1: L2 table behind the end of the file", .l1 = true,
	  .entry = (1ULL << 40) | COPIED, .type = QCOW_EXTENT_UNALLOCATED },
};

static void entry_desc(const struct entry_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(entry, entry_cases, entry_desc);

static void an_entry_is_judged(struct kunit *test)
{
	const struct entry_case *c = test->param_value;
	struct qcow_test_spec spec = { .version = c->version, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_extent extent = {};
	struct qcow_image *image;
	u64 next;
	int ret;

	KUNIT_ASSERT_EQ(test, qcow_test_disk_add_data(disk, 0, 1), DATA_AT);
	next = qcow_test_disk_add_data(disk, SZ_64K, 1);
	qcow_test_disk_map(disk, 0, c->l1 ? DATA_AT : c->entry);
	if (c->l1)
		qcow_test_disk_set_l1_entry(disk, 0, c->entry);

	image = qcow_test_image_open(qcow_test_file_create(disk), false);
	ret = qcow_map_layer(image, 0, SZ_64K, &extent);
	KUNIT_ASSERT_EQ(test, ret, c->error);
	if (!ret) {
		KUNIT_EXPECT_EQ(test, extent.type, c->type);
		if (c->type == QCOW_EXTENT_DATA) {
			KUNIT_EXPECT_EQ(test, extent.host_offset, DATA_AT);
			KUNIT_EXPECT_EQ(test, extent.in_place, c->in_place);
		}
	}
	/* Its neighbour can be read, whatever this one is. */
	if (!c->l1)
		expect_extent(test, image, SZ_64K, SZ_64K, QCOW_EXTENT_DATA,
			      next, SZ_64K);
}

/* Behind the end of a file there are zeroes, until something is written there. */
static void data_far_behind_the_end_is_damage_to_a_writer(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_extent extent;
	struct qcow_image *image;
	u64 host = qcow_test_disk_add_data(disk, 0, 1);

	qcow_test_disk_map(disk, SZ_64K, (host + SZ_64K) | COPIED);
	qcow_test_disk_map(disk, 2 * SZ_64K, BIT_ULL(50) | COPIED);
	tf = qcow_test_file_create(disk);
	image = qcow_test_image_open(tf, false);
	expect_extent(test, image, 2 * SZ_64K, SZ_64K, QCOW_EXTENT_DATA,
		      BIT_ULL(50), SZ_64K);
	KUNIT_ASSERT_EQ(test, qcow_test_image_close(test, image), 0);

	image = qcow_test_image_open(tf, true);
	expect_extent(test, image, 0, SZ_64K, QCOW_EXTENT_DATA, host, SZ_64K);
	KUNIT_EXPECT_FALSE(test, image->corrupt);
	KUNIT_EXPECT_EQ(test, qcow_map_layer(image, 0, 2 * SZ_64K, &extent),
			-EIO);
	KUNIT_EXPECT_EQ(test, qcow_map_layer(image, SZ_64K, 512, &extent), -EIO);
	KUNIT_EXPECT_EQ(test, qcow_map_layer(image, 2 * SZ_64K, 512, &extent),
			-EIO);
	KUNIT_EXPECT_TRUE(test, image->corrupt);
}

static void damage_stops_writes_not_reads(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_extent extent;
	struct qcow_image *image;
	u64 host = qcow_test_disk_add_data(disk, 0, 1);

	qcow_test_disk_map(disk, SZ_64K, (host + 512) | COPIED);
	image = qcow_test_image_open(qcow_test_file_create(disk), true);
	KUNIT_EXPECT_EQ(test, qcow_image_error(image), 0);
	KUNIT_EXPECT_EQ(test, qcow_map_layer(image, SZ_64K, 512, &extent), -EIO);
	KUNIT_EXPECT_NE(test, qcow_image_error(image), 0);
	expect_extent(test, image, 0, SZ_64K, QCOW_EXTENT_DATA, host, SZ_64K);
}

/* ---- opening ------------------------------------------------------------- */

static void autoclear_bits_are_cleared_before_all_else(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.size = SZ_1M, .autoclear = ~QCOW_AUTOCLEAR_RAW_DATA_FILE,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf = qcow_test_file_create(disk);
	const struct qcow_disk_header *header;
	struct qcow_test_event *event;
	struct qcow_image *image;

	qcow_test_file_log(tf, true);
	image = qcow_test_image_open(tf, false);
	KUNIT_EXPECT_TRUE(test, list_empty(&tf->log));
	KUNIT_ASSERT_EQ(test, qcow_test_image_close(test, image), 0);

	/* To open it changes nothing; then one write, and a barrier behind it. */
	image = qcow_test_image_open(tf, true);
	KUNIT_EXPECT_TRUE(test, list_empty(&tf->log));
	KUNIT_ASSERT_EQ(test, qcow_image_begin(image, NULL), 0);
	KUNIT_ASSERT_FALSE(test, list_empty(&tf->log));
	event = list_first_entry(&tf->log, struct qcow_test_event, node);
	KUNIT_EXPECT_EQ(test, event->kind, QCOW_TEST_WRITE);
	KUNIT_EXPECT_EQ(test, event->offset, 0);
	KUNIT_ASSERT_FALSE(test, list_is_last(&event->node, &tf->log));
	event = list_next_entry(event, node);
	KUNIT_EXPECT_EQ(test, event->kind, QCOW_TEST_SYNC);
	KUNIT_EXPECT_TRUE(test, list_is_last(&event->node, &tf->log));
	header = (const void *)qcow_test_file_load(tf)->bytes;
	KUNIT_EXPECT_EQ(test, be64_to_cpu(header->autoclear_features), 0);
}

/* ---- extents -------------------------------------------------------------- */

static void neighbours_in_the_file_are_one_extent(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *image;
	u64 host, far, i;

	qcow_test_disk_map(disk, 0, 0);
	host = qcow_test_disk_alloc(disk, 8);
	far = qcow_test_disk_alloc(disk, 20) + 19 * 4096;
	for (i = 0; i < 8; i++)
		qcow_test_disk_map(disk, (10 + i) * 4096,
				   (host + i * 4096) | COPIED);
	qcow_test_disk_map(disk, 18 * 4096, far | COPIED);
	qcow_test_disk_map(disk, 19 * 4096, 1);
	qcow_test_disk_map(disk, 20 * 4096, 1);
	image = qcow_test_image_open(qcow_test_file_create(disk), false);

	expect_extent(test, image, 10 * 4096, 8 * 4096, QCOW_EXTENT_DATA, host,
		      8 * 4096);
	expect_extent(test, image, 12 * 4096 + 512, 3 * 4096, QCOW_EXTENT_DATA,
		      host + 2 * 4096 + 512, 3 * 4096);
	/* It ends where the next is elsewhere, */
	expect_extent(test, image, 16 * 4096, 2 * 4096, QCOW_EXTENT_DATA,
		      host + 6 * 4096, 2 * 4096);
	KUNIT_ASSERT_EQ(test, image->cluster_bits, 12);
	{
		struct qcow_extent extent;

		KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 16 * 4096, SZ_64K,
						     &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.length, 2 * 4096);
		/* or of another kind, */
		KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 18 * 4096, SZ_64K,
						     &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.host_offset, far);
		KUNIT_EXPECT_EQ(test, extent.length, 4096);
		KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 19 * 4096, SZ_64K,
						     &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_ZERO);
		KUNIT_EXPECT_EQ(test, extent.length, 2 * 4096);
		/* and what is not allocated is as long as that. */
		KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 0, SZ_1M, &extent),
				0);
		KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_UNALLOCATED);
		KUNIT_EXPECT_EQ(test, extent.length, 10 * 4096);
	}
}

static void shared_and_exclusive_clusters_are_told_apart(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_extent extent;
	struct qcow_image *image;
	u64 host = qcow_test_disk_alloc(disk, 2);

	qcow_test_disk_map(disk, 0, host | COPIED);
	qcow_test_disk_map(disk, 4096, host + 4096);
	image = qcow_test_image_open(qcow_test_file_create(disk), true);

	KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 0, 8192, &extent), 0);
	/* One extent may hold both only if it does not claim to be exclusive. */
	KUNIT_EXPECT_TRUE(test, !extent.in_place || extent.length == 4096);
	KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 0, 4096, &extent), 0);
	KUNIT_EXPECT_TRUE(test, extent.in_place);
	KUNIT_ASSERT_EQ(test, qcow_map_layer(image, 4096, 4096, &extent), 0);
	KUNIT_EXPECT_FALSE(test, extent.in_place);
}

/* ---- chains --------------------------------------------------------------- */

#define BUF_BYTES	SZ_64K

/* Expect that a range reads as what qcow_test_fill() made with a seed. */
static void expect_seed(struct kunit *test, struct qcow_chain *chain,
			u64 guest_offset, u64 length, u32 seed)
{
	u8 *buf = kunit_kzalloc(test, BUF_BYTES, GFP_KERNEL);
	u64 end = guest_offset + length, step, at;

	KUNIT_ASSERT_NOT_NULL(test, buf);
	while (guest_offset < end) {
		step = min_t(u64, end - guest_offset, BUF_BYTES);
		memset(buf, 0x5a, step);
		KUNIT_ASSERT_EQ(test, qcow_chain_read(chain, guest_offset, step,
						      buf), 0);
		for (at = 0; at < step; at += 512)
			KUNIT_ASSERT_EQ_MSG(test,
					    qcow_test_seed(buf + at,
							   guest_offset + at),
					    seed, "at 0x%llx",
					    guest_offset + at);
		guest_offset += step;
	}
	kunit_kfree(test, buf);
}

static void a_longer_raw_backing_file_shows_through(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_chain *chain;

	qcow_test_disk_add_data(disk, 0, 1);
	qcow_test_disk_map(disk, 2 * SZ_64K, QCOW_OFLAG_ZERO);
	qcow_test_disk_add_data(disk, SZ_1M - SZ_64K, 1);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(disk),
						     false),
				qcow_test_raw_open(qcow_test_raw_create(test,
									2 * SZ_1M,
									2)),
				NULL);
	expect_seed(test, chain, 0, SZ_64K, 1);
	expect_seed(test, chain, SZ_64K, SZ_64K, 2);
	expect_seed(test, chain, 2 * SZ_64K, SZ_64K, 0);
	expect_seed(test, chain, 3 * SZ_64K, SZ_1M - 4 * SZ_64K, 2);
	expect_seed(test, chain, SZ_1M - SZ_64K, SZ_64K, 1);
}

static void a_shorter_raw_backing_file_ends_in_zeroes(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 end = 100 * 1024 + 512;
	struct qcow_chain *chain;

	qcow_test_disk_add_data(disk, 0, 1);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(disk),
						     false),
				qcow_test_raw_open(qcow_test_raw_create(test, end,
									2)),
				NULL);
	expect_seed(test, chain, 0, SZ_64K, 1);
	expect_seed(test, chain, SZ_64K, end - SZ_64K, 2);
	/* Within a cluster, and in clusters that it does not have at all. */
	expect_seed(test, chain, end, SZ_1M - end, 0);
}

static void an_empty_backing_file_is_zeroes(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_chain *chain;

	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(disk),
						     false),
				qcow_test_raw_open(qcow_test_raw_create(test, 0, 2)),
				NULL);
	expect_seed(test, chain, 0, SZ_1M, 0);
}

static void no_backing_file_is_zeroes(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_chain *chain;

	qcow_test_disk_add_data(disk, SZ_64K, 1);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(disk),
						     false), NULL, NULL);
	expect_seed(test, chain, 0, SZ_64K, 0);
	expect_seed(test, chain, SZ_64K, SZ_64K, 1);
	expect_seed(test, chain, 2 * SZ_64K, SZ_1M - 2 * SZ_64K, 0);
}

static void data_behind_the_end_of_the_file_is_zeroes(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	u64 host = qcow_test_disk_add_data(disk, 0, 1);

	/* The file ends within the last cluster, as QEMU's files do. */
	disk->size = host + 5 * 512;
	tf = qcow_test_file_create(disk);
	chain = qcow_test_chain(test, qcow_test_image_open(tf, false), NULL, NULL);
	expect_seed(test, chain, 0, 5 * 512, 1);
	expect_seed(test, chain, 5 * 512, SZ_64K - 5 * 512, 0);
}

struct chain_case {
	const char *name;
	u32 top_bits;
	u32 below_bits;
	u32 bottom_bits;
	u64 below_size;
	u64 bottom_size;
};

static const struct chain_case chain_cases[] = {
	{ "equal", 16, 16, 16, SZ_1M, SZ_1M },
	{ "small on large clusters", 9, 12, 18, SZ_1M, SZ_1M },
	{ "large on small clusters", 18, 12, 9, SZ_1M, SZ_1M },
	{ "large between small ones", 10, 20, 9, SZ_1M, SZ_1M },
	{ "ever shorter", 12, 14, 16, SZ_512K + 512, SZ_256K + 1536 },
	{ "short in the middle", 16, 9, 12, SZ_256K - 512, 2 * SZ_1M },
	{ "ever longer", 9, 16, 9, 2 * SZ_1M, 3 * SZ_1M },
};

static void chain_desc(const struct chain_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(chain, chain_cases, chain_desc);

/* An image in which some clusters have data, some are zero, most are nothing. */
static struct qcow_test_disk *speckled(struct kunit *test, u32 bits, u64 size,
				       u32 seed)
{
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = size,
		.room = max(64ULL, 8ULL * SZ_1M >> bits),
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 cs = 1ULL << bits, at;

	/* Coarse enough for large clusters, odd enough for small ones. */
	for (at = 0; at < size; at += cs) {
		switch (((at >> 12) * 7 + (at >> 16) + seed) % 5) {
		case 0:
			qcow_test_disk_add_data(disk, at, seed);
			break;
		case 1:
			qcow_test_disk_map(disk, at, QCOW_OFLAG_ZERO);
			break;
		}
	}
	return disk;
}

/* What a chain of such images must read as, one sector of it. */
static u32 model(struct qcow_test_disk **disks, u64 *sizes, u64 guest_offset)
{
	u8 sector[512];
	u32 i;

	for (i = 0; i < 3 && guest_offset < sizes[i]; i++)
		if (qcow_test_disk_read(disks[i], guest_offset, sector))
			return qcow_test_seed(sector, guest_offset);
	return 0;
}

static void a_chain_reads_as_its_layers_say(struct kunit *test)
{
	const struct chain_case *c = test->param_value;
	u64 sizes[] = { SZ_1M, c->below_size, c->bottom_size };
	struct qcow_test_disk *disks[] = {
		speckled(test, c->top_bits, sizes[0], 1),
		speckled(test, c->below_bits, sizes[1], 2),
		speckled(test, c->bottom_bits, sizes[2], 3),
	};
	struct qcow_image *images[3];
	struct qcow_chain *chain;
	u8 *buf = kunit_kzalloc(test, BUF_BYTES, GFP_KERNEL);
	u64 at, step, sector;
	u32 i, pass, seen = 0;

	KUNIT_ASSERT_NOT_NULL(test, buf);
	for (i = 0; i < 3; i++)
		images[i] = qcow_test_image_open(qcow_test_file_create(disks[i]),
						 false);
	chain = qcow_test_chain(test, images[0], images[1], images[2]);

	/* In steps that are no multiple of anything; and again, from what is kept. */
	for (pass = at = 0; pass < 2; at += step) {
		if (at == SZ_1M) {
			at = 0;
			pass++;
		}
		step = min_t(u64, SZ_1M - at, 512 * (1 + (at >> 9) % 113));
		memset(buf, 0x5a, step);
		KUNIT_ASSERT_EQ(test, qcow_chain_read(chain, at, step, buf), 0);
		for (sector = 0; sector < step; sector += 512) {
			u32 want = model(disks, sizes, at + sector);

			seen |= 1U << want;
			KUNIT_ASSERT_EQ_MSG(test,
					    qcow_test_seed(buf + sector,
							   at + sector),
					    want, "at 0x%llx", at + sector);
		}
	}
	/* Or this has not tested much. */
	KUNIT_EXPECT_GE(test, hweight32(seen), 3);
}

static void extents_of_a_chain_name_their_layer(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &spec);
	struct qcow_image *top_image, *below_image, *raw_image;
	struct qcow_extent extent;
	struct qcow_chain *chain;
	u64 top_host, below_host;

	top_host = qcow_test_disk_add_data(top, 0, 1);
	below_host = qcow_test_disk_add_data(below, 0, 2);
	below_host = qcow_test_disk_add_data(below, SZ_64K, 2);
	qcow_test_disk_map(below, 2 * SZ_64K, QCOW_OFLAG_ZERO);
	top_image = qcow_test_image_open(qcow_test_file_create(top), false);
	below_image = qcow_test_image_open(qcow_test_file_create(below), false);
	raw_image = qcow_test_raw_open(qcow_test_raw_create(test, SZ_512K, 3));
	chain = qcow_test_chain(test, top_image, below_image, raw_image);

	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, 512, 512, &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, top_image);
	KUNIT_EXPECT_EQ(test, extent.host_offset, top_host + 512);

	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, SZ_64K + 512, 512, &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, below_image);
	KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_DATA);
	KUNIT_EXPECT_EQ(test, extent.host_offset, below_host + 512);

	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, 2 * SZ_64K, 512, &extent), 0);
	KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_ZERO);

	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, 3 * SZ_64K, 512, &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, raw_image);
	KUNIT_EXPECT_EQ(test, extent.host_offset, 3 * SZ_64K);

	/* Behind the end of the last layer. */
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, SZ_512K, 512, &extent), 0);
	KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_ZERO);

	/* From the second layer on, as copy on write looks at it. */
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 1, SZ_64K, 512, &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, below_image);
}

static void what_is_in_memory_is_mapped_without_reading(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *top_file, *below_file;
	struct qcow_extent extent, cached;
	struct qcow_chain *chain;
	u64 offset;

	qcow_test_disk_add_data(top, 0, 1);
	qcow_test_disk_map(top, 3 * SZ_64K, 3 | DATA_AT);
	qcow_test_disk_add_data(below, SZ_64K, 2);
	top_file = qcow_test_file_create(top);
	below_file = qcow_test_file_create(below);
	chain = qcow_test_chain(test, qcow_test_image_open(top_file, false),
				qcow_test_image_open(below_file, false), NULL);

	/* Nothing is: then it is not read either. */
	qcow_cache_drop_all(chain->layers[0]);
	qcow_cache_drop_all(chain->layers[1]);
	top_file->read_budget = 0;
	below_file->read_budget = 0;
	KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, 0, 512, &cached),
			-EAGAIN);

	/* What the top layer has, but not what is below. */
	top_file->read_budget = -1;
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, 0, 512, &extent), 0);
	top_file->read_budget = 0;
	KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, 0, 512, &cached), 0);
	KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, SZ_64K, 512,
					      &cached), -EAGAIN);
	KUNIT_EXPECT_EQ(test, qcow_map_layer_cached(chain->layers[0], SZ_64K,
						    512, &cached), 0);
	KUNIT_EXPECT_EQ(test, cached.type, QCOW_EXTENT_UNALLOCATED);

	/* All of it, and damage. */
	below_file->read_budget = -1;
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, SZ_64K, 512, &extent), 0);
	below_file->read_budget = 0;
	for (offset = 0; offset < SZ_1M; offset += cached.length) {
		if (offset == 3 * SZ_64K) {
			KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, offset, 512,
							      &cached), -EIO);
			cached.length = SZ_64K;
			continue;
		}
		KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, offset, SZ_1M - offset,
					       &extent), 0);
		KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, offset,
						      SZ_1M - offset, &cached),
				0);
		KUNIT_EXPECT_EQ(test, cached.type, extent.type);
		KUNIT_EXPECT_PTR_EQ(test, cached.image, extent.image);
		KUNIT_EXPECT_EQ(test, cached.host_offset, extent.host_offset);
		KUNIT_EXPECT_EQ(test, cached.length, extent.length);
	}
}

static void expect_remembered(struct kunit *test, struct qcow_chain *chain,
			      u64 guest_offset, u64 length)
{
	struct qcow_extent walked, kept, below;
	u32 i;

	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, guest_offset, length, &walked),
			0);
	/* Without a look at what is below. */
	for (i = 1; i < chain->depth; i++)
		qcow_cache_drop_all(chain->layers[i]);
	KUNIT_ASSERT_EQ_MSG(test, qcow_map_cached(chain, guest_offset, length,
						  &kept),
			    0, "at 0x%llx", guest_offset);
	KUNIT_EXPECT_EQ(test, kept.type, walked.type);
	KUNIT_EXPECT_EQ(test, kept.length, walked.length);
	if (kept.type != QCOW_EXTENT_ZERO)
		KUNIT_EXPECT_PTR_EQ(test, kept.image, walked.image);
	if (kept.type == QCOW_EXTENT_DATA)
		KUNIT_EXPECT_EQ(test, kept.host_offset, walked.host_offset);
	/* And as copy on write looks at it. */
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 1, guest_offset, length, &below),
			0);
	KUNIT_EXPECT_EQ(test, below.type, walked.type);
	KUNIT_EXPECT_EQ(test, below.length, walked.length);
}

static void a_long_chain_is_walked_once(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_128K + 512 };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *top_file;
	struct qcow_image *top_image;
	struct qcow_chain *chain;
	struct qcow_extent extent;
	u64 offset, host;

	/* An L2 table is for 32 KiB: there is one for the first of them. */
	qcow_test_disk_add_data(top, 0, 1);
	host = qcow_test_disk_add_data(below, 512, 2);
	KUNIT_ASSERT_EQ(test, qcow_test_disk_add_data(below, 1024, 2),
			host + 512);
	qcow_test_disk_map(below, 2048, QCOW_OFLAG_ZERO);
	qcow_test_disk_add_data(below, SZ_64K, 2);
	top_file = qcow_test_file_create(top);
	top_image = qcow_test_image_open(top_file, false);
	chain = qcow_test_chain(test, top_image,
				qcow_test_image_open(qcow_test_file_create(below),
						     false),
				qcow_test_raw_open(qcow_test_raw_create(test,
									SZ_128K,
									3)));
	for (offset = 512; offset < spec.size; offset += 512)
		expect_remembered(test, chain, offset, 512);
	/* As one run, where it is one, and no more than that. */
	KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, 512, SZ_64K, &extent), 0);
	KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_DATA);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, chain->layers[1]);
	KUNIT_EXPECT_EQ(test, extent.host_offset, host);
	KUNIT_EXPECT_EQ(test, extent.length, 1024);
	KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, SZ_64K + 512, SZ_64K,
					      &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, chain->layers[2]);
	KUNIT_EXPECT_EQ(test, extent.host_offset, SZ_64K + 512);
	KUNIT_EXPECT_EQ(test, extent.length, SZ_32K - 512);
	KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, 2048, 512, &extent), 0);
	KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_ZERO);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, chain->layers[1]);

	/* To itself the layer has nothing there. */
	for (offset = 512; offset < spec.size; offset += 512) {
		KUNIT_ASSERT_EQ(test, qcow_map_layer(top_image, offset, 512,
						     &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_UNALLOCATED);
	}
}

/* Of three layers that have nothing, each cluster, and one of which two have a part. */
static void what_nobody_has_is_remembered_too(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_128K };
	struct qcow_test_spec small = { .cluster_bits = 9, .size = SZ_128K };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &small);
	struct qcow_test_disk *bottom = qcow_test_disk_create(test, &small);
	struct qcow_extent extent;
	struct qcow_chain *chain;
	u64 at;

	qcow_test_disk_add_data(below, SZ_8K, 2);
	qcow_test_disk_add_data(bottom, SZ_8K + 512, 3);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(top),
						     false),
				qcow_test_image_open(qcow_test_file_create(below),
						     false),
				qcow_test_image_open(qcow_test_file_create(bottom),
						     false));
	for (at = 0; at < SZ_128K; at += SZ_4K) {
		if (at == SZ_8K)
			continue;
		KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, at, SZ_4K, &extent), 0);
		KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, at, SZ_4K, &extent),
				0);
		KUNIT_EXPECT_EQ(test, extent.type, QCOW_EXTENT_ZERO);
		KUNIT_EXPECT_PTR_EQ(test, extent.image, chain->layers[2]);
		KUNIT_EXPECT_EQ(test, extent.length, SZ_4K);
	}
	for (at = SZ_8K; at < SZ_8K + SZ_4K; at += 512) {
		enum qcow_extent_type type = at < SZ_8K + 1024 ?
			QCOW_EXTENT_DATA : QCOW_EXTENT_ZERO;

		KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, at, 512, &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.type, type);
		KUNIT_ASSERT_EQ(test, qcow_map_cached(chain, at, 512, &extent), 0);
		KUNIT_EXPECT_EQ(test, extent.type, type);
		if (at == SZ_8K)
			KUNIT_EXPECT_PTR_EQ(test, extent.image,
					    chain->layers[1]);
		if (at == SZ_8K + 512)
			KUNIT_EXPECT_PTR_EQ(test, extent.image,
					    chain->layers[2]);
	}
}

/* What resolve.c would write into memory is not believed if it is in the file. */
static void a_resolution_in_the_file_is_damage(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &spec);
	struct qcow_extent extent;
	struct qcow_chain *chain;

	qcow_test_disk_map(top, 0, QCOW_L2_RESOLVED | DATA_AT);
	qcow_test_disk_map(top, SZ_64K, QCOW_L2_RESOLVED | BIT(2) | DATA_AT);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(top),
						     false),
				qcow_test_image_open(qcow_test_file_create(below),
						     false),
				qcow_test_raw_open(qcow_test_raw_create(test,
									SZ_1M,
									3)));
	KUNIT_ASSERT_EQ(test, qcow_map(chain, 0, 2 * SZ_64K, 512, &extent), 0);
	KUNIT_EXPECT_PTR_EQ(test, extent.image, chain->layers[2]);
	KUNIT_EXPECT_EQ(test, qcow_map(chain, 0, 0, 512, &extent), -EIO);
	KUNIT_EXPECT_EQ(test, qcow_map(chain, 0, SZ_64K, 512, &extent), -EIO);
	KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, SZ_64K, 512, &extent), -EIO);
	/* So nothing is remembered in its neighbours either. */
	KUNIT_EXPECT_EQ(test, qcow_map_cached(chain, 2 * SZ_64K, 512, &extent),
			-EAGAIN);
}

static void a_broken_backing_file_is_an_error(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *top = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *below = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	u8 *buf = kunit_kzalloc(test, SZ_4K, GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, buf);
	qcow_test_disk_add_data(top, 0, 1);
	qcow_test_disk_add_data(below, SZ_64K, 2);
	qcow_test_disk_map(below, 2 * SZ_64K, 2 | DATA_AT);
	tf = qcow_test_file_create(below);
	chain = qcow_test_chain(test,
				qcow_test_image_open(qcow_test_file_create(top),
						     false),
				qcow_test_image_open(tf, false), NULL);
	KUNIT_EXPECT_EQ(test, qcow_chain_read(chain, 2 * SZ_64K, SZ_4K, buf),
			-EIO);
	expect_seed(test, chain, SZ_64K, SZ_64K, 2);
	tf->read_budget = 0;
	KUNIT_EXPECT_EQ(test, qcow_chain_read(chain, SZ_64K, SZ_4K, buf), -EIO);
	expect_seed(test, chain, 0, SZ_64K, 1);
	tf->read_budget = -1;
	expect_seed(test, chain, SZ_64K, SZ_64K, 2);
}

static void a_table_that_could_not_be_read_is_read_again(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_extent extent;
	struct qcow_image *image;
	u64 host = qcow_test_disk_add_data(disk, 0, 1);

	tf = qcow_test_file_create(disk);
	image = qcow_test_image_open(tf, false);
	qcow_cache_drop_all(image);
	tf->read_budget = 0;
	tf->read_error = -ENOMEM;
	KUNIT_EXPECT_LT(test, qcow_map_layer(image, 0, 512, &extent), 0);
	tf->read_budget = -1;
	expect_extent(test, image, 0, SZ_64K, QCOW_EXTENT_DATA, host, SZ_64K);
}

static struct kunit_case map_test_cases[] = {
	KUNIT_CASE_PARAM(every_offset_is_found, cluster_size_gen_params),
	KUNIT_CASE(a_missing_l2_table_is_unallocated),
	KUNIT_CASE_PARAM(an_entry_is_judged, entry_gen_params),
	KUNIT_CASE(data_far_behind_the_end_is_damage_to_a_writer),
	KUNIT_CASE(damage_stops_writes_not_reads),
	KUNIT_CASE(autoclear_bits_are_cleared_before_all_else),
	KUNIT_CASE(neighbours_in_the_file_are_one_extent),
	KUNIT_CASE(shared_and_exclusive_clusters_are_told_apart),
	KUNIT_CASE(a_longer_raw_backing_file_shows_through),
	KUNIT_CASE(a_shorter_raw_backing_file_ends_in_zeroes),
	KUNIT_CASE(an_empty_backing_file_is_zeroes),
	KUNIT_CASE(no_backing_file_is_zeroes),
	KUNIT_CASE(data_behind_the_end_of_the_file_is_zeroes),
	KUNIT_CASE_PARAM(a_chain_reads_as_its_layers_say, chain_gen_params),
	KUNIT_CASE(extents_of_a_chain_name_their_layer),
	KUNIT_CASE(what_is_in_memory_is_mapped_without_reading),
	KUNIT_CASE(a_long_chain_is_walked_once),
	KUNIT_CASE(what_nobody_has_is_remembered_too),
	KUNIT_CASE(a_resolution_in_the_file_is_damage),
	KUNIT_CASE(a_broken_backing_file_is_an_error),
	KUNIT_CASE(a_table_that_could_not_be_read_is_read_again),
	{}
};

static struct kunit_suite map_test_suite = {
	.name = "qcow-map",
	.test_cases = map_test_cases,
};

kunit_test_suite(map_test_suite);
