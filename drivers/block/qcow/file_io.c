// SPDX-License-Identifier: GPL-2.0-only
/*
 * I/O on the files that hold images.
 *
 * Per file, everything is direct or everything goes through the page cache: a
 * page that held data written both ways could be written back stale. A file is
 * direct if it says that it can do direct I/O at the 512 bytes that the guest
 * uses, and where it cannot tell for sure, if a read shows it; everything else (disks
 * with larger sectors, tmpfs before 6.6) is buffered.
 *
 * Reads past the end of a file give zeroes, as the format wants (an image's
 * length need not be a multiple of anything).
 *
 * Durability: a write is durable only after qcow_file_sync() returned 0, or if
 * it carried IOCB_DSYNC and the file is said to have that (struct qcow_file).
 */
#include <linux/blkdev.h>
#include <linux/bvec.h>
#include <linux/falloc.h>
#include <linux/file.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include <linux/qcow.h>

#include "qcow.h"

/* A file system that lies on others cannot tell, but it refuses to do it. */
static bool qcow_file_try_direct(struct qcow_file *f)
{
	void *sector = kmalloc(QCOW_SECTOR, GFP_KERNEL);
	int err = -EINVAL;

	if (sector) {
		f->direct = true;
		err = qcow_file_read(f, sector, QCOW_SECTOR, 0);
	}
	kfree(sector);
	return err != -EINVAL && err != -EOPNOTSUPP;
}

/* Direct I/O at 512-byte offsets, lengths and addresses works. */
static bool qcow_file_can_direct(struct qcow_file *f)
{
	struct file *file = f->file;
	struct kstat stat = {};

	if (!(file->f_mode & FMODE_CAN_ODIRECT))
		return false;
	if (S_ISBLK(file_inode(file)->i_mode))
		return bdev_logical_block_size(I_BDEV(file->f_mapping->host)) <=
		       QCOW_SECTOR;
	if (!vfs_getattr(&file->f_path, &stat, STATX_DIOALIGN,
			 AT_STATX_SYNC_AS_STAT) &&
	    stat.result_mask & STATX_DIOALIGN)
		return stat.dio_offset_align &&
		       stat.dio_offset_align <= QCOW_SECTOR &&
		       stat.dio_mem_align <= QCOW_SECTOR;
	if (file_inode(file)->i_sb->s_bdev)
		return bdev_logical_block_size(file_inode(file)->i_sb->s_bdev) <=
		       QCOW_SECTOR;
	return qcow_file_try_direct(f);
}

/*
 * Not every file system looks at IOCB_DSYNC where a direct write completes later:
 * FUSE and 9p do not. These are known to.
 */
static bool qcow_file_has_dsync(const struct file *file)
{
	if (S_ISBLK(file->f_mapping->host->i_mode))
		return true;
	switch (file_inode(file)->i_sb->s_magic) {
	case BTRFS_SUPER_MAGIC:
	case EXT4_SUPER_MAGIC:
	case XFS_SUPER_MAGIC:
		return true;
	default:
		return false;
	}
}

/**
 * qcow_file_init - prepare a file that userspace opened
 * @f: to be filled in
 * @file: the file; one that is written is used itself, and a reference to it
 *	taken; of one that is only read, another open file is made
 * @writable: whether it is going to be written
 * @io_mode: QCOW_IO_*
 * @msg: where to say what is wrong
 *
 * A file that is only read must not change: writers are locked out as they are
 * from a program that runs.
 *
 * Return: 0; -EINVAL for something that is neither file nor block device, or
 * that cannot do the I/O asked for; -EBADF if the file is not open for what is
 * needed; -EROFS for a block device that takes no writes; -ETXTBSY if somebody has
 * a file open for writing that must not change.
 */
