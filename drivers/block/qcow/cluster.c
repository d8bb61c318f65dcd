// SPDX-License-Identifier: GPL-2.0-only
/*
 * Changing the mapping: allocating writes, copy on write, and what discard.c and
 * pack.c need for the same.
 *
 * Whatever changes the mapping of guest clusters locks their range first, and
 * holds it until the change is in the cached L2 block. So there is one change at
 * a time for each guest cluster, and none of them sees another one half done.
 * Overwriting data in place changes no mapping and takes no lock; that it may
 * race with a discard of the same cluster is what epochs are for. A cluster that
 * is freed waits for their end before it is used again (commit.c), and one that
 * is cleared but kept stays locked until then.
 *
 * A write that changes the mapping has three parts: qcow_write_begin() locks the
 * range and takes host clusters; the caller writes the guest's data, with what
 * must surround it; qcow_write_end() puts the entries into the L2 block. The new
 * entries are seen by look-ups only after the data is in the file, and by a
 * commit likewise (commit.c).
 *
 * Waiting for a range is waiting for I/O that was issued already: whoever holds
 * one waits for no other range.
 */
#include <linux/slab.h>

#include <linux/qcow.h>

#include "qcow.h"

static struct qcow_range *qcow_range_conflict(struct qcow_image *image,
					      const struct qcow_range *range)
{
	struct qcow_range *other;

	lockdep_assert_held(&image->lock);
	list_for_each_entry(other, &image->ranges, node)
		if (range->first <= other->last && other->first <= range->last)
			return other;
	return NULL;
}

static bool qcow_range_trylock(struct qcow_image *image,
			       struct qcow_range *range)
{
	bool locked = false;

	spin_lock_irq(&image->lock);
	if (!qcow_range_conflict(image, range)) {
		list_add(&range->node, &image->ranges);
		locked = true;
	}
	spin_unlock_irq(&image->lock);
	return locked;
}

/**
 * qcow_range_lock - keep others from changing the mapping of guest clusters
 * @image: the top layer
 * @range: out
 * @first: first guest cluster
 * @last: last guest cluster
 *
 * Context: may sleep, until I/O is over that others have issued. Not inside an
 * epoch. The caller holds no other range except for I/O that has been issued.
 */
void qcow_range_lock(struct qcow_image *image, struct qcow_range *range,
		     u64 first, u64 last)
{
	range->first = first;
	range->last = last;
	wait_event(image->range_wait, qcow_range_trylock(image, range));
}

/**
 * qcow_range_unlock - undo qcow_range_lock()
 * @image: the top layer
 * @range: from there
 *
 * Context: any.
 */
void qcow_range_unlock(struct qcow_image *image, struct qcow_range *range)
{
	unsigned long flags;

	spin_lock_irqsave(&image->lock, flags);
	list_del(&range->node);
	spin_unlock_irqrestore(&image->lock, flags);
	wake_up_all(&image->range_wait);
}

/* Give up the part of a locked range behind @last. */
static void qcow_range_shrink(struct qcow_image *image,
			      struct qcow_range *range, u64 last)
{
	if (range->last == last)
		return;
	spin_lock_irq(&image->lock);
	range->last = last;
	spin_unlock_irq(&image->lock);
	wake_up_all(&image->range_wait);
}

/*
 * Fill a new L2 table: with zeroes, or with the entries of the table at @from.
 * The clusters of a shared table are shared as well, so its copy has no COPIED.
 * Zeroes are written even where there are some: this takes the space that a
 * commit needs, which is where running out of it would lose data.
 */
