// SPDX-License-Identifier: GPL-2.0-only
/*
 * Refcounts, and the allocator of host clusters.
 *
 * The refcount table, its blocks and the fields below them in struct qcow_image
 * change only under alloc_mutex. Refcount blocks may be written at any time (see
 * enum qcow_block_kind): a count goes up before anything points to the cluster,
 * and goes down after the removal of the last pointer is durable.
 *
 * A cluster is handed out only once the refcount block that covers it is
 * reachable on stable storage. Otherwise an L2 entry could become durable while
 * the refcount table does not yet lead to the count of its cluster. So new
 * refcount blocks are made ahead of use, are pending until a commit has written
 * their refcount table entries, and the allocator waits for that commit when it
 * comes to a pending block.
 *
 * A new refcount block lies in the first cluster that it covers itself, so
 * making one needs no allocation. When the refcount table is full, a larger one
 * is written behind everything that the old one covers, with the blocks that
 * count it, and then one write of 12 bytes in the header makes all of it
 * reachable.
 *
 * Bytes for compressed data come from clusters that are shared by what is packed
 * into them; see qcow_alloc_bytes().
 *
 * Known zero: space that was added to the file since attach, and that was never
 * handed out, reads as zeroes, since growing a file adds zeroes. Nothing else
 * does, not even what has a count of zero.
 */
#include <linux/sizes.h>
#include <linux/slab.h>

#include "qcow.h"
#include "trace.h"

/* Refcount blocks are made ahead for this many bytes, but for so many at most. */
#define QCOW_REFBLOCK_RESERVE	((u64)SZ_16M)
#define QCOW_REFBLOCKS_AHEAD	64U

/* Counted clusters behind the end of the file that a crash may have left. */
#define QCOW_MAX_STRAY_BYTES	SZ_4G

#define QCOW_EXTEND_MIN		((u64)SZ_1M)
#define QCOW_EXTEND_MAX		((u64)SZ_64M)

/* What stands in the way of an allocation. */
enum qcow_alloc_need {
	QCOW_NEED_COMMIT,
	QCOW_NEED_REFBLOCK,
	QCOW_NEED_REFTABLE,
};

/**
 * qcow_refcount_load - one refcount from a block
 * @block: the refcount block, or a part of it
 * @order: log2 of the width in bits, 0 to 6
 * @index: of the refcount in @block
 *
 * Return: the count. Widths below a byte are packed from the low bits up.
 */
u64 qcow_refcount_load(const void *block, u32 order, u64 index)
{
	const u8 *bytes = block;

	switch (order) {
	case 0:
		return bytes[index >> 3] >> (index & 7) & 0x1;
	case 1:
		return bytes[index >> 2] >> (2 * (index & 3)) & 0x3;
	case 2:
		return bytes[index >> 1] >> (4 * (index & 1)) & 0xf;
	case 3:
		return bytes[index];
	case 4:
		return be16_to_cpu(((const __be16 *)block)[index]);
	case 5:
		return be32_to_cpu(((const __be32 *)block)[index]);
	default:
		return be64_to_cpu(((const __be64 *)block)[index]);
	}
}

/**
 * qcow_refcount_store - set one refcount in a block
 * @block: the refcount block, or a part of it
 * @order: log2 of the width in bits, 0 to 6
 * @index: of the refcount in @block
 * @count: fits the width
 */
void qcow_refcount_store(void *block, u32 order, u64 index, u64 count)
{
	u8 *bytes = block;
	u32 shift;

	switch (order) {
	case 0:
	case 1:
	case 2:
		shift = (index << order) & 7;
		bytes += index >> (3 - order);
		*bytes &= ~(((1U << (1U << order)) - 1) << shift);
		*bytes |= count << shift;
		break;
	case 3:
		bytes[index] = count;
		break;
	case 4:
		((__be16 *)block)[index] = cpu_to_be16(count);
		break;
	case 5:
		((__be32 *)block)[index] = cpu_to_be32(count);
		break;
	default:
		((__be64 *)block)[index] = cpu_to_be64(count);
		break;
	}
}