int qcow_file_init(struct qcow_file *f, struct file *file, bool writable,
		   u32 io_mode, struct qcow_message *msg)
{
	struct inode *inode = file->f_mapping->host;
	int err;

	if (!S_ISREG(inode->i_mode) && !S_ISBLK(inode->i_mode)) {
		qcow_message_set(msg, "%pD is neither a regular file nor a block device",
				 file);
		return -EINVAL;
	}
	if (!(file->f_mode & FMODE_READ) ||
	    (writable && !(file->f_mode & FMODE_WRITE))) {
		qcow_message_set(msg, "%pD is not open for %s", file,
				 writable ? "reading and writing" : "reading");
		return -EBADF;
	}
	if (!file->f_op->read_iter || (writable && !file->f_op->write_iter)) {
		qcow_message_set(msg, "the file system of %pD lacks the I/O that the driver needs",
				 file);
		return -EINVAL;
	}
	if (writable && file->f_flags & O_APPEND) {
		qcow_message_set(msg, "%pD is open for appending only", file);
		return -EINVAL;
	}
	if (S_ISBLK(inode->i_mode) && bdev_is_zoned(I_BDEV(inode))) {
		qcow_message_set(msg, "%pD is a zoned block device", file);
		return -EINVAL;
	}
	if (writable && S_ISBLK(inode->i_mode) &&
	    bdev_read_only(I_BDEV(inode))) {
		qcow_message_set(msg, "%pD is a read-only block device; attach it read-only",
				 file);
		return -EROFS;
	}

	/*
	 * A file that is only read may serve several devices, so it must not be
	 * the one that the first of them came with: that one's locks end with
	 * that device.
	 */
	file = writable ? get_file(file) :
			  dentry_open(&file->f_path, O_RDONLY | O_LARGEFILE,
				      file->f_cred);
	if (IS_ERR(file)) {
		qcow_message_set(msg, "cannot open it for reading once more");
		return PTR_ERR(file);
	}
	mutex_init(&f->sync_mutex);
	f->bdev = S_ISBLK(inode->i_mode);
	f->writable = writable;
	f->file = file;
	f->direct = io_mode != QCOW_IO_BUFFERED && qcow_file_can_direct(f);
	f->dsync = f->direct && qcow_file_has_dsync(file);
	f->nowait = f->direct && file->f_mode & FMODE_NOWAIT;
	if (io_mode == QCOW_IO_DIRECT && !f->direct) {
		qcow_message_set(msg, "%pD does not allow direct I/O of 512 bytes; use --io=auto",
				 file);
		err = -EINVAL;
		goto err_file;
	}
	if (!writable && !f->bdev) {
		err = deny_write_access(file);
		if (err) {
			qcow_message_set(msg, "%pD is open for writing elsewhere",
					 file);
			goto err_file;
		}
	}
	return 0;

err_file:
	f->file = NULL;
	fput(file);
	return err;
}

/**
 * qcow_fput - drop a reference to a file
 * @file: the file
 *
 * Kernel threads have no return to user mode at which fput() would close the
 * file, and it would be closed some time later.
 *
 * Context: may sleep; without locks that closing the file may need.
 */
void qcow_fput(struct file *file)
{
	if (current->flags & PF_KTHREAD)
		__fput_sync(file);
	else
		fput(file);
}

/**
 * qcow_file_release - undo qcow_file_init()
 * @f: the file; may be unused so far
 */
void qcow_file_release(struct qcow_file *f)
{
	if (!f->file)
		return;
	if (!f->writable && !f->bdev)
		allow_write_access(f->file);
	qcow_fput(f->file);
	f->file = NULL;
}

/**
 * qcow_file_uncache - a file is going to be written
 * @f: the file; may be unused
 * @msg: where to say what is wrong
 *
 * What the page cache has of a file that is written directly is of no use, and costs:
 * each write looks for it there. What others have written is written back first.
 *
 * Context: may sleep for long.
 *
 * Return: 0, or the errno of writing it back.
 */
int qcow_file_uncache(struct qcow_file *f, struct qcow_message *msg)
{
	int err;

	if (!f->file || !f->direct)
		return 0;
	err = filemap_write_and_wait(f->file->f_mapping);
	if (err)
		qcow_message_set(msg, "what others have written to %pD could not be written back: error %d",
				 f->file, -err);
	else
		invalidate_inode_pages2(f->file->f_mapping);
	return err;
}

