// SPDX-License-Identifier: GPL-2.0-only
/*
 * Passphrases of encrypted images, and what follows from them. LUKS headers are the
 * business of libcryptsetup, which is given a copy in memory. The driver gets the
 * key of the volume. What is secret is in memory that is wiped, as far as it is
 * ours: the C library has a copy of what was typed. For a check or a repair qemu-img
 * inherits a file in memory that has the passphrase.
 */
#include <errno.h>
#include <libcryptsetup.h>
#include <linux/keyctl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "qcowctl.h"

#define TRIES			3
#define AES_KEY_SIZE		16

struct secret {
	char *data;		/* of libcryptsetup's, which wipes it when it is freed */
	size_t size;
};

/* What key_forget() wipes: the last passphrase of a file, and the keys of volumes */
static void **kept;
static size_t kept_count;

static void *keep(void *secret)
{
	kept = xreallocarray(kept, kept_count + 1, sizeof(*kept));
	kept[kept_count++] = secret;
	return secret;
}

static void *safe_alloc(size_t size)
{
	void *p = crypt_safe_alloc(size ?: 1);

	if (!p)
		out_of_memory();
	return p;
}

static void copy_secret(struct secret *secret, const char *data, size_t size)
{
	secret->data = safe_alloc(size);
	secret->size = size;
	memcpy(secret->data, data, size);
}

/* Move what is secret to where it is safe. */
static int move_secret(struct secret *secret, char *data, size_t size)
{
	copy_secret(secret, data, size);
	explicit_bzero(data, size);
	return EXIT_OK;
}

static void set_key(struct qcow_layer *layer, char *key, size_t size, const char *cipher)
{
	layer->flags |= QCOW_LAYER_KEY;
	layer->key = (uintptr_t)keep(key);
	layer->key_size = size;
	layer->cipher = (uintptr_t)cipher;
	layer->cipher_size = strlen(cipher);
}

/*
 * The next of the files in the list; the last one is for all that follow, and is read
 * once, as it may be a pipe.
 */
static int read_key_file(struct chain *chain, struct secret *secret)
{
	static struct secret last;
	const char *files = chain->key_files;
	size_t length = strcspn(files, "\n");
	autofree char *name = xasprintf("%.*s", (int)length, files);
	bool standard_input = !strcmp(name, "-");
	int err = 0;

	if (!last.data) {
		/* What libcryptsetup makes of a file that is not there is not clear. */
		err = !standard_input && access(name, R_OK) ? -errno :
		      crypt_keyfile_device_read(NULL, standard_input ? NULL : name,
						&secret->data, &secret->size, 0, 0, 0);
		if (err)
			return fail(exit_of_errno(-err), "%s: cannot be read as a key file: %s; check --key-file",
				    name, strerror(-err));
		if (!files[length]) {
			last = *secret;
			keep(last.data);
		}
	}
	if (files[length])
		chain->key_files += length + 1;
	else
		copy_secret(secret, last.data, last.size);
	return EXIT_OK;
}

static int read_keyring(const char *name, struct secret *secret)
{
	char data[32768];
	long id = syscall(SYS_request_key, "user", name, NULL, 0), size = -1;

	if (id >= 0)
		size = syscall(SYS_keyctl, KEYCTL_READ, id, data, sizeof(data));
	if (size < 0 || size > (long)sizeof(data))
		return fail(EXIT_DENIED, "the keyring has no key 'user' '%s' that can be read: %m; see keyctl(1)",
			    name);
	return move_secret(secret, data, size);
}

static int prompt(const char *path, struct secret *secret)
{
	autofree char *shown = printable(path);
	autofree char *text = xasprintf("Passphrase of %s: ", shown);
	char *answer = isatty(STDIN_FILENO) ? getpass(text) : NULL;

	if (!answer)
		return fail(EXIT_DENIED, "%s: is encrypted, and there is no terminal to ask for its passphrase; use --key-file or --keyring",
			    path);
	return move_secret(secret, answer, strlen(answer));
}

static void no_log(int level, const char *message, void *data)
{
	(void)level;
	(void)message;
	(void)data;
}

/* The LUKS header of an image, for libcryptsetup, by way of a file in memory. */
static int load_luks(int fd, const char *path, const struct header *header, int copy,
		     struct crypt_device **luks)
{
	autofree char *name = xasprintf("/proc/self/fd/%d", copy);
	autofree char *buf = xreallocarray(NULL, header->luks_size, 1);
	ssize_t size = header->luks_size;
	int err;

