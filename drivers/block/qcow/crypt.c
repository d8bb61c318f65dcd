// SPDX-License-Identifier: GPL-2.0-only
/*
 * Encryption of the guest's data: LUKS, and the legacy AES of early images.
 *
 * Only data clusters are encrypted; tables are not, nor are compressed clusters.
 * Each sector of 512 bytes is encrypted by itself, with its number in the
 * initialisation vector: that in the data file for LUKS, so that what is copied is
 * encrypted anew for its place; that on the disk for legacy AES.
 *
 * Zeroes are encrypted like all else, and what is empty in the file does not decrypt
 * to zeroes. So nothing is left to holes, or to space that is known to be empty;
 * clusters that read as zeroes without having data say so in their L2 entry.
 *
 * Userspace unlocks the LUKS header. What comes here is the key of the volume: the
 * crypto API keeps it for as long as the image is open, and wipes it then.
 *
 * It takes a coder to do it: a request to the crypto API, and for what is to be
 * written memory, since the writer's own must not change. What was read is decrypted
 * where it is. Who has a coder waits for the crypto API and, to write, for the image's
 * file: not for another coder, a lock or a commit. So the one of each that is set
 * aside is enough for progress, and it may be taken inside an epoch. Reads have coders
 * of their own, and go on where writes cannot. The file may lie on another device of
 * this driver, which was there before this one and has coders of its own.
 */
#include <linux/ctype.h>
#include <linux/err.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <crypto/skcipher.h>

#include "qcow.h"

/* So much is encrypted and written at once. */
#define QCOW_CRYPT_ROOM		SZ_64K
#define QCOW_CRYPT_MAX_IV	32U

#define QCOW_AES_KEY_SIZE	16

/**
 * struct qcow_crypt - how the data of an image is encrypted
 * @tfm: the cipher, with its key
 * @guest: sectors are numbered as on the disk, not as in the file
 * @short_iv: only 32 bits of the number count
 * @iv_offset: of the initialisation vector in a coder's workspace
 * @readers: requests to decrypt with
 * @writers: requests to encrypt with, and memory
 */
struct qcow_crypt {
	struct crypto_skcipher *tfm;
	bool guest;
	bool short_iv;
	size_t iv_offset;
	struct qcow_coders readers;
	struct qcow_coders writers;
};

static int qcow_crypt_sector(struct qcow_crypt *crypt, struct qcow_coder *coder,
			     struct page *page, unsigned int offset, u64 sector,
			     bool encrypt)
{
	/* Aligned, so that nothing is allocated to align it. */
	void *iv = PTR_ALIGN(coder->workspace + crypt->iv_offset,
			     crypto_skcipher_alignmask(crypt->tfm) + 1);
	struct skcipher_request *req = coder->workspace;
	__le64 number = cpu_to_le64(crypt->short_iv ? (u32)sector : sector);
	struct scatterlist sg;
	DECLARE_CRYPTO_WAIT(wait);

	memset(iv, 0, QCOW_CRYPT_MAX_IV);
	memcpy(iv, &number, sizeof(number));
	sg_init_table(&sg, 1);
	sg_set_page(&sg, page, QCOW_SECTOR, offset);
	skcipher_request_set_tfm(req, crypt->tfm);
	skcipher_request_set_callback(req, CRYPTO_TFM_REQ_MAY_BACKLOG |
				      CRYPTO_TFM_REQ_MAY_SLEEP,
				      crypto_req_done, &wait);
	skcipher_request_set_crypt(req, &sg, &sg, QCOW_SECTOR, iv);
	return crypto_wait_req(encrypt ? crypto_skcipher_encrypt(req) :
					 crypto_skcipher_decrypt(req), &wait);
}

/* In place, all that the iterator describes; @sector is the number of the first. */
static int qcow_crypt_iter(struct qcow_crypt *crypt, struct qcow_coder *coder,
			   struct iov_iter *iter, u64 sector, bool encrypt)
{
	const struct bio_vec *vec;
	size_t offset;
	int err;

