// SPDX-License-Identifier: GPL-2.0-only
/*
 * The QCOW2 header: decoding and validation.
 *
 * This file owns the question "may this image be attached, and how?". It looks
 * at the first cluster of the image and answers with a struct qcow_header or
 * with an error and one line for the person who asked. It does no I/O, takes no
 * locks and allocates nothing, so it may be called from anywhere; KUnit and a
 * userspace fuzzer call it as well as the driver.
 *
 * Nothing in the buffer is trusted: every field is checked before it is used,
 * sums are made in 64 bits where they cannot wrap, and nothing outside of the
 * buffer is read. The checks come in the order in which QEMU makes them, with
 * QEMU's error numbers, so an image that is wrong in two ways is refused for the
 * same reason by both. The driver is stricter in a few places, all of them
 * tables that would lie in the header's own cluster or on top of each other.
 */
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/limits.h>
#include <linux/stdarg.h>
#include <linux/stddef.h>
#include <linux/string.h>

#include "header.h"

/* Everything that the format gives a meaning; the other bits are unknown. */
#define QCOW_INCOMPAT_KNOWN						\
	(QCOW_INCOMPAT_DIRTY | QCOW_INCOMPAT_CORRUPT |			\
	 QCOW_INCOMPAT_DATA_FILE | QCOW_INCOMPAT_COMPRESSION |		\
	 QCOW_INCOMPAT_EXTENDED_L2)

#define QCOW_MAX_BITMAPS			65535U
#define QCOW_MAX_BITMAP_DIRECTORY_BYTES		(65535ULL * 1024)

/* A LUKS header with all its key slots has about 2 MiB. */
#define QCOW_MAX_ENCRYPTION_BYTES		(64U << 20)

#define QCOW_FEATURE_INCOMPATIBLE		0

/* Data of the bitmaps extension */
struct qcow_disk_bitmaps {
	__be32 nb_bitmaps;
	__be32 reserved;
	__be64 directory_size;
	__be64 directory_offset;
} __packed;

/* Data of the encryption header extension */
struct qcow_disk_encryption {
	__be64 offset;
	__be64 length;
} __packed;

/**
 * struct qcow_extension_walk - a position in the header extension area
 * @buf: the image's first cluster
 * @next: where the next extension starts, bytes
 * @end: where the area ends, bytes; never beyond the buffer
 * @magic: type of the extension found last
 * @data: its data
 * @length: length of its data in bytes
 */
struct qcow_extension_walk {
	const u8 *buf;
	u64 next;
	u64 end;
	u32 magic;
	const u8 *data;
	u32 length;
};

/**
 * qcow_message_set() - put down why something failed
 * @msg: where to; may be NULL
 * @fmt: printf format, without a newline
 *
 * The last message wins; what does not fit is cut off.
 *
 * Context: any.
 */
void qcow_message_set(struct qcow_message *msg, const char *fmt, ...)
{
	va_list args;

	if (!msg)
		return;
	va_start(args, fmt);
	vsnprintf(msg->text, sizeof(msg->text), fmt, args);
	va_end(args);
}

/**
 * qcow_header_cluster_size() - tell how much of an image is its header
 * @buf: the first bytes of the image, zeroes where the file is shorter
 * @len: length of @buf in bytes, at least 512
 * @cluster_size: set to the image's cluster size in bytes
 * @msg: set when the header is refused; may be NULL
 *
 * Looks at the magic number, the version and cluster_bits and at nothing else:
 * the caller reads one cluster next, and gives it to qcow_header_parse().
 *
 * Context: any.
 * Return: 0; -EINVAL if this is no QCOW2 image or cluster_bits is out of range;
 * -EOPNOTSUPP if the version is not 2 or 3.
 */
int qcow_header_cluster_size(const void *buf, size_t len, u32 *cluster_size,
			     struct qcow_message *msg)
{
	const struct qcow_disk_header *disk = buf;
	u32 magic, version, cluster_bits;

	if (len < sizeof(*disk)) {
		qcow_message_set(msg, "%zu bytes are too few for a header", len);
		return -EINVAL;
	}

