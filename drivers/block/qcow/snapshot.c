// SPDX-License-Identifier: GPL-2.0-only
/*
 * Internal snapshots: the snapshot table.
 *
 * A snapshot is an L1 table and the size that the disk had. To show one, an image
 * is opened with these in place of its own, and is never written.
 *
 * The entries of the table have no fixed length, so they are read one after the
 * other, through the cache of tables, and nothing is allocated by what they say.
 * The limits are QEMU's.
 */
#include <linux/slab.h>
#include <linux/string.h>

#include "qcow.h"

#define QCOW_MAX_SNAPSHOT_TABLE		(64U << 20)
#define QCOW_MAX_SNAPSHOT_EXTRA		1024U

/* Read a part of a table, wherever it begins and ends. */
static int qcow_table_read(struct qcow_image *image, u64 host_offset, void *buf,
			   size_t len)
{
	u32 mask = qcow_block_size(image) - 1;
	struct qcow_block *block;
	size_t step;

	for (; len; host_offset += step, buf += step, len -= step) {
		step = min_t(size_t, len, mask + 1 - (host_offset & mask));
		block = qcow_block_get(image, host_offset & ~(u64)mask);
		if (IS_ERR(block))
			return PTR_ERR(block);
		memcpy(buf, block->data + (host_offset & mask), step);
		qcow_block_put(block);
	}
	return 0;
}

/**
 * qcow_snapshot_next - the next entry of the snapshot table
 * @image: a qcow2 image with snapshots that have not all been seen
 * @snapshot: zeroed before the first one; then the one before
 * @msg: where to say what is wrong
 *
 * Only the lengths are checked, by which the next entry is found; the rest is of
 * concern to who uses the snapshot.
 *
 * Context: may sleep.
 *
 * Return: 0; -EFBIG if the table is damaged; or the errno of a read.
 */
int qcow_snapshot_next(struct qcow_image *image, struct qcow_snapshot *snapshot,
		       struct qcow_message *msg)
{
	const struct qcow_header *header = &image->header;
	u64 pos = snapshot->next ?: header->snapshots_offset;
	struct qcow_disk_snapshot disk;
	struct qcow_disk_snapshot_extra extra = {};
	u32 extra_size;
	int err;

	err = qcow_table_read(image, pos, &disk, sizeof(disk));
	if (err)
		goto out_read;
	extra_size = be32_to_cpu(disk.extra_data_size);
	if (extra_size > QCOW_MAX_SNAPSHOT_EXTRA) {
		qcow_message_set(msg, "the snapshot table's entry at %llu has extra data of %u bytes; expected at most %u",
				 pos, extra_size, QCOW_MAX_SNAPSHOT_EXTRA);
		return -EFBIG;
	}
	err = qcow_table_read(image, pos + sizeof(disk), &extra,
			      min_t(size_t, extra_size, sizeof(extra)));
	if (err)
		goto out_read;

	snapshot->has_size = extra_size >= sizeof(extra);
	snapshot->l1_table_offset = be64_to_cpu(disk.l1_table_offset);
	snapshot->l1_size = be32_to_cpu(disk.l1_size);
	/* Version 2 may lack it: there the size of the disk does not change. */
	snapshot->size = snapshot->has_size ? be64_to_cpu(extra.disk_size) :
					      header->size;
	snapshot->id_offset = pos + sizeof(disk) + extra_size;
	snapshot->id_size = be16_to_cpu(disk.id_str_size);
	snapshot->name_size = be16_to_cpu(disk.name_size);
	snapshot->next = round_up(snapshot->id_offset + snapshot->id_size +
				  snapshot->name_size, 8);
	if (snapshot->next - header->snapshots_offset > QCOW_MAX_SNAPSHOT_TABLE ||
	    snapshot->next > S64_MAX) {
		qcow_message_set(msg, "the snapshot table is longer than %u bytes",
				 QCOW_MAX_SNAPSHOT_TABLE);
		return -EFBIG;
	}
	return 0;

out_read:
	qcow_message_set(msg, "cannot read the snapshot table: error %d", -err);
	return err;
}

