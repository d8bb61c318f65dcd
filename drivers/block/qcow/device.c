// SPDX-License-Identifier: GPL-2.0-only
/*
 * Block devices: /dev/qcowN, from attach to detach.
 *
 * A number is reserved in the idr before anything else is done, and given back
 * after everything else is gone, so a number never stands for two devices. In
 * between, the idr holds the device itself only while the device is whole: from
 * just before its disk is added, so that a uevent can be answered with a STATUS,
 * to the beginning of the detach. Who finds it there under qcow_devices_mutex may
 * use all of it until they unlock, but for detaching it: that waits for @added.
 * That mutex is never held during I/O.
 *
 * Detach and open decide under disk->open_mutex who of them is first: detach
 * sets @claimed if nobody has the device open, and open fails once it is set.
 * Detach and freeze decide likewise under qcow_devices_mutex: a device that is
 * frozen counts as one that is open, and thawing it as the close.
 *
 * The struct lives as long as its disk, which others may hold for a moment after
 * detach; with everything that a request needs gone by then.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/blkdev.h>
#include <linux/file.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "device.h"

#define QCOW_QUEUE_DEPTH	128
#define QCOW_MAX_SECTORS	8192

/* Held while a chain is opened; then another attach may share what is in it. */
static DEFINE_MUTEX(qcow_chains_mutex);

static DEFINE_MUTEX(qcow_devices_mutex);
static DEFINE_IDR(qcow_devices);
static struct workqueue_struct *qcow_detach_wq;
/* Disks that were added, and are not freed yet */
static atomic_t qcow_disks;

/* The image is damaged, as was just found: have udev look at the state. */
static void qcow_device_on_corrupt(void *data)
{
	char *env[3] = { "QCOW_CORRUPT=1" };
	struct qcow_device *dev = data;

	env[1] = kasprintf(GFP_KERNEL, "QCOW_DAMAGE=%s",
			   dev->chain->layers[0]->damage.text);
	kobject_uevent_env(&disk_to_dev(dev->disk)->kobj, KOBJ_CHANGE, env);
	kfree(env[1]);
}

/* ---- open and close ------------------------------------------------------ */

static int QCOW_DISK_OPEN(qcow_disk_open)
{
	struct qcow_device *dev = QCOW_OPENED_DISK->private_data;

	if (dev->claimed)
		return -ENXIO;
	/*
	 * Who looks at each new disk, as udev does, reads it and shares it: that is
	 * not the use that it was attached for.
	 */
	if (dev->autoclear && mode & (QCOW_OPEN_WRITE | QCOW_OPEN_EXCL))
		WRITE_ONCE(dev->deferred, true);
	return 0;
}

/*
 * Have a worker detach the device, if it still has no users then. Somebody else may
 * have done so by the time that the work runs; so it holds the disk.
 */
static void qcow_device_queue_detach(struct qcow_device *dev)
{
	get_device(disk_to_dev(dev->disk));
	if (!queue_work(qcow_detach_wq, &dev->detach_work))
		put_disk(dev->disk);
}

static void QCOW_DISK_RELEASE(qcow_disk_release)
{
	struct qcow_device *dev = disk->private_data;
	struct qcow_device_stats stats;

	if (disk_openers(disk))
		return;
	/*
	 * On Linux before 6.5 a partition that is open, by udev for example, does
	 * not tell of those who open it besides.
	 */
	qcow_device_sum(dev, &stats);
	if (dev->autoclear && stats.writes)
		WRITE_ONCE(dev->deferred, true);
	/* Before the attach is over, nobody detaches. */
	if (dev->deferred && dev->added)
		qcow_device_queue_detach(dev);
}

static void qcow_device_free(struct qcow_device *dev)
{
	lockdep_unregister_key(&dev->flush_key);
	kfree(dev);
}

/*
 * Who drops the last reference of a disk may do so when it does not hold the module
 * any more: qcow_devices_exit() waits for it.
 */
static void qcow_disk_free(struct gendisk *disk)
{
	qcow_device_free(disk->private_data);
	if (atomic_dec_and_test(&qcow_disks))
		wake_up_var(&qcow_disks);
}

