// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writing compressed clusters.
 *
 * Where the user asked for it, a write that covers a guest cluster for which the
 * image has no place yet is compressed. What does not get smaller, and everything
 * else, is written as it is: compressed clusters are never written in place, so
 * the next write to one copies it to a host cluster of its own.
 *
 * The guest's data is copied first. It may change while it is written, which would
 * be the guest's own doing, but a stream that was made from it meanwhile could not
 * be decompressed.
 *
 * Streams are packed byte by byte, and I/O has sectors as its unit. So one after
 * the other is written, under pack_mutex: each with the end of the one before it
 * in its first sector, which is remembered and written again unchanged, and with
 * zeroes behind it in the last. Who reads the one before meanwhile finds the same
 * bytes, and a power cut that tears the write between two sectors leaves them.
 *
 * Ordering: as for other writes. The counts went up first, then the data was
 * written, then the entry is made (commit.c).
 *
 * Lock order: the range, a coder, the L2 block, pack_mutex. Whoever waits for a
 * coder here has nothing but the range, and who has one waits for no range; so
 * those that have coders go on and give them back. What holds pack_mutex allocates
 * and may commit and reclaim; reclaim keeps us off its clusters by way of
 * qcow_alloc_forget(), which needs alloc_mutex only.
 */
#include <linux/bvec.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uio.h>

#include <linux/qcow.h>

#include "qcow.h"
#include "trace.h"

/*
 * In a coder's data: first the stream, with room before it in its first sector,
 * then what is compressed.
 */
static size_t qcow_pack_room(const struct qcow_image *image)
{
	return round_up(QCOW_SECTOR + qcow_cluster_size(image), PAGE_SIZE);
}

/**
 * qcow_compression - how writes to an image are compressed
 * @image: of any kind
 *
 * Context: any.
 *
 * Return: QCOW_COMPRESS_NONE, _ZLIB or _ZSTD.
 */
u32 qcow_compression(const struct qcow_image *image)
{
	if (!image->pack_tail)
		return QCOW_COMPRESS_NONE;
	return image->header.compression_type == QCOW_COMPRESSION_ZSTD ?
	       QCOW_COMPRESS_ZSTD : QCOW_COMPRESS_ZLIB;
}

/**
 * qcow_pack_init - compress what is written from now on
 * @image: a writable qcow2 image that nobody uses yet
 * @compress: QCOW_COMPRESS_*
 * @msg: where to say what is wrong
 *
 * Return: 0; -EINVAL for an image that cannot have such clusters, or would not get
 * smaller by them; or -ENOMEM.
 */
int qcow_pack_init(struct qcow_image *image, u32 compress,
		   struct qcow_message *msg)
{
	bool zstd = image->header.compression_type == QCOW_COMPRESSION_ZSTD;
	u32 cluster_size = qcow_cluster_size(image);
	int err;

	if (compress == QCOW_COMPRESS_NONE)
		return 0;
	if (qcow_is_external(image)) {
		qcow_message_set(msg, "has its data in an external data file, where nothing is compressed");
		return -EINVAL;
	}
	if (image->crypt) {
		qcow_message_set(msg, "is encrypted, and compressed clusters never are");
		return -EINVAL;
	}
	if (!image->refcount_order) {
		qcow_message_set(msg, "has refcounts of 1 bit, with which compressed clusters cannot share space and save none");
		return -EINVAL;
	}
	if (compress == (zstd ? QCOW_COMPRESS_ZLIB : QCOW_COMPRESS_ZSTD)) {
		qcow_message_set(msg, "was made for %s, and has one compression type; qemu-img convert -o compression_type=%s makes one for %s",
				 zstd ? "zstd" : "zlib", zstd ? "zlib" : "zstd",
				 zstd ? "zlib" : "zstd");
		return -EINVAL;
	}
	image->pack_tail = kzalloc(QCOW_SECTOR, GFP_KERNEL);
	if (!image->pack_tail)
		return -ENOMEM;
	err = qcow_coders_init(&image->packers,
			       qcow_codec(image)->pack_size(cluster_size),
			       qcow_pack_room(image) + cluster_size);
	if (err)
		qcow_pack_exit(image);
	return err;
}

/**
 * qcow_pack_exit - undo qcow_pack_init()
 * @image: nobody writes to it any more
 */
void qcow_pack_exit(struct qcow_image *image)
{
	mempool_exit(&image->packers.pool);
	kfree(image->pack_tail);
	image->pack_tail = NULL;
}

/* 0 if the image has no place for the guest cluster; 1 if it has; or an errno. */
static int qcow_pack_look(struct qcow_image *image, u64 guest_offset)
{
	struct qcow_l2_state state;
	struct qcow_block *block;
	unsigned int index;
	int epoch, err;
	u64 entry;

	epoch = qcow_image_enter(image);
	err = qcow_l1_entry(image, guest_offset, &entry);
	if (err || !entry)
		goto out;
	block = qcow_l2_block(image, entry, guest_offset, &index);
	err = PTR_ERR_OR_ZERO(block);
	if (err)
		goto out;
	err = qcow_l2_classify(image, qcow_l2_load(image, block, index),
			       guest_offset, &state);
	qcow_block_put(block);
	if (!err)
		err = state.mapped || state.type == QCOW_EXTENT_COMPRESSED;
out:
	qcow_image_exit(image, epoch);
	return err;
}

