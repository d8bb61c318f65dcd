// SPDX-License-Identifier: GPL-2.0-only
/*
 * Cached blocks of tables: L1, L2, refcount table, refcount blocks.
 *
 * A block is 4 KiB of a table, or a cluster where clusters are smaller, so that
 * a random access costs one small read and one page whatever the cluster size.
 * It is found by its host offset in its image's xarray, under RCU; a reference
 * (a pin) keeps it. The cache itself holds one pin, and being dirty holds one
 * more, so a block whose only pin is the cache's is clean and may be evicted.
 *
 * A missing block is read once: whoever inserts it reads it, and all others wait
 * for the READING bit. If the read fails, the block leaves the cache again, so
 * that a later look-up tries again.
 *
 * Memory: blocks come from a mempool, so that a look-up always gets one in the
 * end; when the limit is reached, or memory is short, the clock evicts clean
 * blocks. The limit may be exceeded by what is pinned and dirty, which the
 * number of requests in flight and qcow_commit_throttle() bound.
 *
 * A block that is going to be changed is first prepared: it gets its shadow, the
 * page into which a commit copies it. So making it dirty, which happens when I/O
 * completes, needs no memory and cannot fail.
 */
#include <linux/sched.h>
#include <linux/slab.h>

#include "qcow.h"
#include "trace.h"

#define QCOW_CACHE_DEFAULT	(16ULL << 20)
#define QCOW_CACHE_MIN		(256ULL << 10)

static void *qcow_block_pool_alloc(gfp_t gfp, void *data)
{
	struct qcow_block *block = kmalloc(sizeof(*block), gfp);

	if (!block)
		return NULL;
	/* naturally aligned, as direct I/O wants it */
	block->data = kmalloc(QCOW_BLOCK_SIZE, gfp);
	if (!block->data) {
		kfree(block);
		return NULL;
	}
	return block;
}

static void qcow_block_pool_free(void *element, void *data)
{
	struct qcow_block *block = element;

	kfree(block->data);
	kfree(block);
}

static void qcow_block_free_rcu(struct rcu_head *rcu)
{
	struct qcow_block *block = container_of(rcu, struct qcow_block, rcu);

	mempool_free(block, &block->cache->pool);
}

/*
 * The last pin went, and every way to find the block. A look-up that
 * found it before may still try to pin it, so the pool, which may hand it out
 * again at once, gets it only when all of those are over.
 */
static void qcow_block_release(struct qcow_block *block)
{
	if (block->shadow)
		mempool_free(block->shadow, &block->cache->shadows);
	block->shadow = NULL;
	call_rcu(&block->rcu, qcow_block_free_rcu);
}

/**
 * qcow_block_put - drop a pin
 * @block: from qcow_block_get()
 *
 * Context: any.
 */
void qcow_block_put(struct qcow_block *block)
{
	if (!refcount_dec_and_test(&block->pins))
		return;
	qcow_shortcut_forget(block);
	qcow_block_release(block);
}

static struct xarray *qcow_block_tree(struct qcow_image *image, u64 host_offset)
{
	return host_offset & QCOW_BLOCK_VIRTUAL ? &image->virtual_blocks :
						  &image->blocks;
}

static unsigned long qcow_block_index(struct qcow_image *image, u64 host_offset)
{
	return (host_offset & ~QCOW_BLOCK_VIRTUAL) >> image->block_bits;
}

/* Where a long is 32 bits, the cache does not reach as far as the format. */
static bool qcow_block_addressable(struct qcow_image *image, u64 host_offset)
{
	return (host_offset & ~QCOW_BLOCK_VIRTUAL) >> image->block_bits <=
	       ULONG_MAX;
}

/* Take a block, of which we hold a pin, out of sight. Its cache pin is dropped. */
static void qcow_block_unhash(struct qcow_block *block)
{
	struct qcow_image *image = block->image;
	struct qcow_cache *cache = image->cache;
	bool listed;

	xa_cmpxchg(qcow_block_tree(image, block->host_offset),
		   qcow_block_index(image, block->host_offset), block, NULL, 0);
	spin_lock(&cache->lock);
	listed = !list_empty(&block->lru);
	if (listed) {
		list_del_init(&block->lru);
		cache->count -= QCOW_BLOCK_SIZE;
	}
	spin_unlock(&cache->lock);
	if (listed)
		qcow_block_put(block);
}

