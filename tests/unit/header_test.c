// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit: which headers are taken, which are refused, and what is said then.
 *
 * Each case of the table pokes a few fields into a valid header and says what
 * must come of it. The buffer is exactly as long as the header's cluster, so
 * that KASAN sees a parser that looks behind it.
 */
#include <kunit/test.h>
#include <linux/limits.h>
#include <linux/prandom.h>
#include <linux/string.h>

#include "../../drivers/block/qcow/header.h"
#include "header_fields.h"

#define WHOLE_FIELD	255U
#define POKE(field, v)	{ AT(field), WHOLE_FIELD, (v) }
#define POKE32(at, v)	{ (at), 4, (v) }
#define POKE64(at, v)	{ (at), 8, (v) }

/* The extensions of the valid header start here. */
#define EXT		112U

#define MIB		BIT_ULL(20)

struct poke {
	u32 at;
	u32 bytes;
	u64 value;
};

struct header_case {
	const char *name;
	u32 version;		/* 0 for 3 */
	u32 cluster_bits;	/* 0 for 16 */
	bool writable;
	struct {
		u32 magic;
		u32 length;
	} extension;		/* the first one */
	struct poke pokes[6];
	int error;
	const char *says;
};

static const struct header_case header_cases[] = {
	{ .name = "v3 as it is" },
	{ .name = "v3 as it is, writable", .writable = true },
	{ .name = "v2 as it is", .version = 2 },
	{ .name = "v2 as it is, writable", .version = 2, .writable = true },
	{ .name = "smallest clusters", .cluster_bits = 9, .writable = true },
	{ .name = "largest clusters", .cluster_bits = 21, .writable = true },

	/* magic, version, cluster_bits */
	{ .name = "magic of nothing", .pokes = { POKE(magic, 0) },
	  .error = -EINVAL, .says = "not a qcow2 image" },
	{ .name = "magic off by one", .pokes = { POKE(magic, 0x514649fa) },
	  .error = -EINVAL, .says = "0x514649fa; expected 0x514649fb" },
	{ .name = "version 0", .pokes = { POKE(version, 0) },
	  .error = -EOPNOTSUPP, .says = "version is 0; expected 2 or 3" },
	{ .name = "version 1", .pokes = { POKE(version, 1) },
	  .error = -EOPNOTSUPP, .says = "version is 1; expected 2 or 3" },
	{ .name = "version 4", .pokes = { POKE(version, 4) },
	  .error = -EOPNOTSUPP, .says = "version is 4; expected 2 or 3" },
	{ .name = "version all ones", .pokes = { POKE(version, U32_MAX) },
	  .error = -EOPNOTSUPP, .says = "version is 4294967295" },
	{ .name = "cluster_bits 0", .pokes = { POKE(cluster_bits, 0) },
	  .error = -EINVAL, .says = "cluster_bits is 0; expected 9 to 21" },
	{ .name = "cluster_bits 8", .pokes = { POKE(cluster_bits, 8) },
	  .error = -EINVAL, .says = "cluster_bits is 8; expected 9 to 21" },
	{ .name = "cluster_bits 22", .pokes = { POKE(cluster_bits, 22) },
	  .error = -EINVAL, .says = "cluster_bits is 22; expected 9 to 21" },
	{ .name = "cluster_bits all ones",
	  .pokes = { POKE(cluster_bits, U32_MAX) },
	  .error = -EINVAL, .says = "cluster_bits is 4294967295" },
	{ .name = "magic is looked at before version",
	  .pokes = { POKE(magic, 0), POKE(version, 4) },
	  .error = -EINVAL, .says = "not a qcow2 image" },
	{ .name = "version is looked at before cluster_bits",
	  .pokes = { POKE(version, 4), POKE(cluster_bits, 0) },
	  .error = -EOPNOTSUPP, .says = "version" },

	/* header_length */
	{ .name = "header_length 0", .pokes = { POKE(header_length, 0) },
	  .error = -EINVAL, .says = "header_length is 0; expected 104 to 65536" },
	{ .name = "header_length 103", .pokes = { POKE(header_length, 103) },
	  .error = -EINVAL, .says = "header_length is 103" },
	{ .name = "header_length 104", .pokes = { POKE(header_length, 104) } },
	{ .name = "header_length 105", .pokes = { POKE(header_length, 105) } },
	{ .name = "header_length 120", .pokes = { POKE(header_length, 120) } },
	{ .name = "header_length is the cluster size",
	  .pokes = { POKE(header_length, 65536) } },
	{ .name = "header_length above the cluster size",
	  .pokes = { POKE(header_length, 65537) },
	  .error = -EINVAL, .says = "header_length is 65537" },
	{ .name = "header_length all ones",
	  .pokes = { POKE(header_length, U32_MAX) },
	  .error = -EINVAL, .says = "header_length is 4294967295" },
	{ .name = "header_length leaves less than an extension",
	  .pokes = { POKE(header_length, 65532) },
	  .error = -EINVAL, .says = "cut off" },
	{ .name = "header_length leaves exactly the end marker",
	  .pokes = { POKE(header_length, 65528) } },
	{ .name = "fields behind those that are known",
	  .pokes = { POKE(header_length, 256), POKE64(112, U64_MAX),
		     POKE64(248, U64_MAX) } },
	{ .name = "extensions come behind fields that are not known",
	  .pokes = { POKE(header_length, 256), POKE32(256, 0x12345678),
		     POKE32(260, U32_MAX) },
	  .error = -EINVAL, .says = "0x12345678" },
	{ .name = "v2 has no header_length", .version = 2,
	  .pokes = { POKE(header_length, 1) } },

	/* the backing file's name */
	{ .name = "backing_file_offset at the cluster's end",
	  .pokes = { POKE(backing_file_offset, 65536) } },
	{ .name = "backing_file_offset behind the cluster",
	  .pokes = { POKE(backing_file_offset, 65537) },
	  .error = -EINVAL, .says = "backing_file_offset is 65537" },
	{ .name = "backing_file_offset all ones",
	  .pokes = { POKE(backing_file_offset, U64_MAX) },
	  .error = -EINVAL, .says = "backing_file_offset is 18446744073709551615" },
	{ .name = "backing_file_offset all ones in v2", .version = 2,
	  .pokes = { POKE(backing_file_offset, U64_MAX) },
	  .error = -EINVAL, .says = "backing_file_offset" },
	{ .name = "backing name of 1023 bytes",
	  .pokes = { POKE(backing_file_offset, 512),
		     POKE(backing_file_size, 1023) } },
	{ .name = "backing name of 1024 bytes",
	  .pokes = { POKE(backing_file_offset, 512),
		     POKE(backing_file_size, 1024) },
	  .error = -EINVAL, .says = "backing_file_size is 1024; expected at most 1023" },
	{ .name = "backing name up to the cluster's end",
	  .pokes = { POKE(backing_file_offset, 65528),
		     POKE(backing_file_size, 8) } },
	{ .name = "backing name over the cluster's end",
	  .pokes = { POKE(backing_file_offset, 65528),
		     POKE(backing_file_size, 9) },
	  .error = -EINVAL, .says = "backing_file_size is 9; expected at most 8" },
	{ .name = "backing name at the cluster's end",
	  .pokes = { POKE(backing_file_offset, 65536),
		     POKE(backing_file_size, 1) },
	  .error = -EINVAL, .says = "expected at most 0" },
	{ .name = "backing_file_size without an offset means nothing",
	  .pokes = { POKE(backing_file_size, U32_MAX) } },
	{ .name = "an empty backing name is none",
	  .pokes = { POKE(backing_file_offset, 512) } },
	{ .name = "the name cuts off the extensions",
	  .pokes = { POKE(backing_file_offset, EXT + 4) },
	  .error = -EINVAL, .says = "cut off" },
	{ .name = "the name is right behind the end marker",
	  .pokes = { POKE(backing_file_offset, EXT + 8) } },
	{ .name = "the name is where the extensions would start",
	  .pokes = { POKE(backing_file_offset, EXT), POKE(backing_file_size, 4),
		     POKE32(EXT, 0x62617365) } },

	/* compression */
	{ .name = "compression bit without a type",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_COMPRESSION) },
	  .error = -EINVAL, .says = "bit 3 (compression type) is 1; expected 0" },
	{ .name = "compression type without the bit",
	  .pokes = { POKE(compression_type, 1) },
	  .error = -EINVAL, .says = "bit 3 (compression type) is 0; expected 1" },
	{ .name = "zstd compression",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_COMPRESSION),
		     POKE(compression_type, 1) } },
	{ .name = "the bytes behind the compression type mean nothing",
	  .pokes = { { AT(padding), 7, U64_MAX } } },
	{ .name = "compression type 2",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_COMPRESSION),
		     POKE(compression_type, 2) },
	  .error = -EOPNOTSUPP, .says = "compression_type is 2; expected 0" },
	{ .name = "compression type 255",
	  .pokes = { POKE(compression_type, 255) },
	  .error = -EOPNOTSUPP, .says = "compression_type is 255" },

	/* feature bits */
	{ .name = "first unknown incompatible bit",
	  .pokes = { POKE(incompatible_features, BIT_ULL(5)) },
	  .error = -EOPNOTSUPP, .says = "unknown incompatible features: bit 5" },
	{ .name = "last unknown incompatible bit",
	  .pokes = { POKE(incompatible_features, BIT_ULL(63)) },
	  .error = -EOPNOTSUPP, .says = "unknown incompatible features: bit 63" },
	{ .name = "all unknown incompatible bits",
	  .pokes = { POKE(incompatible_features, ~0x1fULL) },
	  .error = -EOPNOTSUPP, .says = "bit 5, bit 6, bit 7" },
	{ .name = "unknown bits are looked at before the corrupt bit",
	  .writable = true,
	  .pokes = { POKE(incompatible_features,
			  BIT_ULL(5) | QCOW_INCOMPAT_CORRUPT) },
	  .error = -EOPNOTSUPP, .says = "unknown incompatible" },
	{ .name = "a broken extension does not hide an unknown bit",
	  .extension = { 1, U32_MAX },
	  .pokes = { POKE(incompatible_features, BIT_ULL(5)) },
	  .error = -EOPNOTSUPP, .says = "bit 5" },
	{ .name = "all compatible bits", .writable = true,
	  .pokes = { POKE(compatible_features, U64_MAX) } },
	{ .name = "lazy refcounts", .writable = true,
	  .pokes = { POKE(compatible_features, QCOW_COMPAT_LAZY_REFCOUNTS) } },
	{ .name = "bitmaps bit without bitmaps", .writable = true,
	  .pokes = { POKE(autoclear_features, QCOW_AUTOCLEAR_BITMAPS) } },
	{ .name = "all unknown autoclear bits", .writable = true,
	  .pokes = { POKE(autoclear_features, ~0x3ULL) } },
	{ .name = "raw external data without a data file",
	  .pokes = { POKE(autoclear_features, QCOW_AUTOCLEAR_RAW_DATA_FILE) },
	  .error = -EINVAL, .says = "without incompatible feature bit 2" },
	{ .name = "external data file",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DATA_FILE) } },
	{ .name = "raw external data file and a backing file",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DATA_FILE),
		     POKE(autoclear_features, QCOW_AUTOCLEAR_RAW_DATA_FILE),
		     POKE(backing_file_offset, 1000), POKE(backing_file_size, 4) },
	  .error = -EINVAL, .says = "excludes a backing file" },
	{ .name = "external data file and snapshots",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DATA_FILE),
		     POKE(nb_snapshots, 1), POKE(snapshots_offset, 0x50000) } },
	{ .name = "external data file and snapshots, writable", .writable = true,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DATA_FILE),
		     POKE(nb_snapshots, 1), POKE(snapshots_offset, 0x50000) },
	  .error = -EINVAL, .says = "excludes internal snapshots" },
	{ .name = "external data file, raw",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DATA_FILE),
		     POKE(autoclear_features, QCOW_AUTOCLEAR_RAW_DATA_FILE) } },
	{ .name = "extended L2 entries",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_EXTENDED_L2) } },
	{ .name = "extended L2 entries in clusters of 8 KiB", .cluster_bits = 13,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_EXTENDED_L2) },
	  .error = -EINVAL, .says = "cluster_bits is 13; expected at least 14" },
	{ .name = "extended L2 entries in clusters of 16 KiB",
	  .cluster_bits = 14,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_EXTENDED_L2) } },
	{ .name = "dirty, read only",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DIRTY) } },
	{ .name = "dirty, writable", .writable = true,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DIRTY) },
	  .error = -EUCLEAN, .says = "not closed cleanly (dirty bit)" },
	{ .name = "corrupt, read only",
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_CORRUPT) } },
	{ .name = "corrupt, writable", .writable = true,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_CORRUPT) },
	  .error = -EUCLEAN, .says = "the image is marked corrupt" },
	{ .name = "dirty and corrupt, writable", .writable = true,
	  .pokes = { POKE(incompatible_features,
			  QCOW_INCOMPAT_DIRTY | QCOW_INCOMPAT_CORRUPT) },
	  .error = -EUCLEAN, .says = "the image is marked corrupt" },
	{ .name = "the rest of a dirty header is checked first",
	  .writable = true,
	  .pokes = { POKE(incompatible_features, QCOW_INCOMPAT_DIRTY),
		     POKE(refcount_order, 7) },
	  .error = -EINVAL, .says = "refcount_order" },
	{ .name = "v2 has no feature bits", .version = 2, .writable = true,
	  .pokes = { POKE(compatible_features, 0x1fULL),
		     POKE64(72, 0), POKE32(96, 99), POKE32(100, 99) } },

	/* refcount_order, crypt_method */
	{ .name = "refcount_order 0", .pokes = { POKE(refcount_order, 0) } },
	{ .name = "refcount_order 6", .pokes = { POKE(refcount_order, 6) } },
	{ .name = "refcount_order 7", .pokes = { POKE(refcount_order, 7) },
	  .error = -EINVAL, .says = "refcount_order is 7; expected at most 6" },
	{ .name = "refcount_order all ones",
	  .pokes = { POKE(refcount_order, U32_MAX) },
	  .error = -EINVAL, .says = "refcount_order is 4294967295" },
	{ .name = "AES", .pokes = { POKE(crypt_method, 1) } },
	{ .name = "AES in v2", .version = 2, .pokes = { POKE(crypt_method, 1) } },
	{ .name = "LUKS without its extension", .pokes = { POKE(crypt_method, 2) },
	  .error = -EINVAL, .says = "no encryption header extension" },
	{ .name = "LUKS with its extension",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 8, 0x60000),
		     POKE64(EXT + 16, 0x10000) } },
	{ .name = "LUKS header extension of 15 bytes",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 15 },
	  .pokes = { POKE(crypt_method, 2) },
	  .error = -EINVAL, .says = "has length 15; expected 16" },
	{ .name = "LUKS header that is not aligned",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 8, 0x60200),
		     POKE64(EXT + 16, 0x10000) },
	  .error = -EINVAL, .says = "the encryption header is 65536 bytes at 393728" },
	{ .name = "LUKS header in the first cluster",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 16, 0x10000) },
	  .error = -EINVAL, .says = "the encryption header is 65536 bytes at 0" },
	{ .name = "LUKS header out of reach",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 8, 1ULL << 63),
		     POKE64(EXT + 16, 0x10000) },
	  .error = -EINVAL, .says = "the encryption header is" },
	{ .name = "LUKS header of no bytes",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 8, 0x60000) },
	  .error = -EINVAL, .says = "the encryption header is 0 bytes" },
	{ .name = "LUKS header of more than 64 MiB",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .pokes = { POKE(crypt_method, 2), POKE64(EXT + 8, 0x60000),
		     POKE64(EXT + 16, 0x4000001) },
	  .error = -EINVAL, .says = "the encryption header is 67108865 bytes" },
	{ .name = "crypt_method 3", .pokes = { POKE(crypt_method, 3) },
	  .error = -EINVAL, .says = "crypt_method is 3; expected 0" },
	{ .name = "crypt_method all ones",
	  .pokes = { POKE(crypt_method, U32_MAX) },
	  .error = -EINVAL, .says = "crypt_method is 4294967295" },

	/* refcount table */
	{ .name = "no refcount table",
	  .pokes = { POKE(refcount_table_clusters, 0) },
	  .error = -EINVAL, .says = "refcount_table_clusters is 0; expected at least 1" },
	{ .name = "refcount table of 8 MiB",
	  .pokes = { POKE(refcount_table_clusters, 128) } },
	{ .name = "refcount table above 8 MiB",
	  .pokes = { POKE(refcount_table_clusters, 129) },
	  .error = -EFBIG, .says = "refcount_table_clusters is 129; expected at most 128" },
	{ .name = "refcount_table_clusters all ones", .cluster_bits = 21,
	  .pokes = { POKE(refcount_table_clusters, U32_MAX) },
	  .error = -EFBIG, .says = "refcount_table_clusters is 4294967295" },
	{ .name = "refcount table on the header",
	  .pokes = { POKE(refcount_table_offset, 0) },
	  .error = -EINVAL, .says = "refcount_table_offset is 0" },
	{ .name = "refcount table not aligned",
	  .pokes = { POKE(refcount_table_offset, 65536 + 512) },
	  .error = -EINVAL, .says = "refcount_table_offset is 66048; expected a multiple" },
	{ .name = "refcount table at the end of the address space",
	  .pokes = { POKE(refcount_table_offset, S64_MAX - 131071) } },
	{ .name = "refcount table over the end of the address space",
	  .pokes = { POKE(refcount_table_offset, S64_MAX - 65535) },
	  .error = -EINVAL, .says = "beyond the largest file" },
	{ .name = "refcount table at 2^63",
	  .pokes = { POKE(refcount_table_offset, BIT_ULL(63)) },
	  .error = -EINVAL, .says = "refcount_table_offset is 9223372036854775808" },
	{ .name = "refcount table wraps",
	  .pokes = { POKE(refcount_table_offset, -65536ULL) },
	  .error = -EINVAL, .says = "refcount_table_offset" },

	/* snapshot table */
	{ .name = "65536 snapshots",
	  .pokes = { POKE(nb_snapshots, 65536), POKE(snapshots_offset, MIB) } },
	{ .name = "65537 snapshots",
	  .pokes = { POKE(nb_snapshots, 65537), POKE(snapshots_offset, MIB) },
	  .error = -EFBIG, .says = "nb_snapshots is 65537; expected at most 65536" },
	{ .name = "nb_snapshots all ones",
	  .pokes = { POKE(nb_snapshots, U32_MAX) },
	  .error = -EFBIG, .says = "nb_snapshots" },
	{ .name = "snapshot table not aligned, without a snapshot",
	  .pokes = { POKE(snapshots_offset, 1) },
	  .error = -EINVAL, .says = "snapshots_offset is 1; expected a multiple" },
	{ .name = "snapshot table on the header",
	  .pokes = { POKE(nb_snapshots, 1) },
	  .error = -EINVAL, .says = "snapshots_offset is 0" },
	{ .name = "snapshot table beyond the address space",
	  .pokes = { POKE(snapshots_offset, BIT_ULL(63)) },
	  .error = -EINVAL, .says = "snapshots_offset" },

	/* L1 table */
	{ .name = "L1 table of 32 MiB",
	  .pokes = { POKE(l1_size, 4 << 20) } },
	{ .name = "L1 table above 32 MiB",
	  .pokes = { POKE(l1_size, (4 << 20) + 1) },
	  .error = -EFBIG, .says = "l1_size is 4194305; expected at most 4194304" },
	{ .name = "l1_size all ones", .pokes = { POKE(l1_size, U32_MAX) },
	  .error = -EFBIG, .says = "l1_size is 4294967295" },
	{ .name = "L1 table on the header", .pokes = { POKE(l1_table_offset, 0) },
	  .error = -EINVAL, .says = "l1_table_offset is 0" },
	{ .name = "L1 table not aligned",
	  .pokes = { POKE(l1_table_offset, 3 * 65536 + 8) },
	  .error = -EINVAL, .says = "l1_table_offset is 196616; expected a multiple" },
	{ .name = "L1 table at the end of the address space",
	  .pokes = { POKE(l1_table_offset, S64_MAX - 65535) } },
	{ .name = "L1 table over the end of the address space",
	  .pokes = { POKE(l1_table_offset, S64_MAX - 65535),
		     POKE(l1_size, 8192) },
	  .error = -EINVAL, .says = "l1_table_offset" },
	{ .name = "L1 table wraps",
	  .pokes = { POKE(l1_table_offset, -65536ULL) },
	  .error = -EINVAL, .says = "l1_table_offset" },

	/* tables on top of each other: harmless until they are written */
	{ .name = "L1 table on the refcount table, read only",
	  .pokes = { POKE(l1_table_offset, 65536) } },
	{ .name = "L1 table on the refcount table, writable", .writable = true,
	  .pokes = { POKE(l1_table_offset, 65536) },
	  .error = -EUCLEAN, .says = "the L1 table at 65536 overlaps the refcount table at 65536" },
	{ .name = "refcount table runs into the L1 table", .writable = true,
	  .pokes = { POKE(refcount_table_clusters, 3) },
	  .error = -EUCLEAN, .says = "overlaps" },
	{ .name = "refcount table ends where the L1 table begins",
	  .writable = true,
	  .pokes = { POKE(refcount_table_clusters, 2) } },
	{ .name = "snapshot table on the L1 table", .writable = true,
	  .pokes = { POKE(nb_snapshots, 1), POKE(snapshots_offset, 3 * 65536) },
	  .error = -EUCLEAN, .says = "the snapshot table at 196608 overlaps the L1 table" },
	{ .name = "snapshot table on the refcount table", .writable = true,
	  .pokes = { POKE(nb_snapshots, 1), POKE(snapshots_offset, 65536) },
	  .error = -EUCLEAN, .says = "overlaps the refcount table" },
	{ .name = "an empty snapshot table overlaps nothing", .writable = true,
	  .pokes = { POKE(refcount_table_clusters, 2),
		     POKE(snapshots_offset, 2 * 65536) } },
	{ .name = "L1 table ends where the refcount table begins",
	  .writable = true,
	  .pokes = { POKE(l1_table_offset, 65536), POKE(l1_size, 8192),
		     POKE(refcount_table_offset, 2 * 65536) } },

	/* size */
	{ .name = "size 0", .pokes = { POKE(size, 0) } },
	{ .name = "size 0 without an L1 table",
	  .pokes = { POKE(size, 0), POKE(l1_size, 0),
		     POKE(l1_table_offset, 0) } },
	{ .name = "size 1", .pokes = { POKE(size, 1) } },
	{ .name = "size 1 without an L1 table",
	  .pokes = { POKE(size, 1), POKE(l1_size, 0) },
	  .error = -EINVAL,
	  .says = "l1_size is 0, too small for the disk size of 1 bytes; expected at least 1" },
	{ .name = "all that the L1 table can map",
	  .pokes = { POKE(size, 512 * MIB) } },
	{ .name = "one byte more than the L1 table can map",
	  .pokes = { POKE(size, 512 * MIB + 1) },
	  .error = -EINVAL, .says = "expected at least 2" },
	{ .name = "the largest disk with the smallest clusters",
	  .cluster_bits = 9,
	  .pokes = { POKE(size, 128ULL << 30), POKE(l1_size, 4 << 20) } },
	{ .name = "one byte more than the largest disk",
	  .cluster_bits = 9,
	  .pokes = { POKE(size, (128ULL << 30) + 1), POKE(l1_size, 4 << 20) },
	  .error = -EINVAL, .says = "expected at least 4194305" },
	{ .name = "the largest disk with the largest clusters",
	  .cluster_bits = 21,
	  .pokes = { POKE(size, 1ULL << 61), POKE(l1_size, 4 << 20) } },
	{ .name = "as many L1 entries as QEMU counts",
	  .pokes = { POKE(size, (u64)INT_MAX * 512 * MIB) },
	  .error = -EINVAL, .says = "expected at least 2147483647" },
	{ .name = "more L1 entries than QEMU counts",
	  .pokes = { POKE(size, (u64)INT_MAX * 512 * MIB + 1) },
	  .error = -EFBIG, .says = "is too big for clusters of 65536 bytes" },
	{ .name = "size of 2^63 - 1 with the largest clusters",
	  .cluster_bits = 21, .pokes = { POKE(size, S64_MAX) },
	  .error = -EINVAL, .says = "expected at least 16777216" },
	{ .name = "size of 2^63", .cluster_bits = 21,
	  .pokes = { POKE(size, BIT_ULL(63)) },
	  .error = -EFBIG, .says = "size is 9223372036854775808 bytes" },
	{ .name = "size all ones", .pokes = { POKE(size, U64_MAX) },
	  .error = -EFBIG, .says = "size is 18446744073709551615 bytes" },

	/* extensions */
	{ .name = "unknown extension", .extension = { 0x12345678, 7 } },
	{ .name = "unknown extension up to the end of the cluster",
	  .extension = { 0x12345678, 65536 - EXT - 8 } },
	{ .name = "unknown extension over the end of the cluster",
	  .extension = { 0x12345678, 65536 - EXT - 7 },
	  .error = -EINVAL,
	  .says = "header extension 0x12345678 has length 65417; expected at most 65416" },
	{ .name = "unknown extension with a length of all ones",
	  .extension = { 0x12345678, U32_MAX },
	  .error = -EINVAL, .says = "has length 4294967295" },
	{ .name = "unknown extension over the backing name",
	  .extension = { 0x12345678, 9 },
	  .pokes = { POKE(backing_file_offset, EXT + 16) },
	  .error = -EINVAL, .says = "has length 9; expected at most 8" },
	{ .name = "end marker with a length out of range",
	  .extension = { QCOW_EXT_END, U32_MAX },
	  .error = -EINVAL, .says = "header extension 0x00000000" },
	{ .name = "second extension behind one that needs no padding",
	  .extension = { 0x12345678, 8 },
	  .pokes = { POKE32(EXT + 16, 0x12345678), POKE32(EXT + 20, 65536) },
	  .error = -EINVAL, .says = "has length 65536" },
	{ .name = "second extension out of range",
	  .extension = { 0x12345678, 1 },
	  .pokes = { POKE32(EXT + 16, 0x12345678), POKE32(EXT + 20, 65536) },
	  .error = -EINVAL, .says = "has length 65536" },
	{ .name = "nothing is looked at behind the end marker",
	  .pokes = { POKE32(EXT + 8, 0x12345678), POKE32(EXT + 12, U32_MAX) } },
	{ .name = "extensions of v2 start at 72", .version = 2,
	  .pokes = { POKE32(72, 0x12345678), POKE32(76, U32_MAX) },
	  .error = -EINVAL, .says = "0x12345678" },
	{ .name = "extensions of an odd header",
	  .pokes = { POKE(header_length, 105), POKE32(105, 0x12345678),
		     POKE32(109, U32_MAX) },
	  .error = -EINVAL, .says = "0x12345678" },
	{ .name = "backing format of 15 bytes",
	  .extension = { QCOW_EXT_BACKING_FORMAT, 15 } },
	{ .name = "backing format of 16 bytes",
	  .extension = { QCOW_EXT_BACKING_FORMAT, 16 },
	  .error = -EINVAL, .says = "length of 16 bytes; expected at most 15" },
	{ .name = "an empty backing format",
	  .extension = { QCOW_EXT_BACKING_FORMAT, 0 } },
	{ .name = "name of a data file that is not used",
	  .extension = { QCOW_EXT_DATA_FILE, 3 } },
	{ .name = "encryption header without encryption",
	  .extension = { QCOW_EXT_CRYPTO_HEADER, 16 },
	  .error = -EINVAL, .says = "encryption header extension" },
	{ .name = "feature names of a length that is no multiple of 48",
	  .extension = { QCOW_EXT_FEATURE_TABLE, 49 } },

	/* bitmaps */
	{ .name = "bitmaps extension of 23 bytes",
	  .extension = { QCOW_EXT_BITMAPS, 23 },
	  .error = -EINVAL, .says = "bitmaps extension has length 23; expected 24" },
	{ .name = "bitmaps extension that is stale",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 12, 1) } },
	{ .name = "bitmaps", .writable = true,
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 8, 65535),
		     POKE64(EXT + 16, 65535 * 1024), POKE64(EXT + 24, MIB),
		     POKE(autoclear_features, 1) } },
	{ .name = "bitmaps in reserved",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 8, 1),
		     POKE32(EXT + 12, 1), POKE(autoclear_features, 1) },
	  .error = -EINVAL, .says = "reserved field of the bitmaps extension is 0x1" },
	{ .name = "0 bitmaps",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE(autoclear_features, 1) },
	  .error = -EINVAL, .says = "nb_bitmaps is 0" },
	{ .name = "65536 bitmaps",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 8, 65536),
		     POKE(autoclear_features, 1) },
	  .error = -EINVAL, .says = "nb_bitmaps is 65536" },
	{ .name = "bitmaps of v2 are not looked at", .version = 2, .writable = true,
	  .pokes = { POKE32(72, QCOW_EXT_BITMAPS), POKE32(76, 24) } },
	{ .name = "bitmap directory not aligned",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 8, 1),
		     POKE64(EXT + 24, 512), POKE(autoclear_features, 1) },
	  .error = -EINVAL, .says = "bitmap_directory_offset is 512" },
	{ .name = "bitmap directory too big",
	  .extension = { QCOW_EXT_BITMAPS, 24 },
	  .pokes = { POKE32(EXT + 8, 1),
		     POKE64(EXT + 16, 65535 * 1024 + 1),
		     POKE(autoclear_features, 1) },
	  .error = -EINVAL, .says = "bitmap_directory_size is 67107841" },
};

