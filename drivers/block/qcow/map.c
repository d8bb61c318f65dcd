// SPDX-License-Identifier: GPL-2.0-only
/*
 * From guest offsets to extents: L1 and L2 look-ups through the whole chain.
 *
 * Look-ups take no lock. Whoever uses the result for I/O on the top layer is
 * inside an epoch from before the look-up to the end of the I/O. Each entry is
 * checked before it is used; what cannot be right gives -EIO and, on an image
 * that is written, marks it corrupt.
 */
#include <linux/qcow.h>

#include "qcow.h"
#include "trace.h"

/**
 * qcow_entry_load - an entry of an L1 or a refcount table
 * @image: whose
 * @block: the cached block
 * @index: of the entry in @block
 *
 * Return: the entry as one consistent value.
 */
u64 qcow_entry_load(struct qcow_image *image, struct qcow_block *block,
		    unsigned int index)
{
	const __be64 *entries = block->data;
	unsigned long flags;
	u64 value;

	if (sizeof(long) == sizeof(u64) || !image->writable)
		return be64_to_cpu(READ_ONCE(entries[index]));
	spin_lock_irqsave(&image->lock, flags);
	value = be64_to_cpu(entries[index]);
	spin_unlock_irqrestore(&image->lock, flags);
	return value;
}

/* An L2 entry is loaded and stored in one piece. */
static bool qcow_l2_is_word(const struct qcow_image *image)
{
	return sizeof(long) == sizeof(u64) && image->subclusters == 1;
}

static void qcow_l2_get(const struct qcow_image *image, const __be64 *words,
			unsigned int index, struct qcow_l2_entry *entry)
{
	if (image->subclusters == 1) {
		entry->descriptor = be64_to_cpu(words[index]);
		entry->bitmap = 0;
	} else {
		entry->descriptor = be64_to_cpu(words[2 * index]);
		entry->bitmap = be64_to_cpu(words[2 * index + 1]);
	}
}

/**
 * qcow_l2_load_raw - an entry of an L2 table as the cached block has it
 * @image: whose
 * @block: the cached block
 * @index: of the entry in @block
 *
 * Return: the entry as it was at one instant, perhaps a resolution.
 */
struct qcow_l2_entry qcow_l2_load_raw(struct qcow_image *image,
				      struct qcow_block *block,
				      unsigned int index)
{
	const __be64 *words = block->data;
	struct qcow_l2_entry entry;
	unsigned int seq;

	if (qcow_l2_is_word(image)) {
		entry.descriptor = be64_to_cpu(READ_ONCE(words[index]));
		entry.bitmap = 0;
		return entry;
	}
	do {
		seq = read_seqcount_begin(&block->seq);
		qcow_l2_get(image, words, index, &entry);
	} while (read_seqcount_retry(&block->seq, seq));
	return entry;
}

/**
 * qcow_l2_load - an entry of an L2 table
 * @image: whose
 * @block: the cached block
 * @index: of the entry in @block
 *
 * Return: the entry as it was at one instant.
 */
struct qcow_l2_entry qcow_l2_load(struct qcow_image *image,
				  struct qcow_block *block, unsigned int index)
{
	struct qcow_l2_entry entry = qcow_l2_load_raw(image, block, index);

	if (unlikely(qcow_is_resolution(block, entry.descriptor)))
		entry.descriptor = 0;
	return entry;
}

/**
 * qcow_l2_store_locked - change an entry of an L2 table
 * @image: whose
 * @block: the cached block, prepared
 * @index: of the entry in @block
 * @entry: the new value
 *
 * Context: image->lock is held, and interrupts are off.
 */
void qcow_l2_store_locked(struct qcow_image *image, struct qcow_block *block,
			  unsigned int index, struct qcow_l2_entry entry)
{
	__be64 *words = block->data;

	lockdep_assert_held(&image->lock);
	if (qcow_l2_is_word(image)) {
		WRITE_ONCE(words[index], cpu_to_be64(entry.descriptor));
		return;
	}
	write_seqcount_begin(&block->seq);
	if (image->subclusters == 1) {
		words[index] = cpu_to_be64(entry.descriptor);
	} else {
		words[2 * index] = cpu_to_be64(entry.descriptor);
		words[2 * index + 1] = cpu_to_be64(entry.bitmap);
	}
	write_seqcount_end(&block->seq);
}

