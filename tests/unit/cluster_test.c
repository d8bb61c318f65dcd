// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: allocating writes, copy on write, zeroes, discard.
 *
 * The tests are the guest and the request layer in one: a struct guest does what
 * a request does, and knows for each sector of the disk what it must read as.
 * When the image is closed, the checker of image_builder.c must have nothing to
 * say about what is left; and for any instant of a power cut before, no error,
 * and nothing but what was durable or was written after.
 */
#include <kunit/test.h>
#include <linux/prandom.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uio.h>
#include <linux/workqueue.h>

#include <linux/qcow.h>

#include "image_builder.h"

#define SECTOR		512U
#define BUF_BYTES	SZ_64K
#define COPIED		QCOW_OFLAG_COPIED
#define EXTENDED	QCOW_INCOMPAT_EXTENDED_L2
#define LAZY		QCOW_COMPAT_LAZY_REFCOUNTS

/* Seeds: what the lower layers hold; writes have those from SEED_WRITE on. */
#define SEED_IMAGE	1
#define SEED_BELOW	2
#define SEED_WRITE	10

/* ---- a guest -------------------------------------------------------------- */

/**
 * struct guest - who uses the disk
 * @test: whose
 * @tf: the file with the image
 * @before: what was in that file in the beginning
 * @chain: the image and what is below
 * @sectors: size of the disk
 * @seeds: what each sector must read as
 * @buf: BUF_BYTES, for I/O
 */
struct guest {
	struct kunit *test;
	struct qcow_test_file *tf;
	struct qcow_test_disk *before;
	struct qcow_chain *chain;
	u64 sectors;
	u32 *seeds;
	u8 *buf;
};

static struct qcow_image *image_of(struct guest *guest)
{
	return guest->chain->layers[0];
}

/* A guest on an image, with a raw backing file of so many bytes or none. */
static struct guest *guest_create(struct qcow_test_disk *disk, u64 size,
				  u64 below_size)
{
	struct kunit *test = disk->test;
	struct guest *guest = kunit_kzalloc(test, sizeof(*guest), GFP_KERNEL);
	struct qcow_image *below = NULL;
	u8 *sector;
	u64 i;

	KUNIT_ASSERT_NOT_NULL(test, guest);
	guest->test = test;
	guest->before = disk;
	guest->tf = qcow_test_file_create(disk);
	guest->sectors = size / SECTOR;
	guest->seeds = kunit_kcalloc(test, guest->sectors, sizeof(u32),
				     GFP_KERNEL);
	guest->buf = kunit_kzalloc(test, BUF_BYTES, GFP_KERNEL);
	sector = kunit_kzalloc(test, SECTOR, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, guest->seeds);
	KUNIT_ASSERT_NOT_NULL(test, guest->buf);
	KUNIT_ASSERT_NOT_NULL(test, sector);

	if (below_size)
		below = qcow_test_raw_open(qcow_test_raw_create(test, below_size,
								SEED_BELOW));
	guest->chain = qcow_test_chain(test,
				       qcow_test_image_open(guest->tf, true),
				       below, NULL);
	for (i = 0; i < guest->sectors; i++) {
		if (qcow_test_disk_read(disk, i * SECTOR, sector))
			guest->seeds[i] = qcow_test_seed(sector, i * SECTOR);
		else if (i * SECTOR < below_size)
			guest->seeds[i] = SEED_BELOW;
	}
	return guest;
}

