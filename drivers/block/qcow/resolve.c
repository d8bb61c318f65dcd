// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where in a long chain a guest cluster comes from, found once and remembered.
 *
 * Layers below the top one never change. So what a walk through them has found for
 * a cluster that the top layer says nothing about is true until that layer does. It
 * is kept, in memory only, in the place of the entry that says nothing: in the
 * cached block of the top layer's L2 table, or, where there is no L2 table, in a
 * block of zeroes that stands for a part of one and for no place in the file. So
 * it takes no memory of its own where there is a table, goes when its block is
 * evicted, and is overwritten by whatever the top layer has to say.
 *
 * A resolution has a bit set that is 0 in every valid entry but those of compressed
 * clusters, and is not one of those. That it does not come from the file is known by
 * block->resolved, which is set, for good, with the first one, and not if an entry of
 * the file looks like one. To everybody else it is what it stands in the place of:
 * qcow_l2_load() gives 0, and a commit writes 0.
 *
 * When all that a block of the top layer's leaves to those below has been resolved, the
 * blocks of their L2 tables are of no use for it any more, and leave memory. Clusters that
 * have to be looked up every time prevent that, as do those that were written before
 * anybody had looked. Who does need such a block again reads it again.
 *
 * Two entries of a (strange) L1 table may lead to the same L2 table. Its blocks have
 * resolutions for the guest clusters of the first one that asked.
 *
 * The top layer is not shared with another chain, which may have other layers below
 * (qcow_image_open). With a single layer below nothing is kept: to look there costs
 * no more.
 *
 *	bit 0		0: DATA; 1: ZERO or, if the host offset is not 0, to be looked
 *			up from that layer on: compressed, or from several layers
 *	bit 1		1, QCOW_L2_RESOLVED
 *	bits 2..8	layer, low part
 *	bits 9..55	host offset
 *	bits 56..61	layer, high part
 *	bit 62		0, as it is 1 in the entries of compressed clusters
 */
#include <linux/rcupdate.h>

#include <linux/qcow.h>

#include "qcow.h"

#define QCOW_RESOLVED_ZERO	BIT_ULL(0)
#define QCOW_RESOLVED_LAYERS	BIT(13)
/* A host offset that no zeroes have. */
#define QCOW_RESOLVED_LOOK	QCOW_SECTOR

static u64 qcow_resolution(unsigned int layer, enum qcow_extent_type type,
			   u64 host_offset)
{
	u64 entry = QCOW_L2_RESOLVED | (u64)(layer & 0x7f) << 2 |
		    (u64)(layer >> 7) << 56;

	switch (type) {
	case QCOW_EXTENT_DATA:
		return entry | host_offset;
	case QCOW_EXTENT_ZERO:
		return entry | QCOW_RESOLVED_ZERO;
	default:
		return entry | QCOW_RESOLVED_ZERO | QCOW_RESOLVED_LOOK;
	}
}

static unsigned int qcow_resolved_layer(u64 entry)
{
	return (entry >> 2 & 0x7f) | (entry >> 56 & 0x3f) << 7;
}

static enum qcow_extent_type qcow_resolved_type(u64 entry)
{
	if (!(entry & QCOW_RESOLVED_ZERO))
		return QCOW_EXTENT_DATA;
	return entry & QCOW_L2_OFFSET_MASK ? QCOW_EXTENT_UNALLOCATED :
					     QCOW_EXTENT_ZERO;
}

/* The resolution at @index of a block, or 0. */
static u64 qcow_resolved_load(struct qcow_image *image,
			      struct qcow_block *block, unsigned int index)
{
	u64 entry = qcow_l2_load_raw(image, block, index).descriptor;

	return qcow_is_resolution(block, entry) ? entry : 0;
}

