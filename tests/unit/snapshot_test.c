// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: internal snapshots, from the snapshot table to what is read of them.
 */
#include <kunit/test.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "header_fields.h"
#include "image_builder.h"

#define SECTOR		512U
#define SEED_OLD	1U
#define SEED_NEW	2U

/* ---- bytes ---------------------------------------------------------------- */

static void put(u8 *to, u32 bytes, u64 value)
{
	while (bytes--) {
		to[bytes] = value;
		value >>= 8;
	}
}

static u64 get64(const u8 *from)
{
	__be64 value;

	memcpy(&value, from, sizeof(value));
	return be64_to_cpu(value);
}

static void put_field(struct qcow_test_disk *disk, u32 at, u64 value)
{
	put(disk->bytes + at, header_field_bytes(at), value);
}

static u64 get_field(struct qcow_test_disk *disk, u32 at)
{
	return get64(disk->bytes + at);
}

/* ---- making tables -------------------------------------------------------- */

/**
 * struct entry - what an entry of the table is to hold
 * @l1: host offset, bytes
 * @l1_size: entries
 * @extra: length of the extra data in bytes
 * @size: of the disk, where @extra has room for it
 * @id: a string
 * @name: a string
 * @pad: lengthens the name, bytes
 */
struct entry {
	u64 l1;
	u32 l1_size;
	u32 extra;
	u64 size;
	const char *id;
	const char *name;
	u32 pad;
};

/* Append an entry to the table that ends at @at; return where it ends now. */
static u64 put_entry(struct qcow_test_disk *disk, u64 at,
		     const struct entry *entry)
{
	u32 id = strlen(entry->id), name = strlen(entry->name);
	u8 *to = disk->bytes + at;

	KUNIT_ASSERT_LE(disk->test, at + 40 + entry->extra + id + name +
			entry->pad + 8, disk->room);
	put(to, 8, entry->l1);
	put(to + 8, 4, entry->l1_size);
	put(to + 12, 2, id);
	put(to + 14, 2, name + entry->pad);
	put(to + 36, 4, entry->extra);
	if (entry->extra >= 16)
		put(to + 48, 8, entry->size);
	to += 40 + entry->extra;
	memcpy(to, entry->id, id);
	memcpy(to + id, entry->name, name);
	memset(to + id + name, '.', entry->pad);
	return round_up(at + 40 + entry->extra + id + name + entry->pad, 8);
}

static void set_table(struct qcow_test_disk *disk, u64 at, u32 count)
{
	put_field(disk, AT(nb_snapshots), count);
	put_field(disk, AT(snapshots_offset), at);
}

static u64 table_of(struct qcow_test_disk *disk)
{
	return get_field(disk, AT(snapshots_offset));
}

static u32 seed_at(struct kunit *test, struct qcow_image *image,
		   u64 guest_offset)
{
	struct qcow_chain *chain = qcow_test_chain(test, image, NULL, NULL);
	u8 *sector = kunit_kzalloc(test, SECTOR, GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, sector);
	KUNIT_ASSERT_EQ(test, qcow_chain_read(chain, guest_offset, SECTOR,
					      sector), 0);
	return qcow_test_seed(sector, guest_offset);
}

/* ---- what is shown -------------------------------------------------------- */

static const u32 cluster_sizes[] = { 9, 12, 16, 21 };

static void cluster_size_desc(const u32 *bits, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%u bytes", 1U << *bits);
}

KUNIT_ARRAY_PARAM(cluster_size, cluster_sizes, cluster_size_desc);