/* Put a layer that has nothing below the image: resolve.c is for such chains. */
static void guest_lengthen_chain(struct guest *guest, u32 cluster_bits)
{
	struct qcow_test_spec spec = {
		.cluster_bits = cluster_bits, .size = guest->sectors * SECTOR,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(guest->test, &spec);
	struct qcow_image *between;

	between = qcow_test_image_open(qcow_test_file_create(disk), false);
	guest->chain = qcow_test_chain(guest->test, guest->chain->layers[0],
				       between, guest->chain->layers[1]);
}

static void guest_knows(struct guest *guest, u64 offset, u64 length, u32 seed)
{
	u64 i;

	for (i = offset / SECTOR; i < (offset + length) / SECTOR; i++)
		guest->seeds[i] = seed;
}

/* What a request does with a write that changes the mapping. */
static int write_data(struct qcow_write *write, u64 offset, const u8 *buf)
{
	u64 host = write->host_offset + write->data_offset;
	int err;

	err = qcow_fill_write(write->image, &write->head,
			      host - write->head.length,
			      offset - write->head.length);
	if (!err)
		err = qcow_file_write(&write->image->file, buf, write->length,
				      host);
	if (!err)
		err = qcow_fill_write(write->image, &write->tail,
				      host + write->length,
				      offset + write->length);
	return err;
}

/* Overwrite what may be; -EAGAIN if that is nothing. */
static int write_in_place(struct qcow_image *image, u64 offset, u64 length,
			  const u8 *buf, u64 *done)
{
	struct qcow_extent extent;
	int err;

	err = qcow_map_layer(image, offset, length, &extent);
	if (err)
		return err;
	if (extent.type != QCOW_EXTENT_DATA || !extent.in_place)
		return -EAGAIN;
	*done = extent.length;
	return qcow_file_write(&image->file, buf, extent.length,
			       extent.host_offset);
}

/* Compress a cluster, where that is wanted; 1 if it is not or cannot be. */
static int write_packed(struct qcow_image *image, u64 offset, u64 length,
			const u8 *buf, u64 *done)
{
	u64 step = min_t(u64, qcow_cluster_size(image), image->size - offset);
	struct kvec vec = { .iov_base = (void *)buf, .iov_len = step };
	struct iov_iter iter;

	if (!qcow_compression(image) || length < step ||
	    offset & (qcow_cluster_size(image) - 1))
		return 1;
	*done = step;
	iov_iter_kvec(&iter, ITER_SOURCE, &vec, 1, step);
	return qcow_pack_write(image, offset, &iter);
}

/* Write a part of a buffer; tells how much of it. */
static int write_some(struct qcow_chain *chain, u64 offset, u64 length,
		      const u8 *buf, u64 *done)
{
	struct qcow_image *image = chain->layers[0];
	struct qcow_write write;
	int epoch, err;

	epoch = qcow_image_enter(image);
	err = write_in_place(image, offset, length, buf, done);
	qcow_image_exit(image, epoch);
	if (err != -EAGAIN)
		return err;
	err = write_packed(image, offset, length, buf, done);
	if (err != 1)
		return err;

	err = qcow_write_begin(chain, offset, length, &write);
	if (err)
		return err;
	*done = write.length;
	err = write_data(&write, offset, buf);
	qcow_write_end(&write, err);
	return err;
}

static int write_all(struct qcow_chain *chain, u64 offset, u64 length,
		     const u8 *buf)
{
	u64 done = 0;
	int err;

	for (; length; offset += done, buf += done, length -= done) {
		err = write_some(chain, offset, length, buf, &done);
		/* Somebody else has just made that cluster. */
		if (err == 1)
			done = 0;
		else if (err)
			return err;
		else if (!done)
			return -EPROTO;
		if (done > length)
			return -EPROTO;
	}
	return 0;
}

static int guest_try_write(struct guest *guest, u64 offset, u64 length, u32 seed)
{
	u64 step;
	int err;

	for (; length; offset += step, length -= step) {
		step = min_t(u64, length, BUF_BYTES);
		qcow_test_fill(guest->buf, offset, step, seed);
		err = write_all(guest->chain, offset, step, guest->buf);
		if (err)
			return err;
	}
	return 0;
}

static void guest_write(struct guest *guest, u64 offset, u64 length, u32 seed)
{
	KUNIT_ASSERT_EQ_MSG(guest->test,
			    guest_try_write(guest, offset, length, seed), 0,
			    "0x%llx bytes at 0x%llx", length, offset);
	guest_knows(guest, offset, length, seed);
}

static void guest_zero(struct guest *guest, u64 offset, u64 length, bool unmap)
{
	KUNIT_ASSERT_EQ_MSG(guest->test,
			    qcow_write_zeroes(guest->chain, offset, length,
					      unmap), 0,
			    "0x%llx bytes at 0x%llx", length, offset);
	guest_knows(guest, offset, length, 0);
}

/* What is mapped from memory, as far as it can be, is mapped as the tables say. */
static void guest_maps(struct guest *guest, u64 offset, u64 length)
{
	struct qcow_extent extent, cached;
	u64 end = offset + length;
	int err;

	for (; offset < end; offset += extent.length) {
		err = qcow_map_cached(guest->chain, offset, end - offset, &cached);
		KUNIT_ASSERT_EQ(guest->test, qcow_map(guest->chain, 0, offset,
						      end - offset, &extent), 0);
		if (err == -EAGAIN)
			continue;
		KUNIT_ASSERT_EQ(guest->test, err, 0);
		KUNIT_ASSERT_EQ_MSG(guest->test, cached.type, extent.type,
				    "at 0x%llx", offset);
		KUNIT_ASSERT_PTR_EQ(guest->test, cached.image, extent.image);
		KUNIT_ASSERT_EQ_MSG(guest->test, cached.host_offset,
				    extent.host_offset, "at 0x%llx", offset);
		KUNIT_ASSERT_EQ(guest->test, cached.in_place, extent.in_place);
	}
}

static void guest_reads(struct guest *guest, u64 offset, u64 length)
{
	u64 end = offset + length, step, at;

	guest_maps(guest, offset, length);
	for (; offset < end; offset += step) {
		step = min_t(u64, end - offset, BUF_BYTES);
		memset(guest->buf, 0x5a, step);
		KUNIT_ASSERT_EQ(guest->test,
				qcow_chain_read(guest->chain, offset, step,
						guest->buf), 0);
		for (at = offset; at < offset + step; at += SECTOR)
			KUNIT_ASSERT_EQ_MSG(guest->test,
					    qcow_test_seed(guest->buf +
							   (at - offset), at),
					    guest->seeds[at / SECTOR],
					    "at 0x%llx", at);
	}
}

static void guest_reads_all(struct guest *guest)
{
	guest_reads(guest, 0, guest->sectors * SECTOR);
}

/*
 * A discard may do nothing, or less than was asked for; what it takes away
 * reads as zeroes, also above a backing file.
 */
static void guest_discard(struct guest *guest, u64 offset, u64 length, bool keep)
{
	u64 at;

	KUNIT_ASSERT_EQ_MSG(guest->test,
			    qcow_discard(guest->chain, offset, length, keep), 0,
			    "0x%llx bytes at 0x%llx", length, offset);
	for (at = offset; at < offset + length; at += SECTOR) {
		KUNIT_ASSERT_EQ(guest->test,
				qcow_chain_read(guest->chain, at, SECTOR,
						guest->buf), 0);
		if (!qcow_test_seed(guest->buf, at))
			guest->seeds[at / SECTOR] = 0;
	}
}

/* Close the image, check it, and see that it reads the same when open again. */
static struct qcow_test_disk *guest_ends(struct guest *guest)
{
	struct qcow_test_disk *disk;

	guest_reads_all(guest);
	disk = qcow_test_close_and_load(guest->tf, image_of(guest));
	qcow_test_disk_expect_clean(disk);
	guest->chain->layers[0] = qcow_test_image_open(guest->tf, false);
	guest_reads_all(guest);
	return disk;
}

/* ---- allocating writes ---------------------------------------------------- */

static const u32 cluster_sizes[] = {
	9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
};

static void cluster_size_desc(const u32 *bits, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%u bytes", 1U << *bits);
}

KUNIT_ARRAY_PARAM(cluster_size, cluster_sizes, cluster_size_desc);

/* A disk that needs two L2 tables, if they are not too large for that. */
static u64 disk_size(u32 bits)
{
	u64 size = (1ULL << (2 * bits - 3)) + (3ULL << bits) + SECTOR;

	return min_t(u64, size, max_t(u64, SZ_2M, 3ULL << bits));
}

static void writes_allocate(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	u64 cs = 1ULL << bits;
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = disk_size(bits),
	};
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, 0);
	u64 end = spec.size;

	guest_write(guest, 0, SECTOR, SEED_WRITE);
	guest_write(guest, SECTOR, SECTOR, SEED_WRITE + 1);
	guest_write(guest, cs, cs, SEED_WRITE + 2);
	guest_write(guest, 2 * cs - SECTOR, 2 * SECTOR, SEED_WRITE + 3);
	guest_write(guest, end - SECTOR, SECTOR, SEED_WRITE + 4);
	guest_write(guest, end - cs - SECTOR, cs, SEED_WRITE + 5);
	guest_reads_all(guest);
	KUNIT_EXPECT_EQ(test, qcow_commit(image_of(guest)), 0);
	guest_ends(guest);
}

static void writes_copy_what_they_do_not_cover(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	u64 cs = 1ULL << bits;
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = disk_size(bits),
	};
	/* The backing file ends within a cluster that is written. */
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, spec.size - 2 * SECTOR);
	u64 end = spec.size;

	guest_write(guest, cs - SECTOR, SECTOR, SEED_WRITE);
	guest_write(guest, cs, SECTOR, SEED_WRITE + 1);
	guest_write(guest, 2 * cs + round_down(cs / 2, SECTOR), SECTOR,
		    SEED_WRITE + 2);
	guest_write(guest, end - SECTOR, SECTOR, SEED_WRITE + 3);
	guest_ends(guest);
}

static void version_2_is_written_too(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.version = 2, .cluster_bits = 12, .size = SZ_1M,
	};
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_512K);

	guest_write(guest, SECTOR, SECTOR, SEED_WRITE);
	guest_write(guest, SZ_512K - SECTOR, SZ_4K, SEED_WRITE + 1);
	guest_zero(guest, 0, SZ_64K + SECTOR, false);
	guest_zero(guest, SZ_512K - SZ_64K, SZ_128K, true);
	guest_discard(guest, SZ_64K, SZ_64K, false);
	guest_discard(guest, SZ_512K, SZ_64K, true);
	guest_ends(guest);
}

static void overwrites_stay_in_place(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, 0);
	struct qcow_test_result first, second;

	guest_write(guest, 0, SZ_64K, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);
	qcow_test_disk_check(qcow_test_file_load(guest->tf), &first);
	guest_write(guest, 0, SZ_64K, SEED_WRITE + 1);
	guest_write(guest, SECTOR, SZ_4K, SEED_WRITE + 2);
	qcow_test_disk_check(guest_ends(guest), &second);
	KUNIT_EXPECT_EQ(test, first.data_clusters, 16);
	KUNIT_EXPECT_EQ(test, second.data_clusters, 16);
}

static void sequential_writes_are_contiguous(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, 0);
	struct qcow_extent extent;
	u64 at;

	for (at = 0; at < SZ_256K; at += SZ_8K)
		guest_write(guest, at, SZ_8K, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_map_layer(image_of(guest), 0, SZ_128K,
					     &extent), 0);
	KUNIT_EXPECT_EQ(test, extent.length, SZ_128K);
	guest_ends(guest);
}

/* ---- shared clusters ------------------------------------------------------ */

/* What the snapshot's own clusters hold, by their place in the file. */
static void expect_snapshot(struct qcow_test_disk *before,
			    struct qcow_test_disk *after, u64 guest_offset)
{
	u64 host = qcow_test_disk_entry(before, guest_offset) &
		   QCOW_L2_OFFSET_MASK;

	KUNIT_EXPECT_EQ_MSG(before->test,
			    qcow_test_seed(after->bytes + host, guest_offset),
			    SEED_IMAGE, "cluster 0x%llx was written", host);
}

