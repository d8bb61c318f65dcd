// SPDX-License-Identifier: GPL-2.0-only
/*
 * Commits: how changes of metadata reach the disk, and in which order.
 *
 * Changes are made in memory, in cached blocks, and go out in groups. A commit
 * closes the group that is open and writes it in two steps:
 *
 *   freeze	each dirty LINK block (L1, L2, refcount table) is copied to its
 *		shadow. What changes later belongs to the next group.
 *   step 1	write the dirty COUNT blocks (refcount blocks). Barrier.
 *   step 2	write the frozen LINK blocks. Barrier.
 *
 * Why this is enough. An entry E in a frozen block makes something reachable:
 *
 *   - E is an L2 entry. It was made when the I/O of the data was complete, which
 *     was before the freeze, so barrier 1 makes the data durable. The count of
 *     the cluster went up before the data was written; its block was dirty or
 *     written then, so after barrier 1 it is durable, and the allocator saw to
 *     it that the refcount table leads to it.
 *   - E is an L1 entry. The new L2 table, as zeroes or as a copy, was written to
 *     the file before E was made; barrier 1 makes it durable. Its blocks that
 *     changed since are LINK blocks like any other: each of their entries is
 *     good by itself, and an old one instead of it is good as well.
 *   - E is a refcount table entry. The new block was written to the file before
 *     E was made. No cluster that it covers is handed out before the commit that
 *     writes E is complete (refcount.c).
 *
 * A block that was written stays pinned, with its shadow, until barrier 2 is over;
 * if anything fails it is dirty again. So a look-up never has to read back what a
 * failed barrier may have lost.
 *
 * So a power cut anywhere leaves every entry that is on disk pointing to
 * something that is on disk and counted; clusters that are counted and not
 * pointed to are leaks.
 *
 * Lazy refcounts: where the image allows it, the header's dirty bit is durable
 * before the first count goes up (qcow_image_stale_counts). It says that counts on
 * the disk may be wrong in either direction, that nobody may rely on them, and
 * that a check can make them from the tables. So the order of counts and links
 * does not matter any more, and a flush leaves the dirty COUNT blocks where they
 * are. All else stays: barrier 1 comes before the links, for the data and the
 * tables that they lead to, and the refcount table leads to the block that covers
 * a cluster before it is handed out. Other commits write the counts: the one that
 * comes after QCOW_COMMIT_DELAY, those that are to give memory back, the one
 * before the refcount table moves, and those at detach and where the device is
 * frozen (qcow_commit_all). Behind these, with no writes under way, the bit is cleared,
 * after a barrier behind the last count. If anything fails before, it stays.
 *
 * References that go away: an entry is replaced in memory, and its old cluster
 * joins image->frees under the same hold of image->lock. A commit takes that list
 * before it freezes, so all of the replacements are in blocks frozen by it or by
 * an earlier one. After barrier 2 the runs move to image->reclaims: nothing on
 * disk points there. Whoever looked the old entry up in memory may still be
 * using the cluster, so the reclaim worker waits for the epochs that began before
 * (SRCU), then punches the space, and only then lowers the count, which is what
 * lets the allocator hand the cluster out again. The lowered count is written by
 * a later commit.
 *
 * Errors. A write that fails leaves its blocks dirty and its frees pending; the
 * flush reports the error, and the next one tries again. A barrier that fails is
 * final: nobody knows what of the last group is on the disk, and later barriers
 * that succeed prove nothing. The image takes no more writes (qcow_image_fail).
 */
#include <linux/bvec.h>
#include <linux/list_sort.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "qcow.h"
#include "trace.h"

/* Runs that wait to be freed; more than that close a group. */
#define QCOW_MAX_FREES		1024

/* Write up to QCOW_BATCH blocks, in order of their offsets, from @bufs. */
static int qcow_write_blocks(struct qcow_image *image,
			     struct qcow_block **blocks, void **bufs,
			     unsigned int count)
{
	u32 block_size = qcow_block_size(image);
	struct bio_vec bvec[QCOW_BATCH];
	unsigned int first, n, i;
	struct iov_iter iter;
	int result = 0;
	int err;

	for (first = 0; first < count; first += n) {
		u64 pos = blocks[first]->host_offset;

		for (n = 0; first + n < count; n++) {
			if (blocks[first + n]->host_offset !=
			    pos + (u64)n * block_size)
				break;
			bvec[n].bv_page = virt_to_page(bufs[first + n]);
			bvec[n].bv_offset = offset_in_page(bufs[first + n]);
			bvec[n].bv_len = block_size;
		}
		iov_iter_bvec(&iter, ITER_SOURCE, bvec, n, n * block_size);
		err = qcow_file_rw(&image->file, &iter, pos, 0);
		trace_qcow_write_out(image, pos, n * block_size, err);
		for (i = first; i < first + n; i++)
			blocks[i]->written = !err;
		/* ENOSPC is what the user can do something about. */
		if (err && result != -ENOSPC)
			result = err;
	}
	return result;
}

