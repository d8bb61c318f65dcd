/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The control interface of the qcow block driver: ioctls on /dev/qcow-control.
 *
 * Each call takes one struct. Its first member, @size, is the size of the
 * struct as the caller knows it. The kernel treats what the caller does not
 * have as zero, and refuses with E2BIG what the caller has, is not zero and the
 * kernel does not know; replies are cut to @size. Unknown flags are refused with
 * EINVAL. Pointers travel as __u64, arrays as pointer + count + element size.
 * There is no implicit padding, so 32-bit callers need no translation.
 *
 * All calls need CAP_SYS_ADMIN in the initial user namespace. Those that change
 * something need the control node open for writing.
 *
 * Documentation/abi.rst describes every call.
 */
#ifndef _UAPI_LINUX_QCOW_H
#define _UAPI_LINUX_QCOW_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define QCOW_CONTROL_NAME	"qcow-control"

#define QCOW_IOCTL_MAGIC	0xbc

#define QCOW_CTL_ATTACH		_IO(QCOW_IOCTL_MAGIC, 0)	/* struct qcow_attach */
#define QCOW_CTL_DETACH		_IO(QCOW_IOCTL_MAGIC, 1)	/* struct qcow_detach */
#define QCOW_CTL_STATUS		_IO(QCOW_IOCTL_MAGIC, 2)	/* struct qcow_status */
#define QCOW_CTL_LAYER		_IO(QCOW_IOCTL_MAGIC, 3)	/* struct qcow_layer_status */
#define QCOW_CTL_LIST		_IO(QCOW_IOCTL_MAGIC, 4)	/* struct qcow_list */
#define QCOW_CTL_FREEZE		_IO(QCOW_IOCTL_MAGIC, 5)	/* struct qcow_freeze */
#define QCOW_CTL_THAW		_IO(QCOW_IOCTL_MAGIC, 6)	/* struct qcow_thaw */

/* Image formats */
#define QCOW_FORMAT_RAW		1
#define QCOW_FORMAT_QCOW2	2

/* What becomes of a discard: struct qcow_attach.discard */
#define QCOW_DISCARD_UNMAP	0	/* free the clusters, punch the file */
#define QCOW_DISCARD_IGNORE	1	/* the device has no discard */
#define QCOW_DISCARD_KEEP	2	/* keep the mapping, punch the file */

/* How the files are read and written: struct qcow_attach.io_mode */
#define QCOW_IO_AUTO		0	/* direct where each file allows it */
#define QCOW_IO_DIRECT		1	/* direct, or the attach fails (EINVAL) */
#define QCOW_IO_BUFFERED	2	/* through the page cache */

/* How new clusters that are written as a whole are compressed */
#define QCOW_COMPRESS_NONE	0	/* not at all */
#define QCOW_COMPRESS_IMAGE	1	/* as the image's header says; attach only */
#define QCOW_COMPRESS_ZLIB	2	/* so, or the attach fails (EINVAL) */
#define QCOW_COMPRESS_ZSTD	3	/* likewise */

/* How the guest's data is encrypted */
#define QCOW_ENCRYPTION_NONE	0
#define QCOW_ENCRYPTION_AES	1	/* legacy, insecure */
#define QCOW_ENCRYPTION_LUKS	2

#define QCOW_LAYER_DATA_FILE	(1U << 0)	/* @data_fd is given */
#define QCOW_LAYER_KEY		(1U << 1)	/* @key and @cipher are given */
#define QCOW_LAYER_FLAGS_ALL	(QCOW_LAYER_DATA_FILE | QCOW_LAYER_KEY)

#define QCOW_CIPHER_MAX		128	/* bytes */
#define QCOW_KEY_MAX		512	/* bytes */

/**
 * struct qcow_layer - one file of the backing chain
 * @fd: open file; the driver keeps this very file open until detach, and with
 *      it the advisory locks that belong to it
 * @format: QCOW_FORMAT_RAW or QCOW_FORMAT_QCOW2; the driver never probes
 * @flags: QCOW_LAYER_*
 * @data_fd: open file, the external data file; 0 without QCOW_LAYER_DATA_FILE
 * @key: pointer to the key of the encrypted data: for LUKS that of the volume, not
 *       the passphrase; 0 without QCOW_LAYER_KEY, like the next three
 * @cipher: pointer to the cipher's name as LUKS has it, aes-xts-plain64 for example;
 *          for legacy AES aes-cbc-plain64
 * @key_size: length of the key in bytes, up to QCOW_KEY_MAX
 * @cipher_size: length of the name in bytes, without a terminator, up to
 *               QCOW_CIPHER_MAX
 */
struct qcow_layer {
	__s32 fd;
	__u32 format;
	__u32 flags;
	__s32 data_fd;
	__u64 key;
	__u64 cipher;
	__u32 key_size;
	__u32 cipher_size;
};

