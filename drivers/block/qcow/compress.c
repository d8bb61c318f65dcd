// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reading compressed clusters: decompressing them, and keeping what came out.
 *
 * A compressed cluster is a stream of bytes anywhere in the file, up to two
 * clusters long, which decompresses to one cluster. Its L2 entry says where the
 * stream begins and how many sectors it touches, but not where it ends: what
 * follows in the last sector belongs to others. So decompressing stops when the
 * cluster is full. A stream that is damaged, or too short for a cluster, fails
 * the request that met it and nothing else; it is data, not metadata, so it does
 * not make the image corrupt.
 *
 * Decompressed clusters are kept for a while, for the next small read of the same
 * cluster. Whoever needs one that is not there inserts it, reads the stream and
 * decompresses it; all others wait for the READING bit. The memory is charged to
 * the cache of the image's tables, beside these: a quarter of its limit.
 *
 * No lock is held over reading and decompressing, so this runs on as many CPUs as
 * there are requests, and it may run inside an epoch: it waits for memory, for
 * the image's file, and for others that do the same, never for a commit.
 *
 * Why a kept cluster is never stale. It is found by its image and L2 entry, and
 * its content depends on nothing but bytes of the host clusters that the entry
 * refers to. In an image that is written, the bytes of a stream do not change
 * while its host clusters are counted: compressed clusters are never overwritten
 * in place. When a count goes to zero, qcow_reclaim_run() first calls
 * qcow_unpack_drop(), which forgets all that came from there. It does so after
 * all epochs are over that had begun when the last entry was removed, and whoever
 * decompresses is inside one from the look-up of the entry on; so nobody is left
 * who could insert the old content later. Images that are only read do not
 * change.
 *
 * Why this makes progress when memory is short, when the request may be one that
 * reclaim waits for. It takes two things: an unpacker (see struct qcow_coder) and
 * memory for the cluster. One of each is set aside when an image is
 * opened, large enough for each image of the cache. Unpackers are taken before
 * memory for a cluster, and are given back without waiting for another one. Who
 * has an unpacker and waits for memory gets it in the end: all clusters that are
 * not in use are evicted for it, the one set aside among them, and those in use
 * are being copied from, or being decompressed by somebody who has all it takes.
 *
 * An unpacker is held while the file is read, which may lie on another device of
 * this driver. That one then existed before this device's attach, and so did the
 * caches that its images are charged to: waiting goes from younger to older
 * caches, never round.
 */
#include <linux/hash.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>

#include "qcow.h"
#include "trace.h"

/* So many of the largest clusters are kept, however low the limit. */
#define QCOW_UNPACKED_MIN	4

/* ---- decompressed clusters ----------------------------------------------- */

/* struct qcow_unpacked.state */
enum {
	QCOW_UNPACKED_READING,	/* bit: being decompressed */
};

/**
 * struct qcow_unpacked - a decompressed cluster
 * @hash: in unpack->hash; not if it failed
 * @lru: in unpack->lru, likewise
 * @image: whose
 * @descriptor: its L2 entry
 * @size: bytes that it is charged with
 * @pins: users, and one for being in the hash
 * @state: bits above
 * @error: what READING ended with
 * @spare: the one that is set aside
 * @data: the content
 */
struct qcow_unpacked {
	struct hlist_node hash;
	struct list_head lru;
	struct qcow_image *image;
	u64 descriptor;
	size_t size;
	unsigned int pins;
	unsigned long state;
	int error;
	bool spare;
	void *data;
};

static struct hlist_head *qcow_unpacked_bucket(struct qcow_image *image,
					       u64 descriptor)
{
	u64 key = descriptor ^ (unsigned long)image;

	return &image->cache->unpack.hash[hash_64(key, QCOW_UNPACK_HASH_BITS)];
}

static void qcow_unpacked_destroy(struct qcow_unpacked *unpacked)
{
	kvfree(unpacked->data);
	kfree(unpacked);
}

