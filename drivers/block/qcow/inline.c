// SPDX-License-Identifier: GPL-2.0-only
/*
 * I/O on the files in the context of whoever submits a request.
 *
 * A worker for each request costs more than all else that this driver does. So where
 * nothing has to be waited for (the tables are in memory, the mapping does not
 * change), queue_rq() itself starts the I/O on the file, with IOCB_NOWAIT. That is a
 * hint, not a guarantee: ext4 for example may begin a transaction for the time of the
 * last change, or read a block of its own. So the queue is BLK_MQ_F_BLOCKING, and the
 * call must be able to wait below whatever the submitter is in the middle of:
 *
 *  - What it has collected (bio_list, plug) is set aside, so that what is submitted
 *    below goes out at once. Otherwise a wait below would be for a bio that sits in
 *    a list of the one who waits. Nothing below depends on what is set aside, as
 *    that is for the same queue; where it is not, or not known, a worker does it.
 *  - Who is in a transaction (journal_info) must not start another one. And who
 *    frees memory (PF_MEMALLOC) or writes out tables (REQ_META) may hold locks whose
 *    like, in another file system of the same type, are taken below: for lockdep
 *    and for the depth of the stack these go to a worker.
 *  - Memory is allocated as in a worker (qcow_io_scope_enter), and a task that is in
 *    that scope is below another device of this driver, or of loop, which has the same
 *    reason not to go deeper. Half of the stack must be left.
 *  - The limit for the size of files would be applied to the submitter, with a
 *    signal; and so would the I/O limits of its cgroup, which may not be the one that
 *    the request belongs to. Kernel threads, which act for others, are not served here.
 *  - The file may be frozen: then a worker waits for that (file_io.c).
 */
#include <linux/bio.h>
#include <linux/blk-cgroup.h>
#include <linux/blk-mq.h>
#include <linux/cgroup.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>

#include "device.h"
#include "qcow.h"

static bool qcow_stack_is_low(void)
{
	unsigned long end = (unsigned long)end_of_stack(current);

	return (unsigned long)__builtin_frame_address(0) - end < THREAD_SIZE / 2;
}

/* Has the task collected something that is not for the queue of @rq? */
static bool qcow_collects(const struct request *rq)
{
	struct bio_list *bios = current->bio_list;
	struct blk_plug *plug = current->plug;
	struct request *first;

	if (bios && !(bio_list_empty(&bios[0]) && bio_list_empty(&bios[1])))
		return true;
	first = plug ? rq_list_peek(&plug->mq_list) : NULL;
	return first && (plug->multiple_queues || first->q != rq->q);
}

/* Is what the request costs to be charged to the current task? */
static bool qcow_is_charged(struct request *rq)
{
#ifdef CONFIG_BLK_CGROUP
	struct cgroup_subsys_state *css = bio_blkcg_css(rq->bio);
	bool own;

	rcu_read_lock();
	own = !css || css == task_css(current, io_cgrp_id);
	rcu_read_unlock();
	return own;
#else
	return true;
#endif
}

/**
 * qcow_inline_enter - prepare the current task for I/O below it
 * @rq: the request that it is for, with a bio
 * @saved: what it takes to undo this
 *
 * Context: queue_rq().
 *
 * Return: false if it must not be done here.
 */
bool qcow_inline_enter(struct request *rq, struct qcow_inline *saved)
{
	if (rq->cmd_flags & REQ_META || current->journal_info ||
	    current->flags & (PF_KTHREAD | PF_MEMALLOC | PF_LOCAL_THROTTLE) ||
	    (req_op(rq) == REQ_OP_WRITE &&
	     rlimit(RLIMIT_FSIZE) != RLIM_INFINITY) ||
	    qcow_collects(rq) || qcow_stack_is_low() || !qcow_is_charged(rq))
		return false;
	saved->bio_list = current->bio_list;
	saved->plug = current->plug;
	current->bio_list = NULL;
	current->plug = NULL;
	saved->scope = qcow_io_scope_enter();
	return true;
}

/**
 * qcow_inline_exit - undo qcow_inline_enter()
 * @saved: what it has saved
 */
void qcow_inline_exit(const struct qcow_inline *saved)
{
	qcow_io_scope_exit(saved->scope);
	current->plug = saved->plug;
	current->bio_list = saved->bio_list;
}
