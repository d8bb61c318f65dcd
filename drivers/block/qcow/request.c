// SPDX-License-Identifier: GPL-2.0-only
/*
 * From block layer requests to I/O on the files.
 *
 * queue_rq() itself starts the I/O of a read or overwrite that is one run in one
 * file, if the tables that say so are in memory and if it may (inline.c). All else it
 * hands to a worker, because looking up a table may read it, and an allocating write
 * may wait. The worker resolves the request to segments (runs that are contiguous in
 * one file) and starts their I/O; it does not wait for it. Each segment that reads
 * or overwrites holds an epoch from before its look-up until its I/O is complete;
 * each segment that changes the mapping holds a lock on its clusters instead. The
 * request completes when the worker and all segments have dropped it.
 *
 * What queue_rq() started, but the file could not do without waiting, is undone, and
 * the request goes to a worker as if nothing had been tried.
 *
 * What a file could not do at once (short, -EAGAIN) is done again from the start
 * of the segment, in a worker of another queue, so that it never waits for
 * workers that wait for it.
 *
 * FUA, and each write of a device that writes through: a direct overwrite whose
 * mapping is durable carries IOCB_DSYNC, if that is worth something there (struct
 * qcow_file); anything else is followed by a commit.
 *
 * The gate. Each request that may change the image holds a reference of dev->gate
 * from before its worker is queued until all that it does is done. To shut the gate
 * is to kill that reference count, and to wait until it is zero. Requests that come
 * then are put into a list, and their workers are queued when it opens. So a request
 * that waits has no worker, memory of a pool, range or epoch that one inside could
 * be waiting for, and the wait ends.
 *
 * What it does have is a tag. Reads go on nevertheless, however many writes wait,
 * as they have hardware queues of their own; with an I/O scheduler, which has one
 * queue for all, they may wait behind more than a queue full of writes. Flushes have
 * none of their own: they pass the gate, but may wait for a tag, or behind a write
 * that the block layer flushes before. And who has the queue frozen, to change the
 * scheduler for example, waits until the gate opens, and all that comes then waits
 * for that.
 *
 * A device that is read-only changes nothing, and has no use for its gate.
 */
#include <linux/blk-cgroup.h>
#include <linux/blk-mq.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include <linux/qcow.h>

#include "device.h"
#include "qcow.h"
#include "trace.h"

#define QCOW_SEGMENT_POOL_MIN	16
/* So many writes at most are not tried without a worker behind one that was in vain. */
#define QCOW_INLINE_SKIP	7U
#define QCOW_VECS_POOL_MIN	4
/* Segments of a request. What is to be compressed is a cluster in one request. */
#define QCOW_MAX_SEGMENTS	128U
/* Zero pages before and behind them */
#define QCOW_FILL_VECS		(QCOW_MERGE_FILL / SZ_4K)

/**
 * struct qcow_segment - one contiguous piece of I/O for a request
 * @io: the I/O
 * @req: whose
 * @image: the layer that has or gets it
 * @file: where
 * @pos: where, bytes; in a compressed cluster, its offset there
 * @skip: bytes of the request that come before this segment
 * @length: bytes, with head and tail
 * @iocb_flags: IOCB_DSYNC, IOCB_NOWAIT or 0
 * @mapping: @write is in use, otherwise @epoch
 * @descriptor: the L2 entry of a compressed cluster
 * @epoch: from qcow_image_enter()
 * @write: the change of the mapping that waits for this I/O
 * @vecs: head, data and tail, for a segment with @mapping that has a head or tail;
 *	or NULL
 * @nr_vecs: how many
 * @few: memory for @vecs, where that is enough
 * @retry: does it again; decompresses or decrypts it
 */
struct qcow_segment {
	struct qcow_io io;
	struct qcow_request *req;
	struct qcow_image *image;
	struct qcow_file *file;
	u64 pos;
	u64 skip;
	u64 length;
	int iocb_flags;
	bool mapping;
	u64 descriptor;
	int epoch;
	struct qcow_write write;
	struct bio_vec *vecs;
	unsigned int nr_vecs;
	struct bio_vec few[4];
	struct work_struct retry;
};

/**
 * struct qcow_request - what the driver keeps for each request
 * @work: runs it; queued again for the commit after a FUA write
 * @dev: the device
 * @pending: the worker, or queue_rq() in its place, and each segment in flight
 * @error: the first one, or 0
 * @commit: commit before completing
 * @committing: all segments are done, the commit is next
 * @unmapped: where it begins, there was nothing that could be overwritten
 * @vecs: the memory of the guest
 * @nr_vecs: how many
 * @offset: bytes of the first one that belong to an earlier request
 * @pooled: @vecs is from dev->request_vecs
 * @gated: a reference of dev->gate is held
 * @held: in dev->gate_held
 * @blkcg: whom the I/O is charged to
 * @memcg: whom the memory is charged to
 * @first: the segment where the request begins
 */
struct qcow_request {
	struct work_struct work;
	struct qcow_device *dev;
	atomic_t pending;
	int error;
	bool commit;
	bool committing;
	bool unmapped;
	bool pooled;
	bool gated;
	struct list_head held;
	unsigned int nr_vecs;
	unsigned int offset;
	struct bio_vec *vecs;
	struct cgroup_subsys_state *blkcg;
	struct cgroup_subsys_state *memcg;
	struct qcow_segment first;
};

