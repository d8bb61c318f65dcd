// SPDX-License-Identifier: GPL-2.0-only
/*
 * Persistent dirty bitmaps, by which QEMU makes incremental backups.
 *
 * A bitmap that is enabled has a bit for each granule of the disk that has been
 * written since it was made. While the image is attached for writing, the bits are
 * in memory, and the file's copy of them is marked as in use. They are stored at
 * detach. If that does not happen, the mark stays, and QEMU does not believe the
 * bitmap any more. One that is disabled stays as it is, and so does one that was
 * marked before.
 *
 * Order. The mark is durable before the first write of the guest. Bits are set
 * before the request that changes the disk is begun. At detach:
 *
 *  1. bits are written, to the clusters that the bitmap has or to new ones, and are
 *     made durable together with the counts of these (a commit);
 *  2. tables are rewritten where they are, and made durable; clusters that they lose
 *     are freed after that (another commit);
 *  3. the marks are taken away.
 *
 * Up to step 3 nobody believes the bits. A table that is half written refers to
 * clusters that are all counted. A mark is four bytes of one sector, so it is there
 * or not. Commits make the file of the data durable, which may be another one than
 * that of the bitmaps: so each step ends with a barrier of its own.
 *
 * While they are kept up, tables and bits are metadata to overlap.c: no cluster of
 * theirs is anything else, or is taken for it.
 */
#include <linux/bitops.h>
#include <linux/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "qcow.h"

/* QEMU's limits */
#define QCOW_BITMAP_MAX_BYTES		(512U << 20)
#define QCOW_BITMAP_MIN_GRANULARITY	9
#define QCOW_BITMAP_MAX_GRANULARITY	31
#define QCOW_BITMAP_MAX_NAME		1023

/* So many may be kept up, and so much memory may they take. */
#define QCOW_BITMAPS_MAX		1024
#define QCOW_BITMAPS_MAX_BYTES		(512U << 20)
/* What overlap.c may need to know of a cluster: two nodes of an XArray. */
#define QCOW_BITMAP_CLAIM		1152U
/* So much is read or written at once. */
#define QCOW_BITMAP_STEP		SZ_64K

#define QCOW_BITMAP_IN_USE		BIT(0)
#define QCOW_BITMAP_AUTO		BIT(1)
#define QCOW_BITMAP_RESERVED		(~(u32)(QCOW_BITMAP_IN_USE | QCOW_BITMAP_AUTO))
#define QCOW_BITMAP_TYPE_DIRTY		1

#define QCOW_BITMAP_ENTRY_RESERVED	0xff000000000001feULL
#define QCOW_BITMAP_ENTRY_OFFSET	0x00fffffffffffe00ULL
#define QCOW_BITMAP_ENTRY_ONES		BIT_ULL(0)

struct qcow_disk_bitmap {
	__be64 table_offset;
	__be32 table_size;
	__be32 flags;
	__u8 type;
	__u8 granularity_bits;
	__be16 name_size;
	__be32 extra_data_size;
} __packed;

/**
 * struct qcow_bitmap - a bitmap that is kept up
 * @entry: in the directory
 * @table_offset: host offset of its table, bytes
 * @table_size: entries of it, each for a cluster of bits
 * @granularity_bits: log2 of the bytes that a bit is for
 * @table: the table, as it is in the file
 * @new_table: as it is going to be
 * @bits: in the order of the file; whole clusters
 */
struct qcow_bitmap {
	struct qcow_disk_bitmap *entry;
	u64 table_offset;
	u32 table_size;
	u32 granularity_bits;
	__be64 *table;
	__be64 *new_table;
	u8 *bits;
};

/**
 * struct qcow_bitmaps - those of an image that are kept up
 * @directory: all of the directory
 * @size: its length in bytes
 * @bytes: of memory that they take
 * @buf: QCOW_BITMAP_STEP, for I/O by who loads or stores them
 * @marked: the file may say that they are in use
 * @nr: how many there are
 * @maps: they
 */
