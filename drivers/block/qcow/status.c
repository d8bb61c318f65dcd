// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a device tells of itself: counters, the answer to STATUS, sysfs.
 */
#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/sysfs.h>

#include "device.h"

/* ---- counters ------------------------------------------------------------ */

/**
 * qcow_device_sum - the counters of all CPUs together
 * @dev: the device
 * @sum: to be filled in
 */
void qcow_device_sum(const struct qcow_device *dev,
		     struct qcow_device_stats *sum)
{
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct qcow_device_stats *stats =
			per_cpu_ptr(dev->stats, cpu);

		sum->reads += READ_ONCE(stats->reads);
		sum->writes += READ_ONCE(stats->writes);
		sum->discards += READ_ONCE(stats->discards);
		sum->zeroes += READ_ONCE(stats->zeroes);
		sum->flushes += READ_ONCE(stats->flushes);
		sum->errors += READ_ONCE(stats->errors);
		sum->inlined += READ_ONCE(stats->inlined);
	}
}

static void qcow_cache_sum(const struct qcow_cache *cache,
			   struct qcow_cache_stats *sum)
{
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct qcow_cache_stats *stats =
			per_cpu_ptr(cache->stats, cpu);

		sum->hits += READ_ONCE(stats->hits);
		sum->misses += READ_ONCE(stats->misses);
	}
}

/**
 * qcow_device_describe - state and counters
 * @dev: a device that is not going to be detached meanwhile
 * @status: to be filled in, but for the index and the sizes of buffers
 */
void qcow_device_describe(struct qcow_device *dev, struct qcow_status *status)
{
	struct qcow_image *image = dev->chain->layers[0];
	struct qcow_device_stats stats;
	struct qcow_cache_stats cache;

	qcow_device_sum(dev, &stats);
	qcow_cache_sum(dev->cache, &cache);

	status->flags = 0;
	if (dev->read_only)
		status->flags |= QCOW_STATUS_READ_ONLY;
	if (READ_ONCE(dev->deferred))
		status->flags |= QCOW_STATUS_DETACHING;
	if (READ_ONCE(image->corrupt) ||
	    image->header.incompatible & QCOW_INCOMPAT_CORRUPT)
		status->flags |= QCOW_STATUS_CORRUPT;
	if (READ_ONCE(image->failed))
		status->flags |= QCOW_STATUS_FAILED;
	if (image->file.direct)
		status->flags |= QCOW_STATUS_DIRECT;
	if (image->snapshot)
		status->flags |= QCOW_STATUS_SNAPSHOT;
	if (dev->autoclear)
		status->flags |= QCOW_STATUS_AUTOCLEAR;
	if (READ_ONCE(dev->frozen))
		status->flags |= QCOW_STATUS_FROZEN;
	if (dev->write_through)
		status->flags |= QCOW_STATUS_WRITE_THROUGH;
	if (dev->no_flush)
		status->flags |= QCOW_STATUS_NO_FLUSH;
	status->layer_count = dev->chain->depth;
	status->virtual_size = image->size;
	status->version = image->header.version;
	status->cluster_size = qcow_cluster_size(image);
	status->refcount_bits = 1U << image->header.refcount_order;
	status->discard = dev->discard;
	status->openers = disk_openers(dev->disk);
	status->compress = qcow_compression(image);
	spin_lock(&dev->cache->lock);
	status->cache_size = dev->cache->count;
	spin_unlock(&dev->cache->lock);
	status->cache_limit = dev->cache->limit;
	status->reads = stats.reads;
	status->writes = stats.writes;
	status->discards = stats.discards;
	status->zeroes = stats.zeroes;
	status->flushes = stats.flushes;
	status->clusters_allocated = atomic64_read(&image->clusters_allocated);
	status->clusters_freed = atomic64_read(&image->clusters_freed);
	status->cache_hits = cache.hits;
	status->cache_misses = cache.misses;
	status->errors = stats.errors;
	status->inlined = stats.inlined;
}

/* ---- sysfs --------------------------------------------------------------- */

/*
 * The files in /sys/block/qcowN/qcow. del_gendisk() removes them and waits for
 * their readers before a detach takes anything apart.
 */
static struct qcow_device *qcow_device_of(struct device *dev)
{
	return dev_to_disk(dev)->private_data;
}

static ssize_t qcow_path_show(struct file *file, char *buf)
{
	char *path;
	size_t len;

	if (!file)
		return 0;
	path = file_path(file, buf, PAGE_SIZE - 1);
	if (IS_ERR(path))
		return PTR_ERR(path);
	len = strlen(path);
	memmove(buf, path, len);
	buf[len++] = '\n';
	buf[len] = '\0';
	return len;
}

static ssize_t image_show(struct device *dev, struct device_attribute *attr,
			  char *buf)
{
	return qcow_path_show(qcow_device_of(dev)->files[0], buf);
}
static DEVICE_ATTR_RO(image);

