/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Parsing and validation of the QCOW2 header. header.c is pure: it looks at a
 * buffer and decides; it does no I/O, allocates nothing and takes no locks, so
 * that KUnit and a userspace fuzzer can drive it.
 */
#ifndef QCOW_HEADER_H
#define QCOW_HEADER_H

#include "format.h"

#define QCOW_MESSAGE_SIZE	256

/**
 * struct qcow_message - one line that tells a person why an attach failed
 * @text: NUL-terminated; empty where the error number says it all
 */
struct qcow_message {
	char text[QCOW_MESSAGE_SIZE];
};

__printf(2, 3)
void qcow_message_set(struct qcow_message *msg, const char *fmt, ...);

/**
 * struct qcow_header - the header in the CPU's own terms
 * @version: 2 or 3
 * @cluster_bits: log2 of the cluster size
 * @l2_bits: log2 of the entries of an L2 table
 * @refcount_order: log2 of the width of a refcount in bits
 * @compression_type: QCOW_COMPRESSION_*
 * @crypt_method: QCOW_CRYPT_*
 * @size: size of the disk in bytes as stored, maybe no multiple of 512
 * @l1_size: entries of the active L1 table
 * @l1_table_offset: host offset, bytes
 * @refcount_table_offset: host offset, bytes
 * @refcount_table_clusters: length of the refcount table
 * @nb_snapshots: internal snapshots
 * @snapshots_offset: host offset of the snapshot table, bytes
 * @incompatible: feature bits
 * @compatible: feature bits
 * @autoclear: feature bits
 * @header_length: bytes; 72 for version 2
 * @backing_offset: where the backing file's name is, 0 if there is none
 * @backing_size: length of that name in bytes, 0 if there is none
 * @nb_bitmaps: persistent bitmaps, if they are to be believed
 * @bitmap_directory_offset: host offset of the bitmap directory, bytes
 * @bitmap_directory_size: its length in bytes, 0 if there is none
 * @encryption_offset: host offset of the LUKS header, bytes
 * @encryption_size: its length in bytes, 0 if there is none
 * @backing_format: the backing file's format as the header names it, or ""
 */
struct qcow_header {
	u32 version;
	u32 cluster_bits;
	u32 l2_bits;
	u32 refcount_order;
	u32 compression_type;
	u32 crypt_method;
	u64 size;
	u32 l1_size;
	u64 l1_table_offset;
	u64 refcount_table_offset;
	u32 refcount_table_clusters;
	u32 nb_snapshots;
	u64 snapshots_offset;
	u64 incompatible;
	u64 compatible;
	u64 autoclear;
	u32 header_length;
	u64 backing_offset;
	u32 backing_size;
	u32 nb_bitmaps;
	u64 bitmap_directory_offset;
	u64 bitmap_directory_size;
	u64 encryption_offset;
	u64 encryption_size;
	char backing_format[QCOW_MAX_BACKING_FORMAT + 1];
};

int qcow_header_cluster_size(const void *buf, size_t len, u32 *cluster_size,
			     struct qcow_message *msg);
int qcow_header_parse(const void *buf, size_t len, bool writable,
		      struct qcow_header *header, struct qcow_message *msg);

int qcow_header_check_size(const struct qcow_header *header,
			   struct qcow_message *msg);

#endif /* QCOW_HEADER_H */