struct qcow_bitmaps {
	void *directory;
	u64 size;
	u64 bytes;
	void *buf;
	bool marked;
	u32 nr;
	struct qcow_bitmap maps[];
};

/* Read bytes of the file; @host_offset is a multiple of 512. */
static int qcow_bitmap_read(struct qcow_image *image, u64 host_offset, void *to,
			    u64 length)
{
	void *buf = image->bitmaps->buf;
	u64 step;
	int err;

	for (; length; host_offset += step, to += step, length -= step) {
		step = min_t(u64, length, QCOW_BITMAP_STEP);
		err = fatal_signal_pending(current) ? -EINTR :
			qcow_file_read(&image->file, buf,
				       round_up(step, QCOW_SECTOR), host_offset);
		if (err)
			return err;
		memcpy(to, buf, step);
		cond_resched();
	}
	return 0;
}

/* What follows in the last sector is zero, as the clusters are bitmaps' own. */
static int qcow_bitmap_write(struct qcow_image *image, u64 host_offset,
			     const void *from, u64 length)
{
	void *buf = image->bitmaps->buf;
	u64 step;
	int err;

	for (; length; host_offset += step, from += step, length -= step) {
		step = min_t(u64, length, QCOW_BITMAP_STEP);
		memcpy(buf, from, step);
		memset(buf + step, 0, round_up(step, QCOW_SECTOR) - step);
		err = qcow_file_write(&image->file, buf,
				      round_up(step, QCOW_SECTOR), host_offset);
		if (err)
			return err;
		cond_resched();
	}
	return 0;
}

/* How many bits a bitmap has. */
static u64 qcow_bitmap_bits(const struct qcow_image *image, u32 granularity)
{
	return (image->size + (1ULL << granularity) - 1) >> granularity;
}

/* Is an entry of the directory one that makes sense? */
static bool qcow_bitmap_entry_valid(const struct qcow_image *image,
				    const struct qcow_disk_bitmap *entry)
{
	u64 table_offset = be64_to_cpu(entry->table_offset);
	u32 table_size = be32_to_cpu(entry->table_size);
	u32 name_size = be16_to_cpu(entry->name_size);

	return entry->type == QCOW_BITMAP_TYPE_DIRTY &&
	       !(be32_to_cpu(entry->flags) & QCOW_BITMAP_RESERVED) &&
	       !entry->extra_data_size &&
	       name_size && name_size <= QCOW_BITMAP_MAX_NAME &&
	       entry->granularity_bits >= QCOW_BITMAP_MIN_GRANULARITY &&
	       entry->granularity_bits <= QCOW_BITMAP_MAX_GRANULARITY &&
	       table_offset && table_size &&
	       !(table_offset & (qcow_cluster_size(image) - 1)) &&
	       table_size <= QCOW_BITMAP_MAX_BYTES >> image->cluster_bits;
}

/* The length of an entry of the directory that begins with @entry. */
static u64 qcow_bitmap_entry_size(const struct qcow_disk_bitmap *entry)
{
	return round_up(sizeof(*entry) + be16_to_cpu(entry->name_size) +
			(u64)be32_to_cpu(entry->extra_data_size), 8);
}

static bool qcow_bitmap_tracks(const struct qcow_disk_bitmap *entry)
{
	return (be32_to_cpu(entry->flags) &
		(QCOW_BITMAP_AUTO | QCOW_BITMAP_IN_USE)) == QCOW_BITMAP_AUTO;
}

/*
 * May it be written there, is nothing else in these clusters? They have the kind
 * @kind, or -1 for none yet.
 */
static bool qcow_bitmap_owns(struct qcow_image *image, int kind, u64 host_offset,
			     u64 length)
{
	u64 cluster = host_offset >> image->cluster_bits;
	u64 last = (host_offset + length - 1) >> image->cluster_bits;
	u64 count;

	if (!qcow_image_has(image, host_offset, length) ||
	    !qcow_overlap_is_only(image, kind, host_offset, length))
		return false;
	for (; cluster <= last; cluster++)
		if (qcow_refcount_get(image, cluster, &count) || count != 1)
			return false;
	return true;
}