/**
 * qcow_resolved_find - what is remembered of a guest range
 * @chain: with more than two layers
 * @guest_offset: bytes, on the disk
 * @length: bytes that are of interest, at least 1, all on the disk
 * @extent: out: DATA, ZERO; or UNALLOCATED: then only @length is set, and the rest
 *	is to be looked up from @layer on
 * @layer: out: which one it is from
 *
 * Context: any; does not sleep.
 *
 * Return: 1 if something is, so that the top layer has nothing there; 0 if nothing is
 * yet; -ENOENT if nothing ever is, since the top layer's entry is in use for something.
 */
int qcow_resolved_find(struct qcow_chain *chain, u64 guest_offset, u64 length,
		       struct qcow_extent *extent, unsigned int *layer)
{
	struct qcow_image *image = chain->layers[0];
	u32 cluster_size = qcow_cluster_size(image);
	u64 in_cluster = guest_offset & (cluster_size - 1);
	u64 cluster = guest_offset >> image->cluster_bits;
	struct qcow_block *block = NULL;
	u64 first, next, where;
	unsigned int index;
	int ret = 0;

	rcu_read_lock();
	if (!qcow_l2_find(image, guest_offset, true, &where, &index))
		block = qcow_block_peek(image, where);
	if (!block)
		goto out;
	first = qcow_resolved_load(image, block, index);
	if (!first || block->resolved_from != cluster - index) {
		if (first || qcow_l2_load_raw(image, block, index).descriptor)
			ret = -ENOENT;
		goto out;
	}
	*layer = qcow_resolved_layer(first);
	if (WARN_ON_ONCE(*layer >= chain->depth))
		goto out;
	ret = 1;
	extent->type = qcow_resolved_type(first);
	extent->image = chain->layers[*layer];
	extent->in_place = false;
	extent->host_offset = (first & QCOW_L2_OFFSET_MASK) + in_cluster;
	extent->length = cluster_size - in_cluster;
	next = first;
	while (extent->length < length &&
	       ++index < qcow_l2_per_block(image)) {
		if (extent->type == QCOW_EXTENT_DATA)
			next += cluster_size;
		if (qcow_resolved_load(image, block, index) != next)
			break;
		extent->length += cluster_size;
	}
	extent->length = min(extent->length, length);
out:
	rcu_read_unlock();
	return ret;
}

/* Does an entry leave anything to the layers below? */
static bool qcow_l2_is_silent(const struct qcow_image *image,
			      struct qcow_l2_entry entry)
{
	if (entry.descriptor & QCOW_OFLAG_COMPRESSED)
		return false;
	if (image->subclusters == 1)
		return !(entry.descriptor & (QCOW_L2_OFFSET_MASK | QCOW_OFLAG_ZERO));
	return ~(lower_32_bits(entry.bitmap) | upper_32_bits(entry.bitmap));
}

/*
 * Get a block ready for resolutions, of guest clusters from @cluster on. False if it
 * cannot have any.
 */
static bool qcow_block_resolve_locked(struct qcow_image *image,
				      struct qcow_block *block, u64 cluster)
{
	u64 clusters = DIV_ROUND_UP_ULL(image->size, qcow_cluster_size(image));
	unsigned int i, silent = 0;
	struct qcow_l2_entry entry;

	lockdep_assert_held(&image->lock);
	if (block->resolved)
		return block->resolved_from == cluster;
	/* Of damaged tables a block may be both. */
	if (block->kind == QCOW_BLOCK_COUNT)
		return false;
	for (i = 0; i < qcow_l2_per_block(image); i++) {
		entry = qcow_l2_load_raw(image, block, i);
		if (qcow_is_tagged(entry.descriptor))
			return false;
		if (qcow_l2_is_silent(image, entry) && cluster + i < clusters)
			silent++;
	}
	block->unresolved = silent;
	block->kind = QCOW_BLOCK_LINK;
	block->resolved_from = cluster;
	WRITE_ONCE(block->resolved, true);
	/* Who sees a resolution sees this: qcow_is_resolution(). */
	smp_wmb();
	return true;
}