static const struct block_device_operations qcow_disk_ops = {
	.owner = THIS_MODULE,
	.open = qcow_disk_open,
	.release = qcow_disk_release,
	.free_disk = qcow_disk_free,
};

/* ---- files and images ---------------------------------------------------- */

static void qcow_device_put_files(struct qcow_device *dev)
{
	unsigned int i;

	for (i = 0; i < 2 * dev->nr_layers; i++)
		if (dev->files[i])
			qcow_fput(dev->files[i]);
	kvfree(dev->files);
}

static int qcow_device_get_files(struct qcow_device *dev,
				 const struct qcow_layer *layers,
				 unsigned int count, struct qcow_message *msg)
{
	unsigned int i;
	int fd;

	dev->files = kvcalloc(count, 2 * sizeof(*dev->files), GFP_KERNEL);
	if (!dev->files)
		return -ENOMEM;
	dev->nr_layers = count;
	for (i = 0; i < 2 * count; i++) {
		const struct qcow_layer *layer = &layers[i / 2];

		if (i % 2 && !(layer->flags & QCOW_LAYER_DATA_FILE))
			continue;
		fd = i % 2 ? layer->data_fd : layer->fd;
		dev->files[i] = fget(fd);
		if (!dev->files[i]) {
			qcow_message_set(msg, "the descriptor %d of file %u of the chain is not open",
					 fd, i / 2);
			qcow_device_put_files(dev);
			return -EBADF;
		}
	}
	return 0;
}

static int qcow_compare_files(const void *a, const void *b)
{
	const struct inode *x = (*(struct file *const *)a)->f_mapping->host;
	const struct inode *y = (*(struct file *const *)b)->f_mapping->host;

	return x < y ? -1 : x > y;
}

/*
 * A file that is its own backing file would change below itself. That is the
 * only way for a loop: the new device does not exist yet, so none of the devices
 * that the files may be on can be above it.
 */
static int qcow_device_check_loop(struct qcow_device *dev,
				  struct qcow_message *msg)
{
	struct file **sorted;
	unsigned int count = 0;
	unsigned int i;
	int err = 0;

	sorted = kvcalloc(dev->nr_layers, 2 * sizeof(*sorted), GFP_KERNEL);
	if (!sorted)
		return -ENOMEM;
	for (i = 0; i < 2 * dev->nr_layers; i++)
		if (dev->files[i])
			sorted[count++] = dev->files[i];
	sort(sorted, count, sizeof(*sorted), qcow_compare_files, NULL);
	for (i = 1; i < count; i++) {
		if (qcow_compare_files(&sorted[i - 1], &sorted[i]))
			continue;
		qcow_message_set(msg, "%pD is in the backing chain twice",
				 sorted[i]);
		err = -ELOOP;
		break;
	}
	kvfree(sorted);
	return err;
}

/* Close the images, the one that is written first. */
static int qcow_device_close_chain(struct qcow_device *dev)
{
	struct qcow_chain *chain = dev->chain;
	unsigned int i;
	int err = 0;

	for (i = 0; i < chain->depth; i++) {
		int ret = qcow_image_close(chain->layers[i]);

		if (!err)
			err = ret;
		cond_resched();
	}
	kvfree(chain);
	return err;
}

static int qcow_device_open_chain(struct qcow_device *dev,
				  const struct qcow_attach *args,
				  const struct qcow_layer *layers,
				  const struct qcow_key *keys,
				  const char *snapshot,
				  struct qcow_message *msg)
{
	struct qcow_chain *chain;
	int err;

