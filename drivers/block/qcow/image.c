// SPDX-License-Identifier: GPL-2.0-only
/*
 * Open images.
 *
 * An image that is only read never changes, so all devices that use the same
 * file in the same format share one struct qcow_image, and with it one copy of
 * its tables in memory. An image that is written belongs to one device; its file
 * can have no other user.
 */
#include <linux/file.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include <linux/qcow.h>

#include "qcow.h"

/* Nodes set aside for when memory is short. */
#define QCOW_FREE_POOL_MIN	64

static LIST_HEAD(qcow_images);
static DEFINE_MUTEX(qcow_images_mutex);

/**
 * qcow_image_corrupt - damage was found
 * @image: the image; one that is written takes no more writes, and from version
 *	3 on gets the corrupt bit
 * @fmt: what is wrong, and where
 *
 * Context: any that may take image->lock; does not wait.
 */
void qcow_image_corrupt(struct qcow_image *image, const char *fmt, ...)
{
	struct va_format vaf = { .fmt = fmt };
	va_list args;

	/* The first one tells what happened; the others may follow from it. */
	if (image->writable && atomic_xchg(&image->damaged, 1))
		return;
	va_start(args, fmt);
	vaf.va = &args;
	pr_err_ratelimited("qcow: %pD: the image is damaged: %pV\n",
			   image->file.file, &vaf);
	if (image->writable)
		qcow_message_set(&image->damage, "%pV", &vaf);
	va_end(args);
	if (!image->writable)
		return;
	/* Who sees it sees the message. */
	smp_store_release(&image->corrupt, true);
	queue_work(image->wq, &image->corrupt_work);
}

/**
 * qcow_image_fail - a barrier failed
 * @image: a writable image; it takes no more writes
 * @fmt: what happened
 *
 * Context: any; does not wait.
 */
void qcow_image_fail(struct qcow_image *image, const char *fmt, ...)
{
	struct va_format vaf = { .fmt = fmt };
	va_list args;

	if (image->failed)
		return;
	WRITE_ONCE(image->failed, true);
	va_start(args, fmt);
	vaf.va = &args;
	pr_err("qcow: %pD: no more writes: %pV\n", image->file.file, &vaf);
	va_end(args);
}

/* Change bytes of the header, whose block is @block, and wait for the disk. */
static int qcow_header_write(struct qcow_image *image, struct qcow_block *block,
			     size_t offset, const void *data, size_t len)
{
	void *copy = image->header_scratch;
	int err;

	lockdep_assert_held(&image->header_mutex);
	spin_lock_irq(&image->lock);
	memcpy(block->data + offset, data, len);
	memcpy(copy, block->data, QCOW_SECTOR);
	spin_unlock_irq(&image->lock);
	err = qcow_file_write(&image->file, copy, QCOW_SECTOR, 0);
	if (!err)
		err = qcow_file_sync(&image->file);
	if (err)
		qcow_image_fail(image, "cannot write the header: error %d", err);
	return err;
}

/**
 * qcow_image_update_header - change fields of the header, durably
 * @image: a writable image
 * @offset: of the first field, bytes; not of the incompatible features
 * @data: the new bytes
 * @len: how many; they lie in one sector, so that the change is atomic
 *
 * What the new fields refer to is durable already.
 *
 * Context: may sleep; takes image->lock.
 *
 * Return: 0 or an errno. After -EIO of the barrier the image has failed.
 */
int qcow_image_update_header(struct qcow_image *image, size_t offset,
			     const void *data, size_t len)
{
	struct qcow_block *block;
	unsigned int scope;
	int err;

	scope = qcow_io_scope_enter();
	block = qcow_block_get(image, 0);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out;
	}
	mutex_lock(&image->header_mutex);
	err = qcow_header_write(image, block, offset, data, len);
	mutex_unlock(&image->header_mutex);
	qcow_block_put(block);
out:
	qcow_io_scope_exit(scope);
	return err;
}