#define QCOW_ATTACH_READ_ONLY	(1U << 0)
#define QCOW_ATTACH_AUTOCLEAR	(1U << 1)	/* detach after the first use */
#define QCOW_ATTACH_NO_INLINE	(1U << 2)	/* a worker serves each request */
#define QCOW_ATTACH_WRITE_THROUGH (1U << 3)	/* what is written is durable */
#define QCOW_ATTACH_NO_FLUSH	(1U << 4)	/* nothing is made durable */
#define QCOW_ATTACH_FLAGS_ALL	(QCOW_ATTACH_READ_ONLY | \
				 QCOW_ATTACH_AUTOCLEAR | QCOW_ATTACH_NO_INLINE | \
				 QCOW_ATTACH_WRITE_THROUGH | QCOW_ATTACH_NO_FLUSH)

/**
 * struct qcow_attach - QCOW_CTL_ATTACH: make /dev/qcow@index
 * @size: size of this struct
 * @flags: QCOW_ATTACH_*
 * @index: in: the wanted number, or -1 for the lowest free one; out: the number
 * @layer_count: how many files the chain has, the image itself first
 * @layer_size: size of one element of @layers
 * @discard: QCOW_DISCARD_*
 * @io_mode: QCOW_IO_*
 * @message_size: size of the buffer at @message in bytes, or 0
 * @layers: pointer to struct qcow_layer[@layer_count]
 * @cache_limit: most bytes of cached tables, 0 for the default
 * @message: pointer to a buffer for one line of text, NUL-terminated, which says
 *           why the attach failed; empty where the error number says it all
 * @snapshot: pointer to the ID or the name of the internal snapshot to show in
 *            place of the disk, needs QCOW_ATTACH_READ_ONLY; or 0
 * @snapshot_size: its length in bytes, without a terminator; not 0 with @snapshot
 * @compress: QCOW_COMPRESS_*; not with QCOW_ATTACH_READ_ONLY
 *
 * On return the block device exists with its size, and its partitions have been
 * scanned.
 */
struct qcow_attach {
	__u32 size;
	__u32 flags;
	__s32 index;
	__u32 layer_count;
	__u32 layer_size;
	__u32 discard;
	__u32 io_mode;
	__u32 message_size;
	__u64 layers;
	__u64 cache_limit;
	__u64 message;
	__u64 snapshot;
	__u32 snapshot_size;
	__u32 compress;
};

#define QCOW_DETACH_DEFERRED	(1U << 0)	/* when the last opener closes */
#define QCOW_DETACH_FLAGS_ALL	(QCOW_DETACH_DEFERRED)

/**
 * struct qcow_detach - QCOW_CTL_DETACH: remove /dev/qcow@index
 * @size: size of this struct
 * @flags: QCOW_DETACH_*
 * @index: the device's number
 * @reserved: 0
 *
 * EBUSY while the device is open, unless QCOW_DETACH_DEFERRED is set. On return
 * of an immediate detach everything is written, and the files and their locks
 * are released. EIO (or the error of the write) says that the device is gone but
 * that not everything could be written; the kernel log says what.
 */
struct qcow_detach {
	__u32 size;
	__u32 flags;
	__s32 index;
	__u32 reserved;
};

#define QCOW_STATUS_READ_ONLY	(1U << 0)	/* the device refuses writes */
#define QCOW_STATUS_DETACHING	(1U << 1)	/* detaches at the last close */
#define QCOW_STATUS_CORRUPT	(1U << 2)	/* the corrupt bit is set */
#define QCOW_STATUS_FAILED	(1U << 3)	/* a write or flush failed for good */
#define QCOW_STATUS_DIRECT	(1U << 4)	/* the image's file: direct I/O */
#define QCOW_STATUS_SNAPSHOT	(1U << 5)	/* it shows an internal snapshot */
#define QCOW_STATUS_AUTOCLEAR	(1U << 6)	/* it was attached with AUTOCLEAR */
#define QCOW_STATUS_FROZEN	(1U << 7)	/* writes wait: QCOW_CTL_FREEZE */
#define QCOW_STATUS_WRITE_THROUGH (1U << 8)	/* it was attached with that flag */
#define QCOW_STATUS_NO_FLUSH	(1U << 9)	/* likewise */