static void a_snapshot_is_not_written(struct kunit *test)
{
	u32 bits = *(const u32 *)test->param_value;
	u64 cs = 1ULL << bits, i;
	struct qcow_test_spec spec = {
		.cluster_bits = bits, .size = disk_size(bits),
	};
	struct qcow_test_disk *before = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *after;
	struct guest *guest;

	for (i = 0; i < 3; i++)
		qcow_test_disk_add_data(before, i * cs, SEED_IMAGE);
	qcow_test_disk_snapshot(before);
	qcow_test_disk_expect_clean(before);
	guest = guest_create(before, spec.size, 0);

	/* The table that is shared is known, and replaced then. */
	guest_maps(guest, 0, spec.size);
	guest_write(guest, SECTOR * (cs > SECTOR), SECTOR, SEED_WRITE);
	guest_write(guest, 2 * cs - SECTOR, SECTOR, SEED_WRITE + 1);
	guest_discard(guest, 2 * cs, cs, false);
	after = guest_ends(guest);
	for (i = 0; i < 3; i++)
		expect_snapshot(before, after, i * cs);
}

/* Some programs leave the flag out. The table is ours all the same. */
static void a_table_that_lacks_the_flag_is_not_copied(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *before = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *after;
	struct guest *guest;
	u64 entry, l1;

	qcow_test_disk_add_data(before, 0, SEED_IMAGE);
	entry = qcow_test_disk_entry(before, 0);
	l1 = qcow_test_disk_l1_entry(before, 0);
	qcow_test_disk_set_l1_entry(before, 0, l1 & ~COPIED);
	guest = guest_create(before, spec.size, 0);
	guest_write(guest, SZ_512K, SZ_4K, SEED_WRITE);
	guest_write(guest, SZ_4K, SZ_4K, SEED_WRITE + 1);
	after = guest_ends(guest);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_l1_entry(after, 0), l1);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_entry(after, 0), entry);
}

static void a_shared_zero_cluster_is_not_written(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *before = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *after;
	struct guest *guest;
	u64 host = qcow_test_disk_add_data(before, 0, SEED_IMAGE);

	qcow_test_disk_map(before, 0, host | COPIED | QCOW_OFLAG_ZERO);
	qcow_test_disk_snapshot(before);
	/* The builder has cleared COPIED, and left the rest. */
	KUNIT_ASSERT_EQ(test, qcow_test_disk_entry(before, 0),
			host | QCOW_OFLAG_ZERO);
	guest = guest_create(before, spec.size, 0);
	guest_write(guest, SZ_4K, SZ_4K, SEED_WRITE);
	after = guest_ends(guest);
	KUNIT_EXPECT_EQ(test, qcow_test_seed(after->bytes + host, 0), SEED_IMAGE);
	KUNIT_EXPECT_NE(test, qcow_test_disk_entry(after, 0) &
			QCOW_L2_OFFSET_MASK, host);
}

static void a_zero_cluster_with_a_place_shows_no_old_data(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;
	u64 host = qcow_test_disk_add_data(disk, 0, SEED_IMAGE);

	qcow_test_disk_map(disk, 0, host | COPIED | QCOW_OFLAG_ZERO);
	guest = guest_create(disk, spec.size, SZ_1M);
	guest_write(guest, SZ_4K, SZ_4K, SEED_WRITE);
	guest_ends(guest);
}

/* ---- subclusters ---------------------------------------------------------- */

#define ALL		((u64)U32_MAX)

struct subcluster_case {
	const char *name;
	bool backing;
	bool mapped;		/* there is a host cluster, of its own */
	bool shared;		/* or one shared with a snapshot */
	u64 before;		/* bitmap */
	bool zero;		/* zeroes, not data, ... */
	u64 offset;		/* ... are written here */
	u64 length;
	u64 after;		/* bitmap */
};

/* In a cluster of 64 KiB, with subclusters of 2 KiB */
static const struct subcluster_case subcluster_cases[] = {
	{ "a new cluster", false, false, false, 0, false, SZ_4K, SZ_4K, 0xc },
	{ "parts of subclusters", true, false, false, 0, false, SZ_2K + 512,
	  SZ_2K, 0x6 },
	{ "a new cluster next to zeroes", true, false, false, ALL << 32, false,
	  SZ_4K, SZ_4K, (ALL & ~0xcULL) << 32 | 0xc },
	{ "space that is set aside", true, true, false, 0, false, SZ_4K + 512,
	  SZ_1K, 0x4 },
	{ "beside what is allocated", true, true, false, 0x3, false, SZ_4K, SZ_4K,
	  0xf },
	{ "across what is allocated", true, true, false, 0x3c, false, SZ_2K + 512,
	  SZ_16K, 0x3fe },
	{ "a shared cluster", true, true, true, 0x30, false, SZ_4K, SZ_2K, 0x3c },
	{ "behind what is shared", true, true, true, 0x3 | 0x30ULL << 32, false,
	  SZ_16K, SZ_2K, 0x1ff },
	{ "all of a shared cluster", true, true, true, 0x30, false, 0, SZ_64K, ALL },
	{ "zeroes", true, true, false, 0xff, true, SZ_4K, SZ_4K,
	  0xf3 | 0xcULL << 32 },
	{ "zeroes over parts", true, true, false, 0xff, true, SZ_2K + 512, SZ_4K,
	  0xfb | 0x4ULL << 32 },
	{ "zeroes where nothing is", true, false, false, 0, true, SZ_4K, SZ_4K,
	  0xcULL << 32 },
	{ "zeroes where zeroes are", false, false, false, 0, true, SZ_4K, SZ_4K, 0 },
	{ "zeroes in a shared cluster", true, true, true, 0xff, true, SZ_4K, SZ_4K,
	  0xf3 | 0xcULL << 32 },
	{ "zeroes over all", true, true, false, 0xff, true, 0, SZ_64K, ALL << 32 },
};