/* May they take so much more memory? */
static bool qcow_bitmap_charge(struct qcow_bitmaps *maps, u64 bytes)
{
	maps->bytes += bytes;
	return maps->bytes <= QCOW_BITMAPS_MAX_BYTES;
}

/* Take clusters of the file for a bitmap, which must not be anything else. */
static int qcow_bitmap_claim(struct qcow_image *image, u64 host_offset,
			     u64 length)
{
	u64 clusters = (length + qcow_cluster_size(image) - 1) >>
		       image->cluster_bits;

	if (!qcow_bitmap_charge(image->bitmaps, clusters * QCOW_BITMAP_CLAIM))
		return -ENOMEM;
	if (!qcow_bitmap_owns(image, -1, host_offset, length))
		return -EINVAL;
	qcow_overlap_add(image, QCOW_METADATA_BITMAP, host_offset, length);
	return 0;
}

static void *qcow_bitmap_alloc(struct qcow_bitmaps *maps, u64 size)
{
	if (!qcow_bitmap_charge(maps, size))
		return NULL;
	return kvzalloc(size, GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL |
			      __GFP_NOWARN);
}

/* Read the table and the bits. */
static int qcow_bitmap_read_map(struct qcow_image *image, struct qcow_bitmap *map)
{
	u64 length = (u64)map->table_size * sizeof(*map->table);
	u32 cluster_size = qcow_cluster_size(image);
	u64 entry, offset;
	void *bits;
	int err;
	u32 i;

	if (map->table_size != DIV_ROUND_UP_ULL(qcow_bitmap_bits(image,
								 map->granularity_bits),
						8ULL * cluster_size))
		return -EINVAL;
	map->table = qcow_bitmap_alloc(image->bitmaps, length);
	map->new_table = qcow_bitmap_alloc(image->bitmaps, length);
	map->bits = qcow_bitmap_alloc(image->bitmaps, (u64)map->table_size <<
				      image->cluster_bits);
	if (!map->table || !map->new_table || !map->bits)
		return -ENOMEM;
	err = qcow_bitmap_claim(image, map->table_offset, length) ?:
	      qcow_bitmap_read(image, map->table_offset, map->table, length);
	for (i = 0; i < map->table_size && !err; i++) {
		entry = be64_to_cpu(map->table[i]);
		offset = entry & QCOW_BITMAP_ENTRY_OFFSET;
		bits = map->bits + ((u64)i << image->cluster_bits);
		if (entry & QCOW_BITMAP_ENTRY_RESERVED ||
		    offset & (cluster_size - 1) ||
		    (offset && entry & QCOW_BITMAP_ENTRY_ONES))
			return -EINVAL;
		if (offset)
			err = qcow_bitmap_claim(image, offset, cluster_size) ?:
			      qcow_bitmap_read(image, offset, bits,
					       cluster_size);
		else if (entry)
			memset(bits, 0xff, cluster_size);
	}
	return err;
}

/* Read the directory, and those that are to be kept up. */
static int qcow_bitmaps_read(struct qcow_image *image)
{
	u64 offset = image->header.bitmap_directory_offset;
	struct qcow_bitmaps *maps = image->bitmaps;
	u32 count = image->header.nb_bitmaps;
	struct qcow_disk_bitmap *entry;
	struct qcow_bitmap *map;
	u64 at, step;
	int err;
	u32 i;

	/* It is going to be written where it is. */
	if (!qcow_bitmap_owns(image, QCOW_METADATA_BITMAPS, offset, maps->size))
		return -EINVAL;
	err = qcow_bitmap_read(image, offset, maps->directory, maps->size);
	for (at = 0; !err && at < maps->size; at += step) {
		entry = maps->directory + at;
		if (maps->size - at < sizeof(*entry) || !count--)
			return -EINVAL;
		step = qcow_bitmap_entry_size(entry);
		if (step > maps->size - at ||
		    !qcow_bitmap_entry_valid(image, entry))
			return -EINVAL;
		if (!qcow_bitmap_tracks(entry))
			continue;
		if (maps->nr == QCOW_BITMAPS_MAX)
			return -EFBIG;
		map = &maps->maps[maps->nr++];
		map->entry = entry;
		map->table_offset = be64_to_cpu(entry->table_offset);
		map->table_size = be32_to_cpu(entry->table_size);
		map->granularity_bits = entry->granularity_bits;
	}
	if (!err && count)
		return -EINVAL;
	for (i = 0; !err && i < maps->nr; i++)
		err = qcow_bitmap_read_map(image, &maps->maps[i]);
	return err;
}