static void a_snapshot_shows_what_was(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	u64 cs = 1ULL << bits, host;
	struct qcow_test_spec spec = { .cluster_bits = bits, .size = 8 * cs };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_image *now, *then;
	struct qcow_test_file *tf;

	qcow_test_disk_add_data(disk, 0, SEED_OLD);
	qcow_test_disk_snapshot(disk);
	/* The disk gets a table and a cluster of its own, and is half as long. */
	qcow_test_disk_set_l1_entry(disk, 0, 0);
	host = qcow_test_disk_add_data(disk, 0, SEED_NEW);
	put_field(disk, AT(size), 4 * cs);
	tf = qcow_test_file_create(disk);

	now = qcow_test_image_open(tf, false);
	then = qcow_test_snapshot_open(tf, "1");
	KUNIT_EXPECT_PTR_NE(test, now, then);
	KUNIT_EXPECT_EQ(test, now->size, 4 * cs);
	KUNIT_EXPECT_EQ(test, then->size, 8 * cs);
	KUNIT_EXPECT_EQ(test, seed_at(test, now, 0), SEED_NEW);
	KUNIT_EXPECT_EQ(test, seed_at(test, then, 0), SEED_OLD);
	KUNIT_EXPECT_EQ(test, seed_at(test, then, 8 * cs - SECTOR), 0);
	KUNIT_EXPECT_PTR_EQ(test, qcow_test_snapshot_open(tf, "1"), then);
	KUNIT_EXPECT_EQ(test, qcow_test_seed(disk->bytes + host, 0), SEED_NEW);
}

static void an_id_goes_before_a_name(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 l1 = get_field(disk, AT(l1_table_offset));
	u64 table = qcow_test_disk_alloc(disk, 1), at = table;
	struct qcow_test_file *tf;
	static const struct {
		const char *wanted;
		u64 size;
	} cases[] = {
		{ "2", SZ_64K * 2 }, { "1", SZ_64K }, { "x", SZ_64K * 2 },
		{ "12", SZ_64K * 4 }, { "9", SZ_64K * 3 },
	};
	u32 i;

	/* The name of the first is the ID of the second. */
	at = put_entry(disk, at, &(struct entry){
		l1, 1, 16, SZ_64K, "1", "2" });
	at = put_entry(disk, at, &(struct entry){
		l1, 1, 24, SZ_64K * 2, "2", "x" });
	at = put_entry(disk, at, &(struct entry){
		l1, 1, 1024, SZ_64K * 3, "9", "x" });
	at = put_entry(disk, at, &(struct entry){
		l1, 1, 16, SZ_64K * 4, "99", "12" });
	set_table(disk, table, 4);
	tf = qcow_test_file_create(disk);
	for (i = 0; i < ARRAY_SIZE(cases); i++)
		KUNIT_EXPECT_EQ_MSG(test,
				    qcow_test_snapshot_open(tf, cases[i].wanted)->size,
				    cases[i].size, "'%s'", cases[i].wanted);
}

static void entries_lie_across_blocks(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = SZ_16K, .room = (SZ_4M >> bits) + 24,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 l1 = get_field(disk, AT(l1_table_offset));
	u64 table = qcow_test_disk_alloc(disk, max(SZ_512K >> bits, 1)), at = table;
	u32 pads[] = { 0, 455, 4090, U16_MAX - 1, 1 };
	struct qcow_test_file *tf;
	char name[2] = "a";
	u32 i;

	for (i = 0; i < ARRAY_SIZE(pads); i++, name[0]++)
		at = put_entry(disk, at, &(struct entry){
			l1, 1, 16 + i, 4096 * (i + 1), name, name, pads[i] });
	set_table(disk, table, ARRAY_SIZE(pads));
	tf = qcow_test_file_create(disk);
	for (i = 0, name[0] = 'a'; i < ARRAY_SIZE(pads); i++, name[0]++)
		KUNIT_EXPECT_EQ(test, qcow_test_snapshot_open(tf, name)->size,
				4096 * (i + 1));
}

/* ---- what is refused ------------------------------------------------------ */

#define TABLE_AT	(4ULL << 16)

struct table_case {
	const char *name;
	u32 version;		/* 0 for 3 */
	struct entry entry;
	u64 offset;		/* of the table, or 0 for where it is */
	u32 count;		/* of its entries, or 0 for 1 */
	const char *wanted;	/* or NULL for its ID */
	int error;
	const char *says;
	int writable_error;	/* of the image itself */
};