/* Set and clear incompatible features of a version 3 image, durably. */
static int qcow_image_set_features(struct qcow_image *image, u64 set, u64 clear)
{
	struct qcow_block *block;
	unsigned int scope;
	__be64 disk;
	u64 features;
	int err = 0;

	scope = qcow_io_scope_enter();
	block = qcow_block_get(image, 0);
	if (IS_ERR(block)) {
		err = PTR_ERR(block);
		goto out;
	}
	mutex_lock(&image->header_mutex);
	features = (image->incompatible | set) & ~clear;
	disk = cpu_to_be64(features);
	if (features != image->incompatible)
		err = qcow_header_write(image, block,
					offsetof(struct qcow_disk_header,
						 incompatible_features),
					&disk, sizeof(disk));
	if (!err)
		image->incompatible = features;
	mutex_unlock(&image->header_mutex);
	qcow_block_put(block);
out:
	qcow_io_scope_exit(scope);
	return err;
}

/* The corrupt bit cannot be set where damage is found: that may be anywhere. */
static void qcow_corrupt_work_fn(struct work_struct *work)
{
	struct qcow_image *image = container_of(work, struct qcow_image,
						corrupt_work);
	void (*on_corrupt)(void *data);

	if (image->header.version >= 3)
		qcow_image_set_features(image, QCOW_INCOMPAT_CORRUPT, 0);
	/* Afterwards, so that who is told finds the bit set. */
	on_corrupt = smp_load_acquire(&image->on_corrupt);
	if (on_corrupt)
		on_corrupt(image->on_corrupt_data);
}

/**
 * qcow_image_watch - have a function called when damage is found
 * @image: a writable image
 * @on_corrupt: the function; it may sleep
 * @data: what it is called with
 */
void qcow_image_watch(struct qcow_image *image, void (*on_corrupt)(void *data),
		      void *data)
{
	image->on_corrupt_data = data;
	/* Who sees the function sees the data. */
	smp_store_release(&image->on_corrupt, on_corrupt);
}

/**
 * qcow_image_unwatch - it is not called any more, nor still running
 * @image: an image
 *
 * Context: may sleep.
 */
void qcow_image_unwatch(struct qcow_image *image)
{
	WRITE_ONCE(image->on_corrupt, NULL);
	flush_work(&image->corrupt_work);
}

/**
 * qcow_image_stale_counts - counts are about to change, may the file's be late
 * @image: a writable image
 *
 * In an image with lazy refcounts they may, once its dirty bit is durable: the
 * first call sees to that. The bit is cleared when all is written, at detach and
 * where the device is frozen, and then the next call sets it again.
 *
 * Context: may sleep.
 *
 * Return: 0, or the errno of writing the header.
 */
int qcow_image_stale_counts(struct qcow_image *image)
{
	int err;

	if (!(image->header.compatible & QCOW_COMPAT_LAZY_REFCOUNTS) ||
	    READ_ONCE(image->dirty_bit))
		return 0;
	err = qcow_image_set_features(image, QCOW_INCOMPAT_DIRTY, 0);
	if (!err)
		WRITE_ONCE(image->dirty_bit, true);
	return err;
}

static int qcow_read_header(struct qcow_image *image, struct qcow_message *msg)
{
	u32 cluster_size;
	void *buf, *all = NULL;
	u32 pos, step;
	int err;

	buf = kmalloc(QCOW_BLOCK_SIZE, GFP_KERNEL);
	if (!buf)
		return -ENOMEM;
	err = qcow_file_read(&image->file, buf, QCOW_SECTOR, 0);
	if (err) {
		qcow_message_set(msg, "cannot read the header: error %d", -err);
		goto out;
	}
	err = qcow_header_cluster_size(buf, QCOW_SECTOR, &cluster_size, msg);
	if (err)
		goto out;
	all = kvmalloc(cluster_size, GFP_KERNEL);
	err = all ? 0 : -ENOMEM;
	for (pos = 0; pos < cluster_size && !err; pos += step) {
		step = min(cluster_size - pos, QCOW_BLOCK_SIZE);
		err = qcow_file_read(&image->file, buf, step, pos);
		memcpy(all + pos, buf, step);
	}
	if (!err)
		err = qcow_header_parse(all, cluster_size, image->writable,
					&image->header, msg);
out:
	kvfree(all);
	kfree(buf);
	return err;
}