/* The highest count that a width has room for. */
static u64 qcow_refcount_max(u32 order)
{
	return U64_MAX >> (64 - (1U << order));
}

static u64 qcow_reftable_entries(const struct qcow_image *image)
{
	return (u64)image->reftable_clusters << (image->cluster_bits - 3);
}

/* log2 of the refcounts in a cached block */
static u32 qcow_counts_bits(const struct qcow_image *image)
{
	return image->block_bits + 3 - image->refcount_order;
}

/* First host byte that a refcount block covers; its own place if it is new. */
static u64 qcow_refblock_home(const struct qcow_image *image, u64 index)
{
	return index << (image->refblock_bits + image->cluster_bits);
}

static struct qcow_block *qcow_reftable_block(struct qcow_image *image,
					      u64 index, unsigned int *entry)
{
	u64 host_offset = image->reftable_offset + index * sizeof(__be64);
	u32 mask = qcow_block_size(image) - 1;

	*entry = (host_offset & mask) / sizeof(__be64);
	return qcow_block_get(image, host_offset & ~(u64)mask);
}

/* The offset of a refcount block, 0 if there is none. */
static int qcow_refblock_offset(struct qcow_image *image, u64 index,
				u64 *offset)
{
	struct qcow_block *block;
	unsigned int entry;
	u64 value;

	lockdep_assert_held(&image->alloc_mutex);
	block = qcow_reftable_block(image, index, &entry);
	if (IS_ERR(block))
		return PTR_ERR(block);
	value = qcow_entry_load(image, block, entry);
	qcow_block_put(block);

	*offset = value & QCOW_RT_OFFSET_MASK;
	if (value & QCOW_RT_RESERVED_MASK ||
	    *offset & (qcow_cluster_size(image) - 1) ||
	    (*offset &&
	     !qcow_image_has(image, *offset, qcow_cluster_size(image)))) {
		qcow_image_corrupt(image, "refcount table entry %llu is 0x%llx, not a cluster of the file",
				   index, value);
		return -EIO;
	}
	if (!*offset)
		return 0;
	return qcow_overlap_expect(image, QCOW_METADATA_REFBLOCK, *offset);
}

/*
 * The cached block that holds the count of a cluster, and the index therein.
 * NULL if the cluster is not covered, so that its count is zero.
 */
static struct qcow_block *qcow_counts_block(struct qcow_image *image,
					    u64 cluster, u64 *index)
{
	u64 in_refblock = cluster & ((1ULL << image->refblock_bits) - 1);
	u64 refblock = cluster >> image->refblock_bits;
	u32 bits = qcow_counts_bits(image);
	u64 offset;
	int err;

	lockdep_assert_held(&image->alloc_mutex);
	if (refblock >= qcow_reftable_entries(image))
		return NULL;
	err = qcow_refblock_offset(image, refblock, &offset);
	if (err)
		return ERR_PTR(err);
	if (!offset)
		return NULL;
	*index = in_refblock & ((1ULL << bits) - 1);
	return qcow_block_get(image, offset + ((in_refblock >> bits)
					       << image->block_bits));
}

/*
 * Set @nr counts of a block to @count. Under image->lock, so that a commit, to
 * which an allocator may be leading, can copy the block without alloc_mutex.
 */
static int qcow_counts_set(struct qcow_image *image, struct qcow_block *block,
			   u64 index, u64 nr, u64 count)
{
	unsigned long flags;
	int err;

	lockdep_assert_held(&image->alloc_mutex);
	spin_lock_irqsave(&image->lock, flags);
	err = qcow_block_claim_locked(block, QCOW_BLOCK_COUNT);
	if (!err) {
		while (nr--)
			qcow_refcount_store(block->data, image->refcount_order,
					    index++, count);
		qcow_block_dirty_locked(block);
	}
	spin_unlock_irqrestore(&image->lock, flags);
	return err;
}

/**
 * qcow_refcount_get - look up a refcount
 * @image: a writable image
 * @cluster: host cluster number
 * @count: out
 *
 * Context: may sleep; takes alloc_mutex.
 *
 * Return: 0 or an errno.
 */