static void subcluster_desc(const struct subcluster_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(subcluster, subcluster_cases, subcluster_desc);

static void subclusters_are_told_apart(struct kunit *test)
{
	const struct subcluster_case *c = test->param_value;
	struct qcow_test_spec spec = {
		.size = SZ_1M, .incompatible = EXTENDED,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;
	u64 host = 0;

	if (c->mapped)
		host = qcow_test_disk_add_data(disk, SZ_64K, SEED_IMAGE) | COPIED;
	qcow_test_disk_map_sub(disk, SZ_64K, host, c->before);
	if (c->shared)
		qcow_test_disk_snapshot(disk);
	qcow_test_disk_expect_clean(disk);
	guest = guest_create(disk, spec.size, c->backing ? SZ_1M : 0);
	if (c->zero)
		guest_zero(guest, SZ_64K + c->offset, c->length, false);
	else
		guest_write(guest, SZ_64K + c->offset, c->length, SEED_WRITE);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_bitmap(guest_ends(guest), SZ_64K),
			c->after);
}

static void subclusters_that_contradict_are_damage(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.size = SZ_1M, .incompatible = EXTENDED,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	u8 *buf = kunit_kzalloc(test, SECTOR, GFP_KERNEL);
	u64 host = qcow_test_disk_add_data(disk, 0, SEED_IMAGE);

	KUNIT_ASSERT_NOT_NULL(test, buf);
	qcow_test_disk_map_sub(disk, 0, host | COPIED, 1ULL << 32 | 1);
	qcow_test_disk_map_sub(disk, SZ_64K, 0, 2);
	/* Set aside as a zero cluster is not, with subclusters: no flag. */
	qcow_test_disk_map_sub(disk, SZ_128K, QCOW_OFLAG_ZERO, 0);
	tf = qcow_test_file_create(disk);
	chain = qcow_test_chain(test, qcow_test_image_open(tf, false), NULL,
				NULL);
	KUNIT_EXPECT_EQ(test, qcow_chain_read(chain, 0, SECTOR, buf), -EIO);
	KUNIT_EXPECT_EQ(test, qcow_chain_read(chain, SZ_64K, SECTOR, buf), -EIO);
	KUNIT_EXPECT_EQ(test, qcow_chain_read(chain, SZ_128K, SECTOR, buf), 0);
	KUNIT_EXPECT_EQ(test, qcow_test_image_close(test, chain->layers[0]), 0);
}

/* ---- zeroes and discards -------------------------------------------------- */

struct zero_case {
	const char *name;
	bool backing;
	bool discard;
	bool flag;		/* unmap, or keep */
	u64 offset;
	u64 length;
	u64 gone;		/* clusters of 4 KiB of 16 that are freed */
};

static const struct zero_case zero_cases[] = {
	{ "zeroes over clusters", false, false, false, SZ_4K, SZ_32K, 0 },
	{ "zeroes over clusters, unmap", false, false, true, SZ_4K, SZ_32K, 8 },
	{ "zeroes, unmap, backing", true, false, true, SZ_4K, SZ_32K, 8 },
	{ "zeroes over parts", false, false, true, 512, SZ_4K - 1024, 0 },
	{ "zeroes over parts, backing", true, false, true, 512, SZ_64K - 1024, 14 },
	{ "zeroes over all", true, false, true, 0, SZ_1M, 16 },
	{ "zeroes where nothing is", true, false, true, SZ_512K, SZ_64K + 512, 0 },
	{ "discard", false, true, false, SZ_4K, SZ_32K, 8 },
	{ "discard, backing", true, true, false, SZ_4K, SZ_32K, 8 },
	{ "discard of parts", true, true, false, 512, SZ_8K, 1 },
	{ "discard of less than a cluster", true, true, false, 512, SZ_2K, 0 },
	{ "discard of all", true, true, false, 0, SZ_1M, 16 },
	{ "discard, keep", true, true, true, SZ_4K, SZ_32K, 0 },
	{ "discard where nothing is", true, true, false, SZ_512K, SZ_64K, 0 },
};

static void zero_desc(const struct zero_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(zero, zero_cases, zero_desc);

static void zeroes_read_as_zeroes_and_free(struct kunit *test)
{
	const struct zero_case *c = test->param_value;
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_result result;
	struct guest *guest;
	u64 i;

	for (i = 0; i < 16; i++)
		qcow_test_disk_add_data(disk, i * SZ_4K, SEED_IMAGE);
	guest = guest_create(disk, spec.size, c->backing ? SZ_1M : 0);
	if (c->discard)
		guest_discard(guest, c->offset, c->length, c->flag);
	else
		guest_zero(guest, c->offset, c->length, c->flag);
	qcow_test_disk_check(guest_ends(guest), &result);
	/* Zeroes over a part of what is not there may need a cluster. */
	if (c->gone)
		KUNIT_EXPECT_LE(test, result.data_clusters, 16 - c->gone +
				2 * (c->offset >= SZ_512K));
	else
		KUNIT_EXPECT_GE(test, result.data_clusters, 16);
}

/* Where there is no L2 table, there is nothing to be freed. */
static void ranges_without_a_table_are_cleared(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest = guest_create(disk, spec.size, SZ_512K);
	struct qcow_test_result result;

	/* Nothing was written yet, nothing needs to be. */
	guest_discard(guest, 0, SZ_1M, false);
	guest_discard(guest, 0, SZ_1M, true);
	guest_zero(guest, SZ_512K + SZ_128K, SZ_256K, true);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image_of(guest)), 0);
	KUNIT_EXPECT_FALSE(test, qcow_image_dirty(image_of(guest)));
	/* Above the backing file it does. */
	guest_zero(guest, SZ_64K + SECTOR, SZ_64K, false);
	guest_zero(guest, SZ_512K - SZ_64K, SZ_128K, true);
	qcow_test_disk_check(guest_ends(guest), &result);
	KUNIT_EXPECT_EQ(test, result.data_clusters, 0);
}

static void the_last_part_of_a_cluster_can_be_discarded(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M + SECTOR };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_result result;
	struct guest *guest;

	qcow_test_disk_add_data(disk, SZ_1M, SEED_IMAGE);
	guest = guest_create(disk, spec.size, 0);
	guest_discard(guest, SZ_1M, SECTOR, false);
	KUNIT_EXPECT_EQ(test, guest->seeds[guest->sectors - 1], 0);
	qcow_test_disk_check(guest_ends(guest), &result);
	KUNIT_EXPECT_EQ(test, result.data_clusters, 0);
}

static void what_was_discarded_can_be_written_again(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_1M);
	u32 round;

	for (round = 0; round < 5; round++) {
		guest_write(guest, SECTOR, SZ_256K, SEED_WRITE + round);
		guest_discard(guest, 0, SZ_256K, round & 1);
		guest_write(guest, SZ_64K + SECTOR, SZ_8K, SEED_WRITE + round);
		guest_zero(guest, SZ_64K, SZ_4K + SECTOR, round & 1);
		guest_reads_all(guest);
		if (round & 1)
			KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);
	}
	guest_ends(guest);
}

/* ---- failures ------------------------------------------------------------- */

/* COPIED without an offset says nothing: least of all that the header is ours. */
static void a_discard_never_empties_the_header(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_disk *after;
	struct guest *guest;

	qcow_test_disk_map(disk, 0, COPIED);
	guest = guest_create(disk, spec.size, 0);
	guest_discard(guest, 0, SZ_64K, true);
	guest_reads_all(guest);
	after = qcow_test_close_and_load(guest->tf, image_of(guest));
	KUNIT_EXPECT_EQ(test, memcmp(after->bytes, disk->bytes, 104), 0);
}

static void a_write_that_fails_leaves_nothing(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_1M);
	struct qcow_write write;

	guest_write(guest, 0, SZ_4K, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);

	KUNIT_ASSERT_EQ(test, qcow_write_begin(guest->chain, SZ_64K + SECTOR,
					       SZ_16K, &write), 0);
	qcow_write_end(&write, -EIO);
	KUNIT_EXPECT_EQ(test, qcow_image_error(image_of(guest)), 0);
	guest_reads_all(guest);
	/* It can be tried again. */
	guest_write(guest, SZ_64K + SECTOR, SZ_16K, SEED_WRITE + 1);
	guest_ends(guest);
}

static void a_failed_data_write_is_told_and_undone(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_1M);

	guest_write(guest, 0, SZ_4K, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image_of(guest)), 0);
	guest->tf->write_error = -ENOSPC;
	guest->tf->write_budget = 0;
	KUNIT_EXPECT_EQ(test, guest_try_write(guest, SZ_64K, SZ_4K, SEED_WRITE),
			-ENOSPC);
	guest->tf->write_budget = -1;
	guest_ends(guest);
}

static void an_unreadable_backing_file_fails_the_write(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_file *below = qcow_test_raw_create(test, SZ_1M,
							    SEED_BELOW);
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, 0);
	u64 i;

	guest->chain->layers[1] = qcow_test_raw_open(below);
	guest->chain->depth = 2;
	for (i = 0; i < guest->sectors; i++)
		guest->seeds[i] = SEED_BELOW;

	below->read_budget = 0;
	KUNIT_EXPECT_EQ(test, guest_try_write(guest, SECTOR, SECTOR, SEED_WRITE),
			-EIO);
	below->read_budget = -1;
	guest_reads_all(guest);
	guest_write(guest, SECTOR, SECTOR, SEED_WRITE);
	guest_ends(guest);
}

static void an_image_that_failed_is_not_written(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_1M);
	struct qcow_test_result result;
	u64 i;

	guest_write(guest, 0, SZ_16K, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);
	guest_write(guest, SZ_64K, SZ_16K, SEED_WRITE + 1);
	guest->tf->sync_error = -EIO;
	KUNIT_EXPECT_NE(test, qcow_commit(image_of(guest)), 0);
	guest->tf->sync_error = 0;

	KUNIT_EXPECT_NE(test, guest_try_write(guest, SZ_128K, SZ_4K,
					      SEED_WRITE + 2), 0);
	KUNIT_EXPECT_NE(test, qcow_write_zeroes(guest->chain, 0, SZ_4K, true), 0);
	KUNIT_EXPECT_NE(test, qcow_discard(guest->chain, 0, SZ_4K, false), 0);
	/* Reads go on, also of what never became durable. */
	guest_reads_all(guest);
	qcow_test_image_close(test, image_of(guest));

	/* Nothing that depends on the barrier was published. */
	qcow_test_disk_check(qcow_test_file_load(guest->tf), &result);
	KUNIT_EXPECT_EQ_MSG(test, result.errors, 0, "%s", result.first);
	guest->chain->layers[0] = qcow_test_image_open(guest->tf, false);
	for (i = SZ_64K / SECTOR; i < (SZ_64K + SZ_16K) / SECTOR; i++)
		guest->seeds[i] = SEED_BELOW;
	guest_reads(guest, 0, SZ_64K);
}

