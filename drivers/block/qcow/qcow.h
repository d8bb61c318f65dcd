/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of the driver know of each other.
 *
 * Dependencies point one way:
 *
 *	main -> device -> request -> discard, pack -> cluster -> map, resolve
 *	        -> refcount -> commit -> compress -> codec -> table_cache -> file_io
 *
 * From cluster on down nothing knows of requests or disks: those files work on
 * an image, which may as well be a file in memory that a unit test made.
 *
 * Lock order (outermost first)
 *
 *	disk->open_mutex
 *	range lock on guest clusters (qcow_range_lock)
 *	image->table_mutex	making and copying L2 tables
 *	image->pack_mutex	writing compressed data
 *	image->reclaim_mutex	freeing clusters
 *	image->commit_mutex	one commit at a time
 *	image->copy_mutex	the buffer for copies when memory is short
 *	image->alloc_mutex	refcount blocks, refcount table, the allocator
 *	image->header_mutex	writing the header
 *	cache->lock		the list of cached blocks
 *	unpack->lock		decompressed clusters
 *	image->lock		contents and dirtiness of blocks, lists of ranges
 *
 * image->lock is the only one that I/O completion takes, perhaps in interrupt
 * context; it is held for at most the copy of one block. The epoch (an SRCU read
 * section) is entered before an entry is looked up and left when the I/O that it
 * led to is complete. Nothing may sleep on a lock above, or on a commit, inside
 * an epoch, because reclaiming clusters waits for epochs to end.
 */
#ifndef QCOW_H
#define QCOW_H

#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mempool.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/refcount.h>
#include <linux/sched.h>
#include <linux/semaphore.h>
#include <linux/seqlock.h>
#include <linux/spinlock.h>
#include <linux/srcu.h>
#include <linux/uio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "compat.h"
#include "debug.h"
#include "header.h"

/**
 * qcow_io_scope_enter - I/O begins that memory reclaim may be waiting for
 *
 * Until qcow_io_scope_exit() no allocation waits for I/O, which might come back
 * to us, and writes are not throttled by the dirty pages that they clean.
 *
 * Return: what to give to qcow_io_scope_exit().
 */
static inline unsigned int qcow_io_scope_enter(void)
{
	unsigned int mask = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE;
	unsigned int old = current->flags & mask;

	current->flags |= mask;
	return old;
}

/**
 * qcow_io_scope_exit - undo qcow_io_scope_enter()
 * @old: what it returned
 */
static inline void qcow_io_scope_exit(unsigned int old)
{
	current->flags &= ~(PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE);
	current->flags |= old;
}

/* ---- file_io.c: the files below ---------------------------------------- */

/* The unit of all I/O. */
#define QCOW_SECTOR		512U

/**
 * struct qcow_file - one file that holds an image
 * @file: the file; what userspace opened, and locked, the device keeps as well
 * @direct: read and written directly; otherwise always through the page cache
 * @dsync: what is written directly with IOCB_DSYNC is durable when it completes
 * @nowait: it is direct, and knows IOCB_NOWAIT
 * @writable: opened for writing, and to be written
 * @no_sync: nobody wants it to be durable
 * @bdev: a block device, whose length is fixed
 * @no_punch: it cannot punch holes, as was seen
 * @sync_failed: a barrier has failed
 * @sync_mutex: one barrier at a time
 */
struct qcow_file {
	struct file *file;
	bool direct;
	bool dsync;
	bool nowait;
	bool no_sync;
	bool writable;
	bool bdev;
	bool no_punch;
	bool sync_failed;
	struct mutex sync_mutex;	/* one barrier at a time */
};

struct qcow_image;
struct qcow_io;
typedef void (*qcow_io_done_fn)(struct qcow_io *io, long ret);

/**
 * struct qcow_io - one asynchronous read or write of a file
 * @iocb: the kernel's handle
 * @iter: what is transferred
 * @ioprio: with which priority
 * @done: called once, when both the submitter and the file are finished with
 *        @iocb; may be in interrupt context
 * @ret: bytes transferred, or an errno
 * @refs: the submitter and the completion
 */
struct qcow_io {
	struct kiocb iocb;
	struct iov_iter iter;
	u16 ioprio;
	qcow_io_done_fn done;
	long ret;
	atomic_t refs;
};

int qcow_file_init(struct qcow_file *f, struct file *file, bool writable,
		   u32 io_mode, struct qcow_message *msg);
void qcow_file_release(struct qcow_file *f);
void qcow_fput(struct file *file);
int qcow_file_uncache(struct qcow_file *f, struct qcow_message *msg);
u64 qcow_file_size(const struct qcow_file *f);
u32 qcow_file_step(const struct qcow_file *f);
void qcow_file_units(const struct qcow_file *f, u32 *physical, u32 *optimal);
bool qcow_file_gone(const struct qcow_file *f);
void qcow_io_submit(struct qcow_io *io, struct qcow_file *f, loff_t pos,
		    int iocb_flags);
int qcow_file_rw(struct qcow_file *f, struct iov_iter *iter, loff_t pos,
		 int iocb_flags);
void qcow_file_buf_iter(struct iov_iter *iter, struct bio_vec *vec,
			const void *buf, size_t len, unsigned int dir);
int qcow_file_read(struct qcow_file *f, void *buf, size_t len, loff_t pos);
int qcow_file_write(struct qcow_file *f, const void *buf, size_t len,
		    loff_t pos);
