// SPDX-License-Identifier: GPL-2.0-only
/*
 * Images for unit tests, see image_builder.h.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/cred.h>
#include <linux/delay.h>
#include <linux/falloc.h>
#include <linux/file.h>
#include <linux/mm.h>
#include <linux/prandom.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/uio.h>
#include <linux/vmalloc.h>
#include <linux/zlib.h>
#include <linux/zstd.h>

#include <linux/qcow.h>

#include "header_fields.h"
#include "image_builder.h"

/* The newest kernels have a type for the flags of a mapping. */
#ifdef EMPTY_VMA_FLAGS
#define QCOW_TEST_NORESERVE	mk_vma_flags(VMA_NORESERVE_BIT)
#else
#define QCOW_TEST_NORESERVE	VM_NORESERVE
#endif

#define SECTOR		512U

/* ---- bytes ---------------------------------------------------------------- */

static u64 load(const struct qcow_test_disk *disk, u64 at, u32 bytes)
{
	u64 value = 0;
	__be64 eight;
	__be32 four;
	u32 i;

	/* Nearly all that the checker looks at. */
	if (bytes == sizeof(eight) && at + sizeof(eight) <= disk->size) {
		memcpy(&eight, disk->bytes + at, sizeof(eight));
		return be64_to_cpu(eight);
	}
	if (bytes == sizeof(four) && at + sizeof(four) <= disk->size) {
		memcpy(&four, disk->bytes + at, sizeof(four));
		return be32_to_cpu(four);
	}
	/* Behind the end of the file there are zeroes. */
	for (i = 0; i < bytes; i++)
		value = value << 8 | (at + i < disk->size ? disk->bytes[at + i] : 0);
	return value;
}

static void store(struct qcow_test_disk *disk, u64 at, u32 bytes, u64 value)
{
	KUNIT_ASSERT_LE(disk->test, at + bytes, disk->room);
	while (bytes--) {
		disk->bytes[at + bytes] = value;
		value >>= 8;
	}
}

static u64 get_field(const struct qcow_test_disk *disk, u32 at)
{
	return load(disk, at, header_field_bytes(at));
}

static void set_field(struct qcow_test_disk *disk, u32 at, u64 value)
{
	store(disk, at, header_field_bytes(at), value);
}

#define FIELD(disk, name)	get_field(disk, AT(name))
#define SET(disk, name, value)	set_field(disk, AT(name), value)

static u64 cluster_size(const struct qcow_test_disk *disk)
{
	return 1ULL << disk->cluster_bits;
}

/* What a sector of test data begins with; the rest is one byte repeated. */
struct stamp {
	__be64 guest_offset;
	__be32 seed;
} __packed;

static struct stamp make_stamp(u64 guest_offset, u32 seed, u8 *rest)
{
	struct stamp stamp = {
		.guest_offset = cpu_to_be64(guest_offset),
		.seed = cpu_to_be32(seed),
	};

	*rest = seed * 37 + (guest_offset >> 9);
	return stamp;
}

/**
 * qcow_test_fill() - data that tells where it belongs
 * @buf: whole sectors
 * @guest_offset: of @buf, bytes
 * @length: bytes
 * @seed: tells one write from the others
 */
void qcow_test_fill(void *buf, u64 guest_offset, u64 length, u32 seed)
{
	struct stamp stamp;
	u8 rest;

	for (; length; length -= SECTOR, guest_offset += SECTOR, buf += SECTOR) {
		stamp = make_stamp(guest_offset, seed, &rest);
		memset(buf, rest, SECTOR);
		memcpy(buf, &stamp, sizeof(stamp));
	}
}

/**
 * qcow_test_filled() - whether this is what qcow_test_fill() made
 * @buf: whole sectors
 * @guest_offset: of @buf, bytes
 * @length: bytes
 * @seed: as given to qcow_test_fill()
 */
bool qcow_test_filled(const void *buf, u64 guest_offset, u64 length, u32 seed)
{
	struct stamp stamp;
	u8 rest;

	for (; length; length -= SECTOR, guest_offset += SECTOR, buf += SECTOR) {
		stamp = make_stamp(guest_offset, seed, &rest);
		if (memcmp(buf, &stamp, sizeof(stamp)) ||
		    memchr_inv(buf + sizeof(stamp), rest,
			       SECTOR - sizeof(stamp)))
			return false;
	}
	return true;
}

/**
 * qcow_test_seed() - what qcow_test_fill() made this with
 * @sector: 512 bytes
 * @guest_offset: where they were read
 *
 * Return: the seed; 0 for zeroes; QCOW_TEST_GARBAGE if it is something else.
 */
u32 qcow_test_seed(const void *sector, u64 guest_offset)
{
	const struct stamp *stamp = sector;
	u32 seed = be32_to_cpu(stamp->seed);

	if (!memchr_inv(sector, 0, SECTOR))
		return 0;
	return qcow_test_filled(sector, guest_offset, SECTOR, seed) ?
	       seed : QCOW_TEST_GARBAGE;
}

/* ---- building ------------------------------------------------------------- */

/**
 * struct qcow_test_memo - a compressed cluster that was read
 * @valid: it is one
 * @length: of the compressed data, bytes
 * @packed: the compressed data
 * @plain: a cluster
 * @workspace: to decompress it in
 */
struct qcow_test_memo {
	bool valid;
	u32 length;
	u8 *packed;
	u8 *plain;
	void *workspace;
};

static void memo_free(struct qcow_test_memo *memo)
{
	if (!memo)
		return;
	vfree(memo->packed);
	vfree(memo->plain);
	vfree(memo->workspace);
	kfree(memo);
}

static void disk_free(struct kunit_resource *res)
{
	struct qcow_test_disk *disk = res->data;

	memo_free(disk->memo);
	vfree(disk->bytes);
	kfree(disk);
}

static int disk_init(struct kunit_resource *res, void *context)
{
	struct qcow_test_disk *like = context;
	struct qcow_test_disk *disk = kmemdup(like, sizeof(*like), GFP_KERNEL);

	if (!disk)
		return -ENOMEM;
	disk->bytes = vzalloc(disk->room);
	if (!disk->bytes) {
		kfree(disk);
		return -ENOMEM;
	}
	res->data = disk;
	return 0;
}

static struct qcow_test_disk *disk_alloc(struct kunit *test, u32 cluster_bits,
					 u64 room)
{
	struct qcow_test_disk like = {
		.test = test,
		.room = max(room, 1ULL << cluster_bits),
		.cluster_bits = cluster_bits,
	};
	struct qcow_test_disk *disk;

	disk = kunit_alloc_resource(test, disk_init, disk_free, GFP_KERNEL, &like);
	KUNIT_ASSERT_NOT_NULL(test, disk);
	return disk;
}

static bool disk_match(struct kunit *test, struct kunit_resource *res, void *disk)
{
	return res->data == disk;
}

/**
 * qcow_test_disk_free() - do without an image before the test ends
 * @disk: the image; for tests that make many
 */
void qcow_test_disk_free(struct qcow_test_disk *disk)
{
	kunit_destroy_resource(disk->test, disk_match, disk);
}

static u64 take_clusters(struct qcow_test_disk *disk, u64 clusters)
{
	u64 offset = disk->size;

	disk->size += clusters << disk->cluster_bits;
	KUNIT_ASSERT_LE(disk->test, disk->size, disk->room);
	return offset;
}