static void a_full_file_system_fails_writes_only(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .refcount_bits = 64,
				       .size = SZ_1M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, SZ_1M);
	struct qcow_test_result result;
	u32 i, failed = 0;

	/* The file system is full now and then. */
	guest->tf->write_error = -ENOSPC;
	for (i = 0; i < 300; i++) {
		guest->tf->write_budget = i % 10 < 7 ? -1 : i % 3;
		if (guest_try_write(guest, (i * 37 % 2000) * SECTOR, SZ_2K,
				    SEED_WRITE))
			failed++;
		if (i % 20 == 19) {
			guest->tf->write_budget = -1;
			qcow_commit(image_of(guest));
		}
	}
	guest->tf->write_budget = -1;
	KUNIT_EXPECT_GT(test, failed, 0);
	qcow_test_image_close(test, image_of(guest));
	qcow_test_disk_check(qcow_test_file_load(guest->tf), &result);
	KUNIT_EXPECT_EQ_MSG(test, result.errors, 0, "%s", result.first);
	KUNIT_EXPECT_EQ_MSG(test, result.copied_wrong, 0, "%s", result.first);
}

static void a_damaged_entry_is_never_followed(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;

	qcow_test_disk_add_data(disk, 0, SEED_IMAGE);
	qcow_test_disk_map(disk, SZ_64K, 512 | COPIED);
	guest = guest_create(disk, SZ_64K, 0);
	KUNIT_EXPECT_NE(test, guest_try_write(guest, SZ_64K, SZ_4K, SEED_WRITE),
			0);
	KUNIT_EXPECT_TRUE(test, image_of(guest)->corrupt);
	guest_reads_all(guest);
}

static void a_table_behind_the_end_of_the_file_is_not_written(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;

	qcow_test_disk_set_l1_entry(disk, 0, BIT_ULL(40) | COPIED);
	guest = guest_create(disk, spec.size, 0);
	KUNIT_EXPECT_EQ(test, guest_try_write(guest, 0, SZ_4K, SEED_WRITE), -EIO);
	KUNIT_EXPECT_TRUE(test, image_of(guest)->corrupt);
	KUNIT_EXPECT_LT(test, qcow_file_size(&image_of(guest)->file),
			BIT_ULL(40));
}

static struct guest *fragile_guest(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 9, .refcount_bits = 64, .size = SZ_128K,
		.room = 400,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 at;

	for (at = 0; at < SZ_64K; at += 3 * SECTOR)
		qcow_test_disk_add_data(disk, at, SEED_IMAGE);
	qcow_test_disk_snapshot(disk);
	return guest_create(disk, spec.size, SZ_128K);
}

/* Something of everything, and no complaint if it fails. */
static int try_everything(struct guest *guest)
{
	int failed = 0;

	failed += !!guest_try_write(guest, SECTOR, SZ_2K, SEED_WRITE);
	failed += !!guest_try_write(guest, SZ_64K - SZ_2K, SZ_8K, SEED_WRITE);
	failed += !!qcow_write_zeroes(guest->chain, SZ_32K, SZ_4K, true);
	failed += !!qcow_discard(guest->chain, SZ_16K, SZ_4K, false);
	failed += !!qcow_commit(image_of(guest));
	failed += !!guest_try_write(guest, SZ_64K + SZ_32K, SZ_16K, SEED_WRITE);
	failed += !!qcow_write_zeroes(guest->chain, SZ_64K - SZ_1K, SZ_2K, false);
	failed += !!qcow_commit(image_of(guest));
	return failed;
}

static void expect_sound(struct guest *guest, s64 budget)
{
	struct qcow_test_disk *disk = qcow_test_file_load(guest->tf);
	struct qcow_test_result result;

	qcow_test_disk_check(disk, &result);
	qcow_test_disk_free(disk);
	KUNIT_EXPECT_EQ_MSG(guest->test, result.errors, 0, "after %lld: %s",
			    budget, result.first);
	KUNIT_EXPECT_EQ_MSG(guest->test, result.copied_wrong, 0,
			    "after %lld: %s", budget, result.first);
}

static void reads_may_fail_at_any_time(struct kunit *test)
{
	struct guest *guest;
	bool failed = true;
	s64 budget;

	for (budget = 0; failed && budget < 500; budget++) {
		guest = fragile_guest(test);
		guest->tf->read_budget = budget;
		failed = try_everything(guest);
		guest->tf->read_budget = -1;
		KUNIT_EXPECT_EQ(test, qcow_image_error(image_of(guest)), 0);
		/* Now it works. */
		KUNIT_EXPECT_EQ(test, try_everything(guest), 0);
		KUNIT_EXPECT_EQ(test, qcow_test_image_close(test,
							    image_of(guest)), 0);
		expect_sound(guest, budget);
	}
	/* In the end nothing failed, so everything has failed once. */
	KUNIT_EXPECT_FALSE(test, failed);
	KUNIT_EXPECT_GT(test, budget, 5);
}

static void writes_may_fail_at_any_time(struct kunit *test)
{
	struct guest *guest;
	bool failed = true;
	s64 budget;

	for (budget = 0; failed && budget < 500; budget++) {
		guest = fragile_guest(test);
		guest->tf->write_error = -ENOSPC;
		guest->tf->write_budget = budget;
		failed = try_everything(guest);
		expect_sound(guest, budget);
		guest->tf->write_budget = -1;
		qcow_test_image_close(test, image_of(guest));
		expect_sound(guest, budget);
	}
	KUNIT_EXPECT_FALSE(test, failed);
	KUNIT_EXPECT_GT(test, budget, 20);
}

static void barriers_may_fail_at_any_time(struct kunit *test)
{
	struct guest *guest;
	u32 round;

	for (round = 0; round < 4; round++) {
		guest = fragile_guest(test);
		if (round & 1)
			try_everything(guest);
		guest->tf->sync_error = -EIO;
		KUNIT_EXPECT_GT(test, try_everything(guest), 0);
		if (round & 2)
			guest->tf->sync_error = 0;
		KUNIT_EXPECT_NE(test, qcow_commit(image_of(guest)), 0);
		expect_sound(guest, round);
		qcow_test_image_close(test, image_of(guest));
		expect_sound(guest, round);
	}
}

/* ---- many at once --------------------------------------------------------- */

#define WORKERS		4

struct worker {
	struct work_struct work;
	struct qcow_chain *chain;
	u32 *seeds;
	u64 sectors;
	u32 number;
	u32 rounds;
	u8 *buf;
	int err;
};

/* Write sectors that are nobody else's, in clusters that are everybody's. */
static void work(struct work_struct *ws)
{
	struct worker *w = container_of(ws, struct worker, work);
	struct rnd_state rnd;
	u64 sector;
	u32 i, seed;

	prandom_seed_state(&rnd, w->number);
	for (i = 0; i < w->rounds && !w->err; i++) {
		sector = prandom_u32_state(&rnd) % (w->sectors / WORKERS) *
			 WORKERS + w->number;
		seed = SEED_WRITE + i;
		if (i % 64 == 63) {
			w->err = qcow_commit(w->chain->layers[0]);
		} else if (i % 5 == 4) {
			w->err = qcow_write_zeroes(w->chain, sector * SECTOR,
						   SECTOR, i & 1);
			w->seeds[sector] = 0;
		} else {
			qcow_test_fill(w->buf, sector * SECTOR, SECTOR, seed);
			w->err = write_all(w->chain, sector * SECTOR, SECTOR,
					   w->buf);
			w->seeds[sector] = seed;
		}
	}
}