static void header_case_desc(const struct header_case *c, char *desc)
{
	strscpy(desc, c->name, KUNIT_PARAM_DESC_SIZE);
}

KUNIT_ARRAY_PARAM(header, header_cases, header_case_desc);

static void poke(void *buf, u32 at, u32 bytes, u64 value)
{
	if (bytes == WHOLE_FIELD)
		bytes = header_field_bytes(at);
	while (bytes--) {
		((u8 *)buf)[at + bytes] = value;
		value >>= 8;
	}
}

#define SET(buf, field, value)	poke(buf, AT(field), WHOLE_FIELD, value)

/* The first cluster of a disk of 10 MiB: valid, without any feature. */
static void *valid_header(struct kunit *test, u32 version, u32 cluster_bits)
{
	u32 cluster_size = 1U << cluster_bits;
	u64 size = 10 * MIB;
	u64 per_l1_entry = 1ULL << (2 * cluster_bits - 3);
	void *buf = kunit_kzalloc(test, cluster_size, GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, buf);
	SET(buf, magic, QCOW_MAGIC);
	SET(buf, version, version);
	SET(buf, cluster_bits, cluster_bits);
	SET(buf, size, size);
	SET(buf, l1_size,
	    (size + per_l1_entry - 1) >> (2 * cluster_bits - 3));
	SET(buf, l1_table_offset, 3ULL * cluster_size);
	SET(buf, refcount_table_offset, cluster_size);
	SET(buf, refcount_table_clusters, 1);
	if (version >= 3) {
		SET(buf, refcount_order, 4);
		SET(buf, header_length, sizeof(struct qcow_disk_header));
	}
	return buf;
}