static struct qcow_unpacked *qcow_unpacked_create(size_t size, gfp_t gfp)
{
	struct qcow_unpacked *unpacked = kzalloc(sizeof(*unpacked), gfp);

	if (!unpacked)
		return NULL;
	unpacked->data = kvmalloc(size, gfp);
	if (!unpacked->data) {
		kfree(unpacked);
		return NULL;
	}
	return unpacked;
}

/* Only to set one aside: that one comes back to the pool. */
static void *qcow_unpacked_pool_alloc(gfp_t gfp, void *data)
{
	struct qcow_unpack *unpack = data;
	struct qcow_unpacked *unpacked;

	if (!gfpflags_allow_blocking(gfp))
		return NULL;
	unpacked = qcow_unpacked_create(1UL << unpack->cluster_bits, gfp);
	if (unpacked)
		unpacked->spare = true;
	return unpacked;
}

static void qcow_unpacked_pool_free(void *element, void *data)
{
	qcow_unpacked_destroy(element);
}

static void qcow_unpacked_free(struct qcow_unpack *unpack,
			       struct qcow_unpacked *unpacked)
{
	if (unpacked->spare)
		mempool_free(unpacked, &unpack->spares);
	else
		qcow_unpacked_destroy(unpacked);
}

static void qcow_unpacked_put(struct qcow_unpack *unpack,
			      struct qcow_unpacked *unpacked)
{
	bool last;

	spin_lock(&unpack->lock);
	last = !--unpacked->pins;
	spin_unlock(&unpack->lock);
	if (last)
		qcow_unpacked_free(unpack, unpacked);
}

/* Take a cluster out of sight. Returns true if nobody uses it. */
static bool qcow_unpacked_unhash(struct qcow_unpack *unpack,
				 struct qcow_unpacked *unpacked)
{
	lockdep_assert_held(&unpack->lock);
	hlist_del_init(&unpacked->hash);
	list_del(&unpacked->lru);
	unpack->bytes -= unpacked->size;
	unpacked->image->nr_unpacked--;
	return !--unpacked->pins;
}

static void qcow_unpacked_free_list(struct qcow_unpack *unpack,
				    struct list_head *list)
{
	struct qcow_unpacked *unpacked, *next;

	list_for_each_entry_safe(unpacked, next, list, lru)
		qcow_unpacked_free(unpack, unpacked);
}

/* Take out clusters that nobody uses, the oldest first, of @want bytes or more. */
static u64 qcow_unpack_evict(struct qcow_unpack *unpack, u64 want,
			     struct list_head *victims)
{
	struct qcow_unpacked *unpacked, *next;
	u64 done = 0;

	spin_lock(&unpack->lock);
	list_for_each_entry_safe(unpacked, next, &unpack->lru, lru) {
		if (done >= want)
			break;
		if (unpacked->pins > 1)
			continue;
		done += unpacked->size;
		qcow_unpacked_unhash(unpack, unpacked);
		list_add(&unpacked->lru, victims);
	}
	spin_unlock(&unpack->lock);
	return done;
}

static unsigned long qcow_unpack_count(void *private)
{
	struct qcow_unpack *unpack = private;
	unsigned long count = READ_ONCE(unpack->bytes) >> PAGE_SHIFT;

	return count ?: SHRINK_EMPTY;
}

static unsigned long qcow_unpack_scan(void *private, unsigned long nr)
{
	LIST_HEAD(victims);
	u64 done = qcow_unpack_evict(private, (u64)nr << PAGE_SHIFT, &victims);

	qcow_unpacked_free_list(private, &victims);
	return done >> PAGE_SHIFT ?: SHRINK_STOP;
}