static int qcow_open_qcow2(struct qcow_image *image, const char *snapshot,
			   struct qcow_message *msg)
{
	struct qcow_header *header = &image->header;
	int err;

	err = qcow_read_header(image, msg);
	if (err)
		return err;
	image->cluster_bits = header->cluster_bits;
	image->block_bits = min_t(u32, header->cluster_bits, QCOW_BLOCK_BITS);
	image->l2_bits = header->l2_bits;
	image->subclusters = 1;
	if (header->incompatible & QCOW_INCOMPAT_EXTENDED_L2)
		image->subclusters = QCOW_SUBCLUSTERS;
	image->subcluster_bits = header->cluster_bits - ilog2(image->subclusters);
	image->refcount_order = header->refcount_order;
	image->refblock_bits = header->cluster_bits + 3 - header->refcount_order;
	image->reftable_offset = header->refcount_table_offset;
	image->reftable_clusters = header->refcount_table_clusters;
	image->incompatible = header->incompatible;
	/* The last cluster may be used up to its end; it is just not there yet. */
	atomic64_set(&image->end_offset, round_up(qcow_file_size(&image->file),
						  (u64)qcow_cluster_size(image)));
	if (snapshot) {
		image->snapshot = kstrdup(snapshot, GFP_KERNEL);
		if (!image->snapshot)
			return -ENOMEM;
		err = qcow_snapshot_select(image, snapshot, msg);
		if (err)
			return err;
	}
	image->size = round_down(header->size, QCOW_SECTOR);
	return qcow_shortcut_init(image) ?: qcow_unpack_reserve(image);
}

/* What only an image needs that is written. */
static int qcow_open_writable(struct qcow_image *image,
			      struct qcow_message *msg)
{
	const struct qcow_header *header = &image->header;
	int err;

	if (!qcow_image_has(image, header->l1_table_offset,
			    (u64)header->l1_size * sizeof(__be64)) ||
	    !qcow_image_has(image, header->refcount_table_offset,
			    (u64)header->refcount_table_clusters <<
			    image->cluster_bits)) {
		qcow_message_set(msg, "the file ends before its L1 or refcount table does: it has been cut short");
		return -EINVAL;
	}

	image->scratch = kmalloc(QCOW_BLOCK_SIZE, GFP_KERNEL);
	image->table_scratch = kmalloc(QCOW_BLOCK_SIZE, GFP_KERNEL);
	image->copy_buf = kmalloc(QCOW_BLOCK_SIZE, GFP_KERNEL);
	/* Head and tail of most writes. */
	image->copy_size = min(2 * qcow_cluster_size(image), QCOW_MERGE_FILL);
	image->header_scratch = kmalloc(QCOW_SECTOR, GFP_KERNEL);
	image->bounce = kmalloc(QCOW_BATCH * QCOW_BLOCK_SIZE, GFP_KERNEL);
	if (!image->scratch || !image->table_scratch || !image->copy_buf ||
	    !image->header_scratch || !image->bounce ||
	    mempool_init_kmalloc_pool(&image->free_pool, QCOW_FREE_POOL_MIN,
				      sizeof(struct qcow_free)))
		return -ENOMEM;
	/*
	 * Of its own, with its own rescuer: this image may lie on a device that is
	 * another one. Freezable, since a write during hibernation would outrun
	 * the saved memory.
	 */
	image->wq = alloc_workqueue("qcow-commit", WQ_MEM_RECLAIM |
				    WQ_FREEZABLE | WQ_UNBOUND, 0);
	if (!image->wq)
		return -ENOMEM;
	err = init_srcu_struct(&image->epoch);
	if (err)
		return err;
	image->epoch_ready = true;
	return qcow_overlap_init(image, msg);
}