	magic = be32_to_cpu(disk->magic);
	if (magic != QCOW_MAGIC) {
		qcow_message_set(msg,
				 "not a qcow2 image: the magic number is 0x%08x; expected 0x%08x",
				 magic, QCOW_MAGIC);
		return -EINVAL;
	}

	version = be32_to_cpu(disk->version);
	if (version != 2 && version != 3) {
		qcow_message_set(msg, "qcow version is %u; expected 2 or 3",
				 version);
		return -EOPNOTSUPP;
	}

	cluster_bits = be32_to_cpu(disk->cluster_bits);
	if (cluster_bits < QCOW_MIN_CLUSTER_BITS ||
	    cluster_bits > QCOW_MAX_CLUSTER_BITS) {
		qcow_message_set(msg, "cluster_bits is %u; expected %u to %u",
				 cluster_bits, QCOW_MIN_CLUSTER_BITS,
				 QCOW_MAX_CLUSTER_BITS);
		return -EINVAL;
	}

	*cluster_size = 1U << cluster_bits;
	return 0;
}

/*
 * The extension area begins after the header and ends at the backing file's
 * name if that has an offset (whatever its length), else with the cluster.
 */
static void extension_walk_init(struct qcow_extension_walk *walk,
				const void *buf, u32 cluster_size,
				const struct qcow_header *header)
{
	walk->buf = buf;
	walk->next = header->header_length;
	walk->end = header->backing_offset ?: cluster_size;
}

/* Returns 1 with the next extension, 0 after the last one, or -EINVAL. */
static int extension_walk_next(struct qcow_extension_walk *walk,
			       struct qcow_message *msg)
{
	struct qcow_disk_extension ext;
	u64 start = walk->next;

	if (start >= walk->end)
		return 0;

	if (walk->end - start < sizeof(ext)) {
		qcow_message_set(msg,
				 "header extension at byte %llu is cut off by the end of the extension area at byte %llu",
				 start, walk->end);
		return -EINVAL;
	}

	/* Not aligned when header_length is odd, which QEMU accepts. */
	memcpy(&ext, walk->buf + start, sizeof(ext));
	walk->magic = be32_to_cpu(ext.magic);
	walk->length = be32_to_cpu(ext.length);
	start += sizeof(ext);

	if (walk->length > walk->end - start) {
		qcow_message_set(msg,
				 "header extension 0x%08x has length %u; expected at most %llu",
				 walk->magic, walk->length, walk->end - start);
		return -EINVAL;
	}

	if (walk->magic == QCOW_EXT_END)
		return 0;

	walk->data = walk->buf + start;
	walk->next = start + (((u64)walk->length + 7) & ~7ULL);
	return 1;
}

/*
 * Look up what the image itself calls an incompatible feature. The name comes
 * from the image: it need not be terminated and may hold anything, so only
 * printable ASCII is let through. Returns whether there is a name.
 */
static bool feature_name(const u8 *table, u32 length, u32 bit, char *name)
{
	struct qcow_disk_feature feature;
	u32 pos, i;

	for (pos = 0; length - pos >= sizeof(feature); pos += sizeof(feature)) {
		memcpy(&feature, table + pos, sizeof(feature));
		if (feature.type != QCOW_FEATURE_INCOMPATIBLE ||
		    feature.bit != bit || !feature.name[0])
			continue;

		for (i = 0; i < sizeof(feature.name) && feature.name[i]; i++) {
			char c = feature.name[i];

			name[i] = c >= ' ' && c <= '~' ? c : '?';
		}
		name[i] = '\0';
		return true;
	}
	return false;
}

static int check_unknown_features(const void *buf, u32 cluster_size,
				  const struct qcow_header *header,
				  struct qcow_message *msg)
{
	u64 unknown = header->incompatible & ~QCOW_INCOMPAT_KNOWN;
	char name[sizeof_field(struct qcow_disk_feature, name) + 1];
	struct qcow_extension_walk walk;
	const u8 *table = NULL;
	u32 length = 0, pos = 0, bit;
	char list[200] = "";

	if (!unknown)
		return 0;

	/* A broken extension must not hide the more useful message. */
	extension_walk_init(&walk, buf, cluster_size, header);
	while (extension_walk_next(&walk, NULL) > 0) {
		if (walk.magic == QCOW_EXT_FEATURE_TABLE) {
			table = walk.data;
			length = walk.length;
		}
	}