/**
 * qcow_request_size - what the tag set must reserve for each request
 *
 * Return: bytes.
 */
size_t qcow_request_size(void)
{
	return sizeof(struct qcow_request);
}

/* Is what it writes to be durable when it is done? */
static bool qcow_request_fua(struct qcow_request *req)
{
	return req->dev->write_through ||
	       blk_mq_rq_from_pdu(req)->cmd_flags & REQ_FUA;
}

static struct qcow_image *qcow_request_image(struct qcow_request *req)
{
	return req->dev->chain->layers[0];
}

static blk_status_t qcow_status(int err)
{
	switch (err) {
	case 0:
		return BLK_STS_OK;
	case -ENOSPC:
	case -EDQUOT:
	case -EFBIG:
		return BLK_STS_NOSPC;
	case -ENOMEM:
		return BLK_STS_RESOURCE;
	default:
		return BLK_STS_IOERR;
	}
}

static void qcow_complete_rq(struct request *rq)
{
	struct qcow_request *req = blk_mq_rq_to_pdu(rq);

	blk_mq_end_request(rq, qcow_status(READ_ONCE(req->error)));
}

static void qcow_request_unmap(struct qcow_request *req)
{
	if (req->pooled)
		mempool_free(req->vecs, &req->dev->request_vecs);
	req->pooled = false;
}

/* Have a worker run it. Context: any. */
static void qcow_request_queue(struct qcow_request *req)
{
#ifdef CONFIG_BLK_CGROUP
	struct request *rq = blk_mq_rq_from_pdu(req);

	if (rq->bio) {
		req->blkcg = bio_blkcg_css(rq->bio);
#ifdef CONFIG_MEMCG
		if (req->blkcg)
			req->memcg = cgroup_get_e_css(req->blkcg->cgroup,
						      &memory_cgrp_subsys);
#endif
	}
#endif
	queue_work(req->dev->wq, &req->work);
}

static void qcow_request_finish(struct qcow_request *req)
{
	struct request *rq = blk_mq_rq_from_pdu(req);

	qcow_request_unmap(req);
	if (req->memcg)
		css_put(req->memcg);
	if (req->error)
		this_cpu_inc(req->dev->stats->errors);
	/* Detach waits for the request, so who is woken does not go away. */
	if (req->gated)
		percpu_ref_put(&req->dev->gate);
	if (likely(!blk_should_fake_timeout(rq->q)))
		blk_mq_complete_request(rq);
}

static void qcow_request_put(struct qcow_request *req)
{
	if (!atomic_dec_and_test(&req->pending))
		return;
	if (req->commit && !READ_ONCE(req->error)) {
		req->committing = true;
		/* Others may be waiting for the memory, and nobody else for a worker. */
		qcow_request_unmap(req);
		queue_work(req->dev->wq, &req->work);
		return;
	}
	qcow_request_finish(req);
}

static void qcow_request_error(struct qcow_request *req, int err)
{
	if (err)
		cmpxchg(&req->error, 0, err);
}

/* Describe a part of the guest's memory. */
static void qcow_request_iter(struct qcow_request *req, struct iov_iter *iter,
			      u64 skip, u64 length)
{
	struct request *rq = blk_mq_rq_from_pdu(req);

	iov_iter_bvec(iter, rq_data_dir(rq) == WRITE ? ITER_SOURCE : ITER_DEST,
		      req->vecs, req->nr_vecs, blk_rq_bytes(rq));
	iter->iov_offset = req->offset;
	iov_iter_advance(iter, skip);
	iov_iter_truncate(iter, length);
}

static void qcow_request_zero(struct qcow_request *req, u64 skip, u64 length)
{
	struct iov_iter iter;

	qcow_request_iter(req, &iter, skip, length);
	iov_iter_zero(length, &iter);
}

static void qcow_segment_iter(struct qcow_segment *seg)
{
	if (seg->vecs)
		iov_iter_bvec(&seg->io.iter, ITER_SOURCE, seg->vecs,
			      seg->nr_vecs, seg->length);
	else
		qcow_request_iter(seg->req, &seg->io.iter, seg->skip,
				  seg->length);
}

static void qcow_segment_free_vecs(struct qcow_segment *seg)
{
	if (seg->vecs && seg->vecs != seg->few)
		mempool_free(seg->vecs, &seg->req->dev->segment_vecs);
}

/* Segments that are not the first one of their request come from a pool. */
static void qcow_segment_free(struct qcow_segment *seg)
{
	if (seg != &seg->req->first)
		mempool_free(seg, &seg->req->dev->segments);
}

static void qcow_segment_end(struct qcow_segment *seg, int err)
{
	struct qcow_request *req = seg->req;

	/*
	 * It may have been the barrier in it, which tells of others' writes; but
	 * not where there was no space or memory to begin the write with.
	 */
	if (err && seg->iocb_flags & IOCB_DSYNC &&
	    qcow_status(err) == BLK_STS_IOERR)
		qcow_image_fail(qcow_request_image(req),
				"durable write failed with error %d", err);
	if (seg->mapping) {
		qcow_write_end(&seg->write, err);
		qcow_segment_free_vecs(seg);
	} else {
		qcow_image_exit(qcow_request_image(req), seg->epoch);
	}
	qcow_segment_free(seg);
	qcow_request_error(req, err);
	qcow_request_put(req);
}