static int parse(void *buf, bool writable, struct qcow_header *header,
		 struct qcow_message *msg)
{
	u32 cluster_size;
	int ret;

	ret = qcow_header_cluster_size(buf, 512, &cluster_size, msg);
	if (ret)
		return ret;
	return qcow_header_parse(buf, cluster_size, writable, header, msg);
}

static void header_is_judged(struct kunit *test)
{
	const struct header_case *c = test->param_value;
	void *buf = valid_header(test, c->version ?: 3, c->cluster_bits ?: 16);
	struct qcow_header header;
	struct qcow_message msg = {};
	u32 i;

	poke(buf, EXT, 4, c->extension.magic);
	poke(buf, EXT + 4, 4, c->extension.length);
	for (i = 0; i < ARRAY_SIZE(c->pokes) && c->pokes[i].bytes; i++)
		poke(buf, c->pokes[i].at, c->pokes[i].bytes, c->pokes[i].value);

	KUNIT_EXPECT_EQ_MSG(test, parse(buf, c->writable, &header, &msg),
			    c->error, "it says: %s", msg.text);
	if (c->says)
		KUNIT_EXPECT_NOT_NULL_MSG(test, strstr(msg.text, c->says),
					  "it says: %s", msg.text);
	else
		KUNIT_EXPECT_STREQ(test, msg.text, "");
	KUNIT_EXPECT_NULL(test, strchr(msg.text, '\n'));

	/* Nobody has to ask for the message. */
	KUNIT_EXPECT_EQ(test, parse(buf, c->writable, &header, NULL), c->error);
}