/* Is a string of the table the one that is wanted? An errno, 0 or 1. */
static int qcow_snapshot_is(struct qcow_image *image, u64 host_offset, u32 size,
			    const char *wanted)
{
	char part[64];
	u32 step;
	int err;

	if (size != strlen(wanted))
		return 0;
	for (; size; host_offset += step, wanted += step, size -= step) {
		step = min_t(u32, size, sizeof(part));
		err = qcow_table_read(image, host_offset, part, step);
		if (err)
			return err;
		if (memcmp(part, wanted, step))
			return 0;
	}
	return 1;
}

/* Find a snapshot by its ID or, if none has that, by its name. */
static int qcow_snapshot_find(struct qcow_image *image, const char *wanted,
			      struct qcow_snapshot *found,
			      struct qcow_message *msg)
{
	struct qcow_snapshot snapshot = {};
	bool named = false;
	int ret;
	u32 i;

	for (i = 0; i < image->header.nb_snapshots; i++) {
		ret = qcow_snapshot_next(image, &snapshot, msg);
		if (ret)
			return ret;
		ret = qcow_snapshot_is(image, snapshot.id_offset,
				       snapshot.id_size, wanted);
		if (ret > 0)
			*found = snapshot;
		if (ret)
			return min(ret, 0);
		if (named)
			continue;
		ret = qcow_snapshot_is(image, snapshot.id_offset +
				       snapshot.id_size, snapshot.name_size,
				       wanted);
		if (ret < 0)
			return ret;
		named = ret;
		if (named)
			*found = snapshot;
		cond_resched();
	}
	if (named)
		return 0;
	qcow_message_set(msg, "there is no snapshot with the ID or the name '%s'; see 'qemu-img snapshot -l'",
			 wanted);
	return -ENOENT;
}

/* Everything about a snapshot that is going to be shown. */
static int qcow_snapshot_check(const struct qcow_image *image,
			       const struct qcow_snapshot *snapshot,
			       struct qcow_message *msg)
{
	struct qcow_header header = image->header;

	if (image->header.version >= 3 && !snapshot->has_size) {
		qcow_message_set(msg, "its entry lacks the size of the disk");
		return -EINVAL;
	}
	if (snapshot->l1_size > QCOW_MAX_L1_BYTES / sizeof(__be64)) {
		qcow_message_set(msg, "l1_size is %u; expected at most %zu",
				 snapshot->l1_size,
				 QCOW_MAX_L1_BYTES / sizeof(__be64));
		return -EFBIG;
	}
	if (snapshot->l1_table_offset & (qcow_cluster_size(image) - 1) ||
	    snapshot->l1_table_offset > S64_MAX - QCOW_MAX_L1_BYTES ||
	    (snapshot->l1_size && !snapshot->l1_table_offset)) {
		qcow_message_set(msg, "l1_table_offset is %llu; expected a multiple of the cluster size %u in the file",
				 snapshot->l1_table_offset,
				 qcow_cluster_size(image));
		return -EINVAL;
	}
	header.l1_size = snapshot->l1_size;
	header.size = snapshot->size;
	return qcow_header_check_size(&header, msg);
}

/**
 * qcow_snapshot_select - open a snapshot in place of the disk
 * @image: a qcow2 image that is being opened, and not for writing
 * @wanted: ID or name of the snapshot
 * @msg: where to say what is wrong
 *
 * The COPIED flags of its tables mean nothing, and only who writes looks at them.
 *
 * Context: may sleep.
 *
 * Return: 0; -ENOENT if there is no such snapshot; -EINVAL or -EFBIG if it is
 * damaged; or the errno of a read.
 */
int qcow_snapshot_select(struct qcow_image *image, const char *wanted,
			 struct qcow_message *msg)
{
	struct qcow_header *header = &image->header;
	struct qcow_message reason = {};
	struct qcow_snapshot snapshot;
	int err;

	/* Each of the guest's clusters has one place there, so one content. */
	if (header->incompatible & QCOW_INCOMPAT_DATA_FILE) {
		qcow_message_set(msg, "an image with an external data file has no snapshots that could be shown");
		return -EINVAL;
	}
	err = qcow_snapshot_find(image, wanted, &snapshot, msg);
	if (err)
		return err;
	err = qcow_snapshot_check(image, &snapshot, &reason);
	if (err) {
		qcow_message_set(msg, "snapshot '%s' is damaged: %s", wanted,
				 reason.text);
		return err;
	}
	header->l1_table_offset = snapshot.l1_table_offset;
	header->l1_size = snapshot.l1_size;
	header->size = snapshot.size;
	return 0;
}