static int qcow_l2_fill(struct qcow_image *image, u64 to, u64 from)
{
	u32 cluster_size = qcow_cluster_size(image);
	u32 block_size = qcow_block_size(image);
	struct qcow_l2_entry entry;
	struct qcow_block *block;
	__be64 *words;
	u32 pos, i;
	int err;

	if (!from)
		return qcow_file_write_zeroes(&image->file, cluster_size, to);
	for (pos = 0; pos < cluster_size; pos += block_size) {
		block = qcow_block_get(image, from + pos);
		if (IS_ERR(block))
			return PTR_ERR(block);
		words = image->table_scratch;
		for (i = 0; i < qcow_l2_per_block(image); i++) {
			entry = qcow_l2_load(image, block, i);
			/* In a data file nothing is shared, and it is all there may be. */
			if (!qcow_is_external(image))
				entry.descriptor &= ~QCOW_OFLAG_COPIED;
			*words++ = cpu_to_be64(entry.descriptor);
			if (image->subclusters > 1)
				*words++ = cpu_to_be64(entry.bitmap);
		}
		qcow_block_put(block);
		err = qcow_file_write(&image->file, image->table_scratch,
				      block_size, to + pos);
		if (err)
			return err;
	}
	return 0;
}

/* Make an L1 entry lead to a table that nobody else has. */
static void qcow_l1_store_locked(struct qcow_block *block, unsigned int index,
				 u64 host_offset)
{
	WRITE_ONCE(((__be64 *)block->data)[index],
		   cpu_to_be64(host_offset | QCOW_OFLAG_COPIED));
	qcow_block_dirty_locked(block);
}

/* May the L2 table at @host_offset be changed, though its L1 entry has no COPIED? */
static int qcow_l2_is_own(struct qcow_image *image, u64 host_offset, bool *own)
{
	u64 count;
	int err;

	/* What is not this table alone must not be freed with it. */
	err = qcow_overlap_expect(image, QCOW_METADATA_L2, host_offset) ?:
	      qcow_refcount_get(image, host_offset >> image->cluster_bits,
				&count);
	/* A count that is wrong is found when the table is freed. */
	*own = !err && count == 1 && !qcow_overlap_is_shared(image, host_offset);
	return err;
}

/*
 * Give the guest offset an L2 table of its own: a new one, or a copy of the one
 * that is shared with a snapshot.
 *
 * Some programs leave COPIED out where it should be. Then nobody has the table but
 * us, and its entries may have the flag, so that clusters are being overwritten in
 * place just now: a copy, whose entries have not, would be wrong. The flag is set.
 */
static int qcow_l2_make(struct qcow_image *image, u64 guest_offset)
{
	u64 old, cluster, got, new;
	struct qcow_block *block;
	struct qcow_free *free;
	unsigned long flags;
	unsigned int index;
	bool own = false;
	bool zeroed;
	int err;

	/* For the old table, or for the new one if it comes to nothing. */
	free = qcow_free_alloc(image);

	mutex_lock(&image->table_mutex);
	err = qcow_l1_entry(image, guest_offset, &old);
	if (err || old & QCOW_OFLAG_COPIED)
		goto out_unlock;
	block = qcow_l1_block(image, guest_offset, &index);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out_unlock;
	}
	err = qcow_block_prepare(block);
	if (err)
		goto out_put;
	old &= QCOW_L1_OFFSET_MASK;
	if (old)
		err = qcow_l2_is_own(image, old, &own);
	/* QEMU lets a new image end within its L1 table. */
	err = err ?: qcow_block_place(block);
	if (!err && own) {
		spin_lock_irqsave(&image->lock, flags);
		qcow_l1_store_locked(block, index, old);
		spin_unlock_irqrestore(&image->lock, flags);
		goto out_unprepare;
	}
	err = err ?: qcow_alloc_clusters(image, 1, &cluster, &got, &zeroed);
	if (err)
		goto out_unprepare;

	new = cluster << image->cluster_bits;
	err = qcow_l2_fill(image, new, old);
	qcow_hold(QCOW_POINT_TABLE_MADE);
	if (!err) {
		qcow_overlap_add(image, QCOW_METADATA_L2, new,
				 qcow_cluster_size(image));
		if (old)
			qcow_overlap_remove(image, old, qcow_cluster_size(image));
	}

	spin_lock_irqsave(&image->lock, flags);
	if (!err) {
		if (old)
			qcow_shortcut_clear_locked(image, guest_offset);
		qcow_l1_store_locked(block, index, new);
	}
	if (free && (err || old)) {
		free->cluster = (err ? new : old) >> image->cluster_bits;
		free->count = 1;
		free->punch = false;
		qcow_free_queue_locked(image, free);
		free = NULL;
	}
	spin_unlock_irqrestore(&image->lock, flags);