static void qcow_bitmaps_free(struct qcow_bitmaps *maps)
{
	u32 i;

	for (i = 0; i < maps->nr; i++) {
		kvfree(maps->maps[i].table);
		kvfree(maps->maps[i].new_table);
		kvfree(maps->maps[i].bits);
	}
	kvfree(maps->directory);
	kfree(maps->buf);
	kvfree(maps);
}

/* A barrier; if one fails, none that comes later makes up for it. */
static int qcow_bitmap_sync(struct qcow_image *image)
{
	int err = qcow_file_sync(&image->file);

	if (err)
		qcow_image_fail(image, "flush failed with error %d", err);
	return err;
}

/* Write for all that are kept up whether they are in use; durably. */
static int qcow_bitmaps_write_marks(struct qcow_image *image, bool in_use)
{
	struct qcow_bitmaps *maps = image->bitmaps;
	u32 i, flags = QCOW_BITMAP_AUTO | (in_use ? QCOW_BITMAP_IN_USE : 0);
	int err;

	for (i = 0; i < maps->nr; i++)
		maps->maps[i].entry->flags = cpu_to_be32(flags);
	err = qcow_bitmap_write(image, image->header.bitmap_directory_offset,
				maps->directory, maps->size);
	return err ?: qcow_bitmap_sync(image);
}

/**
 * qcow_bitmaps_load - read the bitmaps that are to be kept up
 * @image: a qcow2 image that has not been written yet; nothing is done if it is not
 *	going to be
 * @msg: where to say what is wrong
 *
 * Implements "Bitmaps extension" of the specification.
 *
 * Context: may sleep.
 *
 * Return: 0; -EINVAL if they are damaged; -ENOMEM or -EFBIG if there is too much of
 * them; -EINTR; or the errno of a read.
 */
int qcow_bitmaps_load(struct qcow_image *image, struct qcow_message *msg)
{
	u64 size = image->header.bitmap_directory_size;
	struct qcow_bitmaps *maps;
	int err = -ENOMEM;

	if (!image->writable || !size)
		return 0;
	maps = kvzalloc(struct_size(maps, maps, image->header.nb_bitmaps),
			GFP_KERNEL_ACCOUNT);
	if (!maps)
		return -ENOMEM;
	image->bitmaps = maps;
	maps->size = size;
	maps->buf = kmalloc(QCOW_BITMAP_STEP, GFP_KERNEL);
	maps->directory = kvmalloc(size, GFP_KERNEL_ACCOUNT);
	if (maps->buf && maps->directory)
		err = qcow_bitmaps_read(image);
	if (err == -EINVAL)
		qcow_message_set(msg, "its bitmaps are damaged; attach it read-only, which does without them");
	else if (err == -ENOMEM)
		qcow_message_set(msg, "its bitmaps take more memory than there is for them (%llu MiB of %u); attach it read-only, or disable some",
				 maps->bytes >> 20, QCOW_BITMAPS_MAX_BYTES >> 20);
	else if (err == -EFBIG)
		qcow_message_set(msg, "more than %u of its bitmaps are enabled; attach it read-only, or disable some",
				 QCOW_BITMAPS_MAX);
	else if (err)
		qcow_message_set(msg, "cannot read its bitmaps: error %d", -err);
	if (err) {
		image->bitmaps = NULL;
		qcow_bitmaps_free(maps);
	}
	return err;
}