/* Where on the disk it begins, with its head. */
static u64 qcow_segment_guest(const struct qcow_segment *seg)
{
	struct request *rq = blk_mq_rq_from_pdu(seg->req);

	return ((u64)blk_rq_pos(rq) << SECTOR_SHIFT) + seg->skip -
	       (seg->mapping ? seg->write.head.length : 0);
}

static int qcow_segment_decrypt(struct qcow_segment *seg)
{
	qcow_segment_iter(seg);
	return qcow_decrypt(seg->image, &seg->io.iter, seg->pos,
			    qcow_segment_guest(seg));
}

static int qcow_segment_rw(struct qcow_segment *seg)
{
	bool write = op_is_write(req_op(blk_mq_rq_from_pdu(seg->req)));
	unsigned int scope = qcow_io_scope_enter();
	int err;

	qcow_segment_iter(seg);
	if (seg->image->crypt && write)
		err = qcow_encrypt_write(seg->image, &seg->io.iter, seg->pos,
					 qcow_segment_guest(seg),
					 seg->iocb_flags);
	else
		err = qcow_file_rw(seg->file, &seg->io.iter, seg->pos,
				   seg->iocb_flags);
	if (seg->image->crypt && !write && !err)
		err = qcow_segment_decrypt(seg);
	qcow_io_scope_exit(scope);
	return err;
}

/* There was no space, but what has been discarded just now may be enough. */
static void qcow_segment_make_room(struct work_struct *work)
{
	struct qcow_segment *seg = container_of(work, struct qcow_segment,
						retry);
	unsigned int scope = qcow_io_scope_enter();

	qcow_reclaim_now(qcow_request_image(seg->req));
	qcow_io_scope_exit(scope);
	qcow_segment_end(seg, qcow_segment_rw(seg));
}

/*
 * Space is made for those that change the mapping only: the others are in an epoch,
 * for which the reclaim would wait, and for retries in their queue. And they hold
 * ranges, so they must not come behind requests that wait for these: they have the
 * workers of the commits, for which only as many can come as may write at a time.
 */
static void qcow_segment_result(struct qcow_segment *seg, int err)
{
	if (seg->mapping && qcow_status(err) == BLK_STS_NOSPC) {
		INIT_WORK(&seg->retry, qcow_segment_make_room);
		queue_work(qcow_request_image(seg->req)->wq, &seg->retry);
	} else {
		qcow_segment_end(seg, err);
	}
}

static void qcow_segment_retry(struct work_struct *work)
{
	struct qcow_segment *seg = container_of(work, struct qcow_segment,
						retry);

	qcow_segment_result(seg, qcow_segment_rw(seg));
}

/* Is it worth another try, in a context that may wait? */
static bool qcow_segment_again(const struct qcow_segment *seg, long ret)
{
	if (ret >= 0 || ret == -EAGAIN || ret == -EINTR || ret == -ERESTARTSYS)
		return true;
	return !(seg->iocb_flags & IOCB_DSYNC) &&
	       (ret == -EOPNOTSUPP || ret == -ENOMEM);
}

/* queue_rq() did all that there was to do. */
static void qcow_request_inlined(struct qcow_request *req)
{
	struct qcow_device *dev = req->dev;

	this_cpu_inc(dev->stats->inlined);
	if (READ_ONCE(dev->inline_skip) &&
	    req_op(blk_mq_rq_from_pdu(req)) == REQ_OP_WRITE)
		WRITE_ONCE(dev->inline_skip, 0);
}

/* queue_rq() tried it, but one has to wait. */
static void qcow_request_uninline(struct qcow_request *req, long ret)
{
	struct qcow_device *dev = req->dev;
	unsigned int skip;

	/* The device below does not know how not to. */
	if (ret == -EOPNOTSUPP && req->first.file->bdev)
		WRITE_ONCE(req->first.file->nowait, false);
	/* Where writes fill holes of the file, the next ones will have to wait, too. */
	if (req_op(blk_mq_rq_from_pdu(req)) == REQ_OP_WRITE) {
		skip = min(2 * READ_ONCE(dev->inline_skip) + 1,
			   QCOW_INLINE_SKIP);
		WRITE_ONCE(dev->inline_skip, skip);
		WRITE_ONCE(dev->inline_left, skip);
	}
	qcow_image_exit(qcow_request_image(req), req->first.epoch);
	qcow_request_unmap(req);
	qcow_request_queue(req);
}

static void qcow_segment_decrypt_fn(struct work_struct *work)
{
	struct qcow_segment *seg = container_of(work, struct qcow_segment,
						retry);
	unsigned int scope = qcow_io_scope_enter();
	int err = qcow_segment_decrypt(seg);

	qcow_io_scope_exit(scope);
	qcow_segment_end(seg, err);
}