	lockdep_assert_held(&qcow_chains_mutex);
	chain = kvzalloc(struct_size(chain, layers, dev->nr_layers), GFP_KERNEL);
	if (!chain)
		return -ENOMEM;
	dev->chain = chain;
	while (chain->depth < dev->nr_layers) {
		unsigned int i = chain->depth;
		struct qcow_message reason = {};
		struct qcow_image_source source = {
			.file = dev->files[2 * i],
			.data = dev->files[2 * i + 1],
			.snapshot = i ? NULL : snapshot,
			.key = keys[i].data ? &keys[i] : NULL,
			.format = layers[i].format,
			.io_mode = args->io_mode,
			.writable = !i && !dev->read_only,
			/* What is kept in its tables is about this chain. */
			.alone = !i && dev->nr_layers > 2,
			.no_flush = dev->no_flush,
		};

		err = fatal_signal_pending(current) ? -EINTR :
			qcow_image_open(&source, dev->cache, &chain->layers[i],
					&reason);
		if (!err) {
			chain->depth++;
			if (chain->layers[i]->data_raw &&
			    chain->depth < dev->nr_layers) {
				qcow_message_set(&reason, "a raw external data file excludes a backing file, but there is one");
				err = -EINVAL;
			}
		}
		if (err) {
			if (i && reason.text[0])
				qcow_message_set(msg, "backing file %pD: %s",
						 source.file, reason.text);
			else
				*msg = reason;
			qcow_device_close_chain(dev);
			return err;
		}
		cond_resched();
	}
	return 0;
}

/* ---- numbers ------------------------------------------------------------- */

static int qcow_index_reserve(int wanted)
{
	int start = wanted < 0 ? 0 : wanted;
	int end = wanted < 0 || wanted == INT_MAX ? 0 : wanted + 1;
	unsigned int scope;
	int index;

	/* Who thaws a device, so that memory can be freed, needs the mutex. */
	scope = memalloc_noio_save();
	mutex_lock(&qcow_devices_mutex);
	index = idr_alloc(&qcow_devices, NULL, start, end, GFP_KERNEL);
	mutex_unlock(&qcow_devices_mutex);
	memalloc_noio_restore(scope);
	return index == -ENOSPC && wanted >= 0 ? -EEXIST : index;
}

static void qcow_index_release(int index)
{
	mutex_lock(&qcow_devices_mutex);
	idr_remove(&qcow_devices, index);
	mutex_unlock(&qcow_devices_mutex);
}

/* From now on the number stands for this device, or for none with NULL. */
static void qcow_index_publish(int index, struct qcow_device *dev)
{
	mutex_lock(&qcow_devices_mutex);
	idr_replace(&qcow_devices, dev, index);
	mutex_unlock(&qcow_devices_mutex);
}

/* ---- attach -------------------------------------------------------------- */

static void qcow_device_limits(const struct qcow_device *dev,
			       struct qcow_limits *limits)
{
	struct qcow_image *image = dev->chain->layers[0];
	u32 cluster = qcow_cluster_size(image);
	u32 physical, optimal;
	unsigned int most;
	bool zero;

	/* Version 2 has no zero clusters: there, what is below would show. */
	zero = !dev->read_only &&
	       (image->header.version > 2 || dev->chain->depth == 1);
	most = round_down(UINT_MAX >> SECTOR_SHIFT, cluster >> SECTOR_SHIFT);
	qcow_file_units(qcow_data_file(image), &physical, &optimal);

	*limits = (struct qcow_limits) {
		.physical_block_size = min(cluster, max_t(u32, physical, SZ_4K)),
		/* The stripe of a disk below, where it is of whole clusters */
		.io_opt = optimal % cluster ? cluster : max(optimal, cluster),
		.max_hw_sectors = QCOW_MAX_SECTORS,
		.max_segments = dev->max_segments,
		.max_write_zeroes_sectors = zero ? most : 0,
		.write_cache = !dev->read_only && !dev->write_through,
		.stable_writes = qcow_stable_writes(dev->files[1] ?:
						    dev->files[0]),
	};
	/* Requests that are of whole clusters are compressed as a whole. */
	if (qcow_compression(image))
		limits->max_hw_sectors = max_t(u32, cluster, SZ_1M) >>
					 SECTOR_SHIFT;
	if (zero && dev->discard != QCOW_DISCARD_IGNORE) {
		limits->discard_granularity = cluster;
		limits->max_discard_sectors = most;
	}
}