int qcow_file_write_zeroes(struct qcow_file *f, u64 len, loff_t pos);
int qcow_file_sync(struct qcow_file *f);
int qcow_file_punch(struct qcow_file *f, u64 pos, u64 len);
int qcow_file_allocate(struct qcow_file *f, u64 pos, u64 len);
int qcow_file_truncate(struct qcow_file *f, u64 size);
unsigned int qcow_zero_bvecs(struct bio_vec *bvec, unsigned int room, u64 len);

/* ---- codec.c: compression algorithms -------------------------------------- */

/**
 * struct qcow_coder - what it takes to compress or decompress a cluster
 * @workspace: of the algorithm
 * @workspace_size: bytes
 * @data: what is compressed or going to be, whole pages
 * @nr_vecs: how many
 * @vecs: the pages of @data
 */
struct qcow_coder {
	void *workspace;
	size_t workspace_size;
	void *data;
	unsigned int nr_vecs;
	struct bio_vec vecs[];
};

/**
 * struct qcow_coders - some of them, all of the same size
 * @pool: has one, and lends it and others
 * @workspace_size: of each, bytes
 * @room: for data in each, bytes
 * @nr: how many there are
 * @max: how many there may be
 */
struct qcow_coders {
	mempool_t pool;
	size_t workspace_size;
	size_t room;
	atomic_t nr;
	u32 max;
};

/**
 * struct qcow_codec - a compression algorithm
 * @unpack_size: bytes that it needs to decompress
 * @unpack: fill @dst with exactly @dst_len bytes from the stream at @src, which
 *	ends somewhere before @src_len; 0 or -EIO
 * @pack_size: bytes that it needs to compress a cluster
 * @pack: compress @src; the length of the stream, or 0 if @dst_len is too short
 */
struct qcow_codec {
	size_t (*unpack_size)(void);
	int (*unpack)(struct qcow_coder *coder, const void *src, u32 src_len,
		      void *dst, u32 dst_len);
	size_t (*pack_size)(u32 cluster_size);
	u32 (*pack)(struct qcow_coder *coder, const void *src, u32 src_len,
		    void *dst, u32 dst_len);
};

const struct qcow_codec *qcow_codec(const struct qcow_image *image);
int qcow_coders_init(struct qcow_coders *coders, size_t workspace_size,
		     size_t room);

/* ---- compress.c: decompressed clusters ----------------------------------- */

#define QCOW_UNPACK_HASH_BITS	8

/**
 * struct qcow_unpack - the decompressed clusters of some images
 * @lock: guards the next three, and the clusters in them
 * @lru: every cluster that is kept, the one used last at the end
 * @hash: the same, by image and L2 entry
 * @bytes: what they are charged with
 * @limit: most that @bytes should reach
 * @cluster_bits: of the largest clusters of any of the images
 * @unpackers: what it takes to decompress a cluster of any of them
 * @spares: memory for a cluster, set aside
 * @shrinker: gives clusters back under pressure
 */
struct qcow_unpack {
	spinlock_t lock;	/* guards @lru, @hash, @bytes */
	struct list_head lru;
	struct hlist_head hash[BIT(QCOW_UNPACK_HASH_BITS)];
	u64 bytes;
	u64 limit;
	u32 cluster_bits;
	struct qcow_coders unpackers;
	mempool_t spares;
	struct qcow_shrinker shrinker;
};

int qcow_unpack_init(struct qcow_unpack *unpack, u64 limit);
void qcow_unpack_exit(struct qcow_unpack *unpack);
int qcow_unpack_reserve(struct qcow_image *image);
int qcow_unpack_read(struct qcow_image *image, u64 descriptor, u32 skip,
		     struct iov_iter *iter);
void qcow_unpack_drop(struct qcow_image *image, u64 host_offset, u64 len);
void qcow_unpack_drop_all(struct qcow_image *image);

/* ---- table_cache.c: blocks of tables in memory -------------------------- */

/* A block is a page of a table, or a cluster where clusters are smaller. */
#define QCOW_BLOCK_BITS		12
#define QCOW_BLOCK_SIZE		BIT(QCOW_BLOCK_BITS)

/*
 * Blocks and shadows that are set aside for when memory is short, and how many of
 * them those may hold at once who wait for further ones: a write that changes
 * the mapping has an L2 block while it allocates.
 */
#define QCOW_POOL_MIN		64
#define QCOW_MAX_L2_WRITERS	32

/**
 * struct qcow_cache_stats - counted on each CPU
 * @hits: look-ups answered from memory
 * @misses: look-ups that had to read
 */
struct qcow_cache_stats {
	u64 hits;
	u64 misses;
};

/**
 * struct qcow_cache - the memory bound that the tables of some images share
 * @kref: one for each image, one for the device
 * @lock: guards @blocks, @count
 * @blocks: every cached block of every image, in the order of the clock
 * @count: bytes in @blocks
 * @limit: most bytes that @count should reach
 * @pool: struct qcow_block with its data, for progress when memory is short
 * @shadows: frozen copies, likewise
 * @shrinker: gives clean blocks back under pressure
 * @stats: per CPU
 * @unpack: decompressed clusters, which are bounded by themselves
 */