static u64 qcow_l1_index(const struct qcow_image *image, u64 guest_offset)
{
	return guest_offset >> (image->cluster_bits + image->l2_bits);
}

/* Which block has the L1 entry for a guest offset, and where in it that is. */
static u64 qcow_l1_locate(const struct qcow_image *image, u64 guest_offset,
			  unsigned int *index)
{
	u64 host_offset = image->header.l1_table_offset +
			  qcow_l1_index(image, guest_offset) * sizeof(__be64);
	u32 mask = qcow_block_size(image) - 1;

	*index = (host_offset & mask) / sizeof(__be64);
	return host_offset & ~(u64)mask;
}

/* The same for the L2 entry. */
static u64 qcow_l2_locate(const struct qcow_image *image, u64 l1_entry,
			  u64 guest_offset, unsigned int *index)
{
	u32 entry = guest_offset >> image->cluster_bits &
		    ((1U << image->l2_bits) - 1);
	unsigned int per_block = qcow_l2_per_block(image);

	*index = entry & (per_block - 1);
	return (l1_entry & QCOW_L1_OFFSET_MASK) +
	       ((entry / per_block) << image->block_bits);
}

/**
 * qcow_l1_block - the cached block with the L1 entry for a guest offset
 * @image: a qcow2 image
 * @guest_offset: bytes, inside the L1 table's reach
 * @index: out: of the entry in the block
 *
 * Return: a pinned block or an ERR_PTR().
 */
struct qcow_block *qcow_l1_block(struct qcow_image *image, u64 guest_offset,
				 unsigned int *index)
{
	return qcow_block_get(image, qcow_l1_locate(image, guest_offset, index));
}

/* Check an L1 entry; one without an L2 table becomes 0. */
static int qcow_l1_check(struct qcow_image *image, u64 guest_offset, u64 *entry)
{
	u64 offset = *entry & QCOW_L1_OFFSET_MASK;

	if (*entry & QCOW_L1_RESERVED_MASK ||
	    offset & (qcow_cluster_size(image) - 1)) {
		qcow_image_corrupt(image, "L1 entry for guest offset 0x%llx is 0x%llx, not a cluster",
				   guest_offset, *entry);
		return -EIO;
	}
	if (!offset)
		*entry = 0;
	/* A table that is read there would be in the way of what comes there. */
	else if (image->writable &&
		 !qcow_image_has(image, offset, qcow_cluster_size(image))) {
		qcow_image_corrupt(image, "the L2 table for guest offset 0x%llx is at host offset 0x%llx, behind the end of the file",
				   guest_offset, offset);
		return -EIO;
	}
	return 0;
}

/*
 * A block of a table: pinned, read if need be; or only if it is in memory, and kept
 * there by the RCU read section that the caller is in.
 */
static struct qcow_block *qcow_table_get(struct qcow_image *image,
					 u64 host_offset, bool cached)
{
	if (!cached)
		return qcow_block_get(image, host_offset);
	return qcow_block_peek(image, host_offset) ?: ERR_PTR(-EAGAIN);
}

static void qcow_table_put(struct qcow_block *block, bool cached)
{
	if (!cached)
		qcow_block_put(block);
}

static int qcow_l1_lookup(struct qcow_image *image, u64 guest_offset,
			  bool cached, u64 *entry)
{
	struct qcow_block *block;
	unsigned int index;

	*entry = 0;
	if (qcow_l1_index(image, guest_offset) >= image->header.l1_size)
		return 0;
	block = qcow_table_get(image,
			       qcow_l1_locate(image, guest_offset, &index),
			       cached);
	if (IS_ERR(block))
		return PTR_ERR(block);
	*entry = qcow_entry_load(image, block, index);
	qcow_table_put(block, cached);
	return qcow_l1_check(image, guest_offset, entry);
}

/**
 * qcow_l1_entry - look up and check an L1 entry
 * @image: a qcow2 image
 * @guest_offset: bytes
 * @entry: out: 0 where there is no L2 table
 *
 * Return: 0, -EIO, or the errno of a read.
 */