int qcow_refcount_get(struct qcow_image *image, u64 cluster, u64 *count)
{
	struct qcow_block *block;
	u64 index;
	int err = 0;

	*count = 0;
	mutex_lock(&image->alloc_mutex);
	block = qcow_counts_block(image, cluster, &index);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
	} else if (block) {
		*count = qcow_refcount_load(block->data, image->refcount_order,
					    index);
		qcow_block_put(block);
	}
	mutex_unlock(&image->alloc_mutex);
	return err;
}

/**
 * qcow_refcount_drop - one reference less
 * @image: a writable image
 * @cluster: host cluster number; the removal of the reference is durable, and if
 *	it was the last one, nobody uses the cluster any more
 *
 * Context: may sleep; takes alloc_mutex.
 *
 * Return: 0; -EIO if the count is zero already, which marks the image corrupt;
 * or the errno of a read.
 */
int qcow_refcount_drop(struct qcow_image *image, u64 cluster)
{
	struct qcow_block *block;
	u64 count = 0;
	int err = 0;
	u64 index;

	mutex_lock(&image->alloc_mutex);
	block = qcow_counts_block(image, cluster, &index);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out;
	}
	if (block)
		count = qcow_refcount_load(block->data, image->refcount_order,
					   index);
	if (!count) {
		qcow_image_corrupt(image, "host cluster %llu was in use with a refcount of 0",
				   cluster);
		err = -EIO;
	} else {
		err = qcow_counts_set(image, block, index, 1, --count);
	}
	if (block)
		qcow_block_put(block);
	if (!err && !count) {
		image->alloc_cursor = min(image->alloc_cursor, cluster);
		atomic64_inc(&image->clusters_freed);
	}
out:
	mutex_unlock(&image->alloc_mutex);
	return err;
}

/* Make the file at least @end bytes long, in steps that grow with it. */
static int qcow_extend(struct qcow_image *image, u64 end)
{
	u64 size = qcow_file_size(&image->file);
	u64 step = qcow_file_step(&image->file);
	u64 target;
	int err;

	lockdep_assert_held(&image->alloc_mutex);
	if (end <= size)
		return 0;
	if (image->file.bdev)
		return -ENOSPC;
	target = end + clamp(end >> 3, QCOW_EXTEND_MIN, QCOW_EXTEND_MAX);
	target = round_up(target, step);
	err = qcow_file_truncate(&image->file, target);
	if (err) {
		/* Perhaps a limit on the size of files is near. */
		target = round_up(end, step);
		err = qcow_file_truncate(&image->file, target);
	}
	if (err)
		return err == -EFBIG ? -ENOSPC : err;
	/* What lies between is zero as well, if nothing but us grows the file. */
	if (image->zero_to != size)
		image->zero_from = round_up(size, qcow_cluster_size(image));
	image->zero_to = target;
	return 0;
}

/* Is this part of the file known to be zero? */
static bool qcow_known_zero(struct qcow_image *image, u64 host_offset, u64 len)
{
	return host_offset >= image->zero_from &&
	       host_offset + len <= image->zero_to;
}

/* These bytes hold something now. */
static void qcow_note_used(struct qcow_image *image, u64 end)
{
	if (end > atomic64_read(&image->end_offset))
		atomic64_set(&image->end_offset, end);
	/* Before any entry that leads there: see qcow_image_has(). */
	smp_wmb();
}

/*
 * Write a new refcount block for clusters of which the first @used are in use.
 * Nothing points to it yet. All of it is written, known zero or not, so that its
 * space is taken before a commit relies on it.
 */
static int qcow_refblock_write(struct qcow_image *image, u64 host_offset,
			       u64 used)
{
	u64 per_block = 1ULL << qcow_counts_bits(image);
	u32 cluster_size = qcow_cluster_size(image);
	u32 pos = 0;
	int err = 0;
	u64 i;

	while (used && pos < cluster_size) {
		memset(image->scratch, 0, qcow_block_size(image));
		for (i = 0; i < min(used, per_block); i++)
			qcow_refcount_store(image->scratch,
					    image->refcount_order, i, 1);
		err = qcow_file_write(&image->file, image->scratch,
				      qcow_block_size(image),
				      host_offset + pos);
		if (err)
			return err;
		used -= i;
		pos += qcow_block_size(image);
	}
	if (pos < cluster_size)
		err = qcow_file_write_zeroes(&image->file, cluster_size - pos,
					     host_offset + pos);
	return err;
}