static void qcow_image_free(struct qcow_image *image)
{
	if (image->wq)
		destroy_workqueue(image->wq);
	if (image->epoch_ready) {
		/* A grace period may have been left behind by the last worker. */
		synchronize_srcu(&image->epoch);
		cleanup_srcu_struct(&image->epoch);
	}
	qcow_cache_drop_all(image);
	qcow_unpack_drop_all(image);
	qcow_pack_exit(image);
	qcow_crypt_exit(image);
	qcow_bitmaps_exit(image);
	xa_destroy(&image->metadata);
	kvfree(image->known);
	kvfree(image->filter);
	kfree(image->shortcuts);
	mempool_exit(&image->free_pool);
	kfree(image->bounce);
	kfree(image->header_scratch);
	while (image->nr_copies)
		kfree(image->copies[--image->nr_copies]);
	kfree(image->copy_buf);
	kfree(image->table_scratch);
	kfree(image->scratch);
	qcow_file_release(&image->data);
	qcow_file_release(&image->file);
	qcow_cache_put(image->cache);
	kfree(image->snapshot);
	kfree(image);
}

static struct qcow_image *qcow_image_alloc(u32 format, bool writable,
					   struct qcow_cache *cache)
{
	struct qcow_image *image = kzalloc(sizeof(*image), GFP_KERNEL);

	if (!image)
		return NULL;
	kref_init(&image->kref);
	kref_get(&cache->kref);
	image->cache = cache;
	image->format = format;
	image->writable = writable;
	xa_init(&image->blocks);
	xa_init(&image->virtual_blocks);
	xa_init(&image->metadata);
	spin_lock_init(&image->lock);
	INIT_LIST_HEAD(&image->registry);
	INIT_LIST_HEAD(&image->dirty[QCOW_BLOCK_COUNT]);
	INIT_LIST_HEAD(&image->dirty[QCOW_BLOCK_LINK]);
	INIT_LIST_HEAD(&image->frees);
	INIT_LIST_HEAD(&image->reclaims);
	INIT_LIST_HEAD(&image->ranges);
	sema_init(&image->l2_writers, QCOW_MAX_L2_WRITERS);
	init_waitqueue_head(&image->range_wait);
	mutex_init(&image->table_mutex);
	mutex_init(&image->commit_mutex);
	mutex_init(&image->reclaim_mutex);
	mutex_init(&image->pack_mutex);
	mutex_init(&image->copy_mutex);
	mutex_init(&image->alloc_mutex);
	mutex_init(&image->header_mutex);
	INIT_DELAYED_WORK(&image->commit_work, qcow_commit_work_fn);
	INIT_WORK(&image->reclaim_work, qcow_reclaim_work_fn);
	INIT_WORK(&image->corrupt_work, qcow_corrupt_work_fn);
	return image;
}

static bool qcow_same_file(const struct file *a, const struct file *b)
{
	return a && b ? a->f_mapping->host == b->f_mapping->host : a == b;
}

/* Does an image that is open have a file that is going to be opened? */
static bool qcow_image_uses(const struct qcow_image *image,
			    const struct file *file)
{
	return file && (qcow_same_file(image->file.file, file) ||
			qcow_same_file(image->data.file, file));
}

/*
 * Find an image that is open already and can be shared: the same disk of the same
 * files in the same format, and doing the I/O that is asked for. NULL if there is
 * none.
 */
static struct qcow_image *
qcow_image_find(const struct qcow_image_source *source, struct qcow_message *msg)
{
	bool direct = source->io_mode == QCOW_IO_DIRECT;
	struct qcow_image *image, *found = NULL;

	lockdep_assert_held(&qcow_images_mutex);
	list_for_each_entry(image, &qcow_images, registry) {
		if (!qcow_image_uses(image, source->file) &&
		    !qcow_image_uses(image, source->data))
			continue;
		if (source->writable || image->writable) {
			qcow_message_set(msg, "%pD is attached already",
					 qcow_image_uses(image, source->file) ?
					 source->file : source->data);
			return ERR_PTR(-EBUSY);
		}
		if (qcow_same_file(image->file.file, source->file) &&
		    qcow_same_file(image->data.file, source->data) &&
		    !image->alone && !image->crypt &&
		    !strcmp(image->snapshot ?: "", source->snapshot ?: "") &&
		    image->format == source->format &&
		    (source->io_mode == QCOW_IO_AUTO ||
		     image->file.direct == direct))
			found = image;
	}
	return source->alone || source->key ? NULL : found;
}

