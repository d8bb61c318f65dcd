// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: compressed clusters, well made, strange and damaged ones, and what is
 * kept of them.
 */
#include <kunit/test.h>
#include <linux/kernel.h>
#include <linux/prandom.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uio.h>
#include <linux/workqueue.h>

#include "image_builder.h"

#define SEED	7
#define ZSTD	QCOW_INCOMPAT_COMPRESSION
#define BUF_BYTES	SZ_64K

static u32 type_of(u64 incompatible)
{
	return incompatible & ZSTD ? QCOW_COMPRESSION_ZSTD :
				     QCOW_COMPRESSION_ZLIB;
}

static struct qcow_chain *chain_of(struct kunit *test, struct qcow_test_file *tf,
				   bool writable)
{
	return qcow_test_chain(test, qcow_test_image_open(tf, writable), NULL,
			       NULL);
}

static void *buffer(struct kunit *test, size_t bytes)
{
	void *buf = kunit_kzalloc(test, bytes, GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, buf);
	return buf;
}

/* Read a range, in pieces of a size that cuts clusters anywhere. */
static void expect_filled(struct kunit *test, struct qcow_chain *chain, u64 from,
			  u64 length, u32 seed)
{
	u8 *buf = buffer(test, BUF_BYTES);
	u64 step, end = from + length;

	for (; from < end; from += step) {
		step = min_t(u64, end - from, BUF_BYTES - SZ_1K);
		KUNIT_ASSERT_EQ_MSG(test, qcow_chain_read(chain, from, step, buf),
				    0, "at 0x%llx", from);
		KUNIT_ASSERT_TRUE_MSG(test, qcow_test_filled(buf, from, step,
							     seed),
				      "at 0x%llx", from);
	}
	kunit_kfree(test, buf);
}

/* ---- data as QEMU makes it ------------------------------------------------ */

struct kind {
	u32 cluster_bits;
	u64 incompatible;
};

static const struct kind kinds[] = {
	{ 9, 0 }, { 10, ZSTD }, { 12, 0 }, { 12, ZSTD }, { 16, 0 }, { 16, ZSTD },
	{ 16, ZSTD | QCOW_INCOMPAT_EXTENDED_L2 }, { 21, 0 }, { 21, ZSTD },
};

static void kind_desc(const struct kind *kind, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%u bytes, features 0x%llx",
		 1U << kind->cluster_bits, kind->incompatible);
}

KUNIT_ARRAY_PARAM(kind, kinds, kind_desc);