/**
 * qcow_file_size - length of a file, or of the block device
 * @f: the file
 *
 * Return: bytes.
 */
u64 qcow_file_size(const struct qcow_file *f)
{
	return i_size_read(f->file->f_mapping->host);
}

/**
 * qcow_file_step - what the length of a file that grows is a multiple of
 * @f: a regular file
 *
 * Return: bytes: whole blocks of the file system, and pages. (A network file system
 * calls a block what it transfers at once.)
 */
u32 qcow_file_step(const struct qcow_file *f)
{
	struct inode *inode = f->file->f_mapping->host;

	return inode->i_sb->s_bdev ? max_t(u32, PAGE_SIZE, i_blocksize(inode)) :
				     PAGE_SIZE;
}

/**
 * qcow_file_gone - has the disk been taken away that the file is
 * @f: the file
 *
 * Such a disk has no length any more. So a read finds that it is behind the end, and
 * a write that there is no space, and neither is so.
 *
 * Return: true if so.
 */
bool qcow_file_gone(const struct qcow_file *f)
{
	return f->bdev && !qcow_file_size(f);
}

/**
 * qcow_file_units - in which units a file is best written
 * @f: the file
 * @physical: the least that needs no reading of what is around it, bytes
 * @optimal: what its disk prefers, bytes
 *
 * Either is 0 where nobody says; a network file system calls a block what it transfers
 * at once.
 */
void qcow_file_units(const struct qcow_file *f, u32 *physical, u32 *optimal)
{
	struct inode *inode = f->file->f_mapping->host;
	struct block_device *bdev = f->bdev ? I_BDEV(inode) :
					      inode->i_sb->s_bdev;

	*physical = 0;
	*optimal = 0;
	if (!bdev)
		return;
	*physical = bdev_physical_block_size(bdev);
	if (!f->bdev)
		*physical = max_t(u32, *physical, i_blocksize(inode));
	*optimal = bdev_io_opt(bdev);
}

static void qcow_iocb_init(struct kiocb *iocb, struct qcow_file *f, loff_t pos,
			   int flags, bool write)
{
	init_sync_kiocb(iocb, f->file);
	iocb->ki_pos = pos;
	iocb->ki_flags = flags | (f->direct ? IOCB_DIRECT : 0) |
			 (write ? IOCB_WRITE : 0);
}

/* Each write of a regular file has its own freeze protection. */
static bool qcow_iocb_protects(const struct kiocb *iocb)
{
	return iocb->ki_flags & IOCB_WRITE &&
	       S_ISREG(file_inode(iocb->ki_filp)->i_mode);
}

/* False if the file system is frozen, and the caller must not wait. */
static bool qcow_iocb_start(struct kiocb *iocb)
{
	struct super_block *sb = file_inode(iocb->ki_filp)->i_sb;

	if (!qcow_iocb_protects(iocb))
		return true;
	if (!(iocb->ki_flags & IOCB_NOWAIT)) {
		kiocb_start_write(iocb);
		return true;
	}
	if (!sb_start_write_trylock(sb))
		return false;
	/* As kiocb_start_write() does: who ends it is somebody else. */
	__sb_writers_release(sb, SB_FREEZE_WRITE);
	return true;
}

static void qcow_iocb_end(struct kiocb *iocb)
{
	if (qcow_iocb_protects(iocb))
		kiocb_end_write(iocb);
}

static ssize_t qcow_iocb_issue(struct qcow_file *f, struct kiocb *iocb,
			       struct iov_iter *iter)
{
	const struct file_operations *fops = iocb->ki_filp->f_op;
	bool read = iov_iter_rw(iter) == ITER_DEST;
	ssize_t ret = qcow_fault(read ? QCOW_FAULT_READ : QCOW_FAULT_WRITE);

	if (!ret)
		ret = read ? fops->read_iter(iocb, iter) :
			     fops->write_iter(iocb, iter);
	if ((!ret || ret == -ENOSPC) && qcow_file_gone(f))
		ret = -EIO;
	return ret;
}

