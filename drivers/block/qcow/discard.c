// SPDX-License-Identifier: GPL-2.0-only
/*
 * Zeroes and discard: guest clusters that lose their data.
 *
 * What a request covers as a whole, clusters or subclusters, is cleared in the L2
 * entries; the rest is written as zeroes. A host cluster that an entry loses is
 * freed like any other (commit.c). One that it keeps may still be written by those
 * who looked the entry up before: so the range stays locked until their epochs are
 * over, and nobody takes the cluster into use again before.
 */
#include <linux/slab.h>

#include <linux/qcow.h>

#include "qcow.h"

/* How what is in the data file becomes zero. */
enum qcow_zero_how {
	QCOW_ZERO_WRITE,
	QCOW_ZERO_PUNCH,	/* its space is given back, where that is possible */
	QCOW_ZERO_ADVISE,	/* or, where it is not, nothing is done */
};

static int qcow_zero_in_place(struct qcow_image *image, u64 host_offset,
			      u64 guest_offset, u64 length,
			      enum qcow_zero_how how)
{
	int err = qcow_overlap_check_data(image, host_offset, length);

	if (err)
		return err;
	/* What is empty does not decrypt to zeroes. */
	if (image->crypt && how == QCOW_ZERO_ADVISE)
		return 0;
	if (how != QCOW_ZERO_WRITE && !image->crypt &&
	    (!qcow_file_punch(qcow_data_file(image), host_offset, length) ||
	     how == QCOW_ZERO_ADVISE))
		return 0;
	return qcow_data_write_zeroes(image, length, host_offset, guest_offset);
}

/*
 * Write zeroes as data, where the zero flag cannot say it. In a raw data file they
 * are to be seen where L2 says zero or nothing, too; nobody else has data there.
 */
static int qcow_zero_data(struct qcow_chain *chain, u64 guest_offset,
			  u64 length, enum qcow_zero_how how)
{
	struct qcow_image *image = chain->layers[0];
	struct qcow_extent extent;
	struct qcow_write write;
	int epoch, err;
	u64 host;

	while (length) {
		epoch = qcow_image_enter(image);
		err = qcow_map(chain, 0, guest_offset, length, &extent);
		if (!err && extent.in_place && extent.image == image)
			err = qcow_zero_in_place(image, extent.host_offset,
						 guest_offset, extent.length,
						 how);
		else if (!err && extent.type == QCOW_EXTENT_ZERO &&
			 image->data_raw && !image->crypt)
			err = qcow_zero_in_place(image, guest_offset,
						 guest_offset, extent.length,
						 how ?: QCOW_ZERO_PUNCH);
		qcow_image_exit(image, epoch);
		if (err)
			return err;
		if (extent.type != QCOW_EXTENT_ZERO &&
		    !(extent.in_place && extent.image == image)) {
			err = qcow_write_begin(chain, guest_offset,
					       extent.length, &write);
			if (err == 1)
				continue;
			if (err)
				return err;
			host = write.host_offset + write.data_offset;
			err = qcow_fill_write(image, &write.head,
					      host - write.head.length,
					      guest_offset - write.head.length) ?:
			      qcow_data_write_zeroes(image, write.length, host,
						     guest_offset) ?:
			      qcow_fill_write(image, &write.tail,
					      host + write.length,
					      guest_offset + write.length);
			extent.length = write.length;
			qcow_write_end(&write, err);
			if (err)
				return err;
		}
		guest_offset += extent.length;
		length -= extent.length;
	}
	return 0;
}

/* What a request wants of clusters that it covers as a whole. */
enum qcow_clear_mode {
	QCOW_CLEAR_ZERO,	/* read as zero, keep the host clusters */
	QCOW_CLEAR_UNMAP,	/* read as zero, free the host clusters */
	QCOW_CLEAR_DISCARD,	/* free the host clusters */
	QCOW_CLEAR_PUNCH,	/* empty the host clusters, but keep them */
};

/* An entry that reads as zeroes, with a host cluster or without. */
static struct qcow_l2_entry qcow_zero_entry(struct qcow_image *image,
					    u64 descriptor)
{
	struct qcow_l2_entry entry = { .descriptor = descriptor };

	if (image->subclusters > 1)
		entry.bitmap = GENMASK_ULL(63, 32);
	else if (image->header.version >= 3)
		entry.descriptor |= QCOW_OFLAG_ZERO;
	return entry;
}