out_unprepare:
	qcow_block_unprepare(block);
out_put:
	qcow_block_put(block);
out_unlock:
	mutex_unlock(&image->table_mutex);
	if (free)
		qcow_free_discard(image, free);
	return err;
}

/**
 * qcow_l2_for_write - the L2 block for a guest offset, in a table that may change
 * @image: the top layer
 * @guest_offset: bytes
 * @index: out: of the entry in the block
 *
 * Makes the table where there is none, and copies one that is shared. An entry can
 * be changed by whoever holds the lock on its cluster's range.
 *
 * Context: may sleep for long, and may run a commit. Not inside an epoch.
 *
 * Return: the block, prepared, for qcow_l2_release(); or an ERR_PTR().
 */
struct qcow_block *qcow_l2_for_write(struct qcow_image *image, u64 guest_offset,
				     unsigned int *index)
{
	struct qcow_block *block;
	u64 entry;
	int err;

	for (;;) {
		err = qcow_l1_entry(image, guest_offset, &entry);
		if (err)
			return ERR_PTR(err);
		if (entry & QCOW_OFLAG_COPIED)
			break;
		err = qcow_l2_make(image, guest_offset);
		if (err)
			return ERR_PTR(err);
	}
	err = qcow_overlap_expect(image, QCOW_METADATA_L2,
				  entry & QCOW_L1_OFFSET_MASK);
	if (err)
		return ERR_PTR(err);
	down(&image->l2_writers);
	block = qcow_l2_block(image, entry, guest_offset, index);
	if (IS_ERR(block)) {
		up(&image->l2_writers);
		return block;
	}
	err = qcow_block_prepare(block);
	if (err) {
		qcow_block_put(block);
		up(&image->l2_writers);
		return ERR_PTR(err);
	}
	return block;
}

/**
 * qcow_l2_release - give back a block of an L2 table
 * @image: whose
 * @block: from qcow_l2_for_write()
 *
 * Context: any.
 */
void qcow_l2_release(struct qcow_image *image, struct qcow_block *block)
{
	qcow_block_unprepare(block);
	qcow_block_put(block);
	up(&image->l2_writers);
}

/* How a write treats a cluster. */
enum qcow_write_kind {
	QCOW_WRITE_IN_PLACE,	/* data of its own: just overwrite */
	QCOW_WRITE_REUSE,	/* a cluster of its own: fill and link again */
	QCOW_WRITE_NEW,		/* take a new cluster */
};

static int qcow_write_classify(struct qcow_image *image,
			       struct qcow_write *write, unsigned int n,
			       u64 guest_offset, enum qcow_write_kind *kind,
			       struct qcow_l2_state *state)
{
	int err;

	err = qcow_l2_classify(image, qcow_l2_load(image, write->l2,
						   write->index + n),
			       guest_offset, state);
	if (err)
		return err;
	if (!state->exclusive || !state->mapped)
		*kind = QCOW_WRITE_NEW;
	else
		*kind = state->type == QCOW_EXTENT_DATA ? QCOW_WRITE_IN_PLACE :
							  QCOW_WRITE_REUSE;
	return 0;
}

/* How many clusters from the first one on can be treated like it. */
static int qcow_write_run(struct qcow_image *image, struct qcow_write *write,
			  u64 guest_offset, enum qcow_write_kind *kind,
			  unsigned int max)
{
	struct qcow_l2_state first, next;
	enum qcow_write_kind next_kind;
	unsigned int n;
	int err;

	err = qcow_write_classify(image, write, 0, guest_offset, kind, &first);
	if (err)
		return err;
	write->host_offset = first.host_offset;
	write->blank = !first.allocated;
	guest_offset = write->range.first << image->cluster_bits;
	for (n = 1; n < max; n++) {
		guest_offset += qcow_cluster_size(image);
		err = qcow_write_classify(image, write, n, guest_offset,
					  &next_kind, &next);
		if (err || next_kind != *kind)
			break;
		if (*kind == QCOW_WRITE_REUSE && next.host_offset !=
		    write->host_offset + ((u64)n << image->cluster_bits))
			break;
		write->blank &= !next.allocated;
	}
	write->count = n;
	if (*kind != QCOW_WRITE_REUSE)
		return 0;
	return qcow_overlap_check_data(image, write->host_offset,
				       (u64)n << image->cluster_bits);
}