/* The external data file, if the image has one. */
static int qcow_open_data_file(struct qcow_image *image,
			       const struct qcow_image_source *source,
			       struct qcow_message *msg)
{
	const struct qcow_header *header = &image->header;
	int err;

	if (!(header->incompatible & QCOW_INCOMPAT_DATA_FILE)) {
		if (!source->data)
			return 0;
		qcow_message_set(msg, "there is a data file, but the image has its data in itself");
		return -EINVAL;
	}
	if (!source->data) {
		qcow_message_set(msg, "the image has its data in an external data file, which was not given");
		return -EINVAL;
	}
	err = qcow_file_init(&image->data, source->data, image->writable,
			     source->io_mode, msg);
	if (err)
		return err;
	image->data_raw = header->autoclear & QCOW_AUTOCLEAR_RAW_DATA_FILE;
	return 0;
}

/**
 * qcow_image_open - open an image, or share one that is open
 * @source: its files, and how to open them
 * @cache: where its tables are charged, unless it is shared
 * @imagep: out
 * @msg: where to say what is wrong
 *
 * Context: may sleep, for as long as the storage makes it; one caller at a time.
 *
 * Return: 0; -EBUSY if it is written, or to be written, and in use already; or
 * an errno that says why the image is refused.
 */
int qcow_image_open(const struct qcow_image_source *source,
		    struct qcow_cache *cache, struct qcow_image **imagep,
		    struct qcow_message *msg)
{
	struct qcow_image *image;
	int err = 0;

	mutex_lock(&qcow_images_mutex);
	image = qcow_image_find(source, msg);
	if (!IS_ERR_OR_NULL(image))
		kref_get(&image->kref);
	mutex_unlock(&qcow_images_mutex);
	if (image) {
		*imagep = image;
		return PTR_ERR_OR_ZERO(image);
	}

	image = qcow_image_alloc(source->format, source->writable, cache);
	if (!image)
		return -ENOMEM;
	image->alone = source->alone;
	err = qcow_file_init(&image->file, source->file, source->writable,
			     source->io_mode, msg);
	if (err)
		goto out_free;
	if (source->format == QCOW_FORMAT_RAW)
		image->size = round_up(qcow_file_size(&image->file), QCOW_SECTOR);
	else
		err = qcow_open_qcow2(image, source->snapshot, msg) ?:
		      qcow_open_data_file(image, source, msg) ?:
		      qcow_crypt_init(image, source->key, msg);
	if (!err && source->writable)
		err = qcow_open_writable(image, msg);
	if (err)
		goto out_free;
	if (source->no_flush) {
		image->file.no_sync = true;
		image->data.no_sync = true;
		/* A commit costs less. */
		image->file.dsync = false;
		image->data.dsync = false;
	}
	mutex_lock(&qcow_images_mutex);
	list_add(&image->registry, &qcow_images);
	mutex_unlock(&qcow_images_mutex);
	*imagep = image;
	return 0;

out_free:
	qcow_image_free(image);
	return err;
}

/* Have the data file as long as the disk, so that no write of the guest makes it longer. */
static int qcow_image_extend_data(struct qcow_image *image,
				  struct qcow_message *msg)
{
	int err;

	if (!qcow_is_external(image) ||
	    qcow_file_size(&image->data) >= image->size)
		return 0;
	err = image->data.bdev ? -ENOSPC :
				 qcow_file_truncate(&image->data, image->size);
	if (err)
		qcow_message_set(msg, "the data file %pD is shorter than the disk, and cannot be made longer",
				 image->data.file);
	return err;
}

/*
 * Before anything is written, have all of the last cluster in the file, and whole
 * blocks: see qcow_file_truncate().
 */