	for (bit = 0; bit < 64; bit++) {
		if (!(unknown & BIT_ULL(bit)))
			continue;
		if (feature_name(table, length, bit, name))
			pos += scnprintf(list + pos, sizeof(list) - pos,
					 "%s'%s' (bit %u)", pos ? ", " : "",
					 name, bit);
		else
			pos += scnprintf(list + pos, sizeof(list) - pos,
					 "%sbit %u", pos ? ", " : "", bit);
	}
	qcow_message_set(msg, "unknown incompatible features: %s", list);
	return -EOPNOTSUPP;
}

static int check_compression(const struct qcow_header *header,
			     struct qcow_message *msg)
{
	bool bit = header->incompatible & QCOW_INCOMPAT_COMPRESSION;
	u32 type = header->compression_type;
	bool zlib = type == QCOW_COMPRESSION_ZLIB;

	if (!zlib && type != QCOW_COMPRESSION_ZSTD) {
		qcow_message_set(msg,
				 "compression_type is %u; expected 0 (zlib) or 1 (zstd)",
				 type);
		return -EOPNOTSUPP;
	}
	if (bit == zlib) {
		qcow_message_set(msg,
				 "compression_type is %u but incompatible feature bit 3 (compression type) is %u; expected %u",
				 type, bit, !bit);
		return -EINVAL;
	}
	return 0;
}

static int check_data_file(const struct qcow_header *header, bool writable,
			   struct qcow_message *msg)
{
	bool raw = header->autoclear & QCOW_AUTOCLEAR_RAW_DATA_FILE;
	bool data_file = header->incompatible & QCOW_INCOMPAT_DATA_FILE;

	if (raw && !data_file) {
		qcow_message_set(msg,
				 "autoclear feature bit 1 (raw external data) is set without incompatible feature bit 2 (external data file)");
		return -EINVAL;
	}
	if (raw && header->backing_offset && header->backing_size) {
		qcow_message_set(msg,
				 "a raw external data file excludes a backing file, but there is one");
		return -EINVAL;
	}
	/* Where each cluster has one place, no two versions have one. */
	if (data_file && header->nb_snapshots && writable) {
		qcow_message_set(msg,
				 "an external data file excludes internal snapshots, but nb_snapshots is %u",
				 header->nb_snapshots);
		return -EINVAL;
	}
	return 0;
}

static int check_encryption(const struct qcow_header *header,
			    struct qcow_message *msg)
{
	if (header->crypt_method <= QCOW_CRYPT_LUKS)
		return 0;
	qcow_message_set(msg,
			 "crypt_method is %u; expected 0 (none), 1 (AES) or 2 (LUKS)",
			 header->crypt_method);
	return -EINVAL;
}

/**
 * struct qcow_table - a table that the header points at
 * @what: the table's name
 * @offset_field: header field that holds the host offset
 * @offset: host offset, bytes
 * @entries: number of entries
 * @entry_bytes: size of one entry; @entries times this fits in 64 bits
 */
struct qcow_table {
	const char *what;
	const char *offset_field;
	u64 offset;
	u32 entries;
	u32 entry_bytes;
};

static u64 table_bytes(const struct qcow_table *table)
{
	return (u64)table->entries * table->entry_bytes;
}

/* QEMU checks the offset of a table even when the table has no entries. */
static int check_table_offset(const struct qcow_table *table, u32 cluster_size,
			      struct qcow_message *msg)
{
	if (table->offset & (cluster_size - 1)) {
		qcow_message_set(msg,
				 "%s is %llu; expected a multiple of the cluster size %u",
				 table->offset_field, table->offset, cluster_size);
		return -EINVAL;
	}
	/* A host offset is a loff_t. */
	if (table->offset > S64_MAX - table_bytes(table)) {
		qcow_message_set(msg,
				 "%s is %llu; the %s of %llu bytes would end beyond the largest file",
				 table->offset_field, table->offset, table->what,
				 table_bytes(table));
		return -EINVAL;
	}
	if (!table->offset && table->entries) {
		qcow_message_set(msg,
				 "%s is 0; the %s cannot be where the header is",
				 table->offset_field, table->what);
		return -EINVAL;
	}
	return 0;
}

