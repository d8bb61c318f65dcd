/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fields of the header by name, for tests that read and write them in a buffer
 * with code of their own.
 */
#ifndef QCOW_HEADER_FIELDS_H
#define QCOW_HEADER_FIELDS_H

#include <linux/stddef.h>

#include "../../drivers/block/qcow/format.h"

#define AT(field)	((u32)offsetof(struct qcow_disk_header, field))

/* How many bytes the field at a certain place has: 1, 4 or 8. */
static inline u32 header_field_bytes(u32 at)
{
	switch (at) {
	case AT(backing_file_offset):
	case AT(size):
	case AT(l1_table_offset):
	case AT(refcount_table_offset):
	case AT(snapshots_offset):
	case AT(incompatible_features):
	case AT(compatible_features):
	case AT(autoclear_features):
		return 8;
	case AT(compression_type):
		return 1;
	default:
		return 4;
	}
}

#endif /* QCOW_HEADER_FIELDS_H */