static void many_writers_share_clusters(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 12, .refcount_bits = 64, .size = SZ_1M,
		.room = 512,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct workqueue_struct *wq;
	struct worker *workers;
	struct guest *guest;
	u32 i;

	for (i = 0; i < 256; i += 3)
		qcow_test_disk_add_data(disk, i * SZ_4K, SEED_IMAGE);
	qcow_test_disk_snapshot(disk);
	guest = guest_create(disk, spec.size, SZ_512K);
	workers = kunit_kcalloc(test, WORKERS, sizeof(*workers), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, workers);
	for (i = 0; i < WORKERS; i++) {
		INIT_WORK(&workers[i].work, work);
		workers[i].chain = guest->chain;
		workers[i].seeds = guest->seeds;
		workers[i].sectors = guest->sectors;
		workers[i].number = i;
		workers[i].rounds = 800;
		workers[i].buf = kunit_kzalloc(test, SECTOR, GFP_KERNEL);
		KUNIT_ASSERT_NOT_NULL(test, workers[i].buf);
	}
	wq = alloc_workqueue("qcow-test", WQ_UNBOUND, WORKERS);
	KUNIT_ASSERT_NOT_NULL(test, wq);
	for (i = 0; i < WORKERS; i++)
		queue_work(wq, &workers[i].work);
	destroy_workqueue(wq);
	for (i = 0; i < WORKERS; i++)
		KUNIT_EXPECT_EQ(test, workers[i].err, 0);
	guest_ends(guest);
}

static void tables_are_evicted_and_read_again(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 9, .size = SZ_4M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest = guest_create(disk, spec.size, 0);
	struct qcow_image *image;
	struct rnd_state rnd;
	u32 i;

	/* 128 L2 tables, of which the cache can hold less than half. */
	KUNIT_ASSERT_EQ(test, qcow_test_image_close(test, image_of(guest)), 0);
	image = qcow_test_image_open_cached(guest->tf, true, SZ_256K);
	guest->chain->layers[0] = image;
	prandom_seed_state(&rnd, 3);
	for (i = 0; i < 600; i++) {
		guest_write(guest, prandom_u32_state(&rnd) % guest->sectors *
			    SECTOR, SECTOR, SEED_WRITE + i);
		if (i % 100 == 99)
			KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	}
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	guest_reads_all(guest);
	KUNIT_EXPECT_LE(test, image->cache->count, image->cache->limit +
			8 * QCOW_BLOCK_SIZE);
	guest_ends(guest);
}

/* ---- random work, and crashes --------------------------------------------- */

struct random_case {
	const char *name;
	u32 version;
	u32 cluster_bits;
	u32 refcount_bits;
	u64 size;
	u64 below;
	bool snapshot;
	u32 rounds;
	u64 incompatible;
	bool packed;
	u64 compatible;
	bool compress;
	u32 between_bits;	/* clusters of a layer below that has nothing, or 0 */
};

static const struct random_case random_cases[] = {
	{ "512 B clusters", 3, 9, 16, SZ_128K, 0, false, 400 },
	{ "512 B clusters, 64 bits, backing", 3, 9, 64, SZ_128K, SZ_64K + 512,
	  false, 400 },
	{ "512 B clusters, 2 bits, snapshot", 3, 9, 2, SZ_128K, 0, true, 400 },
	{ "4 KiB clusters", 3, 12, 16, SZ_256K, 0, false, 400 },
	{ "4 KiB clusters, backing, snapshot", 3, 12, 16, SZ_256K, SZ_256K,
	  true, 400 },
	{ "4 KiB clusters, version 2, backing", 2, 12, 16, SZ_256K, SZ_128K,
	  false, 400 },
	{ "64 KiB clusters, snapshot", 3, 16, 16, SZ_1M, 0, true, 300 },
	{ "subclusters of 512 B", 3, 14, 16, SZ_256K, 0, false, 400, EXTENDED },
	{ "subclusters, backing, snapshot", 3, 14, 16, SZ_256K, SZ_128K + 512,
	  true, 400, EXTENDED },
	{ "subclusters of 2 KiB, backing", 3, 16, 16, SZ_1M - SECTOR, SZ_1M,
	  false, 300, EXTENDED },
	{ "compressed", 3, 12, 16, SZ_256K, 0, false, 400, 0, true },
	{ "compressed, 512 B clusters, 8 bits, backing, snapshot", 3, 9, 8,
	  SZ_128K, SZ_64K + 512, true, 400, 0, true },
	{ "compressed by zstd, subclusters, snapshot", 3, 14, 64, SZ_256K, 0,
	  true, 300, EXTENDED | QCOW_INCOMPAT_COMPRESSION, true },
	{ "512 B clusters, lazy refcounts", 3, 9, 16, SZ_128K, 0, false, 400,
	  0, false, LAZY },
	{ "4 KiB clusters, lazy, snapshot", 3, 12, 16, SZ_256K, SZ_128K, true,
	  400, 0, false, LAZY },
	{ "written compressed", 3, 12, 16, SZ_256K, 0, false, 400, 0, true, 0,
	  true },
	{ "written compressed, 512 B clusters, 2 bits, lazy", 3, 9, 2, SZ_128K,
	  SZ_64K + 512, false, 400, 0, false, LAZY, true },
	{ "written compressed by zstd, subclusters, snapshot", 3, 14, 64,
	  SZ_256K - SECTOR, 0, true, 300,
	  EXTENDED | QCOW_INCOMPAT_COMPRESSION, true, 0, true },
	{ "long chain, 4 KiB clusters, snapshot", 3, 12, 16, SZ_256K,
	  SZ_128K + 512, true, 400, 0, false, 0, false, 9 },
	{ "long chain, subclusters", 3, 14, 16, SZ_256K - SECTOR, SZ_256K,
	  false, 400, EXTENDED, false, 0, false, 16 },
	{ "long chain, written compressed, 512 B clusters", 3, 9, 16, SZ_128K,
	  SZ_64K + 512, false, 400, 0, true, 0, true, 12 },
};