static void qcow_segment_done(struct qcow_io *io, long ret)
{
	struct qcow_segment *seg = container_of(io, struct qcow_segment, io);

	if (ret == seg->length && seg->image->crypt) {
		INIT_WORK(&seg->retry, qcow_segment_decrypt_fn);
		queue_work(seg->req->dev->retry_wq, &seg->retry);
	} else if (ret == seg->length) {
		if (seg->iocb_flags & IOCB_NOWAIT)
			qcow_request_inlined(seg->req);
		qcow_segment_end(seg, 0);
	} else if (qcow_segment_again(seg, ret)) {
		if (seg->iocb_flags & IOCB_NOWAIT) {
			qcow_request_uninline(seg->req, ret);
			return;
		}
		INIT_WORK(&seg->retry, qcow_segment_retry);
		queue_work(seg->req->dev->retry_wq, &seg->retry);
	} else {
		qcow_segment_result(seg, ret);
	}
}

/* It counts as one of those in req->pending already. */
static void qcow_segment_start(struct qcow_segment *seg)
{
	struct request *rq = blk_mq_rq_from_pdu(seg->req);

	qcow_hold(seg->mapping ? QCOW_POINT_ALLOCATE :
		  op_is_write(req_op(rq)) ? QCOW_POINT_OVERWRITE :
					    QCOW_POINT_READ);
	/* What is encrypted for it is in memory that has to be waited for. */
	if (seg->image->crypt && op_is_write(req_op(rq))) {
		qcow_segment_result(seg, qcow_segment_rw(seg));
		return;
	}
	qcow_segment_iter(seg);
	seg->io.ioprio = req_get_ioprio(rq);
	seg->io.done = qcow_segment_done;
	qcow_io_submit(&seg->io, seg->file, seg->pos, seg->iocb_flags);
}

static void qcow_segment_submit(struct qcow_segment *seg)
{
	atomic_inc(&seg->req->pending);
	qcow_segment_start(seg);
}

static void qcow_segment_init(struct qcow_segment *seg,
			      struct qcow_request *req, u64 skip)
{
	seg->req = req;
	seg->skip = skip;
	seg->iocb_flags = 0;
	seg->mapping = false;
	seg->vecs = NULL;
}

static struct qcow_segment *qcow_segment_alloc(struct qcow_request *req,
					       u64 skip)
{
	struct qcow_segment *seg = skip ?
		mempool_alloc(&req->dev->segments, GFP_NOIO) : &req->first;

	qcow_segment_init(seg, req, skip);
	return seg;
}

static void qcow_segment_set(struct qcow_segment *seg,
			     const struct qcow_extent *extent)
{
	seg->image = extent->image;
	seg->file = qcow_data_file(extent->image);
	seg->pos = extent->host_offset;
	seg->length = extent->length;
}

static void qcow_segment_unpack(struct work_struct *work)
{
	struct qcow_segment *seg = container_of(work, struct qcow_segment,
						retry);
	unsigned int scope = qcow_io_scope_enter();
	struct iov_iter iter;
	int err;

	qcow_request_iter(seg->req, &iter, seg->skip, seg->length);
	err = qcow_unpack_read(seg->image, seg->descriptor, seg->pos, &iter);
	qcow_io_scope_exit(scope);
	qcow_segment_end(seg, err);
}

/*
 * Read from a compressed cluster: here if it is the last piece of the request,
 * which has nothing else to do; otherwise elsewhere, so that the clusters of a
 * long request are decompressed by several CPUs.
 */
static void qcow_segment_packed(struct qcow_segment *seg,
				const struct qcow_extent *extent, bool last)
{
	atomic_inc(&seg->req->pending);
	seg->image = extent->image;
	seg->descriptor = extent->descriptor;
	seg->pos = extent->skip;
	seg->length = extent->length;
	INIT_WORK(&seg->retry, qcow_segment_unpack);
	if (last)
		qcow_segment_unpack(&seg->retry);
	else
		queue_work(seg->req->dev->retry_wq, &seg->retry);
}

static int qcow_read(struct qcow_request *req, u64 guest_offset, u64 length)
{
	struct qcow_image *image = qcow_request_image(req);
	struct qcow_extent extent;
	struct qcow_segment *seg;
	u64 skip;
	int err;

	for (skip = 0; skip < length; skip += extent.length) {
		seg = qcow_segment_alloc(req, skip);
		seg->epoch = qcow_image_enter(image);
		err = qcow_map(req->dev->chain, 0, guest_offset + skip,
			       length - skip, &extent);
		if (!err && extent.type == QCOW_EXTENT_DATA) {
			qcow_segment_set(seg, &extent);
			qcow_segment_submit(seg);
			continue;
		}
		if (!err && extent.type == QCOW_EXTENT_COMPRESSED) {
			qcow_segment_packed(seg, &extent,
					    skip + extent.length == length);
			continue;
		}
		qcow_image_exit(image, seg->epoch);
		qcow_segment_free(seg);
		if (err)
			return err;
		qcow_request_zero(req, skip, extent.length);
	}
	return 0;
}

/* Enough for every request that the limits allow, and its head and tail */
static unsigned int qcow_vecs(const struct qcow_device *dev)
{
	return dev->max_segments + 2 * QCOW_FILL_VECS;
}

static unsigned int qcow_fill_vecs(const struct qcow_fill *fill,
				   struct bio_vec *vecs)
{
	if (!fill->length)
		return 0;
	if (!fill->copy)
		return qcow_zero_bvecs(vecs, QCOW_FILL_VECS, fill->length);
	vecs->bv_page = virt_to_page(fill->copy);
	vecs->bv_offset = offset_in_page(fill->copy);
	vecs->bv_len = fill->length;
	return 1;
}

