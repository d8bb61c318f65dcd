// SPDX-License-Identifier: GPL-2.0-only
/*
 * Shortcuts: L2 blocks that are in memory, by guest offset, so that most look-ups need
 * neither the L1 table nor an xarray.
 *
 * The key of a block says for which guest offsets it is, and the low bits of the key, in
 * which place of image->shortcuts it may be. Who looks takes no lock, and is in an RCU
 * read section.
 *
 *  - What is found is what the L1 entry leads to at that moment: a block is put there
 *    under image->lock, if the L1 entry in the cache leads to it, and who changes an
 *    entry that leads somewhere empties its places under the same lock.
 *  - What is found is what the xarray has: with the last pin a block is taken out here
 *    first, so that nobody reads it again as long as it can be found. (One that is
 *    dropped while others have pins is of a table that no L1 entry leads to, or of a
 *    layer that never changes: then two copies say the same.)
 *  - What is found stays in memory as long as the RCU read section: who puts a block
 *    there has a pin, and it is taken out before its memory is given back.
 *  - A block is in one place at most, that of its key, so that is where to take it out.
 *    (Two entries of a damaged L1 table may lead to one block.)
 *  - A block stays where it is until then. There are places for all blocks of a disk,
 *    up to QCOW_SHORTCUTS_MAX; where there are more, others do without.
 *
 * A long has to have room for a key: where it is 32 bits, there are no places.
 */
#include <linux/log2.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#include "qcow.h"

/* A page of them, so that a long chain does not take much. */
#define QCOW_SHORTCUTS_MAX	512UL

static unsigned long qcow_shortcut_key(const struct qcow_image *image,
				       u64 guest_offset)
{
	return guest_offset >> image->shortcut_shift;
}

static struct qcow_block **qcow_shortcut_place(const struct qcow_image *image,
					       unsigned long key)
{
	return &image->shortcuts[key & image->shortcut_mask];
}

/**
 * qcow_shortcut_init - make the places
 * @image: a qcow2 image that is being opened
 *
 * Return: 0 or -ENOMEM.
 */
int qcow_shortcut_init(struct qcow_image *image)
{
	unsigned long n;

	if (BITS_PER_LONG < 64)
		return 0;
	image->shortcut_shift = image->cluster_bits +
				ilog2(qcow_l2_per_block(image));
	n = min(qcow_shortcut_key(image, image->size) + 1, QCOW_SHORTCUTS_MAX);
	n = roundup_pow_of_two(n);
	image->shortcut_mask = n - 1;
	image->shortcuts = kcalloc(n, sizeof(*image->shortcuts), GFP_KERNEL);
	return image->shortcuts ? 0 : -ENOMEM;
}

/**
 * qcow_shortcut_find - the L2 block for a guest offset, if there is a shortcut to it
 * @image: a qcow2 image
 * @guest_offset: bytes
 * @index: out: of the entry in the block
 *
 * Context: an RCU read section, in which the block stays.
 *
 * Return: the block, without a pin, or NULL.
 */
struct qcow_block *qcow_shortcut_find(struct qcow_image *image, u64 guest_offset,
				      unsigned int *index)
{
	unsigned long key = qcow_shortcut_key(image, guest_offset);
	struct qcow_block *block;

	if (!image->shortcuts)
		return NULL;
	/* With it, the key that it was put there with. */
	block = smp_load_acquire(qcow_shortcut_place(image, key));
	if (!block || READ_ONCE(block->shortcut) != key)
		return NULL;
	qcow_block_used(block);
	*index = (guest_offset >> image->cluster_bits) &
		 (qcow_l2_per_block(image) - 1);
	return block;
}

/**
 * qcow_shortcut_forget - a block is going to be given back
 * @block: without pins; its image exists
 *
 * Context: any.
 */
void qcow_shortcut_forget(struct qcow_block *block)
{
	struct qcow_image *image = block->image;

	if (image->shortcuts)
		cmpxchg(qcow_shortcut_place(image, block->shortcut), block, NULL);
}

/**
 * qcow_shortcut_clear_locked - an L1 entry that leads to a table is going to change
 * @image: whose
 * @guest_offset: bytes, in the range of the entry
 *
 * Context: image->lock is held.
 */
void qcow_shortcut_clear_locked(struct qcow_image *image, u64 guest_offset)
{
	unsigned long blocks = (1UL << image->l2_bits) / qcow_l2_per_block(image);
	unsigned long key = qcow_shortcut_key(image, guest_offset) & ~(blocks - 1);

	lockdep_assert_held(&image->lock);
	for (; image->shortcuts && blocks; blocks--, key++)
		WRITE_ONCE(*qcow_shortcut_place(image, key), NULL);
}

/**
 * qcow_shortcut_add - an L2 block has been found by its L1 entry
 * @image: a qcow2 image
 * @guest_offset: bytes
 * @l1_entry: what that was
 * @block: the L2 block
 *
 * Context: any that may take image->lock; the block is pinned, or was found in this
 * RCU read section.
 */
void qcow_shortcut_add(struct qcow_image *image, u64 guest_offset, u64 l1_entry,
		       struct qcow_block *block)
{
	unsigned long key = qcow_shortcut_key(image, guest_offset);
	struct qcow_block **place = qcow_shortcut_place(image, key);
	unsigned long flags;

	if (!image->shortcuts || READ_ONCE(*place) ||
	    !refcount_inc_not_zero(&block->pins))
		return;
	spin_lock_irqsave(&image->lock, flags);
	if (qcow_l1_entry_cached(image, guest_offset) == l1_entry) {
		qcow_shortcut_forget(block);
		WRITE_ONCE(block->shortcut, key);
		/* For the load in qcow_shortcut_find() */
		smp_store_release(place, block);
	}
	spin_unlock_irqrestore(&image->lock, flags);
	qcow_block_put(block);
}