#define L1_AT		(3ULL << 16)

#define ENTRY(l1, l1_size, extra, size)					\
	.entry = { l1, l1_size, extra, size, "1", "one" }
#define GOOD		ENTRY(L1_AT, 1, 16, SZ_1M)

static const struct table_case table_cases[] = {
	{ .name = "a good one", GOOD },
	{ .name = "no such", GOOD, .wanted = "on", .error = -ENOENT,
	  .says = "no snapshot with the ID or the name 'on'" },
	{ .name = "a longer one", GOOD, .wanted = "one ", .error = -ENOENT },
	{ .name = "extra data of 1024 bytes", ENTRY(L1_AT, 1, 1024, SZ_1M) },
	{ .name = "extra data of 1025 bytes", ENTRY(L1_AT, 1, 1025, SZ_1M),
	  .error = -EFBIG, .says = "extra data of 1025 bytes",
	  .writable_error = -EFBIG },
	{ .name = "extra data of 15 bytes", ENTRY(L1_AT, 1, 15, SZ_1M),
	  .error = -EINVAL, .says = "lacks the size" },
	{ .name = "no extra data", ENTRY(L1_AT, 1, 0, SZ_1M),
	  .error = -EINVAL, .says = "lacks the size" },
	{ .name = "v2 needs none", .version = 2, ENTRY(L1_AT, 1, 0, SZ_1M) },
	{ .name = "v2 with some", .version = 2, GOOD },
	{ .name = "l1_table_offset not aligned", ENTRY(512, 1, 16, SZ_1M),
	  .error = -EINVAL, .says = "l1_table_offset is 512" },
	{ .name = "l1_table_offset 0", ENTRY(0, 1, 16, SZ_1M),
	  .error = -EINVAL, .says = "l1_table_offset is 0" },
	{ .name = "l1_table_offset beyond 2^63", ENTRY(BIT_ULL(63), 1, 16, SZ_1M),
	  .error = -EINVAL, .says = "l1_table_offset" },
	{ .name = "l1_table_offset behind the end of the file",
	  ENTRY(BIT_ULL(40), 1, 16, SZ_1M) },
	{ .name = "l1_size 0", ENTRY(L1_AT, 0, 16, SZ_1M),
	  .error = -EINVAL, .says = "l1_size is 0, too small" },
	{ .name = "l1_size 0 of no disk", ENTRY(L1_AT, 0, 16, 0) },
	{ .name = "largest l1_size", ENTRY(L1_AT, SZ_4M, 16, SZ_1M) },
	{ .name = "l1_size too large", ENTRY(L1_AT, SZ_4M + 1, 16, SZ_1M),
	  .error = -EFBIG, .says = "l1_size is 4194305" },
	{ .name = "l1_size all ones", ENTRY(L1_AT, U32_MAX, 16, SZ_1M),
	  .error = -EFBIG, .says = "l1_size" },
	{ .name = "the disk was larger than its L1 table covers",
	  ENTRY(L1_AT, 1, 16, SZ_512M + 1), .error = -EINVAL,
	  .says = "snapshot '1' is damaged: l1_size is 1, too small" },
	{ .name = "the disk was too large", ENTRY(L1_AT, 1, 16, U64_MAX),
	  .error = -EFBIG, .says = "too big" },
	{ .name = "entries of zeroes", GOOD, .count = 65536,
	  .wanted = "x", .error = -ENOENT },
	{ .name = "the table is behind the end of the file", GOOD,
	  .offset = BIT_ULL(40), .error = -ENOENT },
	{ .name = "the table ends at 2^63", GOOD,
	  .offset = BIT_ULL(63) - SZ_64K, .count = 1638, .wanted = "x",
	  .error = -ENOENT },
};