static int qcow_block_cmp(void *priv, const struct list_head *a,
			  const struct list_head *b)
{
	u64 x = list_entry(a, struct qcow_block, writing_node)->host_offset;
	u64 y = list_entry(b, struct qcow_block, writing_node)->host_offset;

	return x < y ? -1 : x > y;
}

/* Take the dirty blocks of a kind out of the image's list, to be written. */
static void qcow_take_dirty(struct qcow_image *image, enum qcow_block_kind kind,
			    struct list_head *list)
{
	struct qcow_block *block;
	LIST_HEAD(dirty);

	spin_lock_irq(&image->lock);
	list_splice_init(&image->dirty[kind], &dirty);
	while (!list_empty(&dirty)) {
		block = list_first_entry(&dirty, struct qcow_block, dirty_node);
		list_del_init(&block->dirty_node);
		block->dirty = false;
		block->writing = true;
		block->written = false;
		image->nr_dirty--;
		if (kind == QCOW_BLOCK_LINK)
			qcow_block_copy_locked(block, block->shadow);
		list_add_tail(&block->writing_node, list);
		/* The block that follows may change before it is its turn. */
		spin_unlock_irq(&image->lock);
		cond_resched();
		spin_lock_irq(&image->lock);
	}
	spin_unlock_irq(&image->lock);
	list_sort(NULL, list, qcow_block_cmp);
}

/*
 * Write the blocks of a list, which stay in it. Counts may change meanwhile, so
 * they are written from a copy; links have one already.
 */
static int qcow_write_list(struct qcow_image *image, struct list_head *list,
			   enum qcow_block_kind kind)
{
	struct qcow_block *blocks[QCOW_BATCH];
	void *bufs[QCOW_BATCH];
	struct qcow_block *block;
	unsigned int n = 0;
	int result = 0;
	int err;

	list_for_each_entry(block, list, writing_node) {
		blocks[n] = block;
		bufs[n] = block->shadow;
		if (kind == QCOW_BLOCK_COUNT) {
			bufs[n] = image->bounce + n * QCOW_BLOCK_SIZE;
			spin_lock_irq(&image->lock);
			memcpy(bufs[n], block->data, qcow_block_size(image));
			spin_unlock_irq(&image->lock);
		}
		n++;
		if (n < QCOW_BATCH &&
		    !list_is_last(&block->writing_node, list))
			continue;
		err = qcow_write_blocks(image, blocks, bufs, n);
		if (err && result != -ENOSPC)
			result = err;
		n = 0;
	}
	return result;
}

/* The commit is over. Blocks that it did not make durable are dirty again. */
static void qcow_end_list(struct list_head *list, bool durable)
{
	struct qcow_block *block, *next;

	list_for_each_entry_safe(block, next, list, writing_node) {
		list_del_init(&block->writing_node);
		qcow_block_written(block, durable && block->written);
	}
}

/*
 * Data in an external file is durable before any entry that leads to it: entries
 * are written after the first barrier of their commit.
 */
static int qcow_barrier(struct qcow_image *image, bool data, bool metadata)
{
	int err = 0;

	if (data)
		err = qcow_file_sync(qcow_data_file(image));
	if (!err && metadata && (!data || qcow_is_external(image)))
		err = qcow_file_sync(&image->file);
	if (err)
		qcow_image_fail(image, "flush failed with error %d", err);
	/*
	 * A file tells of lost data once. Somebody else who synced it meanwhile may
	 * have been told, and it may have been ours.
	 */
	return err ?: READ_ONCE(image->failed) ? -EIO : 0;
}