/**
 * struct counts - where the refcounts of an image are
 * @table: host offset of the refcount table, bytes
 * @slots: its entries
 * @order: log2 of the width of a refcount in bits
 * @bits: log2 of the refcounts in a refcount block
 */
struct counts {
	u64 table;
	u64 slots;
	u32 order;
	u32 bits;
};

static struct counts counts_of(const struct qcow_test_disk *disk)
{
	struct counts counts = {
		.table = FIELD(disk, refcount_table_offset),
		.slots = FIELD(disk, refcount_table_clusters) <<
			 (disk->cluster_bits - 3),
		.order = FIELD(disk, version) == 2 ? 4 :
			 FIELD(disk, refcount_order),
	};

	counts.bits = disk->cluster_bits + 3 - counts.order;
	return counts;
}

static u64 count_at(const struct qcow_test_disk *disk,
		    const struct counts *counts, u64 cluster)
{
	u64 index = cluster & ((1ULL << counts->bits) - 1);
	u64 slot = cluster >> counts->bits;
	u32 width = 1U << counts->order;
	u64 block;

	if (slot >= counts->slots)
		return 0;
	block = load(disk, counts->table + 8 * slot, 8);
	if (!block)
		return 0;
	if (width >= 8)
		return load(disk, block + index * (width / 8), width / 8);
	return load(disk, block + (index * width >> 3), 1) >>
	       (index * width & 7) & ((1U << width) - 1);
}

/**
 * qcow_test_disk_refcount() - refcount of a cluster
 * @disk: the image
 * @cluster: its number
 */
u64 qcow_test_disk_refcount(struct qcow_test_disk *disk, u64 cluster)
{
	struct counts counts = counts_of(disk);

	return count_at(disk, &counts, cluster);
}

/**
 * qcow_test_disk_set_refcount() - set the refcount of a cluster
 * @disk: the image
 * @cluster: its number
 * @count: the refcount; must fit
 *
 * Makes the refcount block if there is none.
 */
void qcow_test_disk_set_refcount(struct qcow_test_disk *disk, u64 cluster,
				 u64 count)
{
	struct counts counts = counts_of(disk);
	u64 index = cluster & ((1ULL << counts.bits) - 1);
	u64 slot = counts.table + 8 * (cluster >> counts.bits);
	u32 width = 1U << counts.order;
	u32 shift = index * width & 7;
	u64 block, at;
	u8 mask;

	KUNIT_ASSERT_LT(disk->test, cluster >> counts.bits, counts.slots);
	block = load(disk, slot, 8);
	if (!block) {
		if (!count)
			return;
		block = take_clusters(disk, 1);
		store(disk, slot, 8, block);
		qcow_test_disk_set_refcount(disk, block >> disk->cluster_bits, 1);
	}
	if (width >= 8) {
		store(disk, block + index * (width / 8), width / 8, count);
		return;
	}
	mask = ((1U << width) - 1) << shift;
	at = block + (index * width >> 3);
	store(disk, at, 1, (load(disk, at, 1) & ~mask) | count << shift);
}

/**
 * qcow_test_disk_alloc() - clusters at the end of the file, with a refcount of 1
 * @disk: the image
 * @clusters: how many
 *
 * Return: host offset of the first.
 */
u64 qcow_test_disk_alloc(struct qcow_test_disk *disk, u64 clusters)
{
	u64 offset = take_clusters(disk, clusters);
	u64 i;

	for (i = 0; i < clusters; i++)
		qcow_test_disk_set_refcount(disk,
					    (offset >> disk->cluster_bits) + i,
					    1);
	return offset;
}

static bool is_extended(struct qcow_test_disk *disk)
{
	return FIELD(disk, version) == 3 &&
	       FIELD(disk, incompatible_features) & QCOW_INCOMPAT_EXTENDED_L2;
}

/* log2 of the entries of an L2 table */
static u32 l2_bits(struct qcow_test_disk *disk)
{
	return disk->cluster_bits - (is_extended(disk) ? 4 : 3);
}

/* Entry @index of the L2 table at @l2, and the bitmap behind it. */
static u64 load_l2(struct qcow_test_disk *disk, u64 l2, u64 index, u64 *bitmap)
{
	*bitmap = 0;
	if (!is_extended(disk))
		return load(disk, l2 + 8 * index, 8);
	*bitmap = load(disk, l2 + 16 * index + 8, 8);
	return load(disk, l2 + 16 * index, 8);
}

static void store_l2(struct qcow_test_disk *disk, u64 l2, u64 index, u64 entry,
		     u64 bitmap)
{
	if (!is_extended(disk)) {
		store(disk, l2 + 8 * index, 8, entry);
		return;
	}
	store(disk, l2 + 16 * index, 8, entry);
	store(disk, l2 + 16 * index + 8, 8, bitmap);
}

/**
 * qcow_test_disk_create() - an empty image, laid out as QEMU does it
 * @test: whose
 * @spec: what it is to be like
 *
 * Header, refcount table, refcount block, L1 table.
 */
struct qcow_test_disk *qcow_test_disk_create(struct kunit *test,
					     const struct qcow_test_spec *spec)
{
	u32 bits = spec->cluster_bits ?: 16;
	u64 reftable = spec->reftable_clusters ?: 1;
	u64 clusters = spec->room ?: max(24ULL, (1ULL << 20) >> bits);
	struct qcow_test_disk *disk = disk_alloc(test, bits, clusters << bits);
	u64 l1_size, l1, i;
	u32 reach;

	SET(disk, magic, QCOW_MAGIC);
	SET(disk, version, spec->version ?: 3);
	SET(disk, cluster_bits, bits);
	SET(disk, size, spec->size);
	SET(disk, refcount_table_offset, 1ULL << bits);
	SET(disk, refcount_table_clusters, reftable);
	if (spec->version != 2) {
		SET(disk, incompatible_features, spec->incompatible);
		SET(disk, compatible_features, spec->compatible);
		SET(disk, autoclear_features, spec->autoclear);
		SET(disk, refcount_order, ilog2(spec->refcount_bits ?: 16));
		SET(disk, header_length, sizeof(struct qcow_disk_header));
		if (spec->incompatible & QCOW_INCOMPAT_COMPRESSION)
			SET(disk, compression_type, QCOW_COMPRESSION_ZSTD);
	}
	disk->size = (1 + reftable) << bits;
	for (i = 0; i < 1 + reftable; i++)
		qcow_test_disk_set_refcount(disk, i, 1);

	reach = bits + l2_bits(disk);
	l1_size = (spec->size + (1ULL << reach) - 1) >> reach;
	l1 = qcow_test_disk_alloc(disk, max(1ULL, (l1_size * 8 +
						   (1ULL << bits) - 1) >> bits));
	SET(disk, l1_size, l1_size);
	SET(disk, l1_table_offset, l1);
	return disk;
}

static u64 l1_slot(struct qcow_test_disk *disk, u64 guest_offset)
{
	u64 index = guest_offset >> (disk->cluster_bits + l2_bits(disk));

	KUNIT_ASSERT_LT(disk->test, index, FIELD(disk, l1_size));
	return FIELD(disk, l1_table_offset) + 8 * index;
}

/* Which entry of its L2 table a guest offset has. */
static u64 l2_index(struct qcow_test_disk *disk, u64 guest_offset)
{
	return guest_offset >> disk->cluster_bits &
	       ((1ULL << l2_bits(disk)) - 1);
}

/**
 * qcow_test_disk_l1_entry() - the L1 entry that maps a guest offset
 * @disk: the image
 * @guest_offset: bytes
 */