static void every_field_is_decoded(struct kunit *test)
{
	struct qcow_message msg = {};
	struct qcow_header header;
	void *buf = valid_header(test, 3, 16);
	const char *name = "base.img";

	SET(buf, backing_file_offset, 1000);
	SET(buf, backing_file_size, strlen(name));
	memcpy(buf + 1000, name, strlen(name));
	SET(buf, size, 100 * MIB + 1);
	SET(buf, l1_size, 77);
	SET(buf, l1_table_offset, 0x123450000ULL);
	SET(buf, refcount_table_offset, 0x567890000ULL);
	SET(buf, refcount_table_clusters, 3);
	SET(buf, nb_snapshots, 5);
	SET(buf, snapshots_offset, 0x9abcd0000ULL);
	SET(buf, incompatible_features, QCOW_INCOMPAT_DIRTY);
	SET(buf, compatible_features, 0xf0f0);
	SET(buf, autoclear_features, 0xfff0);
	SET(buf, refcount_order, 6);
	SET(buf, header_length, 120);
	poke(buf, 120, 4, QCOW_EXT_BACKING_FORMAT);
	poke(buf, 124, 4, 3);
	memcpy(buf + 128, "raw!!!!!", 8);

	KUNIT_ASSERT_EQ_MSG(test, parse(buf, false, &header, &msg), 0,
			    "it says: %s", msg.text);
	KUNIT_EXPECT_EQ(test, header.version, 3);
	KUNIT_EXPECT_EQ(test, header.cluster_bits, 16);
	KUNIT_EXPECT_EQ(test, header.refcount_order, 6);
	KUNIT_EXPECT_EQ(test, header.compression_type, QCOW_COMPRESSION_ZLIB);
	KUNIT_EXPECT_EQ(test, header.crypt_method, QCOW_CRYPT_NONE);
	KUNIT_EXPECT_EQ(test, header.size, 100 * MIB + 1);
	KUNIT_EXPECT_EQ(test, header.l1_size, 77);
	KUNIT_EXPECT_EQ(test, header.l1_table_offset, 0x123450000ULL);
	KUNIT_EXPECT_EQ(test, header.refcount_table_offset, 0x567890000ULL);
	KUNIT_EXPECT_EQ(test, header.refcount_table_clusters, 3);
	KUNIT_EXPECT_EQ(test, header.nb_snapshots, 5);
	KUNIT_EXPECT_EQ(test, header.snapshots_offset, 0x9abcd0000ULL);
	KUNIT_EXPECT_EQ(test, header.incompatible, QCOW_INCOMPAT_DIRTY);
	KUNIT_EXPECT_EQ(test, header.compatible, 0xf0f0);
	KUNIT_EXPECT_EQ(test, header.autoclear, 0xfff0);
	KUNIT_EXPECT_EQ(test, header.header_length, 120);
	KUNIT_EXPECT_EQ(test, header.backing_offset, 1000);
	KUNIT_EXPECT_EQ(test, header.backing_size, 8);
	KUNIT_EXPECT_STREQ(test, header.backing_format, "raw");
}