static void table_case_desc(const struct table_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(table_case, table_cases, table_case_desc);

static void every_field_is_checked(struct kunit *test)
{
	const struct table_case *c = test->param_value;
	struct qcow_test_spec spec = { .version = c->version, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_message msg = {};
	struct qcow_test_file *tf;
	u64 table = qcow_test_disk_alloc(disk, 1);
	int ret;

	KUNIT_ASSERT_EQ(test, table, TABLE_AT);
	put_entry(disk, table, &c->entry);
	set_table(disk, c->offset ?: table, c->count ?: 1);
	tf = qcow_test_file_create(disk);

	ret = qcow_test_try_open(tf, c->wanted ?: "1", false, &msg);
	/* Where no file reaches, reading may fail as well. */
	if (c->offset && ret != c->error)
		KUNIT_EXPECT_NE(test, ret, 0);
	else
		KUNIT_EXPECT_EQ_MSG(test, ret, c->error, "%s", msg.text);
	if (c->says)
		KUNIT_EXPECT_NOT_NULL_MSG(test, strstr(msg.text, c->says),
					  "%s", msg.text);
	/* What is wrong with a snapshot is no reason to refuse the disk. */
	KUNIT_EXPECT_EQ(test, qcow_test_try_open(tf, NULL, false, &msg), 0);
	if (!c->offset)
		KUNIT_EXPECT_EQ_MSG(test, qcow_test_try_open(tf, NULL, true, &msg),
				    c->writable_error, "%s", msg.text);
}

static void a_table_that_is_too_long_is_refused(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M, .room = 1100 };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 table = qcow_test_disk_alloc(disk, 1060), at = table;
	struct qcow_message msg = {};
	struct qcow_test_file *tf;
	u32 count = 0;

	while (at - table <= SZ_64M) {
		at = put_entry(disk, at, &(struct entry){
			3 << 16, 1, 16, SZ_1M, "1", "", U16_MAX });
		count++;
	}
	set_table(disk, table, count);
	tf = qcow_test_file_create(disk);
	KUNIT_EXPECT_EQ(test, qcow_test_try_open(tf, "x", false, &msg), -EFBIG);
	KUNIT_EXPECT_NOT_NULL_MSG(test, strstr(msg.text, "longer than"), "%s",
				  msg.text);
	set_table(disk, table, count - 1);
	tf = qcow_test_file_create(disk);
	KUNIT_EXPECT_EQ(test, qcow_test_try_open(tf, "x", false, &msg), -ENOENT);
}

/* The cluster of a snapshot's table counts as free: it is not taken. */
static void no_write_goes_over_a_snapshot(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk;
	struct qcow_image *image;
	bool zeroed;
	u64 at, cluster, got;
	u32 i;

	for (i = 0; i < 2; i++) {
		disk = qcow_test_disk_create(test, &spec);
		qcow_test_disk_snapshot(disk);
		at = i ? table_of(disk) :
			 get64(disk->bytes + table_of(disk));
		qcow_test_disk_set_refcount(disk, at >> 16, 0);
		image = qcow_test_image_open(qcow_test_file_create(disk), true);
		KUNIT_EXPECT_EQ(test, qcow_alloc_clusters(image, 1, &cluster,
							  &got, &zeroed), -EIO);
		KUNIT_EXPECT_NOT_NULL_MSG(test, strstr(image->damage.text,
						       i ? "snapshot table" :
						       "snapshot's L1 table"),
					  "%s", image->damage.text);
		qcow_test_image_close(test, image);
	}
}

static struct kunit_case snapshot_test_cases[] = {
	KUNIT_CASE_PARAM(a_snapshot_shows_what_was, cluster_size_gen_params),
	KUNIT_CASE(an_id_goes_before_a_name),
	KUNIT_CASE_PARAM(entries_lie_across_blocks, cluster_size_gen_params),
	KUNIT_CASE_PARAM(every_field_is_checked, table_case_gen_params),
	KUNIT_CASE(a_table_that_is_too_long_is_refused),
	KUNIT_CASE(no_write_goes_over_a_snapshot),
	{}
};

static struct kunit_suite snapshot_test_suite = {
	.name = "qcow-snapshot",
	.test_cases = snapshot_test_cases,
};

kunit_test_suite(snapshot_test_suite);