static void what_was_compressed_is_read(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	u64 cs = 1ULL << kind->cluster_bits, i;
	struct qcow_test_spec spec = {
		.cluster_bits = kind->cluster_bits, .size = 4 * cs + 512,
		.incompatible = kind->incompatible,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_chain *chain;

	for (i = 0; i < 5; i++)
		qcow_test_disk_add_packed(disk, i * cs, SEED);
	qcow_test_disk_expect_clean(disk);
	/* The file ends where the data does. */
	disk->size = disk->packed;
	chain = chain_of(test, qcow_test_file_create(disk), false);
	expect_filled(test, chain, 0, spec.size, SEED);
	expect_filled(test, chain, cs - 512, 1024, SEED);
	KUNIT_EXPECT_FALSE(test, chain->layers[0]->corrupt);
}

static void writes_and_discards_give_up_what_was_touched(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	u64 cs = 1ULL << kind->cluster_bits, i;
	struct qcow_test_spec spec = {
		.cluster_bits = kind->cluster_bits, .size = 8 * cs,
		.incompatible = kind->incompatible,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	struct qcow_write write;
	u8 *buf = buffer(test, 512);

	for (i = 0; i < 8; i++)
		qcow_test_disk_add_packed(disk, i * cs, SEED);
	tf = qcow_test_file_create(disk);
	chain = chain_of(test, tf, true);

	/* One cluster is written in part, others are taken away as a whole. */
	qcow_test_fill(buf, 2 * cs, 512, SEED + 1);
	KUNIT_ASSERT_EQ(test, qcow_write_begin(chain, 2 * cs, 512, &write), 0);
	KUNIT_ASSERT_EQ(test, write.length, 512);
	KUNIT_ASSERT_EQ(test, qcow_file_write(&write.image->file, buf, 512,
					      write.host_offset), 0);
	KUNIT_ASSERT_EQ(test, qcow_fill_write(write.image, &write.tail,
					      write.host_offset + 512,
					      2 * cs + 512), 0);
	qcow_write_end(&write, 0);
	KUNIT_ASSERT_EQ(test, qcow_discard(chain, 3 * cs, cs, false), 0);
	KUNIT_ASSERT_EQ(test, qcow_discard(chain, 4 * cs, cs, true), 0);
	KUNIT_ASSERT_EQ(test, qcow_write_zeroes(chain, 5 * cs, cs, true), 0);
	KUNIT_ASSERT_EQ(test, qcow_write_zeroes(chain, 6 * cs, cs, false), 0);

	expect_filled(test, chain, 0, 2 * cs, SEED);
	expect_filled(test, chain, 2 * cs, 512, SEED + 1);
	expect_filled(test, chain, 2 * cs + 512, cs - 512, SEED);
	expect_filled(test, chain, 7 * cs, cs, SEED);
	for (i = 3; i < 7; i++) {
		KUNIT_ASSERT_EQ(test, qcow_chain_read(chain, i * cs, 512, buf), 0);
		KUNIT_EXPECT_EQ(test, qcow_test_seed(buf, i * cs), 0);
	}
	disk = qcow_test_close_and_load(tf, chain->layers[0]);
	qcow_test_disk_expect_clean(disk);
	KUNIT_EXPECT_EQ(test, qcow_test_disk_entry(disk, 6 * cs) &
			QCOW_L2_OFFSET_MASK, 0);
}

/* ---- data as others may make it ------------------------------------------- */

/**
 * struct stream - data for one cluster of 4 KiB
 * @data: compressed
 * @length: of it
 * @plain: what it must be read as, from qcow_test_fill()
 */
struct stream {
	u8 data[2 * SZ_4K];
	u32 length;
	u8 plain[SZ_4K];
};

static void put(struct stream *s, const void *data, u32 length)
{
	memcpy(s->data + s->length, data, length);
	s->length += length;
}

/* A block of deflate that is not compressed. */
static void put_stored(struct stream *s, bool last, const void *data, u16 length)
{
	u8 head[] = {
		last, length & 0xff, length >> 8, ~length & 0xff,
		(u16)~length >> 8,
	};

	put(s, head, sizeof(head));
	put(s, data, length);
}

static void put_packed(struct kunit *test, struct stream *s, u64 incompatible,
		       const void *data, u32 length)
{
	s->length += qcow_test_compress(test, type_of(incompatible), data, length,
					s->data + s->length,
					sizeof(s->data) - s->length);
}

static void longer_than_a_cluster(struct kunit *test, struct stream *s)
{
	u32 i;

	for (i = 0; i < SZ_4K; i += 8)
		put_stored(s, i + 8 == SZ_4K, s->plain + i, 8);
}

static void without_an_end(struct kunit *test, struct stream *s)
{
	put_stored(s, false, s->plain, SZ_4K);
}

static void more_than_a_cluster(struct kunit *test, struct stream *s)
{
	put_stored(s, false, s->plain, SZ_4K);
	put_stored(s, true, s->plain, 100);
}

static void followed_by_garbage(struct kunit *test, struct stream *s)
{
	put_packed(test, s, 0, s->plain, SZ_4K);
	memset(s->data + s->length, 0xa5, 700);
	s->length += 700;
}

static void too_short(struct kunit *test, struct stream *s)
{
	put_packed(test, s, 0, s->plain, SZ_4K - 1);
}

static void cut_off(struct kunit *test, struct stream *s)
{
	put_stored(s, true, s->plain, SZ_4K);
	s->length -= 1024;
}

static void of_noise(struct kunit *test, struct stream *s)
{
	s->length = 3000;
	memset(s->data, 0xff, s->length);
}

static void of_zeroes(struct kunit *test, struct stream *s)
{
	s->length = 3000;
}

static void two_frames(struct kunit *test, struct stream *s)
{
	/* and what is to be skipped before, between and behind them */
	static const u8 skip[] = { 0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3 };

	put(s, skip, sizeof(skip));
	put_packed(test, s, ZSTD, s->plain, 1000);
	put(s, skip, sizeof(skip));
	put_packed(test, s, ZSTD, s->plain + 1000, SZ_4K - 1000);
	put(s, skip, sizeof(skip));
}

/* A frame that says nothing of its content, and asks for a window of 64 MiB. */
static void a_large_window(struct kunit *test, struct stream *s)
{
	static const u8 head[] = { 0x28, 0xb5, 0x2f, 0xfd, 0x00, 16 << 3 };
	u32 block = SZ_4K << 3 | 1;	/* the last one, and not compressed */
	u8 block_head[] = { block & 0xff, block >> 8, block >> 16 };

	put(s, head, sizeof(head));
	put(s, block_head, sizeof(block_head));
	put(s, s->plain, SZ_4K);
}

static void frames_too_short(struct kunit *test, struct stream *s)
{
	put_packed(test, s, ZSTD, s->plain, 1000);
	put_packed(test, s, ZSTD, s->plain + 1000, 1000);
}

static void a_frame_too_long(struct kunit *test, struct stream *s)
{
	put_packed(test, s, ZSTD, s->plain, 1000);
	put_packed(test, s, ZSTD, s->plain, SZ_4K);
}

struct odd_case {
	const char *name;
	void (*make)(struct kunit *test, struct stream *s);
	u64 incompatible;
	int error;
};

static const struct odd_case odd_cases[] = {
	{ "zlib: longer than a cluster", longer_than_a_cluster },
	{ "zlib: without an end", without_an_end },
	{ "zlib: more than a cluster", more_than_a_cluster },
	{ "zlib: followed by garbage", followed_by_garbage },
	{ "zlib: too short", too_short, 0, -EIO },
	{ "zlib: cut off", cut_off, 0, -EIO },
	{ "zlib: noise", of_noise, 0, -EIO },
	{ "zlib: zeroes", of_zeroes, 0, -EIO },
	{ "zstd: two frames, and some to skip", two_frames, ZSTD },
	{ "zstd: a large window", a_large_window, ZSTD },
	{ "zstd: too short", frames_too_short, ZSTD, -EIO },
	{ "zstd: too long", a_frame_too_long, ZSTD, -EIO },
	{ "zstd: noise", of_noise, ZSTD, -EIO },
	{ "zstd: zeroes", of_zeroes, ZSTD, -EIO },
};

static void odd_desc(const struct odd_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(odd, odd_cases, odd_desc);

static void odd_data_is_read_or_harmless(struct kunit *test)
{
	const struct odd_case *c = test->param_value;
	struct qcow_test_spec spec = {
		.cluster_bits = 12, .size = SZ_64K,
		.incompatible = c->incompatible,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct stream *s = buffer(test, sizeof(*s));
	u8 *buf = buffer(test, SZ_4K);
	struct qcow_chain *chain;
	u64 guest_offset;

	qcow_test_disk_add_packed(disk, 0, SEED);
	/* Twice, so that it begins at different places. */
	for (guest_offset = SZ_4K; guest_offset < 3 * SZ_4K;
	     guest_offset += SZ_4K) {
		memset(s, 0, sizeof(*s));
		qcow_test_fill(s->plain, guest_offset, SZ_4K, SEED);
		c->make(test, s);
		qcow_test_disk_pack(disk, guest_offset, s->data, s->length);
		/* In what is packed, nothing is left of what comes behind. */
		if (c->error)
			disk->packed = 0;
	}
	qcow_test_disk_add_packed(disk, 3 * SZ_4K, SEED);

	chain = chain_of(test, qcow_test_file_create(disk), true);
	expect_filled(test, chain, 0, SZ_4K, SEED);
	expect_filled(test, chain, 3 * SZ_4K, SZ_4K, SEED);
	for (guest_offset = SZ_4K; guest_offset < 3 * SZ_4K;
	     guest_offset += SZ_4K) {
		int ret = qcow_chain_read(chain, guest_offset, SZ_4K, buf);

		KUNIT_EXPECT_EQ(test, ret, c->error);
		if (!ret)
			KUNIT_EXPECT_TRUE(test, qcow_test_filled(buf, guest_offset,
								 SZ_4K, SEED));
	}
	KUNIT_EXPECT_EQ(test, qcow_image_error(chain->layers[0]), 0);
}

static void a_window_of_32_kib_is_used(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 16, .size = SZ_64K };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	/*
	 * After a stored block of 32 KiB one of the fixed code: 258 bytes from
	 * 32768 bytes ago, and so on 127 times, 2 more literals, and the end.
	 */
	u8 *data = buffer(test, SZ_64K), *buf = buffer(test, SZ_64K);
	u32 bits = 0, at = 5 + SZ_32K, i, n;
	struct qcow_chain *chain;

	data[1] = 0x00;
	data[2] = 0x80;
	data[3] = 0xff;
	data[4] = 0x7f;
	for (i = 0; i < SZ_32K; i++)
		data[5 + i] = i * 13 ^ i >> 8;
#define PUT_BIT(bit)	do {					\
		if (bit)					\
			data[at + bits / 8] |= 1 << bits % 8;	\
		bits++;						\
	} while (0)
	/* last block, fixed codes: 1 10 (low bit first: 01) */
	PUT_BIT(1);
	PUT_BIT(1);
	PUT_BIT(0);
	for (n = 0; n < 127; n++) {
		/* length 258: code 285 is 11000101 */
		for (i = 8; i--;)
			PUT_BIT(0xc5 >> i & 1);
		/* distance 24577 to 32768: code 29, then 13 bits, all set */
		for (i = 5; i--;)
			PUT_BIT(29 >> i & 1);
		for (i = 0; i < 13; i++)
			PUT_BIT(1);
	}
	/* two literals of value 0: 00110000; then the end: 0000000 */
	for (n = 0; n < 2; n++)
		for (i = 8; i--;)
			PUT_BIT(0x30 >> i & 1);
	bits += 7;
#undef PUT_BIT
	qcow_test_disk_pack(disk, 0, data, at + (bits + 7) / 8);
	chain = chain_of(test, qcow_test_file_create(disk), false);
	KUNIT_ASSERT_EQ(test, qcow_chain_read(chain, 0, SZ_64K, buf), 0);
	KUNIT_EXPECT_EQ(test, memcmp(buf, data + 5, SZ_32K), 0);
	KUNIT_EXPECT_EQ(test, memcmp(buf + SZ_32K, data + 5, SZ_32K - 2), 0);
}

/* ---- what is kept --------------------------------------------------------- */

static int read_packed_sector(struct kunit *test, struct qcow_image *image,
			      u64 entry, u8 *buf)
{
	struct kvec vec = { .iov_base = buf, .iov_len = 512 };
	struct iov_iter iter;

	iov_iter_kvec(&iter, ITER_DEST, &vec, 1, 512);
	return qcow_unpack_read(image, entry, 0, &iter);
}

static void a_cluster_is_kept_until_it_is_freed(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u8 *buf = buffer(test, 512);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	struct qcow_image *image;
	u64 entry[3], i;

	for (i = 0; i < 3; i++)
		entry[i] = qcow_test_disk_add_packed(disk, i * SZ_4K, SEED);
	tf = qcow_test_file_create(disk);
	chain = chain_of(test, tf, true);
	image = chain->layers[0];
	expect_filled(test, chain, 0, 2 * SZ_4K, SEED);

	tf->read_error = -EIO;
	tf->read_budget = 0;
	expect_filled(test, chain, 512, SZ_4K, SEED);
	KUNIT_EXPECT_EQ(test, read_packed_sector(test, image, entry[2], buf),
			-EIO);
	tf->read_budget = -1;
	KUNIT_EXPECT_EQ(test, read_packed_sector(test, image, entry[2], buf), 0);

	/* They share a cluster, which is free when the last one is gone. */
	KUNIT_ASSERT_EQ(test, qcow_discard(chain, 0, 2 * SZ_4K, false), 0);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	tf->read_budget = 0;
	KUNIT_EXPECT_EQ(test, read_packed_sector(test, image, entry[0], buf), 0);
	tf->read_budget = -1;
	KUNIT_ASSERT_EQ(test, qcow_discard(chain, 2 * SZ_4K, SZ_4K, false), 0);
	KUNIT_ASSERT_EQ(test, qcow_commit_all(image), 0);
	tf->read_budget = 0;
	for (i = 0; i < 3; i++)
		KUNIT_EXPECT_EQ(test, read_packed_sector(test, image, entry[i],
							 buf), -EIO);
	tf->read_budget = -1;
	KUNIT_EXPECT_EQ(test, image->cache->unpack.bytes, 0);
	qcow_test_disk_expect_clean(qcow_test_close_and_load(tf, image));
}

static void what_is_kept_is_bounded(struct kunit *test)
{
	struct qcow_test_spec spec = {
		.cluster_bits = 12, .size = SZ_1M, .refcount_bits = 64,
	};
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct qcow_unpack *unpack;
	struct qcow_image *image;
	struct qcow_chain *chain;
	u64 at;

	for (at = 0; at < SZ_1M; at += SZ_4K)
		qcow_test_disk_add_packed(disk, at, SEED);
	image = qcow_test_image_open_cached(qcow_test_file_create(disk), false,
					    SZ_256K);
	chain = qcow_test_chain(test, image, NULL, NULL);
	unpack = &image->cache->unpack;
	expect_filled(test, chain, 0, SZ_1M, SEED);
	KUNIT_EXPECT_GT(test, unpack->bytes, SZ_16K);
	KUNIT_EXPECT_LE(test, unpack->bytes, SZ_64K + SZ_4K);
	KUNIT_EXPECT_EQ(test, atomic_read(&unpack->unpackers.nr), 1);
	expect_filled(test, chain, 0, SZ_1M, SEED);
}

static void a_failed_read_is_tried_again(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 16, .size = SZ_1M };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	u8 *buf = buffer(test, 512);
	struct qcow_test_file *tf;
	struct qcow_chain *chain;
	u64 entry;

	entry = qcow_test_disk_add_packed(disk, 0, SEED);
	tf = qcow_test_file_create(disk);
	chain = chain_of(test, tf, false);
	tf->read_error = -ENOMEM;
	tf->read_budget = 0;
	KUNIT_EXPECT_EQ(test, read_packed_sector(test, chain->layers[0], entry,
						 buf), -ENOMEM);
	tf->read_budget = -1;
	expect_filled(test, chain, 0, SZ_64K, SEED);
}

#define READERS		8

/**
 * struct reader - reads every cluster, in an order of its own
 * @work: does it
 * @chain: the image
 * @clusters: how many it has
 * @step: to the next cluster to read, odd
 * @buf: a cluster
 * @wrong: how many were not what they should be
 */
struct reader {
	struct work_struct work;
	struct qcow_chain *chain;
	u32 clusters;
	u32 step;
	u8 *buf;
	u32 wrong;
};

static void reader_work(struct work_struct *work)
{
	struct reader *reader = container_of(work, struct reader, work);
	u32 i;

	for (i = 0; i < 3 * reader->clusters; i++) {
		u64 at = (u64)(i * reader->step % reader->clusters) * SZ_4K;

		if (qcow_chain_read(reader->chain, at, SZ_4K, reader->buf) ||
		    !qcow_test_filled(reader->buf, at, SZ_4K, SEED))
			reader->wrong++;
	}
}

/* More would be there if memory was; one is set aside for when it is not. */
static void readers_take_turns_with_one_unpacker(struct kunit *test)
{
	struct qcow_test_spec spec = { .cluster_bits = 12, .size = SZ_256K };
	struct qcow_test_disk *disk = qcow_test_disk_create(test, &spec);
	struct reader *readers = buffer(test, READERS * sizeof(*readers));
	struct qcow_image *image;
	struct workqueue_struct *wq;
	struct qcow_unpack *unpack;
	u64 at;
	u32 i;

	for (at = 0; at < SZ_256K; at += SZ_4K)
		qcow_test_disk_add_packed(disk, at, SEED);
	image = qcow_test_image_open(qcow_test_file_create(disk), false);
	unpack = &image->cache->unpack;
	unpack->unpackers.max = 1;
	unpack->limit = SZ_32K;
	wq = alloc_workqueue("qcow-test", WQ_UNBOUND, READERS);
	KUNIT_ASSERT_NOT_NULL(test, wq);
	for (i = 0; i < READERS; i++) {
		readers[i].chain = qcow_test_chain(test, image, NULL, NULL);
		readers[i].clusters = SZ_256K / SZ_4K;
		readers[i].step = 2 * i + 1;
		readers[i].buf = buffer(test, SZ_4K);
		INIT_WORK(&readers[i].work, reader_work);
		queue_work(wq, &readers[i].work);
	}
	destroy_workqueue(wq);
	for (i = 0; i < READERS; i++)
		KUNIT_EXPECT_EQ(test, readers[i].wrong, 0);
	KUNIT_EXPECT_LE(test, unpack->bytes, SZ_64K + SZ_4K);
}

static struct kunit_case compress_test_cases[] = {
	KUNIT_CASE_PARAM(what_was_compressed_is_read, kind_gen_params),
	KUNIT_CASE_PARAM(writes_and_discards_give_up_what_was_touched,
			 kind_gen_params),
	KUNIT_CASE_PARAM(odd_data_is_read_or_harmless, odd_gen_params),
	KUNIT_CASE(a_window_of_32_kib_is_used),
	KUNIT_CASE(a_cluster_is_kept_until_it_is_freed),
	KUNIT_CASE(what_is_kept_is_bounded),
	KUNIT_CASE(a_failed_read_is_tried_again),
	KUNIT_CASE(readers_take_turns_with_one_unpacker),
	{}
};

static struct kunit_suite compress_test_suite = {
	.name = "qcow-compress",
	.test_cases = compress_test_cases,
};

kunit_test_suite(compress_test_suite);
