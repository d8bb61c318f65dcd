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
 * So a power cut anywhere leaves every entry that is on disk pointing to
 * something that is on disk and counted; clusters that are counted and not
 * pointed to are leaks.
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

#define QCOW_FREE_POOL_MIN	64
/* Runs that wait to be freed; more than that close a group. */
#define QCOW_MAX_FREES		1024

struct workqueue_struct *qcow_commit_wq;

static struct kmem_cache *qcow_free_slab;
static mempool_t qcow_free_pool;

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
			qcow_block_written(blocks[i], !err);
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
		image->nr_dirty--;
		if (kind == QCOW_BLOCK_LINK)
			memcpy(block->shadow, block->data,
			       qcow_block_size(image));
		list_add_tail(&block->writing_node, list);
		/* The block that follows may change before it is its turn. */
		spin_unlock_irq(&image->lock);
		cond_resched();
		spin_lock_irq(&image->lock);
	}
	spin_unlock_irq(&image->lock);
	list_sort(NULL, list, qcow_block_cmp);
}

/* Take a batch from the front of a list. */
static unsigned int qcow_next_batch(struct list_head *list,
				    struct qcow_block **blocks)
{
	unsigned int n;

	for (n = 0; n < QCOW_BATCH && !list_empty(list); n++) {
		blocks[n] = list_first_entry(list, struct qcow_block,
					     writing_node);
		list_del_init(&blocks[n]->writing_node);
	}
	return n;
}

/* Step 1. Counts need no freeze, but a stable copy while they are written. */
static int qcow_write_counts(struct qcow_image *image)
{
	u32 block_size = qcow_block_size(image);
	struct qcow_block *blocks[QCOW_BATCH];
	void *bufs[QCOW_BATCH];
	unsigned int n, i;
	LIST_HEAD(counts);
	int result = 0;
	int err;

	qcow_take_dirty(image, QCOW_BLOCK_COUNT, &counts);
	while ((n = qcow_next_batch(&counts, blocks))) {
		mutex_lock(&image->alloc_mutex);
		for (i = 0; i < n; i++) {
			bufs[i] = image->bounce + i * QCOW_BLOCK_SIZE;
			memcpy(bufs[i], blocks[i]->data, block_size);
		}
		mutex_unlock(&image->alloc_mutex);
		err = qcow_write_blocks(image, blocks, bufs, n);
		if (err && result != -ENOSPC)
			result = err;
	}
	return result;
}

/* Step 2. */
static int qcow_write_links(struct qcow_image *image, struct list_head *links)
{
	struct qcow_block *blocks[QCOW_BATCH];
	void *bufs[QCOW_BATCH];
	unsigned int n, i;
	int result = 0;
	int err;

	while ((n = qcow_next_batch(links, blocks))) {
		for (i = 0; i < n; i++)
			bufs[i] = blocks[i]->shadow;
		err = qcow_write_blocks(image, blocks, bufs, n);
		if (err && result != -ENOSPC)
			result = err;
	}
	return result;
}

static int qcow_barrier(struct qcow_image *image)
{
	int err = qcow_file_sync(&image->file);

	if (err)
		qcow_image_fail(image, "flush failed with error %d", err);
	return err;
}