u64 qcow_test_disk_l1_entry(struct qcow_test_disk *disk, u64 guest_offset)
{
	return load(disk, l1_slot(disk, guest_offset), 8);
}

/**
 * qcow_test_disk_set_l1_entry() - change an L1 entry, whatever it was
 * @disk: the image
 * @guest_offset: bytes
 * @entry: as on disk
 */
void qcow_test_disk_set_l1_entry(struct qcow_test_disk *disk, u64 guest_offset,
				 u64 entry)
{
	store(disk, l1_slot(disk, guest_offset), 8, entry);
}

static u64 disk_entry(struct qcow_test_disk *disk, u64 guest_offset, u64 *bitmap)
{
	u64 l2 = qcow_test_disk_l1_entry(disk, guest_offset) &
		 QCOW_L1_OFFSET_MASK;

	*bitmap = 0;
	return l2 ? load_l2(disk, l2, l2_index(disk, guest_offset), bitmap) : 0;
}

/**
 * qcow_test_disk_entry() - the L2 entry that maps a guest offset
 * @disk: the image
 * @guest_offset: bytes
 *
 * Return: the entry as on disk; 0 without an L2 table.
 */
u64 qcow_test_disk_entry(struct qcow_test_disk *disk, u64 guest_offset)
{
	u64 bitmap;

	return disk_entry(disk, guest_offset, &bitmap);
}

/**
 * qcow_test_disk_bitmap() - the subclusters of a guest offset's cluster
 * @disk: the image
 * @guest_offset: bytes
 *
 * Return: the bitmap as on disk; 0 without an L2 table or extended L2 entries.
 */
u64 qcow_test_disk_bitmap(struct qcow_test_disk *disk, u64 guest_offset)
{
	u64 bitmap;

	disk_entry(disk, guest_offset, &bitmap);
	return bitmap;
}

/**
 * qcow_test_disk_map() - set an L2 entry, whatever it was
 * @disk: the image
 * @guest_offset: bytes
 * @entry: as on disk
 *
 * Makes the L2 table if there is none. No subcluster is allocated.
 */
void qcow_test_disk_map(struct qcow_test_disk *disk, u64 guest_offset, u64 entry)
{
	qcow_test_disk_map_sub(disk, guest_offset, entry, 0);
}

/**
 * qcow_test_disk_map_sub() - the same, with a bitmap of subclusters
 * @disk: the image
 * @guest_offset: bytes
 * @entry: as on disk
 * @bitmap: as on disk; ignored without extended L2 entries
 */
void qcow_test_disk_map_sub(struct qcow_test_disk *disk, u64 guest_offset,
			    u64 entry, u64 bitmap)
{
	u64 l2 = qcow_test_disk_l1_entry(disk, guest_offset) &
		 QCOW_L1_OFFSET_MASK;

	if (!l2) {
		l2 = qcow_test_disk_alloc(disk, 1);
		qcow_test_disk_set_l1_entry(disk, guest_offset,
					    l2 | QCOW_OFLAG_COPIED);
	}
	store_l2(disk, l2, l2_index(disk, guest_offset), entry, bitmap);
}

/**
 * qcow_test_disk_add_data() - put a cluster of data into the image
 * @disk: the image
 * @guest_offset: where, bytes, a multiple of the cluster size
 * @seed: for qcow_test_fill()
 *
 * Return: the host offset.
 */
u64 qcow_test_disk_add_data(struct qcow_test_disk *disk, u64 guest_offset,
			    u32 seed)
{
	u64 host;

	/* The L2 table comes first, as in QEMU's images. */
	qcow_test_disk_map(disk, guest_offset, 0);
	host = qcow_test_disk_alloc(disk, 1);
	qcow_test_fill(disk->bytes + host, guest_offset, cluster_size(disk),
		       seed);
	qcow_test_disk_map_sub(disk, guest_offset, host | QCOW_OFLAG_COPIED,
			       U32_MAX);
	return host;
}

static void add_reference(struct qcow_test_disk *disk, u64 offset)
{
	u64 cluster = offset >> disk->cluster_bits;

	qcow_test_disk_set_refcount(disk, cluster,
				    qcow_test_disk_refcount(disk, cluster) + 1);
}

static u32 compression_type(const struct qcow_test_disk *disk)
{
	return FIELD(disk, version) == 3 ? FIELD(disk, compression_type) : 0;
}

/* As QEMU does it: no header, a window of 4 KiB. */
static u32 compress_zlib(const void *src, u32 length, void *dst, u32 room,
			 void *workspace)
{
	z_stream stream = {
		.workspace = workspace,
		.next_in = src, .avail_in = length,
		.next_out = dst, .avail_out = room,
	};

	if (zlib_deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12,
			      MAX_MEM_LEVEL, Z_DEFAULT_STRATEGY) != Z_OK)
		return 0;
	if (zlib_deflate(&stream, Z_FINISH) != Z_STREAM_END)
		return 0;
	return stream.total_out;
}

/**
 * qcow_test_compress() - compress as QEMU does
 * @test: for which
 * @type: QCOW_COMPRESSION_*
 * @src: what
 * @length: of it, bytes
 * @dst: where to
 * @room: bytes there, enough
 *
 * Return: how many bytes it takes.
 */
u32 qcow_test_compress(struct kunit *test, u32 type, const void *src, u32 length,
		       void *dst, u32 room)
{
	zstd_parameters params = zstd_get_params(3, length);
	size_t size = type == QCOW_COMPRESSION_ZSTD ?
		      zstd_cctx_workspace_bound(&params.cParams) :
		      zlib_deflate_workspacesize(-12, MAX_MEM_LEVEL);
	void *workspace = vmalloc(size);
	size_t got;

	KUNIT_ASSERT_NOT_NULL(test, workspace);
	if (type == QCOW_COMPRESSION_ZSTD) {
		got = zstd_compress_cctx(zstd_init_cctx(workspace, size), dst,
					 room, src, length, &params);
		if (zstd_is_error(got))
			got = 0;
	} else {
		got = compress_zlib(src, length, dst, room, workspace);
	}
	vfree(workspace);
	KUNIT_ASSERT_GT(test, got, 0);
	return got;
}

/**
 * qcow_test_disk_pack() - put compressed data into the image
 * @disk: the image
 * @guest_offset: of the cluster that it is, bytes
 * @data: the stream
 * @length: of it, bytes, up to two clusters
 *
 * It begins where the one before ended. So clusters are shared, as far as the
 * width of refcounts allows.
 *
 * Return: the L2 entry.
 */
u64 qcow_test_disk_pack(struct qcow_test_disk *disk, u64 guest_offset,
			const void *data, u32 length)
{
	u32 bits = disk->cluster_bits, x = 62 - (bits - 8);
	u32 width = 1U << counts_of(disk).order;
	u64 at, entry, first, last, i, count;

	qcow_test_disk_map(disk, guest_offset, 0);
	at = disk->packed;
	if (at && width < 32 &&
	    qcow_test_disk_refcount(disk, at >> bits) == (1U << width) - 1)
		at = 0;
	/* It goes on in the next cluster, if that is at the end of the file. */
	if (!at || round_up(at, cluster_size(disk)) != disk->size)
		at = disk->size;
	KUNIT_ASSERT_LE(disk->test, at + length, disk->room);
	first = at >> bits;
	last = (at + length - 1) >> bits;
	for (i = first; i <= last; i++) {
		if (i << bits >= disk->size) {
			qcow_test_disk_alloc(disk, 1);
			/* It must not have needed a refcount block. */
			KUNIT_ASSERT_EQ(disk->test, disk->size, (i + 1) << bits);
			continue;
		}
		count = qcow_test_disk_refcount(disk, i);
		qcow_test_disk_set_refcount(disk, i, count + 1);
	}
	memcpy(disk->bytes + at, data, length);
	disk->packed = (at + length) & (cluster_size(disk) - 1) ? at + length : 0;
	entry = QCOW_OFLAG_COMPRESSED | at |
		((at + length - 1) / SECTOR - at / SECTOR) << x;
	qcow_test_disk_map(disk, guest_offset, entry);
	return entry;
}

