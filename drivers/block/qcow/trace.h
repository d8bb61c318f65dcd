/* SPDX-License-Identifier: GPL-2.0-only */
/* Trace events: mapping, allocation, table reads, write-out, flush. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM qcow

#if !defined(QCOW_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define QCOW_TRACE_H

#include <linux/tracepoint.h>

struct qcow_image;

/* Which file: the inode tells images apart without a string in each event. */
DECLARE_EVENT_CLASS(qcow_host,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error),
	TP_STRUCT__entry(
		__field(u64, ino)
		__field(u64, host_offset)
		__field(u64, length)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->ino = file_inode(image->file.file)->i_ino;
		__entry->host_offset = host_offset;
		__entry->length = length;
		__entry->error = error;
	),
	TP_printk("ino=%llu host_offset=0x%llx length=%llu error=%d",
		  __entry->ino, __entry->host_offset, __entry->length,
		  __entry->error)
);

/* A block of a table was read because the cache did not have it. */
DEFINE_EVENT(qcow_host, qcow_table_read,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* A compressed cluster was read and decompressed. */
DEFINE_EVENT(qcow_host, qcow_unpack,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* A compressed cluster was written; it may begin and end within a sector. */
DEFINE_EVENT(qcow_host, qcow_pack,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* A run of dirty blocks was written by a commit. */
DEFINE_EVENT(qcow_host, qcow_write_out,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* Clusters were taken. */
DEFINE_EVENT(qcow_host, qcow_allocate,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* Clusters lost their last reference and may be taken again. */
DEFINE_EVENT(qcow_host, qcow_free,
	TP_PROTO(const struct qcow_image *image, u64 host_offset, u64 length,
		 int error),
	TP_ARGS(image, host_offset, length, error));

/* A commit ended; step is the last one that it began. */
TRACE_EVENT(qcow_commit,
	TP_PROTO(const struct qcow_image *image, int step, int error),
	TP_ARGS(image, step, error),
	TP_STRUCT__entry(
		__field(u64, ino)
		__field(int, step)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->ino = file_inode(image->file.file)->i_ino;
		__entry->step = step;
		__entry->error = error;
	),
	TP_printk("ino=%llu step=%d error=%d", __entry->ino, __entry->step,
		  __entry->error)
);

/* A guest range was resolved to an extent. */
TRACE_EVENT(qcow_map,
	TP_PROTO(u64 guest_offset, const struct qcow_extent *extent,
		 unsigned int layer),
	TP_ARGS(guest_offset, extent, layer),
	TP_STRUCT__entry(
		__field(u64, guest_offset)
		__field(u64, host_offset)
		__field(u64, length)
		__field(unsigned int, type)
		__field(unsigned int, layer)
	),
	TP_fast_assign(
		__entry->guest_offset = guest_offset;
		__entry->host_offset = extent->host_offset;
		__entry->length = extent->length;
		__entry->type = extent->type;
		__entry->layer = layer;
	),
	TP_printk("guest_offset=0x%llx type=%s layer=%u host_offset=0x%llx length=%llu",
		  __entry->guest_offset,
		  __print_symbolic(__entry->type,
				   { QCOW_EXTENT_UNALLOCATED, "unallocated" },
				   { QCOW_EXTENT_ZERO, "zero" },
				   { QCOW_EXTENT_DATA, "data" },
				   { QCOW_EXTENT_COMPRESSED, "compressed" }),
		  __entry->layer, __entry->host_offset, __entry->length)
);

#endif /* QCOW_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