static int qcow_commit_group(struct qcow_image *image)
{
	struct qcow_block *block, *next;
	LIST_HEAD(frees);
	LIST_HEAD(links);
	u64 pending_end;
	int step = 1;
	int err;

	lockdep_assert_held(&image->commit_mutex);
	if (READ_ONCE(image->failed))
		return -EIO;

	spin_lock_irq(&image->lock);
	image->commits_started++;
	image->committing = true;
	list_splice_init(&image->frees, &frees);
	pending_end = image->pending_end;
	spin_unlock_irq(&image->lock);
	qcow_take_dirty(image, QCOW_BLOCK_LINK, &links);

	err = qcow_write_counts(image);
	if (!err && !list_empty(&links)) {
		err = qcow_barrier(image);
		if (!err) {
			step = 2;
			err = qcow_write_links(image, &links);
		}
	}
	list_for_each_entry_safe(block, next, &links, writing_node) {
		list_del_init(&block->writing_node);
		qcow_block_written(block, false);
	}
	if (!err)
		err = qcow_barrier(image);

	spin_lock_irq(&image->lock);
	image->committing = false;
	if (err) {
		list_splice(&frees, &image->frees);
	} else {
		list_splice_tail_init(&frees, &image->reclaims);
		image->pending_first = pending_end;
	}
	if (!list_empty(&image->reclaims))
		queue_work(qcow_commit_wq, &image->reclaim_work);
	spin_unlock_irq(&image->lock);
	trace_qcow_commit(image, step, err);
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
	int err = qcow_commit_group(image);

	image->commits_done = image->commits_started;
	image->commit_error = err;
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
	u64 ticket;
	int err;

	spin_lock_irq(&image->lock);
	ticket = image->commits_started + 1;
	spin_unlock_irq(&image->lock);

	mutex_lock(&image->commit_mutex);
	if (image->commits_done >= ticket)
		err = image->commit_error;
	else
		err = qcow_commit_exclusive(image);
	mutex_unlock(&image->commit_mutex);
	return err;
}

/**
 * qcow_image_dirty - is there metadata in memory that is not durable
 * @image: a writable image
 *
 * If not, every mapping that was looked up before the call is durable.
 *
 * Context: any.
 */
bool qcow_image_dirty(struct qcow_image *image)
{
	unsigned long flags;
	bool dirty;

	spin_lock_irqsave(&image->lock, flags);
	dirty = image->nr_dirty || image->committing;
	spin_unlock_irqrestore(&image->lock, flags);
	return dirty;
}

/**
 * qcow_commit_all - commit until nothing is left to do
 * @image: a writable image with no requests in flight
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
		flush_work(&image->reclaim_work);
		spin_lock_irq(&image->lock);
		done = !image->nr_dirty && !image->nr_frees;
		spin_unlock_irq(&image->lock);
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
	bool any;

	spin_lock_irq(&image->lock);
	any = image->nr_frees;
	spin_unlock_irq(&image->lock);
	if (!any || qcow_commit(image))
		return false;
	flush_work(&image->reclaim_work);
	return true;
}

/**
 * qcow_commit_throttle - keep what waits for a commit within bounds
 * @image: a writable image
 *
 * Context: may sleep. Not inside an epoch, no locks held.
 */
void qcow_commit_throttle(struct qcow_image *image)
{
	u64 max_dirty = image->cache->limit >> (QCOW_BLOCK_BITS + 1);

	if (READ_ONCE(image->nr_dirty) > max_dirty ||
	    READ_ONCE(image->nr_frees) > QCOW_MAX_FREES)
		qcow_commit(image);
}

/**
 * qcow_commit_work_fn - commit what no flush came for
 * @work: image->commit_work
 */
void qcow_commit_work_fn(struct work_struct *work)
{
	struct qcow_image *image = container_of(to_delayed_work(work),
						struct qcow_image, commit_work);

	if (qcow_commit(image) && !qcow_image_error(image))
		mod_delayed_work(qcow_commit_wq, &image->commit_work,
				 QCOW_COMMIT_DELAY);
}