/**
 * qcow_test_disk_add_packed() - put a compressed cluster of data into the image
 * @disk: the image
 * @guest_offset: where, bytes, a multiple of the cluster size
 * @seed: for qcow_test_fill()
 *
 * Return: the L2 entry.
 */
u64 qcow_test_disk_add_packed(struct qcow_test_disk *disk, u64 guest_offset,
			      u32 seed)
{
	u64 size = cluster_size(disk), entry;
	u8 *plain = vmalloc(size), *packed = vmalloc(2 * size);
	u32 length;

	KUNIT_ASSERT_NOT_NULL(disk->test, plain);
	KUNIT_ASSERT_NOT_NULL(disk->test, packed);
	qcow_test_fill(plain, guest_offset, size, seed);
	length = qcow_test_compress(disk->test, compression_type(disk), plain,
				    size, packed, 2 * size);
	entry = qcow_test_disk_pack(disk, guest_offset, packed, length);
	vfree(plain);
	vfree(packed);
	return entry;
}

/* Where compressed data is: the first byte, and bytes to the end of the sector. */
static u64 packed_range(const struct qcow_test_disk *disk, u64 entry, u64 *length)
{
	u32 bits = disk->cluster_bits, x = 62 - (bits - 8);
	u64 offset = entry & ((1ULL << x) - 1);
	u64 sectors = (entry >> x & ((1ULL << (bits - 8)) - 1)) + 1;

	*length = (offset & ~511ULL) + sectors * 512 - offset;
	return offset;
}

static bool decompress(u32 type, struct qcow_test_memo *memo, u32 room)
{
	z_stream stream = {
		.workspace = memo->workspace,
		.next_in = memo->packed, .avail_in = memo->length,
		.next_out = memo->plain, .avail_out = room,
	};
	zstd_in_buffer in = { .src = memo->packed, .size = memo->length };
	zstd_out_buffer out = { .dst = memo->plain, .size = room };
	zstd_dstream *zstd;

	if (type != QCOW_COMPRESSION_ZSTD) {
		zlib_inflateInit2(&stream, -MAX_WBITS);
		zlib_inflate(&stream, Z_FINISH);
		return !stream.avail_out;
	}
	zstd = zstd_init_dstream(room, memo->workspace,
				 zstd_dstream_workspace_bound(room));
	while (out.pos < out.size)
		if (zstd_is_error(zstd_decompress_stream(zstd, &out, &in)) ||
		    (in.pos == in.size && out.pos < out.size))
			return false;
	return true;
}

/* The content of a compressed cluster, or NULL. */
static const u8 *read_packed(struct qcow_test_disk *disk, u64 entry)
{
	u64 size = cluster_size(disk), length, offset, have;
	struct qcow_test_memo *memo = disk->memo;
	u32 type = compression_type(disk);

	if (!memo) {
		memo = kzalloc(sizeof(*memo), GFP_KERNEL);
		KUNIT_ASSERT_NOT_NULL(disk->test, memo);
		disk->memo = memo;
		memo->packed = vmalloc(2 * size);
		memo->plain = vmalloc(size);
		memo->workspace = vmalloc(type == QCOW_COMPRESSION_ZSTD ?
					  zstd_dstream_workspace_bound(size) :
					  zlib_inflate_workspacesize());
		KUNIT_ASSERT_NOT_NULL(disk->test, memo->packed);
		KUNIT_ASSERT_NOT_NULL(disk->test, memo->plain);
		KUNIT_ASSERT_NOT_NULL(disk->test, memo->workspace);
	}
	offset = packed_range(disk, entry, &length);
	have = offset < disk->size ? min(length, disk->size - offset) : 0;
	if (memo->valid && memo->length == have &&
	    !memcmp(memo->packed, disk->bytes + offset, have))
		return memo->plain;
	memcpy(memo->packed, disk->bytes + offset, have);
	memo->length = have;
	memo->valid = decompress(type, memo, size);
	return memo->valid ? memo->plain : NULL;
}

static void add_packed_references(struct qcow_test_disk *disk, u64 entry)
{
	u64 length, at = packed_range(disk, entry, &length), end = at + length;

	for (at = round_down(at, cluster_size(disk)); at < end;
	     at += cluster_size(disk))
		add_reference(disk, at);
}

/**
 * qcow_test_disk_snapshot() - take an internal snapshot, the first one
 * @disk: the image
 *
 * All that is allocated is shared afterwards.
 */
void qcow_test_disk_snapshot(struct qcow_test_disk *disk)
{
	u64 l1 = FIELD(disk, l1_table_offset), l1_size = FIELD(disk, l1_size);
	u64 copy, table, i, j, l2, entry, bitmap;

	copy = qcow_test_disk_alloc(disk, (l1_size * 8 + cluster_size(disk) - 1)
				    >> disk->cluster_bits);
	table = qcow_test_disk_alloc(disk, 1);

	for (i = 0; i < l1_size; i++) {
		l2 = load(disk, l1 + 8 * i, 8) & ~QCOW_OFLAG_COPIED;
		store(disk, l1 + 8 * i, 8, l2);
		store(disk, copy + 8 * i, 8, l2);
		if (!l2)
			continue;
		add_reference(disk, l2);
		for (j = 0; j < 1ULL << l2_bits(disk); j++) {
			entry = load_l2(disk, l2, j, &bitmap) &
				~QCOW_OFLAG_COPIED;
			store_l2(disk, l2, j, entry, bitmap);
			if (entry & QCOW_OFLAG_COMPRESSED)
				add_packed_references(disk, entry);
			else if (entry & QCOW_L2_OFFSET_MASK)
				add_reference(disk, entry & QCOW_L2_OFFSET_MASK);
		}
	}

	store(disk, table, 8, copy);
	store(disk, table + 8, 4, l1_size);
	store(disk, table + 12, 2, 1);			/* length of the id */
	store(disk, table + 14, 2, 1);			/* and of the name */
	store(disk, table + 36, 4, 16);			/* extra data */
	store(disk, table + 48, 8, FIELD(disk, size));
	store(disk, table + 56, 2, 0x3141);		/* id "1", name "A" */
	SET(disk, nb_snapshots, 1);
	SET(disk, snapshots_offset, table);
}

/* ---- checking ------------------------------------------------------------- */

struct check {
	struct qcow_test_disk *disk;
	struct qcow_test_result *result;
	struct counts counts;
	u64 clusters;		/* in the file */
	u32 *refs;		/* for each */
};

__printf(3, 4)
static void problem(struct check *check, u64 *counter, const char *fmt, ...)
{
	va_list args;

	++*counter;
	if (check->result->first[0])
		return;
	va_start(args, fmt);
	vsnprintf(check->result->first, sizeof(check->result->first), fmt, args);
	va_end(args);
}