/* One of the victims that has the right size, or NULL. */
static struct qcow_unpacked *qcow_unpacked_pick(struct list_head *victims,
						size_t size)
{
	struct qcow_unpacked *unpacked;

	list_for_each_entry(unpacked, victims, lru) {
		if (unpacked->size == size && !unpacked->spare) {
			list_del(&unpacked->lru);
			return unpacked;
		}
	}
	return NULL;
}

/*
 * Memory for a cluster. When the limit is reached, that of one that is evicted is used
 * again: kernels that clear all memory that they give out would take a while for it.
 */
static struct qcow_unpacked *qcow_unpacked_alloc(struct qcow_image *image)
{
	struct qcow_unpack *unpack = &image->cache->unpack;
	u32 cluster_size = qcow_cluster_size(image);
	size_t size = cluster_size + sizeof(struct qcow_unpacked);
	struct qcow_unpacked *unpacked;
	LIST_HEAD(victims);
	u64 over;

	over = READ_ONCE(unpack->bytes) + size;
	if (over > unpack->limit)
		qcow_unpack_evict(unpack, over - unpack->limit, &victims);
	for (;;) {
		unpacked = qcow_unpacked_pick(&victims, size);
		qcow_unpacked_free_list(unpack, &victims);
		if (!unpacked)
			unpacked = qcow_unpacked_create(cluster_size, GFP_NOIO |
							__GFP_NORETRY |
							__GFP_NOWARN);
		if (!unpacked)
			unpacked = mempool_alloc(&unpack->spares,
						 GFP_NOWAIT | __GFP_NOWARN);
		if (unpacked)
			break;
		INIT_LIST_HEAD(&victims);
		if (!qcow_unpack_evict(unpack, 1, &victims))
			schedule_timeout_uninterruptible(1);
	}
	unpacked->image = image;
	unpacked->size = size;
	unpacked->state = BIT(QCOW_UNPACKED_READING);
	unpacked->error = 0;
	return unpacked;
}

/* Find a decompressed cluster, or insert @fresh in its place. */
static struct qcow_unpacked *qcow_unpacked_find(struct qcow_image *image,
						u64 descriptor,
						struct qcow_unpacked *fresh)
{
	struct hlist_head *bucket = qcow_unpacked_bucket(image, descriptor);
	struct qcow_unpack *unpack = &image->cache->unpack;
	struct qcow_unpacked *unpacked;

	spin_lock(&unpack->lock);
	hlist_for_each_entry(unpacked, bucket, hash) {
		if (unpacked->image != image ||
		    unpacked->descriptor != descriptor)
			continue;
		unpacked->pins++;
		list_move_tail(&unpacked->lru, &unpack->lru);
		goto out;
	}
	unpacked = fresh;
	if (fresh) {
		fresh->descriptor = descriptor;
		fresh->pins = 2;
		hlist_add_head(&fresh->hash, bucket);
		list_add_tail(&fresh->lru, &unpack->lru);
		unpack->bytes += fresh->size;
		image->nr_unpacked++;
	}
out:
	spin_unlock(&unpack->lock);
	return unpacked;
}

static int qcow_unpack_fill(struct qcow_image *image,
			    struct qcow_coder *unpacker,
			    struct qcow_unpacked *unpacked)
{
	u64 size = qcow_file_size(&image->file);
	u64 host_offset, start, old_size;
	struct iov_iter iter;
	u32 length, skip;
	int err;

