/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Places where a test can hold what comes along, and operations that it can make
 * fail: debug.c, with CONFIG_QCOW_DEBUG, which is for tests only. Without it there
 * is nothing of this in the module.
 */
#ifndef _QCOW_DEBUG_H
#define _QCOW_DEBUG_H

/* The names in debug.c are in the same order. */
enum qcow_point {
	QCOW_POINT_READ,	/* found the clusters, in its epoch */
	QCOW_POINT_OVERWRITE,	/* likewise */
	QCOW_POINT_ALLOCATE,	/* has clusters and copies, holds its range */
	QCOW_POINT_TABLE_READ,	/* has read a block of a table */
	QCOW_POINT_TABLE_MADE,	/* wrote an L2 table that nothing leads to yet */
	QCOW_POINT_REFBLOCK_MADE,	/* wrote a refcount block, likewise */
	QCOW_POINT_REFTABLE_MADE,	/* before the header leads to it */
	QCOW_POINT_UNPACK,	/* has read compressed data */
	QCOW_POINT_CLEARED,	/* a discard has changed the entries */
	QCOW_POINT_COMMIT_COUNTS,	/* before the first barrier of a commit */
	QCOW_POINT_COMMIT_LINKS,	/* after it */
	QCOW_POINT_RECLAIM,	/* before the wait for epochs */
	QCOW_POINT_PUNCH,	/* before a free cluster is punched */
	QCOW_POINT_COUNT_DROP,	/* after that, before its count is lowered */
	QCOW_POINTS
};

enum qcow_fault {
	QCOW_FAULT_READ,
	QCOW_FAULT_WRITE,
	QCOW_FAULT_SYNC,
	QCOW_FAULT_FALLOCATE,
	QCOW_FAULT_TRUNCATE,
	QCOW_FAULTS
};

#ifdef CONFIG_QCOW_DEBUG
void qcow_debug_init(void);
void qcow_debug_exit(void);
void qcow_hold(enum qcow_point point);
int qcow_fault(enum qcow_fault fault);
#else
static inline void qcow_debug_init(void)
{
}

static inline void qcow_debug_exit(void)
{
}

static inline void qcow_hold(enum qcow_point point)
{
}

static inline int qcow_fault(enum qcow_fault fault)
{
	return 0;
}
#endif

#endif /* _QCOW_DEBUG_H */
