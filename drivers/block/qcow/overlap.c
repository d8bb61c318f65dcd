// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where the metadata of an image is, so that no data is written over it.
 *
 * In a sound image nothing but the tables themselves leads to a cluster of a
 * table. In a damaged one an L2 entry may, or the allocator, where the count of
 * a table is zero. So before a guest's data goes to a cluster, before a cluster
 * is taken, and before one is freed, it is looked up here. The look-up takes no
 * lock, and its cost does not grow with the image: a filter, which has a bit for each
 * value of a hash of the cluster's number, knows nearly all clusters that have no kind.
 * It is made for as many tables as the disk can have, so that few of its bits are set.
 * What it lets through, and ranges of many clusters, are searched for.
 *
 * What is known: header, L1 table, refcount table, snapshot table, L1 tables of
 * snapshots and the bitmap directory, from the header; L2 tables and refcount
 * blocks, from the tables that lead to them, which attach reads once; and what
 * the driver makes later. L2 tables that only snapshots have are not known: that
 * would take reading all of them.
 *
 * L2 tables and refcount blocks that were there at attach are in image->known, a
 * sorted array of offsets with the kind in the low bits, which takes no more memory
 * than the L1 and the refcount table; all else is in image->metadata, an xarray
 * from host cluster to kind. What entries lead to behind the end of the file is known
 * as well: the file grows, and a guest's data there would be believed to be a table.
 * Bits of the filter stay set where a table has gone.
 *
 * A cluster has one kind, the first that was found. A table that is written must
 * be of its own kind, so one that lies on top of another one is never written. No two
 * entries of the refcount table may lead to one block: else a small file could have more
 * counts than the allocator can look at.
 *
 * The caller of qcow_overlap_add() and qcow_overlap_remove() holds what keeps
 * others from making or freeing that table.
 */
#include <linux/hash.h>
#include <linux/log2.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "qcow.h"

/* The low bits of what is in image->known. Offsets of clusters have none. */
#define QCOW_KNOWN_KIND		0x1ffULL
#define QCOW_KNOWN_NOTHING	0x1ffULL

/* Bits of the filter for each table, and room for those that are not known yet. */
#define QCOW_FILTER_BITS	16
#define QCOW_FILTER_OTHERS	64

/* Searching costs less than so many clusters, one by one. */
#define QCOW_FILTER_RANGE	16

/* How much of a table attach reads at once. */
#define QCOW_OVERLAP_STEP	(64U << 10)

/*
 * Clusters of snapshots' L1 tables that are looked up, by which the memory for it
 * is bounded, to 9 bytes each. Nodes of the XArray that a table may need for itself
 * count as 64 each. What is more has nothing but its counts to protect it.
 */
#define QCOW_OVERLAP_SNAPSHOT_L1	BIT(21)
#define QCOW_OVERLAP_NODES		(6 * 64)

static const char * const qcow_metadata_names[] = {
	[QCOW_METADATA_HEADER] = "header",
	[QCOW_METADATA_L1] = "L1 table",
	[QCOW_METADATA_L2] = "L2 table",
	[QCOW_METADATA_REFTABLE] = "refcount table",
	[QCOW_METADATA_REFBLOCK] = "refcount block",
	[QCOW_METADATA_SNAPSHOTS] = "snapshot table",
	[QCOW_METADATA_SNAPSHOT_L1] = "snapshot's L1 table",
	[QCOW_METADATA_BITMAPS] = "bitmap directory",
	[QCOW_METADATA_BITMAP] = "bitmap",
	[QCOW_METADATA_ENCRYPTION] = "encryption header",
};

/*
 * Where a long is 32 bits, clusters behind its reach are not looked up; the
 * table cache does not reach as far either.
 */