static void qcow_io_put(struct qcow_io *io)
{
	if (atomic_dec_and_test(&io->refs))
		io->done(io, io->ret);
}

static void qcow_io_complete(struct kiocb *iocb, long ret)
{
	struct qcow_io *io = container_of(iocb, struct qcow_io, iocb);

	qcow_iocb_end(iocb);
	io->ret = ret;
	qcow_io_put(io);
}

/**
 * qcow_io_submit - start a read or write
 * @io: @io->iter, @io->ioprio and @io->done are set
 * @f: the file
 * @pos: where, bytes
 * @iocb_flags: IOCB_DSYNC, IOCB_NOWAIT or 0
 *
 * On a buffered file the transfer is done before this returns. Otherwise it is
 * under way, and @io->done tells. The result may be short, and it may be
 * -EAGAIN: then qcow_file_rw() does the rest.
 *
 * Context: may sleep, with IOCB_NOWAIT as far as the file system does not heed
 * it. @io->done may be called from here or from an interrupt.
 */
void qcow_io_submit(struct qcow_io *io, struct qcow_file *f, loff_t pos,
		    int iocb_flags)
{
	ssize_t ret;

	qcow_iocb_init(&io->iocb, f, pos, iocb_flags,
		       iov_iter_rw(&io->iter) == ITER_SOURCE);
	io->iocb.ki_ioprio = io->ioprio;
	if (!qcow_iocb_start(&io->iocb)) {
		io->done(io, -EAGAIN);
		return;
	}
	atomic_set(&io->refs, 2);
	if (f->direct)
		io->iocb.ki_complete = qcow_io_complete;
	ret = qcow_iocb_issue(f, &io->iocb, &io->iter);
	if (ret != -EIOCBQUEUED)
		qcow_io_complete(&io->iocb, ret);
	qcow_io_put(io);
}

/**
 * struct qcow_wait - a direct read or write that is waited for
 * @iocb: the kernel's handle
 * @done: it is over
 * @ret: as of ki_complete()
 */
struct qcow_wait {
	struct kiocb iocb;
	struct completion done;
	ssize_t ret;
};

static void qcow_wait_complete(struct kiocb *iocb, long ret)
{
	struct qcow_wait *wait = container_of(iocb, struct qcow_wait, iocb);

	wait->ret = ret;
	complete(&wait->done);
}

/*
 * Whoever is being killed waits, too: with a synchronous iocb some network file
 * systems would return while they still use the memory.
 */
static ssize_t qcow_file_rw_once(struct qcow_file *f, struct iov_iter *iter,
				 loff_t pos, int iocb_flags)
{
	struct iov_iter before = *iter;
	struct qcow_wait wait;
	ssize_t ret;

	init_completion(&wait.done);
	qcow_iocb_init(&wait.iocb, f, pos, iocb_flags,
		       iov_iter_rw(iter) == ITER_SOURCE);
	if (f->direct)
		wait.iocb.ki_complete = qcow_wait_complete;
	qcow_iocb_start(&wait.iocb);
	ret = qcow_iocb_issue(f, &wait.iocb, iter);
	if (ret == -EIOCBQUEUED) {
		wait_for_completion(&wait.done);
		ret = wait.ret;
		/* It may have been left anywhere. */
		*iter = before;
		if (ret > 0)
			iov_iter_advance(iter, ret);
	}
	qcow_iocb_end(&wait.iocb);
	return ret;
}

/**
 * qcow_file_rw - read or write all of an iterator, and wait for it
 * @f: the file
 * @iter: what to transfer; used up on success
 * @pos: where, bytes
 * @iocb_flags: IOCB_DSYNC or 0
 *
 * Return: 0, or an errno. What a read finds behind the end of the file is zero;
 * a write that the file cuts short without saying why is -ENOSPC at the end of
 * a block device, and -EIO elsewhere. -EIO also where the block device is gone.
 */
