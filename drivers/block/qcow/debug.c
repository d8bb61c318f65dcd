// SPDX-License-Identifier: GPL-2.0-only
/*
 * What tests need to bring about one interleaving, or one failure, and no other.
 *
 * In debugfs, under qcow/:
 *
 *   hold-POINT   write 1, and who comes to POINT next is held there; it reads 2
 *                from then on. Write 0, and they go on.
 *   fail-WHAT    write N, and the Nth operation of that kind from now on fails,
 *                on any file of any image. It counts down to 0, so that one
 *                can also count with it.
 *   fail-error   the errno that it fails with (5, EIO)
 *
 * The points are where the code may sleep; see debug.h for what each is.
 */
#include <linux/atomic.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/kernel.h>

#include "debug.h"

#define QCOW_POINT_ARMED	1
#define QCOW_POINT_HELD		2

static const char * const qcow_point_names[QCOW_POINTS] = {
	"hold-read", "hold-overwrite", "hold-allocate", "hold-table-read",
	"hold-table-made", "hold-refblock-made", "hold-reftable-made",
	"hold-unpack", "hold-cleared", "hold-commit-counts",
	"hold-commit-links", "hold-reclaim", "hold-punch", "hold-count-drop",
};

static const char * const qcow_fault_names[QCOW_FAULTS] = {
	"fail-read", "fail-write", "fail-sync", "fail-fallocate",
	"fail-truncate",
};

static atomic_t qcow_points[QCOW_POINTS];
static atomic_t qcow_faults[QCOW_FAULTS];
static u32 qcow_fault_error = EIO;
static struct dentry *qcow_debug_dir;

/**
 * qcow_hold - wait here for as long as a test wants it
 * @point: where this is
 *
 * Context: may sleep. The first who comes is held, others pass.
 */
void qcow_hold(enum qcow_point point)
{
	atomic_t *state = &qcow_points[point];

	if (likely(atomic_read(state) != QCOW_POINT_ARMED) ||
	    atomic_cmpxchg(state, QCOW_POINT_ARMED, QCOW_POINT_HELD) !=
	    QCOW_POINT_ARMED)
		return;
	while (atomic_read(state) == QCOW_POINT_HELD)
		msleep(20);
}

/**
 * qcow_fault - is this operation to fail?
 * @fault: its kind
 *
 * Context: any.
 *
 * Return: 0, or the errno.
 */
int qcow_fault(enum qcow_fault fault)
{
	return atomic_dec_if_positive(&qcow_faults[fault]) == 0 ?
		-(int)qcow_fault_error : 0;
}

/**
 * qcow_debug_init - the files in debugfs
 *
 * Where they cannot be made, tests are left out, and nothing else is amiss.
 */
void qcow_debug_init(void)
{
	unsigned int i;

	qcow_debug_dir = debugfs_create_dir("qcow", NULL);
	for (i = 0; i < QCOW_POINTS; i++)
		debugfs_create_atomic_t(qcow_point_names[i], 0600,
					qcow_debug_dir, &qcow_points[i]);
	for (i = 0; i < QCOW_FAULTS; i++)
		debugfs_create_atomic_t(qcow_fault_names[i], 0600,
					qcow_debug_dir, &qcow_faults[i]);
	debugfs_create_u32("fail-error", 0600, qcow_debug_dir,
			   &qcow_fault_error);
}

/**
 * qcow_debug_exit - undo qcow_debug_init()
 */
void qcow_debug_exit(void)
{
	debugfs_remove_recursive(qcow_debug_dir);
}