static int qcow_image_fill_end(struct qcow_image *image)
{
	u64 size = qcow_file_size(&image->file);
	u64 end = atomic64_read(&image->end_offset);
	u64 target = round_up(end, qcow_file_step(&image->file));
	int err;

	if (image->file.bdev)
		return 0;
	image->old_size = size;
	if (!image->file.direct || target == size)
		return 0;
	err = qcow_file_truncate(&image->file, target);
	if (err)
		return err;
	image->filled_to = target;
	image->zero_from = end;
	image->zero_to = target;
	return 0;
}

/*
 * Is what qcow_image_fill_end() has added still all there is at the end, and nothing
 * in it? Clusters that were taken there are in use, though they may hold zeroes.
 */
static bool qcow_image_fill_is_unused(struct qcow_image *image)
{
	u64 pos = round_down(image->old_size, QCOW_BLOCK_SIZE);
	u32 skip = image->old_size - pos;
	bool unused = true;
	void *buf;

	if (!image->filled_to || !image->old_size ||
	    qcow_file_size(&image->file) != image->filled_to ||
	    atomic64_read(&image->end_offset) !=
	    round_up(image->old_size, (u64)qcow_cluster_size(image)))
		return false;
	buf = kmalloc(QCOW_BLOCK_SIZE, GFP_NOIO | __GFP_NOWARN);
	if (!buf)
		return false;
	while (unused && pos < image->filled_to) {
		unused = !qcow_file_read(&image->file, buf, QCOW_BLOCK_SIZE,
					 pos) &&
			 !memchr_inv(buf + skip, 0, QCOW_BLOCK_SIZE - skip);
		pos += QCOW_BLOCK_SIZE;
		skip = 0;
	}
	kfree(buf);
	return unused;
}

/*
 * What those autoclear bits stand for that the driver does not maintain is not so any
 * more after the first write: they are cleared, durably.
 */
static int qcow_image_clear_autoclear(struct qcow_image *image)
{
	u64 maintained = (image->data_raw ? QCOW_AUTOCLEAR_RAW_DATA_FILE : 0) |
			 (image->bitmaps ? QCOW_AUTOCLEAR_BITMAPS : 0);
	__be64 autoclear = cpu_to_be64(image->header.autoclear & maintained);

	if (!(image->header.autoclear & ~maintained))
		return 0;
	return qcow_image_update_header(image,
					offsetof(struct qcow_disk_header,
						 autoclear_features),
					&autoclear, sizeof(autoclear));
}

struct qcow_image_job {
	struct work_struct work;
	struct qcow_image *image;
	int (*fn)(struct qcow_image *image);
	int err;
};

static void qcow_image_job_fn(struct work_struct *work)
{
	struct qcow_image_job *job =
		container_of(work, struct qcow_image_job, work);
	unsigned int scope = qcow_io_scope_enter();

	job->err = job->fn(job->image);
	qcow_io_scope_exit(scope);
}

/*
 * In a worker: the caller may be about to be killed, or may have a limit on the
 * size of files, and neither is a reason to refuse an image, or to lose what was not
 * flushed. One that is a worker already does it itself: if its queue is being frozen,
 * it is waited for, and must not wait for what does not run any more.
 */
static int qcow_image_do(struct qcow_image *image, struct workqueue_struct *wq,
			 int (*fn)(struct qcow_image *image))
{
	struct qcow_image_job job = { .image = image, .fn = fn };

	if (current_work()) {
		qcow_image_job_fn(&job.work);
		return job.err;
	}
	INIT_WORK_ONSTACK(&job.work, qcow_image_job_fn);
	queue_work(wq, &job.work);
	flush_work(&job.work);
	destroy_work_on_stack(&job.work);
	return job.err;
}

/**
 * qcow_image_begin - the image is about to be written, if it is writable
 * @image: just opened, its bitmaps are loaded
 * @msg: where to say what is wrong
 *
 * This is apart from the opening so that an attach that is refused leaves the files
 * as they were.
 *
 * Context: may sleep.
 *
 * Return: 0, or the errno of a write.
 */
