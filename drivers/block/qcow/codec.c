// SPDX-License-Identifier: GPL-2.0-only
/*
 * The compression algorithms, and the memory that they work in.
 *
 * A coder is what one cluster needs while it is compressed or decompressed. Coders
 * are few and large, and whoever needs one waits for it; so no one who has one may
 * wait for somebody who may be waiting for another. compress.c and pack.c say why
 * they do not.
 */
#include <linux/cpumask.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/zlib.h>
#include <linux/zstd.h>

#include "qcow.h"

/* Coders that may always be in use at once, in bytes and for each CPU. */
#define QCOW_CODERS_BYTES	SZ_8M
#define QCOW_CODERS_PER_CPU	2

/* As QEMU compresses */
#define QCOW_ZLIB_WINDOW_BITS	12
#define QCOW_ZSTD_LEVEL		3

static size_t qcow_zlib_unpack_size(void)
{
	return zlib_inflate_workspacesize();
}

static z_stream qcow_zlib_stream(const struct qcow_coder *coder, const void *src,
				 u32 src_len, void *dst, u32 dst_len)
{
	return (z_stream) {
		.workspace = coder->workspace,
		.next_in = src,
		.avail_in = src_len,
		.next_out = dst,
		.avail_out = dst_len,
	};
}

/*
 * Raw deflate. QEMU writes with a window of 4 KiB, others with one of 32 KiB. The
 * output being full is what counts: the end mark of the stream may be missing.
 */
static int qcow_zlib_unpack(struct qcow_coder *coder, const void *src,
			    u32 src_len, void *dst, u32 dst_len)
{
	z_stream stream = qcow_zlib_stream(coder, src, src_len, dst, dst_len);
	int ret;

	if (zlib_inflateInit2(&stream, -MAX_WBITS) != Z_OK)
		return -EIO;
	ret = zlib_inflate(&stream, Z_FINISH);
	zlib_inflateEnd(&stream);
	if (ret != Z_STREAM_END && ret != Z_BUF_ERROR)
		return -EIO;
	return stream.avail_out ? -EIO : 0;
}

static size_t qcow_zlib_pack_size(u32 cluster_size)
{
	return zlib_deflate_workspacesize(QCOW_ZLIB_WINDOW_BITS, MAX_MEM_LEVEL);
}

/* QEMU decompresses with a window of 4 KiB. */
static u32 qcow_zlib_pack(struct qcow_coder *coder, const void *src,
			  u32 src_len, void *dst, u32 dst_len)
{
	z_stream stream = qcow_zlib_stream(coder, src, src_len, dst, dst_len);
	int ret;

	if (zlib_deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED,
			      -QCOW_ZLIB_WINDOW_BITS, MAX_MEM_LEVEL,
			      Z_DEFAULT_STRATEGY) != Z_OK)
		return 0;
	ret = zlib_deflate(&stream, Z_FINISH);
	zlib_deflateEnd(&stream);
	return ret == Z_STREAM_END ? dst_len - stream.avail_out : 0;
}

static size_t qcow_zstd_unpack_size(void)
{
	return zstd_dctx_workspace_bound();
}

/*
 * One frame after the other until the cluster is full. Frame by frame the window
 * of the decoder is the output itself; as a stream each would need memory for the
 * window that its header asks for, which may be far more than a cluster.
 */
static int qcow_zstd_unpack(struct qcow_coder *coder, const void *src,
			    u32 src_len, void *dst, u32 dst_len)
{
	size_t frame, got;
	zstd_dctx *dctx;

	dctx = zstd_init_dctx(coder->workspace, coder->workspace_size);
	if (!dctx)
		return -EIO;
	while (dst_len) {
		frame = zstd_find_frame_compressed_size(src, src_len);
		if (zstd_is_error(frame) || !frame || frame > src_len)
			return -EIO;
		got = zstd_decompress_dctx(dctx, dst, dst_len, src, frame);
		if (zstd_is_error(got) || got > dst_len)
			return -EIO;
		src += frame;
		src_len -= frame;
		dst += got;
		dst_len -= got;
		cond_resched();
	}
	return 0;
}

static size_t qcow_zstd_pack_size(u32 cluster_size)
{
	zstd_parameters params = zstd_get_params(QCOW_ZSTD_LEVEL, cluster_size);

	return zstd_cctx_workspace_bound(&params.cParams);
}