static bool refer(struct check *check, u64 offset, const char *what)
{
	u64 cluster = offset >> check->disk->cluster_bits;

	if (!offset || offset & (cluster_size(check->disk) - 1) ||
	    cluster >= check->clusters) {
		problem(check, &check->result->errors, "%s at 0x%llx", what,
			offset);
		return false;
	}
	check->refs[cluster]++;
	return true;
}

static void refer_range(struct check *check, u64 offset, u64 bytes,
			const char *what)
{
	u64 at;

	for (at = 0; at < bytes; at += cluster_size(check->disk))
		refer(check, offset + at, what);
}

static void refer_compressed(struct check *check, u64 entry)
{
	u64 length, offset = packed_range(check->disk, entry, &length);
	u64 end = offset + length, cluster;
	u32 bits = check->disk->cluster_bits;

	if (entry & QCOW_OFLAG_COPIED)
		problem(check, &check->result->errors, "COPIED compressed");
	for (cluster = offset >> bits; cluster <= (end - 1) >> bits; cluster++)
		refer(check, cluster << bits, "compressed cluster");
}

static void refer_entry(struct check *check, u64 entry, u64 bitmap, bool active)
{
	struct qcow_test_result *result = check->result;
	u64 offset = entry & QCOW_L2_OFFSET_MASK;

	if (bitmap >> 32 & bitmap & U32_MAX ||
	    (bitmap & U32_MAX && !offset) ||
	    (entry & QCOW_OFLAG_ZERO && is_extended(check->disk) &&
	     !(entry & QCOW_OFLAG_COMPRESSED)))
		problem(check, &result->errors, "L2 entry 0x%llx, bitmap 0x%llx",
			entry, bitmap);

	if (entry & QCOW_OFLAG_COMPRESSED) {
		refer_compressed(check, entry);
	} else {
		if (entry & QCOW_L2_RESERVED_MASK ||
		    (entry & QCOW_OFLAG_COPIED && !offset) ||
		    (entry & 1 && FIELD(check->disk, version) == 2))
			problem(check, &result->errors, "L2 entry 0x%llx",
				entry);
		if (!offset || !refer(check, offset, "data"))
			return;
	}
	if (active)
		result->data_clusters++;
}

static void refer_l1(struct check *check, u64 l1, u64 l1_size, bool active)
{
	struct qcow_test_disk *disk = check->disk;
	u64 i, j, entry, bitmap, l2;

	refer_range(check, l1, l1_size * 8, "L1 table");
	for (i = 0; i < l1_size; i++) {
		entry = load(disk, l1 + 8 * i, 8);
		if (entry & QCOW_L1_RESERVED_MASK)
			problem(check, &check->result->errors,
				"L1 entry 0x%llx", entry);
		l2 = entry & QCOW_L1_OFFSET_MASK;
		if (!l2 || !refer(check, l2, "L2 table"))
			continue;
		for (j = 0; j < 1ULL << l2_bits(disk); j++) {
			entry = load_l2(disk, l2, j, &bitmap);
			refer_entry(check, entry, bitmap, active);
		}
	}
}

static void check_copied(struct check *check, u64 entry, const char *what)
{
	struct qcow_test_disk *disk = check->disk;
	u64 offset = entry & QCOW_L2_OFFSET_MASK;
	u64 count;

	if (!offset || entry & QCOW_OFLAG_COMPRESSED)
		return;
	count = count_at(disk, &check->counts, offset >> disk->cluster_bits);
	if (entry & QCOW_OFLAG_COPIED && count != 1)
		problem(check, &check->result->copied_wrong,
			"COPIED %s 0x%llx with refcount %llu", what, offset,
			count);
	if (!(entry & QCOW_OFLAG_COPIED) && count == 1)
		problem(check, &check->result->copied_missing,
			"%s 0x%llx without COPIED", what, offset);
}

static void check_all_copied(struct check *check)
{
	struct qcow_test_disk *disk = check->disk;
	u64 l1 = FIELD(disk, l1_table_offset), l1_size = FIELD(disk, l1_size);
	u64 i, j, entry, bitmap, l2;

	for (i = 0; i < l1_size; i++) {
		entry = load(disk, l1 + 8 * i, 8);
		l2 = entry & QCOW_L1_OFFSET_MASK;
		check_copied(check, entry, "L2 table");
		for (j = 0; l2 && j < 1ULL << l2_bits(disk); j++)
			check_copied(check, load_l2(disk, l2, j, &bitmap),
				     "data");
	}
}

/* What counts beyond the end of the file is leaked. */
static void check_refblock_tail(struct check *check, u64 block, u64 first)
{
	struct qcow_test_disk *disk = check->disk;
	u64 per_block = 1ULL << check->counts.bits;
	u64 from = 0;

	if (first + per_block <= check->clusters ||
	    block + cluster_size(disk) > disk->size)
		return;
	if (check->clusters > first)
		from = (((check->clusters - first) << check->counts.order) +
			7) >> 3;
	if (memchr_inv(disk->bytes + block + from, 0,
		       cluster_size(disk) - from))
		problem(check, &check->result->leaks,
			"refcount behind the end of the file");
}

static void check_refcounts(struct check *check)
{
	struct qcow_test_disk *disk = check->disk;
	struct qcow_test_result *result = check->result;
	u64 i, block, count;

	for (i = 0; i < check->counts.slots; i++) {
		block = load(disk, check->counts.table + 8 * i, 8);
		if (block)
			check_refblock_tail(check, block, i << check->counts.bits);
	}
	for (i = 0; i < check->clusters; i++) {
		count = count_at(disk, &check->counts, i);
		if (check->refs[i])
			result->clusters++;
		if (count > check->refs[i])
			problem(check, &result->leaks,
				"cluster %llu: refcount %llu, used %u times", i,
				count, check->refs[i]);
		if (count < check->refs[i])
			problem(check, &result->errors,
				"cluster %llu: refcount %llu, used %u times", i,
				count, check->refs[i]);
	}
}

/**
 * qcow_test_disk_check() - what 'qemu-img check' does
 * @disk: the image
 * @result: what was found
 */
void qcow_test_disk_check(struct qcow_test_disk *disk,
			  struct qcow_test_result *result)
{
	struct check check = {
		.disk = disk, .result = result, .counts = counts_of(disk),
	};
	u64 snapshots = FIELD(disk, nb_snapshots);
	u64 at = FIELD(disk, snapshots_offset);
	u64 i, block;

	memset(result, 0, sizeof(*result));
	check.clusters = (disk->size + cluster_size(disk) - 1) >>
			 disk->cluster_bits;
	check.refs = vzalloc((check.clusters + 1) * sizeof(*check.refs));
	KUNIT_ASSERT_NOT_NULL(disk->test, check.refs);

	check.refs[0] = 1;
	refer_range(&check, check.counts.table, check.counts.slots * 8,
		    "refcount table");
	for (i = 0; i < check.counts.slots; i++) {
		block = load(disk, check.counts.table + 8 * i, 8);
		if (block)
			refer(&check, block, "refcount block");
	}
	refer_l1(&check, FIELD(disk, l1_table_offset), FIELD(disk, l1_size),
		 true);
	if (snapshots) {
		/* There is one at most, see qcow_test_disk_snapshot(). */
		refer(&check, at, "snapshot table");
		refer_l1(&check, load(disk, at, 8), load(disk, at + 8, 4), false);
	}
	check_refcounts(&check);
	check_all_copied(&check);
	vfree(check.refs);
}