static bool qcow_overlap_range(const struct qcow_image *image, u64 host_offset,
			       u64 length, unsigned long *first,
			       unsigned long *last)
{
	u64 end = (host_offset + length - 1) >> image->cluster_bits;

	*first = host_offset >> image->cluster_bits;
	*last = end;
	return length && length - 1 <= U64_MAX - host_offset && end <= ULONG_MAX;
}

static void qcow_filter_add(struct qcow_image *image, unsigned long cluster)
{
	if (image->filter)
		set_bit(hash_long(cluster, image->filter_bits), image->filter);
}

/* Has any of the clusters a kind, as far as the filter can tell? */
static bool qcow_filter_has(const struct qcow_image *image,
			    unsigned long cluster, unsigned long last)
{
	if (!image->filter || last - cluster >= QCOW_FILTER_RANGE)
		return true;
	for (; !test_bit(hash_long(cluster, image->filter_bits),
			 image->filter); cluster++)
		if (cluster == last)
			return false;
	return true;
}

/* The first of the known tables that begins at @host_offset or behind it. */
static size_t qcow_known_from(const struct qcow_image *image, u64 host_offset)
{
	size_t first = 0, end = image->nr_known;

	while (first < end) {
		size_t middle = first + (end - first) / 2;

		if ((READ_ONCE(image->known[middle]) & ~QCOW_KNOWN_KIND) <
		    host_offset)
			first = middle + 1;
		else
			end = middle;
	}
	return first;
}

/*
 * What is first in a range: its kind, and *@at, its offset; -1 if nothing is.
 */
static int qcow_overlap_find(struct qcow_image *image, u64 host_offset,
			     u64 length, u64 *at)
{
	unsigned long cluster, last;
	void *entry;
	size_t i;
	u64 known;

	if (!qcow_overlap_range(image, host_offset, length, &cluster, &last) ||
	    !qcow_filter_has(image, cluster, last))
		return -1;
	entry = xa_find(&image->metadata, &cluster, last, XA_PRESENT);
	if (entry) {
		*at = (u64)cluster << image->cluster_bits;
		return xa_to_value(entry);
	}
	host_offset &= ~(u64)(qcow_cluster_size(image) - 1);
	for (i = qcow_known_from(image, host_offset); i < image->nr_known; i++) {
		known = READ_ONCE(image->known[i]);
		*at = known & ~QCOW_KNOWN_KIND;
		if (*at >> image->cluster_bits > last)
			break;
		if ((known & QCOW_KNOWN_KIND) != QCOW_KNOWN_NOTHING)
			return known & QCOW_KNOWN_KIND;
	}
	return -1;
}

/**
 * qcow_overlap_add - a table is going to be where nothing was
 * @image: a writable image
 * @kind: of which kind
 * @host_offset: bytes
 * @length: bytes
 *
 * Clusters that have a kind keep it.
 *
 * Context: may sleep, until there is memory.
 */
void qcow_overlap_add(struct qcow_image *image, enum qcow_metadata kind,
		      u64 host_offset, u64 length)
{
	unsigned long cluster, last;
	void *old;

	if (!qcow_overlap_range(image, host_offset, length, &cluster, &last))
		return;
	for (;; cluster++) {
		while (xa_is_err(old = xa_cmpxchg(&image->metadata, cluster, NULL,
						  xa_mk_value(kind), GFP_NOIO)))
			qcow_cache_relieve(image->cache);
		qcow_filter_add(image, cluster);
		if (cluster == last)
			break;
	}
}

/**
 * qcow_overlap_remove - an entry does not lead to a table any more
 * @image: a writable image
 * @host_offset: bytes
 * @length: bytes
 *
 * If others lead there, which is damage, it stays a table, and is not freed.
 *
 * Context: process.
 */