/*
 * Evict up to @want clean blocks. The hand of the clock goes round at most
 * twice, so that blocks used recently get one more chance.
 */
static unsigned long qcow_cache_evict(struct qcow_cache *cache,
				      unsigned long want)
{
	struct qcow_block *block;
	unsigned long done = 0;
	unsigned long left;
	LIST_HEAD(victims);

	spin_lock(&cache->lock);
	left = 2 * (unsigned long)(cache->count >> QCOW_BLOCK_BITS) + 2;
	while (done < want && left-- && !list_empty(&cache->blocks)) {
		block = list_first_entry(&cache->blocks, struct qcow_block, lru);
		list_move_tail(&block->lru, &cache->blocks);
		if (test_and_clear_bit(QCOW_BLOCK_REFERENCED, &block->state))
			continue;
		/* From one to none: nobody uses it, and nobody can any more. */
		if (!refcount_dec_if_one(&block->pins))
			continue;
		/* What was done with the last of the other pins comes before. */
		smp_acquire__after_ctrl_dep();
		/* While the list has the block, its image exists. */
		qcow_shortcut_forget(block);
		xa_cmpxchg(qcow_block_tree(block->image, block->host_offset),
			   qcow_block_index(block->image, block->host_offset),
			   block, NULL, 0);
		list_move_tail(&block->lru, &victims);
		cache->count -= QCOW_BLOCK_SIZE;
		done++;
	}
	spin_unlock(&cache->lock);

	while (!list_empty(&victims)) {
		block = list_first_entry(&victims, struct qcow_block, lru);
		list_del_init(&block->lru);
		qcow_block_release(block);
	}
	return done;
}

static unsigned long qcow_cache_count(void *private)
{
	struct qcow_cache *cache = private;
	unsigned long count = READ_ONCE(cache->count) >> QCOW_BLOCK_BITS;

	return count ?: SHRINK_EMPTY;
}

static unsigned long qcow_cache_scan(void *private, unsigned long nr)
{
	return qcow_cache_evict(private, nr) ?: SHRINK_STOP;
}

/**
 * qcow_cache_create - a new memory bound
 * @limit: bytes, 0 for the default
 *
 * Return: the cache, to be given back with qcow_cache_put(), or NULL.
 */
struct qcow_cache *qcow_cache_create(u64 limit)
{
	struct qcow_cache *cache = kzalloc(sizeof(*cache), GFP_KERNEL);

	if (!cache)
		return NULL;
	kref_init(&cache->kref);
	spin_lock_init(&cache->lock);
	INIT_LIST_HEAD(&cache->blocks);
	cache->limit = max(limit ?: QCOW_CACHE_DEFAULT, QCOW_CACHE_MIN);
	if (mempool_init(&cache->pool, QCOW_POOL_MIN, qcow_block_pool_alloc,
			 qcow_block_pool_free, NULL))
		goto out_free;
	if (mempool_init_kmalloc_pool(&cache->shadows, QCOW_POOL_MIN,
				      QCOW_BLOCK_SIZE))
		goto out_pool;
	cache->stats = alloc_percpu(struct qcow_cache_stats);
	if (!cache->stats)
		goto out_shadows;
	if (qcow_shrinker_register(&cache->shrinker, qcow_cache_count,
				   qcow_cache_scan, cache, "qcow-tables"))
		goto out_stats;
	if (qcow_unpack_init(&cache->unpack, cache->limit / 4))
		goto out_shrinker;
	return cache;

out_shrinker:
	qcow_shrinker_unregister(&cache->shrinker);
out_stats:
	free_percpu(cache->stats);
out_shadows:
	mempool_exit(&cache->shadows);
out_pool:
	mempool_exit(&cache->pool);
out_free:
	kfree(cache);
	return NULL;
}