static void v2_gets_the_defaults(struct kunit *test)
{
	struct qcow_header header;
	void *buf = valid_header(test, 2, 16);

	/* What v3 has its fields in is an unknown extension here. */
	poke(buf, 72, 4, 0x12345678);
	poke(buf, 76, 4, 32);
	memset(buf + 80, 0xff, 32);

	KUNIT_ASSERT_EQ(test, parse(buf, true, &header, NULL), 0);
	KUNIT_EXPECT_EQ(test, header.version, 2);
	KUNIT_EXPECT_EQ(test, header.incompatible, 0);
	KUNIT_EXPECT_EQ(test, header.compatible, 0);
	KUNIT_EXPECT_EQ(test, header.autoclear, 0);
	KUNIT_EXPECT_EQ(test, header.refcount_order, 4);
	KUNIT_EXPECT_EQ(test, header.header_length, 72);
	KUNIT_EXPECT_EQ(test, header.compression_type, 0);
}

static void a_short_v3_header_has_no_compression_type(struct kunit *test)
{
	struct qcow_header header;
	void *buf = valid_header(test, 3, 16);

	/* Byte 104 belongs to an extension: 0x01...... unknown, empty. */
	SET(buf, header_length, 104);
	poke(buf, 104, 4, 0x01020304);
	KUNIT_ASSERT_EQ(test, parse(buf, true, &header, NULL), 0);
	KUNIT_EXPECT_EQ(test, header.compression_type, 0);

	SET(buf, header_length, 105);
	KUNIT_EXPECT_EQ(test, parse(buf, true, &header, NULL), -EINVAL);
}