int qcow_l1_entry(struct qcow_image *image, u64 guest_offset, u64 *entry)
{
	return qcow_l1_lookup(image, guest_offset, false, entry);
}

/**
 * qcow_l1_entry_cached - an L1 entry, if it is in memory
 * @image: a qcow2 image
 * @guest_offset: bytes, inside the L1 table's reach
 *
 * Context: image->lock is held, so that it does not change.
 *
 * Return: the entry, not checked; 0 if its block is not in memory.
 */
u64 qcow_l1_entry_cached(struct qcow_image *image, u64 guest_offset)
{
	struct qcow_block *block;
	unsigned int index;
	u64 entry = 0;

	rcu_read_lock();
	block = qcow_block_peek(image, qcow_l1_locate(image, guest_offset, &index));
	if (block)
		entry = be64_to_cpu(((const __be64 *)block->data)[index]);
	rcu_read_unlock();
	return entry;
}

/**
 * qcow_l2_find - where the L2 entry for a guest offset is, or would be
 * @image: a qcow2 image
 * @guest_offset: bytes
 * @cached: do not sleep; in an RCU read section
 * @host_offset: out: of the block; one that is virtual where there is no L2 table
 * @index: out: of the entry in the block
 *
 * Return: 0; -EAGAIN if that takes reading a table; -EIO; the errno of a read.
 */
int qcow_l2_find(struct qcow_image *image, u64 guest_offset, bool cached,
		 u64 *host_offset, unsigned int *index)
{
	u64 l1_entry, cluster = guest_offset >> image->cluster_bits;
	unsigned int per_block = qcow_l2_per_block(image);
	int err;

	err = qcow_l1_lookup(image, guest_offset, cached, &l1_entry);
	if (err)
		return err;
	if (l1_entry) {
		*host_offset = qcow_l2_locate(image, l1_entry, guest_offset,
					      index);
		return 0;
	}
	*index = cluster & (per_block - 1);
	*host_offset = QCOW_BLOCK_VIRTUAL |
		       (cluster >> ilog2(per_block)) << image->block_bits;
	return 0;
}

/**
 * qcow_l2_block - the cached block with the L2 entry for a guest offset
 * @image: a qcow2 image
 * @l1_entry: the L1 entry, not 0
 * @guest_offset: bytes
 * @index: out: of the entry in the block
 *
 * Return: a pinned block or an ERR_PTR().
 */
struct qcow_block *qcow_l2_block(struct qcow_image *image, u64 l1_entry,
				 u64 guest_offset, unsigned int *index)
{
	return qcow_block_get(image, qcow_l2_locate(image, l1_entry,
						    guest_offset, index));
}

/* How many of the lowest bits of @bits are set. */
static unsigned int qcow_low_bits(u32 bits)
{
	return bits == U32_MAX ? 32 : __ffs(~bits);
}

/* The same for the entry of a compressed cluster. */
static int qcow_l2_classify_packed(struct qcow_image *image, u64 descriptor,
				   u64 guest_offset,
				   struct qcow_l2_state *state)
{
	u32 cluster_size = qcow_cluster_size(image);
	u64 host_offset;
	u32 length;

	qcow_packed_range(image, descriptor, &host_offset, &length);
	/* There is nothing compressed in the header, which must not be freed. */
	if (qcow_is_external(image) || descriptor & QCOW_OFLAG_COPIED ||
	    host_offset < cluster_size ||
	    host_offset >= QCOW_MAX_HOST_OFFSET ||
	    (image->writable && !qcow_image_has(image, host_offset, 1))) {
		qcow_image_corrupt(image, "L2 entry for guest offset 0x%llx is 0x%llx, which is not valid for a compressed cluster",
				   guest_offset, descriptor);
		return -EIO;
	}
	/*
	 * The data may have ended before the file does; whether it has is seen when
	 * it is decompressed. But nobody has counted what it would go on in, which
	 * may become that of other data, and must not be freed with this.
	 */
	if (image->writable && !READ_ONCE(image->leaks) &&
	    !qcow_image_has(image, host_offset, length)) {
		WRITE_ONCE(image->leaks, true);
		pr_warn("qcow: %pD: the compressed data for guest offset 0x%llx goes on behind the end of the file; until it is detached, nothing is freed\n",
			image->file.file, guest_offset);
	}
	state->type = QCOW_EXTENT_COMPRESSED;
	state->mapped = false;
	state->exclusive = false;
	state->host_offset = 0;
	state->allocated = GENMASK(image->subclusters - 1, 0);
	state->length = cluster_size - (guest_offset & (cluster_size - 1));
	return 0;
}