	for (; iov_iter_count(iter); iov_iter_advance(iter, QCOW_SECTOR)) {
		vec = iter->bvec;
		offset = vec->bv_offset + iter->iov_offset;
		if (vec->bv_len - iter->iov_offset < QCOW_SECTOR ||
		    offset & (QCOW_SECTOR - 1))
			return -EIO;
		err = qcow_crypt_sector(crypt, coder,
					pfn_to_page(page_to_pfn(vec->bv_page) +
						    (offset >> PAGE_SHIFT)),
					offset_in_page(offset), sector++,
					encrypt);
		if (err)
			return err;
	}
	return 0;
}

/* The number of a sector, as it goes into the initialisation vector. */
static u64 qcow_crypt_number(const struct qcow_crypt *crypt, u64 host_offset,
			     u64 guest_offset)
{
	return (crypt->guest ? guest_offset : host_offset) >> SECTOR_SHIFT;
}

/**
 * qcow_decrypt - decrypt data that was read from an image's file
 * @image: whose; it is encrypted
 * @iter: where it is, ITER_BVEC; is used up
 * @host_offset: where it was in the data file, bytes
 * @guest_offset: and on the disk
 *
 * Implements "Data encryption" of the specification. All offsets and lengths are
 * multiples of 512.
 *
 * Context: may sleep; inside an epoch as well.
 *
 * Return: 0 or an errno.
 */
int qcow_decrypt(struct qcow_image *image, struct iov_iter *iter,
		 u64 host_offset, u64 guest_offset)
{
	struct qcow_crypt *crypt = image->crypt;
	struct qcow_coder *coder = mempool_alloc(&crypt->readers.pool, GFP_NOIO);
	int err;

	err = qcow_crypt_iter(crypt, coder, iter,
			      qcow_crypt_number(crypt, host_offset,
						guest_offset), false);
	mempool_free(coder, &crypt->readers.pool);
	return err;
}

/**
 * qcow_encrypt_write - encrypt data, and write it to an image's file
 * @image: whose; it is encrypted
 * @iter: the data; is used up
 * @host_offset: where in the data file, bytes
 * @guest_offset: where on the disk
 * @iocb_flags: as for qcow_file_rw()
 *
 * Context: may sleep; inside an epoch as well.
 *
 * Return: 0 or an errno.
 */
int qcow_encrypt_write(struct qcow_image *image, struct iov_iter *iter,
		       u64 host_offset, u64 guest_offset, int iocb_flags)
{
	struct qcow_crypt *crypt = image->crypt;
	struct qcow_coder *coder = mempool_alloc(&crypt->writers.pool, GFP_NOIO);
	struct iov_iter data;
	size_t step;
	int err = 0;

	while (iov_iter_count(iter) && !err) {
		step = min_t(size_t, iov_iter_count(iter), QCOW_CRYPT_ROOM);
		if (copy_from_iter(coder->data, step, iter) != step) {
			err = -EIO;
			break;
		}
		/* From here on it is seen by its pages. */
		if (is_vmalloc_addr(coder->data))
			flush_kernel_vmap_range(coder->data, step);
		iov_iter_bvec(&data, ITER_SOURCE, coder->vecs, coder->nr_vecs,
			      step);
		err = qcow_crypt_iter(crypt, coder, &data,
				      qcow_crypt_number(crypt, host_offset,
							guest_offset), true);
		if (err)
			break;
		iov_iter_bvec(&data, ITER_SOURCE, coder->vecs, coder->nr_vecs,
			      step);
		err = qcow_file_rw(qcow_data_file(image), &data, host_offset,
				   iocb_flags);
		host_offset += step;
		guest_offset += step;
	}
	mempool_free(coder, &crypt->writers.pool);
	return err;
}

/**
 * qcow_data_read - read guest data into memory of the kernel
 * @image: whose
 * @buf: as for qcow_file_read()
 * @len: bytes
 * @host_offset: where in the data file, bytes
 * @guest_offset: where on the disk
 *
 * Context: may sleep; inside an epoch as well.
 *
 * Return: 0 or an errno.
 */