static int qcow_device_alloc_disk(struct qcow_device *dev)
{
	struct qcow_limits limits;
	struct gendisk *disk;
	int err;

	dev->tag_set.ops = &qcow_mq_ops;
	dev->tag_set.nr_maps = QCOW_QUEUE_MAPS;
	dev->tag_set.nr_hw_queues = dev->tag_set.nr_maps *
		min(num_online_cpus(), QCOW_MAX_HW_QUEUES);
	dev->tag_set.queue_depth = QCOW_QUEUE_DEPTH;
	dev->tag_set.numa_node = NUMA_NO_NODE;
	dev->tag_set.flags = QCOW_TAG_SET_FLAGS;
	/* What queue_rq() starts below may wait: see inline.c. */
	if (!dev->no_inline)
		dev->tag_set.flags |= BLK_MQ_F_BLOCKING;
	dev->tag_set.cmd_size = qcow_request_size();
	dev->tag_set.driver_data = dev;
	err = blk_mq_alloc_tag_set(&dev->tag_set);
	if (err)
		return err;

	qcow_device_limits(dev, &limits);
	disk = qcow_alloc_disk(&dev->tag_set, &limits, dev);
	if (IS_ERR(disk)) {
		blk_mq_free_tag_set(&dev->tag_set);
		return PTR_ERR(disk);
	}
	snprintf(disk->disk_name, sizeof(disk->disk_name), "qcow%d",
		 dev->index);
	disk->fops = &qcow_disk_ops;
	disk->private_data = dev;
	set_capacity(disk, dev->chain->layers[0]->size >> SECTOR_SHIFT);
	if (dev->read_only)
		set_disk_ro(disk, true);
	dev->disk = disk;
	return 0;
}

static void qcow_detach_work_fn(struct work_struct *work);

/*
 * Where a software queue feeds several hardware queues, here one for reads and one for
 * the rest, the kernel adds its sysfs object to each of them in turn, and forgets about
 * the reference to the one before (blk_mq_register_hctx()), which would never be freed.
 * Those of a disk that has left sysfs have one reference each, that of the request queue;
 * what there is beyond that nobody knows of.
 */
static void qcow_device_put_queues(struct qcow_device *dev)
{
	unsigned int i;

	if (!QCOW_LEAKS_QUEUES)
		return;
	for (i = 0; i < ARRAY_SIZE(dev->queues); i++)
		while (dev->queues[i] &&
		       kref_read(&dev->queues[i]->kobj.kref) > 1)
			kobject_put(&dev->queues[i]->kobj);
}

/**
 * qcow_device_attach - make a device
 * @args: what kind of; its numbers have been checked
 * @layers: the files, in kernel memory; @args->layer_count of them
 * @keys: as many, those that are none without data
 * @snapshot: ID or name of the internal snapshot to show, or NULL for the disk
 * @msg: where to say what is wrong
 * @index: its number
 *
 * When this returns, the device has its size, and its partitions are there.
 *
 * Return: 0; -EEXIST if the wanted number is taken; -EBADF for a descriptor that
 * is not open, or not open for what is needed; -ELOOP if a file is there twice;
 * or another errno, with @msg saying more.
 */
int qcow_device_attach(const struct qcow_attach *args,
		       const struct qcow_layer *layers,
		       const struct qcow_key *keys, const char *snapshot,
		       struct qcow_message *msg, int *index)
{
	struct qcow_image *image;
	struct qcow_device *dev;
	struct gendisk *disk;
	int err;