static u32 qcow_zstd_pack(struct qcow_coder *coder, const void *src,
			  u32 src_len, void *dst, u32 dst_len)
{
	zstd_parameters params = zstd_get_params(QCOW_ZSTD_LEVEL, src_len);
	zstd_cctx *cctx;
	size_t len;

	cctx = zstd_init_cctx(coder->workspace, coder->workspace_size);
	if (!cctx)
		return 0;
	len = zstd_compress_cctx(cctx, dst, dst_len, src, src_len, &params);
	return zstd_is_error(len) ? 0 : len;
}

static const struct qcow_codec qcow_codecs[] = {
	[QCOW_COMPRESSION_ZLIB] = {
		.unpack_size = qcow_zlib_unpack_size,
		.unpack = qcow_zlib_unpack,
		.pack_size = qcow_zlib_pack_size,
		.pack = qcow_zlib_pack,
	},
	[QCOW_COMPRESSION_ZSTD] = {
		.unpack_size = qcow_zstd_unpack_size,
		.unpack = qcow_zstd_unpack,
		.pack_size = qcow_zstd_pack_size,
		.pack = qcow_zstd_pack,
	},
};

/**
 * qcow_codec - the algorithm of an image
 * @image: a qcow2 image; header.c knows the same algorithms
 *
 * Return: the algorithm that all of its compressed clusters are of.
 */
const struct qcow_codec *qcow_codec(const struct qcow_image *image)
{
	return &qcow_codecs[image->header.compression_type];
}

static void qcow_coder_destroy(struct qcow_coder *coder)
{
	kvfree(coder->workspace);
	kvfree(coder->data);
	kvfree(coder);
}

static struct qcow_coder *qcow_coder_create(const struct qcow_coders *coders,
					    gfp_t gfp)
{
	size_t i, pages = coders->room >> PAGE_SHIFT;
	struct qcow_coder *coder;

	coder = kvzalloc(struct_size(coder, vecs, pages), gfp);
	if (!coder)
		return NULL;
	coder->workspace_size = coders->workspace_size;
	coder->workspace = kvmalloc(coder->workspace_size, gfp);
	coder->data = kvmalloc(coders->room, gfp);
	if (!coder->workspace || !coder->data) {
		qcow_coder_destroy(coder);
		return NULL;
	}
	coder->nr_vecs = pages;
	for (i = 0; i < pages; i++) {
		void *page = coder->data + i * PAGE_SIZE;

		coder->vecs[i].bv_page = is_vmalloc_addr(page) ?
					 vmalloc_to_page(page) :
					 virt_to_page(page);
		coder->vecs[i].bv_len = PAGE_SIZE;
	}
	return coder;
}

/*
 * The pool asks first without waiting, and has a coder of its own if that fails:
 * this keeps one in use that is warm, and makes more only for those that come at
 * the same time.
 */
static void *qcow_coder_pool_alloc(gfp_t gfp, void *data)
{
	struct qcow_coders *coders = data;
	struct qcow_coder *coder = NULL;

	if (!gfpflags_allow_blocking(gfp))
		return NULL;
	if (atomic_inc_return(&coders->nr) <= coders->max)
		coder = qcow_coder_create(coders, gfp);
	if (!coder)
		atomic_dec(&coders->nr);
	return coder;
}

static void qcow_coder_pool_free(void *element, void *data)
{
	struct qcow_coders *coders = data;

	qcow_coder_destroy(element);
	atomic_dec(&coders->nr);
}

/**
 * qcow_coders_init - set one coder aside, and allow more
 * @coders: zeroed, or emptied by mempool_exit(&coders->pool)
 * @workspace_size: bytes that the algorithm needs
 * @room: bytes of data that each is to hold
 *
 * They are taken from @coders->pool and given back to it.
 *
 * Return: 0 or -ENOMEM.
 */
int qcow_coders_init(struct qcow_coders *coders, size_t workspace_size,
		     size_t room)
{
	coders->workspace_size = workspace_size;
	coders->room = round_up(room, PAGE_SIZE);
	coders->max = max_t(u32, QCOW_CODERS_BYTES /
				 (workspace_size + coders->room),
			    QCOW_CODERS_PER_CPU * num_online_cpus());
	return mempool_init(&coders->pool, 1, qcow_coder_pool_alloc,
			    qcow_coder_pool_free, coders);
}