int qcow_file_rw(struct qcow_file *f, struct iov_iter *iter, loff_t pos,
		 int iocb_flags)
{
	bool write = iov_iter_rw(iter) == ITER_SOURCE;
	ssize_t ret;
	u64 size;

	while (iov_iter_count(iter)) {
		size = qcow_file_size(f);
		/* See qcow_file_gone(). */
		if (f->bdev && !size)
			return -EIO;
		if (!write && pos >= size) {
			iov_iter_zero(iov_iter_count(iter), iter);
			break;
		}
		if (write && f->bdev && pos >= size)
			return -ENOSPC;
		ret = qcow_file_rw_once(f, iter, pos, iocb_flags);
		/* A process that is being killed would get the same again. */
		if ((ret == -EINTR || ret == -ERESTARTSYS) &&
		    !fatal_signal_pending(current))
			continue;
		if (ret == -ERESTARTSYS)
			ret = -EINTR;
		if (ret < 0)
			return ret;
		if (!ret && write)
			return -EIO;
		if (!ret) {
			/* cut short behind our back: what is gone reads as zero */
			iov_iter_zero(iov_iter_count(iter), iter);
			break;
		}
		pos += ret;
		if (!write && f->direct && pos & (QCOW_SECTOR - 1)) {
			/* only the end of the file is not sector aligned */
			iov_iter_zero(iov_iter_count(iter), iter);
			break;
		}
	}
	return 0;
}

/**
 * qcow_file_buf_iter - describe memory of the kernel
 * @iter: to be filled in
 * @vec: what it refers to
 * @buf: lowmem, physically contiguous
 * @len: bytes
 * @dir: ITER_SOURCE or ITER_DEST
 */
void qcow_file_buf_iter(struct iov_iter *iter, struct bio_vec *vec,
			const void *buf, size_t len, unsigned int dir)
{
	vec->bv_page = virt_to_page(buf);
	vec->bv_len = len;
	vec->bv_offset = offset_in_page(buf);
	iov_iter_bvec(iter, dir, vec, 1, len);
}

static int qcow_file_buf(struct qcow_file *f, const void *buf, size_t len,
			 loff_t pos, unsigned int dir)
{
	struct bio_vec vec;
	struct iov_iter iter;

	qcow_file_buf_iter(&iter, &vec, buf, len, dir);
	return qcow_file_rw(f, &iter, pos, 0);
}

/**
 * qcow_file_read - read into memory of the kernel
 * @f: the file
 * @buf: lowmem, physically contiguous, aligned to 512 bytes
 * @len: bytes; a multiple of 512, as is @pos
 * @pos: where, bytes
 *
 * Return: 0 or an errno.
 */
int qcow_file_read(struct qcow_file *f, void *buf, size_t len, loff_t pos)
{
	return qcow_file_buf(f, buf, len, pos, ITER_DEST);
}

/**
 * qcow_file_write - write from memory of the kernel
 * @f: the file
 * @buf: lowmem, physically contiguous, aligned to 512 bytes; it must not change
 *	meanwhile
 * @len: bytes; a multiple of 512, as is @pos
 * @pos: where, bytes
 *
 * Return: 0 or an errno.
 */
int qcow_file_write(struct qcow_file *f, const void *buf, size_t len,
		    loff_t pos)
{
	return qcow_file_buf(f, buf, len, pos, ITER_SOURCE);
}

/**
 * qcow_zero_bvecs - describe zeroes
 * @bvec: to be filled in
 * @room: how many there is room for
 * @len: how many bytes are wanted
 *
 * Return: how many were filled in; they may cover less than @len.
 */
unsigned int qcow_zero_bvecs(struct bio_vec *bvec, unsigned int room, u64 len)
{
	unsigned int n;

	for (n = 0; n < room && len; n++) {
		bvec[n].bv_page = ZERO_PAGE(0);
		bvec[n].bv_offset = 0;
		bvec[n].bv_len = min_t(u64, len, PAGE_SIZE);
		len -= bvec[n].bv_len;
	}
	return n;
}

/**
 * qcow_file_write_zeroes - write zeroes, really
 * @f: the file
 * @len: bytes; a multiple of 512, as is @pos
 * @pos: where, bytes
 *
 * Return: 0 or an errno.
 */