/*
 * The entry that replaces @entry; @entry itself if nothing is to be done. With
 * *@freed set, what @entry refers to loses a reference.
 */
static struct qcow_l2_entry qcow_clear_entry(struct qcow_chain *chain,
					     struct qcow_l2_entry entry,
					     enum qcow_clear_mode mode,
					     bool *freed)
{
	struct qcow_image *image = chain->layers[0];

	*freed = entry.descriptor & QCOW_OFLAG_COMPRESSED;
	/* The place of compressed data is of no use to anything else. */
	if (*freed)
		return qcow_zero_entry(image, 0);
	if (!(entry.descriptor & QCOW_L2_OFFSET_MASK) &&
	    !(qcow_is_external(image) && entry.descriptor & QCOW_OFLAG_COPIED)) {
		/* Only a zero flag hides what the layers below have. */
		return chain->depth > 1 ? qcow_zero_entry(image, 0) : entry;
	}
	if (mode == QCOW_CLEAR_ZERO ||
	    (mode == QCOW_CLEAR_PUNCH && entry.descriptor & QCOW_OFLAG_COPIED))
		return qcow_zero_entry(image, entry.descriptor);
	*freed = true;
	return qcow_zero_entry(image, 0);
}

/*
 * Empty the host clusters of entries that keep them. Their range is locked. But what is
 * empty does not decrypt to zeroes, and until the entries are durable, a power cut
 * leaves those that say it is data.
 */
static int qcow_punch_entries(struct qcow_image *image,
			      struct qcow_block *block, unsigned int index,
			      unsigned int count)
{
	unsigned int i;

	if (image->crypt)
		return 0;
	for (i = index; i < index + count; i++) {
		u64 descriptor = qcow_l2_load(image, block, i).descriptor;
		u64 host_offset = descriptor & QCOW_L2_OFFSET_MASK;
		int err;

		if (!(descriptor & QCOW_OFLAG_COPIED) || !host_offset)
			continue;
		err = qcow_overlap_check_data(image, host_offset,
					      qcow_cluster_size(image));
		if (err)
			return err;
		if (qcow_file_punch(&image->file, host_offset,
				    qcow_cluster_size(image)) == -EOPNOTSUPP)
			break;
	}
	return 0;
}

/* Clear clusters whose entries are in one block of an L2 table. */
static int qcow_clear_block(struct qcow_chain *chain, u64 first, u64 last,
			    enum qcow_clear_mode mode)
{
	struct qcow_image *image = chain->layers[0];
	u64 guest_offset = first << image->cluster_bits;
	unsigned int count = last - first + 1;
	struct qcow_l2_entry entry, new;
	struct qcow_l2_state state;
	struct qcow_range range;
	struct qcow_block *block;
	unsigned int index, i;
	bool freed, changes = false, kept = false;
	unsigned long flags;
	LIST_HEAD(frees);
	u64 l1_entry;
	int err;