static int qcow_commit_group(struct qcow_image *image)
{
	unsigned int scope;
	LIST_HEAD(counts);
	LIST_HEAD(frees);
	LIST_HEAD(links);
	u64 nr_frees;
	bool counting;
	int step = 1;
	int err;

	lockdep_assert_held(&image->commit_mutex);
	if (READ_ONCE(image->failed))
		return -EIO;
	scope = qcow_io_scope_enter();

	spin_lock_irq(&image->lock);
	image->commits_started++;
	image->committing = true;
	list_splice_init(&image->frees, &frees);
	nr_frees = image->nr_frees;
	counting = image->counts_due || !READ_ONCE(image->dirty_bit);
	image->counts_due = false;
	spin_unlock_irq(&image->lock);
	qcow_take_dirty(image, QCOW_BLOCK_LINK, &links);
	if (counting)
		qcow_take_dirty(image, QCOW_BLOCK_COUNT, &counts);

	err = qcow_write_list(image, &counts, QCOW_BLOCK_COUNT);
	if (!err && !list_empty(&links)) {
		qcow_hold(QCOW_POINT_COMMIT_COUNTS);
		err = qcow_barrier(image, true, true);
		if (!err) {
			step = 2;
			qcow_hold(QCOW_POINT_COMMIT_LINKS);
			err = qcow_write_list(image, &links, QCOW_BLOCK_LINK);
		}
	}
	if (!err)
		err = qcow_barrier(image, step == 1, step == 2 ||
				   !list_empty(&counts));
	qcow_end_list(&counts, !err);
	qcow_end_list(&links, !err);

	spin_lock_irq(&image->lock);
	image->committing = false;
	if (err) {
		list_splice(&frees, &image->frees);
	} else {
		list_splice_tail_init(&frees, &image->reclaims);
		image->nr_frees -= nr_frees;
		image->nr_reclaims += nr_frees;
		if (image->commits_started >= image->pending_ticket)
			image->pending_first = image->pending_end;
	}
	if (image->nr_reclaims)
		queue_work(image->wq, &image->reclaim_work);
	/* The time begins with the first change after this. */
	if (image->nr_dirty || image->nr_frees)
		qcow_commit_arm_locked(image);
	else
		cancel_delayed_work(&image->commit_work);
	spin_unlock_irq(&image->lock);
	trace_qcow_commit(image, step, err);
	qcow_io_scope_exit(scope);
	return err;
}

/**
 * qcow_commit_arm_locked - commit a while from now, if nobody does before
 * @image: a writable image
 *
 * Context: image->lock is held.
 */
void qcow_commit_arm_locked(struct qcow_image *image)
{
	lockdep_assert_held(&image->lock);
	if (!image->failed)
		queue_delayed_work(image->wq, &image->commit_work,
				   QCOW_COMMIT_DELAY);
}

static int qcow_commit_next(struct qcow_image *image)
{
	int err = qcow_commit_group(image);

	image->commits_done = image->commits_started;
	image->commit_error = err;
	return err;
}

/**
 * qcow_commit_exclusive - commit while others are kept from it
 * @image: a writable image
 *
 * Context: may sleep; commit_mutex is held.
 *
 * Return: 0 if everything that was complete before the call is durable, or an
 * errno.
 */
int qcow_commit_exclusive(struct qcow_image *image)
{
	spin_lock_irq(&image->lock);
	image->counts_due = true;
	spin_unlock_irq(&image->lock);
	return qcow_commit_next(image);
}

static int qcow_commit_shared(struct qcow_image *image, bool counts)
{
	u64 ticket;
	int err;

	spin_lock_irq(&image->lock);
	ticket = image->commits_started + 1;
	/* The commit that begins next is the one to see it. */
	image->counts_due |= counts;
	spin_unlock_irq(&image->lock);

	mutex_lock(&image->commit_mutex);
	if (image->commits_done >= ticket)
		err = image->commit_error;
	else
		err = qcow_commit_next(image);
	mutex_unlock(&image->commit_mutex);
	return err;
}

/**
 * qcow_commit - make all that was complete before the call durable
 * @image: a writable image
 *
 * Callers that come while a commit is running share the one that follows it.
 *
 * Context: may sleep. Not inside an epoch, not under commit_mutex or
 * alloc_mutex. Needs no worker and no memory.
 *
 * Return: 0; -ENOSPC or another errno of a write, after which a later commit may
 * succeed; -EIO for good once a barrier has failed.
 */
int qcow_commit(struct qcow_image *image)
{
	return qcow_commit_shared(image, true);
}

/**
 * qcow_commit_links - the same for a flush
 * @image: a writable image
 *
 * While the image has the dirty bit, refcounts may be left for later.
 *
 * Context: as for qcow_commit().
 *
 * Return: likewise.
 */