/* Both tables passed check_table_offset(), so that the sums cannot wrap. */
static int check_table_overlap(const struct qcow_table *a,
			       const struct qcow_table *b,
			       struct qcow_message *msg)
{
	if (!a->entries || !b->entries ||
	    a->offset >= b->offset + table_bytes(b) ||
	    b->offset >= a->offset + table_bytes(a))
		return 0;

	qcow_message_set(msg,
			 "the %s at %llu overlaps the %s at %llu; repair the image with 'qcowctl check --repair', or attach it read-only",
			 a->what, a->offset, b->what, b->offset);
	return -EUCLEAN;
}

static int check_tables(const struct qcow_header *header, u32 cluster_size,
			bool writable, struct qcow_message *msg)
{
	const struct qcow_table reftable = {
		.what = "refcount table",
		.offset_field = "refcount_table_offset",
		.offset = header->refcount_table_offset,
		.entries = header->refcount_table_clusters,
		.entry_bytes = cluster_size,
	};
	const struct qcow_table snapshots = {
		.what = "snapshot table",
		.offset_field = "snapshots_offset",
		.offset = header->snapshots_offset,
		.entries = header->nb_snapshots,
		.entry_bytes = sizeof(struct qcow_disk_snapshot),
	};
	const struct qcow_table l1 = {
		.what = "L1 table",
		.offset_field = "l1_table_offset",
		.offset = header->l1_table_offset,
		.entries = header->l1_size,
		.entry_bytes = sizeof(u64),
	};
	int ret;

	if (!reftable.entries) {
		qcow_message_set(msg,
				 "refcount_table_clusters is 0; expected at least 1");
		return -EINVAL;
	}
	if (table_bytes(&reftable) > QCOW_MAX_REFTABLE_BYTES) {
		qcow_message_set(msg,
				 "refcount_table_clusters is %u; expected at most %u with clusters of %u bytes",
				 reftable.entries,
				 QCOW_MAX_REFTABLE_BYTES / cluster_size,
				 cluster_size);
		return -EFBIG;
	}
	ret = check_table_offset(&reftable, cluster_size, msg);
	if (ret)
		return ret;

	if (snapshots.entries > QCOW_MAX_SNAPSHOTS) {
		qcow_message_set(msg, "nb_snapshots is %u; expected at most %u",
				 snapshots.entries, QCOW_MAX_SNAPSHOTS);
		return -EFBIG;
	}
	ret = check_table_offset(&snapshots, cluster_size, msg);
	if (ret)
		return ret;

	if (table_bytes(&l1) > QCOW_MAX_L1_BYTES) {
		qcow_message_set(msg, "l1_size is %u; expected at most %zu",
				 l1.entries, QCOW_MAX_L1_BYTES / sizeof(u64));
		return -EFBIG;
	}
	ret = check_table_offset(&l1, cluster_size, msg);
	if (ret || !writable)
		return ret;

	/* Reading such an image is harmless, writing makes it worse. */
	ret = check_table_overlap(&l1, &reftable, msg);
	if (!ret)
		ret = check_table_overlap(&snapshots, &reftable, msg);
	if (!ret)
		ret = check_table_overlap(&snapshots, &l1, msg);
	return ret;
}

/**
 * qcow_header_check_size() - does the L1 table cover the disk
 * @header: with @size, @l1_size and the widths
 * @msg: set when it does not; may be NULL
 *
 * It may be larger (for VM state), never smaller.
 *
 * Context: any.
 * Return: 0; -EFBIG if the disk is too big; -EINVAL if the table is too small.
 */
int qcow_header_check_size(const struct qcow_header *header,
			   struct qcow_message *msg)
{
	/* One L1 entry maps as many clusters as an L2 table has entries. */
	u32 shift = header->cluster_bits + header->l2_bits;
	u64 needed = header->size >> shift;

	if (header->size & ((1ULL << shift) - 1))
		needed++;

	if (header->size > S64_MAX || needed > INT_MAX) {
		qcow_message_set(msg,
				 "size is %llu bytes, which is too big for clusters of %u bytes",
				 header->size, 1U << header->cluster_bits);
		return -EFBIG;
	}
	if (header->l1_size < needed) {
		qcow_message_set(msg,
				 "l1_size is %u, too small for the disk size of %llu bytes; expected at least %llu",
				 header->l1_size, header->size, needed);
		return -EINVAL;
	}
	return 0;
}