/*
 * Which subclusters of cluster @n of a write are allocated with it: those from
 * *@first to *@last, which has the ones that the guest writes, *@first and *@last
 * before. Where the cluster is new, that takes in all that the old one has.
 * Those that are allocated already, in a cluster that is reused, are written by
 * others meanwhile: what is around the guest's data there is left alone.
 */
static int qcow_write_span(struct qcow_image *image, struct qcow_write *write,
			   unsigned int n, unsigned int *first,
			   unsigned int *last, u32 *allocated)
{
	u64 guest_offset = (write->range.first + n) << image->cluster_bits;
	struct qcow_l2_state state;
	int err;

	*allocated = 0;
	/* qcow_write_run() has looked. */
	if (write->blank)
		return 0;
	err = qcow_l2_classify(image, qcow_l2_load(image, write->l2,
						   write->index + n),
			       guest_offset, &state);
	if (err)
		return err;
	*allocated = write->fresh ? 0 : state.allocated;
	if (write->fresh && state.allocated) {
		*first = min_t(u32, *first, __ffs(state.allocated));
		*last = max_t(u32, *last, __fls(state.allocated));
	}
	return 0;
}

/*
 * Find what has to stand before and behind the guest's data, from
 * @guest_offset to @end, in the subclusters where it begins and ends.
 */
static int qcow_write_surround(struct qcow_image *image,
			       struct qcow_write *write, u64 guest_offset,
			       u64 end, u32 *head, u32 *tail)
{
	u64 base = write->range.first << image->cluster_bits;
	u64 last_base = base + ((u64)(write->count - 1) << image->cluster_bits);
	unsigned int sub = qcow_subcluster(image, guest_offset);
	unsigned int end_sub = qcow_subcluster(image, end - 1);
	unsigned int other;
	u32 allocated;
	int err;

	write->first_sub = sub;
	write->last_sub = write->count == 1 ? end_sub : image->subclusters - 1;
	err = qcow_write_span(image, write, 0, &write->first_sub,
			      &write->last_sub, &allocated);
	if (err)
		return err;
	*head = allocated & BIT(sub) ? 0 : guest_offset - base -
		(write->first_sub << image->subcluster_bits);

	if (write->count > 1) {
		other = 0;
		write->last_sub = end_sub;
		err = qcow_write_span(image, write, write->count - 1, &other,
				      &write->last_sub, &allocated);
		if (err)
			return err;
	}
	*tail = allocated & BIT(end_sub) ? 0 : last_base +
		((write->last_sub + 1) << image->subcluster_bits) - end;
	/* The data file may end with the disk. */
	if (qcow_is_external(image))
		*tail = min_t(u64, *tail, image->size - end);
	return 0;
}

/* The entry of cluster @n of a write that is complete. */
static struct qcow_l2_entry qcow_write_entry(struct qcow_image *image,
					     const struct qcow_write *write,
					     unsigned int n)
{
	unsigned int first = n ? 0 : write->first_sub;
	unsigned int last = n + 1 < write->count ? image->subclusters - 1 :
						   write->last_sub;
	u64 mask = GENMASK_ULL(last, first);
	struct qcow_l2_entry entry;

	entry = qcow_l2_load(image, write->l2, write->index + n);
	entry.descriptor = (write->host_offset +
			    ((u64)n << image->cluster_bits)) | QCOW_OFLAG_COPIED;
	if (image->subclusters > 1)
		entry.bitmap = (entry.bitmap | mask) & ~(mask << 32);
	return entry;
}

/*
 * Add a cluster to the runs that are going to be freed. Nodes are taken before
 * anything is changed.
 */