struct qcow_cache {
	struct kref kref;
	spinlock_t lock;	/* guards @blocks, @count */
	struct list_head blocks;
	u64 count;
	u64 limit;
	mempool_t pool;
	mempool_t shadows;
	struct qcow_shrinker shrinker;
	struct qcow_cache_stats __percpu *stats;
	struct qcow_unpack unpack;
};

/**
 * enum qcow_block_kind - which step of a commit writes a block
 * @QCOW_BLOCK_COUNT: refcount blocks. Safe on disk at any time: an increment is
 *	made before anything points to the cluster, a decrement after the
 *	removal of the pointer is durable. Written in step 1, or, while the
 *	header has the dirty bit, perhaps later.
 * @QCOW_BLOCK_LINK: L1, L2 and refcount table. They make clusters reachable, so
 *	they are frozen when a commit begins and written in step 2.
 */
enum qcow_block_kind {
	QCOW_BLOCK_COUNT,
	QCOW_BLOCK_LINK,
	QCOW_BLOCK_KINDS,	/* how many; also: not known yet */
};

/* struct qcow_block.state */
enum {
	QCOW_BLOCK_READING,	/* bit: being read, @data is not valid yet */
	QCOW_BLOCK_UPTODATE,	/* bit: @data is what the disk should hold */
	QCOW_BLOCK_REFERENCED,	/* bit: used since the clock's hand passed */
};

/**
 * struct qcow_block - one cached block of a table
 * @cache: where its memory is charged
 * @image: whose
 * @host_offset: where, bytes, a multiple of the image's block size
 * @pins: users, plus one for being in the cache, plus one for being dirty
 * @state: bits above
 * @data: the current content, big-endian as on disk
 * @shadow: for LINK blocks, where a commit copies @data to write it; there while
 *	@writers, @dirty or @writing are set, so that making a block dirty cannot
 *	fail
 * @writers: who announced changes (qcow_block_prepare), guarded by image->lock
 * @dirty: @data is newer than what was last handed to a commit, image->lock
 * @writing: a commit is writing it, and its barrier is not over, image->lock
 * @written: it has done so without an error, commit_mutex
 * @placed: qcow_block_place() has been here
 * @resolved: it may have resolutions in it (resolve.c); set under image->lock
 * @resolved_from: of the guest clusters from this one on; set before @resolved
 * @unresolved: how many of them are still to be; image->lock
 * @shortcut: its key in image->shortcuts (shortcut.c); written under image->lock
 * @kind: known from the first change on, image->lock
 * @dirty_node: in image->dirty[@kind], guarded by image->lock
 * @writing_node: in the list of the commit that writes it
 * @seq: for who reads entries of L2 tables without a lock; written under
 *	image->lock
 * @lru: in cache->blocks, guarded by cache->lock
 * @rcu: look-ups take no lock
 */
struct qcow_block {
	struct qcow_cache *cache;
	struct qcow_image *image;
	u64 host_offset;
	refcount_t pins;
	unsigned long state;
	void *data;
	void *shadow;
	unsigned int writers;
	bool dirty;
	bool writing;
	bool written;
	bool placed;
	bool resolved;
	u64 resolved_from;
	unsigned int unresolved;
	unsigned long shortcut;
	enum qcow_block_kind kind;
	struct list_head dirty_node;
	struct list_head writing_node;
	seqcount_spinlock_t seq;
	struct list_head lru;
	struct rcu_head rcu;
};

/* A host offset with this is that of a block that is only in memory. */
#define QCOW_BLOCK_VIRTUAL	BIT_ULL(63)

struct qcow_cache *qcow_cache_create(u64 limit);
void qcow_cache_relieve(struct qcow_cache *cache);
void qcow_cache_put(struct qcow_cache *cache);
struct qcow_block *qcow_block_get(struct qcow_image *image, u64 host_offset);
struct qcow_block *qcow_block_peek(struct qcow_image *image, u64 host_offset);
void qcow_block_used(struct qcow_block *block);
void qcow_block_put(struct qcow_block *block);
int qcow_block_place(struct qcow_block *block);
int qcow_block_prepare(struct qcow_block *block);
int qcow_block_claim_locked(struct qcow_block *block,
			    enum qcow_block_kind kind);
void qcow_block_dirty_locked(struct qcow_block *block);
void qcow_block_copy_locked(struct qcow_block *block, void *to);
void qcow_block_unprepare(struct qcow_block *block);
void qcow_block_written(struct qcow_block *block, bool ok);
int qcow_cache_drop(struct qcow_image *image, u64 host_offset, u64 len);
void qcow_cache_drop_all(struct qcow_image *image);

/* ---- image.c: an open image --------------------------------------------- */

/* Head or tail up to this long are written together with the guest's data. */
#define QCOW_MERGE_FILL		(128U << 10)
/* So many buffers for copies are kept for the next writes. */
#define QCOW_COPIES		16

/**
 * struct qcow_free - a run of host clusters that lost a reference
 * @node: in image->frees, then image->reclaims
 * @cluster: first, as a cluster number
 * @count: how many
 * @punch: give the space back to the host's file system once unused
 */
struct qcow_free {
	struct list_head node;
	u64 cluster;
	u64 count;
	bool punch;
};

/**
 * struct qcow_range - guest clusters whose mapping is about to change
 * @node: in image->ranges
 * @first: first guest cluster
 * @last: last guest cluster
 */
struct qcow_range {
	struct list_head node;
	u64 first;
	u64 last;
};