	qcow_packed_range(image, unpacked->descriptor, &host_offset, &length);
	start = round_down(host_offset, QCOW_SECTOR);
	skip = host_offset - start;
	iov_iter_bvec(&iter, ITER_DEST, unpacker->vecs, unpacker->nr_vecs,
		      skip + length);
	err = qcow_file_rw(&image->file, &iter, start, 0);
	qcow_hold(QCOW_POINT_UNPACK);
	if (!err) {
		if (is_vmalloc_addr(unpacker->data))
			invalidate_kernel_vmap_range(unpacker->data,
						     skip + length);
		/*
		 * What a file lacks that has been cut is zero, of which zlib would
		 * make something. Looked at after the read: the entry that led here
		 * came behind what qcow_take() did.
		 */
		old_size = READ_ONCE(image->old_size);
		if (old_size > host_offset)
			size = old_size;
		length = min_t(u64, length,
			       size > host_offset ? size - host_offset : 0);
		err = qcow_codec(image)->unpack(unpacker,
						unpacker->data + skip, length,
						unpacked->data,
						qcow_cluster_size(image));
		if (err)
			pr_warn_ratelimited("qcow: %pD: what is compressed at host offset 0x%llx cannot be decompressed\n",
					    image->file.file, host_offset);
	}
	trace_qcow_unpack(image, host_offset, length, err);
	return err;
}

/* Decompress a cluster that has been inserted, and tell those who wait. */
static void qcow_unpack_finish(struct qcow_image *image,
			       struct qcow_coder *unpacker,
			       struct qcow_unpacked *unpacked)
{
	struct qcow_unpack *unpack = &image->cache->unpack;
	int err = qcow_unpack_fill(image, unpacker, unpacked);

	spin_lock(&unpack->lock);
	unpacked->error = err;
	/* Damaged tables may have had it dropped under our eyes. */
	if (err && !hlist_unhashed(&unpacked->hash))
		qcow_unpacked_unhash(unpack, unpacked);
	spin_unlock(&unpack->lock);
	clear_and_wake_up_bit(QCOW_UNPACKED_READING, &unpacked->state);
}

/* The decompressed cluster, pinned, or an ERR_PTR(). */
static struct qcow_unpacked *qcow_unpacked_get(struct qcow_image *image,
					       u64 descriptor)
{
	struct qcow_unpack *unpack = &image->cache->unpack;
	struct qcow_unpacked *unpacked, *fresh = NULL;
	struct qcow_coder *unpacker = NULL;
	int err;

	unpacked = qcow_unpacked_find(image, descriptor, NULL);
	if (!unpacked) {
		unpacker = mempool_alloc(&unpack->unpackers.pool, GFP_NOIO);
		fresh = qcow_unpacked_alloc(image);
		unpacked = qcow_unpacked_find(image, descriptor, fresh);
		if (unpacked == fresh)
			qcow_unpack_finish(image, unpacker, fresh);
		else
			qcow_unpacked_free(unpack, fresh);
		mempool_free(unpacker, &unpack->unpackers.pool);
	}
	wait_on_bit(&unpacked->state, QCOW_UNPACKED_READING,
		    TASK_UNINTERRUPTIBLE);
	err = unpacked->error;
	if (!err)
		return unpacked;
	qcow_unpacked_put(unpack, unpacked);
	return ERR_PTR(err);
}

/**
 * qcow_unpack_read - read a part of a compressed cluster
 * @image: whose
 * @descriptor: its L2 entry, as qcow_map() gave it
 * @skip: where in the cluster to begin, bytes
 * @iter: where to copy it; filled as a whole, within the cluster
 *
 * Context: may sleep and read the file. Inside an epoch, if the image is written.
 *
 * Return: 0; -EIO if the data is damaged; or the errno of the read.
 */
int qcow_unpack_read(struct qcow_image *image, u64 descriptor, u32 skip,
		     struct iov_iter *iter)
{
	size_t length = iov_iter_count(iter);
	struct qcow_unpacked *unpacked;
	int err = 0;

	unpacked = qcow_unpacked_get(image, descriptor);
	if (IS_ERR(unpacked))
		return PTR_ERR(unpacked);
	if (copy_to_iter(unpacked->data + skip, length, iter) != length)
		err = -EIO;
	qcow_unpacked_put(&image->cache->unpack, unpacked);
	return err;
}

/**
 * qcow_unpack_drop - forget what was decompressed from a range of the file
 * @image: whose
 * @host_offset: bytes
 * @len: bytes
 *
 * Context: may sleep. Nobody reads compressed clusters there any more.
 */