static void qcow_cache_release(struct kref *kref)
{
	struct qcow_cache *cache = container_of(kref, struct qcow_cache, kref);

	qcow_unpack_exit(&cache->unpack);
	qcow_shrinker_unregister(&cache->shrinker);
	/* Blocks that are on their way back to the pool. */
	rcu_barrier();
	free_percpu(cache->stats);
	mempool_exit(&cache->shadows);
	mempool_exit(&cache->pool);
	kfree(cache);
}

/**
 * qcow_cache_put - drop a reference
 * @cache: may be NULL
 *
 * Context: may sleep. The images that used it are closed before the last one.
 */
void qcow_cache_put(struct qcow_cache *cache)
{
	if (cache)
		kref_put(&cache->kref, qcow_cache_release);
}

/**
 * qcow_cache_relieve - there is no memory: make some, and wait a moment
 * @cache: where to take it from
 *
 * Context: may sleep; for loops that end when there is memory.
 */
void qcow_cache_relieve(struct qcow_cache *cache)
{
	if (!qcow_cache_evict(cache, 8))
		schedule_timeout_uninterruptible(1);
}

static struct qcow_block *qcow_block_alloc(struct qcow_cache *cache)
{
	struct qcow_block *block;

	if (READ_ONCE(cache->count) >= cache->limit)
		qcow_cache_evict(cache, 2);
	/* Rather an old block than waiting for memory. */
	while (!(block = mempool_alloc(&cache->pool, GFP_NOWAIT | __GFP_NOWARN))) {
		qcow_cache_evict(cache, 1);
		schedule_timeout_uninterruptible(1);
	}
	return block;
}

/* Find a block and pin it. NULL if it is not there. */
static struct qcow_block *qcow_block_lookup(struct qcow_image *image,
					    u64 host_offset)
{
	struct qcow_block *block;

	rcu_read_lock();
	block = xa_load(qcow_block_tree(image, host_offset),
			qcow_block_index(image, host_offset));
	if (block && !refcount_inc_not_zero(&block->pins))
		block = NULL;
	rcu_read_unlock();
	return block;
}

/**
 * qcow_block_used - a block has been found
 * @block: the block
 *
 * Context: any.
 */
void qcow_block_used(struct qcow_block *block)
{
	if (!test_bit(QCOW_BLOCK_REFERENCED, &block->state))
		set_bit(QCOW_BLOCK_REFERENCED, &block->state);
	this_cpu_inc(block->cache->stats->hits);
}

/**
 * qcow_block_peek - a block of a table, if it is in memory
 * @image: whose table
 * @host_offset: of the block, bytes, a multiple of the image's block size
 *
 * Context: an RCU read section, in which the block stays.
 *
 * Return: the block, without a pin, or NULL.
 */
struct qcow_block *qcow_block_peek(struct qcow_image *image, u64 host_offset)
{
	struct qcow_block *block;

	if (!qcow_block_addressable(image, host_offset))
		return NULL;
	block = xa_load(qcow_block_tree(image, host_offset),
			qcow_block_index(image, host_offset));
	if (!block || !test_bit_acquire(QCOW_BLOCK_UPTODATE, &block->state))
		return NULL;
	qcow_block_used(block);
	return block;
}

/* Wait until somebody else's read is over. */
static struct qcow_block *qcow_block_wait(struct qcow_block *block)
{
	wait_on_bit(&block->state, QCOW_BLOCK_READING, TASK_UNINTERRUPTIBLE);
	if (likely(test_bit(QCOW_BLOCK_UPTODATE, &block->state)))
		return block;
	qcow_block_put(block);
	return ERR_PTR(-EIO);
}

static int qcow_block_fill(struct qcow_block *block)
{
	struct qcow_image *image = block->image;
	u32 size = qcow_block_size(image);
	int err;

	if (block->host_offset & QCOW_BLOCK_VIRTUAL) {
		memset(block->data, 0, size);
		return 0;
	}
	this_cpu_inc(block->cache->stats->misses);
	err = qcow_file_read(&image->file, block->data, size,
			     block->host_offset);
	qcow_hold(QCOW_POINT_TABLE_READ);
	trace_qcow_table_read(image, block->host_offset, size, err);
	return err;
}