static void qcow_frees_add(struct qcow_image *image, struct list_head *frees,
			   u64 cluster, bool punch)
{
	struct qcow_free *free;

	if (!list_empty(frees)) {
		free = list_last_entry(frees, struct qcow_free, node);
		if (free->cluster + free->count == cluster &&
		    free->punch == punch) {
			free->count++;
			return;
		}
	}
	free = qcow_free_alloc(image);
	if (!free)
		return;
	free->cluster = cluster;
	free->count = 1;
	free->punch = punch;
	list_add_tail(&free->node, frees);
}

/**
 * qcow_frees_add_entry - what an entry refers to is going to be freed
 * @image: whose
 * @frees: list of runs, for one of the next two
 * @entry: of an L2 table
 * @punch: give the space back to the file as well
 *
 * Context: as for qcow_free_alloc().
 */
void qcow_frees_add_entry(struct qcow_image *image, struct list_head *frees,
			  struct qcow_l2_entry entry, bool punch)
{
	u64 host_offset = entry.descriptor & QCOW_L2_OFFSET_MASK;
	u64 cluster, last;
	u32 length;

	if (entry.descriptor & QCOW_OFLAG_COMPRESSED) {
		/* It has a reference to each cluster that it touches. */
		qcow_packed_range(image, entry.descriptor, &host_offset,
				  &length);
		cluster = host_offset >> image->cluster_bits;
		last = (host_offset + length - 1) >> image->cluster_bits;
		for (; cluster <= last; cluster++)
			qcow_frees_add(image, frees, cluster, punch);
		return;
	}
	if (host_offset && !qcow_is_external(image))
		qcow_frees_add(image, frees, host_offset >> image->cluster_bits,
			       punch);
}

/**
 * qcow_frees_discard - nothing is freed after all
 * @image: whose
 * @frees: list of runs; empty after
 *
 * Context: any.
 */
void qcow_frees_discard(struct qcow_image *image, struct list_head *frees)
{
	struct qcow_free *free, *next;

	list_for_each_entry_safe(free, next, frees, node)
		qcow_free_discard(image, free);
	INIT_LIST_HEAD(frees);
}

/**
 * qcow_frees_queue_locked - the entries have just been replaced in memory
 * @image: whose
 * @frees: list of the runs that they referred to; empty after
 *
 * Context: image->lock is held, and was while the entries were replaced.
 */
void qcow_frees_queue_locked(struct qcow_image *image, struct list_head *frees)
{
	struct qcow_free *free, *next;

	list_for_each_entry_safe(free, next, frees, node) {
		list_del(&free->node);
		qcow_free_queue_locked(image, free);
	}
}

/*
 * Memory for a copy, of image->copy_size, or NULL if there is none now. It is kept
 * afterwards: kernels that clear all memory that they give out take longer for that
 * than the copy does.
 */
static void *qcow_copy_get(struct qcow_image *image)
{
	void *buf = NULL;

	spin_lock_irq(&image->lock);
	if (image->nr_copies)
		buf = image->copies[--image->nr_copies];
	spin_unlock_irq(&image->lock);
	return buf ?: kmalloc(image->copy_size,
			      GFP_NOIO | __GFP_NORETRY | __GFP_NOWARN);
}

/* Give it back. Context: any, interrupts included. */
static void qcow_copy_put(struct qcow_image *image, void *buf)
{
	unsigned long flags;

	if (!buf)
		return;
	spin_lock_irqsave(&image->lock, flags);
	if (image->nr_copies < QCOW_COPIES) {
		image->copies[image->nr_copies++] = buf;
		buf = NULL;
	}
	spin_unlock_irqrestore(&image->lock, flags);
	kfree(buf);
}

/*
 * Prepare what must stand in the guest range before or behind the data. Short
 * pieces are left for the caller to write together with the data; long ones, and
 * copies for which there is no memory, are written here.
 */
static int qcow_fill_prepare(struct qcow_chain *chain, u64 guest_offset,
			     u64 length, u64 host_offset, bool zeroed,
			     struct qcow_fill *fill)
{
	struct qcow_image *image = chain->layers[0];
	void *buf;
	bool zero;
	u64 step;
	int err;

	if (!length)
		return 0;
	zero = qcow_chain_is_zero(chain, 0, guest_offset, length, &err);
	if (err || (zero && zeroed))
		return err;
	if (zero && length > QCOW_MERGE_FILL)
		return qcow_data_write_zeroes(image, length, host_offset,
					      guest_offset);
	if (zero) {
		fill->length = length;
		return 0;
	}