int qcow_commit_links(struct qcow_image *image)
{
	return qcow_commit_shared(image, false);
}

/**
 * qcow_image_dirty - is there metadata in memory that is not durable
 * @image: a writable image
 *
 * If not, every mapping that was looked up before the call is durable. Refcounts
 * need not be where the header has the dirty bit.
 *
 * Context: any.
 */
bool qcow_image_dirty(struct qcow_image *image)
{
	unsigned long flags;
	bool dirty;

	spin_lock_irqsave(&image->lock, flags);
	dirty = image->committing ||
		(image->dirty_bit ? !list_empty(&image->dirty[QCOW_BLOCK_LINK]) :
				    image->nr_dirty);
	spin_unlock_irqrestore(&image->lock, flags);
	return dirty;
}

/* Drop one reference of each cluster of a run; punch what that frees. */
static int qcow_reclaim_run(struct qcow_image *image, struct qcow_free *free)
{
	u64 end = free->cluster + free->count;
	u64 first = free->cluster;
	u64 cluster, next, count;
	int err;

	/* Where an image is damaged, others may lead there, too. */
	if (READ_ONCE(image->corrupt))
		return -EIO;
	if (READ_ONCE(image->leaks))
		return 0;
	/* Tables that are freed are not known as tables any more. */
	err = qcow_overlap_check(image, first << image->cluster_bits,
				 free->count << image->cluster_bits);
	if (err)
		return err;
	/* From here on no count of them goes up: it is one when it is the last. */
	qcow_alloc_forget(image, first, free->count);
	while (first < end) {
		err = qcow_refcount_get(image, first, &count);
		if (err)
			return err;
		for (next = first + 1; count == 1 && next < end; next++) {
			u64 other;

			err = qcow_refcount_get(image, next, &other);
			if (err)
				return err;
			if (other != 1)
				break;
		}
		if (count == 1) {
			u64 pos = first << image->cluster_bits;
			u64 len = (next - first) << image->cluster_bits;

			err = qcow_cache_drop(image, pos, len);
			if (err)
				return err;
			qcow_unpack_drop(image, pos, len);
			qcow_hold(QCOW_POINT_PUNCH);
			if (free->punch)
				err = qcow_file_punch(&image->file, pos, len);
			trace_qcow_free(image, pos, len, err);
			qcow_hold(QCOW_POINT_COUNT_DROP);
		}
		for (cluster = first; cluster < next; cluster++) {
			err = qcow_refcount_drop(image, cluster);
			if (err)
				return err;
		}
		first = next;
	}
	return 0;
}

/*
 * Free the clusters to which nothing on disk points. A run is counted until it
 * is done, so that whoever sees no more of them can rely on it.
 */
static void qcow_reclaim(struct qcow_image *image)
{
	unsigned int scope = qcow_io_scope_enter();
	struct qcow_free *free;
	LIST_HEAD(list);
	int err;

	mutex_lock(&image->reclaim_mutex);
	spin_lock_irq(&image->lock);
	list_splice_init(&image->reclaims, &list);
	spin_unlock_irq(&image->lock);
	if (!list_empty(&list)) {
		qcow_hold(QCOW_POINT_RECLAIM);
		synchronize_srcu_expedited(&image->epoch);
	}
	while (!list_empty(&list)) {
		free = list_first_entry(&list, struct qcow_free, node);
		list_del(&free->node);
		err = qcow_reclaim_run(image, free);
		if (err)
			pr_warn_ratelimited("qcow: %pD: host clusters %llu to %llu stay allocated: error %d; 'qcowctl check --repair' frees them\n",
					    image->file.file, free->cluster,
					    free->cluster + free->count - 1,
					    err);
		spin_lock_irq(&image->lock);
		image->nr_reclaims--;
		spin_unlock_irq(&image->lock);
		qcow_free_discard(image, free);
		cond_resched();
	}
	mutex_unlock(&image->reclaim_mutex);
	qcow_io_scope_exit(scope);
}

/**
 * qcow_reclaim_work_fn - free clusters in the background
 * @work: image->reclaim_work
 */
void qcow_reclaim_work_fn(struct work_struct *work)
{
	qcow_reclaim(container_of(work, struct qcow_image, reclaim_work));
}

/**
 * qcow_commit_all - commit until nothing is left to do
 * @image: a writable image; no requests that change it are in flight
 *
 * Context: may sleep.
 *
 * Return: 0 or the errno that stopped it.
 */