static ssize_t data_file_show(struct device *dev, struct device_attribute *attr,
			      char *buf)
{
	return qcow_path_show(qcow_device_of(dev)->files[1], buf);
}
static DEVICE_ATTR_RO(data_file);

static ssize_t snapshot_show(struct device *dev, struct device_attribute *attr,
			     char *buf)
{
	const char *name = qcow_device_of(dev)->chain->layers[0]->snapshot;

	return name ? sysfs_emit(buf, "%s\n", name) : 0;
}
static DEVICE_ATTR_RO(snapshot);

static ssize_t encryption_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	static const char * const names[] = {
		[QCOW_ENCRYPTION_NONE] = "none",
		[QCOW_ENCRYPTION_AES] = "aes",
		[QCOW_ENCRYPTION_LUKS] = "luks",
	};
	const struct qcow_image *image = qcow_device_of(dev)->chain->layers[0];

	return sysfs_emit(buf, "%s\n", names[image->header.crypt_method]);
}
static DEVICE_ATTR_RO(encryption);

static ssize_t damage_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	struct qcow_image *image = qcow_device_of(dev)->chain->layers[0];

	/* Pairs with the release after the message has been set. */
	return smp_load_acquire(&image->corrupt) ?
	       sysfs_emit(buf, "%s\n", image->damage.text) : 0;
}
static DEVICE_ATTR_RO(damage);

#define QCOW_STATUS_ATTR(name, member)					\
static ssize_t name##_show(struct device *dev,				\
			   struct device_attribute *attr, char *buf)	\
{									\
	struct qcow_status status;					\
	u64 value;							\
									\
	qcow_device_describe(qcow_device_of(dev), &status);		\
	value = status.member;						\
	return sysfs_emit(buf, "%llu\n", value);			\
}									\
static DEVICE_ATTR_RO(name)

/* In QEMU's terms */
static ssize_t cache_mode_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	struct qcow_device *qdev = qcow_device_of(dev);
	const struct qcow_file *file = &qdev->chain->layers[0]->file;
	const char *mode;

	if (qdev->no_flush)
		mode = "unsafe";
	else if (qdev->write_through)
		mode = file->direct ? "directsync" : "writethrough";
	else
		mode = file->direct ? "none" : "writeback";
	return sysfs_emit(buf, "%s\n", mode);
}
static DEVICE_ATTR_RO(cache_mode);

QCOW_STATUS_ATTR(format_version, version);
QCOW_STATUS_ATTR(virtual_size, virtual_size);
QCOW_STATUS_ATTR(cluster_size, cluster_size);
QCOW_STATUS_ATTR(read_only, flags & QCOW_STATUS_READ_ONLY ? 1 : 0);
QCOW_STATUS_ATTR(depth, layer_count);
QCOW_STATUS_ATTR(cache_size, cache_size);
QCOW_STATUS_ATTR(cache_limit, cache_limit);
QCOW_STATUS_ATTR(reads, reads);
QCOW_STATUS_ATTR(writes, writes);
QCOW_STATUS_ATTR(discards, discards);
QCOW_STATUS_ATTR(zeroes, zeroes);
QCOW_STATUS_ATTR(flushes, flushes);
QCOW_STATUS_ATTR(errors, errors);
QCOW_STATUS_ATTR(inlined, inlined);
QCOW_STATUS_ATTR(clusters_allocated, clusters_allocated);
QCOW_STATUS_ATTR(clusters_freed, clusters_freed);
QCOW_STATUS_ATTR(cache_hits, cache_hits);
QCOW_STATUS_ATTR(cache_misses, cache_misses);

static struct attribute *qcow_attrs[] = {
	&dev_attr_image.attr,
	&dev_attr_data_file.attr,
	&dev_attr_snapshot.attr,
	&dev_attr_encryption.attr,
	&dev_attr_damage.attr,
	&dev_attr_cache_mode.attr,
	&dev_attr_format_version.attr,
	&dev_attr_virtual_size.attr,
	&dev_attr_cluster_size.attr,
	&dev_attr_read_only.attr,
	&dev_attr_depth.attr,
	&dev_attr_cache_size.attr,
	&dev_attr_cache_limit.attr,
	&dev_attr_reads.attr,
	&dev_attr_writes.attr,
	&dev_attr_discards.attr,
	&dev_attr_zeroes.attr,
	&dev_attr_flushes.attr,
	&dev_attr_errors.attr,
	&dev_attr_inlined.attr,
	&dev_attr_clusters_allocated.attr,
	&dev_attr_clusters_freed.attr,
	&dev_attr_cache_hits.attr,
	&dev_attr_cache_misses.attr,
	NULL
};

static const struct attribute_group qcow_attr_group = {
	.name = "qcow",
	.attrs = qcow_attrs,
};

const struct attribute_group *qcow_attr_groups[] = {
	&qcow_attr_group,
	NULL
};