static int check_bitmaps_extension(const struct qcow_extension_walk *walk,
				   struct qcow_header *header,
				   struct qcow_message *msg)
{
	u32 cluster_size = 1U << header->cluster_bits;
	struct qcow_disk_bitmaps bitmaps;
	u64 directory_size, directory_offset;
	u32 nb_bitmaps;

	if (walk->length != sizeof(bitmaps)) {
		qcow_message_set(msg,
				 "bitmaps extension has length %u; expected %zu",
				 walk->length, sizeof(bitmaps));
		return -EINVAL;
	}

	/* Without the autoclear bit the bitmaps are stale, and not looked at. */
	if (!(header->autoclear & QCOW_AUTOCLEAR_BITMAPS))
		return 0;

	memcpy(&bitmaps, walk->data, sizeof(bitmaps));
	nb_bitmaps = be32_to_cpu(bitmaps.nb_bitmaps);
	directory_size = be64_to_cpu(bitmaps.directory_size);
	directory_offset = be64_to_cpu(bitmaps.directory_offset);

	if (bitmaps.reserved) {
		qcow_message_set(msg,
				 "reserved field of the bitmaps extension is 0x%x; expected 0",
				 be32_to_cpu(bitmaps.reserved));
		return -EINVAL;
	}
	if (!nb_bitmaps || nb_bitmaps > QCOW_MAX_BITMAPS) {
		qcow_message_set(msg, "nb_bitmaps is %u; expected 1 to %u",
				 nb_bitmaps, QCOW_MAX_BITMAPS);
		return -EINVAL;
	}
	if (directory_size > QCOW_MAX_BITMAP_DIRECTORY_BYTES) {
		qcow_message_set(msg,
				 "bitmap_directory_size is %llu; expected at most %llu",
				 directory_size,
				 QCOW_MAX_BITMAP_DIRECTORY_BYTES);
		return -EINVAL;
	}
	if (!directory_offset || directory_offset & (cluster_size - 1) ||
	    directory_offset > S64_MAX - QCOW_MAX_BITMAP_DIRECTORY_BYTES) {
		qcow_message_set(msg,
				 "bitmap_directory_offset is %llu; expected a multiple of the cluster size %u, not 0 and below 2^63",
				 directory_offset, cluster_size);
		return -EINVAL;
	}
	header->nb_bitmaps = nb_bitmaps;
	header->bitmap_directory_offset = directory_offset;
	header->bitmap_directory_size = directory_size;
	return 0;
}

static int check_encryption_extension(const struct qcow_extension_walk *walk,
				      struct qcow_header *header,
				      struct qcow_message *msg)
{
	u32 cluster_size = 1U << header->cluster_bits;
	struct qcow_disk_encryption encryption;

	if (header->crypt_method != QCOW_CRYPT_LUKS) {
		qcow_message_set(msg,
				 "encryption header extension found, but crypt_method is %u; expected 2 (LUKS)",
				 header->crypt_method);
		return -EINVAL;
	}
	if (walk->length != sizeof(encryption)) {
		qcow_message_set(msg,
				 "encryption header extension has length %u; expected %zu",
				 walk->length, sizeof(encryption));
		return -EINVAL;
	}
	memcpy(&encryption, walk->data, sizeof(encryption));
	header->encryption_offset = be64_to_cpu(encryption.offset);
	header->encryption_size = be64_to_cpu(encryption.length);
	if (!header->encryption_offset ||
	    header->encryption_offset & (cluster_size - 1) ||
	    header->encryption_offset > QCOW_MAX_HOST_OFFSET ||
	    !header->encryption_size ||
	    header->encryption_size > QCOW_MAX_ENCRYPTION_BYTES) {
		qcow_message_set(msg,
				 "the encryption header is %llu bytes at %llu; expected at most %u, at a multiple of the cluster size %u that is not 0",
				 header->encryption_size,
				 header->encryption_offset,
				 QCOW_MAX_ENCRYPTION_BYTES, cluster_size);
		return -EINVAL;
	}
	return 0;
}