/* Does one vector at most describe it? */
static bool qcow_fill_is_one(const struct qcow_fill *fill)
{
	return fill->copy || fill->length <= PAGE_SIZE;
}

/* Head, guest data and tail in one list. */
static int qcow_segment_gather(struct qcow_segment *seg)
{
	struct request *rq = blk_mq_rq_from_pdu(seg->req);
	struct qcow_write *write = &seg->write;
	u64 skip = seg->skip, left = write->length;
	struct req_iterator iter;
	struct bio_vec vec;
	unsigned int n;

	if (seg->req->nr_vecs <= ARRAY_SIZE(seg->few) - 2 &&
	    qcow_fill_is_one(&write->head) && qcow_fill_is_one(&write->tail))
		seg->vecs = seg->few;
	else
		seg->vecs = mempool_alloc(&seg->req->dev->segment_vecs, GFP_NOIO);
	n = qcow_fill_vecs(&write->head, seg->vecs);
	rq_for_each_bvec(vec, rq, iter) {
		if (skip >= vec.bv_len) {
			skip -= vec.bv_len;
			continue;
		}
		if (!left)
			break;
		if (n >= qcow_vecs(seg->req->dev) - QCOW_FILL_VECS)
			return -EIO;
		/* vec itself must not change, the loop advances by it. */
		seg->vecs[n] = vec;
		seg->vecs[n].bv_offset += skip;
		seg->vecs[n].bv_len = min_t(u64, vec.bv_len - skip, left);
		left -= seg->vecs[n++].bv_len;
		skip = 0;
	}
	n += qcow_fill_vecs(&write->tail, seg->vecs + n);
	seg->nr_vecs = n;
	return 0;
}

/* A piece of a write that has to change the mapping. */
static int qcow_write_mapping(struct qcow_segment *seg, u64 guest_offset,
			      u64 length, u64 *done)
{
	struct qcow_request *req = seg->req;
	struct qcow_write *write = &seg->write;
	int err;

	err = qcow_write_begin(req->dev->chain, guest_offset, length, write);
	if (err)
		return err;
	seg->mapping = true;
	seg->image = write->image;
	seg->file = qcow_data_file(write->image);
	seg->pos = write->host_offset + write->data_offset - write->head.length;
	seg->length = write->head.length + write->length + write->tail.length;
	*done = write->length;
	if (write->head.length || write->tail.length)
		err = qcow_segment_gather(seg);
	if (err) {
		qcow_write_end(write, err);
		qcow_segment_free_vecs(seg);
		return err;
	}
	if (qcow_request_fua(req))
		req->commit = true;
	qcow_segment_submit(seg);
	return 0;
}

/* What of a range is in its first cluster, and is that the whole cluster? */
static u64 qcow_first_cluster(const struct qcow_image *image, u64 guest_offset,
			      u64 length, bool *whole)
{
	u64 mask = qcow_cluster_size(image) - 1;
	u64 end = min((guest_offset | mask) + 1, image->size);
	u64 piece = min(length, end - guest_offset);

	*whole = !(guest_offset & mask) && guest_offset + piece == end;
	return piece;
}

/* Write a piece of a request compressed; 1 if it is to be written plainly. */
static int qcow_write_packed(struct qcow_request *req, u64 guest_offset,
			     u64 skip, u64 length)
{
	struct iov_iter iter;
	int err;

	qcow_request_iter(req, &iter, skip, length);
	err = qcow_pack_write(qcow_request_image(req), guest_offset, &iter);
	if (!err && qcow_request_fua(req))
		req->commit = true;
	return err;
}

/* A piece of a write that leaves the mapping as it is; 1 if that has to change. */
static int qcow_write_in_place(struct qcow_segment *seg, u64 guest_offset,
			       u64 length, u64 *done)
{
	struct qcow_request *req = seg->req;
	struct qcow_image *image = qcow_request_image(req);
	struct qcow_extent extent;
	int err;

	seg->epoch = qcow_image_enter(image);
	err = qcow_map_layer(image, guest_offset, length, &extent);
	if (!err)
		trace_qcow_map(guest_offset, &extent, 0);
	if (!err && extent.in_place)
		err = qcow_overlap_check_data(image, extent.host_offset,
					      extent.length);
	if (err || !extent.in_place) {
		qcow_image_exit(image, seg->epoch);
		return err ?: 1;
	}
	qcow_segment_set(seg, &extent);
	*done = extent.length;
	/* After the look-up: then its entry was durable. */
	if (qcow_request_fua(req)) {
		if (qcow_data_file(image)->dsync && !qcow_image_dirty(image))
			seg->iocb_flags = IOCB_DSYNC;
		else
			req->commit = true;
	}
	qcow_segment_submit(seg);
	return 0;
}