/**
 * struct qcow_image - one open image: a layer of one or more chains
 *
 * Images opened for reading only are shared by all devices that use the same
 * file; an image that is written belongs to one device.
 */
struct qcow_image {
	struct kref kref;
	struct list_head registry;	/* in the list of all images */
	struct qcow_file file;
	struct qcow_file data;		/* external data file, if there is one */
	bool data_raw;			/* @data reads as the disk does */
	struct qcow_crypt *crypt;	/* what encrypts the data, or NULL */
	struct qcow_bitmaps *bitmaps;	/* those that are kept up, or NULL */
	char *snapshot;			/* ID or name of the one that is shown */
	u32 format;			/* QCOW_FORMAT_* */
	bool writable;
	bool alone;			/* of one device only */
	struct qcow_header header;	/* as it was at attach */
	u64 size;			/* bytes a guest sees, a multiple of 512 */
	u32 cluster_bits;
	u32 l2_bits;			/* log2 of the entries of an L2 table */
	u32 subclusters;		/* of a cluster; 1 without extended L2 */
	u32 subcluster_bits;		/* log2 of the bytes of one */
	u32 block_bits;			/* log2 of the bytes of a cached block */
	struct qcow_cache *cache;
	struct xarray blocks;		/* by host offset >> block_bits */
	struct xarray virtual_blocks;	/* likewise */
	struct qcow_block **shortcuts;	/* L2 blocks by guest offset: shortcut.c */
	unsigned long shortcut_mask;	/* for places in it */
	u32 shortcut_shift;		/* log2 of the bytes that a block maps */
	struct xarray metadata;		/* by host cluster, see overlap.c */
	u64 *known;			/* tables that attach found, likewise */
	size_t nr_known;
	unsigned long *filter;		/* of both, by hash */
	u32 filter_bits;		/* log2 of its bits */
	unsigned long nr_unpacked;	/* of it in @cache, unpack->lock */

	spinlock_t lock;		/* see the lock order above */
	struct list_head dirty[QCOW_BLOCK_KINDS];
	u64 nr_dirty;
	bool counts_due;		/* the next commit writes counts, image->lock */
	bool committing;		/* a commit has frozen blocks in flight */
	struct list_head frees;		/* unlinked in memory, image->lock */
	struct list_head reclaims;	/* unlinked on disk, image->lock */
	u64 nr_frees;			/* runs in @frees, image->lock */
	u64 nr_reclaims;		/* runs in @reclaims, image->lock */
	mempool_t free_pool;		/* struct qcow_free */
	struct semaphore l2_writers;	/* L2 blocks that may be prepared */
	struct list_head ranges;	/* image->lock */
	wait_queue_head_t range_wait;

	struct srcu_struct epoch;
	bool epoch_ready;		/* @epoch is initialised */
	struct mutex table_mutex;	/* making L2 tables */

	struct mutex commit_mutex;	/* one commit at a time */
	u64 commits_started;		/* image->lock */
	u64 commits_done;		/* commit_mutex */
	int commit_error;		/* of the last one, commit_mutex */
	struct mutex reclaim_mutex;	/* one reclaim at a time */
	struct workqueue_struct *wq;	/* for what follows */
	struct delayed_work commit_work;
	struct work_struct reclaim_work;
	struct work_struct corrupt_work;

	u64 filled_to;			/* what qcow_image_fill_end() made the file's */
					/* length, or 0 */

	struct mutex alloc_mutex;	/* what follows, and the refcounts */
	u64 old_size;			/* the file's length before any write; 0 once */
					/* the cluster there was taken. Read without */
	u32 refcount_order;
	u32 refblock_bits;		/* log2 of the entries of a refcount block */
	u64 reftable_offset;
	u32 reftable_clusters;
	u64 alloc_cursor;		/* cluster number where to look first */
	u64 pack_offset;		/* where compressed data goes on, or 0 */
	u64 pending_first;		/* refcount blocks [first, end) exist but */
	u64 pending_end;		/* are not reachable on disk yet, but after */
	u64 pending_ticket;		/* this commit; image->lock, too */
	u64 refblocks_known;		/* those up to here exist, as far as seen */
	u64 zero_from;			/* known zero, host bytes: from here ... */
	u64 zero_to;			/* ... to here; empty where from >= to */
	atomic64_t end_offset;		/* behind the last cluster ever taken */
	void *scratch;			/* QCOW_BLOCK_SIZE, alloc_mutex */
	void *table_scratch;		/* QCOW_BLOCK_SIZE, table_mutex */
	void *bounce;			/* QCOW_BATCH blocks, commit_mutex */
	struct mutex header_mutex;	/* writing the header */
	void *header_scratch;		/* QCOW_SECTOR, header_mutex */
	u64 incompatible;		/* features in it, header_mutex */
	bool dirty_bit;			/* is among them, durably */
	struct mutex pack_mutex;	/* writing compressed data */
	void *pack_tail;		/* the sector with @pack_offset, pack_mutex */
	struct qcow_coders packers;	/* to compress with, if it is to be done */
	struct mutex copy_mutex;	/* @copy_buf */
	void *copy_buf;			/* QCOW_BLOCK_SIZE, copy_mutex */
	u32 copy_size;			/* bytes of each of ... */
	u32 nr_copies;			/* ... those in @copies, image->lock */
	void *copies[QCOW_COPIES];	/* memory for copies, image->lock */

