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
 *    a list of the one who waits. Who sleeps would send off what is in its plug, and
 *    that does not happen here; so nothing below may depend on it. It does not where
 *    all is for the queue of the request; where it is not, or not known (unplug
 *    callbacks, requests that were taken in advance), a worker does it.
 *  - Who is in a transaction (journal_info) must not start another one. And who
 *    frees memory (PF_MEMALLOC) or looks at tables of a file system (REQ_META, or
 *    what is in the page cache of the device) may hold locks whose like, in another
 *    file system of the same type, are taken below: for lockdep and for the depth of
 *    the stack these go to a worker. An I/O scheduler has anybody do that for others.
 *  - Memory is allocated as in a worker (qcow_io_scope_enter), and a task that is in
 *    that scope is below another device of this driver, or of loop, which has the same
 *    reason not to go deeper. Half of the stack must be left.
 *  - The limit for the size of files would be applied to the submitter, with a
 *    signal; and so would the I/O limits of its cgroup, which may not be the one that
 *    the request belongs to. Kernel threads, which act for others, are not served here.
 *    What the task has read and written is not counted again.
 *  - The file may be frozen: then a worker waits for that (file_io.c).
 *
 * While it is in queue_rq(), the task is in an SRCU read section of the tag set. Only
 * who has frozen the queue waits for that, and the queue is frozen only when all
 * requests are done; lockdep does not know it.
 */
#include <linux/bio.h>
#include <linux/blk-cgroup.h>
#include <linux/blk-mq.h>
#include <linux/cgroup.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/sizes.h>

#include "device.h"
#include "qcow.h"

/* A file system, its journal and the block layer: 32-bit stacks are too small. */
#define QCOW_INLINE_STACK	max_t(unsigned long, THREAD_SIZE / 2, 6 * SZ_1K)

static bool qcow_stack_is_low(void)
{
	unsigned long end = (unsigned long)end_of_stack(current);

	return (unsigned long)__builtin_frame_address(0) - end <
	       QCOW_INLINE_STACK;
}

/* Has the task collected something that is not for the queue of @rq? */
static bool qcow_collects(const struct request *rq)
{
	struct bio_list *bios = current->bio_list;
	struct blk_plug *plug = current->plug;
	struct request *first, *cached;

	if (bios && !(bio_list_empty(&bios[0]) && bio_list_empty(&bios[1])))
		return true;
	if (!plug)
		return false;
	first = rq_list_peek(&plug->mq_list);
	cached = qcow_plug_cached(plug);
	return (first && (plug->multiple_queues || first->q != rq->q)) ||
	       (cached && cached->q != rq->q) || !list_empty(&plug->cb_list);
}

/*
 * May whoever submits a read hold locks of a file system? Those are held for tables:
 * REQ_META says so, but not every time. What is read ahead is not waited for.
 */
static bool qcow_is_for_tables(const struct request *rq)
{
	struct address_space *mapping;
	bool found;

	if (rq->cmd_flags & REQ_META)
		return true;
	if (req_op(rq) != REQ_OP_READ || rq->cmd_flags & REQ_RAHEAD)
		return false;
	rcu_read_lock();
	mapping = folio_mapping(page_folio(bio_page(rq->bio)));
	/* That of pages to be swapped belongs to no inode. */
	found = mapping && mapping->host && S_ISBLK(mapping->host->i_mode);
	rcu_read_unlock();
	return found;
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
	if (rq->q->elevator || current->journal_info ||
	    current->flags & (PF_KTHREAD | PF_MEMALLOC | PF_LOCAL_THROTTLE) ||
	    (req_op(rq) == REQ_OP_WRITE &&
	     rlimit(RLIMIT_FSIZE) != RLIM_INFINITY) ||
	    qcow_collects(rq) || qcow_is_for_tables(rq) ||
	    qcow_stack_is_low() || !qcow_is_charged(rq))
		return false;
	saved->bio_list = current->bio_list;
	saved->plug = current->plug;
	qcow_plug_forget_time();
	current->bio_list = NULL;
	current->plug = NULL;
#ifdef CONFIG_TASK_IO_ACCOUNTING
	saved->read_bytes = current->ioac.read_bytes;
	saved->write_bytes = current->ioac.write_bytes;
#endif
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
#ifdef CONFIG_TASK_IO_ACCOUNTING
	current->ioac.read_bytes = saved->read_bytes;
	current->ioac.write_bytes = saved->write_bytes;
#endif
	current->plug = saved->plug;
	current->bio_list = saved->bio_list;
}
