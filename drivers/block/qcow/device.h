/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Block devices: what main.c, device.c and request.c know of each other.
 */
#ifndef QCOW_DEVICE_H
#define QCOW_DEVICE_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/workqueue.h>

#include <linux/qcow.h>

#include "qcow.h"

/* Most segments of a request; request.c has room for them. */
#define QCOW_MAX_SEGMENTS	128

/**
 * struct qcow_device_stats - requests, counted on each CPU
 * @reads: reads
 * @writes: writes
 * @discards: discards
 * @zeroes: write-zeroes
 * @flushes: flushes
 * @errors: those of any kind that failed
 */
struct qcow_device_stats {
	u64 reads;
	u64 writes;
	u64 discards;
	u64 zeroes;
	u64 flushes;
	u64 errors;
};

/**
 * struct qcow_device - /dev/qcowN
 * @index: N
 * @disk: lives as long as this struct
 * @tag_set: of the queue
 * @wq: request workers
 * @retry_wq: for I/O that @wq may be waiting for
 * @segments: struct qcow_segment
 * @request_vecs: memory of requests that consist of several bios
 * @segment_vecs: memory of segments with a head or tail
 * @chain: the image and its backing files
 * @cache: of the tables of @chain
 * @files: what userspace passed, held until detach for the locks that belong to
 *	these very files: two for each layer of @chain, in its order; the second
 *	one is the external data file, or NULL
 * @nr_layers: half as many
 * @discard: QCOW_DISCARD_*
 * @read_only: the device refuses writes
 * @autoclear: to be detached by the last close behind its first use
 * @added: the attach is over, but for its return; set under qcow_devices_mutex
 * @claimed: being detached, cannot be opened; guarded by disk->open_mutex
 * @deferred: to be detached by the last close; guarded by disk->open_mutex
 * @detach_work: that detach
 * @stats: per CPU
 */
struct qcow_device {
	int index;
	struct gendisk *disk;
	struct blk_mq_tag_set tag_set;
	struct workqueue_struct *wq;
	struct workqueue_struct *retry_wq;
	mempool_t segments;
	mempool_t request_vecs;
	mempool_t segment_vecs;
	struct qcow_chain *chain;
	struct qcow_cache *cache;
	struct file **files;
	unsigned int nr_layers;
	u32 discard;
	bool read_only;
	bool autoclear;
	bool added;
	bool claimed;
	bool deferred;
	struct work_struct detach_work;
	struct qcow_device_stats __percpu *stats;
};

/* ---- request.c ----------------------------------------------------------- */

extern const struct blk_mq_ops qcow_mq_ops;

size_t qcow_request_size(void);
int qcow_requests_init(struct qcow_device *dev);
void qcow_requests_exit(struct qcow_device *dev);

/* ---- device.c ------------------------------------------------------------ */

int qcow_device_attach(const struct qcow_attach *args,
		       const struct qcow_layer *layers, const char *snapshot,
		       struct qcow_message *msg, int *index);
int qcow_device_detach(int index, bool deferred);
int qcow_device_status(struct qcow_status *status, char *buf);
int qcow_device_layer(struct qcow_layer_status *status, char *buf,
		      const char **path);
int qcow_device_next(int first);
int qcow_devices_init(void);
void qcow_devices_exit(void);

#endif /* QCOW_DEVICE_H */