	buf = qcow_copy_get(image);
	if (buf && length <= image->copy_size) {
		err = qcow_chain_read(chain, guest_offset, length, buf);
		if (err) {
			qcow_copy_put(image, buf);
			return err;
		}
		fill->length = length;
		fill->copy = buf;
		return 0;
	}
	step = buf ? image->copy_size : QCOW_BLOCK_SIZE;
	if (!buf)
		mutex_lock(&image->copy_mutex);
	while (length && !err) {
		void *copy = buf ?: image->copy_buf;

		step = min(step, length);
		err = qcow_chain_read(chain, guest_offset, step, copy) ?:
		      qcow_data_write(image, copy, step, host_offset,
				      guest_offset);
		guest_offset += step;
		host_offset += step;
		length -= step;
	}
	if (!buf)
		mutex_unlock(&image->copy_mutex);
	qcow_copy_put(image, buf);
	return err;
}

/*
 * Head and tail of a short piece of data in one read, and what is between them with
 * it, if they lie in one run. True if that was done.
 */
static bool qcow_fill_around(struct qcow_chain *chain, struct qcow_write *write,
			     u64 guest_offset, u32 head, u32 tail)
{
	u64 length = head + write->length + tail;
	struct qcow_image *image = chain->layers[0];
	struct qcow_extent extent;
	void *buf;

	if (!head || !tail || write->length > QCOW_FILL_GAP ||
	    length > image->copy_size ||
	    qcow_map(chain, 0, guest_offset - head, length, &extent) ||
	    extent.type != QCOW_EXTENT_DATA || extent.length < length)
		return false;
	buf = qcow_copy_get(image);
	if (!buf)
		return false;
	if (qcow_chain_read(chain, guest_offset - head, length, buf)) {
		qcow_copy_put(image, buf);
		return false;
	}
	write->head.length = head;
	write->head.copy = buf;
	write->tail.length = tail;
	write->tail.copy = buf + head + write->length;
	write->around = true;
	return true;
}

/* Take new clusters, fewer than wanted if need be, and note what they replace. */
static int qcow_write_allocate(struct qcow_image *image,
			       struct qcow_write *write, bool *zeroed)
{
	u64 cluster, got;
	unsigned int i;
	int err;

	if (qcow_is_external(image)) {
		write->fresh = true;
		write->host_offset = write->range.first << image->cluster_bits;
		return 0;
	}
	write->abort = qcow_free_alloc(image);
	err = qcow_alloc_clusters(image, write->count, &cluster, &got, zeroed);
	if (err)
		return err;
	/* Zeroes are not zero when they are encrypted. */
	*zeroed &= !image->crypt;
	write->fresh = true;
	write->count = got;
	write->host_offset = cluster << image->cluster_bits;
	if (write->abort) {
		write->abort->cluster = cluster;
		write->abort->count = got;
		write->abort->punch = false;
	}
	for (i = 0; i < got; i++) {
		struct qcow_l2_entry entry = qcow_l2_load(image, write->l2,
							  write->index + i);

		qcow_frees_add_entry(image, &write->frees, entry, false);
	}
	return 0;
}

/**
 * qcow_write_begin - prepare a write that changes the mapping
 * @chain: the layers
 * @guest_offset: of the guest's data, bytes, a multiple of 512
 * @length: of the guest's data, bytes, at least 512
 * @write: out; @write->length says how much of the data this write takes
 *
 * The caller writes head, data and tail to the file, in one piece that begins
 * @write->head.length bytes before @write->host_offset + @write->data_offset,
 * and calls qcow_write_end() when that is over.
 *
 * Context: may sleep for long. Not inside an epoch. The caller holds no other
 * range except for I/O that has been issued.
 *
 * Return: 0; 1 if the data can be written in place after all, and qcow_map()
 * tells where; -ENOSPC; or another errno.
 */