int qcow_data_read(struct qcow_image *image, void *buf, size_t len,
		   u64 host_offset, u64 guest_offset)
{
	struct bio_vec vec;
	struct iov_iter iter;
	int err;

	err = qcow_file_read(qcow_data_file(image), buf, len, host_offset);
	if (err || !image->crypt)
		return err;
	qcow_file_buf_iter(&iter, &vec, buf, len, ITER_DEST);
	return qcow_decrypt(image, &iter, host_offset, guest_offset);
}

/**
 * qcow_data_write - write guest data from memory of the kernel
 * @image: whose
 * @buf: as for qcow_file_write()
 * @len: bytes
 * @host_offset: where in the data file, bytes
 * @guest_offset: where on the disk
 *
 * Context: may sleep; inside an epoch as well.
 *
 * Return: 0 or an errno.
 */
int qcow_data_write(struct qcow_image *image, const void *buf, size_t len,
		    u64 host_offset, u64 guest_offset)
{
	struct bio_vec vec;
	struct iov_iter iter;

	if (!image->crypt)
		return qcow_file_write(qcow_data_file(image), buf, len,
				       host_offset);
	qcow_file_buf_iter(&iter, &vec, buf, len, ITER_SOURCE);
	return qcow_encrypt_write(image, &iter, host_offset, guest_offset, 0);
}

/**
 * qcow_data_write_zeroes - write guest data that is zero
 * @image: whose
 * @len: bytes
 * @host_offset: where in the data file, bytes
 * @guest_offset: where on the disk
 *
 * Context: may sleep; inside an epoch as well.
 *
 * Return: 0 or an errno.
 */
int qcow_data_write_zeroes(struct qcow_image *image, u64 len, u64 host_offset,
			   u64 guest_offset)
{
	struct bio_vec vecs[QCOW_CRYPT_ROOM / PAGE_SIZE ?: 1];
	struct iov_iter iter;
	unsigned int n;
	u64 step;
	int err = 0;

	if (!image->crypt)
		return qcow_file_write_zeroes(qcow_data_file(image), len,
					      host_offset);
	for (; len && !err; len -= step) {
		n = qcow_zero_bvecs(vecs, ARRAY_SIZE(vecs), len);
		step = min_t(u64, len, (u64)n * PAGE_SIZE);
		iov_iter_bvec(&iter, ITER_SOURCE, vecs, n, step);
		err = qcow_encrypt_write(image, &iter, host_offset,
					 guest_offset, 0);
		host_offset += step;
		guest_offset += step;
	}
	return err;
}

/* A part of a cipher's name, up to one of @ends or the end of the string. */
static bool qcow_crypt_word(const char **from, const char *ends, char *word,
			    size_t room)
{
	size_t len = strcspn(*from, ends), i;

	if (!len || len >= room)
		return false;
	for (i = 0; i < len; i++) {
		if (!isalnum((*from)[i]) && (*from)[i] != '_')
			return false;
		word[i] = (*from)[i];
	}
	word[len] = '\0';
	*from += len;
	return true;
}

/*
 * What the crypto API calls a cipher that LUKS calls cipher-mode[-generator[:hash]].
 */
static bool qcow_crypt_name(const char *spec, char *name, size_t room,
			    bool *short_iv)
{
	char cipher[32], mode[16], generator[16] = "", hash[32] = "";

	if (!qcow_crypt_word(&spec, "-", cipher, sizeof(cipher)) ||
	    *spec++ != '-' ||
	    !qcow_crypt_word(&spec, "-", mode, sizeof(mode)))
		return false;
	if (*spec == '-' && (++spec, !qcow_crypt_word(&spec, ":", generator,
						      sizeof(generator))))
		return false;
	if (*spec == ':' && (++spec, !qcow_crypt_word(&spec, "", hash,
						      sizeof(hash))))
		return false;
	*short_iv = !strcmp(generator, "plain");
	if (!strcmp(generator, "essiv") && hash[0])
		return snprintf(name, room, "essiv(%s(%s),%s)", mode, cipher,
				hash) < room;
	if (hash[0] || (strcmp(generator, "plain64") && !*short_iv &&
			(generator[0] || strcmp(mode, "ecb"))))
		return false;
	return snprintf(name, room, "%s(%s)", mode, cipher) < room;
}

