// SPDX-License-Identifier: GPL-2.0-only
/*
 * The module, and the control node: ioctls on /dev/qcow-control.
 *
 * Nothing here keeps state. Each call is copied in, checked, and handed on. What
 * belongs to an open file, which are freezes, is found by it when it is closed.
 */
#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include <linux/qcow.h>

#include "device.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* What every struct has had from the beginning: its size, and one more. */
#define QCOW_ARGS_MIN		(2 * sizeof(u32))

#define QCOW_MAX_LAYERS		65535
#define QCOW_LAYER_MIN		16	/* the first version of struct qcow_layer */
#define QCOW_MAX_PATH		SZ_64K
#define QCOW_MAX_SNAPSHOT_NAME	U16_MAX

/*
 * Fill in a struct from the caller's, whose size its first member tells. That is
 * read a second time as a part of the whole; nobody looks at it then.
 */
static int qcow_copy_in(void *args, size_t size, const void __user *from,
			u32 *user_size)
{
	if (get_user(*user_size, (const u32 __user *)from))
		return -EFAULT;
	if (*user_size < QCOW_ARGS_MIN)
		return -EINVAL;
	if (*user_size > PAGE_SIZE)
		return -E2BIG;
	return copy_struct_from_user(args, size, from, *user_size);
}

/* Give the caller as much of the reply as they have room for. */
static int qcow_copy_out(void __user *to, u32 user_size, const void *args,
			 size_t size)
{
	return copy_to_user(to, args, min_t(size_t, user_size, size)) ?
		-EFAULT : 0;
}

static int qcow_message_copy_out(const struct qcow_attach *args,
				 struct qcow_message *msg)
{
	size_t len = strnlen(msg->text, sizeof(msg->text) - 1);

	if (!args->message_size)
		return 0;
	len = min_t(size_t, len, args->message_size - 1);
	msg->text[len] = '\0';
	return copy_to_user(u64_to_user_ptr(args->message), msg->text,
			    len + 1) ? -EFAULT : 0;
}

static int qcow_attach_check(const struct qcow_attach *args)
{
	bool snapshot = args->snapshot;

	if (snapshot != !!args->snapshot_size ||
	    args->snapshot_size > QCOW_MAX_SNAPSHOT_NAME ||
	    (snapshot && !(args->flags & QCOW_ATTACH_READ_ONLY)))
		return -EINVAL;
	if (args->compress > QCOW_COMPRESS_ZSTD ||
	    (args->compress && args->flags & QCOW_ATTACH_READ_ONLY))
		return -EINVAL;
	if (args->flags & ~QCOW_ATTACH_FLAGS_ALL || args->index < -1 ||
	    args->discard > QCOW_DISCARD_KEEP ||
	    args->io_mode > QCOW_IO_BUFFERED)
		return -EINVAL;
	if (!args->layer_count || args->layer_count > QCOW_MAX_LAYERS ||
	    args->layer_size < QCOW_LAYER_MIN)
		return -EINVAL;
	if (args->layer_size > PAGE_SIZE)
		return -E2BIG;
	return 0;
}

static int qcow_copy_layers(const struct qcow_attach *args,
			    struct qcow_layer *layers)
{
	const char __user *from = u64_to_user_ptr(args->layers);
	u32 i;
	int err;

	for (i = 0; i < args->layer_count; i++) {
		struct qcow_layer *layer = &layers[i];

		err = copy_struct_from_user(layer, sizeof(*layer),
					    from + (size_t)i * args->layer_size,
					    args->layer_size);
		if (err)
			return err;
		if (layer->flags & ~QCOW_LAYER_FLAGS_ALL ||
		    (layer->data_fd && !(layer->flags & QCOW_LAYER_DATA_FILE)) ||
		    (!(layer->flags & QCOW_LAYER_KEY) &&
		     (layer->key || layer->cipher || layer->key_size ||
		      layer->cipher_size)) ||
		    (layer->flags & QCOW_LAYER_KEY &&
		     layer->format == QCOW_FORMAT_RAW) ||
		    (layer->format != QCOW_FORMAT_RAW &&
		     layer->format != QCOW_FORMAT_QCOW2))
			return -EINVAL;
	}
	return 0;
}

static void qcow_free_keys(struct qcow_key *keys, u32 count)
{
	u32 i;

	for (i = 0; keys && i < count; i++) {
		kfree(keys[i].cipher);
		kfree_sensitive(keys[i].data);
	}
	kvfree(keys);
}