int qcow_image_begin(struct qcow_image *image, struct qcow_message *msg)
{
	int err;

	if (!image->writable)
		return 0;
	err = qcow_image_do(image, image->wq, qcow_image_fill_end);
	if (err) {
		qcow_message_set(msg, "%pD cannot be made longer: error %d",
				 image->file.file, -err);
		return err;
	}
	return qcow_image_extend_data(image, msg) ?:
	       qcow_file_uncache(&image->file, msg) ?:
	       qcow_file_uncache(&image->data, msg) ?:
	       qcow_image_clear_autoclear(image) ?: qcow_bitmaps_mark(image);
}

/* All counts are durable. In a damaged image they may be wrong. */
static int qcow_image_clear_dirty(struct qcow_image *image)
{
	int err;

	if (!image->dirty_bit || image->corrupt)
		return 0;
	err = qcow_image_set_features(image, 0, QCOW_INCOMPAT_DIRTY);
	if (!err)
		WRITE_ONCE(image->dirty_bit, false);
	return err;
}

/* Write everything that is left, and give back what was grown ahead of use. */
static int qcow_image_write_all(struct qcow_image *image)
{
	int err, bitmaps_err = 0;
	u64 end;

	err = qcow_commit_all(image);
	if (!err && !qcow_image_error(image)) {
		bitmaps_err = qcow_bitmaps_store(image);
		/* What that has left behind. */
		if (bitmaps_err)
			err = qcow_commit_all(image);
	}
	/* With nothing left to do, or after a failure, none of them arms another. */
	if (err)
		WRITE_ONCE(image->failed, true);
	cancel_delayed_work_sync(&image->commit_work);
	cancel_work_sync(&image->reclaim_work);
	cancel_delayed_work_sync(&image->commit_work);
	flush_work(&image->corrupt_work);
	if (err)
		return err;
	end = qcow_image_fill_is_unused(image) ? image->old_size :
						 atomic64_read(&image->end_offset);
	if (!image->file.bdev && qcow_file_size(&image->file) > end)
		err = qcow_file_truncate(&image->file, end);
	if (!err)
		err = qcow_file_sync(&image->file);
	return err ?: qcow_image_clear_dirty(image) ?: bitmaps_err;
}

static int qcow_image_write_dirty(struct qcow_image *image)
{
	return qcow_commit_all(image) ?: qcow_image_clear_dirty(image);
}

/**
 * qcow_image_settle - make the file consistent by itself
 * @image: a writable image; nobody changes it until this returns
 *
 * On return nothing of it is in memory only, no commit has anything to write, and
 * the header's dirty bit is cleared, unless damage was found.
 *
 * Context: may sleep. Writes may be waiting for this that are to free memory, so
 * it is done by the image's own workers.
 *
 * Return: 0, or the errno of what could not be written.
 */
int qcow_image_settle(struct qcow_image *image)
{
	return qcow_image_do(image, image->wq, qcow_image_write_dirty);
}

/**
 * qcow_image_close - a user less
 * @image: the image; the last user closes it
 *
 * Context: may sleep. No requests are in flight.
 *
 * Return: 0, or the errno of what could not be written. The image is closed all
 * the same.
 */
int qcow_image_close(struct qcow_image *image)
{
	struct qcow_free *free, *next;
	int err = 0;
	bool last;

	/*
	 * Only its one device knows a writable image, so nobody finds it here.
	 * Freezable like image->wq, which is waited for and so cannot do it.
	 */
	if (image->writable)
		err = qcow_image_do(image, system_freezable_wq,
				    qcow_image_write_all);

	mutex_lock(&qcow_images_mutex);
	last = refcount_dec_and_test(&image->kref.refcount);
	if (last)
		list_del(&image->registry);
	mutex_unlock(&qcow_images_mutex);
	if (last) {
		list_splice_init(&image->reclaims, &image->frees);
		list_for_each_entry_safe(free, next, &image->frees, node)
			qcow_free_discard(image, free);
		qcow_image_free(image);
	}
	return err;
}