	/* For what ends too early. */
	if (copy >= 0)
		errno = ENODATA;
	/* There must be room behind it, where others have the data. */
	if (copy < 0 || pread(fd, buf, size, header->luks_offset) != size ||
	    pwrite(copy, buf, size, 0) != size || ftruncate(copy, 2 * MAX_LUKS_SIZE))
		return fail(EXIT_SYSTEM, "%s: its LUKS header cannot be read: %m; see qemu-img check",
			    path);
	err = crypt_init(luks, name) ?: crypt_load(*luks, CRYPT_LUKS1, NULL);
	if (err)
		return fail(EXIT_REFUSED, "%s: its LUKS header is damaged, or not one of LUKS 1: %s",
			    path, strerror(-err));
	return EXIT_OK;
}

static int unlock_luks(struct crypt_device *luks, const char *path,
		       const struct secret *secret, struct qcow_layer *layer)
{
	size_t size = crypt_get_volume_key_size(luks);
	char *key = safe_alloc(size), *cipher;
	int slot;

	slot = crypt_volume_key_get(luks, CRYPT_ANY_SLOT, key, &size, secret->data,
				    secret->size);
	if (slot == -EPERM)
		return fail(EXIT_DENIED, "%s: that is not its passphrase; check it, and what is given with --key-file or --keyring",
			    path);
	if (slot < 0)
		return fail(EXIT_SYSTEM, "%s: libcryptsetup cannot unlock it, with the cipher %s-%s: %s",
			    path, crypt_get_cipher(luks), crypt_get_cipher_mode(luks),
			    strerror(-slot));
	cipher = xasprintf("%s-%s", crypt_get_cipher(luks), crypt_get_cipher_mode(luks));
	set_key(layer, key, size, cipher);
	return EXIT_OK;
}

/* A wrong passphrase cannot be told. */
static int unlock_aes(const char *path, const struct secret *secret, struct qcow_layer *layer)
{
	autofree char *plain = plain_path(path);
	autofree char *image = shell_quote(plain);
	char *key = safe_alloc(AES_KEY_SIZE);

	memset(key, 0, AES_KEY_SIZE);
	memcpy(key, secret->data, secret->size < AES_KEY_SIZE ? secret->size : AES_KEY_SIZE);
	set_key(layer, key, AES_KEY_SIZE, "aes-cbc-plain64");
	return fail(EXIT_OK, "warning: %s: its AES encryption is insecure, and a wrong passphrase goes unnoticed; convert it: qemu-img convert --object secret,id=key,file=KEYFILE --image-opts -O qcow2 -o encrypt.format=luks,encrypt.key-secret=key driver=qcow2,encrypt.format=aes,encrypt.key-secret=key,file.filename=%s NEW",
		    path, image);
}

/* Leave a secret for qemu-img: a file in memory, which it inherits; or -1. */
static int leave(const struct secret *secret)
{
	int fd = memfd_create("secret", 0);

	return fd < 0 || write(fd, secret->data, secret->size) != (ssize_t)secret->size ?
	       -1 : fd;
}

int key_unlock(struct chain *chain, const struct header *header, struct qcow_layer *layer)
{
	bool asks = !chain->key_files && !chain->keyring;
	bool for_qemu = layer == chain->layers &&
			(chain->image_only || header->incompatible & INCOMPAT_DIRTY);
	int copy = memfd_create("luks", MFD_CLOEXEC), ret = EXIT_OK, tries = 0;
	struct crypt_device *luks = NULL;
	const char *path = chain->image;
	struct secret secret = { NULL, 0 };

	crypt_set_log_callback(NULL, no_log, NULL);
	if (header->encryption == QCOW_ENCRYPTION_LUKS)
		ret = load_luks(layer->fd, path, header, copy, &luks);
	while (!ret) {
		ret = chain->key_files ? read_key_file(chain, &secret) :
		      chain->keyring ? read_keyring(chain->keyring, &secret) :
				       prompt(path, &secret);
		if (ret)
			break;
		ret = luks ? unlock_luks(luks, path, &secret, layer) :
			     unlock_aes(path, &secret, layer);
		if (!ret && for_qemu)
			chain->secret = leave(&secret);
		crypt_safe_free(secret.data);
		if (ret != EXIT_DENIED || !asks || ++tries == TRIES)
			break;
		ret = EXIT_OK;
	}
	if (luks)
		crypt_free(luks);
	close(copy);
	return ret;
}

void key_forget(void)
{
	while (kept_count)
		crypt_safe_free(kept[--kept_count]);
}