static int qcow_write(struct qcow_request *req, u64 guest_offset, u64 length)
{
	struct qcow_image *image = qcow_request_image(req);
	bool pack = qcow_compression(image);
	struct qcow_segment *seg;
	u64 skip, piece, done;
	bool made_room = false;
	bool whole;
	int err;

	for (skip = 0; skip < length; skip += done) {
		err = qcow_image_error(image);
		if (err)
			return err;
		piece = length - skip;
		done = 0;
		seg = qcow_segment_alloc(req, skip);
		/* Below, 1 says that it has to be done in the next way. */
		err = req->unmapped ? 1 :
				      qcow_write_in_place(seg, guest_offset + skip,
							  piece, &done);
		req->unmapped = false;
		if (err > 0 && pack) {
			piece = qcow_first_cluster(image, guest_offset + skip,
						   piece, &whole);
			if (whole)
				err = qcow_write_packed(req, guest_offset + skip,
							skip, piece);
			if (!err) {
				done = piece;
				qcow_segment_free(seg);
				continue;
			}
		}
		if (err > 0)
			err = qcow_write_mapping(seg, guest_offset + skip,
						 piece, &done);
		if (err)
			qcow_segment_free(seg);
		if (qcow_status(err) == BLK_STS_NOSPC && !made_room) {
			made_room = true;
			qcow_reclaim_now(image);
			continue;
		}
		if (err < 0)
			return err;
		/* 1: somebody else linked the cluster meanwhile. Look again. */
	}
	return 0;
}

/* Collect the guest's memory in one array, without copying where it is one. */
static int qcow_request_map(struct qcow_request *req, gfp_t gfp)
{
	struct request *rq = blk_mq_rq_from_pdu(req);
	struct req_iterator iter;
	struct bio_vec vec;
	unsigned int n = 0;

	rq_for_each_bvec(vec, rq, iter)
		n++;
	req->nr_vecs = n;
	if (rq->bio == rq->biotail) {
		req->offset = qcow_bio_skip(rq->bio);
		req->vecs = rq->bio->bi_io_vec + rq->bio->bi_iter.bi_idx;
		return 0;
	}
	if (n > qcow_vecs(req->dev))
		return -EIO;
	req->offset = 0;
	req->vecs = mempool_alloc(&req->dev->request_vecs, gfp);
	if (!req->vecs)
		return -ENOMEM;
	req->pooled = true;
	n = 0;
	rq_for_each_bvec(vec, rq, iter)
		req->vecs[n++] = vec;
	return 0;
}

static int qcow_request_run(struct qcow_request *req)
{
	struct request *rq = blk_mq_rq_from_pdu(req);
	u64 guest_offset = (u64)blk_rq_pos(rq) << SECTOR_SHIFT;
	struct qcow_device *dev = req->dev;
	u64 length = blk_rq_bytes(rq);
	int err;

	/* The block layer only warns of writes to a read-only device. */
	if (dev->read_only && req_op(rq) != REQ_OP_READ)
		return req_op(rq) == REQ_OP_FLUSH ? 0 : -EIO;

	switch (req_op(rq)) {
	case REQ_OP_READ:
		return qcow_request_map(req, GFP_NOIO) ?:
		       qcow_read(req, guest_offset, length);
	case REQ_OP_WRITE:
		return qcow_request_map(req, GFP_NOIO) ?:
		       qcow_write(req, guest_offset, length);
	case REQ_OP_FLUSH:
		return qcow_commit_links(qcow_request_image(req));
	case REQ_OP_DISCARD:
		return qcow_discard(dev->chain, guest_offset, length,
				    dev->discard == QCOW_DISCARD_KEEP);
	case REQ_OP_WRITE_ZEROES:
		err = qcow_write_zeroes(dev->chain, guest_offset, length,
					!(rq->cmd_flags & REQ_NOUNMAP) &&
					dev->discard == QCOW_DISCARD_UNMAP);
		if (qcow_request_fua(req))
			req->commit = true;
		return err;
	default:
		return -EIO;
	}
}

static void qcow_request_work(struct work_struct *work)
{
	struct qcow_request *req = container_of(work, struct qcow_request,
						work);
	unsigned int scope = qcow_io_scope_enter();
	struct mem_cgroup *old_memcg = NULL;
	bool charged = req->memcg;

	if (req->committing) {
		qcow_request_error(req,
				   qcow_commit_links(qcow_request_image(req)));
		qcow_request_finish(req);
		goto out;
	}
	if (req->blkcg)
		kthread_associate_blkcg(req->blkcg);
	if (charged)
		old_memcg = set_active_memcg(mem_cgroup_from_css(req->memcg));

	qcow_request_error(req, qcow_request_run(req));

	if (req->blkcg)
		kthread_associate_blkcg(NULL);
	if (charged)
		set_active_memcg(old_memcg);
	qcow_request_put(req);
out:
	/* The request may be gone. */
	qcow_io_scope_exit(scope);
}

/* ---- the gate ------------------------------------------------------------ */

static void qcow_gate_release(struct percpu_ref *gate)
{
	wake_up_all(&container_of(gate, struct qcow_device, gate)->gate_drained);
}

/* False if the gate is shut; then the request waits for it. */
static bool qcow_gate_enter(struct qcow_request *req)
{
	struct qcow_device *dev = req->dev;
	unsigned long flags;
	bool in;

	req->gated = true;
	if (likely(percpu_ref_tryget_live(&dev->gate)))
		return true;
	spin_lock_irqsave(&dev->gate_lock, flags);
	/* Still shut: so who opens it has not taken the list yet, and will. */
	in = percpu_ref_tryget_live(&dev->gate);
	req->gated = in;
	if (!in)
		list_add_tail(&req->held, &dev->gate_held);
	spin_unlock_irqrestore(&dev->gate_lock, flags);
	/* On the list it is of who opens the gate, and may be gone by now. */
	return in;
}