/* Fill in the keys of those layers that have one. */
static int qcow_copy_keys(const struct qcow_layer *layers,
			  struct qcow_key *keys, u32 count)
{
	u32 i;

	for (i = 0; i < count; i++) {
		const struct qcow_layer *layer = &layers[i];
		void *data;
		char *cipher;

		if (!(layer->flags & QCOW_LAYER_KEY))
			continue;
		if (!layer->key_size || layer->key_size > QCOW_KEY_MAX ||
		    !layer->cipher_size || layer->cipher_size > QCOW_CIPHER_MAX)
			return -EINVAL;
		cipher = memdup_user_nul(u64_to_user_ptr(layer->cipher),
					 layer->cipher_size);
		if (IS_ERR(cipher))
			return PTR_ERR(cipher);
		keys[i].cipher = cipher;
		if (strlen(cipher) != layer->cipher_size)
			return -EINVAL;
		data = memdup_user(u64_to_user_ptr(layer->key),
				   layer->key_size);
		if (IS_ERR(data))
			return PTR_ERR(data);
		keys[i].data = data;
		keys[i].size = layer->key_size;
	}
	return 0;
}

static int qcow_ctl_attach(void __user *arg)
{
	struct qcow_key *keys = NULL;
	struct qcow_message msg = {};
	struct qcow_layer *layers;
	char *snapshot = NULL;
	struct qcow_attach args;
	__s32 __user *told = NULL;
	u32 user_size;
	int err, index;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	/* A caller that cannot be told the number has no use for a device. */
	if (user_size >= offsetofend(struct qcow_attach, index))
		told = &((struct qcow_attach __user *)arg)->index;
	if (told && put_user(args.index, told))
		return -EFAULT;
	/* Whether there is room for a message is known before there is one. */
	err = qcow_message_copy_out(&args, &msg);
	if (err)
		return err;
	err = qcow_attach_check(&args);
	if (err)
		return err;

	if (args.snapshot) {
		snapshot = memdup_user_nul(u64_to_user_ptr(args.snapshot),
					   args.snapshot_size);
		if (IS_ERR(snapshot))
			return PTR_ERR(snapshot);
		if (strlen(snapshot) != args.snapshot_size) {
			kfree(snapshot);
			return -EINVAL;
		}
	}
	layers = kvcalloc(args.layer_count, sizeof(*layers), GFP_KERNEL);
	err = layers ? qcow_copy_layers(&args, layers) : -ENOMEM;
	if (!err) {
		keys = kvcalloc(args.layer_count, sizeof(*keys), GFP_KERNEL);
		err = keys ? qcow_copy_keys(layers, keys, args.layer_count) :
			     -ENOMEM;
	}
	if (!err) {
		err = qcow_device_attach(&args, layers, keys, snapshot, &msg,
					 &index);
		if (err)
			qcow_message_copy_out(&args, &msg);
	}
	qcow_free_keys(keys, args.layer_count);
	kvfree(layers);
	kfree(snapshot);
	if (err)
		return err;

	return told ? put_user(index, told) : 0;
}

static int qcow_ctl_detach(void __user *arg)
{
	struct qcow_detach args;
	u32 user_size;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.flags & ~QCOW_DETACH_FLAGS_ALL || args.reserved)
		return -EINVAL;
	if (args.index < 0)
		return -ENODEV;
	return qcow_device_detach(args.index,
				  args.flags & QCOW_DETACH_DEFERRED);
}

static int qcow_ctl_status(void __user *arg)
{
	struct qcow_status args;
	u32 user_size, snapshot_size;
	char *buf = NULL;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.reserved2)
		return -EINVAL;
	if (args.index < 0)
		return -ENODEV;
	snapshot_size = args.snapshot_size;
	if (snapshot_size) {
		args.snapshot_size = min_t(u32, snapshot_size,
					   QCOW_MAX_SNAPSHOT_NAME + 1);
		buf = kvmalloc(args.snapshot_size, GFP_KERNEL);
		if (!buf)
			return -ENOMEM;
	}
	err = qcow_device_status(&args, buf);
	if (!err && buf && copy_to_user(u64_to_user_ptr(args.snapshot), buf,
					strlen(buf) + 1))
		err = -EFAULT;
	kvfree(buf);
	if (err)
		return err;
	args.size = user_size;
	args.snapshot_size = snapshot_size;
	return qcow_copy_out(arg, user_size, &args, sizeof(args));
}