void qcow_overlap_remove(struct qcow_image *image, u64 host_offset, u64 length)
{
	unsigned long cluster, last;
	u64 at, done = U64_MAX;
	void *entry;
	size_t i;

	if (!qcow_overlap_range(image, host_offset, length, &cluster, &last))
		return;
	xa_for_each_range(&image->metadata, cluster, entry, cluster, last)
		xa_erase(&image->metadata, cluster);
	for (i = qcow_known_from(image, host_offset); i < image->nr_known; i++) {
		at = image->known[i] & ~QCOW_KNOWN_KIND;
		if (at >= host_offset + length)
			break;
		if (at == done || image->known[i] == (at | QCOW_KNOWN_NOTHING))
			continue;
		WRITE_ONCE(image->known[i], at | QCOW_KNOWN_NOTHING);
		done = at;
	}
}

/**
 * qcow_overlap_check - is there no metadata in a range that is to be written
 * @image: a writable image
 * @host_offset: bytes
 * @length: bytes
 *
 * Context: any that may take image->lock.
 *
 * Return: 0; -EIO if there is, which marks the image corrupt.
 */
int qcow_overlap_check(struct qcow_image *image, u64 host_offset, u64 length)
{
	u64 at;
	int kind = qcow_overlap_find(image, host_offset, length, &at);

	if (likely(kind < 0))
		return 0;
	qcow_image_corrupt(image, "a write was stopped that would have hit the %s at host offset 0x%llx",
			   qcow_metadata_names[kind], at);
	return -EIO;
}

/**
 * qcow_overlap_check_data - may data be written where an entry says
 * @image: a writable image
 * @host_offset: in the data file, bytes
 * @length: bytes
 *
 * Context: any that may take image->lock.
 *
 * Return: 0; -EIO if that is metadata, or behind the end of the file, which it
 * would make as long as the entry says; both mark the image corrupt.
 */
int qcow_overlap_check_data(struct qcow_image *image, u64 host_offset,
			    u64 length)
{
	if (qcow_is_external(image))
		return 0;
	if (!qcow_image_has(image, host_offset, length)) {
		qcow_image_corrupt(image, "an entry leads to host offset 0x%llx, behind the end of the file",
				   host_offset);
		return -EIO;
	}
	return qcow_overlap_check(image, host_offset, length);
}

/**
 * qcow_overlap_is_only - is there nothing but one kind of metadata in a range
 * @image: a writable image
 * @kind: the kind, which all of its clusters are to have; -1 for none at all
 * @host_offset: bytes
 * @length: bytes, not 0
 *
 * Context: any.
 *
 * Return: true if so.
 */
bool qcow_overlap_is_only(struct qcow_image *image, int kind, u64 host_offset,
			  u64 length)
{
	unsigned long cluster, last;
	void *entry;
	u64 known;
	size_t i;

	if (!qcow_overlap_range(image, host_offset, length, &cluster, &last))
		return false;
	host_offset &= ~(u64)(qcow_cluster_size(image) - 1);
	for (i = qcow_known_from(image, host_offset); i < image->nr_known; i++) {
		known = READ_ONCE(image->known[i]);
		if (known >> image->cluster_bits > last)
			break;
		if ((known & QCOW_KNOWN_KIND) != QCOW_KNOWN_NOTHING)
			return false;
	}
	for (; cluster <= last; cluster++) {
		entry = xa_load(&image->metadata, cluster);
		if ((entry ? (int)xa_to_value(entry) : -1) != kind)
			return false;
	}
	return true;
}

/**
 * qcow_overlap_expect - is a table alone where it is to be written
 * @image: a writable image
 * @kind: of which kind it is
 * @host_offset: bytes
 *
 * Context: any that may take image->lock.
 *
 * Return: 0; -EIO if it lies on top of another one, which marks the image
 * corrupt.
 */
int qcow_overlap_expect(struct qcow_image *image, enum qcow_metadata kind,
			u64 host_offset)
{
	u64 at;
	int found = qcow_overlap_find(image, host_offset, 1, &at);

	if (likely(found == (int)kind))
		return 0;
	qcow_image_corrupt(image, "the %s at host offset 0x%llx lies on top of %s",
			   qcow_metadata_names[kind], host_offset,
			   found < 0 ? "other data" : qcow_metadata_names[found]);
	return -EIO;
}