static int qcow_refblock_create(struct qcow_image *image,
				struct qcow_block *table, unsigned int entry,
				u64 index)
{
	u64 home = qcow_refblock_home(image, index);
	u32 cluster_size = qcow_cluster_size(image);
	__be64 *entries = table->data;
	unsigned long flags;
	int err;

	if (!index) {
		qcow_image_corrupt(image, "the header's cluster has no refcount block");
		return -EIO;
	}
	if (home + cluster_size > QCOW_MAX_HOST_OFFSET)
		return -ENOSPC;
	err = qcow_overlap_check(image, home, cluster_size) ?:
	      qcow_extend(image, home + cluster_size) ?:
	      qcow_refblock_write(image, home, 1);
	if (err)
		return err;
	qcow_hold(QCOW_POINT_REFBLOCK_MADE);
	qcow_overlap_add(image, QCOW_METADATA_REFBLOCK, home, cluster_size);
	qcow_note_used(image, home + cluster_size);

	spin_lock_irqsave(&image->lock, flags);
	WRITE_ONCE(entries[entry], cpu_to_be64(home));
	qcow_block_dirty_locked(table);
	if (image->pending_first == image->pending_end)
		image->pending_first = index;
	image->pending_end = index + 1;
	/* One that has begun may have frozen the table before this. */
	image->pending_ticket = image->commits_started + 1;
	spin_unlock_irqrestore(&image->lock, flags);
	return 0;
}

static bool qcow_refblock_pending(const struct qcow_image *image, u64 index)
{
	return index >= image->pending_first && index < image->pending_end;
}

/*
 * Make the refcount block with number @first, and as many behind it as the
 * reserve wants. They are pending afterwards.
 */
static int qcow_refblocks_create(struct qcow_image *image, u64 first)
{
	u64 cover = 1ULL << (image->refblock_bits + image->cluster_bits);
	struct qcow_block *table;
	unsigned int entry;
	u64 table_offset;
	u64 index, last;
	int epoch, err;

	/* The table may move; its old place is not used again before we have it. */
	epoch = qcow_image_enter(image);
	table_offset = READ_ONCE(image->reftable_offset);
	table = qcow_reftable_block(image, first, &entry);
	qcow_image_exit(image, epoch);
	if (IS_ERR(table))
		return PTR_ERR(table);
	/* May run a commit, so before alloc_mutex. */
	err = qcow_block_prepare(table);
	if (err)
		goto out_put;
	err = qcow_block_place(table);
	if (err)
		goto out_unprepare;

	mutex_lock(&image->alloc_mutex);
	if (image->reftable_offset != table_offset)
		goto out_unlock;	/* it grew meanwhile; look again */
	if (image->pending_first != image->pending_end &&
	    first != image->pending_end)
		goto out_unlock;	/* not together with those */

	last = first + clamp(QCOW_REFBLOCK_RESERVE >> ilog2(cover), 1ULL,
			     (u64)QCOW_REFBLOCKS_AHEAD);
	last = min(last, qcow_reftable_entries(image));
	for (index = first; index < last; index++, entry++) {
		if (entry == qcow_block_size(image) / sizeof(__be64) ||
		    qcow_entry_load(image, table, entry))
			break;
		err = qcow_refblock_create(image, table, entry, index);
		if (err)
			break;
	}
	/* What is made is good, even if the next one failed. */
	if (index > first)
		err = 0;
out_unlock:
	mutex_unlock(&image->alloc_mutex);
out_unprepare:
	qcow_block_unprepare(table);
out_put:
	qcow_block_put(table);
	return err;
}