	atomic_t damaged;		/* @damage is being set, or is */
	bool corrupt;			/* it is: no more writes */
	bool leaks;			/* nothing is freed: see map.c */
	struct qcow_message damage;	/* what was found */
	void (*on_corrupt)(void *data);	/* called then, in process context */
	void *on_corrupt_data;
	bool failed;			/* a barrier failed: no more writes */

	atomic64_t clusters_allocated;
	atomic64_t clusters_freed;
};

/**
 * struct qcow_chain - the image and its backing files
 * @depth: how many layers
 * @layers: the image first
 */
struct qcow_chain {
	unsigned int depth;
	struct qcow_image *layers[];
};

static inline u32 qcow_cluster_size(const struct qcow_image *image)
{
	return 1U << image->cluster_bits;
}

static inline u32 qcow_block_size(const struct qcow_image *image)
{
	return 1U << image->block_bits;
}

/* Are the guest's clusters in a file of their own, each at its guest offset? */
static inline bool qcow_is_external(const struct qcow_image *image)
{
	return image->data.file;
}

/* The file that has the guest's clusters. */
static inline struct qcow_file *qcow_data_file(struct qcow_image *image)
{
	return qcow_is_external(image) ? &image->data : &image->file;
}

/**
 * qcow_image_has - do clusters lie in the file
 * @image: a qcow2 image
 * @host_offset: bytes
 * @length: bytes
 *
 * Its last cluster counts as a whole. What the file was extended by does not count
 * before it is taken: at detach it is cut off again.
 */
static inline bool qcow_image_has(const struct qcow_image *image,
				  u64 host_offset, u64 length)
{
	u64 end;

	/* Who has seen an entry sees the end that was noted before it was made. */
	smp_rmb();
	end = atomic64_read(&image->end_offset);
	return length <= end && host_offset <= end - length;
}

/**
 * qcow_packed_range - where the data of a compressed cluster is
 * @image: a qcow2 image
 * @descriptor: the L2 entry
 * @host_offset: out: of its first byte
 * @length: out: bytes up to the end of its last sector
 */
static inline void qcow_packed_range(const struct qcow_image *image,
				     u64 descriptor, u64 *host_offset,
				     u32 *length)
{
	u32 bits = QCOW_PACKED_OFFSET_BITS(image->cluster_bits);
	u32 sectors;

	sectors = (descriptor & ~(QCOW_OFLAG_COPIED | QCOW_OFLAG_COMPRESSED)) >>
		  bits;
	*host_offset = descriptor & ((1ULL << bits) - 1);
	*length = (sectors + 1) * QCOW_SECTOR -
		  (*host_offset & (QCOW_SECTOR - 1));
}

/**
 * struct qcow_key - what it takes to read the data of an encrypted image
 * @cipher: in the notation of LUKS, cipher-mode[-generator[:hash]]
 * @data: the key
 * @size: its length in bytes
 */
struct qcow_key {
	char *cipher;
	void *data;
	u32 size;
};

/**
 * struct qcow_image_source - what an image is opened from
 * @file: the file, as userspace opened it
 * @data: its external data file, or NULL
 * @snapshot: ID or name of the internal snapshot to show, or NULL for the disk
 * @key: for its data, or NULL; who has one does not share the image
 * @format: QCOW_FORMAT_*
 * @io_mode: QCOW_IO_*
 * @writable: whether it is going to be written; not with @snapshot
 * @alone: not to be shared, even if it is only read
 * @no_flush: what is written need not be durable, ever
 */
struct qcow_image_source {
	struct file *file;
	struct file *data;
	const char *snapshot;
	const struct qcow_key *key;
	u32 format;
	u32 io_mode;
	bool writable;
	bool alone;
	bool no_flush;
};

int qcow_image_open(const struct qcow_image_source *source,
		    struct qcow_cache *cache, struct qcow_image **imagep,
		    struct qcow_message *msg);
int qcow_image_begin(struct qcow_image *image, struct qcow_message *msg);
int qcow_image_settle(struct qcow_image *image);
void qcow_image_watch(struct qcow_image *image, void (*on_corrupt)(void *data),
		      void *data);
void qcow_image_unwatch(struct qcow_image *image);
int qcow_image_close(struct qcow_image *image);
__printf(2, 3)
void qcow_image_corrupt(struct qcow_image *image, const char *fmt, ...);
__printf(2, 3)
void qcow_image_fail(struct qcow_image *image, const char *fmt, ...);
int qcow_image_update_header(struct qcow_image *image, size_t offset,
			     const void *data, size_t len);
int qcow_image_stale_counts(struct qcow_image *image);
/**
 * qcow_image_error - why this image cannot be written any more
 * @image: a writable image
 *
 * Return: 0 if it can, -EIO otherwise.
 */
static inline int qcow_image_error(const struct qcow_image *image)
{
	return READ_ONCE(image->failed) || READ_ONCE(image->corrupt) ? -EIO : 0;
}

/**
 * qcow_image_enter - begin to rely on what a look-up finds
 * @image: the top layer of a chain
 *
 * Until qcow_image_exit(), no cluster that a look-up found is reused or punched.
 * Lower layers never change and need nothing.
 *
 * Return: what to give to qcow_image_exit(), perhaps in another context.
 */
static inline int qcow_image_enter(struct qcow_image *image)
{
	return image->writable ? qcow_epoch_enter(&image->epoch) : 0;
}