/**
 * qcow_overlap_is_shared - did two entries lead to a table when the image was attached
 * @image: a writable image
 * @host_offset: of the table, bytes
 *
 * Return: true if so.
 */
bool qcow_overlap_is_shared(struct qcow_image *image, u64 host_offset)
{
	size_t i = qcow_known_from(image, host_offset);

	return i + 1 < image->nr_known &&
	       (READ_ONCE(image->known[i + 1]) & ~QCOW_KNOWN_KIND) == host_offset;
}

/* Add what the entries of a table lead to; those that are wrong are never used. */
static int qcow_overlap_add_entries(struct qcow_image *image,
				    enum qcow_metadata kind, u64 table_offset,
				    u64 length, u64 mask)
{
	u32 cluster_size = qcow_cluster_size(image);
	__be64 *entries;
	u64 offset, step;
	int err = 0;
	u32 i;

	entries = kmalloc(QCOW_OVERLAP_STEP, GFP_KERNEL);
	if (!entries)
		return -ENOMEM;
	for (; length && !err; table_offset += step, length -= step) {
		step = min_t(u64, length, QCOW_OVERLAP_STEP);
		err = fatal_signal_pending(current) ? -EINTR :
			qcow_file_read(&image->file, entries,
				       round_up(step, QCOW_SECTOR), table_offset);
		for (i = 0; i < step / sizeof(*entries) && !err; i++) {
			offset = be64_to_cpu(entries[i]) & mask;
			if (offset && !(offset & (cluster_size - 1)))
				image->known[image->nr_known++] = offset | kind;
		}
		cond_resched();
	}
	kfree(entries);
	return err;
}