/* Copy the refcount table to @to, and add @added blocks that lie at @blocks. */
static int qcow_reftable_copy(struct qcow_image *image, u64 to, u32 clusters,
			      u64 blocks, u64 added)
{
	u64 old_len = (u64)image->reftable_clusters << image->cluster_bits;
	u64 new_len = (u64)clusters << image->cluster_bits;
	u32 per_block = qcow_block_size(image) / sizeof(__be64);
	__be64 *entries = image->scratch;
	struct qcow_block *block;
	u64 pos;
	u32 i;
	int err;

	for (pos = 0; pos < new_len; pos += qcow_block_size(image)) {
		if (pos < old_len) {
			block = qcow_block_get(image,
					       image->reftable_offset + pos);
			if (IS_ERR(block))
				return PTR_ERR(block);
			memcpy(entries, block->data, qcow_block_size(image));
			qcow_block_put(block);
		} else {
			memset(entries, 0, qcow_block_size(image));
			for (i = 0; i < per_block && added; i++, added--) {
				entries[i] = cpu_to_be64(blocks);
				blocks += qcow_cluster_size(image);
			}
		}
		err = qcow_file_write(&image->file, entries,
				      qcow_block_size(image), to + pos);
		if (err)
			return err;
	}
	return 0;
}

/*
 * Replace the refcount table by one half as large again. @old_clusters is the
 * length that the caller found too short.
 *
 * Durable before the header's switch: the new table and the blocks that count
 * it, and everything that the old table leads to (the commit at the beginning;
 * nothing changes the table afterwards, because we hold alloc_mutex). Durable
 * after it: the switch. Then the old table is free.
 */
static int qcow_reftable_grow(struct qcow_image *image, u32 old_clusters)
{
	u32 max_clusters = QCOW_MAX_REFTABLE_BYTES >> image->cluster_bits;
	struct {
		__be64 offset;
		__be32 clusters;
	} __packed fields;
	u64 first, blocks, old_table, table, end;
	struct qcow_free *free;
	u32 clusters;
	u64 added, i;
	int err;

	if (old_clusters >= max_clusters)
		return -ENOSPC;
	free = qcow_free_alloc(image);

	mutex_lock(&image->commit_mutex);
	for (;;) {
		err = qcow_commit_exclusive(image);
		mutex_lock(&image->alloc_mutex);
		/* Pending blocks are what makes blocks of the table dirty. */
		if (err || image->pending_first == image->pending_end)
			break;
		mutex_unlock(&image->alloc_mutex);
	}
	if (err || image->reftable_clusters != old_clusters)
		goto out_unlock;

	clusters = min(old_clusters + max(old_clusters / 2, 1U), max_clusters);
	for (added = 1; added << image->refblock_bits < clusters + added;)
		added++;
	first = qcow_reftable_entries(image);
	blocks = qcow_refblock_home(image, first);
	table = blocks + (added << image->cluster_bits);
	end = table + ((u64)clusters << image->cluster_bits);

	/* Near the limit the new entries may not even cover the table itself. */
	if (end > QCOW_MAX_HOST_OFFSET ||
	    first + added > (u64)clusters << (image->cluster_bits - 3))
		err = -ENOSPC;
	else
		err = qcow_overlap_check(image, blocks, end - blocks) ?:
		      qcow_extend(image, end);
	for (i = 0; i < added && !err; i++) {
		u64 covered = i << image->refblock_bits;
		u64 used = clusters + added;

		err = qcow_refblock_write(image,
					  blocks + (i << image->cluster_bits),
					  used > covered ? used - covered : 0);
	}
	if (!err)
		err = qcow_reftable_copy(image, table, clusters, blocks, added);
	if (err)
		goto out_unlock;
	err = qcow_file_sync(&image->file);
	if (err) {
		qcow_image_fail(image, "cannot flush the new refcount table: %d",
				err);
		goto out_unlock;
	}
	/* Perhaps somebody else was told what we should have been. */
	if (READ_ONCE(image->failed)) {
		err = -EIO;
		goto out_unlock;
	}
	qcow_hold(QCOW_POINT_REFTABLE_MADE);
	fields.offset = cpu_to_be64(table);
	fields.clusters = cpu_to_be32(clusters);
	err = qcow_image_update_header(image,
				       offsetof(struct qcow_disk_header,
						refcount_table_offset),
				       &fields, sizeof(fields));
	if (err)
		goto out_unlock;

	old_table = image->reftable_offset;
	qcow_overlap_add(image, QCOW_METADATA_REFBLOCK, blocks, table - blocks);
	qcow_overlap_add(image, QCOW_METADATA_REFTABLE, table, end - table);
	qcow_overlap_remove(image, old_table,
			    (u64)old_clusters << image->cluster_bits);
	WRITE_ONCE(image->reftable_offset, table);
	image->reftable_clusters = clusters;
	image->zero_from = max(image->zero_from, end);
	qcow_note_used(image, end);
	if (free) {
		free->cluster = old_table >> image->cluster_bits;
		free->count = old_clusters;
		free->punch = true;
		qcow_free_reclaim(image, free);
		free = NULL;
	}
out_unlock:
	mutex_unlock(&image->alloc_mutex);
	mutex_unlock(&image->commit_mutex);
	if (free)
		qcow_free_discard(image, free);
	return err;
}