/*
 * Each type may be there once; like QEMU, take the last one of several.
 * Unknown types, the feature name table and the name of an external data file
 * that the image does not use are of no concern.
 */
static int parse_extensions(const void *buf, u32 cluster_size,
			    struct qcow_header *header,
			    struct qcow_message *msg)
{
	struct qcow_extension_walk walk;
	int ret;

	extension_walk_init(&walk, buf, cluster_size, header);
	while ((ret = extension_walk_next(&walk, msg)) > 0) {
		switch (walk.magic) {
		case QCOW_EXT_BACKING_FORMAT:
			if (walk.length > QCOW_MAX_BACKING_FORMAT) {
				qcow_message_set(msg,
						 "backing format has a length of %u bytes; expected at most %u",
						 walk.length,
						 QCOW_MAX_BACKING_FORMAT);
				return -EINVAL;
			}
			memcpy(header->backing_format, walk.data, walk.length);
			header->backing_format[walk.length] = '\0';
			break;
		case QCOW_EXT_BITMAPS:
			ret = check_bitmaps_extension(&walk, header, msg);
			if (ret)
				return ret;
			break;
		case QCOW_EXT_CRYPTO_HEADER:
			ret = check_encryption_extension(&walk, header, msg);
			if (ret)
				return ret;
			break;
		}
	}
	if (!ret && header->crypt_method == QCOW_CRYPT_LUKS &&
	    !header->encryption_size) {
		qcow_message_set(msg,
				 "crypt_method is 2 (LUKS), but there is no encryption header extension");
		return -EINVAL;
	}
	return ret;
}

static int check_backing_name(const struct qcow_header *header, u32 cluster_size,
			      struct qcow_message *msg)
{
	u32 room = min_t(u64, QCOW_MAX_BACKING_NAME,
			 cluster_size - header->backing_offset);

	/* Without an offset the size means nothing. */
	if (!header->backing_offset || header->backing_size <= room)
		return 0;

	qcow_message_set(msg,
			 "backing_file_size is %u; expected at most %u with the name at byte %llu",
			 header->backing_size, room, header->backing_offset);
	return -EINVAL;
}

/* Convert the header, with what version 2 lacks set to what it means there. */
static void decode_header(const struct qcow_disk_header *disk,
			  struct qcow_header *header)
{
	memset(header, 0, sizeof(*header));
	header->version = be32_to_cpu(disk->version);
	header->backing_offset = be64_to_cpu(disk->backing_file_offset);
	header->backing_size = be32_to_cpu(disk->backing_file_size);
	header->cluster_bits = be32_to_cpu(disk->cluster_bits);
	header->l2_bits = header->cluster_bits - 3;
	header->size = be64_to_cpu(disk->size);
	header->crypt_method = be32_to_cpu(disk->crypt_method);
	header->l1_size = be32_to_cpu(disk->l1_size);
	header->l1_table_offset = be64_to_cpu(disk->l1_table_offset);
	header->refcount_table_offset = be64_to_cpu(disk->refcount_table_offset);
	header->refcount_table_clusters =
		be32_to_cpu(disk->refcount_table_clusters);
	header->nb_snapshots = be32_to_cpu(disk->nb_snapshots);
	header->snapshots_offset = be64_to_cpu(disk->snapshots_offset);

	if (header->version < 3) {
		header->refcount_order = 4;
		header->header_length = QCOW_V2_HEADER_LENGTH;
		return;
	}

	header->incompatible = be64_to_cpu(disk->incompatible_features);
	if (header->incompatible & QCOW_INCOMPAT_EXTENDED_L2)
		header->l2_bits--;
	header->compatible = be64_to_cpu(disk->compatible_features);
	header->autoclear = be64_to_cpu(disk->autoclear_features);
	header->refcount_order = be32_to_cpu(disk->refcount_order);
	header->header_length = be32_to_cpu(disk->header_length);
	if (header->header_length >
	    offsetof(struct qcow_disk_header, compression_type))
		header->compression_type = disk->compression_type;
}

static int check_header(const void *buf, u32 cluster_size, bool writable,
			struct qcow_header *header, struct qcow_message *msg)
{
	int ret;