	if (layers[0].format != QCOW_FORMAT_QCOW2) {
		qcow_message_set(msg, "the image must be qcow2; only backing files may be raw");
		return -EINVAL;
	}

	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev)
		return -ENOMEM;
	dev->discard = args->discard;
	dev->read_only = args->flags & QCOW_ATTACH_READ_ONLY;
	dev->autoclear = args->flags & QCOW_ATTACH_AUTOCLEAR;
	dev->write_through = args->flags & QCOW_ATTACH_WRITE_THROUGH;
	dev->no_flush = args->flags & QCOW_ATTACH_NO_FLUSH;
	dev->no_inline = args->flags & QCOW_ATTACH_NO_INLINE;
	INIT_WORK(&dev->detach_work, qcow_detach_work_fn);
	lockdep_register_key(&dev->flush_key);
	qcow_freeze_setup(dev);

	dev->index = qcow_index_reserve(args->index);
	if (dev->index < 0) {
		err = dev->index;
		if (err == -EEXIST)
			qcow_message_set(msg, "qcow%d is in use", args->index);
		goto err_free;
	}
	err = -ENOMEM;
	dev->stats = alloc_percpu(struct qcow_device_stats);
	if (!dev->stats)
		goto err_index;
	dev->cache = qcow_cache_create(args->cache_limit);
	if (IS_ERR_OR_NULL(dev->cache)) {
		err = dev->cache ? PTR_ERR(dev->cache) : -ENOMEM;
		goto err_stats;
	}
	err = qcow_device_get_files(dev, layers, args->layer_count, msg);
	if (err)
		goto err_cache;
	err = qcow_device_check_loop(dev, msg);
	if (err)
		goto err_files;
	err = mutex_lock_killable(&qcow_chains_mutex);
	if (err)
		goto err_files;
	err = qcow_device_open_chain(dev, args, layers, keys, snapshot, msg);
	mutex_unlock(&qcow_chains_mutex);
	if (err)
		goto err_files;
	err = qcow_pack_init(dev->chain->layers[0], args->compress, msg) ?:
	      qcow_requests_init(dev) ?:
	      qcow_bitmaps_load(dev->chain->layers[0], msg) ?:
	      qcow_image_begin(dev->chain->layers[0], msg);
	if (err)
		goto err_requests;
	err = qcow_device_alloc_disk(dev);
	if (err)
		goto err_requests;

	disk = dev->disk;
	/* The caller has the control node open, so the module is here. */
	__module_get(THIS_MODULE);
	atomic_inc(&qcow_disks);
	/* Who learns of the disk as it is added can ask for its status. */
	qcow_index_publish(dev->index, dev);
	err = device_add_disk(NULL, dev->disk, qcow_attr_groups);
	if (err)
		goto err_disk;
	*index = dev->index;
	/* What is only read may be shared by several devices. */
	image = dev->chain->layers[0];
	if (image->writable)
		qcow_image_watch(image, qcow_device_on_corrupt, dev);
	/* From here on it may be detached; but not before open_mutex is free. */
	get_device(disk_to_dev(disk));
	mutex_lock(&disk->open_mutex);
	mutex_lock(&qcow_devices_mutex);
	dev->added = true;
	mutex_unlock(&qcow_devices_mutex);
	if (dev->deferred && !disk_openers(disk))
		qcow_device_queue_detach(dev);
	mutex_unlock(&disk->open_mutex);
	put_disk(disk);
	return 0;

err_disk:
	qcow_index_publish(dev->index, NULL);
	qcow_device_put_queues(dev);
	/* A disk that was never added does not free what is behind it. */
	put_disk(dev->disk);
	atomic_dec(&qcow_disks);
	module_put(THIS_MODULE);
	blk_mq_free_tag_set(&dev->tag_set);
err_requests:
	qcow_requests_exit(dev);
	qcow_device_close_chain(dev);
err_files:
	qcow_device_put_files(dev);
err_cache:
	qcow_cache_put(dev->cache);
err_stats:
	free_percpu(dev->stats);
err_index:
	qcow_index_release(dev->index);
err_free:
	qcow_device_free(dev);
	return err;
}

/* ---- detach -------------------------------------------------------------- */

/* Take apart a device that is claimed. Drops what the attach held of the disk. */
static int qcow_device_remove(struct qcow_device *dev)
{
	int index = dev->index;
	int err;

	/* No STATUS begins from here on, and none is under way. */
	qcow_index_publish(index, NULL);

	qcow_image_unwatch(dev->chain->layers[0]);
	del_gendisk(dev->disk);
	qcow_device_put_queues(dev);
	/* Workers may still have a few steps to do behind their last request. */
	qcow_requests_exit(dev);
	blk_mq_free_tag_set(&dev->tag_set);

	err = qcow_device_close_chain(dev);
	if (err)
		pr_err("qcow%d: detached, but not everything could be written (error %d)\n",
		       index, err);
	qcow_device_put_files(dev);
	qcow_cache_put(dev->cache);
	free_percpu(dev->stats);

	put_disk(dev->disk);
	qcow_index_release(index);
	module_put(THIS_MODULE);
	return err;
}