/* Count the free clusters from @index on in a block, up to @want. */
static u64 qcow_free_run(const struct qcow_image *image, const void *counts,
			 u64 index, u64 want)
{
	u64 end = min(index + want, 1ULL << qcow_counts_bits(image));
	u64 i = index;

	while (i < end &&
	       !qcow_refcount_load(counts, image->refcount_order, i))
		i++;
	return i - index;
}

/* The first free cluster from @index on in a block; its length if there is none. */
static u64 qcow_find_free(const struct qcow_image *image, const void *counts,
			  u64 index)
{
	u64 end = 1ULL << qcow_counts_bits(image);

	while (index < end &&
	       qcow_refcount_load(counts, image->refcount_order, index))
		index++;
	return index;
}

/*
 * Take up to @want free clusters in a row, from @cluster on in one block of
 * counts. *@got is 0 if there is none; then *@cluster is where to look next.
 */
static int qcow_take(struct qcow_image *image, u64 *cluster, u64 want, u64 limit,
		     u64 *got, bool *zeroed)
{
	struct qcow_block *block;
	u64 host_offset, len;
	u64 index, found;
	int err = 0;

	block = qcow_counts_block(image, *cluster, &index);
	if (IS_ERR(block))
		return PTR_ERR(block);
	found = qcow_find_free(image, block->data, index);
	*cluster += found - index;
	*got = 0;
	if (*cluster < limit)
		*got = qcow_free_run(image, block->data, found,
				     min(want, limit - *cluster));
	if (!*got)
		goto out;
	host_offset = *cluster << image->cluster_bits;
	len = *got << image->cluster_bits;
	err = qcow_overlap_check(image, host_offset, len) ?:
	      qcow_extend(image, host_offset + len);
	if (err)
		goto out;
	err = qcow_counts_set(image, block, found, *got, 1);
	if (err)
		goto out;

	*zeroed = qcow_known_zero(image, host_offset, len);
	if (host_offset + len > image->zero_from)
		image->zero_from = host_offset + len;
	/* What is to be there from now on is not what the file may have lacked. */
	if (image->old_size - host_offset < len)
		WRITE_ONCE(image->old_size, 0);
	qcow_note_used(image, host_offset + len);
	image->alloc_cursor = *cluster + *got;
out:
	qcow_block_put(block);
	return err;
}

/*
 * Look for clusters from the cursor to the end and once more from the start.
 * -EAGAIN: something has to be done first that cannot be done under alloc_mutex.
 */