/**
 * qcow_bitmaps_mark - the file's copy of the bits is about to be out of date
 * @image: perhaps with bitmaps
 *
 * Context: may sleep.
 *
 * Return: 0, or the errno of a write or barrier.
 */
int qcow_bitmaps_mark(struct qcow_image *image)
{
	if (!image->bitmaps || !image->bitmaps->nr)
		return 0;
	image->bitmaps->marked = true;
	return qcow_bitmaps_write_marks(image, true);
}

/**
 * qcow_bitmaps_exit - undo qcow_bitmaps_load(), even if that failed
 * @image: nobody uses it any more
 */
void qcow_bitmaps_exit(struct qcow_image *image)
{
	if (image->bitmaps)
		qcow_bitmaps_free(image->bitmaps);
	image->bitmaps = NULL;
}

/*
 * Set bits; others may do so at the same time. Each may be set already, as most are.
 * Not all kernels can do it further than INT_MAX bits from where the memory begins.
 */
static void qcow_bitmap_set(u8 *bits, u64 first, u64 last)
{
	u64 bytes, bit = first;

	while (bit <= last) {
		u8 *byte = bits + (bit >> 3);

		if (!(bit & 7) && last - bit >= 7) {
			bytes = (last + 1 - bit) >> 3;
			if (memchr_inv(byte, 0xff, bytes))
				memset(byte, 0xff, bytes);
			bit += 8 * bytes;
			continue;
		}
		if (!(READ_ONCE(*byte) & BIT(bit & 7)))
			set_bit_le(bit % BITS_PER_LONG, (unsigned long *)bits +
				   bit / BITS_PER_LONG);
		bit++;
	}
}

/**
 * qcow_bitmaps_set - a part of the disk is going to be changed
 * @image: the top layer, with bitmaps
 * @guest_offset: bytes
 * @length: bytes, not 0
 *
 * Context: any.
 */
void qcow_bitmaps_set(struct qcow_image *image, u64 guest_offset, u64 length)
{
	struct qcow_bitmaps *maps = image->bitmaps;
	u32 i;

	for (i = 0; i < maps->nr; i++) {
		const struct qcow_bitmap *map = &maps->maps[i];

		qcow_bitmap_set(map->bits,
				guest_offset >> map->granularity_bits,
				(guest_offset + length - 1) >>
				map->granularity_bits);
	}
}

/* Give back a cluster that had bits, when no table in the file refers to it. */
static void qcow_bitmap_free(struct qcow_image *image, u64 host_offset)
{
	struct qcow_free *free = qcow_free_alloc(image);

	qcow_overlap_remove(image, host_offset, qcow_cluster_size(image));
	if (!free)
		return;
	free->cluster = host_offset >> image->cluster_bits;
	free->count = 1;
	free->punch = true;
	spin_lock_irq(&image->lock);
	qcow_free_queue_locked(image, free);
	spin_unlock_irq(&image->lock);
}

/* Free the clusters that one table refers to and the other one does not. */
static void qcow_bitmap_free_others(struct qcow_image *image,
				    const struct qcow_bitmap *map,
				    const __be64 *table, const __be64 *other)
{
	u64 offset;
	u32 i;

	for (i = 0; i < map->table_size; i++) {
		offset = be64_to_cpu(table[i]) & QCOW_BITMAP_ENTRY_OFFSET;
		if (offset && table[i] != other[i])
			qcow_bitmap_free(image, offset);
	}
}