static void no_backing_file_is_told_as_zeroes(struct kunit *test)
{
	struct qcow_header header;
	void *buf = valid_header(test, 3, 16);

	SET(buf, backing_file_size, 12);
	KUNIT_ASSERT_EQ(test, parse(buf, true, &header, NULL), 0);
	KUNIT_EXPECT_EQ(test, header.backing_offset, 0);
	KUNIT_EXPECT_EQ(test, header.backing_size, 0);

	SET(buf, backing_file_size, 0);
	SET(buf, backing_file_offset, 1000);
	KUNIT_ASSERT_EQ(test, parse(buf, true, &header, NULL), 0);
	KUNIT_EXPECT_EQ(test, header.backing_offset, 0);
	KUNIT_EXPECT_EQ(test, header.backing_size, 0);
}

static void the_last_of_two_extensions_wins(struct kunit *test)
{
	struct qcow_header header;
	u8 *buf = valid_header(test, 3, 16);

	poke(buf, EXT, 4, QCOW_EXT_BACKING_FORMAT);
	poke(buf, EXT + 4, 4, 15);
	memcpy(buf + EXT + 8, "a-longer-format", 15);
	poke(buf, EXT + 24, 4, QCOW_EXT_BACKING_FORMAT);
	poke(buf, EXT + 28, 4, 5);
	memcpy(buf + EXT + 32, "qcow2", 5);

	KUNIT_ASSERT_EQ(test, parse(buf, true, &header, NULL), 0);
	KUNIT_EXPECT_STREQ(test, header.backing_format, "qcow2");
}