/**
 * qcow_test_disk_expect_clean() - expect that nothing is wrong with an image
 * @disk: the image
 */
void qcow_test_disk_expect_clean(struct qcow_test_disk *disk)
{
	struct qcow_test_result result;

	qcow_test_disk_check(disk, &result);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.errors, 0, "%s", result.first);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.leaks, 0, "%s", result.first);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.copied_wrong, 0, "%s",
			    result.first);
	KUNIT_EXPECT_EQ_MSG(disk->test, result.copied_missing, 0, "%s",
			    result.first);
}

/**
 * qcow_test_disk_read() - what a guest would read
 * @disk: the image
 * @guest_offset: bytes, a multiple of 512
 * @sector: 512 bytes, zero where the image has nothing
 *
 * Return: false where a backing file would be asked.
 */
bool qcow_test_disk_read(struct qcow_test_disk *disk, u64 guest_offset,
			 u8 *sector)
{
	u64 bitmap, entry = disk_entry(disk, guest_offset, &bitmap);
	u64 host = entry & QCOW_L2_OFFSET_MASK;
	const u8 *plain;
	u32 sub;

	memset(sector, 0, SECTOR);
	if (entry & QCOW_OFLAG_COMPRESSED) {
		plain = read_packed(disk, entry);
		if (plain)
			memcpy(sector, plain +
			       (guest_offset & (cluster_size(disk) - 1)),
			       SECTOR);
		else
			memset(sector, 0x5a, SECTOR);
		return true;
	}
	if (is_extended(disk)) {
		sub = (guest_offset & (cluster_size(disk) - 1)) >>
		      (disk->cluster_bits - 5);
		if (bitmap & BIT_ULL(32 + sub))
			return true;
		if (!(bitmap & BIT_ULL(sub)))
			return false;
	}
	if (entry & QCOW_OFLAG_ZERO)
		return true;
	if (!host)
		return false;
	host += guest_offset & (cluster_size(disk) - 1);
	if (host < disk->size)
		memcpy(sector, disk->bytes + host,
		       min_t(u64, SECTOR, disk->size - host));
	return true;
}

/* ---- files ---------------------------------------------------------------- */

static struct qcow_test_file *test_file(struct file *file)
{
	return file->private_data;
}

static void log_event(struct qcow_test_file *tf, struct qcow_test_event *event)
{
	spin_lock(&tf->lock);
	if (tf->logging) {
		list_add_tail(&event->node, &tf->log);
		event = NULL;
	}
	spin_unlock(&tf->lock);
	kvfree(event);
}

static struct qcow_test_event *new_event(enum qcow_test_event_kind kind,
					 u64 offset, u64 length, u64 bytes)
{
	struct qcow_test_event *event;

	event = kvzalloc(struct_size(event, data, bytes), GFP_KERNEL);
	if (!event)
		return NULL;
	event->kind = kind;
	event->offset = offset;
	event->length = length;
	return event;
}

static ssize_t test_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct qcow_test_file *tf = test_file(iocb->ki_filp);
	int error = 0;

	spin_lock(&tf->lock);
	if (!tf->read_budget)
		error = tf->read_error;
	else if (tf->read_budget > 0)
		tf->read_budget--;
	spin_unlock(&tf->lock);
	return error ?: tf->base->f_op->read_iter(iocb, to);
}

/* A write is logged when it is complete: then a barrier covers it. */
static ssize_t test_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct qcow_test_file *tf = test_file(iocb->ki_filp);
	struct iov_iter copy = *from;
	struct qcow_test_event *event = NULL;
	loff_t pos = iocb->ki_pos;
	ssize_t ret = 0;

	spin_lock(&tf->lock);
	tf->writes++;
	if (!tf->write_budget)
		ret = tf->write_error;
	else if (tf->write_budget > 0)
		tf->write_budget--;
	spin_unlock(&tf->lock);
	if (ret)
		return ret;

	if (READ_ONCE(tf->logging)) {
		size_t length = iov_iter_count(from);

		event = new_event(QCOW_TEST_WRITE, pos, length, length);
		if (!event || copy_from_iter(event->data, length, &copy) != length) {
			kvfree(event);
			return -ENOMEM;
		}
	}
	ret = tf->base->f_op->write_iter(iocb, from);
	if (event && ret > 0) {
		event->length = ret;
		log_event(tf, event);
	} else {
		kvfree(event);
	}
	return ret;
}

/* A barrier is logged when it begins: it covers what was complete then. */
static int test_fsync(struct file *file, loff_t start, loff_t end, int datasync)
{
	struct qcow_test_file *tf = test_file(file);
	struct qcow_test_event *event;

	spin_lock(&tf->lock);
	tf->syncs++;
	spin_unlock(&tf->lock);
	if (READ_ONCE(tf->sync_error))
		return tf->sync_error;

	event = new_event(QCOW_TEST_SYNC, 0, 0, 0);
	if (!event)
		return -ENOMEM;
	log_event(tf, event);
	return tf->base->f_op->fsync(file, start, end, datasync);
}

static long test_fallocate(struct file *file, int mode, loff_t offset,
			   loff_t length)
{
	struct qcow_test_file *tf = test_file(file);
	struct qcow_test_event *event;
	long ret;

	ret = tf->base->f_op->fallocate(file, mode, offset, length);
	if (!ret && mode & FALLOC_FL_PUNCH_HOLE) {
		event = new_event(QCOW_TEST_PUNCH, offset, length, 0);
		if (!event)
			return -ENOMEM;
		log_event(tf, event);
	}
	return ret;
}

/* What the driver asks of a file; tmpfs does it. */
static const struct file_operations test_fops = {
	.read_iter = test_read_iter,
	.write_iter = test_write_iter,
	.fsync = test_fsync,
	.fallocate = test_fallocate,
};

static void clear_log(struct qcow_test_file *tf)
{
	struct qcow_test_event *event, *next;

	list_for_each_entry_safe(event, next, &tf->log, node)
		kvfree(event);
	INIT_LIST_HEAD(&tf->log);
}

static int file_init(struct kunit_resource *res, void *context)
{
	struct qcow_test_file *tf = kzalloc(sizeof(*tf), GFP_KERNEL);

	if (!tf)
		return -ENOMEM;
	tf->base = shmem_file_setup("qcow-test", 0, QCOW_TEST_NORESERVE);
	if (IS_ERR(tf->base)) {
		kfree(tf);
		return -ENOMEM;
	}
	tf->test = context;
	spin_lock_init(&tf->lock);
	INIT_LIST_HEAD(&tf->log);
	tf->write_budget = -1;
	tf->write_error = -EIO;
	tf->read_budget = -1;
	tf->read_error = -EIO;
	res->data = tf;
	return 0;
}

static void file_free(struct kunit_resource *res)
{
	struct qcow_test_file *tf = res->data;

	/* Somebody who was told to let go of it may still be at it. */
	flush_delayed_fput();
	clear_log(tf);
	fput(tf->base);
	kfree(tf);
}

static struct qcow_test_file *file_alloc(struct kunit *test, u64 size)
{
	struct qcow_test_file *tf;

	tf = kunit_alloc_resource(test, file_init, file_free, GFP_KERNEL, test);
	KUNIT_ASSERT_NOT_NULL(test, tf);
	KUNIT_ASSERT_EQ(test, vfs_truncate(&tf->base->f_path, size), 0);
	return tf;
}

