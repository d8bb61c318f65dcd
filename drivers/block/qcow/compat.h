/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Everything that differs between kernel versions, and nothing else. The rest
 * of the driver reads as if written for the newest kernel.
 */
#ifndef QCOW_COMPAT_H
#define QCOW_COMPAT_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/pagemap.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/srcu.h>
#include <linux/version.h>

/* Up to the newest kernel that was looked at; see qcow_device_put_queues(). */
#define QCOW_LEAKS_QUEUES	(LINUX_VERSION_CODE < KERNEL_VERSION(7, 4, 0))

/* 6.7: shrinkers are allocated, and carry private data. */
struct qcow_shrinker {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	struct shrinker *shrinker;
#else
	struct shrinker shrinker;
#endif
	unsigned long (*count)(void *private);
	unsigned long (*scan)(void *private, unsigned long nr);
	void *private;
};

static inline struct qcow_shrinker *qcow_shrinker_of(struct shrinker *shrinker)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	return shrinker->private_data;
#else
	return container_of(shrinker, struct qcow_shrinker, shrinker);
#endif
}

static inline unsigned long qcow_shrinker_count(struct shrinker *shrinker,
						struct shrink_control *sc)
{
	struct qcow_shrinker *s = qcow_shrinker_of(shrinker);

	return s->count(s->private);
}

static inline unsigned long qcow_shrinker_scan(struct shrinker *shrinker,
					       struct shrink_control *sc)
{
	struct qcow_shrinker *s = qcow_shrinker_of(shrinker);

	return s->scan(s->private, sc->nr_to_scan);
}

static inline int
qcow_shrinker_register(struct qcow_shrinker *s,
		       unsigned long (*count)(void *private),
		       unsigned long (*scan)(void *private, unsigned long nr),
		       void *private, const char *name)
{
	s->count = count;
	s->scan = scan;
	s->private = private;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	s->shrinker = shrinker_alloc(0, "%s", name);
	if (!s->shrinker)
		return -ENOMEM;
	s->shrinker->count_objects = qcow_shrinker_count;
	s->shrinker->scan_objects = qcow_shrinker_scan;
	s->shrinker->seeks = DEFAULT_SEEKS;
	s->shrinker->private_data = s;
	shrinker_register(s->shrinker);
	return 0;
#else
	s->shrinker.count_objects = qcow_shrinker_count;
	s->shrinker.scan_objects = qcow_shrinker_scan;
	s->shrinker.seeks = DEFAULT_SEEKS;
	return register_shrinker(&s->shrinker, "%s", name);
#endif
}

static inline void qcow_shrinker_unregister(struct qcow_shrinker *s)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	shrinker_free(s->shrinker);
#else
	unregister_shrinker(&s->shrinker);
#endif
}

#ifdef CONFIG_TINY_SRCU
#error "epochs end in interrupts, which SRCU without SMP does not allow"
#endif

/*
 * A reader that one context begins and another, perhaps an interrupt handler,
 * ends. lockdep must not track it as held by the task that began it, and sparse,
 * which cannot follow it, not as held by the function.
 */
static inline int qcow_epoch_enter(struct srcu_struct *epoch)
{
	int index;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	index = srcu_down_read(epoch);
#else
	index = __srcu_read_lock(epoch);
#endif
	__release(epoch);
	return index;
}

static inline void qcow_epoch_exit(struct srcu_struct *epoch, int index)
{
	__acquire(epoch);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	srcu_up_read(epoch, index);
#else
	__srcu_read_unlock(epoch, index);
#endif
}

/**
 * struct qcow_limits - what the block layer is told about a disk
 * @physical_block_size: bytes
 * @io_opt: bytes
 * @max_hw_sectors: longest request
 * @max_segments: most segments of a request
 * @discard_granularity: bytes; 0 without discard
 * @max_discard_sectors: 0 without discard
 * @max_write_zeroes_sectors: 0 without write zeroes
 * @write_cache: what is written is durable only after a flush; FUA works
 * @stable_writes: data must not change while it is being written
 */
struct qcow_limits {
	unsigned int physical_block_size;
	unsigned int io_opt;
	unsigned int max_hw_sectors;
	unsigned int max_segments;
	unsigned int discard_granularity;
	unsigned int max_discard_sectors;
	unsigned int max_write_zeroes_sectors;
	bool write_cache;
	bool stable_writes;
};

/* 6.11: struct queue_limits holds all of it, and replaces the setters. */
static inline struct gendisk *
qcow_alloc_disk(struct blk_mq_tag_set *tag_set,
		const struct qcow_limits *limits, void *data)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct queue_limits lim = {
		.logical_block_size = SECTOR_SIZE,
		.physical_block_size = limits->physical_block_size,
		.io_min = limits->physical_block_size,
		.io_opt = limits->io_opt,
		.max_hw_sectors = limits->max_hw_sectors,
		.max_segments = limits->max_segments,
		.max_segment_size = UINT_MAX,
		.discard_granularity = limits->discard_granularity,
		.max_hw_discard_sectors = limits->max_discard_sectors,
		.max_write_zeroes_sectors = limits->max_write_zeroes_sectors,
	};

	if (limits->write_cache)
		lim.features |= BLK_FEAT_WRITE_CACHE | BLK_FEAT_FUA;
	if (limits->stable_writes)
		lim.features |= BLK_FEAT_STABLE_WRITES;
	return blk_mq_alloc_disk(tag_set, &lim, data);