/**
 * qcow_block_get - a block of a table, from memory or from the file
 * @image: whose table
 * @host_offset: of the block, bytes, a multiple of the image's block size; of one
 *	that is virtual and not in memory the content is zero
 *
 * Context: may sleep and read the file. Inside an epoch this is fine.
 *
 * Return: the block with a pin, to be dropped with qcow_block_put(); or an
 * ERR_PTR() with the errno of the read.
 */
struct qcow_block *qcow_block_get(struct qcow_image *image, u64 host_offset)
{
	unsigned long index = qcow_block_index(image, host_offset);
	struct qcow_cache *cache = image->cache;
	struct qcow_block *block, *old;
	int err;

	/* Before the look-up: its index would be cut off. */
	if (!qcow_block_addressable(image, host_offset))
		return ERR_PTR(-EFBIG);
	block = qcow_block_lookup(image, host_offset);
	if (likely(block)) {
		if (unlikely(!test_bit_acquire(QCOW_BLOCK_UPTODATE,
					       &block->state)))
			return qcow_block_wait(block);
		qcow_block_used(block);
		return block;
	}

	block = qcow_block_alloc(cache);
	block->cache = cache;
	block->image = image;
	block->host_offset = host_offset;
	block->state = BIT(QCOW_BLOCK_READING) | BIT(QCOW_BLOCK_REFERENCED);
	block->shadow = NULL;
	block->writers = 0;
	block->dirty = false;
	block->writing = false;
	block->written = false;
	block->placed = false;
	block->resolved = false;
	block->shortcut = 0;
	block->kind = QCOW_BLOCK_KINDS;
	INIT_LIST_HEAD(&block->dirty_node);
	INIT_LIST_HEAD(&block->writing_node);
	seqcount_spinlock_init(&block->seq, &image->lock);
	INIT_LIST_HEAD(&block->lru);
	/* One pin for the cache, one for us. */
	refcount_set(&block->pins, 2);

	for (;;) {
		old = xa_cmpxchg(qcow_block_tree(image, host_offset), index,
				 NULL, block, GFP_NOIO);
		if (!old)
			break;
		if (xa_is_err(old)) {
			/* No memory for a node of the tree */
			qcow_cache_relieve(cache);
			continue;
		}
		/* Somebody was faster, or an evicted block is on its way out. */
		old = qcow_block_lookup(image, host_offset);
		if (old) {
			qcow_block_put(block);
			qcow_block_put(block);
			return qcow_block_wait(old);
		}
		cond_resched();
	}

	err = qcow_block_fill(block);
	if (!err) {
		/* Whoever sees the bit sees the data. */
		smp_mb__before_atomic();
		set_bit(QCOW_BLOCK_UPTODATE, &block->state);
	}
	spin_lock(&cache->lock);
	list_add_tail(&block->lru, &cache->blocks);
	cache->count += QCOW_BLOCK_SIZE;
	spin_unlock(&cache->lock);
	clear_and_wake_up_bit(QCOW_BLOCK_READING, &block->state);
	if (err) {
		qcow_block_unhash(block);
		qcow_block_put(block);
		return ERR_PTR(err);
	}
	return block;
}

/**
 * qcow_block_claim_locked - decide which step of a commit writes a block
 * @block: pinned
 * @kind: how it is going to be changed
 *
 * Only damaged tables use the same block in two ways.
 *
 * Context: image->lock is held.
 *
 * Return: 0; -EIO if the block is of the other kind, which marks the image
 * corrupt.
 */
int qcow_block_claim_locked(struct qcow_block *block, enum qcow_block_kind kind)
{
	lockdep_assert_held(&block->image->lock);
	if (likely(block->kind == kind))
		return 0;
	if (block->kind == QCOW_BLOCK_KINDS) {
		block->kind = kind;
		return 0;
	}
	qcow_image_corrupt(block->image, "host offset 0x%llx is in use as a refcount block and as another table",
			   block->host_offset);
	return -EIO;
}