int qcow_commit_all(struct qcow_image *image)
{
	bool done;
	int err;

	do {
		err = qcow_commit(image);
		if (err)
			return err;
		qcow_reclaim(image);
		/* While somebody else commits, what is dirty is not counted. */
		mutex_lock(&image->commit_mutex);
		spin_lock_irq(&image->lock);
		done = !image->nr_dirty && !image->nr_frees &&
		       !image->nr_reclaims;
		spin_unlock_irq(&image->lock);
		mutex_unlock(&image->commit_mutex);
	} while (!done);
	return 0;
}

/**
 * qcow_reclaim_now - free at once what waits to be freed
 * @image: a writable image
 *
 * Context: may sleep. Not inside an epoch, for which it would wait.
 *
 * Return: true if clusters may have become free.
 */
bool qcow_reclaim_now(struct qcow_image *image)
{
	bool frees, reclaims;

	spin_lock_irq(&image->lock);
	frees = image->nr_frees;
	reclaims = image->nr_reclaims;
	spin_unlock_irq(&image->lock);
	if (frees && qcow_commit(image))
		return false;
	qcow_reclaim(image);
	return frees || reclaims;
}

/**
 * qcow_commit_throttle - keep what waits for a commit within bounds
 * @image: a writable image
 *
 * Context: may sleep. Not inside an epoch, no locks held.
 *
 * Return: 0, or the errno of a commit without which there would be too much.
 */
int qcow_commit_throttle(struct qcow_image *image)
{
	u64 max_dirty = image->cache->limit >> (QCOW_BLOCK_BITS + 1);
	int err = 0;

	if (READ_ONCE(image->nr_dirty) > max_dirty ||
	    READ_ONCE(image->nr_frees) > QCOW_MAX_FREES)
		err = qcow_commit(image);
	if (READ_ONCE(image->nr_reclaims) > 2 * QCOW_MAX_FREES)
		qcow_reclaim(image);
	return err;
}

/**
 * qcow_commit_work_fn - commit what no flush came for
 * @work: image->commit_work
 */
void qcow_commit_work_fn(struct work_struct *work)
{
	struct qcow_image *image = container_of(to_delayed_work(work),
						struct qcow_image, commit_work);

	qcow_commit(image);
}

/**
 * qcow_free_alloc - a node to free a run of clusters with
 * @image: for whom
 *
 * Context: may sleep, and may run a commit to get one; so not inside an epoch and
 * not under commit_mutex or alloc_mutex.
 *
 * Return: the node. NULL if there is none: the clusters are leaked then. That is
 * harmless, and a wait for others that wait for nodes as well is not.
 */
struct qcow_free *qcow_free_alloc(struct qcow_image *image)
{
	struct qcow_free *free;
	unsigned int tries;

	for (tries = 0; tries < 2; tries++) {
		free = mempool_alloc(&image->free_pool,
				     GFP_NOWAIT | __GFP_NOWARN);
		if (free) {
			INIT_LIST_HEAD(&free->node);
			return free;
		}
		qcow_reclaim_now(image);
	}
	pr_warn_ratelimited("qcow: %pD: out of memory: freed host clusters stay allocated; 'qcowctl check --repair' frees them\n",
			    image->file.file);
	return NULL;
}

/**
 * qcow_free_discard - give a node back
 * @image: whose
 * @free: in no list
 *
 * Context: any.
 */
void qcow_free_discard(struct qcow_image *image, struct qcow_free *free)
{
	mempool_free(free, &image->free_pool);
}

/**
 * qcow_free_queue_locked - a reference has just been replaced in memory
 * @image: whose
 * @free: the clusters that lost it; freed when that is durable
 *
 * Context: image->lock is held, and was while the entry was replaced.
 */
void qcow_free_queue_locked(struct qcow_image *image, struct qcow_free *free)
{
	lockdep_assert_held(&image->lock);
	list_add_tail(&free->node, &image->frees);
	image->nr_frees++;
	qcow_commit_arm_locked(image);
}

/**
 * qcow_free_reclaim - nothing on disk points there any more
 * @image: whose
 * @free: the clusters
 *
 * Context: process.
 */
void qcow_free_reclaim(struct qcow_image *image, struct qcow_free *free)
{
	spin_lock_irq(&image->lock);
	list_add_tail(&free->node, &image->reclaims);
	image->nr_reclaims++;
	spin_unlock_irq(&image->lock);
	queue_work(image->wq, &image->reclaim_work);
}