/**
 * qcow_test_file_create() - put an image into a file
 * @disk: the image, which stays as it is
 */
struct qcow_test_file *qcow_test_file_create(struct qcow_test_disk *disk)
{
	struct qcow_test_file *tf = file_alloc(disk->test, disk->size);
	loff_t pos;
	size_t length;

	tf->cluster_bits = disk->cluster_bits;
	for (pos = 0; pos < disk->size; ) {
		length = min_t(u64, PAGE_SIZE, disk->size - pos);
		if (!memchr_inv(disk->bytes + pos, 0, length)) {
			pos += length;
			continue;
		}
		KUNIT_ASSERT_EQ(disk->test,
				kernel_write(tf->base, disk->bytes + pos, length,
					     &pos), length);
	}
	return tf;
}

/**
 * qcow_test_raw_create() - a raw image, full of data
 * @test: whose
 * @size: bytes, a multiple of 512
 * @seed: for qcow_test_fill()
 */
struct qcow_test_file *qcow_test_raw_create(struct kunit *test, u64 size,
					    u32 seed)
{
	struct qcow_test_file *tf = file_alloc(test, size);
	u8 *buf = kunit_kzalloc(test, PAGE_SIZE, GFP_KERNEL);
	size_t length;
	loff_t pos;

	KUNIT_ASSERT_NOT_NULL(test, buf);
	tf->cluster_bits = 16;
	for (pos = 0; pos < size; ) {
		length = min_t(u64, PAGE_SIZE, size - pos);
		qcow_test_fill(buf, pos, length, seed);
		KUNIT_ASSERT_EQ(test, kernel_write(tf->base, buf, length, &pos),
				length);
	}
	kunit_kfree(test, buf);
	return tf;
}

/* From now on, I/O on this struct file goes by way of us. */
static void hook(struct file *file, struct qcow_test_file *tf)
{
	file->private_data = tf;
	file->f_op = &test_fops;
}

/**
 * qcow_test_file_open() - the file as userspace would open it for the driver
 * @tf: the file
 * @writable: for writing too
 *
 * Return: a struct file, to be given back with fput().
 */
struct file *qcow_test_file_open(struct qcow_test_file *tf, bool writable)
{
	struct file *file;

	file = dentry_open(&tf->base->f_path,
			   (writable ? O_RDWR : O_RDONLY) | O_LARGEFILE,
			   current_cred());
	KUNIT_ASSERT_NOT_ERR_OR_NULL(tf->test, file);
	hook(file, tf);
	return file;
}

/**
 * qcow_test_file_load() - what is in a file now
 * @tf: the file
 */
struct qcow_test_disk *qcow_test_file_load(struct qcow_test_file *tf)
{
	u64 size = i_size_read(file_inode(tf->base));
	struct qcow_test_disk *disk = disk_alloc(tf->test, tf->cluster_bits, size);
	loff_t pos = 0;

	while (pos < size)
		KUNIT_ASSERT_GT(tf->test,
				kernel_read(tf->base, disk->bytes + pos,
					    min_t(u64, size - pos, SZ_1M), &pos),
				0);
	disk->size = size;
	return disk;
}

/**
 * qcow_test_file_log() - start or stop to log what is done to the file
 * @tf: the file
 * @on: start, with an empty log
 */
void qcow_test_file_log(struct qcow_test_file *tf, bool on)
{
	WRITE_ONCE(tf->logging, false);
	if (!on)
		return;
	clear_log(tf);
	WRITE_ONCE(tf->logging, true);
}

/**
 * qcow_test_file_mark() - note in the log that a point has been reached
 * @tf: the file
 * @mark: what the check of crashes behind this point gets to see
 */
void qcow_test_file_mark(struct qcow_test_file *tf, u64 mark)
{
	struct qcow_test_event *event = new_event(QCOW_TEST_MARK, mark, 0, 0);

	KUNIT_ASSERT_NOT_NULL(tf->test, event);
	log_event(tf, event);
}

/* ---- crashes -------------------------------------------------------------- */

/*
 * The events since the last barrier are in doubt: any of them may have reached
 * the disk or not, and of a longer write any sector.
 */
struct crash {
	struct qcow_test_disk *stable;	/* what is certain */
	struct qcow_test_disk *state;	/* and some of what is not */
	struct qcow_test_event **doubt;
	u32 doubts;
	u64 mark;
	struct rnd_state rnd;
	qcow_test_crash_fn check;
	void *private;
	u64 states;
};

static void apply(struct qcow_test_disk *disk, struct qcow_test_event *event,
		  struct rnd_state *tear)
{
	u64 at, length;

	for (at = 0; at < event->length; at += length) {
		length = event->length - at;
		if (tear) {
			length = min_t(u64, length, SECTOR);
			if (prandom_u32_state(tear) & 1)
				continue;
		}
		if (event->kind == QCOW_TEST_WRITE)
			memcpy(disk->bytes + event->offset + at,
			       event->data + at, length);
		else
			memset(disk->bytes + event->offset + at, 0, length);
		disk->size = max(disk->size, event->offset + at + length);
	}
}

static void crash_begin(struct crash *crash)
{
	struct qcow_test_disk *state = crash->state, *stable = crash->stable;

	memcpy(state->bytes, stable->bytes, stable->size);
	if (state->size > stable->size)
		memset(state->bytes + stable->size, 0,
		       state->size - stable->size);
	state->size = stable->size;
}

static void crash_check(struct crash *crash)
{
	crash->states++;
	crash->check(crash->state, crash->mark, crash->private);
}

/* The states that a crash right now, or right before a barrier, may leave. */
static void crash_states(struct crash *crash, u32 subsets)
{
	u32 i, j;

	crash_begin(crash);
	crash_check(crash);
	/* all that came first, in the order of time */
	for (i = 0; i < crash->doubts; i++) {
		apply(crash->state, crash->doubt[i], NULL);
		crash_check(crash);
	}
	/* one before all others, and all others before one */
	for (i = 0; crash->doubts > 1 && i < crash->doubts; i++) {
		crash_begin(crash);
		apply(crash->state, crash->doubt[i], NULL);
		crash_check(crash);
		crash_begin(crash);
		for (j = 0; j < crash->doubts; j++)
			if (j != i)
				apply(crash->state, crash->doubt[j], NULL);
		crash_check(crash);
	}
	/* any sectors */
	for (i = 0; crash->doubts && i < subsets; i++) {
		crash_begin(crash);
		for (j = 0; j < crash->doubts; j++)
			apply(crash->state, crash->doubt[j], &crash->rnd);
		crash_check(crash);
	}
}

/**
 * qcow_test_crashes() - check what crashes would have left behind
 * @tf: the file, with a log
 * @before: what was in the file when the log began
 * @subsets: how many random subsets of the sectors in doubt to try, for each
 *	barrier
 * @check: called with each state and the last mark before it
 * @private: for @check
 *
 * Return: the number of states.
 */