	err = qcow_commit_throttle(image);
	if (err)
		return err;
	qcow_range_lock(image, &range, first, last);
	err = qcow_l1_entry(image, guest_offset, &l1_entry);
	if (err)
		goto out_unlock;
	if (!l1_entry) {
		/* A discard is no reason to make tables. */
		if (mode == QCOW_CLEAR_DISCARD || mode == QCOW_CLEAR_PUNCH ||
		    qcow_chain_is_zero(chain, 1, guest_offset,
				       (u64)count << image->cluster_bits, &err))
			goto out_unlock;
		if (err)
			goto out_unlock;
	}
	block = qcow_l2_for_write(image, guest_offset, &index);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out_unlock;
	}

	/* First see what is to be done and get what it needs, ... */
	for (i = 0; i < count; i++) {
		entry = qcow_l2_load(image, block, index + i);
		err = qcow_l2_classify(image, entry, guest_offset +
				       ((u64)i << image->cluster_bits), &state);
		if (err)
			break;
		new = qcow_clear_entry(chain, entry, mode, &freed);
		changes |= new.descriptor != entry.descriptor ||
			   new.bitmap != entry.bitmap;
		kept |= state.allocated && (!freed || qcow_is_external(image));
		if (freed)
			qcow_frees_add_entry(image, &frees, entry, true);
	}
	if (err) {
		qcow_frees_discard(image, &frees);
		goto out_put;
	}
	/* ... then do it. Nobody else changes these entries meanwhile. */
	if (changes) {
		spin_lock_irqsave(&image->lock, flags);
		for (i = 0; i < count; i++) {
			entry = qcow_l2_load(image, block, index + i);
			new = qcow_clear_entry(chain, entry, mode, &freed);
			qcow_l2_store_locked(image, block, index + i, new);
		}
		qcow_block_dirty_locked(block);
		qcow_frees_queue_locked(image, &frees);
		spin_unlock_irqrestore(&image->lock, flags);
	}
	qcow_hold(QCOW_POINT_CLEARED);
	/*
	 * Writes that overwrite the old data in place have to be over before a
	 * new one may count on what it puts around its own: only this lock
	 * keeps it from taking the cluster into use again.
	 */
	if (kept)
		synchronize_srcu_expedited(&image->epoch);
	if (!qcow_is_external(image)) {
		if (mode == QCOW_CLEAR_PUNCH)
			err = qcow_punch_entries(image, block, index, count);
	} else if (mode != QCOW_CLEAR_ZERO && changes && !image->crypt) {
		qcow_file_punch(&image->data, guest_offset,
				(u64)count << image->cluster_bits);
	}
out_put:
	qcow_l2_release(image, block);
out_unlock:
	qcow_range_unlock(image, &range);
	return err;
}

static int qcow_clear_clusters(struct qcow_chain *chain, u64 first, u64 end,
			       enum qcow_clear_mode mode)
{
	struct qcow_image *image = chain->layers[0];
	u32 per_block = qcow_l2_per_block(image);
	u64 last;
	int err;

	for (; first < end; first = last + 1) {
		last = min(first | (per_block - 1), end - 1);
		err = qcow_image_error(image) ?:
		      qcow_clear_block(chain, first, last, mode);
		if (err)
			return err;
		cond_resched();
	}
	return 0;
}

/* The clusters that a range covers; the last one of the disk counts as whole. */
static void qcow_whole_clusters(const struct qcow_image *image,
				u64 guest_offset, u64 length, u64 *first,
				u64 *end)
{
	u64 mask = qcow_cluster_size(image) - 1;
	u64 stop = guest_offset + length;

	*first = (guest_offset + mask) >> image->cluster_bits;
	if (stop == image->size)
		stop += mask;
	*end = max(stop >> image->cluster_bits, *first);
}

/* Have subclusters of one cluster read as zeroes; they keep their place. */
static int qcow_zero_subclusters(struct qcow_chain *chain, u64 guest_offset,
				 u64 length)
{
	u64 cluster = guest_offset >> chain->layers[0]->cluster_bits;
	struct qcow_image *image = chain->layers[0];
	u64 mask = GENMASK_ULL(qcow_subcluster(image, guest_offset + length - 1),
			       qcow_subcluster(image, guest_offset));
	struct qcow_l2_entry entry;
	struct qcow_l2_state state;
	struct qcow_range range;
	struct qcow_block *block;
	bool packed = false;
	unsigned int index;
	int epoch, err;
	bool zero;

	/* No reason to make tables. */
	epoch = qcow_image_enter(image);
	zero = qcow_chain_is_zero(chain, 0, guest_offset, length, &err);
	qcow_image_exit(image, epoch);
	if (zero || err)
		return err;
	err = qcow_commit_throttle(image);
	if (err)
		return err;
	qcow_range_lock(image, &range, cluster, cluster);
	block = qcow_l2_for_write(image, guest_offset, &index);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out_unlock;
	}
	entry = qcow_l2_load(image, block, index);
	err = qcow_l2_classify(image, entry, guest_offset, &state);
	if (err)
		goto out_put;
	packed = state.type == QCOW_EXTENT_COMPRESSED;
	/* It has no subclusters before it is written. */
	if (packed)
		goto out_put;
	entry.bitmap = (entry.bitmap & ~mask) | mask << 32;
	spin_lock_irq(&image->lock);
	qcow_l2_store_locked(image, block, index, entry);
	qcow_block_dirty_locked(block);
	spin_unlock_irq(&image->lock);
	/* As for clusters that are kept: see qcow_clear_block(). */
	if (state.allocated & mask)
		synchronize_srcu_expedited(&image->epoch);