/* Return: 1 if the caller is to remove the device, 0 if a close or thaw is. */
static int qcow_device_claim(struct qcow_device *dev, bool deferred)
{
	int ret = 1;

	mutex_lock(&dev->disk->open_mutex);
	mutex_lock(&qcow_devices_mutex);
	if (dev->claimed)
		ret = -ENODEV;
	else if (!disk_openers(dev->disk) && !dev->frozen)
		dev->claimed = true;
	else
		ret = deferred ? 0 : -EBUSY;
	if (!ret)
		WRITE_ONCE(dev->deferred, true);
	mutex_unlock(&qcow_devices_mutex);
	mutex_unlock(&dev->disk->open_mutex);
	return ret;
}

/* The last close of a device that is to be detached then. */
static void qcow_detach_work_fn(struct work_struct *work)
{
	struct qcow_device *dev =
		container_of(work, struct qcow_device, detach_work);
	struct gendisk *disk = dev->disk;

	/* If somebody opened it again, their close comes here again. */
	if (qcow_device_claim(dev, true) > 0)
		qcow_device_remove(dev);
	put_disk(disk);
}

/**
 * qcow_device_detach - remove a device
 * @index: its number
 * @deferred: if it is open, have the last close do it
 *
 * Unless the detach was put off, everything is written when this returns, the
 * number is free, and the files are closed on return to user mode at the latest.
 *
 * Return: 0; -ENODEV if there is no such device; -EBUSY while it is open, frozen
 * or still being attached; or the error of a write, and then the device is gone as
 * well.
 */
int qcow_device_detach(int index, bool deferred)
{
	struct qcow_device *dev;
	struct gendisk *disk;
	int ret = 0;

	mutex_lock(&qcow_devices_mutex);
	dev = idr_find(&qcow_devices, index);
	if (!dev) {
		ret = -ENODEV;
	} else if (!dev->added) {
		ret = -EBUSY;
	} else {
		disk = dev->disk;
		get_device(disk_to_dev(disk));
	}
	mutex_unlock(&qcow_devices_mutex);
	if (ret)
		return ret;

	ret = qcow_device_claim(dev, deferred);
	if (ret > 0)
		ret = qcow_device_remove(dev);
	put_disk(disk);
	return ret;
}

/* ---- freeze -------------------------------------------------------------- */

/**
 * qcow_device_hold - keep a device from being detached, to freeze it
 * @index: its number
 *
 * Return: the device; -ENODEV if there is none, or it is being detached; -EBUSY if
 * it is held already, or still being attached.
 */
struct qcow_device *qcow_device_hold(int index)
{
	struct qcow_device *dev;

	mutex_lock(&qcow_devices_mutex);
	dev = idr_find(&qcow_devices, index);
	if (!dev || dev->claimed) {
		dev = ERR_PTR(-ENODEV);
	} else if (!dev->added || dev->frozen) {
		dev = ERR_PTR(-EBUSY);
	} else {
		WRITE_ONCE(dev->frozen, true);
		get_device(disk_to_dev(dev->disk));
	}
	mutex_unlock(&qcow_devices_mutex);
	return dev;
}

/**
 * qcow_device_release - undo qcow_device_hold()
 * @dev: the device; perhaps gone when this returns
 */
void qcow_device_release(struct qcow_device *dev)
{
	struct gendisk *disk = dev->disk;

	mutex_lock(&qcow_devices_mutex);
	WRITE_ONCE(dev->frozen, false);
	/* As behind a close. Not here: open_mutex may be held by who waits for us. */
	if (READ_ONCE(dev->deferred))
		qcow_device_queue_detach(dev);
	mutex_unlock(&qcow_devices_mutex);
	put_disk(disk);
}