void qcow_unpack_drop(struct qcow_image *image, u64 host_offset, u64 len)
{
	struct qcow_unpack *unpack = &image->cache->unpack;
	struct qcow_unpacked *unpacked, *next;
	LIST_HEAD(victims);
	u32 length;
	u64 pos;

	/* Mostly nothing in an image that is written is compressed. */
	if (!READ_ONCE(image->nr_unpacked))
		return;
	spin_lock(&unpack->lock);
	list_for_each_entry_safe(unpacked, next, &unpack->lru, lru) {
		if (unpacked->image != image)
			continue;
		qcow_packed_range(image, unpacked->descriptor, &pos, &length);
		if (pos >= host_offset + len || pos + length <= host_offset)
			continue;
		if (qcow_unpacked_unhash(unpack, unpacked))
			list_add(&unpacked->lru, &victims);
	}
	spin_unlock(&unpack->lock);
	qcow_unpacked_free_list(unpack, &victims);
}

/**
 * qcow_unpack_drop_all - forget all of an image that is closed
 * @image: nobody else uses it any more
 *
 * Context: may sleep.
 */
void qcow_unpack_drop_all(struct qcow_image *image)
{
	qcow_unpack_drop(image, 0, U64_MAX);
}

/* ---- the memory for all that --------------------------------------------- */

/**
 * qcow_unpack_init - prepare for images
 * @unpack: zeroed
 * @limit: bytes of decompressed clusters to keep
 *
 * Return: 0 or -ENOMEM.
 */
int qcow_unpack_init(struct qcow_unpack *unpack, u64 limit)
{
	spin_lock_init(&unpack->lock);
	INIT_LIST_HEAD(&unpack->lru);
	unpack->limit = limit;
	return qcow_shrinker_register(&unpack->shrinker, qcow_unpack_count,
				      qcow_unpack_scan, unpack,
				      "qcow-clusters");
}

/**
 * qcow_unpack_exit - undo qcow_unpack_init()
 * @unpack: no image uses it any more
 */
void qcow_unpack_exit(struct qcow_unpack *unpack)
{
	qcow_shrinker_unregister(&unpack->shrinker);
	mempool_exit(&unpack->unpackers.pool);
	mempool_exit(&unpack->spares);
}

/**
 * qcow_unpack_reserve - set aside what it takes to read compressed clusters
 * @image: a qcow2 image that is being opened
 *
 * Whether the image has any is not known before one is met, and then it may be
 * too late to ask for memory. There is no I/O yet on images of this cache: they are
 * opened one after the other by an attach that has no device yet, and until it has
 * them all, no other attach can come to share one.
 *
 * Return: 0 or -ENOMEM.
 */
int qcow_unpack_reserve(struct qcow_image *image)
{
	struct qcow_unpack *unpack = &image->cache->unpack;
	size_t workspace_size = qcow_codec(image)->unpack_size();
	size_t room;

	if (image->cluster_bits <= unpack->cluster_bits &&
	    workspace_size <= unpack->unpackers.workspace_size)
		return 0;
	mempool_exit(&unpack->unpackers.pool);
	mempool_exit(&unpack->spares);
	unpack->cluster_bits = max(unpack->cluster_bits, image->cluster_bits);
	workspace_size = max(workspace_size, unpack->unpackers.workspace_size);
	unpack->limit = max(unpack->limit, (u64)QCOW_UNPACKED_MIN <<
					   unpack->cluster_bits);
	/* The longest stream that an entry can describe. */
	room = 2UL << unpack->cluster_bits;
	return qcow_coders_init(&unpack->unpackers, workspace_size, room) ?:
	       mempool_init(&unpack->spares, 1, qcow_unpacked_pool_alloc,
			    qcow_unpacked_pool_free, unpack);
}