/**
 * struct qcow_status - QCOW_CTL_STATUS: state and counters of one device
 * @size: size of this struct
 * @index: in: the device's number
 * @flags: out: QCOW_STATUS_*
 * @layer_count: out: number of files in the chain
 * @virtual_size: out: size of the disk in bytes
 * @version: out: format version of the image, 2 or 3
 * @cluster_size: out: bytes
 * @refcount_bits: out: width of a reference count
 * @discard: out: QCOW_DISCARD_*
 * @openers: out: how often the device and its partitions are open now
 * @compress: out: QCOW_COMPRESS_NONE, _ZLIB or _ZSTD
 * @cache_size: out: bytes of cached tables
 * @cache_limit: out: most bytes of cached tables
 * @reads: out: read requests
 * @writes: out: write requests
 * @discards: out: discard requests
 * @zeroes: out: write-zeroes requests
 * @flushes: out: flush requests
 * @clusters_allocated: out: clusters taken since attach
 * @clusters_freed: out: clusters given back since attach
 * @cache_hits: out: table look-ups that memory answered
 * @cache_misses: out: table look-ups that read the file
 * @errors: out: requests that failed
 * @snapshot: in: pointer to a buffer for what QCOW_CTL_ATTACH was given as the
 *            snapshot, NUL-terminated, empty if that was none; ENAMETOOLONG if it
 *            does not fit
 * @snapshot_size: in: size of that buffer in bytes, or 0
 * @reserved2: 0
 * @inlined: out: reads and writes that needed no worker
 */
struct qcow_status {
	__u32 size;
	__s32 index;
	__u32 flags;
	__u32 layer_count;
	__u64 virtual_size;
	__u32 version;
	__u32 cluster_size;
	__u32 refcount_bits;
	__u32 discard;
	__u32 openers;
	__u32 compress;
	__u64 cache_size;
	__u64 cache_limit;
	__u64 reads;
	__u64 writes;
	__u64 discards;
	__u64 zeroes;
	__u64 flushes;
	__u64 clusters_allocated;
	__u64 clusters_freed;
	__u64 cache_hits;
	__u64 cache_misses;
	__u64 errors;
	__u64 snapshot;
	__u32 snapshot_size;
	__u32 reserved2;
	__u64 inlined;
};

/**
 * struct qcow_layer_status - QCOW_CTL_LAYER: one file of a device's chain
 * @size: size of this struct
 * @index: in: the device's number
 * @layer: in: 0 for the image, 1 for its backing file, and so on
 * @format: out: QCOW_FORMAT_*
 * @virtual_size: out: bytes
 * @version: out: format version, 0 for raw
 * @cluster_size: out: bytes, 0 for raw
 * @direct: out: 1 if the file is read and written directly
 * @path_size: in: size of the buffer at @path
 * @path: in: pointer to a buffer for the file's path as the kernel knows it,
 *        NUL-terminated; ENAMETOOLONG if it does not fit
 * @encryption: out: QCOW_ENCRYPTION_*
 * @reserved: 0
 *
 * ENOENT if the chain is shorter than @layer.
 */
struct qcow_layer_status {
	__u32 size;
	__s32 index;
	__u32 layer;
	__u32 format;
	__u64 virtual_size;
	__u32 version;
	__u32 cluster_size;
	__u32 direct;
	__u32 path_size;
	__u64 path;
	__u32 encryption;
	__u32 reserved;
};

/**
 * struct qcow_list - QCOW_CTL_LIST: the numbers of the attached devices
 * @size: size of this struct
 * @cursor: in: report devices with this number or a higher one;
 *          out: where to go on; -1 when no more devices follow
 * @count: in: room at @indices in elements; out: how many were written
 * @reserved: 0
 * @indices: pointer to __s32[@count]
 */
struct qcow_list {
	__u32 size;
	__s32 cursor;
	__u32 count;
	__u32 reserved;
	__u64 indices;
};

#define QCOW_FREEZE_TIMEOUT	60	/* seconds, if nothing else is said */
#define QCOW_FREEZE_TIMEOUT_MAX	3600

/**
 * struct qcow_freeze - QCOW_CTL_FREEZE: have the image stay as it is for a while
 * @size: size of this struct
 * @flags: 0
 * @index: the device's number
 * @timeout: most seconds that writes may wait, up to QCOW_FREEZE_TIMEOUT_MAX; 0
 *           for QCOW_FREEZE_TIMEOUT. Then the device thaws by itself. Of no
 *           meaning for a device that is read-only
 *
 * On return everything is written, the dirty bit is cleared, and the file stays as
 * it is: reads go on, and requests that would change something wait. This ends with
 * QCOW_CTL_THAW through the same open file, with the last close of that (so, too,
 * when its owner is killed), or after @timeout. EBUSY if the device is frozen
 * already; EINTR if the caller was killed. A frozen device is not detached.
 */
struct qcow_freeze {
	__u32 size;
	__u32 flags;
	__s32 index;
	__u32 timeout;
};

/**
 * struct qcow_thaw - QCOW_CTL_THAW: end what QCOW_CTL_FREEZE began
 * @size: size of this struct
 * @flags: 0
 * @index: the device's number
 * @reserved: 0
 *
 * ENOENT if this open file has not frozen the device, or not any more, since its
 * time was over. Success says that it was frozen all the time.
 */
struct qcow_thaw {
	__u32 size;
	__u32 flags;
	__s32 index;
	__u32 reserved;
};

#endif /* _UAPI_LINUX_QCOW_H */