static void put_feature(u8 *buf, u32 at, u8 type, u8 bit, const char *name)
{
	buf[at] = type;
	buf[at + 1] = bit;
	memcpy(buf + at + 2, name, strlen(name));
}

static void unknown_features_have_the_names_from_the_image(struct kunit *test)
{
	struct qcow_message msg = {};
	struct qcow_header header;
	u8 *buf = valid_header(test, 3, 16);
	u32 i;

	/* Six entries; what is left over at the end is not one. */
	poke(buf, EXT, 4, QCOW_EXT_FEATURE_TABLE);
	poke(buf, EXT + 4, 4, 6 * 48 + 47);
	put_feature(buf, EXT + 8, 0, 5, "subspace");
	put_feature(buf, EXT + 8 + 48, 1, 6, "wrong type");
	put_feature(buf, EXT + 8 + 2 * 48, 0, 200, "no such bit");
	put_feature(buf, EXT + 8 + 3 * 48, 0, 7, "\x1b[31m ~\n");
	put_feature(buf, EXT + 8 + 4 * 48, 0, 8, "");
	for (i = 0; i < 46; i++)
		buf[EXT + 8 + 5 * 48 + 2 + i] = 'x';
	buf[EXT + 8 + 5 * 48 + 1] = 9;
	put_feature(buf, EXT + 8 + 6 * 48, 0, 10, "cut off");
	SET(buf, incompatible_features, 0x7e0);

	KUNIT_EXPECT_EQ(test, parse(buf, false, &header, &msg), -EOPNOTSUPP);
	KUNIT_EXPECT_STREQ(test, msg.text,
			   "unknown incompatible features: 'subspace' (bit 5), bit 6, '?[31m ~?' (bit 7), bit 8, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' (bit 9), bit 10");
}

static void feature_names_at_the_very_end_are_read(struct kunit *test)
{
	struct qcow_message msg = {};
	struct qcow_header header;
	u8 *buf = valid_header(test, 3, 9);

	SET(buf, header_length, 512 - 56);
	poke(buf, 512 - 56, 4, QCOW_EXT_FEATURE_TABLE);
	poke(buf, 512 - 52, 4, 48);
	memset(buf + 512 - 46, 'y', 46);
	buf[512 - 48] = 0;
	buf[512 - 47] = 63;
	SET(buf, incompatible_features, BIT_ULL(63));

	KUNIT_EXPECT_EQ(test, parse(buf, false, &header, &msg), -EOPNOTSUPP);
	KUNIT_EXPECT_NOT_NULL(test, strstr(msg.text, "yyyy' (bit 63)"));
}

static void every_cluster_size_is_told(struct kunit *test)
{
	struct qcow_header header;
	u32 bits, cluster_size;
	void *buf;

	for (bits = QCOW_MIN_CLUSTER_BITS; bits <= QCOW_MAX_CLUSTER_BITS; bits++) {
		buf = valid_header(test, 3, bits);
		cluster_size = 0;
		KUNIT_EXPECT_EQ(test,
				qcow_header_cluster_size(buf, 512, &cluster_size,
							 NULL), 0);
		KUNIT_EXPECT_EQ(test, cluster_size, 1U << bits);
		KUNIT_EXPECT_EQ(test,
				qcow_header_parse(buf, cluster_size, true,
						  &header, NULL), 0);
		KUNIT_EXPECT_EQ(test, header.cluster_bits, bits);
		kunit_kfree(test, buf);
	}
}

static void a_buffer_that_is_too_short_is_refused(struct kunit *test)
{
	struct qcow_message msg = {};
	struct qcow_header header;
	u32 cluster_size;
	void *buf = valid_header(test, 3, 16);

	KUNIT_EXPECT_EQ(test, qcow_header_cluster_size(buf, 111, &cluster_size,
						       &msg), -EINVAL);
	KUNIT_EXPECT_STREQ(test, msg.text, "111 bytes are too few for a header");
	KUNIT_EXPECT_EQ(test, qcow_header_cluster_size(buf, 112, &cluster_size,
						       &msg), 0);
	KUNIT_EXPECT_EQ(test, qcow_header_parse(buf, 0, false, &header, &msg),
			-EINVAL);
	KUNIT_EXPECT_EQ(test, qcow_header_parse(buf, 65535, false, &header,
						&msg), -EINVAL);
	KUNIT_EXPECT_STREQ(test, msg.text,
			   "65535 bytes are too few for a header cluster of 65536 bytes");

	SET(buf, magic, 0);
	KUNIT_EXPECT_EQ(test, qcow_header_parse(buf, 65536, false, &header,
						&msg), -EINVAL);
}