/**
 * qcow_block_place - take the space that a block needs in the file
 * @block: an L1 or refcount table block, prepared by the caller
 *
 * Where the file has a hole, or ends, a commit may lack it later. Once for each time
 * that the block is cached, since it stops all I/O on some file systems.
 *
 * Context: may sleep.
 *
 * Return: 0, -ENOSPC or -EDQUOT.
 */
int qcow_block_place(struct qcow_block *block)
{
	struct qcow_image *image = block->image;
	int err;

	if (READ_ONCE(block->placed))
		return 0;
	err = qcow_file_allocate(&image->file, block->host_offset,
				 qcow_block_size(image));
	if (!err)
		WRITE_ONCE(block->placed, true);
	return err;
}

/**
 * qcow_block_prepare - announce changes to a block that links clusters
 * @block: an L1, L2 or refcount table block, pinned by the caller
 *
 * Afterwards qcow_block_dirty_locked() with QCOW_BLOCK_LINK is allowed until
 * qcow_block_unprepare().
 *
 * Context: may sleep, and may run a commit to get memory; so not inside an epoch
 * and not under commit_mutex or alloc_mutex.
 *
 * Return: 0, -EIO if the block has counts in it, or the errno of that commit.
 */
int qcow_block_prepare(struct qcow_block *block)
{
	struct qcow_image *image = block->image;
	void *shadow = NULL;
	unsigned long flags;
	bool done;
	int err;

	for (;;) {
		spin_lock_irqsave(&image->lock, flags);
		err = qcow_block_claim_locked(block, QCOW_BLOCK_LINK);
		if (!err && !block->shadow)
			swap(block->shadow, shadow);
		done = !err && block->shadow;
		if (done)
			block->writers++;
		spin_unlock_irqrestore(&image->lock, flags);
		if (done || err)
			break;
		shadow = mempool_alloc(&image->cache->shadows,
				       GFP_NOWAIT | __GFP_NOWARN);
		if (shadow)
			continue;
		/* Shadows come back when their blocks have been written. */
		err = qcow_commit(image);
		if (err)
			break;
		schedule_timeout_uninterruptible(1);
	}
	if (shadow)
		mempool_free(shadow, &image->cache->shadows);
	return err;
}

static void *qcow_block_take_shadow(struct qcow_block *block)
{
	void *shadow = NULL;

	if (!block->writers && !block->dirty && !block->writing)
		swap(block->shadow, shadow);
	return shadow;
}

/**
 * qcow_block_unprepare - no more changes from this writer
 * @block: prepared by the caller
 *
 * Context: any.
 */
void qcow_block_unprepare(struct qcow_block *block)
{
	struct qcow_image *image = block->image;
	unsigned long flags;
	void *shadow;

	spin_lock_irqsave(&image->lock, flags);
	block->writers--;
	shadow = qcow_block_take_shadow(block);
	spin_unlock_irqrestore(&image->lock, flags);
	if (shadow)
		mempool_free(shadow, &image->cache->shadows);
}

/**
 * qcow_block_dirty_locked - the content has just been changed
 * @block: pinned; prepared if it links clusters, claimed if it counts them
 *
 * Context: image->lock is held, and was while the content changed.
 */
void qcow_block_dirty_locked(struct qcow_block *block)
{
	struct qcow_image *image = block->image;

	lockdep_assert_held(&image->lock);
	if (block->dirty)
		return;
	block->dirty = true;
	refcount_inc(&block->pins);
	list_add_tail(&block->dirty_node, &image->dirty[block->kind]);
	image->nr_dirty++;
	qcow_commit_arm_locked(image);
}

/**
 * qcow_block_copy_locked - what of a block that links clusters is for the disk
 * @block: an L1, L2 or refcount table block
 * @to: where to copy it
 *
 * Context: image->lock is held.
 */