/**
 * qcow_image_exit - the I/O that a look-up led to is over
 * @image: the same
 * @epoch: from qcow_image_enter()
 *
 * Context: any.
 */
static inline void qcow_image_exit(struct qcow_image *image, int epoch)
{
	if (image->writable)
		qcow_epoch_exit(&image->epoch, epoch);
}

/* ---- crypt.c: the guest's data, encrypted or not -------------------------- */

int qcow_crypt_init(struct qcow_image *image, const struct qcow_key *key,
		    struct qcow_message *msg);
void qcow_crypt_exit(struct qcow_image *image);
int qcow_decrypt(struct qcow_image *image, struct iov_iter *iter,
		 u64 host_offset, u64 guest_offset);
int qcow_encrypt_write(struct qcow_image *image, struct iov_iter *iter,
		       u64 host_offset, u64 guest_offset, int iocb_flags);
int qcow_data_read(struct qcow_image *image, void *buf, size_t len,
		   u64 host_offset, u64 guest_offset);
int qcow_data_write(struct qcow_image *image, const void *buf, size_t len,
		    u64 host_offset, u64 guest_offset);
int qcow_data_write_zeroes(struct qcow_image *image, u64 len, u64 host_offset,
			   u64 guest_offset);

/* ---- commit.c: groups, ordering, write-out ------------------------------ */

/* How many blocks are written at once. */
#define QCOW_BATCH		16

/* Changes wait at most this long for a flush to come. */
#define QCOW_COMMIT_DELAY	(5 * HZ)

int qcow_commit(struct qcow_image *image);
int qcow_commit_links(struct qcow_image *image);
int qcow_commit_exclusive(struct qcow_image *image);
bool qcow_image_dirty(struct qcow_image *image);
int qcow_commit_all(struct qcow_image *image);
void qcow_commit_arm_locked(struct qcow_image *image);
bool qcow_reclaim_now(struct qcow_image *image);
int qcow_commit_throttle(struct qcow_image *image);
void qcow_commit_work_fn(struct work_struct *work);
void qcow_reclaim_work_fn(struct work_struct *work);
struct qcow_free *qcow_free_alloc(struct qcow_image *image);
void qcow_free_discard(struct qcow_image *image, struct qcow_free *free);
void qcow_free_queue_locked(struct qcow_image *image, struct qcow_free *free);
void qcow_free_reclaim(struct qcow_image *image, struct qcow_free *free);

/* ---- snapshot.c: internal snapshots ------------------------------------- */

/**
 * struct qcow_snapshot - an entry of the snapshot table, not checked yet
 * @l1_table_offset: host offset, bytes
 * @l1_size: entries
 * @has_size: the entry says how large the disk was
 * @size: of the disk, bytes; of the image's where the entry does not say
 * @id_offset: where its ID is, bytes; the name follows
 * @id_size: bytes
 * @name_size: bytes
 * @next: where the next entry is
 */
struct qcow_snapshot {
	u64 l1_table_offset;
	u32 l1_size;
	bool has_size;
	u64 size;
	u64 id_offset;
	u32 id_size;
	u32 name_size;
	u64 next;
};

int qcow_snapshot_next(struct qcow_image *image, struct qcow_snapshot *snapshot,
		       struct qcow_message *msg);
int qcow_snapshot_select(struct qcow_image *image, const char *wanted,
			 struct qcow_message *msg);

/* ---- overlap.c: where metadata is --------------------------------------- */

/* enum qcow_metadata - what a host cluster may be that is not data */
enum qcow_metadata {
	QCOW_METADATA_HEADER,
	QCOW_METADATA_L1,
	QCOW_METADATA_L2,
	QCOW_METADATA_REFTABLE,
	QCOW_METADATA_REFBLOCK,
	QCOW_METADATA_SNAPSHOTS,
	QCOW_METADATA_SNAPSHOT_L1,
	QCOW_METADATA_BITMAPS,
	QCOW_METADATA_BITMAP,
	QCOW_METADATA_ENCRYPTION,
};

int qcow_overlap_init(struct qcow_image *image, struct qcow_message *msg);
void qcow_overlap_add(struct qcow_image *image, enum qcow_metadata kind,
		      u64 host_offset, u64 length);
void qcow_overlap_remove(struct qcow_image *image, u64 host_offset, u64 length);
int qcow_overlap_check(struct qcow_image *image, u64 host_offset, u64 length);
int qcow_overlap_check_data(struct qcow_image *image, u64 host_offset,
			    u64 length);
bool qcow_overlap_is_only(struct qcow_image *image, int kind, u64 host_offset,
			  u64 length);
int qcow_overlap_expect(struct qcow_image *image, enum qcow_metadata kind,
			u64 host_offset);
bool qcow_overlap_is_shared(struct qcow_image *image, u64 host_offset);

/* ---- refcount.c: refcounts and the allocator ---------------------------- */

u64 qcow_refcount_load(const void *block, u32 order, u64 index);
void qcow_refcount_store(void *block, u32 order, u64 index, u64 count);
int qcow_refcount_get(struct qcow_image *image, u64 cluster, u64 *count);
int qcow_refcount_drop(struct qcow_image *image, u64 cluster);
int qcow_alloc_clusters(struct qcow_image *image, u64 want, u64 *cluster,
			u64 *got, bool *zeroed);