static void random_desc(const struct random_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(random, random_cases, random_desc);

static void random_compress(struct guest *guest, const struct random_case *c)
{
	struct qcow_message msg;

	KUNIT_ASSERT_EQ(guest->test,
			qcow_pack_init(image_of(guest), c->compress ?
				       QCOW_COMPRESS_IMAGE : QCOW_COMPRESS_NONE,
				       &msg), 0);
}

static struct guest *random_guest(struct kunit *test,
				  const struct random_case *c)
{
	struct qcow_test_spec spec = {
		.version = c->version, .cluster_bits = c->cluster_bits,
		.refcount_bits = c->refcount_bits, .size = c->size,
		.incompatible = c->incompatible, .compatible = c->compatible,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u64 cs = 1ULL << c->cluster_bits;
	struct guest *guest;
	u64 at;

	for (at = 0; at < c->size; at += 5 * cs)
		qcow_test_disk_add_data(disk, at, SEED_IMAGE);
	for (at = cs; c->packed && at < c->size; at += 5 * cs) {
		qcow_test_disk_add_packed(disk, at, SEED_IMAGE);
		if (at + cs < c->size)
			qcow_test_disk_add_packed(disk, at + cs, SEED_IMAGE);
	}
	if (c->snapshot)
		qcow_test_disk_snapshot(disk);
	guest = guest_create(disk, c->size, c->below);
	if (c->between_bits)
		guest_lengthen_chain(guest, c->between_bits);
	random_compress(guest, c);
	return guest;
}

/* One of the things that guests do; some of it twice as often near the start. */
static void random_step(struct guest *guest, struct rnd_state *rnd, u32 seed)
{
	u64 longest = min_t(u64, guest->sectors / 4, BUF_BYTES / SECTOR);
	u64 length = 1 + prandom_u32_state(rnd) % longest;
	u64 first = prandom_u32_state(rnd) % (guest->sectors - length + 1);
	bool flag = prandom_u32_state(rnd) & 1;

	if (prandom_u32_state(rnd) & 1)
		length = min_t(u64, length, 1 + prandom_u32_state(rnd) % 8);
	switch (prandom_u32_state(rnd) % 16) {
	case 0:
	case 1:
		guest_zero(guest, first * SECTOR, length * SECTOR, flag);
		break;
	case 2:
	case 3:
		guest_discard(guest, first * SECTOR, length * SECTOR, flag);
		break;
	case 4:
		guest_reads(guest, first * SECTOR, length * SECTOR);
		break;
	default:
		guest_write(guest, first * SECTOR, length * SECTOR, seed);
	}
}

static void random_work_is_read_back(struct kunit *test)
{
	const struct random_case *c = test->param_value;
	struct guest *guest = random_guest(test, c);
	struct rnd_state rnd;
	u32 i;

	prandom_seed_state(&rnd, 42);
	for (i = 0; i < c->rounds; i++) {
		random_step(guest, &rnd, SEED_WRITE + i);
		if (prandom_u32_state(&rnd) % 20 == 0)
			KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);
		if (prandom_u32_state(&rnd) % 100 == 0) {
			guest_ends(guest);
			qcow_test_image_close(test, image_of(guest));
			guest->chain->layers[0] = qcow_test_image_open(guest->tf,
								       true);
			random_compress(guest, c);
		}
	}
	guest_ends(guest);
}

/**
 * struct history - all that each sector has been
 * @guest: whose disk it is
 * @flushes: how many flushes have been completed
 * @below: bytes of the backing file
 * @entries: the first of @count values, those of a sector linked by @next
 * @count: how many there are
 * @room: how many there is space for
 * @last: the newest value of each sector, an index in @entries
 * @shown: problems that were reported
 * @marked: states of a crash that have the dirty bit
 * @stale: those that have counts that are too low
 */
struct history {
	struct guest *guest;
	u64 flushes;
	u64 below;
	struct {
		u32 seed;
		u32 flush;	/* how many flushes there had been */
		u32 next;	/* older */
	} *entries;
	u32 count;
	u32 room;
	u32 *last;
	u32 shown;
	u32 marked;
	u32 stale;
};

static void remember(struct history *h)
{
	u64 i;

	for (i = 0; i < h->guest->sectors; i++) {
		u32 seed = h->guest->seeds[i];

		if (h->last[i] && h->entries[h->last[i]].seed == seed)
			continue;
		KUNIT_ASSERT_LT(h->guest->test, h->count, h->room);
		h->entries[h->count].seed = seed;
		h->entries[h->count].flush = h->flushes;
		h->entries[h->count].next = h->last[i];
		h->last[i] = h->count++;
	}
}

/* Whether a sector may hold this after a crash behind that many flushes. */
static bool possible(struct history *h, u64 sector, u32 seed, u64 flushes)
{
	u32 e;

	for (e = h->last[sector]; e; e = h->entries[e].next) {
		if (h->entries[e].seed == seed)
			return true;
		/* Durable since then, and the one before it is gone. */
		if (h->entries[e].flush < flushes)
			return false;
	}
	return false;
}

static bool is_dirty(const struct qcow_test_disk *disk)
{
	const struct qcow_disk_header *header = (const void *)disk->bytes;

	return be32_to_cpu(header->version) >= 3 &&
	       be64_to_cpu(header->incompatible_features) & QCOW_INCOMPAT_DIRTY;
}

static void check_crash(struct qcow_test_disk *disk, u64 mark, void *private)
{
	struct history *h = private;
	struct kunit *test = h->guest->test;
	struct qcow_test_result result;
	u8 sector[SECTOR];
	u64 i;
	u32 seed;

	if (h->shown > 10)
		return;
	/* With the dirty bit nobody believes the counts, nor the COPIED flags. */
	qcow_test_disk_check(disk, &result);
	if (is_dirty(disk)) {
		h->marked++;
		h->stale += !!result.errors;
	} else if (result.errors || result.copied_wrong) {
		KUNIT_FAIL(test, "after flush %llu: %s", mark, result.first);
		h->shown++;
	}
	for (i = 0; i < h->guest->sectors; i++) {
		if (qcow_test_disk_read(disk, i * SECTOR, sector))
			seed = qcow_test_seed(sector, i * SECTOR);
		else
			seed = i * SECTOR < h->below ? SEED_BELOW : 0;
		if (!possible(h, i, seed, mark)) {
			KUNIT_FAIL(test, "after flush %llu sector %llu is %u",
				   mark, i, seed);
			h->shown++;
			break;
		}
	}
}

static void a_crash_loses_nothing_durable(struct kunit *test)
{
	const struct random_case *c = test->param_value;
	struct guest *guest = random_guest(test, c);
	struct history h = {
		.guest = guest, .below = c->below, .count = 1, .room = 400000,
	};
	struct rnd_state rnd;
	u64 states;
	u32 i;

	h.entries = kvcalloc(h.room, sizeof(*h.entries), GFP_KERNEL);
	h.last = kunit_kcalloc(test, guest->sectors, sizeof(u32), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, h.last);
	KUNIT_ASSERT_NOT_NULL(test, h.entries);
	remember(&h);
	h.flushes = 1;
	qcow_test_file_log(guest->tf, true);
	qcow_test_file_mark(guest->tf, h.flushes);

	prandom_seed_state(&rnd, 7);
	for (i = 0; i < c->rounds / 8; i++) {
		random_step(guest, &rnd, SEED_WRITE + i);
		remember(&h);
		if (prandom_u32_state(&rnd) % 8 == 0) {
			int err;

			/* Of what is frozen, the dirty bit is cleared meanwhile. */
			err = prandom_u32_state(&rnd) % 4 ?
			      qcow_commit_links(image_of(guest)) :
			      qcow_image_settle(image_of(guest));
			KUNIT_ASSERT_EQ(test, err, 0);
			h.flushes++;
			qcow_test_file_mark(guest->tf, h.flushes);
		}
	}
	KUNIT_ASSERT_EQ(test, qcow_test_image_close(test, image_of(guest)), 0);
	qcow_test_file_log(guest->tf, false);

	states = qcow_test_crashes(guest->tf, guest->before, 3, check_crash, &h);
	kunit_info(test, "%s: %llu states of a crash\n", c->name, states);
	KUNIT_EXPECT_GT(test, states, 50);
	/* Those are the states that the test is about. */
	KUNIT_EXPECT_EQ(test, !!h.marked, !!(c->compatible & LAZY));
	KUNIT_EXPECT_EQ(test, !!h.stale, !!(c->compatible & LAZY));
	kvfree(h.entries);
}

/* What is in the file now; the image stays open. */
static struct qcow_test_disk *guest_peeks(struct guest *guest, bool *dirty)
{
	struct qcow_test_disk *disk = qcow_test_file_load(guest->tf);

	*dirty = is_dirty(disk);
	return disk;
}

static void lazy_refcounts_are_written_in_the_end(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M, .compatible = LAZY };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;
	u64 cluster;
	bool dirty;

	qcow_test_disk_add_data(disk, 0, SEED_IMAGE);
	guest = guest_create(disk, spec.size, 0);
	/* No count changes. */
	guest_write(guest, 0, SECTOR, SEED_WRITE);
	KUNIT_ASSERT_EQ(test, qcow_commit_links(image_of(guest)), 0);
	guest_peeks(guest, &dirty);
	KUNIT_EXPECT_FALSE(test, dirty);

	guest_write(guest, SZ_64K, SECTOR, SEED_WRITE);
	guest_peeks(guest, &dirty);
	KUNIT_EXPECT_TRUE(test, dirty);
	KUNIT_ASSERT_EQ(test, qcow_commit_links(image_of(guest)), 0);
	KUNIT_EXPECT_FALSE(test, qcow_image_dirty(image_of(guest)));
	disk = guest_peeks(guest, &dirty);
	cluster = (qcow_test_disk_entry(disk, SZ_64K) & QCOW_L2_OFFSET_MASK) >> 16;
	KUNIT_EXPECT_NE(test, cluster, 0);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_refcount(disk, cluster), 0);

	/* Who wants memory back gets it. */
	KUNIT_ASSERT_EQ(test, qcow_commit(image_of(guest)), 0);
	disk = guest_peeks(guest, &dirty);
	KUNIT_EXPECT_TRUE(test, dirty);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_refcount(disk, cluster), 1);

	guest_write(guest, 2 * SZ_64K, SECTOR, SEED_WRITE);
	guest_ends(guest);
	guest_peeks(guest, &dirty);
	KUNIT_EXPECT_FALSE(test, dirty);
}