/**
 * qcow_l2_classify - check an L2 entry and tell what it says
 * @image: a qcow2 image
 * @entry: the entry
 * @guest_offset: bytes, in the cluster that it is for
 * @state: out
 *
 * Return: 0; -EIO if the entry cannot be right.
 */
int qcow_l2_classify(struct qcow_image *image, struct qcow_l2_entry entry,
		     u64 guest_offset, struct qcow_l2_state *state)
{
	u32 allocated = lower_32_bits(entry.bitmap);
	u32 zero = upper_32_bits(entry.bitmap);
	u32 mask = qcow_cluster_size(image) - 1;
	unsigned int sub, run;
	bool misplaced = false;
	u32 same;

	if (entry.descriptor & QCOW_OFLAG_COMPRESSED)
		return qcow_l2_classify_packed(image, entry.descriptor,
					       guest_offset, state);
	state->host_offset = entry.descriptor & QCOW_L2_OFFSET_MASK;
	state->mapped = state->host_offset;
	state->exclusive = entry.descriptor & QCOW_OFLAG_COPIED;
	if (qcow_is_external(image)) {
		/* Nothing is shared there. */
		state->mapped |= state->exclusive;
		state->exclusive = true;
		misplaced = state->mapped &&
			    state->host_offset != (guest_offset & ~(u64)mask);
	}
	/* The flag of a cluster means nothing, where each subcluster has one. */
	if (image->subclusters == 1) {
		zero = entry.descriptor & QCOW_OFLAG_ZERO;
		allocated = state->mapped && !zero;
	}
	if (entry.descriptor & QCOW_L2_RESERVED_MASK || misplaced ||
	    state->host_offset & mask || allocated & zero ||
	    (allocated && !state->mapped) ||
	    (zero && image->header.version < 3)) {
		qcow_image_corrupt(image, "L2 entry for guest offset 0x%llx is 0x%llx 0x%llx, which is not valid",
				   guest_offset, entry.descriptor, entry.bitmap);
		return -EIO;
	}

	sub = qcow_subcluster(image, guest_offset);
	if (allocated & BIT(sub)) {
		state->type = QCOW_EXTENT_DATA;
		same = allocated;
	} else if (zero & BIT(sub)) {
		state->type = QCOW_EXTENT_ZERO;
		same = zero;
	} else {
		state->type = QCOW_EXTENT_UNALLOCATED;
		same = ~(allocated | zero);
	}
	state->allocated = allocated;
	run = min(qcow_low_bits(same >> sub), image->subclusters - sub);
	state->length = ((sub + run) << image->subcluster_bits) -
			(guest_offset & mask);
	return 0;
}

/* Follow the entries from @index on as long as they continue the first one. */
static int qcow_map_block(struct qcow_image *image, struct qcow_block *block,
			  unsigned int index, u64 guest_offset, u64 length,
			  struct qcow_extent *extent)
{
	u32 mask = qcow_cluster_size(image) - 1;
	u64 in_cluster = guest_offset & mask;
	struct qcow_l2_state first, next;
	struct qcow_l2_entry entry;
	int err;

	entry = qcow_l2_load(image, block, index);
	err = qcow_l2_classify(image, entry, guest_offset, &first);
	if (err)
		return err;
	extent->type = first.type;
	extent->host_offset = first.host_offset;
	extent->in_place = first.type == QCOW_EXTENT_DATA && first.exclusive;
	extent->length = first.length;
	if (first.type == QCOW_EXTENT_COMPRESSED) {
		extent->descriptor = entry.descriptor;
		extent->skip = in_cluster;
		return 0;
	}