int qcow_alloc_bytes(struct qcow_image *image, u32 size, u64 *host_offset);
void qcow_alloc_forget(struct qcow_image *image, u64 cluster, u64 count);

/* ---- map.c: from guest offsets to extents ------------------------------- */

/**
 * enum qcow_extent_type - what is at a guest offset
 * @QCOW_EXTENT_UNALLOCATED: this layer has nothing, look below
 * @QCOW_EXTENT_ZERO: reads as zeroes
 * @QCOW_EXTENT_DATA: is in the layer's data file at @host_offset
 * @QCOW_EXTENT_COMPRESSED: is in a compressed cluster of the layer
 */
enum qcow_extent_type {
	QCOW_EXTENT_UNALLOCATED,
	QCOW_EXTENT_ZERO,
	QCOW_EXTENT_DATA,
	QCOW_EXTENT_COMPRESSED,
};

/**
 * struct qcow_extent - a run of guest bytes that are of one kind
 * @type: see above
 * @in_place: DATA that may be overwritten where it is (refcount one)
 * @image: the layer that decided
 * @host_offset: for DATA, bytes
 * @descriptor: for COMPRESSED, the L2 entry; qcow_unpack_read() takes it
 * @skip: for COMPRESSED, where in the cluster the extent begins, bytes
 * @length: bytes
 */
struct qcow_extent {
	enum qcow_extent_type type;
	bool in_place;
	struct qcow_image *image;
	u64 host_offset;
	u64 descriptor;
	u32 skip;
	u64 length;
};

/**
 * struct qcow_l2_entry - an entry of an L2 table
 * @descriptor: QCOW_OFLAG_* and a host offset
 * @bitmap: of the subclusters, where entries are extended; otherwise 0
 */
struct qcow_l2_entry {
	u64 descriptor;
	u64 bitmap;
};

/**
 * struct qcow_l2_state - what an L2 entry says of a guest offset
 * @type: of the subcluster with that offset
 * @mapped: the guest cluster has a host cluster of its own, allocated or set
 *	aside
 * @exclusive: that may be written in place, nobody else has it
 * @host_offset: of that cluster, bytes; 0 if there is none, but in an external
 *	data file 0 is the place of the first cluster
 * @allocated: a bit for each subcluster that is DATA or COMPRESSED
 * @length: bytes from the guest offset on that are of @type, in this cluster
 *
 * Without extended L2 entries a cluster is one subcluster.
 */
struct qcow_l2_state {
	enum qcow_extent_type type;
	bool mapped;
	bool exclusive;
	u64 host_offset;
	u32 allocated;
	u32 length;
};

/* How many L2 entries a cached block has. */
static inline unsigned int qcow_l2_per_block(const struct qcow_image *image)
{
	return qcow_block_size(image) >> (image->cluster_bits - image->l2_bits);
}

/* Which subcluster of its cluster has a guest offset. */
static inline unsigned int qcow_subcluster(const struct qcow_image *image,
					   u64 guest_offset)
{
	return (guest_offset & (qcow_cluster_size(image) - 1)) >>
	       image->subcluster_bits;
}

u64 qcow_entry_load(struct qcow_image *image, struct qcow_block *block,
		    unsigned int index);
struct qcow_l2_entry qcow_l2_load_raw(struct qcow_image *image,
				      struct qcow_block *block,
				      unsigned int index);
struct qcow_l2_entry qcow_l2_load(struct qcow_image *image,
				  struct qcow_block *block, unsigned int index);
void qcow_l2_store_locked(struct qcow_image *image, struct qcow_block *block,
			  unsigned int index, struct qcow_l2_entry entry);
struct qcow_block *qcow_l1_block(struct qcow_image *image, u64 guest_offset,
				 unsigned int *index);
int qcow_l1_entry(struct qcow_image *image, u64 guest_offset, u64 *entry);
u64 qcow_l1_entry_cached(struct qcow_image *image, u64 guest_offset);
int qcow_l2_find(struct qcow_image *image, u64 guest_offset, bool cached,
		 u64 *host_offset, unsigned int *index);
struct qcow_block *qcow_l2_block(struct qcow_image *image, u64 l1_entry,
				 u64 guest_offset, unsigned int *index);
int qcow_l2_classify(struct qcow_image *image, struct qcow_l2_entry entry,
		     u64 guest_offset, struct qcow_l2_state *state);
bool qcow_chain_is_zero(struct qcow_chain *chain, unsigned int first,
			u64 guest_offset, u64 length, int *error);
int qcow_map_layer(struct qcow_image *image, u64 guest_offset, u64 length,
		   struct qcow_extent *extent);
int qcow_map_layer_cached(struct qcow_image *image, u64 guest_offset,
			  u64 length, struct qcow_extent *extent);
int qcow_map(struct qcow_chain *chain, unsigned int first, u64 guest_offset,
	     u64 length, struct qcow_extent *extent);
int qcow_map_cached(struct qcow_chain *chain, u64 guest_offset, u64 length,
		    struct qcow_extent *extent);
int qcow_chain_read(struct qcow_chain *chain, u64 guest_offset, u64 length,
		    void *buf);

/* ---- shortcut.c: L2 blocks by guest offset ------------------------------- */

int qcow_shortcut_init(struct qcow_image *image);
struct qcow_block *qcow_shortcut_find(struct qcow_image *image, u64 guest_offset,
				      unsigned int *index);