int qcow_write_begin(struct qcow_chain *chain, u64 guest_offset, u64 length,
		     struct qcow_write *write)
{
	struct qcow_image *image = chain->layers[0];
	u32 per_block = qcow_l2_per_block(image);
	u64 first = guest_offset >> image->cluster_bits;
	u64 last = (guest_offset + length - 1) >> image->cluster_bits;
	enum qcow_write_kind kind;
	bool zeroed = false;
	u32 head, tail;
	u64 end, host;
	int err;

	err = qcow_image_error(image) ?: qcow_commit_throttle(image);
	if (err)
		return err;

	memset(write, 0, sizeof(*write));
	INIT_LIST_HEAD(&write->frees);
	write->image = image;
	last = min(last, first | (per_block - 1));
	qcow_range_lock(image, &write->range, first, last);

	write->l2 = qcow_l2_for_write(image, guest_offset, &write->index);
	if (IS_ERR(write->l2)) {
		err = PTR_ERR(write->l2);
		qcow_range_unlock(image, &write->range);
		return err;
	}
	err = qcow_write_run(image, write, guest_offset, &kind,
			     last - first + 1);
	if (!err && kind == QCOW_WRITE_IN_PLACE)
		err = 1;
	if (!err && kind == QCOW_WRITE_NEW)
		err = qcow_write_allocate(image, write, &zeroed);
	if (err)
		goto out_end;

	qcow_range_shrink(image, &write->range, first + write->count - 1);
	end = min(guest_offset + length,
		  (first + write->count) << image->cluster_bits);
	write->data_offset = guest_offset & (qcow_cluster_size(image) - 1);
	write->length = end - guest_offset;
	err = qcow_write_surround(image, write, guest_offset, end, &head, &tail);
	if (err)
		goto out_end;

	/* All around is zero, and there. */
	if (zeroed && write->blank && chain->depth == 1)
		return 0;
	if (qcow_fill_around(chain, write, guest_offset, head, tail))
		return 0;
	host = write->host_offset + write->data_offset;
	err = qcow_fill_prepare(chain, guest_offset - head, head, host - head,
				zeroed, &write->head) ?:
	      qcow_fill_prepare(chain, end, tail, host + write->length, zeroed,
				&write->tail);
	if (!err)
		return 0;
out_end:
	qcow_write_end(write, err);
	return err;
}

/**
 * qcow_write_end - link the clusters, or give them back
 * @write: from qcow_write_begin()
 * @error: 0 if head, data and tail are in the file
 *
 * Context: any, interrupts included.
 */
void qcow_write_end(struct qcow_write *write, int error)
{
	struct qcow_image *image = write->image;
	unsigned long flags;
	unsigned int i;

	spin_lock_irqsave(&image->lock, flags);
	if (!error) {
		for (i = 0; i < write->count; i++)
			qcow_l2_store_locked(image, write->l2, write->index + i,
					     qcow_write_entry(image, write, i));
		qcow_block_dirty_locked(write->l2);
		qcow_frees_queue_locked(image, &write->frees);
	} else if (write->fresh && write->abort) {
		qcow_free_queue_locked(image, write->abort);
		write->abort = NULL;
	}
	list_del(&write->range.node);
	spin_unlock_irqrestore(&image->lock, flags);
	wake_up_all(&image->range_wait);

	qcow_l2_release(image, write->l2);
	qcow_frees_discard(image, &write->frees);
	if (write->abort)
		qcow_free_discard(image, write->abort);
	qcow_copy_put(image, write->head.copy);
	if (!write->around)
		qcow_copy_put(image, write->tail.copy);
}

/**
 * qcow_fill_write - write a head or tail by itself
 * @image: the top layer
 * @fill: from qcow_write_begin()
 * @host_offset: where in the data file, bytes
 * @guest_offset: where on the disk
 *
 * Return: 0 or an errno.
 */
int qcow_fill_write(struct qcow_image *image, const struct qcow_fill *fill,
		    u64 host_offset, u64 guest_offset)
{
	if (!fill->length)
		return 0;
	if (!fill->copy)
		return qcow_data_write_zeroes(image, fill->length, host_offset,
					      guest_offset);
	return qcow_data_write(image, fill->copy, fill->length, host_offset,
			       guest_offset);
}