static int qcow_search(struct qcow_image *image, u64 want, u64 *cluster,
		       u64 *got, bool *zeroed, enum qcow_alloc_need *need,
		       u64 *refblock)
{
	u64 start = image->alloc_cursor;
	u64 limit, offset, stray;
	bool wrapped = false;
	int err;

	lockdep_assert_held(&image->alloc_mutex);
	/* Otherwise it would be full. */
	if (qcow_file_gone(&image->file))
		return -EIO;
	limit = image->file.bdev ?
		qcow_file_size(&image->file) >> image->cluster_bits :
		QCOW_MAX_HOST_OFFSET >> image->cluster_bits;
	stray = (qcow_file_size(&image->file) + QCOW_MAX_STRAY_BYTES) >>
		image->cluster_bits;

	*cluster = start;
	for (;;) {
		if (*cluster >= limit && !wrapped) {
			wrapped = true;
			*cluster = 0;
		}
		if (*cluster >= limit || (wrapped && *cluster >= start))
			return -ENOSPC;
		if (*cluster > max(stray, start)) {
			qcow_image_corrupt(image, "clusters far behind the end of the file are in use");
			return -EIO;
		}
		cond_resched();

		*refblock = *cluster >> image->refblock_bits;
		*need = QCOW_NEED_REFTABLE;
		if (*refblock >= qcow_reftable_entries(image))
			return -EAGAIN;
		*need = QCOW_NEED_COMMIT;
		if (qcow_refblock_pending(image, *refblock))
			return -EAGAIN;
		err = qcow_refblock_offset(image, *refblock, &offset);
		if (err)
			return err;
		*need = QCOW_NEED_REFBLOCK;
		if (!offset)
			return -EAGAIN;
		err = qcow_take(image, cluster, want, limit, got, zeroed);
		if (err || *got)
			return err;
	}
}

/* Is the end of what the refcount blocks cover near? Then make more. */
static void qcow_refblocks_ahead(struct qcow_image *image, u64 cluster)
{
	u64 ahead = cluster + (QCOW_REFBLOCK_RESERVE >> 1 >> image->cluster_bits);
	u64 index = cluster >> image->refblock_bits;
	u64 last = min(ahead >> image->refblock_bits,
		       index + QCOW_REFBLOCKS_AHEAD / 2);
	u64 offset = 1;

	if (last < READ_ONCE(image->refblocks_known))
		return;
	mutex_lock(&image->alloc_mutex);
	/*
	 * The first one that is missing, so that they stay in a row. That may be the
	 * one of @cluster, which is behind what was taken.
	 */
	for (; index <= last && index < qcow_reftable_entries(image); index++)
		if (qcow_refblock_offset(image, index, &offset) || !offset)
			break;
	WRITE_ONCE(image->refblocks_known, index);
	mutex_unlock(&image->alloc_mutex);
	if (!offset)
		qcow_refblocks_create(image, index);
}

/**
 * qcow_alloc_clusters - take free host clusters
 * @image: a writable image
 * @want: how many would be welcome, at least 1
 * @cluster: out: number of the first one
 * @got: out: how many in a row were taken, 1 to @want
 * @zeroed: out: they are known to read as zeroes
 *
 * Their refcount is 1 in memory now, and on disk before any commit that writes a
 * pointer to them, unless the dirty bit is there. The file is long enough to hold them.
 *
 * Context: may sleep, and may run a commit; so not inside an epoch and not under
 * commit_mutex or alloc_mutex.
 *
 * Return: 0; -ENOSPC where the file cannot grow; or another errno.
 */
int qcow_alloc_clusters(struct qcow_image *image, u64 want, u64 *cluster,
			u64 *got, bool *zeroed)
{
	enum qcow_alloc_need need;
	bool reclaimed = false;
	u32 reftable_clusters;
	u64 refblock;
	int err;

	err = qcow_image_stale_counts(image);
	if (err)
		return err;
	for (;;) {
		mutex_lock(&image->alloc_mutex);
		err = qcow_search(image, want, cluster, got, zeroed, &need,
				  &refblock);
		reftable_clusters = image->reftable_clusters;
		mutex_unlock(&image->alloc_mutex);

		if (err == -EAGAIN && need == QCOW_NEED_COMMIT)
			err = qcow_commit(image);
		else if (err == -EAGAIN && need == QCOW_NEED_REFTABLE)
			err = qcow_reftable_grow(image, reftable_clusters);
		else if (err == -EAGAIN)
			err = qcow_refblocks_create(image, refblock) ?:
			      qcow_commit(image);
		else if (!err)
			break;

		if (err == -ENOSPC && !reclaimed) {
			/* Clusters that were freed just now may do. */
			reclaimed = true;
			if (qcow_reclaim_now(image))
				err = 0;
		}
		if (!err)
			err = qcow_image_error(image);
		if (err)
			return err;
	}
	atomic64_add(*got, &image->clusters_allocated);
	trace_qcow_allocate(image, *cluster << image->cluster_bits,
			    *got << image->cluster_bits, 0);
	qcow_refblocks_ahead(image, *cluster + *got);
	return 0;
}