u64 qcow_test_crashes(struct qcow_test_file *tf, struct qcow_test_disk *before,
		      u32 subsets, qcow_test_crash_fn check, void *private)
{
	struct crash crash = { .check = check, .private = private };
	struct qcow_test_event *event;
	u64 room = before->size;
	u32 events = 0, i;

	list_for_each_entry(event, &tf->log, node) {
		if (event->kind == QCOW_TEST_WRITE ||
		    event->kind == QCOW_TEST_PUNCH)
			room = max(room, event->offset + event->length);
		events++;
	}
	prandom_seed_state(&crash.rnd, 1);
	crash.stable = disk_alloc(tf->test, before->cluster_bits, room);
	crash.state = disk_alloc(tf->test, before->cluster_bits, room);
	crash.doubt = kvcalloc(events + 1, sizeof(*crash.doubt), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(tf->test, crash.doubt);
	memcpy(crash.stable->bytes, before->bytes, before->size);
	crash.stable->size = before->size;

	list_for_each_entry(event, &tf->log, node) {
		switch (event->kind) {
		case QCOW_TEST_WRITE:
		case QCOW_TEST_PUNCH:
			crash.doubt[crash.doubts++] = event;
			break;
		case QCOW_TEST_MARK:
			/* What was in doubt here still is. */
			crash_states(&crash, subsets);
			crash.mark = event->offset;
			break;
		case QCOW_TEST_SYNC:
			crash_states(&crash, subsets);
			for (i = 0; i < crash.doubts; i++)
				apply(crash.stable, crash.doubt[i], NULL);
			crash.doubts = 0;
			break;
		}
	}
	crash_states(&crash, subsets);
	kvfree(crash.doubt);
	return crash.states;
}

/* ---- open images ---------------------------------------------------------- */

/* An image that is closed at the end of the test, if not before. */
struct open_image {
	struct qcow_image *image;
};

static int open_image_init(struct kunit_resource *res, void *context)
{
	struct open_image *open = kzalloc(sizeof(*open), GFP_KERNEL);

	if (!open)
		return -ENOMEM;
	open->image = context;
	res->data = open;
	return 0;
}

static void open_image_free(struct kunit_resource *res)
{
	struct open_image *open = res->data;

	if (open->image)
		qcow_image_close(open->image);
	kfree(open);
}

static bool open_image_match(struct kunit *test, struct kunit_resource *res,
			     void *image)
{
	struct open_image *open = res->data;

	return res->free == open_image_free && open->image == image;
}

static struct qcow_image *image_open(struct qcow_test_file *tf, u32 format,
				     const char *snapshot, bool writable,
				     u64 cache_limit)
{
	struct file *file = qcow_test_file_open(tf, writable);
	struct qcow_image_source source = {
		.file = file, .format = format, .snapshot = snapshot,
		.io_mode = QCOW_IO_BUFFERED, .writable = writable,
	};
	struct qcow_cache *cache = qcow_cache_create(cache_limit);
	struct qcow_message msg = {};
	struct qcow_image *image;
	u32 patience = 500;
	int ret;

	KUNIT_ASSERT_NOT_NULL(tf->test, cache);
	do {
		ret = qcow_image_open(&source, cache, &image, &msg);
		/* What a kernel thread closes, a worker closes a bit later. */
		if (ret == -ETXTBSY)
			msleep(20);
	} while (ret == -ETXTBSY && --patience);
	fput(file);
	qcow_cache_put(cache);
	KUNIT_ASSERT_EQ_MSG(tf->test, ret, 0, "it says: %s", msg.text);
	/* The driver opens files once more that it only reads. */
	hook(image->file.file, tf);
	KUNIT_ASSERT_NOT_NULL(tf->test,
			      kunit_alloc_resource(tf->test, open_image_init,
						   open_image_free, GFP_KERNEL,
						   image));
	return image;
}

/**
 * qcow_test_image_open() - open the image in a file with the driver
 * @tf: the file
 * @writable: for writing too
 *
 * It is closed at the end of the test.
 */
struct qcow_image *qcow_test_image_open(struct qcow_test_file *tf, bool writable)
{
	return image_open(tf, QCOW_FORMAT_QCOW2, NULL, writable, 0);
}

/**
 * qcow_test_snapshot_open() - open an internal snapshot with the driver, read only
 * @tf: the file
 * @snapshot: its ID or name
 *
 * It is closed at the end of the test.
 */
struct qcow_image *qcow_test_snapshot_open(struct qcow_test_file *tf,
					   const char *snapshot)
{
	return image_open(tf, QCOW_FORMAT_QCOW2, snapshot, false, 0);
}

/**
 * qcow_test_image_open_cached() - the same, with a limit on cached tables
 * @tf: the file
 * @writable: for writing too
 * @limit: bytes, as for qcow_cache_create()
 */
struct qcow_image *qcow_test_image_open_cached(struct qcow_test_file *tf,
					       bool writable, u64 limit)
{
	return image_open(tf, QCOW_FORMAT_QCOW2, NULL, writable, limit);
}

/**
 * qcow_test_raw_open() - open a raw image with the driver, read only
 * @tf: the file
 *
 * It is closed at the end of the test.
 */
struct qcow_image *qcow_test_raw_open(struct qcow_test_file *tf)
{
	return image_open(tf, QCOW_FORMAT_RAW, NULL, false, 0);
}

/**
 * qcow_test_try_open() - see whether the driver takes the image in a file
 * @tf: the file
 * @snapshot: ID or name of the snapshot to open, or NULL
 * @writable: for writing too
 * @msg: what the driver says
 *
 * Return: what qcow_image_open() returned; the image is closed again.
 */
int qcow_test_try_open(struct qcow_test_file *tf, const char *snapshot,
		       bool writable, struct qcow_message *msg)
{
	struct file *file = qcow_test_file_open(tf, writable);
	struct qcow_image_source source = {
		.file = file, .format = QCOW_FORMAT_QCOW2, .snapshot = snapshot,
		.io_mode = QCOW_IO_BUFFERED, .writable = writable,
	};
	struct qcow_cache *cache = qcow_cache_create(0);
	struct qcow_image *image;
	int ret;

	KUNIT_ASSERT_NOT_NULL(tf->test, cache);
	ret = qcow_image_open(&source, cache, &image, msg);
	fput(file);
	qcow_cache_put(cache);
	if (!ret)
		qcow_image_close(image);
	return ret;
}

/**
 * qcow_test_chain() - make a chain of up to three images
 * @test: whose
 * @top: the image itself
 * @below: its backing file, or NULL
 * @bottom: the backing file of that, or NULL
 */
struct qcow_chain *qcow_test_chain(struct kunit *test, struct qcow_image *top,
				   struct qcow_image *below,
				   struct qcow_image *bottom)
{
	struct qcow_chain *chain;

	chain = kunit_kzalloc(test, struct_size(chain, layers, 3), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, chain);
	chain->layers[0] = top;
	chain->layers[1] = below;
	chain->layers[2] = bottom;
	chain->depth = 1 + !!below + !!bottom;
	return chain;
}

/**
 * qcow_test_image_close() - close an image before the test ends
 * @test: whose
 * @image: from qcow_test_image_open() or qcow_test_raw_open()
 *
 * Return: what qcow_image_close() returned.
 */
int qcow_test_image_close(struct kunit *test, struct qcow_image *image)
{
	struct kunit_resource *res;

	res = kunit_find_resource(test, open_image_match, image);
	KUNIT_ASSERT_NOT_NULL(test, res);
	((struct open_image *)res->data)->image = NULL;
	kunit_put_resource(res);
	return qcow_image_close(image);
}

/**
 * qcow_test_close_and_load() - close an image and look at what it left
 * @tf: the file
 * @image: the image in it
 */
struct qcow_test_disk *qcow_test_close_and_load(struct qcow_test_file *tf,
						struct qcow_image *image)
{
	KUNIT_ASSERT_EQ(tf->test, qcow_test_image_close(tf->test, image), 0);
	return qcow_test_file_load(tf);
}