	/* On to the next cluster, if all of this one is of the same type. */
	while (extent->length < length &&
	       !((guest_offset + extent->length) & mask) &&
	       ++index < qcow_l2_per_block(image)) {
		err = qcow_l2_classify(image, qcow_l2_load(image, block, index),
				       guest_offset + extent->length, &next);
		/* What is wrong there is for those who want to know. */
		if (err || next.type != first.type)
			break;
		if (next.type == QCOW_EXTENT_DATA &&
		    (next.host_offset != first.host_offset + in_cluster +
					 extent->length ||
		     next.exclusive != first.exclusive))
			break;
		extent->length += next.length;
	}
	if (extent->type == QCOW_EXTENT_DATA) {
		extent->host_offset += in_cluster;
		/* A write there would make the file as long as the entry says. */
		if (image->writable && !qcow_is_external(image) &&
		    !qcow_image_has(image, extent->host_offset,
				    extent->length)) {
			qcow_image_corrupt(image, "guest offset 0x%llx is mapped to host offset 0x%llx, behind the end of the file",
					   guest_offset, extent->host_offset);
			return -EIO;
		}
	}
	return 0;
}

/*
 * The block with the L2 entry for a guest offset, by way of the L1 entry; NULL if there
 * is no L2 table.
 */
static struct qcow_block *qcow_map_table(struct qcow_image *image,
					 u64 guest_offset, bool cached,
					 unsigned int *index)
{
	struct qcow_block *block;
	u64 entry;
	int err;

	err = qcow_l1_lookup(image, guest_offset, cached, &entry);
	if (err)
		return ERR_PTR(err);
	if (!entry)
		return NULL;
	block = qcow_table_get(image,
			       qcow_l2_locate(image, entry, guest_offset, index),
			       cached);
	if (!IS_ERR(block))
		qcow_shortcut_add(image, guest_offset, entry, block);
	return block;
}

static int qcow_map_lookup(struct qcow_image *image, u64 guest_offset,
			   u64 length, bool cached, struct qcow_extent *extent)
{
	struct qcow_block *block;
	unsigned int index;
	u64 reach;
	int err;

	extent->image = image;
	extent->in_place = false;
	extent->host_offset = 0;
	extent->length = length;
	if (guest_offset >= image->size) {
		extent->type = QCOW_EXTENT_ZERO;
		return 0;
	}
	length = min(length, image->size - guest_offset);
	extent->length = length;

	if (image->format == QCOW_FORMAT_RAW) {
		extent->type = QCOW_EXTENT_DATA;
		extent->host_offset = guest_offset;
		return 0;
	}

	block = cached ? qcow_shortcut_find(image, guest_offset, &index) : NULL;
	if (!block)
		block = qcow_map_table(image, guest_offset, cached, &index);
	if (IS_ERR(block))
		return PTR_ERR(block);
	if (!block) {
		reach = 1ULL << (image->cluster_bits + image->l2_bits);
		extent->type = QCOW_EXTENT_UNALLOCATED;
		extent->length = min(length, reach - (guest_offset & (reach - 1)));
		return 0;
	}
	err = qcow_map_block(image, block, index, guest_offset, length, extent);
	qcow_table_put(block, cached);
	extent->length = min(extent->length, length);
	return err;
}

static int qcow_map_one(struct qcow_image *image, u64 guest_offset, u64 length,
			bool cached, struct qcow_extent *extent)
{
	int err;

	if (!cached)
		return qcow_map_lookup(image, guest_offset, length, false,
				       extent);
	/* What is found stays in memory until it has been looked at. */
	rcu_read_lock();
	err = qcow_map_lookup(image, guest_offset, length, true, extent);
	rcu_read_unlock();
	return err;
}

/**
 * qcow_map_layer - what one layer has at a guest offset
 * @image: the layer
 * @guest_offset: bytes
 * @length: bytes that are of interest, at least 1
 * @extent: out; its length is 1 to @length
 *
 * Behind the end of a layer everything is zero.
 *
 * Context: may sleep and read tables.
 *
 * Return: 0, -EIO if a table is damaged, or the errno of a read.
 */