#else
	struct request_queue *q;
	struct gendisk *disk;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
	disk = blk_mq_alloc_disk(tag_set, NULL, data);
#else
	disk = blk_mq_alloc_disk(tag_set, data);
#endif
	if (IS_ERR(disk))
		return disk;
	q = disk->queue;
	blk_queue_logical_block_size(q, SECTOR_SIZE);
	blk_queue_physical_block_size(q, limits->physical_block_size);
	blk_queue_io_min(q, limits->physical_block_size);
	blk_queue_io_opt(q, limits->io_opt);
	blk_queue_max_hw_sectors(q, limits->max_hw_sectors);
	/* As from 6.9 on, a request may be as long as is best. */
	q->limits.max_sectors = clamp(limits->io_opt >> SECTOR_SHIFT,
				      q->limits.max_sectors,
				      limits->max_hw_sectors);
	blk_queue_max_segments(q, limits->max_segments);
	blk_queue_max_segment_size(q, UINT_MAX);
	q->limits.discard_granularity = limits->discard_granularity;
	blk_queue_max_discard_sectors(q, limits->max_discard_sectors);
	blk_queue_max_write_zeroes_sectors(q, limits->max_write_zeroes_sectors);
	blk_queue_write_cache(q, limits->write_cache, limits->write_cache);
	blk_queue_flag_set(QUEUE_FLAG_NONROT, q);
	blk_queue_flag_clear(QUEUE_FLAG_ADD_RANDOM, q);
	if (limits->stable_writes)
		blk_queue_flag_set(QUEUE_FLAG_STABLE_WRITES, q);
	return disk;
#endif
}

/* 6.14: requests are merged unless the queue forbids it. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 14, 0)
#define QCOW_TAG_SET_FLAGS	BLK_MQ_F_STACKING
#else
#define QCOW_TAG_SET_FLAGS	(BLK_MQ_F_STACKING | BLK_MQ_F_SHOULD_MERGE)
#endif

/* 6.5: disks, not block devices, are opened, and modes have their own type. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
#define QCOW_DISK_OPEN(name)	name(struct gendisk *disk, blk_mode_t mode)
#define QCOW_DISK_RELEASE(name)	name(struct gendisk *disk)
#define QCOW_OPENED_DISK	disk
#define QCOW_OPEN_WRITE		BLK_OPEN_WRITE
#define QCOW_OPEN_EXCL		BLK_OPEN_EXCL
#else
#define QCOW_DISK_OPEN(name)	name(struct block_device *bdev, fmode_t mode)
#define QCOW_DISK_RELEASE(name)	name(struct gendisk *disk, fmode_t mode)
#define QCOW_OPENED_DISK	(bdev->bd_disk)
#define QCOW_OPEN_WRITE		FMODE_WRITE
#define QCOW_OPEN_EXCL		FMODE_EXCL
#endif

/* 7.x: the node that a request's memory is on is signed (-1 for any). */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define QCOW_INIT_REQUEST(name)						\
	name(struct blk_mq_tag_set *set, struct request *rq,		\
	     unsigned int hctx_index, int node)
#else
#define QCOW_INIT_REQUEST(name)						\
	name(struct blk_mq_tag_set *set, struct request *rq,		\
	     unsigned int hctx_index, unsigned int node)
#endif

/* How far into its current vector a bio is: 7.x has renamed the member. */
static inline unsigned int qcow_bio_skip(const struct bio *bio)
{
	return mp_bvec_iter_offset(bio->bi_io_vec, bio->bi_iter) -
	       bio->bi_io_vec[bio->bi_iter.bi_idx].bv_offset;
}

/*
 * Requests that a plug has taken in advance, all of one queue. 6.13 has given the
 * list a type and a new name, as have late releases of 6.12.
 */
static inline struct request *qcow_plug_cached(struct blk_plug *plug)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	return rq_list_peek(&plug->cached_rqs);
#else
	return plug->cached_rq;
#endif
}

/*
 * 6.9: a plug may know the time, and then a flag of the task has the scheduler look
 * at its plug.
 */
static inline void qcow_plug_forget_time(void)
{
#ifdef PF_BLOCK_TS
	if (current->plug)
		current->plug->cur_ktime = 0;
	current->flags &= ~PF_BLOCK_TS;
#endif
}

/*
 * 6.7: a mapping knows whether its pages must not change during writeback.
 * Btrfs checksums without saying so in older kernels.
 */
static inline bool qcow_stable_writes(struct file *file)
{
	struct inode *inode = file->f_mapping->host;

	if (S_ISBLK(inode->i_mode))
		return bdev_stable_writes(I_BDEV(inode));
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	if (mapping_stable_writes(file->f_mapping))
		return true;
#endif
	return inode->i_sb->s_iflags & SB_I_STABLE_WRITES ||
	       inode->i_sb->s_magic == BTRFS_SUPER_MAGIC;
}

#endif /* QCOW_COMPAT_H */