static void what_is_settled_is_as_if_closed(struct kunit *test)
{
	const struct random_case *c = test->param_value;
	struct guest *guest = random_guest(test, c);
	struct qcow_image *image = image_of(guest);
	struct qcow_test_result result;
	struct rnd_state rnd;
	u64 writes;
	bool dirty;
	u32 i, j;

	prandom_seed_state(&rnd, 11);
	for (i = 0; i < 8; i++) {
		for (j = 0; j < 10; j++)
			random_step(guest, &rnd, SEED_WRITE + i);
		KUNIT_ASSERT_EQ(test, qcow_image_settle(image), 0);
		KUNIT_EXPECT_EQ(test, image->nr_dirty, 0);
		KUNIT_EXPECT_EQ(test, image->nr_frees + image->nr_reclaims, 0);
		qcow_test_disk_check(guest_peeks(guest, &dirty), &result);
		KUNIT_EXPECT_FALSE(test, dirty);
		KUNIT_EXPECT_EQ_MSG(test, result.errors + result.leaks +
				    result.copied_wrong, 0, "%s", result.first);
		/* A flush has nothing to do then. */
		writes = guest->tf->writes;
		KUNIT_EXPECT_EQ(test, qcow_commit(image), 0);
		KUNIT_EXPECT_EQ(test, guest->tf->writes, writes);
	}
	guest_ends(guest);
}

static void an_image_that_failed_does_not_settle(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M, .compatible = LAZY };
	struct guest *guest;
	bool dirty;
	u32 i;

	for (i = 0; i < 2; i++) {
		guest = guest_create(qcow_test_disk_create(test, &spec),
				     spec.size, 0);
		guest_write(guest, 0, SECTOR, SEED_WRITE);
		if (i)
			guest->tf->sync_error = -EIO;
		else
			qcow_image_corrupt(image_of(guest), "as a test");
		KUNIT_EXPECT_EQ(test, qcow_image_settle(image_of(guest)),
				i ? -EIO : 0);
		guest_peeks(guest, &dirty);
		KUNIT_EXPECT_TRUE(test, dirty);
	}
}

static void an_image_that_failed_stays_dirty(struct kunit *test)
{
	struct qcow_test_spec spec = { .size = SZ_1M, .compatible = LAZY };
	struct guest *guest;
	bool dirty;
	u32 i;

	for (i = 0; i < 2; i++) {
		guest = guest_create(qcow_test_disk_create(test, &spec),
				     spec.size, 0);
		guest_write(guest, 0, SECTOR, SEED_WRITE);
		if (i)
			guest->tf->sync_error = -EIO;
		else
			qcow_image_corrupt(image_of(guest), "as a test");
		KUNIT_EXPECT_EQ(test, qcow_test_image_close(test, image_of(guest)),
				i ? -EIO : 0);
		guest_peeks(guest, &dirty);
		KUNIT_EXPECT_TRUE(test, dirty);
	}
}

static void version_2_never_gets_a_dirty_bit(struct kunit *test)
{
	struct qcow_test_spec spec = { .version = 2, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct guest *guest;

	/* Where version 3 has its features. Zeroes end the extensions. */
	memset(disk->bytes + 80, 0xff, 32);
	guest = guest_create(disk, spec.size, 0);
	guest_write(guest, 0, SECTOR, SEED_WRITE);
	disk = guest_ends(guest);
	KUNIT_EXPECT_NULL(test, memchr_inv(disk->bytes + 72, 0, 8));
	KUNIT_EXPECT_NULL(test, memchr_inv(disk->bytes + 80, 0xff, 32));
}

/* An L2 entry has fewer bits for where compressed data is than for other data. */
static void nothing_is_packed_where_no_entry_reaches(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 21, .size = SZ_16M };
	struct guest *guest = guest_create(qcow_test_disk_create(test, &spec),
					   spec.size, 0);
	struct qcow_image *image = image_of(guest);
	u8 *buf = kunit_kzalloc(test, SZ_2M, GFP_KERNEL);
	struct qcow_message msg;
	u64 done;

	KUNIT_ASSERT_NOT_NULL(test, buf);
	KUNIT_ASSERT_EQ(test, qcow_pack_init(image, QCOW_COMPRESS_IMAGE, &msg), 0);
	image->alloc_cursor = BIT_ULL(QCOW_PACKED_OFFSET_BITS(21)) >> 21;
	KUNIT_EXPECT_EQ(test, write_packed(image, 0, SZ_2M, buf, &done), 1);
	KUNIT_EXPECT_GE(test, image->alloc_cursor,
			BIT_ULL(QCOW_PACKED_OFFSET_BITS(21)) >> 21);
	image->alloc_cursor = 0;
	KUNIT_EXPECT_EQ(test, write_packed(image, 0, SZ_2M, buf, &done), 0);
}

static struct kunit_case cluster_test_cases[] = {
	KUNIT_CASE_PARAM(writes_allocate, cluster_size_gen_params),
	KUNIT_CASE_PARAM(writes_copy_what_they_do_not_cover,
			 cluster_size_gen_params),
	KUNIT_CASE(version_2_is_written_too),
	KUNIT_CASE(overwrites_stay_in_place),
	KUNIT_CASE(sequential_writes_are_contiguous),
	KUNIT_CASE_PARAM(a_snapshot_is_not_written, cluster_size_gen_params),
	KUNIT_CASE(a_table_that_lacks_the_flag_is_not_copied),
	KUNIT_CASE(a_shared_zero_cluster_is_not_written),
	KUNIT_CASE(a_zero_cluster_with_a_place_shows_no_old_data),
	KUNIT_CASE_PARAM(subclusters_are_told_apart, subcluster_gen_params),
	KUNIT_CASE(subclusters_that_contradict_are_damage),
	KUNIT_CASE_PARAM(zeroes_read_as_zeroes_and_free, zero_gen_params),
	KUNIT_CASE(ranges_without_a_table_are_cleared),
	KUNIT_CASE(the_last_part_of_a_cluster_can_be_discarded),
	KUNIT_CASE(what_was_discarded_can_be_written_again),
	KUNIT_CASE(a_discard_never_empties_the_header),
	KUNIT_CASE(a_write_that_fails_leaves_nothing),
	KUNIT_CASE(a_failed_data_write_is_told_and_undone),
	KUNIT_CASE(an_unreadable_backing_file_fails_the_write),
	KUNIT_CASE(an_image_that_failed_is_not_written),
	KUNIT_CASE(a_full_file_system_fails_writes_only),
	KUNIT_CASE(a_damaged_entry_is_never_followed),
	KUNIT_CASE(a_table_behind_the_end_of_the_file_is_not_written),
	KUNIT_CASE(reads_may_fail_at_any_time),
	KUNIT_CASE(writes_may_fail_at_any_time),
	KUNIT_CASE(barriers_may_fail_at_any_time),
	KUNIT_CASE(many_writers_share_clusters),
	KUNIT_CASE(tables_are_evicted_and_read_again),
	KUNIT_CASE_PARAM(random_work_is_read_back, random_gen_params),
	KUNIT_CASE_PARAM(a_crash_loses_nothing_durable, random_gen_params),
	KUNIT_CASE(lazy_refcounts_are_written_in_the_end),
	KUNIT_CASE_PARAM(what_is_settled_is_as_if_closed, random_gen_params),
	KUNIT_CASE(an_image_that_failed_does_not_settle),
	KUNIT_CASE(an_image_that_failed_stays_dirty),
	KUNIT_CASE(version_2_never_gets_a_dirty_bit),
	KUNIT_CASE(nothing_is_packed_where_no_entry_reaches),
	{}
};

static struct kunit_suite cluster_test_suite = {
	.name = "qcow-cluster",
	.test_cases = cluster_test_cases,
};

kunit_test_suite(cluster_test_suite);