void qcow_block_copy_locked(struct qcow_block *block, void *to)
{
	struct qcow_image *image = block->image;
	unsigned int step = image->subclusters > 1 ? 2 : 1;
	__be64 *words = to;
	unsigned int i;

	lockdep_assert_held(&image->lock);
	memcpy(to, block->data, qcow_block_size(image));
	if (likely(!block->resolved))
		return;
	for (i = 0; i < qcow_l2_per_block(image); i++, words += step)
		if (qcow_is_tagged(be64_to_cpu(*words)))
			*words = 0;
}

/**
 * qcow_block_written - a commit is finished with a block
 * @block: with @block->writing set; the pin of its dirtiness is dropped here,
 *	or, if it stays dirty, kept
 * @ok: it was written
 *
 * Context: process.
 */
void qcow_block_written(struct qcow_block *block, bool ok)
{
	struct qcow_image *image = block->image;
	unsigned long flags;
	bool keep = false;
	void *shadow;

	spin_lock_irqsave(&image->lock, flags);
	block->writing = false;
	if (!ok && !block->dirty) {
		block->dirty = true;
		list_add(&block->dirty_node, &image->dirty[block->kind]);
		image->nr_dirty++;
		keep = true;
	}
	shadow = qcow_block_take_shadow(block);
	spin_unlock_irqrestore(&image->lock, flags);
	if (shadow)
		mempool_free(shadow, &image->cache->shadows);
	if (!keep)
		qcow_block_put(block);
}

/**
 * qcow_cache_drop - forget the cached blocks of a range of the file
 * @image: whose
 * @host_offset: bytes
 * @len: bytes
 *
 * For clusters to which nothing points any more: whatever is written there next,
 * it is not what the cache holds. And for tables of layers that never change, which
 * are of no more use: who still uses a block, or reads it just now, may have another
 * copy of it than who asks next, and both are right.
 *
 * Context: may sleep.
 *
 * Return: 0; -EIO if a table there is being changed, so that something does point
 * there: the tables are damaged.
 */
int qcow_cache_drop(struct qcow_image *image, u64 host_offset, u64 len)
{
	unsigned long first = qcow_block_index(image, host_offset);
	unsigned long last = qcow_block_index(image, host_offset + len - 1);
	struct qcow_block *block;
	unsigned long index;
	bool busy = false;

	if (!qcow_block_addressable(image, host_offset + len - 1))
		return 0;
	xa_for_each_range(&image->blocks, index, block, first, last) {
		block = qcow_block_lookup(image, (u64)index << image->block_bits);
		if (!block)
			continue;
		spin_lock_irq(&image->lock);
		/* Prepared it may be, by who is about to see that it has moved. */
		busy = block->dirty || block->writing;
		spin_unlock_irq(&image->lock);
		if (!busy)
			qcow_block_unhash(block);
		qcow_block_put(block);
		if (busy)
			break;
	}
	if (!busy)
		return 0;
	qcow_image_corrupt(image, "the table at host offset 0x%llx was freed while it is in use",
			   (u64)index << image->block_bits);
	return -EIO;
}

/**
 * qcow_cache_drop_all - forget all blocks of an image that is closed
 * @image: nobody else uses it any more
 *
 * What is still dirty is lost. Afterwards the cache does not know the image.
 *
 * Context: may sleep.
 */
void qcow_cache_drop_all(struct qcow_image *image)
{
	struct qcow_cache *cache = image->cache;
	struct qcow_block *block, *next;
	LIST_HEAD(blocks);

	spin_lock(&cache->lock);
	list_for_each_entry_safe(block, next, &cache->blocks, lru) {
		if (block->image != image)
			continue;
		list_move_tail(&block->lru, &blocks);
		cache->count -= QCOW_BLOCK_SIZE;
	}
	spin_unlock(&cache->lock);

	list_for_each_entry_safe(block, next, &blocks, lru) {
		list_del_init(&block->lru);
		xa_erase(qcow_block_tree(image, block->host_offset),
			 qcow_block_index(image, block->host_offset));
		if (block->dirty) {
			list_del(&block->dirty_node);
			block->dirty = false;
			qcow_block_put(block);
		}
		qcow_block_put(block);
	}
	xa_destroy(&image->virtual_blocks);
	xa_destroy(&image->blocks);
}