static void a_message_that_is_too_long_is_cut_off(struct kunit *test)
{
	struct qcow_message msg;

	memset(&msg, 0x5a, sizeof(msg));
	qcow_message_set(&msg, "%300d", 7);
	KUNIT_EXPECT_EQ(test, strnlen(msg.text, sizeof(msg.text)),
			sizeof(msg.text) - 1);
	qcow_message_set(&msg, "%s is %d", "seven", 7);
	KUNIT_EXPECT_STREQ(test, msg.text, "seven is 7");
	qcow_message_set(NULL, "nobody listens");
}

/* What the kernel-doc of qcow_header_parse() promises. */
static void expect_promises(struct kunit *test, const struct qcow_header *h,
			    bool writable)
{
	u64 cs = 1ULL << h->cluster_bits;

	KUNIT_EXPECT_TRUE(test, h->version == 2 || h->version == 3);
	KUNIT_EXPECT_LE(test, h->refcount_order, 6);
	KUNIT_EXPECT_LE(test, h->header_length, cs);
	KUNIT_EXPECT_EQ(test, h->crypt_method, 0);
	KUNIT_EXPECT_EQ(test, h->incompatible & ~0x1fULL, 0);
	/* A dirty or corrupt image is not to be written. */
	if (writable)
		KUNIT_EXPECT_EQ(test, h->incompatible & 0x3, 0);
	KUNIT_EXPECT_LE(test, h->backing_offset + h->backing_size, cs);
	KUNIT_EXPECT_LE(test, h->backing_size, QCOW_MAX_BACKING_NAME);
	KUNIT_EXPECT_LE(test, h->l1_size, QCOW_MAX_L1_BYTES / 8);
	KUNIT_EXPECT_LE(test, h->l1_table_offset, S64_MAX - h->l1_size * 8ULL);
	KUNIT_EXPECT_EQ(test, h->l1_table_offset & (cs - 1), 0);
	KUNIT_EXPECT_TRUE(test, h->l1_table_offset || !h->l1_size);
	KUNIT_EXPECT_NE(test, h->refcount_table_offset, 0);
	KUNIT_EXPECT_EQ(test, h->refcount_table_offset & (cs - 1), 0);
	KUNIT_EXPECT_GE(test, h->refcount_table_clusters, 1);
	KUNIT_EXPECT_LE(test, h->refcount_table_clusters * cs,
			QCOW_MAX_REFTABLE_BYTES);
	KUNIT_EXPECT_LE(test, h->nb_snapshots, QCOW_MAX_SNAPSHOTS);
	KUNIT_EXPECT_EQ(test, h->snapshots_offset & (cs - 1), 0);
	if (h->size)
		KUNIT_EXPECT_LT(test, (h->size - 1) >>
				(h->cluster_bits + h->l2_bits), h->l1_size);
	KUNIT_EXPECT_LT(test, strnlen(h->backing_format,
				      sizeof(h->backing_format)),
			sizeof(h->backing_format));
}

/* Values that fields fail at, more often than random ones do. */
static u64 awkward(struct rnd_state *rnd)
{
	u64 bit = BIT_ULL(prandom_u32_state(rnd) & 63);

	switch (prandom_u32_state(rnd) & 7) {
	case 0:
		return 0;
	case 1:
		return U64_MAX;
	case 2:
		return bit;
	case 3:
		return bit - 1;
	case 4:
		return -bit;
	case 5:
		return prandom_u32_state(rnd) & 0xff;
	case 6:
		return prandom_u32_state(rnd) & 0xffff;
	default:
		return (u64)prandom_u32_state(rnd) << 32 | prandom_u32_state(rnd);
	}
}

static void any_header_is_judged_safely(struct kunit *test)
{
	struct qcow_header header;
	struct qcow_message msg;
	struct rnd_state rnd;
	u32 round, i, taken = 0;
	u8 *valid, *buf;

	prandom_seed_state(&rnd, 20260101);
	valid = valid_header(test, 3, 9);
	buf = kunit_kzalloc(test, 512, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, buf);

	for (round = 0; round < 20000; round++) {
		u32 pokes = 1 + (prandom_u32_state(&rnd) & 3);
		bool writable = round & 1;
		int ret;

		memcpy(buf, valid, 512);
		SET(buf, version, 2 + (prandom_u32_state(&rnd) & 1));
		for (i = 0; i < pokes; i++) {
			/* The fields are 4 or 8 bytes, at multiples of 4. */
			u32 at = 8 + 4 * (prandom_u32_state(&rnd) % 32);

			poke(buf, at, at & 4 ? 4 : 8, awkward(&rnd));
		}
		/* Keep the clusters small, the buffer is. */
		SET(buf, cluster_bits, 9);

		ret = qcow_header_parse(buf, 512, writable, &header, &msg);
		if (!ret) {
			taken++;
			expect_promises(test, &header, writable);
		} else if (ret != -EINVAL && ret != -EFBIG &&
			   ret != -EOPNOTSUPP && ret != -EUCLEAN) {
			KUNIT_FAIL(test, "round %u: error %d", round, ret);
		}
	}
	/* Both ways out have been taken, many times. */
	KUNIT_EXPECT_GT(test, taken, 1000);
	KUNIT_EXPECT_LT(test, taken, 19000);
}

static struct kunit_case header_test_cases[] = {
	KUNIT_CASE_PARAM(header_is_judged, header_gen_params),
	KUNIT_CASE(every_field_is_decoded),
	KUNIT_CASE(v2_gets_the_defaults),
	KUNIT_CASE(a_short_v3_header_has_no_compression_type),
	KUNIT_CASE(no_backing_file_is_told_as_zeroes),
	KUNIT_CASE(the_last_of_two_extensions_wins),
	KUNIT_CASE(unknown_features_have_the_names_from_the_image),
	KUNIT_CASE(feature_names_at_the_very_end_are_read),
	KUNIT_CASE(every_cluster_size_is_told),
	KUNIT_CASE(a_buffer_that_is_too_short_is_refused),
	KUNIT_CASE(a_message_that_is_too_long_is_cut_off),
	KUNIT_CASE(any_header_is_judged_safely),
	{}
};

static struct kunit_suite header_test_suite = {
	.name = "qcow-header",
	.test_cases = header_test_cases,
};

kunit_test_suite(header_test_suite);