void qcow_shortcut_forget(struct qcow_block *block);
void qcow_shortcut_clear_locked(struct qcow_image *image, u64 guest_offset);
void qcow_shortcut_add(struct qcow_image *image, u64 guest_offset, u64 l1_entry,
		       struct qcow_block *block);

/* ---- resolve.c: long chains ---------------------------------------------- */

/* Is it worth to remember where in a chain, whose top is qcow2, something is? */
static inline bool qcow_chain_resolves(const struct qcow_chain *chain)
{
	return chain->depth > 2;
}

/* Has it the form of what resolve.c keeps in the place of an L2 entry? */
static inline bool qcow_is_tagged(u64 descriptor)
{
	return (descriptor & (QCOW_L2_RESOLVED | QCOW_OFLAG_COMPRESSED)) ==
	       QCOW_L2_RESOLVED;
}

/* Is it? */
static inline bool qcow_is_resolution(const struct qcow_block *block,
				      u64 descriptor)
{
	if (likely(!qcow_is_tagged(descriptor)))
		return false;
	/* Pairs with the barrier in qcow_block_resolve_locked(). */
	smp_rmb();
	return READ_ONCE(block->resolved);
}

int qcow_resolved_find(struct qcow_chain *chain, u64 guest_offset, u64 length,
		       struct qcow_extent *extent, unsigned int *layer);
void qcow_resolved_keep(struct qcow_chain *chain, u64 guest_offset,
			const struct qcow_extent *extent, unsigned int layer);

/* ---- bitmap.c: persistent dirty bitmaps ---------------------------------- */

int qcow_bitmaps_load(struct qcow_image *image, struct qcow_message *msg);
int qcow_bitmaps_mark(struct qcow_image *image);
void qcow_bitmaps_exit(struct qcow_image *image);
void qcow_bitmaps_set(struct qcow_image *image, u64 guest_offset, u64 length);
int qcow_bitmaps_store(struct qcow_image *image);

/* ---- cluster.c: changing the mapping ------------------------------------ */

void qcow_range_lock(struct qcow_image *image, struct qcow_range *range,
		     u64 first, u64 last);
void qcow_range_unlock(struct qcow_image *image, struct qcow_range *range);
struct qcow_block *qcow_l2_for_write(struct qcow_image *image, u64 guest_offset,
				     unsigned int *index);
void qcow_l2_release(struct qcow_image *image, struct qcow_block *block);
void qcow_frees_add_entry(struct qcow_image *image, struct list_head *frees,
			  struct qcow_l2_entry entry, bool punch);
void qcow_frees_discard(struct qcow_image *image, struct list_head *frees);
void qcow_frees_queue_locked(struct qcow_image *image, struct list_head *frees);

/* Between head and tail, up to this much is read along to save a read. */
#define QCOW_FILL_GAP		(16U << 10)

/**
 * struct qcow_fill - what surrounds the guest's data in its clusters
 * @length: bytes; 0 where nothing needs to be written
 * @copy: their content, or NULL for zeroes
 */
struct qcow_fill {
	u32 length;
	void *copy;
};

/**
 * struct qcow_write - a write that changes the mapping, between begin and end
 * @image: the top layer
 * @range: the guest clusters that are locked
 * @l2: the block with their entries, prepared
 * @index: of the first entry in @l2
 * @count: how many clusters
 * @first_sub: the first subcluster of the first one that is allocated with this
 * @last_sub: the last one, of the last cluster
 * @host_offset: of the first cluster; the others follow
 * @data_offset: where in the clusters the guest's data begins, bytes
 * @length: of the guest's data, bytes
 * @head: to be written before it
 * @tail: to be written behind it
 * @around: the copies in @head and @tail are one piece of memory
 * @blank: the clusters had no data in this layer
 * @fresh: the clusters are newly allocated, to be freed if the write fails
 * @frees: runs that the old entries lose when the write succeeds
 * @abort: a node to free the new clusters with
 */
struct qcow_write {
	struct qcow_image *image;
	struct qcow_range range;
	struct qcow_block *l2;
	unsigned int index;
	unsigned int count;
	unsigned int first_sub;
	unsigned int last_sub;
	u64 host_offset;
	u32 data_offset;
	u64 length;
	struct qcow_fill head;
	struct qcow_fill tail;
	bool around;
	bool blank;
	bool fresh;
	struct list_head frees;
	struct qcow_free *abort;
};

int qcow_write_begin(struct qcow_chain *chain, u64 guest_offset, u64 length,
		     struct qcow_write *write);
void qcow_write_end(struct qcow_write *write, int error);
int qcow_fill_write(struct qcow_image *image, const struct qcow_fill *fill,
		    u64 host_offset, u64 guest_offset);

/* ---- pack.c: writing compressed clusters --------------------------------- */

int qcow_pack_init(struct qcow_image *image, u32 compress,
		   struct qcow_message *msg);
void qcow_pack_exit(struct qcow_image *image);
int qcow_pack_write(struct qcow_image *image, u64 guest_offset,
		    struct iov_iter *data);

u32 qcow_compression(const struct qcow_image *image);

/* ---- discard.c: zeroes and discard --------------------------------------- */

int qcow_write_zeroes(struct qcow_chain *chain, u64 guest_offset, u64 length,
		      bool unmap);
int qcow_discard(struct qcow_chain *chain, u64 guest_offset, u64 length,
		 bool keep);

#endif /* QCOW_H */