/**
 * qcow_crypt_init - prepare to read and write encrypted data
 * @image: a qcow2 image
 * @key: its key, or NULL if there is none
 * @msg: where to say what is wrong
 *
 * Return: 0; -ENOKEY if the image is encrypted and there is no key; -EINVAL if the
 * key is not for the image; -EOPNOTSUPP if the kernel has no such cipher; -ENOMEM.
 */
int qcow_crypt_init(struct qcow_image *image, const struct qcow_key *key,
		    struct qcow_message *msg)
{
	char name[CRYPTO_MAX_ALG_NAME];
	struct qcow_crypt *crypt;
	size_t workspace_size;
	int err;

	if (image->header.crypt_method == QCOW_CRYPT_NONE) {
		if (!key)
			return 0;
		qcow_message_set(msg, "there is a key, but the image is not encrypted");
		return -EINVAL;
	}
	if (!key) {
		qcow_message_set(msg, "the image is encrypted, and there is no key");
		return -ENOKEY;
	}
	crypt = kzalloc(sizeof(*crypt), GFP_KERNEL);
	if (!crypt)
		return -ENOMEM;
	image->crypt = crypt;
	crypt->guest = image->header.crypt_method == QCOW_CRYPT_AES;
	if (!qcow_crypt_name(key->cipher, name, sizeof(name), &crypt->short_iv) ||
	    (crypt->guest && (strcmp(key->cipher, "aes-cbc-plain64") ||
			      key->size != QCOW_AES_KEY_SIZE))) {
		qcow_message_set(msg, "the cipher %s is not one for this image",
				 key->cipher);
		return -EINVAL;
	}
	/* Not one that allocates memory for each request, as requests may free it. */
	crypt->tfm = crypto_alloc_skcipher(name, 0, CRYPTO_ALG_ALLOCATES_MEMORY);
	if (IS_ERR(crypt->tfm)) {
		err = PTR_ERR(crypt->tfm);
		crypt->tfm = NULL;
		qcow_message_set(msg, "the kernel has no cipher %s: error %d",
				 name, -err);
		return err == -ENOENT ? -EOPNOTSUPP : err;
	}
	if (crypto_skcipher_ivsize(crypt->tfm) > QCOW_CRYPT_MAX_IV ||
	    QCOW_SECTOR % crypto_skcipher_blocksize(crypt->tfm)) {
		qcow_message_set(msg, "%s is no cipher for sectors", name);
		return -EINVAL;
	}
	err = crypto_skcipher_setkey(crypt->tfm, key->data, key->size);
	if (err) {
		qcow_message_set(msg, "%u bytes are no key for %s", key->size,
				 name);
		return err;
	}
	crypt->iv_offset = sizeof(struct skcipher_request) +
			   crypto_skcipher_reqsize(crypt->tfm);
	workspace_size = crypt->iv_offset + QCOW_CRYPT_MAX_IV +
			 crypto_skcipher_alignmask(crypt->tfm);
	return qcow_coders_init(&crypt->readers, workspace_size, 0) ?:
	       qcow_coders_init(&crypt->writers, workspace_size,
				QCOW_CRYPT_ROOM);
}

/**
 * qcow_crypt_exit - undo qcow_crypt_init(), even if that failed
 * @image: nobody reads or writes it any more
 */
void qcow_crypt_exit(struct qcow_image *image)
{
	struct qcow_crypt *crypt = image->crypt;

	if (!crypt)
		return;
	mempool_exit(&crypt->readers.pool);
	mempool_exit(&crypt->writers.pool);
	if (crypt->tfm)
		crypto_free_skcipher(crypt->tfm);
	kfree(crypt);
	image->crypt = NULL;
}