	if (header->version >= 3 &&
	    (header->header_length < QCOW_V3_MIN_HEADER_LENGTH ||
	     header->header_length > cluster_size)) {
		qcow_message_set(msg, "header_length is %u; expected %u to %u",
				 header->header_length,
				 QCOW_V3_MIN_HEADER_LENGTH, cluster_size);
		return -EINVAL;
	}
	if (header->backing_offset > cluster_size) {
		qcow_message_set(msg,
				 "backing_file_offset is %llu; expected at most the cluster size %u",
				 header->backing_offset, cluster_size);
		return -EINVAL;
	}

	ret = check_compression(header, msg);
	if (ret)
		return ret;
	ret = check_unknown_features(buf, cluster_size, header, msg);
	if (ret)
		return ret;
	if (writable && (header->incompatible & QCOW_INCOMPAT_CORRUPT)) {
		qcow_message_set(msg,
				 "the image is marked corrupt; repair it with 'qcowctl check --repair', or attach it read-only");
		return -EUCLEAN;
	}
	if ((header->incompatible & QCOW_INCOMPAT_EXTENDED_L2) &&
	    header->cluster_bits < QCOW_EXTENDED_MIN_CLUSTER_BITS) {
		qcow_message_set(msg,
				 "cluster_bits is %u; expected at least %u with extended L2 entries",
				 header->cluster_bits,
				 QCOW_EXTENDED_MIN_CLUSTER_BITS);
		return -EINVAL;
	}
	if (header->refcount_order > QCOW_MAX_REFCOUNT_ORDER) {
		qcow_message_set(msg, "refcount_order is %u; expected at most %u",
				 header->refcount_order,
				 QCOW_MAX_REFCOUNT_ORDER);
		return -EINVAL;
	}
	ret = check_encryption(header, msg);
	if (ret)
		return ret;
	ret = check_tables(header, cluster_size, writable, msg);
	if (ret)
		return ret;
	ret = qcow_header_check_size(header, msg);
	if (ret)
		return ret;
	ret = parse_extensions(buf, cluster_size, header, msg);
	if (ret)
		return ret;

	ret = check_data_file(header, writable, msg);
	if (ret)
		return ret;
	ret = check_backing_name(header, cluster_size, msg);
	if (ret)
		return ret;
	if (writable && (header->incompatible & QCOW_INCOMPAT_DIRTY)) {
		qcow_message_set(msg,
				 "the image was not closed cleanly (dirty bit), its refcounts may be wrong; run 'qcowctl check --repair', or attach it read-only");
		return -EUCLEAN;
	}
	return 0;
}

/**
 * qcow_header_parse() - decode and validate the header of an image
 * @buf: the first cluster of the image, zeroes where the file is shorter
 * @len: length of @buf in bytes: what qcow_header_cluster_size() told
 * @writable: whether the image is going to be written
 * @header: filled in; undefined on errors
 * @msg: set when the image is refused; may be NULL
 *
 * On success all of this holds: the L1 table, the refcount table and the
 * snapshot table are aligned, within their limits, not in cluster 0 and end
 * below 2^63; the L1 table covers the size; no feature is used that the driver
 * cannot do; a backing file's name lies within @buf.
 *
 * Not looked at is what the tables hold, and whether they lie within the file.
 *
 * Context: any.
 * Return: 0; -EINVAL if a field is wrong; -EFBIG if a table or the disk is too
 * big; -EOPNOTSUPP if the image uses a feature that is unknown or not supported;
 * -EUCLEAN if the image needs a repair before it may be written.
 */
int qcow_header_parse(const void *buf, size_t len, bool writable,
		      struct qcow_header *header, struct qcow_message *msg)
{
	u32 cluster_size;
	int ret;

	ret = qcow_header_cluster_size(buf, len, &cluster_size, msg);
	if (ret)
		return ret;
	if (len < cluster_size) {
		qcow_message_set(msg,
				 "%zu bytes are too few for a header cluster of %u bytes",
				 len, cluster_size);
		return -EINVAL;
	}

	decode_header(buf, header);
	ret = check_header(buf, cluster_size, writable, header, msg);
	if (ret)
		return ret;

	if (!header->backing_offset || !header->backing_size) {
		header->backing_offset = 0;
		header->backing_size = 0;
	}
	return 0;
}