static int qcow_known_compare(const void *a, const void *b)
{
	const u64 *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Find the tables that the L1 and the refcount table lead to. */
static int qcow_overlap_find_known(struct qcow_image *image, u64 l1_bytes,
				   u64 reftable_bytes)
{
	const struct qcow_header *header = &image->header;
	u64 *known;
	int err;

	image->known = kvmalloc(l1_bytes + reftable_bytes, GFP_KERNEL);
	if (!image->known)
		return -ENOMEM;
	err = qcow_overlap_add_entries(image, QCOW_METADATA_REFBLOCK,
				       header->refcount_table_offset,
				       reftable_bytes, QCOW_RT_OFFSET_MASK) ?:
	      qcow_overlap_add_entries(image, QCOW_METADATA_L2,
				       header->l1_table_offset, l1_bytes,
				       QCOW_L1_OFFSET_MASK);
	if (err)
		return err;
	/* Most of it may have been for entries that are empty. */
	known = kvmalloc_array(image->nr_known + 1, sizeof(*known), GFP_KERNEL);
	if (!known)
		return -ENOMEM;
	memcpy(known, image->known, image->nr_known * sizeof(*known));
	kvfree(image->known);
	image->known = known;
	sort(known, image->nr_known, sizeof(*known), qcow_known_compare, NULL);
	return 0;
}

/* Do two entries of the refcount table lead to one block? */
static bool qcow_overlap_shares_refblocks(const struct qcow_image *image)
{
	size_t i;

	for (i = 1; i < image->nr_known; i++)
		if (image->known[i] == image->known[i - 1] &&
		    (image->known[i] & QCOW_KNOWN_KIND) == QCOW_METADATA_REFBLOCK)
			return true;
	return false;
}

/* All that has been found goes into the filter. */
static int qcow_overlap_make_filter(struct qcow_image *image)
{
	unsigned long cluster, tables = image->header.l1_size +
					image->nr_known + QCOW_FILTER_OTHERS;
	void *entry;
	size_t i;

	xa_for_each(&image->metadata, cluster, entry)
		tables++;
	image->filter_bits = order_base_2(tables * QCOW_FILTER_BITS);
	image->filter = kvcalloc(BITS_TO_LONGS(BIT(image->filter_bits)),
				 sizeof(long), GFP_KERNEL);
	if (!image->filter)
		return -ENOMEM;
	xa_for_each(&image->metadata, cluster, entry)
		qcow_filter_add(image, cluster);
	for (i = 0; i < image->nr_known; i++)
		qcow_filter_add(image, image->known[i] >> image->cluster_bits);
	return 0;
}

static int qcow_overlap_add_snapshots(struct qcow_image *image,
				      struct qcow_message *msg)
{
	const struct qcow_header *header = &image->header;
	u32 left = QCOW_OVERLAP_SNAPSHOT_L1;
	struct qcow_snapshot snapshot = {};
	u64 clusters;
	int err;
	u32 i;

	for (i = 0; i < header->nb_snapshots; i++) {
		err = fatal_signal_pending(current) ? -EINTR :
			qcow_snapshot_next(image, &snapshot, msg);
		if (err)
			return err;
		cond_resched();
		clusters = ((u64)snapshot.l1_size * sizeof(__be64) +
			    qcow_cluster_size(image) - 1) >> image->cluster_bits;
		/* What cannot be a table is of concern to who uses it. */
		if (snapshot.l1_table_offset & (qcow_cluster_size(image) - 1) ||
		    !qcow_image_has(image, snapshot.l1_table_offset,
				    clusters << image->cluster_bits) ||
		    clusters > left)
			continue;
		left -= min_t(u64, left, clusters + QCOW_OVERLAP_NODES);
		qcow_overlap_add(image, QCOW_METADATA_SNAPSHOT_L1,
				 snapshot.l1_table_offset,
				 clusters << image->cluster_bits);
	}
	qcow_overlap_add(image, QCOW_METADATA_SNAPSHOTS,
			 header->snapshots_offset, snapshot.next ?
			 snapshot.next - header->snapshots_offset : 0);
	return 0;
}

/**
 * qcow_overlap_init - find the metadata of an image
 * @image: a writable image that is being opened
 * @msg: where to say what is wrong
 *
 * Return: 0, -ENOMEM, -EINTR, -EFBIG if the snapshot table is damaged, -EUCLEAN if
 * the refcount table is, or the errno of a read.
 */
int qcow_overlap_init(struct qcow_image *image, struct qcow_message *msg)
{
	const struct qcow_header *header = &image->header;
	u64 l1_bytes = (u64)header->l1_size * sizeof(__be64);
	u64 reftable_bytes = (u64)header->refcount_table_clusters <<
			     header->cluster_bits;
	int err;

	qcow_overlap_add(image, QCOW_METADATA_HEADER, 0, 1);
	qcow_overlap_add(image, QCOW_METADATA_L1, header->l1_table_offset,
			 l1_bytes);
	qcow_overlap_add(image, QCOW_METADATA_REFTABLE,
			 header->refcount_table_offset, reftable_bytes);
	qcow_overlap_add(image, QCOW_METADATA_BITMAPS,
			 header->bitmap_directory_offset,
			 header->bitmap_directory_size);
	qcow_overlap_add(image, QCOW_METADATA_ENCRYPTION,
			 header->encryption_offset, header->encryption_size);
	err = qcow_overlap_add_snapshots(image, msg);
	if (err)
		return err;
	err = qcow_overlap_find_known(image, l1_bytes, reftable_bytes);
	if (err) {
		qcow_message_set(msg, "cannot read its L1 or refcount table: error %d",
				 -err);
		return err;
	}
	if (qcow_overlap_shares_refblocks(image)) {
		qcow_message_set(msg, "two entries of its refcount table lead to the same refcount block; repair the image with 'qcowctl check --repair', or attach it read-only");
		return -EUCLEAN;
	}
	return qcow_overlap_make_filter(image);
}