/* ---- queries ------------------------------------------------------------- */

/**
 * qcow_device_status - state and counters of one device
 * @status: @index says of which; all else but the sizes is filled in
 * @buf: @status->snapshot_size bytes for what the snapshot was attached by, or
 *	NULL
 *
 * Return: 0; -ENODEV; -ENAMETOOLONG.
 */
int qcow_device_status(struct qcow_status *status, char *buf)
{
	struct qcow_device *dev;
	int err = -ENODEV;

	mutex_lock(&qcow_devices_mutex);
	dev = idr_find(&qcow_devices, status->index);
	if (dev) {
		const char *name = dev->chain->layers[0]->snapshot ?: "";

		qcow_device_describe(dev, status);
		err = buf && strscpy(buf, name, status->snapshot_size) < 0 ?
		      -ENAMETOOLONG : 0;
	}
	mutex_unlock(&qcow_devices_mutex);
	return err;
}

/**
 * qcow_device_layer - describe one file of a device's chain
 * @status: @index and @layer say which; the rest is filled in
 * @buf: @status->path_size bytes for the path, or NULL
 * @path: where in @buf the path begins, if @buf is given
 *
 * Return: 0; -ENODEV; -ENOENT if the chain is shorter; -ENAMETOOLONG.
 */
int qcow_device_layer(struct qcow_layer_status *status, char *buf,
		      const char **path)
{
	const struct qcow_image *image;
	struct qcow_device *dev;
	int err = 0;

	mutex_lock(&qcow_devices_mutex);
	dev = idr_find(&qcow_devices, status->index);
	if (!dev) {
		err = -ENODEV;
		goto out;
	}
	if (status->layer >= dev->chain->depth) {
		err = -ENOENT;
		goto out;
	}
	image = dev->chain->layers[status->layer];
	status->format = image->format;
	status->virtual_size = image->size;
	status->direct = image->file.direct;
	status->version = 0;
	status->cluster_size = 0;
	status->encryption = image->header.crypt_method;
	if (image->format == QCOW_FORMAT_QCOW2) {
		status->version = image->header.version;
		status->cluster_size = qcow_cluster_size(image);
	}
	if (buf) {
		*path = file_path(dev->files[2 * status->layer], buf,
				  status->path_size);
		err = PTR_ERR_OR_ZERO(*path);
	}
out:
	mutex_unlock(&qcow_devices_mutex);
	return err;
}

/**
 * qcow_device_next - the next device in the order of numbers
 * @first: the lowest number to consider
 *
 * Return: its number, or -1 if there is none.
 */
int qcow_device_next(int first)
{
	int index = first;
	void *dev;

	mutex_lock(&qcow_devices_mutex);
	dev = idr_get_next(&qcow_devices, &index);
	mutex_unlock(&qcow_devices_mutex);
	return dev ? index : -1;
}

/* ---- module -------------------------------------------------------------- */

/**
 * qcow_devices_init - prepare for devices
 *
 * Return: 0, or -ENOMEM.
 */
int qcow_devices_init(void)
{
	int err;

	/* Freezable: what a detach writes would outrun a saved memory. */
	qcow_detach_wq = alloc_workqueue("qcow-detach",
					 WQ_UNBOUND | WQ_FREEZABLE, 0);
	if (!qcow_detach_wq)
		return -ENOMEM;
	err = qcow_freezes_init();
	if (err)
		destroy_workqueue(qcow_detach_wq);
	return err;
}

/**
 * qcow_devices_exit - undo qcow_devices_init()
 *
 * Each device holds the module, so there is none any more; but the work that
 * detached the last one may not have returned yet, and others may still be about to
 * drop a disk, or on their way out of qcow_disk_free().
 */
void qcow_devices_exit(void)
{
	qcow_freezes_exit();
	destroy_workqueue(qcow_detach_wq);
	wait_var_event(&qcow_disks, !atomic_read(&qcow_disks));
	synchronize_rcu_tasks();
	idr_destroy(&qcow_devices);
}