/* Write a cluster of bits, where there are any; *@entry is what the table says of it. */
static int qcow_bitmap_store_bits(struct qcow_image *image, const u8 *bits,
				  __be64 *entry)
{
	u64 offset = be64_to_cpu(*entry) & QCOW_BITMAP_ENTRY_OFFSET;
	u32 cluster_size = qcow_cluster_size(image);
	u64 cluster, got;
	bool zeroed;
	int err;

	if (!memchr_inv(bits, 0, cluster_size)) {
		*entry = 0;
		return 0;
	}
	if (!offset) {
		err = qcow_alloc_clusters(image, 1, &cluster, &got, &zeroed);
		if (err)
			return err;
		offset = cluster << image->cluster_bits;
		qcow_overlap_add(image, QCOW_METADATA_BITMAP, offset,
				 cluster_size);
	}
	*entry = cpu_to_be64(offset);
	return qcow_overlap_expect(image, QCOW_METADATA_BITMAP, offset) ?:
	       qcow_bitmap_write(image, offset, bits, cluster_size);
}

/* Bits behind the end of the disk are zero. */
static void qcow_bitmap_trim(const struct qcow_image *image,
			     const struct qcow_bitmap *map)
{
	u64 end = (u64)map->table_size << image->cluster_bits;
	u64 bits = qcow_bitmap_bits(image, map->granularity_bits);
	u64 byte = bits >> 3;

	if (bits & 7)
		map->bits[byte++] &= BIT(bits & 7) - 1;
	memset(map->bits + byte, 0, end - byte);
}

/* All that is written, and what it takes to find it. */
static int qcow_bitmap_barrier(struct qcow_image *image)
{
	return qcow_commit_all(image) ?: qcow_bitmap_sync(image) ?:
	       qcow_image_error(image);
}

/* Write the bits of one. */
static int qcow_bitmap_store_map(struct qcow_image *image,
				 const struct qcow_bitmap *map)
{
	int err = 0;
	u32 i;

	qcow_bitmap_trim(image, map);
	memcpy(map->new_table, map->table, map->table_size * sizeof(*map->table));
	for (i = 0; i < map->table_size && !err; i++) {
		err = qcow_bitmap_store_bits(image, map->bits +
					     ((u64)i << image->cluster_bits),
					     &map->new_table[i]);
		cond_resched();
	}
	return err ?: qcow_overlap_expect(image, QCOW_METADATA_BITMAP,
					  map->table_offset);
}

/* Steps 1 and 2, for all of them together. */
static int qcow_bitmaps_store_maps(struct qcow_image *image)
{
	struct qcow_bitmaps *maps = image->bitmaps;
	const struct qcow_bitmap *map, *end = maps->maps + maps->nr;
	int err = 0;

	for (map = maps->maps; map < end && !err; map++)
		err = qcow_bitmap_store_map(image, map);
	err = err ?: qcow_bitmap_barrier(image);
	if (err) {
		/* A new table that there is not yet has nothing. */
		for (map = maps->maps; map < end; map++)
			qcow_bitmap_free_others(image, map, map->new_table,
						map->table);
		return err;
	}
	/* From here on either table may be the one in the file. */
	for (map = maps->maps; map < end && !err; map++)
		err = qcow_bitmap_write(image, map->table_offset,
					map->new_table,
					map->table_size * sizeof(*map->table));
	err = err ?: qcow_bitmap_sync(image);
	if (err)
		return err;
	for (map = maps->maps; map < end; map++)
		qcow_bitmap_free_others(image, map, map->table, map->new_table);
	return qcow_bitmap_barrier(image);
}

/**
 * qcow_bitmaps_store - write the bitmaps out; they are not kept up any more
 * @image: a writable image; nobody changes it, and all else is written
 *
 * Context: may sleep.
 *
 * Return: 0, or an errno; then QEMU does not believe those any more that were kept.
 */
int qcow_bitmaps_store(struct qcow_image *image)
{
	int err;

	if (!image->bitmaps || !image->bitmaps->marked)
		return 0;
	err = qcow_bitmaps_store_maps(image) ?:
	      qcow_bitmaps_write_marks(image, false);
	if (err)
		pr_err("qcow: %pD: the bitmaps could not be stored: error %d; incremental backups have to begin anew\n",
		       image->file.file, err);
	return err;
}
