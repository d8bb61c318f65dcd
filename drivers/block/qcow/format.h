/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The QCOW2 on-disk format: structures, masks and limits.
 *
 * All integers on disk are big-endian; they have __be types here and are
 * converted once, where they are read. Everything in this file follows the
 * published specification of the format (versions 2 and 3); the limits are the
 * ones that QEMU enforces when it opens an image, so that what the driver
 * accepts QEMU accepts too.
 *
 * This file needs nothing but integer types, so that the parser in header.c can
 * be built for userspace as well.
 */
#ifndef QCOW_FORMAT_H
#define QCOW_FORMAT_H

#include <linux/types.h>
#include <linux/bits.h>

#define QCOW_MAGIC			0x514649fbU	/* "QFI\xfb" */

#define QCOW_MIN_CLUSTER_BITS		9
#define QCOW_MAX_CLUSTER_BITS		21
#define QCOW_MAX_REFCOUNT_ORDER		6
#define QCOW_MAX_L1_BYTES		(32U << 20)
#define QCOW_MAX_REFTABLE_BYTES		(8U << 20)
#define QCOW_MAX_SNAPSHOTS		65536U
#define QCOW_MAX_BACKING_NAME		1023U
#define QCOW_MAX_BACKING_FORMAT		15U
/* Host offsets of clusters and tables have 56 bits. */
#define QCOW_MAX_HOST_OFFSET		BIT_ULL(56)

/**
 * struct qcow_disk_header - the header at offset 0
 *
 * Version 2 ends before @incompatible_features. Whether a field of version 3 is
 * there is told by @header_length.
 */
struct qcow_disk_header {
	__be32 magic;
	__be32 version;
	__be64 backing_file_offset;
	__be32 backing_file_size;
	__be32 cluster_bits;
	__be64 size;
	__be32 crypt_method;
	__be32 l1_size;
	__be64 l1_table_offset;
	__be64 refcount_table_offset;
	__be32 refcount_table_clusters;
	__be32 nb_snapshots;
	__be64 snapshots_offset;
	/* version 3 */
	__be64 incompatible_features;
	__be64 compatible_features;
	__be64 autoclear_features;
	__be32 refcount_order;
	__be32 header_length;
	__u8 compression_type;
	__u8 padding[7];
} __packed;

#define QCOW_V2_HEADER_LENGTH		72U
#define QCOW_V3_MIN_HEADER_LENGTH	104U

#define QCOW_INCOMPAT_DIRTY		BIT_ULL(0)
#define QCOW_INCOMPAT_CORRUPT		BIT_ULL(1)
#define QCOW_INCOMPAT_DATA_FILE		BIT_ULL(2)
#define QCOW_INCOMPAT_COMPRESSION	BIT_ULL(3)
#define QCOW_INCOMPAT_EXTENDED_L2	BIT_ULL(4)

#define QCOW_COMPAT_LAZY_REFCOUNTS	BIT_ULL(0)

#define QCOW_AUTOCLEAR_BITMAPS		BIT_ULL(0)
#define QCOW_AUTOCLEAR_RAW_DATA_FILE	BIT_ULL(1)

/* As in QCOW_ENCRYPTION_* of the control interface */
#define QCOW_CRYPT_NONE			0U
#define QCOW_CRYPT_AES			1U
#define QCOW_CRYPT_LUKS			2U

#define QCOW_COMPRESSION_ZLIB		0U
#define QCOW_COMPRESSION_ZSTD		1U

/**
 * struct qcow_disk_extension - what precedes each header extension's data
 */
struct qcow_disk_extension {
	__be32 magic;
	__be32 length;
} __packed;

#define QCOW_EXT_END			0x00000000U
#define QCOW_EXT_BACKING_FORMAT		0xe2792acaU
#define QCOW_EXT_FEATURE_TABLE		0x6803f857U
#define QCOW_EXT_BITMAPS		0x23852875U
#define QCOW_EXT_CRYPTO_HEADER		0x0537be77U
#define QCOW_EXT_DATA_FILE		0x44415441U

/**
 * struct qcow_disk_feature - one entry of the feature name table extension
 */
struct qcow_disk_feature {
	__u8 type;		/* 0 incompatible, 1 compatible, 2 autoclear */
	__u8 bit;
	char name[46];		/* not necessarily NUL-terminated */
} __packed;

/**
 * struct qcow_disk_snapshot - an entry of the snapshot table
 *
 * Extra data, ID and name follow, and padding to a multiple of 8 bytes.
 */
struct qcow_disk_snapshot {
	__be64 l1_table_offset;
	__be32 l1_size;
	__be16 id_str_size;
	__be16 name_size;
	__be32 date_sec;
	__be32 date_nsec;
	__be64 vm_clock_nsec;
	__be32 vm_state_size;
	__be32 extra_data_size;
} __packed;

/**
 * struct qcow_disk_snapshot_extra - the extra data that is of interest
 */
struct qcow_disk_snapshot_extra {
	__be64 vm_state_size_large;
	__be64 disk_size;
} __packed;

/* L1 table entries */
#define QCOW_L1_OFFSET_MASK		0x00fffffffffffe00ULL
#define QCOW_L1_RESERVED_MASK		0x7f000000000001ffULL

/*
 * L2 table entries: a descriptor of 64 bits, which in images with extended L2
 * entries a bitmap of 64 bits follows. Its bit x says that subcluster x is
 * allocated, and bit 32 + x that it reads as zeroes.
 */
#define QCOW_L2_OFFSET_MASK		0x00fffffffffffe00ULL
#define QCOW_L2_RESERVED_MASK		0x3f000000000001feULL
/* Reserved, but for compressed clusters; never on disk: see resolve.c */
#define QCOW_L2_RESOLVED		BIT_ULL(1)

/*
 * The descriptor of a compressed cluster is another one: the byte where it begins
 * in the lowest bits, and above, up to bit 61, the sectors it touches, less one.
 */
#define QCOW_PACKED_OFFSET_BITS(cluster_bits)	(62 - ((cluster_bits) - 8))

#define QCOW_SUBCLUSTERS		32U
/* Subclusters are not smaller than a sector. */
#define QCOW_EXTENDED_MIN_CLUSTER_BITS	14

/* L1 and L2: the cluster's refcount is exactly one, it may be written in place. */
#define QCOW_OFLAG_COPIED		BIT_ULL(63)
#define QCOW_OFLAG_COMPRESSED		BIT_ULL(62)
#define QCOW_OFLAG_ZERO			BIT_ULL(0)

/* Refcount table entries */
#define QCOW_RT_OFFSET_MASK		0xfffffffffffffe00ULL
#define QCOW_RT_RESERVED_MASK		0x00000000000001ffULL

#endif /* QCOW_FORMAT_H */