static int qcow_ctl_layer(void __user *arg)
{
	struct qcow_layer_status args;
	const char *path;
	char *buf = NULL;
	u32 user_size, path_size;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.reserved)
		return -EINVAL;
	if (args.index < 0)
		return -ENODEV;
	path_size = args.path_size;
	if (path_size) {
		args.path_size = min_t(u32, path_size, QCOW_MAX_PATH);
		buf = kvmalloc(args.path_size, GFP_KERNEL);
		if (!buf)
			return -ENOMEM;
	}
	err = qcow_device_layer(&args, buf, &path);
	if (!err && buf && copy_to_user(u64_to_user_ptr(args.path), path,
					strlen(path) + 1))
		err = -EFAULT;
	kvfree(buf);
	if (err)
		return err;
	args.size = user_size;
	args.path_size = path_size;
	return qcow_copy_out(arg, user_size, &args, sizeof(args));
}

static int qcow_ctl_list(void __user *arg)
{
	s32 __user *indices;
	struct qcow_list args;
	u32 user_size, room;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.reserved || args.cursor < 0)
		return -EINVAL;

	indices = u64_to_user_ptr(args.indices);
	room = args.count;
	args.count = 0;
	args.cursor = qcow_device_next(args.cursor);
	while (args.cursor >= 0 && args.count < room) {
		if (put_user(args.cursor, indices + args.count))
			return -EFAULT;
		args.count++;
		args.cursor = args.cursor == INT_MAX ? -1 :
			qcow_device_next(args.cursor + 1);
		cond_resched();
	}
	args.size = user_size;
	return qcow_copy_out(arg, user_size, &args, sizeof(args));
}

static int qcow_ctl_freeze(void __user *arg, const struct file *file)
{
	struct qcow_freeze args;
	u32 user_size;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.flags || args.timeout > QCOW_FREEZE_TIMEOUT_MAX)
		return -EINVAL;
	if (args.index < 0)
		return -ENODEV;
	return qcow_freeze(args.index, file,
			   args.timeout ?: QCOW_FREEZE_TIMEOUT);
}

static int qcow_ctl_thaw(void __user *arg, const struct file *file)
{
	struct qcow_thaw args;
	u32 user_size;
	int err;

	err = qcow_copy_in(&args, sizeof(args), arg, &user_size);
	if (err)
		return err;
	if (args.flags || args.reserved)
		return -EINVAL;
	return qcow_thaw(args.index, file);
}

static int qcow_control_release(struct inode *inode, struct file *file)
{
	qcow_thaw_all(file);
	return 0;
}

static long qcow_control_ioctl(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	void __user *user = (void __user *)arg;
	bool writable = file->f_mode & FMODE_WRITE;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	switch (cmd) {
	case QCOW_CTL_ATTACH:
		return writable ? qcow_ctl_attach(user) : -EBADF;
	case QCOW_CTL_DETACH:
		return writable ? qcow_ctl_detach(user) : -EBADF;
	case QCOW_CTL_STATUS:
		return qcow_ctl_status(user);
	case QCOW_CTL_LAYER:
		return qcow_ctl_layer(user);
	case QCOW_CTL_LIST:
		return qcow_ctl_list(user);
	case QCOW_CTL_FREEZE:
		return writable ? qcow_ctl_freeze(user, file) : -EBADF;
	case QCOW_CTL_THAW:
		return writable ? qcow_ctl_thaw(user, file) : -EBADF;
	default:
		return -ENOTTY;
	}
}

static const struct file_operations qcow_control_ops = {
	.owner = THIS_MODULE,
	.open = nonseekable_open,
	.release = qcow_control_release,
	.unlocked_ioctl = qcow_control_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice qcow_control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = QCOW_CONTROL_NAME,
	.mode = 0600,
	.fops = &qcow_control_ops,
};

static int __init qcow_init(void)
{
	int err;

	err = qcow_devices_init();
	if (err)
		return err;
	err = misc_register(&qcow_control);
	if (err) {
		qcow_devices_exit();
		return err;
	}
	qcow_debug_init();
	return 0;
}

static void __exit qcow_exit(void)
{
	qcow_debug_exit();
	misc_deregister(&qcow_control);
	qcow_devices_exit();
}

module_init(qcow_init);
module_exit(qcow_exit);

MODULE_DESCRIPTION("QCOW2 disk images as block devices");
MODULE_AUTHOR("the qcow authors");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