/* Drop one reference of each cluster of a run; punch what that frees. */
static int qcow_reclaim_run(struct qcow_image *image, struct qcow_free *free)
{
	u64 end = free->cluster + free->count;
	u64 first = free->cluster;
	u64 cluster, next, count;
	int err;

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

			qcow_cache_drop(image, pos, len);
			if (free->punch && !image->no_punch) {
				err = qcow_file_punch(&image->file, pos, len);
				if (err == -EOPNOTSUPP) {
					image->no_punch = true;
					pr_info("qcow: %pD: the file cannot punch holes; freed clusters are reused, but their space is not given back\n",
						image->file.file);
				}
			}
			trace_qcow_free(image, pos, len, err);
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

/**
 * qcow_reclaim_work_fn - free clusters to which nothing on disk points
 * @work: image->reclaim_work
 */
void qcow_reclaim_work_fn(struct work_struct *work)
{
	struct qcow_image *image = container_of(work, struct qcow_image,
						reclaim_work);
	unsigned int noio = memalloc_noio_save();
	struct qcow_free *free;
	LIST_HEAD(list);
	int err;

	spin_lock_irq(&image->lock);
	list_splice_init(&image->reclaims, &list);
	spin_unlock_irq(&image->lock);
	if (list_empty(&list))
		goto out;

	synchronize_srcu_expedited(&image->epoch);
	while (!list_empty(&list)) {
		free = list_first_entry(&list, struct qcow_free, node);
		list_del(&free->node);
		err = qcow_reclaim_run(image, free);
		if (err)
			pr_warn_ratelimited("qcow: %pD: host clusters %llu to %llu stay allocated: error %d; 'qemu-img check -r leaks' frees them\n",
					    image->file.file, free->cluster,
					    free->cluster + free->count - 1,
					    err);
		spin_lock_irq(&image->lock);
		image->nr_frees--;
		spin_unlock_irq(&image->lock);
		qcow_free_discard(free);
		cond_resched();
	}
out:
	memalloc_noio_restore(noio);
}

/**
 * qcow_free_alloc - a node to free a run of clusters with
 * @image: for whom
 *
 * Context: may sleep, and may run a commit to get one; so not inside an epoch and
 * not under commit_mutex or alloc_mutex.
 *
 * Return: the node, or NULL if there is none and the image has failed.
 */
struct qcow_free *qcow_free_alloc(struct qcow_image *image)
{
	struct qcow_free *free;

	while (!(free = mempool_alloc(&qcow_free_pool, GFP_NOIO &
				      ~__GFP_DIRECT_RECLAIM))) {
		if (qcow_image_error(image))
			return NULL;
		qcow_commit(image);
		io_schedule_timeout(1);
	}
	INIT_LIST_HEAD(&free->node);
	return free;
}

/**
 * qcow_free_discard - give a node back
 * @free: in no list
 *
 * Context: any.
 */
void qcow_free_discard(struct qcow_free *free)
{
	mempool_free(free, &qcow_free_pool);
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
	image->nr_frees++;
	spin_unlock_irq(&image->lock);
	queue_work(qcow_commit_wq, &image->reclaim_work);
}

/**
 * qcow_commit_init - once, when the module is loaded
 *
 * Return: 0 or -ENOMEM.
 */
int qcow_commit_init(void)
{
	qcow_free_slab = KMEM_CACHE(qcow_free, 0);
	if (!qcow_free_slab)
		return -ENOMEM;
	if (mempool_init_slab_pool(&qcow_free_pool, QCOW_FREE_POOL_MIN,
				   qcow_free_slab))
		goto out_slab;
	/* Freezable: a write during hibernation would outrun the saved memory. */
	qcow_commit_wq = alloc_workqueue("qcow-commit", WQ_MEM_RECLAIM |
					 WQ_FREEZABLE | WQ_UNBOUND, 0);
	if (!qcow_commit_wq)
		goto out_pool;
	return 0;

out_pool:
	mempool_exit(&qcow_free_pool);
out_slab:
	kmem_cache_destroy(qcow_free_slab);
	return -ENOMEM;
}

/**
 * qcow_commit_exit - when the module is unloaded
 */
void qcow_commit_exit(void)
{
	destroy_workqueue(qcow_commit_wq);
	mempool_exit(&qcow_free_pool);
	kmem_cache_destroy(qcow_free_slab);
}