/* Write the stream in a coder behind the last one; pack_mutex is held. */
static int qcow_pack_append(struct qcow_image *image, struct qcow_coder *coder,
			    u64 host_offset, u32 size)
{
	u32 skip = host_offset & (QCOW_SECTOR - 1);
	u32 length = round_up(skip + size, QCOW_SECTOR);
	struct iov_iter iter;
	int err;

	lockdep_assert_held(&image->pack_mutex);
	memmove(coder->data + skip, coder->data + QCOW_SECTOR, size);
	memcpy(coder->data, image->pack_tail, skip);
	memset(coder->data + skip + size, 0, length - skip - size);
	if (is_vmalloc_addr(coder->data))
		flush_kernel_vmap_range(coder->data, length);
	iov_iter_bvec(&iter, ITER_SOURCE, coder->vecs, coder->nr_vecs, length);
	err = qcow_file_rw(&image->file, &iter, host_offset - skip, 0);
	trace_qcow_pack(image, host_offset, size, err);
	if (!err)
		memcpy(image->pack_tail, coder->data + length - QCOW_SECTOR,
		       QCOW_SECTOR);
	return err;
}

/* The L2 entry of a stream. */
static u64 qcow_pack_descriptor(const struct qcow_image *image, u64 host_offset,
				u32 size)
{
	u64 sectors = ((host_offset + size - 1) >> SECTOR_SHIFT) -
		      (host_offset >> SECTOR_SHIFT);

	return QCOW_OFLAG_COMPRESSED | host_offset |
	       sectors << QCOW_PACKED_OFFSET_BITS(image->cluster_bits);
}

/* Place, write and link the stream in a coder. The range is locked. */
static int qcow_pack_store(struct qcow_image *image, u64 guest_offset,
			   struct qcow_coder *coder, u32 size)
{
	u64 limit = min_t(u64, QCOW_MAX_HOST_OFFSET,
			  BIT_ULL(QCOW_PACKED_OFFSET_BITS(image->cluster_bits)));
	u32 bits = image->cluster_bits;
	struct qcow_l2_entry entry = {};
	struct qcow_free *abort;
	struct qcow_block *block;
	unsigned int index;
	u64 host_offset;
	int err;

	block = qcow_l2_for_write(image, guest_offset, &index);
	if (IS_ERR(block))
		return PTR_ERR(block);
	abort = qcow_free_alloc(image);

	mutex_lock(&image->pack_mutex);
	err = qcow_alloc_bytes(image, size, &host_offset);
	if (err) {
		mutex_unlock(&image->pack_mutex);
		goto out;
	}
	if (abort) {
		abort->cluster = host_offset >> bits;
		abort->count = ((host_offset + size - 1) >> bits) -
			       abort->cluster + 1;
		abort->punch = false;
	}
	err = host_offset + size > limit ? 1 :
	      qcow_pack_append(image, coder, host_offset, size);
	/* What is in the tail is not known then. */
	if (err)
		qcow_alloc_forget(image, host_offset >> bits, 2);
	mutex_unlock(&image->pack_mutex);

	entry.descriptor = qcow_pack_descriptor(image, host_offset, size);
	spin_lock_irq(&image->lock);
	if (!err) {
		qcow_l2_store_locked(image, block, index, entry);
		qcow_block_dirty_locked(block);
	} else if (abort) {
		qcow_free_queue_locked(image, abort);
		abort = NULL;
	}
	spin_unlock_irq(&image->lock);
out:
	qcow_l2_release(image, block);
	if (abort)
		qcow_free_discard(image, abort);
	return err;
}

/**
 * qcow_pack_write - write a guest cluster compressed
 * @image: the top layer, after qcow_pack_init()
 * @guest_offset: of the cluster, bytes
 * @data: its content; at the end of the disk it may be less than a cluster
 *
 * Context: may sleep for long. Not inside an epoch. The caller holds no range
 * except for I/O that has been issued.
 *
 * Return: 0; 1 if it has to be written uncompressed; -ENOSPC; or another errno.
 */
int qcow_pack_write(struct qcow_image *image, u64 guest_offset,
		    struct iov_iter *data)
{
	u64 cluster = guest_offset >> image->cluster_bits;
	u32 cluster_size = qcow_cluster_size(image);
	size_t length = iov_iter_count(data);
	struct qcow_coder *coder;
	struct qcow_range range;
	void *plain;
	u32 size;
	int ret;

	ret = qcow_image_error(image) ?: qcow_commit_throttle(image);
	if (ret)
		return ret;
	qcow_range_lock(image, &range, cluster, cluster);
	ret = qcow_pack_look(image, guest_offset);
	if (ret)
		goto out_unlock;

	coder = mempool_alloc(&image->packers.pool, GFP_NOIO);
	plain = coder->data + qcow_pack_room(image);
	if (copy_from_iter(plain, length, data) != length) {
		ret = -EIO;
		goto out_free;
	}
	memset(plain + length, 0, cluster_size - length);
	size = qcow_codec(image)->pack(coder, plain, cluster_size,
				       coder->data + QCOW_SECTOR,
				       cluster_size - 1);
	ret = size ? qcow_pack_store(image, guest_offset, coder, size) : 1;
out_free:
	mempool_free(coder, &image->packers.pool);
out_unlock:
	qcow_range_unlock(image, &range);
	return ret;
}