int qcow_map_layer(struct qcow_image *image, u64 guest_offset, u64 length,
		   struct qcow_extent *extent)
{
	return qcow_map_one(image, guest_offset, length, false, extent);
}

/**
 * qcow_map_layer_cached - the same, from what is in memory
 * @image: the layer
 * @guest_offset: bytes
 * @length: bytes that are of interest, at least 1
 * @extent: out; its length is 1 to @length
 *
 * Context: any; does not sleep.
 *
 * Return: 0; -EAGAIN if a table would have to be read; -EIO if one is damaged.
 */
int qcow_map_layer_cached(struct qcow_image *image, u64 guest_offset,
			  u64 length, struct qcow_extent *extent)
{
	return qcow_map_one(image, guest_offset, length, true, extent);
}

/* Look through the layers from *@layer on, which becomes the one that decides. */
static int qcow_map_walk(struct qcow_chain *chain, u64 guest_offset, u64 length,
			 bool cached, struct qcow_extent *extent,
			 unsigned int *layer)
{
	int err;

	extent->length = length;
	extent->type = QCOW_EXTENT_UNALLOCATED;
	for (; *layer < chain->depth; ++*layer) {
		err = qcow_map_one(chain->layers[*layer], guest_offset,
				   extent->length, cached, extent);
		if (err)
			return err;
		if (extent->type != QCOW_EXTENT_UNALLOCATED)
			return 0;
	}
	extent->type = QCOW_EXTENT_ZERO;
	return 0;
}

/* Find what is below the top layer, for whole clusters of that, and remember it. */
static int qcow_map_resolve(struct qcow_chain *chain, u64 guest_offset,
			    u64 length, struct qcow_extent *extent,
			    unsigned int *layer)
{
	struct qcow_image *image = chain->layers[0];
	u32 mask = qcow_cluster_size(image) - 1;
	u64 start = guest_offset & ~(u64)mask;
	u64 end = min((guest_offset + length + mask) & ~(u64)mask, image->size);
	u64 skip = guest_offset - start;
	int err;

	*layer = 1;
	err = qcow_map_walk(chain, start, end - start, false, extent, layer);
	if (!err)
		qcow_resolved_keep(chain, start, extent, *layer);
	else if (!skip && end - start == length)
		return err;
	if (err || extent->length <= skip) {
		*layer = 1;
		return qcow_map_walk(chain, guest_offset, length, false, extent,
				     layer);
	}
	if (extent->type == QCOW_EXTENT_DATA)
		extent->host_offset += skip;
	if (extent->type == QCOW_EXTENT_COMPRESSED)
		extent->skip += skip;
	extent->length = min(extent->length - skip, length);
	return 0;
}

/* The same as qcow_map_walk() from one of the first two layers on, for long chains. */
static int qcow_map_long(struct qcow_chain *chain, u64 guest_offset, u64 length,
			 bool cached, struct qcow_extent *extent,
			 unsigned int *layer)
{
	u64 left = chain->layers[0]->size - guest_offset;
	int found, err;

	length = min(length, left);
	/* A resolution stands where the top layer has nothing. */
	found = qcow_resolved_find(chain, guest_offset, length, extent, layer);
	if (found > 0 && extent->type != QCOW_EXTENT_UNALLOCATED)
		return 0;
	if (found > 0)
		return qcow_map_walk(chain, guest_offset, extent->length, cached,
				     extent, layer);
	if (!*layer) {
		err = qcow_map_one(chain->layers[0], guest_offset, length,
				   cached, extent);
		if (err || extent->type != QCOW_EXTENT_UNALLOCATED)
			return err;
		length = extent->length;
	}
	if (!found)
		return cached ? -EAGAIN :
				qcow_map_resolve(chain, guest_offset, length,
						 extent, layer);
	*layer = 1;
	return qcow_map_walk(chain, guest_offset, length, cached, extent, layer);
}