out_put:
	qcow_l2_release(image, block);
out_unlock:
	qcow_range_unlock(image, &range);
	return packed ? qcow_zero_data(chain, guest_offset, length, QCOW_ZERO_WRITE) :
			err;
}

/* Zero a part of one cluster, as data where there are no flags for it. */
static int qcow_zero_part(struct qcow_chain *chain, u64 guest_offset, u64 length)
{
	struct qcow_image *image = chain->layers[0];
	u64 sub = 1ULL << image->subcluster_bits;
	u64 stop = guest_offset + length;
	u64 from = round_up(guest_offset, sub);
	u64 to = stop == image->size ? round_up(stop, sub) :
				       round_down(stop, sub);
	int err;

	if (image->subclusters == 1 || from >= to)
		return qcow_zero_data(chain, guest_offset, length,
				      QCOW_ZERO_WRITE);
	err = qcow_zero_data(chain, guest_offset, from - guest_offset,
			     QCOW_ZERO_WRITE) ?:
	      qcow_zero_subclusters(chain, from, min(to, stop) - from);
	return err || to >= stop ? err :
				   qcow_zero_data(chain, to, stop - to,
						  QCOW_ZERO_WRITE);
}

/**
 * qcow_write_zeroes - make a guest range read as zeroes
 * @chain: the layers
 * @guest_offset: bytes, a multiple of 512
 * @length: bytes, a multiple of 512
 * @unmap: host clusters may be freed; otherwise they are kept for later writes
 *
 * Context: may sleep for long. Not inside an epoch.
 *
 * Return: 0 or an errno.
 */
int qcow_write_zeroes(struct qcow_chain *chain, u64 guest_offset, u64 length,
		      bool unmap)
{
	struct qcow_image *image = chain->layers[0];
	u64 stop = guest_offset + length;
	u64 first, end, from, to;
	int err;

	err = qcow_image_error(image);
	if (err)
		return err;
	/* Version 2 has no zero flag, and who reads raw data would not see it. */
	if (image->data_raw ||
	    (image->header.version < 3 && (!unmap || chain->depth > 1)))
		return qcow_zero_data(chain, guest_offset, length,
				      unmap && image->data_raw ?
				      QCOW_ZERO_PUNCH : QCOW_ZERO_WRITE);

	qcow_whole_clusters(image, guest_offset, length, &first, &end);
	from = min(first << image->cluster_bits, stop);
	to = min(end << image->cluster_bits, stop);
	err = qcow_zero_part(chain, guest_offset, from - guest_offset) ?:
	      qcow_clear_clusters(chain, first, end, unmap ?
				  QCOW_CLEAR_UNMAP : QCOW_CLEAR_ZERO);
	return err ?: qcow_zero_part(chain, to, stop - to);
}

/**
 * qcow_discard - the guest does not need the content of a range any more
 * @chain: the layers
 * @guest_offset: bytes
 * @length: bytes; only clusters that are covered as a whole are discarded
 * @keep: empty the host clusters, but keep the mapping to them
 *
 * Context: may sleep for long. Not inside an epoch.
 *
 * Return: 0 or an errno.
 */
int qcow_discard(struct qcow_chain *chain, u64 guest_offset, u64 length,
		 bool keep)
{
	struct qcow_image *image = chain->layers[0];
	u64 first, end;
	int err;

	err = qcow_image_error(image);
	if (err)
		return err;
	if (image->data_raw)
		return qcow_zero_data(chain, guest_offset, length,
				      QCOW_ZERO_ADVISE);
	/* Without a zero flag the content of the backing file would appear. */
	if (image->header.version < 3 && chain->depth > 1)
		return 0;
	/* And without one, what is punched has to read as zeroes by itself. */
	if (image->header.version < 3 && image->crypt)
		keep = false;
	qcow_whole_clusters(image, guest_offset, length, &first, &end);
	return qcow_clear_clusters(chain, first, end, keep ?
				   QCOW_CLEAR_PUNCH : QCOW_CLEAR_DISCARD);
}