/* One reference more; -ERANGE if the width of the counts has no room for it. */
static int qcow_refcount_add(struct qcow_image *image, u64 cluster)
{
	struct qcow_block *block;
	u64 index, count;
	int err;

	lockdep_assert_held(&image->alloc_mutex);
	block = qcow_counts_block(image, cluster, &index);
	if (IS_ERR_OR_NULL(block))
		return block ? PTR_ERR(block) : -EIO;
	count = qcow_refcount_load(block->data, image->refcount_order, index);
	if (count == qcow_refcount_max(image->refcount_order))
		err = -ERANGE;
	else
		err = qcow_counts_set(image, block, index, 1, count + 1);
	qcow_block_put(block);
	return err;
}

/*
 * Is there room for @size bytes behind the last ones, in the same cluster or in
 * that and @next, which is the caller's? Then take it.
 */
static bool qcow_pack_here(struct qcow_image *image, u32 size, u64 next,
			   u64 *host_offset)
{
	u64 offset = image->pack_offset;
	u64 end = offset + size;

	lockdep_assert_held(&image->alloc_mutex);
	if (!offset)
		return false;
	if (end > round_up(offset, (u64)qcow_cluster_size(image)) &&
	    next != (offset >> image->cluster_bits) + 1)
		return false;
	if (qcow_refcount_add(image, offset >> image->cluster_bits)) {
		image->pack_offset = 0;
		return false;
	}
	*host_offset = offset;
	image->pack_offset = end & (qcow_cluster_size(image) - 1) ? end : 0;
	return true;
}

/**
 * qcow_alloc_bytes - take room for compressed data
 * @image: a writable image
 * @size: bytes, 1 to one less than a cluster
 * @host_offset: out: anywhere in a cluster
 *
 * Compressed clusters are packed one behind the other, over the border of two host
 * clusters where these follow each other; each counts once in all that it touches.
 * What lies behind in the last one is free, and goes to the next caller. Packing
 * goes on only in clusters that were taken since the attach. One that may be freed
 * is forgotten (qcow_alloc_forget): between two callers it has no reference of its
 * own.
 *
 * Context: as for qcow_alloc_clusters(); one caller at a time.
 *
 * Return: 0; -ENOSPC; or another errno.
 */
int qcow_alloc_bytes(struct qcow_image *image, u32 size, u64 *host_offset)
{
	u64 cluster, got;
	bool done, zeroed;
	int err;

	err = qcow_image_stale_counts(image);
	if (err)
		return err;
	mutex_lock(&image->alloc_mutex);
	done = qcow_pack_here(image, size, 0, host_offset);
	mutex_unlock(&image->alloc_mutex);
	if (done)
		return 0;

	err = qcow_alloc_clusters(image, 1, &cluster, &got, &zeroed);
	if (err)
		return err;
	mutex_lock(&image->alloc_mutex);
	if (!qcow_pack_here(image, size, cluster, host_offset)) {
		*host_offset = cluster << image->cluster_bits;
		image->pack_offset = *host_offset + size;
	}
	mutex_unlock(&image->alloc_mutex);
	return 0;
}

/**
 * qcow_alloc_forget - do not pack any further into clusters
 * @image: a writable image
 * @cluster: host cluster number of the first one
 * @count: how many
 *
 * Context: may sleep; takes alloc_mutex.
 */
void qcow_alloc_forget(struct qcow_image *image, u64 cluster, u64 count)
{
	u64 packing;

	mutex_lock(&image->alloc_mutex);
	packing = image->pack_offset >> image->cluster_bits;
	if (packing >= cluster && packing < cluster + count)
		image->pack_offset = 0;
	mutex_unlock(&image->alloc_mutex);
}