/* Layers from *@layer on, which becomes the one that decides. */
static int qcow_map_chain(struct qcow_chain *chain, u64 guest_offset,
			  u64 length, bool cached, struct qcow_extent *extent,
			  unsigned int *layer)
{
	int err;

	if (*layer < 2 && qcow_chain_resolves(chain) &&
	    guest_offset < chain->layers[0]->size)
		err = qcow_map_long(chain, guest_offset, length, cached, extent,
				    layer);
	else
		err = qcow_map_walk(chain, guest_offset, length, cached, extent,
				    layer);
	if (!err)
		trace_qcow_map(guest_offset, extent, *layer);
	return err;
}

/**
 * qcow_map - where the content of a guest range is
 * @chain: the layers
 * @first: where to begin: 0 for what the guest sees, 1 for what lies below the
 *	top layer
 * @guest_offset: bytes
 * @length: bytes that are of interest, at least 1
 * @extent: out: DATA, COMPRESSED or ZERO; its length is 1 to @length
 *
 * Context: may sleep and read tables.
 *
 * Return: as qcow_map_layer().
 */
int qcow_map(struct qcow_chain *chain, unsigned int first, u64 guest_offset,
	     u64 length, struct qcow_extent *extent)
{
	return qcow_map_chain(chain, guest_offset, length, false, extent, &first);
}

/**
 * qcow_map_cached - the same, from what is in memory
 * @chain: the layers
 * @guest_offset: bytes
 * @length: bytes that are of interest, at least 1
 * @extent: out, as for qcow_map()
 *
 * Context: any; does not sleep.
 *
 * Return: 0; -EAGAIN if a table would have to be read, or all of a long chain
 * walked through; -EIO if a table is damaged.
 */
int qcow_map_cached(struct qcow_chain *chain, u64 guest_offset, u64 length,
		    struct qcow_extent *extent)
{
	unsigned int layer = 0;

	return qcow_map_chain(chain, guest_offset, length, true, extent, &layer);
}

/**
 * qcow_chain_is_zero - does a whole range read as zeroes
 * @chain: the layers
 * @first: as for qcow_map()
 * @guest_offset: bytes
 * @length: bytes
 * @error: out: 0, or the errno of a look-up
 *
 * Return: true if the tables say so. Data that happens to be zero does not count.
 */
bool qcow_chain_is_zero(struct qcow_chain *chain, unsigned int first,
			u64 guest_offset, u64 length, int *error)
{
	struct qcow_extent extent;

	*error = 0;
	while (length) {
		*error = qcow_map(chain, first, guest_offset, length, &extent);
		if (*error || extent.type != QCOW_EXTENT_ZERO)
			return false;
		guest_offset += extent.length;
		length -= extent.length;
	}
	return true;
}

/* Read all of an extent. */
static int qcow_extent_read(const struct qcow_extent *extent, u64 guest_offset,
			    void *buf)
{
	struct kvec vec = { .iov_base = buf, .iov_len = extent->length };
	struct iov_iter iter;

	switch (extent->type) {
	case QCOW_EXTENT_DATA:
		return qcow_data_read(extent->image, buf, extent->length,
				      extent->host_offset, guest_offset);
	case QCOW_EXTENT_COMPRESSED:
		iov_iter_kvec(&iter, ITER_DEST, &vec, 1, extent->length);
		return qcow_unpack_read(extent->image, extent->descriptor,
					extent->skip, &iter);
	default:
		memset(buf, 0, extent->length);
		return 0;
	}
}

/**
 * qcow_chain_read - read a guest range, and wait for it
 * @chain: the layers
 * @guest_offset: bytes, a multiple of 512
 * @length: bytes, a multiple of 512
 * @buf: lowmem, physically contiguous
 *
 * Context: may sleep; not inside an epoch.
 *
 * Return: 0 or an errno.
 */
int qcow_chain_read(struct qcow_chain *chain, u64 guest_offset, u64 length,
		    void *buf)
{
	struct qcow_extent extent;
	int epoch, err;

	while (length) {
		epoch = qcow_image_enter(chain->layers[0]);
		err = qcow_map(chain, 0, guest_offset, length, &extent);
		if (!err)
			err = qcow_extent_read(&extent, guest_offset, buf);
		qcow_image_exit(chain->layers[0], epoch);
		if (err)
			return err;
		guest_offset += extent.length;
		buf += extent.length;
		length -= extent.length;
	}
	return 0;
}