int qcow_file_write_zeroes(struct qcow_file *f, u64 len, loff_t pos)
{
	struct bio_vec bvec[16];
	struct iov_iter iter;
	unsigned int n;
	u64 step;
	int err;

	while (len) {
		n = qcow_zero_bvecs(bvec, ARRAY_SIZE(bvec), len);
		step = min_t(u64, len, (u64)n * PAGE_SIZE);
		iov_iter_bvec(&iter, ITER_SOURCE, bvec, n, step);
		err = qcow_file_rw(f, &iter, pos, 0);
		if (err)
			return err;
		pos += step;
		len -= step;
	}
	return 0;
}

/**
 * qcow_file_sync - a barrier: what was written before is durable after
 * @f: the file
 *
 * The data and what is needed to find it (size, extents), not the times.
 *
 * Return: 0 or an errno, after which nothing since the last barrier that worked
 * is known to be durable, and no barrier works any more: the kernel tells of what it
 * could not write once, even if several ask at the same time.
 */
int qcow_file_sync(struct qcow_file *f)
{
	int err;

	mutex_lock(&f->sync_mutex);
	if (f->sync_failed)
		err = -EIO;
	else
		err = qcow_fault(QCOW_FAULT_SYNC) ?:
		      f->no_sync ? 0 : vfs_fsync(f->file, 1);
	/* What was to be written to a disk that is gone is dropped, without a word. */
	if (!err && !f->no_sync && qcow_file_gone(f))
		err = -EIO;
	if (err)
		f->sync_failed = true;
	mutex_unlock(&f->sync_mutex);
	return err;
}

/**
 * qcow_file_punch - give space back to the file system or the device below
 * @f: the file
 * @pos: where, bytes
 * @len: bytes
 *
 * What is punched reads as zeroes.
 *
 * Return: 0 or an errno; -EOPNOTSUPP where there are no holes, which is said once.
 */
int qcow_file_punch(struct qcow_file *f, u64 pos, u64 len)
{
	int err;

	if (READ_ONCE(f->no_punch))
		return -EOPNOTSUPP;
	err = qcow_fault(QCOW_FAULT_FALLOCATE) ?:
	      vfs_fallocate(f->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			    pos, len);
	if (err == -EOPNOTSUPP) {
		WRITE_ONCE(f->no_punch, true);
		pr_info("qcow: %pD: the file cannot punch holes; freed clusters are reused, but their space is not given back\n",
			f->file);
	}
	return err;
}

/**
 * qcow_file_allocate - take the space for a later write
 * @f: the file
 * @pos: where, bytes
 * @len: bytes
 *
 * What is there stays. Where the file system cannot do that, nothing is done.
 *
 * Return: 0, -ENOSPC or -EDQUOT.
 */
int qcow_file_allocate(struct qcow_file *f, u64 pos, u64 len)
{
	int err;

	if (f->bdev)
		return 0;
	err = qcow_fault(QCOW_FAULT_FALLOCATE) ?:
	      vfs_fallocate(f->file, FALLOC_FL_KEEP_SIZE, pos, len);
	return err == -ENOSPC || err == -EDQUOT ? err : 0;
}

/**
 * qcow_file_truncate - set the length of a regular file
 * @f: the file
 * @size: bytes
 *
 * Space that this adds reads as zeroes and takes no blocks. Where the file ends within
 * a block, ext4 since Linux 6.12 at the latest reads that into the page cache, clears
 * the rest, and writes it back later, without waiting for direct writes to it that are
 * under way: they would be undone. So while there are any, the length is made a
 * multiple of qcow_file_step() only.
 *
 * Return: 0 or an errno.
 */
int qcow_file_truncate(struct qcow_file *f, u64 size)
{
	const struct cred *old = override_creds(f->file->f_cred);
	int err = qcow_fault(QCOW_FAULT_TRUNCATE) ?:
		  vfs_truncate(&f->file->f_path, size);

	revert_creds(old);
	return err;
}