/**
 * qcow_gate_shut - let no more requests in that may change the image
 * @dev: the device; its gate is open
 *
 * Context: may sleep.
 *
 * Return: 0 when all of those are done that were let in; -EINTR if the caller was
 * killed meanwhile, and the gate is shut all the same.
 */
int qcow_gate_shut(struct qcow_device *dev)
{
	percpu_ref_kill(&dev->gate);
	return wait_event_killable(dev->gate_drained,
				   percpu_ref_is_zero(&dev->gate)) ? -EINTR : 0;
}

/**
 * qcow_gate_open - undo qcow_gate_shut()
 * @dev: the device
 *
 * Context: may sleep; needs no memory.
 */
void qcow_gate_open(struct qcow_device *dev)
{
	struct qcow_request *req;
	LIST_HEAD(held);

	percpu_ref_resurrect(&dev->gate);
	/* First, so that who comes to the list from here on looks again. */
	spin_lock_irq(&dev->gate_lock);
	list_splice_init(&dev->gate_held, &held);
	spin_unlock_irq(&dev->gate_lock);
	while (!list_empty(&held)) {
		req = list_first_entry(&held, struct qcow_request, held);
		list_del(&req->held);
		percpu_ref_get(&dev->gate);
		req->gated = true;
		qcow_request_queue(req);
	}
}

/* ---- without a worker ---------------------------------------------------- */

/* Is all of it one run, which can be read or overwritten as it is? */
static bool qcow_map_inline(struct qcow_request *req, u64 guest_offset,
			    u64 length, bool write, struct qcow_extent *extent)
{
	struct qcow_image *image = qcow_request_image(req);
	int err;

	err = write ? qcow_map_layer_cached(image, guest_offset, length, extent) :
		      qcow_map_cached(req->dev->chain, guest_offset, length,
				      extent);
	if (err)
		return false;
	if (write) {
		trace_qcow_map(guest_offset, extent, 0);
		req->unmapped = !extent->in_place;
		return extent->in_place && extent->length == length &&
		       !qcow_image_error(image) &&
		       !qcow_overlap_check_data(image, extent->host_offset,
						length);
	}
	return extent->length == length && (extent->type == QCOW_EXTENT_DATA ||
					    extent->type == QCOW_EXTENT_ZERO);
}

/* Are writes known to need waiting? Then only some of them are tried. */
static bool qcow_inline_skips(struct qcow_device *dev)
{
	unsigned int left = READ_ONCE(dev->inline_left);

	if (likely(!left))
		return false;
	/* That another CPU does the same at the same time does not matter. */
	WRITE_ONCE(dev->inline_left, left - 1);
	return true;
}

/* Serve it here and now. False if it is for a worker, and nothing was done. */
static bool qcow_request_inline(struct qcow_request *req)
{
	struct request *rq = blk_mq_rq_from_pdu(req);
	u64 guest_offset = (u64)blk_rq_pos(rq) << SECTOR_SHIFT;
	struct qcow_image *image = qcow_request_image(req);
	bool write = req_op(rq) == REQ_OP_WRITE;
	struct qcow_segment *seg = &req->first;
	struct qcow_extent extent;
	struct qcow_inline saved;
	bool ours;

	if (req->dev->no_inline || (!write && req_op(rq) != REQ_OP_READ) ||
	    (write && (qcow_request_fua(req) || req->dev->read_only ||
		       qcow_inline_skips(req->dev))) ||
	    !qcow_inline_enter(rq, &saved))
		return false;
	qcow_segment_init(seg, req, 0);
	seg->epoch = qcow_image_enter(image);
	ours = qcow_map_inline(req, guest_offset, blk_rq_bytes(rq), write,
			       &extent) &&
	       (extent.type == QCOW_EXTENT_ZERO ||
		(!extent.image->crypt &&
		 READ_ONCE(qcow_data_file(extent.image)->nowait))) &&
	       !qcow_request_map(req, GFP_NOWAIT);
	if (!ours) {
		qcow_image_exit(image, seg->epoch);
	} else if (extent.type == QCOW_EXTENT_DATA) {
		qcow_segment_set(seg, &extent);
		seg->iocb_flags = IOCB_NOWAIT;
		/* From here on it may be complete. */
		qcow_segment_start(seg);
	} else {
		qcow_image_exit(image, seg->epoch);
		qcow_request_inlined(req);
		qcow_request_zero(req, 0, extent.length);
		qcow_request_finish(req);
	}
	qcow_inline_exit(&saved);
	return ours;
}

/* ---- the queue ----------------------------------------------------------- */

static void qcow_request_count(struct qcow_request *req)
{
	struct qcow_device_stats __percpu *stats = req->dev->stats;

	switch (req_op(blk_mq_rq_from_pdu(req))) {
	case REQ_OP_READ:
		this_cpu_inc(stats->reads);
		break;
	case REQ_OP_WRITE:
		this_cpu_inc(stats->writes);
		break;
	case REQ_OP_FLUSH:
		this_cpu_inc(stats->flushes);
		break;
	case REQ_OP_DISCARD:
		this_cpu_inc(stats->discards);
		break;
	case REQ_OP_WRITE_ZEROES:
		this_cpu_inc(stats->zeroes);
		break;
	default:
		break;
	}
}

