// SPDX-License-Identifier: GPL-2.0-only
/*
 * Freeze and thaw: for a while the image's file stays as it is, and somebody else
 * may look at it.
 *
 * A freeze shuts the gate of the device (request.c), waits for the requests that
 * were let in, and has everything written (qcow_image_settle). From then on:
 *
 *   - Reads go on, and change nothing.
 *   - Requests that may change something wait behind the gate.
 *   - A commit, be it of a flush or a timed one, finds nothing to write: all that is
 *     dirty comes from requests of the kind that waits.
 *   - The one thing that may still be written is the header's corrupt bit, where a
 *     read meets damage: one sector, and a change that is atomic.
 *
 * It belongs to an open file of the control node, and ends with that; so whoever is
 * killed leaves no device frozen.
 *
 * Who thaws. THAW, the close of the file and the timeout may come at the same time.
 * The one who takes the device off the list of freezes opens the gate; for the
 * others it is not there.
 *
 * Deadlocks. While writes wait, dirty pages cannot be cleaned, and who needs memory,
 * or the file system above, may wait for that: perhaps the very process that was to
 * thaw the device, or the program that looks at the file. So there is a timeout, it
 * has its own worker with a rescuer, and to thaw takes no memory, no lock that is
 * held across I/O, and not disk->open_mutex, under which the last close waits for
 * writeback. No queue is frozen, and nothing is held from freeze to thaw but the
 * device (qcow_device_hold), which keeps it from being detached. What is written in
 * between, by qcow_image_settle(), is what a flush would write, and like that needs
 * no request of this device. If the file lies on another device that is frozen, it
 * waits until that one thaws.
 *
 * The timeout is also what keeps those who wait from being reported as hung.
 *
 * Locks: qcow_freezes_mutex is taken under no other, and none is taken under it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/workqueue.h>

#include "device.h"

static DEFINE_MUTEX(qcow_freezes_mutex);
static LIST_HEAD(qcow_freezes);
static struct workqueue_struct *qcow_thaw_wq;

/* The caller has taken the device off the list, or it was not there yet. */
static void qcow_freeze_end(struct qcow_device *dev)
{
	if (!dev->read_only)
		qcow_gate_open(dev);
	qcow_device_release(dev);
}

static void qcow_thaw_work_fn(struct work_struct *work)
{
	struct qcow_device *dev = container_of(to_delayed_work(work),
					       struct qcow_device, thaw_work);
	bool frozen;

	mutex_lock(&qcow_freezes_mutex);
	frozen = !list_empty(&dev->freeze_node);
	list_del_init(&dev->freeze_node);
	mutex_unlock(&qcow_freezes_mutex);
	/* Otherwise somebody else has it, and is waiting for us to return. */
	if (!frozen)
		return;
	pr_warn("qcow%d: was frozen for too long, and has been thawed\n",
		dev->index);
	qcow_freeze_end(dev);
}

/* Thaw a device of an open file, which is the one of that number if @index >= 0. */
static bool qcow_thaw_one(const struct file *owner, int index)
{
	struct qcow_device *dev;
	bool found = false;

	mutex_lock(&qcow_freezes_mutex);
	list_for_each_entry(dev, &qcow_freezes, freeze_node) {
		if (dev->freezer != owner || (index >= 0 && dev->index != index))
			continue;
		list_del_init(&dev->freeze_node);
		found = true;
		break;
	}
	mutex_unlock(&qcow_freezes_mutex);
	if (!found)
		return false;
	cancel_delayed_work_sync(&dev->thaw_work);
	qcow_freeze_end(dev);
	return true;
}

/**
 * qcow_freeze_setup - what freezing needs of a new device
 * @dev: the device
 */
void qcow_freeze_setup(struct qcow_device *dev)
{
	INIT_LIST_HEAD(&dev->freeze_node);
	INIT_DELAYED_WORK(&dev->thaw_work, qcow_thaw_work_fn);
}

/**
 * qcow_freeze - have the file of a device stay as it is
 * @index: the device's number
 * @owner: the open file of the control node that the freeze belongs to
 * @timeout: seconds, after which it ends; but nobody waits for a device that is
 *	read-only, so there it does not
 *
 * Context: may sleep.
 *
 * Return: 0; -ENODEV if there is no such device; -EBUSY if it is frozen already, or
 * still being attached; -EINTR if the caller was killed; or the errno of what could
 * not be written, -EIO for an image that takes no more writes after a barrier failed.
 */
int qcow_freeze(int index, const struct file *owner, unsigned int timeout)
{
	struct qcow_device *dev = qcow_device_hold(index);
	int err;

	if (IS_ERR(dev))
		return PTR_ERR(dev);
	err = dev->read_only ? 0 : qcow_gate_shut(dev) ?:
				   qcow_image_settle(dev->chain->layers[0]);
	if (err) {
		qcow_freeze_end(dev);
		return err;
	}
	mutex_lock(&qcow_freezes_mutex);
	dev->freezer = owner;
	list_add(&dev->freeze_node, &qcow_freezes);
	if (!dev->read_only)
		queue_delayed_work(qcow_thaw_wq, &dev->thaw_work,
				   timeout * HZ);
	mutex_unlock(&qcow_freezes_mutex);
	return 0;
}

/**
 * qcow_thaw - end a freeze
 * @index: the device's number
 * @owner: whom the freeze belongs to
 *
 * Context: may sleep.
 *
 * Return: 0 if the device was frozen until now; -ENOENT if @owner has not frozen it,
 * or not any more.
 */
int qcow_thaw(int index, const struct file *owner)
{
	return index >= 0 && qcow_thaw_one(owner, index) ? 0 : -ENOENT;
}

/**
 * qcow_thaw_all - end all freezes of an open file
 * @owner: the file, which is being closed
 *
 * Context: may sleep.
 */
void qcow_thaw_all(const struct file *owner)
{
	while (qcow_thaw_one(owner, -1))
		;
}

/**
 * qcow_freezes_init - prepare for freezes
 *
 * Return: 0, or -ENOMEM.
 */
int qcow_freezes_init(void)
{
	/* Freezable: the file must not change while a hibernation image is written. */
	qcow_thaw_wq = alloc_workqueue("qcow-thaw", WQ_UNBOUND | WQ_MEM_RECLAIM |
				       WQ_FREEZABLE, 0);
	return qcow_thaw_wq ? 0 : -ENOMEM;
}

/**
 * qcow_freezes_exit - undo qcow_freezes_init()
 *
 * The control node is gone, and so are all freezes; but the work that ended one may
 * not have returned yet.
 */
void qcow_freezes_exit(void)
{
	destroy_workqueue(qcow_thaw_wq);
}
