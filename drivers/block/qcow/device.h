/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Block devices: what main.c, device.c, status.c, freeze.c and request.c know of each
 * other.
 */
#ifndef QCOW_DEVICE_H
#define QCOW_DEVICE_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/percpu-refcount.h>
#include <linux/workqueue.h>

#include <linux/qcow.h>

#include "qcow.h"

#define QCOW_MAX_HW_QUEUES	16U
/* Reads have queues of their own: see the gate in request.c. */
#define QCOW_QUEUE_MAPS		2U

/**
 * struct qcow_device_stats - requests, counted on each CPU
 * @reads: reads
 * @writes: writes
 * @discards: discards
 * @zeroes: write-zeroes
 * @flushes: flushes
 * @errors: those of any kind that failed
 * @inlined: reads and writes that no worker was needed for
 */
struct qcow_device_stats {
	u64 reads;
	u64 writes;
	u64 discards;
	u64 zeroes;
	u64 flushes;
	u64 errors;
	u64 inlined;
};

/**
 * struct qcow_device - /dev/qcowN
 * @index: N
 * @disk: lives as long as this struct
 * @tag_set: of the queue
 * @queues: hardware queues, see qcow_device_put_queues()
 * @flush_key: the lock class of its flush machinery
 * @wq: request workers
 * @retry_wq: for I/O that @wq may be waiting for
 * @segments: struct qcow_segment
 * @request_vecs: memory of requests that consist of several bios
 * @segment_vecs: memory of segments with a head or tail
 * @max_segments: most segments of a request, for which there is room
 * @gate: held by each request that may change the image; dead while it is shut
 * @gate_drained: woken when nobody holds it any more
 * @gate_lock: guards @gate_held
 * @gate_held: requests that wait for it to open
 * @chain: the image and its backing files
 * @cache: of the tables of @chain
 * @files: what userspace passed, held until detach for the locks that belong to
 *	these very files: two for each layer of @chain, in its order; the second
 *	one is the external data file, or NULL
 * @nr_layers: half as many
 * @discard: QCOW_DISCARD_*
 * @read_only: the device refuses writes
 * @write_through: what a write has written is durable when it is done
 * @no_flush: nothing that is written is made durable
 * @no_inline: each request is for a worker
 * @inline_skip: after how many writes the next one is tried without a worker, since
 *	the last ones were in vain
 * @inline_left: how many of those are still to come
 * @autoclear: to be detached by the last close behind its first use
 * @added: the attach is over, but for its return; set under disk->open_mutex and
 *	qcow_devices_mutex
 * @claimed: being detached, cannot be opened; guarded by disk->open_mutex, and
 *	set under qcow_devices_mutex, too
 * @deferred: to be detached by the last close; guarded by disk->open_mutex
 * @detach_work: that detach
 * @frozen: in the hands of freeze.c, and not detached; guarded by
 *	qcow_devices_mutex
 * @freezer: the open file that the freeze belongs to
 * @freeze_node: in the list of those that are frozen, while they are
 * @thaw_work: ends it
 * @stats: per CPU
 */
struct qcow_device {
	int index;
	struct gendisk *disk;
	struct blk_mq_tag_set tag_set;
	struct blk_mq_hw_ctx *queues[QCOW_QUEUE_MAPS * QCOW_MAX_HW_QUEUES];
	struct lock_class_key flush_key;
	struct workqueue_struct *wq;
	struct workqueue_struct *retry_wq;
	mempool_t segments;
	mempool_t request_vecs;
	mempool_t segment_vecs;
	unsigned int max_segments;
	struct percpu_ref gate;
	wait_queue_head_t gate_drained;
	spinlock_t gate_lock;	/* guards @gate_held */
	struct list_head gate_held;
	struct qcow_chain *chain;
	struct qcow_cache *cache;
	struct file **files;
	unsigned int nr_layers;
	u32 discard;
	bool read_only;
	bool write_through;
	bool no_flush;
	bool no_inline;
	unsigned int inline_skip;
	unsigned int inline_left;
	bool autoclear;
	bool added;
	bool claimed;
	bool deferred;
	struct work_struct detach_work;
	bool frozen;
	const struct file *freezer;
	struct list_head freeze_node;
	struct delayed_work thaw_work;
	struct qcow_device_stats __percpu *stats;
};

/* ---- request.c ----------------------------------------------------------- */

extern const struct blk_mq_ops qcow_mq_ops;

size_t qcow_request_size(void);
int qcow_requests_init(struct qcow_device *dev);
void qcow_requests_exit(struct qcow_device *dev);
int qcow_gate_shut(struct qcow_device *dev);
void qcow_gate_open(struct qcow_device *dev);

/* ---- inline.c ------------------------------------------------------------ */

/**
 * struct qcow_inline - what a task was doing while it does I/O for the driver
 * @bio_list: bios that it submits
 * @plug: requests that it collects
 * @scope: from qcow_io_scope_enter()
 * @read_bytes: what it is known to have read
 * @write_bytes: and written
 */
struct qcow_inline {
	struct bio_list *bio_list;
	struct blk_plug *plug;
	unsigned int scope;
	u64 read_bytes;
	u64 write_bytes;
};

bool qcow_inline_enter(struct request *rq, struct qcow_inline *saved);
void qcow_inline_exit(const struct qcow_inline *saved);

/* ---- device.c ------------------------------------------------------------ */

int qcow_device_attach(const struct qcow_attach *args,
		       const struct qcow_layer *layers,
		       const struct qcow_key *keys, const char *snapshot,
		       struct qcow_message *msg, int *index);
int qcow_device_detach(int index, bool deferred);
int qcow_device_status(struct qcow_status *status, char *buf);
int qcow_device_layer(struct qcow_layer_status *status, char *buf,
		      const char **path);
int qcow_device_next(int first);
struct qcow_device *qcow_device_hold(int index);
void qcow_device_release(struct qcow_device *dev);
int qcow_devices_init(void);
void qcow_devices_exit(void);

/* ---- status.c ------------------------------------------------------------ */

extern const struct attribute_group *qcow_attr_groups[];

void qcow_device_sum(const struct qcow_device *dev,
		     struct qcow_device_stats *sum);
void qcow_device_describe(struct qcow_device *dev, struct qcow_status *status);

/* ---- freeze.c ------------------------------------------------------------ */

void qcow_freeze_setup(struct qcow_device *dev);
int qcow_freeze(int index, const struct file *owner, unsigned int timeout);
int qcow_thaw(int index, const struct file *owner);
void qcow_thaw_all(const struct file *owner);
int qcow_freezes_init(void);
void qcow_freezes_exit(void);

#endif /* QCOW_DEVICE_H */