static blk_status_t qcow_queue_rq(struct blk_mq_hw_ctx *hctx,
				  const struct blk_mq_queue_data *bd)
{
	struct request *rq = bd->rq;
	struct qcow_request *req = blk_mq_rq_to_pdu(rq);

	blk_mq_start_request(rq);
	atomic_set(&req->pending, 1);
	req->error = 0;
	req->commit = false;
	req->committing = false;
	req->unmapped = false;
	req->pooled = false;
	req->gated = false;
	req->blkcg = NULL;
	req->memcg = NULL;
	qcow_request_count(req);
	if (!req->dev->read_only && req_op(rq) != REQ_OP_READ &&
	    req_op(rq) != REQ_OP_FLUSH) {
		if (unlikely(qcow_request_image(req)->bitmaps))
			qcow_bitmaps_set(qcow_request_image(req),
					 (u64)blk_rq_pos(rq) << SECTOR_SHIFT,
					 blk_rq_bytes(rq));
		if (!qcow_gate_enter(req))
			return BLK_STS_OK;
	}
	if (!qcow_request_inline(req))
		qcow_request_queue(req);
	return BLK_STS_OK;
}

static void qcow_map_queues(struct blk_mq_tag_set *set)
{
	unsigned int i;

	/* Where memory is short (kdump), the block layer has reduced them to one. */
	for (i = 0; i < set->nr_maps; i++) {
		set->map[i].nr_queues = set->nr_hw_queues / set->nr_maps;
		set->map[i].queue_offset = i * set->map[i].nr_queues;
		blk_mq_map_queues(&set->map[i]);
	}
}

/*
 * A device that the image's file lies on may complete our I/O, and with it a request
 * of ours, under its lock for flushes; and that may be a device of this driver too.
 */
static int qcow_init_hctx(struct blk_mq_hw_ctx *hctx, void *data,
			  unsigned int index)
{
	struct qcow_device *dev = data;

	dev->queues[index] = hctx;
	blk_mq_hctx_set_fq_lock_class(hctx, &dev->flush_key);
	return 0;
}

static int QCOW_INIT_REQUEST(qcow_init_request)
{
	struct qcow_request *req = blk_mq_rq_to_pdu(rq);

	INIT_WORK(&req->work, qcow_request_work);
	req->dev = set->driver_data;
	return 0;
}

const struct blk_mq_ops qcow_mq_ops = {
	.queue_rq	= qcow_queue_rq,
	.complete	= qcow_complete_rq,
	.init_hctx	= qcow_init_hctx,
	.init_request	= qcow_init_request,
	.map_queues	= qcow_map_queues,
};

/**
 * qcow_requests_init - what the requests of a device need
 * @dev: the device
 *
 * Nothing here is shared with other devices: the file of one may lie on another,
 * which then must not wait for what the first one holds.
 *
 * Return: 0 or -ENOMEM; qcow_requests_exit() is to be called in any case.
 */
int qcow_requests_init(struct qcow_device *dev)
{
	const struct qcow_image *image = dev->chain->layers[0];
	size_t size;

	init_waitqueue_head(&dev->gate_drained);
	spin_lock_init(&dev->gate_lock);
	INIT_LIST_HEAD(&dev->gate_held);
	dev->max_segments = QCOW_MAX_SEGMENTS;
	if (qcow_compression(image))
		dev->max_segments = max(dev->max_segments,
					qcow_cluster_size(image) / SZ_4K + 1);
	size = qcow_vecs(dev) * sizeof(struct bio_vec);
	dev->wq = alloc_workqueue("qcow%d", WQ_UNBOUND | WQ_MEM_RECLAIM, 0,
				  dev->index);
	dev->retry_wq = alloc_workqueue("qcow%d-retry",
					WQ_UNBOUND | WQ_MEM_RECLAIM, 0,
					dev->index);
	if (!dev->wq || !dev->retry_wq ||
	    percpu_ref_init(&dev->gate, qcow_gate_release,
			    PERCPU_REF_ALLOW_REINIT, GFP_KERNEL) ||
	    mempool_init_kmalloc_pool(&dev->segments, QCOW_SEGMENT_POOL_MIN,
				      sizeof(struct qcow_segment)) ||
	    mempool_init_kmalloc_pool(&dev->request_vecs, QCOW_VECS_POOL_MIN,
				      size) ||
	    mempool_init_kmalloc_pool(&dev->segment_vecs, QCOW_VECS_POOL_MIN,
				      size))
		return -ENOMEM;
	return 0;
}

/**
 * qcow_requests_exit - undo qcow_requests_init()
 * @dev: the device; it has no requests any more
 */
void qcow_requests_exit(struct qcow_device *dev)
{
	if (dev->wq)
		destroy_workqueue(dev->wq);
	if (dev->retry_wq)
		destroy_workqueue(dev->retry_wq);
	percpu_ref_exit(&dev->gate);
	mempool_exit(&dev->segment_vecs);
	mempool_exit(&dev->request_vecs);
	mempool_exit(&dev->segments);
}