/*
 * Forget the L2 blocks below the top layer for clusters of that. One that reaches
 * further is still of use, unless it ends here.
 */
static void qcow_resolved_drop_below(struct qcow_chain *chain, u64 cluster,
				     unsigned int count)
{
	const struct qcow_image *image = chain->layers[0];
	u64 start = cluster << image->cluster_bits;
	u64 end = start + ((u64)count << image->cluster_bits);
	struct qcow_image *layer;
	unsigned int i, index;
	u64 at, step, where;
	int err;

	for (i = 1; i < chain->depth; i++) {
		layer = chain->layers[i];
		if (layer->format != QCOW_FORMAT_QCOW2)
			continue;
		step = (u64)qcow_l2_per_block(layer) << layer->cluster_bits;
		for (at = start & ~(step - 1); at < min(end, layer->size);
		     at += step) {
			if (at + step > end && end < layer->size)
				break;
			rcu_read_lock();
			err = qcow_l2_find(layer, at, true, &where, &index);
			rcu_read_unlock();
			if (!err && !(where & QCOW_BLOCK_VIRTUAL))
				qcow_cache_drop(layer, where,
						qcow_block_size(layer));
			cond_resched();
		}
	}
}

/**
 * qcow_resolved_keep - remember what a walk has found
 * @chain: with more than two layers
 * @guest_offset: bytes, where a cluster of the top layer begins
 * @extent: what is there, as far as layers below the top one are concerned; if it
 *	is shorter than a cluster, that this cluster has to be looked up every time
 * @layer: which one it is from
 *
 * Context: may sleep.
 */
void qcow_resolved_keep(struct qcow_chain *chain, u64 guest_offset,
			const struct qcow_extent *extent, unsigned int layer)
{
	struct qcow_image *image = chain->layers[0];
	u32 cluster_size = qcow_cluster_size(image);
	enum qcow_extent_type type = extent->type;
	u64 host_offset = extent->host_offset;
	u64 where, left = extent->length;
	struct qcow_l2_entry entry;
	struct qcow_block *block;
	unsigned int index;
	unsigned long flags;
	bool full = false;

	/* The last cluster of the disk may be short, and is whole all the same. */
	if (guest_offset + left == image->size)
		left = round_up(left, cluster_size);
	if (left < cluster_size) {
		type = QCOW_EXTENT_UNALLOCATED;
		left = cluster_size;
		layer = 1;
	}
	/* Nobody has it: then the last one says so. */
	layer = min(layer, chain->depth - 1);
	if (layer >= QCOW_RESOLVED_LAYERS ||
	    (type == QCOW_EXTENT_DATA &&
	     (host_offset | (host_offset + left)) & ~QCOW_L2_OFFSET_MASK) ||
	    qcow_l2_find(image, guest_offset, false, &where, &index))
		return;
	block = qcow_block_get(image, where);
	if (IS_ERR(block))
		return;
	spin_lock_irqsave(&image->lock, flags);
	if (!qcow_block_resolve_locked(image, block,
				       (guest_offset >> image->cluster_bits) -
				       index))
		goto out;
	for (; left >= cluster_size && index < qcow_l2_per_block(image);
	     index++, left -= cluster_size, host_offset += cluster_size) {
		entry = qcow_l2_load_raw(image, block, index);
		if (entry.descriptor || entry.bitmap)
			continue;
		entry.descriptor = qcow_resolution(layer, type, host_offset);
		qcow_l2_store_locked(image, block, index, entry);
		if ((type == QCOW_EXTENT_DATA || type == QCOW_EXTENT_ZERO) &&
		    block->unresolved && !--block->unresolved)
			full = true;
	}
out:
	spin_unlock_irqrestore(&image->lock, flags);
	if (full)
		qcow_resolved_drop_below(chain, block->resolved_from,
					 qcow_l2_per_block(image));
	qcow_block_put(block);
}
