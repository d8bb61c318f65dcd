/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of qcowctl have for each other.
 *
 * Where nothing else is said, what returns int returns an exit code, after a
 * message if that is not EXIT_OK; and strings and arrays that are returned are to
 * be freed. A process does one thing and ends: what lives as long, it does not
 * free or close.
 */
#ifndef QCOWCTL_H
#define QCOWCTL_H

#include <linux/qcow.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>

/* Stable; qcowctl.8 and "qcowctl --help" say what each is for. */
enum qcowctl_exit {
	EXIT_OK = 0, EXIT_SYSTEM = 1, EXIT_USAGE = 2, EXIT_REFUSED = 3, EXIT_BUSY = 4,
	EXIT_ABSENT = 5, EXIT_DENIED = 6, EXIT_LEAKS = 7,
};

/* main.c: the commands */

#define MAX_OPTIONS	24

struct option_help {
	int letter;		/* or any number below MAX_OPTIONS that is not 0 */
	const char *name;
	const char *value;	/* what it takes, for people, in [] if it may; NULL for nothing */
	const char *help;
	bool many;		/* given again, it adds a line to its value */
};

struct command {
	const char *name;
	const char *operands;	/* for people */
	const char *summary;
	const struct option_help *options;	/* up to one without a name */
	int min, max;		/* number of operands; a max of -1 is no limit */
	void (*more_help)(void);	/* prints the end of its help; or NULL */
	/*
	 * @values: of each option, by its place in @options: NULL where it was not
	 * given, "" where it takes none. @operands ends with NULL.
	 */
	int (*run)(const char * const *values, char **operands);
};

extern const struct command attach_command, detach_command, list_command, info_command,
			    check_command;

/* chain.c: an image and the files that belong to it, open, locked, in order */

struct chain {
	/* What is wanted. */
	bool read_only;			/* the image, as the others always are */
	bool must_write;		/* or else: not even if it can only be read */
	bool image_only;		/* no keys for its backing files */
	const char *data_file;		/* of the image; NULL: what its header says */
	int backing_format;		/* where no header names it; or 0 */
	const char *key_files;		/* a line for each encrypted layer; or NULL */
	const char *keyring;		/* the name of a key in it; or NULL */

	/* What was found. */
	struct qcow_layer *layers;	/* for the driver, the image first */
	unsigned int layer_count;
	struct chain_file {
		const char *path;
		struct stat st;
	} *files;			/* all that are open, to find loops */
	unsigned int file_count;
	const char *image;		/* path of the last layer */
	int secret;			/* file with the image's passphrase, for qemu-img */
};

struct header;
int chain_open(struct chain *chain, const char *image);

/*
 * key.c: ask for the passphrase of a layer, the last one, and fill in its key; wipe
 * all keys.
 */
int key_unlock(struct chain *chain, const struct header *header, struct qcow_layer *layer);
void key_forget(void);

/*
 * check.c: repair a chain's image, opened for writing, if it has the dirty bit, or
 * @refuse to. Says what it does.
 */
int repair_dirty(const struct chain *chain, bool refuse);

/*
 * The image @image, with its data file or NULL, by a name with which QEMU opens it
 * alone, without locks, and without probing what is below. With an @encryption
 * (QCOW_ENCRYPTION_*), the passphrase is the secret "key".
 */
char *qemu_name(const char *image, const char *data, int encryption);

/* Run a program, without its output if @quiet; what it exits with, or 127. */
int run_program(char **argv, bool quiet);

/* header.c: what a header says of other files, and "" where it says nothing */
struct header {
	uint64_t size;			/* of the disk, bytes */
	uint64_t incompatible;		/* features; version 2 has none */
	uint64_t autoclear;
	uint32_t snapshots;		/* how many */
	bool bitmaps;			/* looked for where there are snapshots */
	uint32_t encryption;		/* QCOW_ENCRYPTION_* */
	uint64_t luks_offset;		/* of the LUKS header, bytes */
	uint64_t luks_size;		/* 1 to MAX_LUKS_SIZE, with LUKS */
	char backing_name[1024];
	char backing_format[16];
	char data_name[4096];
};

#define MAX_LUKS_SIZE		(64U << 20)

#define INCOMPAT_DIRTY		1
#define INCOMPAT_CORRUPT	2
#define INCOMPAT_DATA_FILE	4

/* Read the header of a file that is said to be qcow2; by the user, if @top. */
int header_read(int fd, const char *path, bool top, struct header *header);

/* True if the file begins like a qcow2 image: for hints, never to decide. */
bool has_qcow2_magic(int fd);

/*
 * Find the file that the name @name means in the header of @image, a
 * path. Messages begin with @whose. *@format becomes a QCOW_FORMAT_* if the name
 * itself says it (json:), else 0.
 */
int backing_resolve(const char *image, const char *whose, const char *name,
		    char **path, int *format);
int format_refused(const char *whose, const char *format);

/* @path so that QEMU takes it neither for PROTOCOL:NAME nor for an option. */
char *plain_path(const char *path);

/*
 * control.c: the control node and names of devices. What fails here prints nothing
 * and sets errno, for control_error() to say.
 */
bool control_open(void);	/* before the rest, and done once */
int control_error(void);

/* Return 0, or the call's errno. */
int control_call(unsigned int request, void *call);

/* The numbers of all devices, ascending, with -1 at the end; or NULL. */
int *control_list(void);

/* The path of a file of a device's chain, until the next call; or NULL. */
const char *control_layer(int index, unsigned int layer, struct qcow_layer_status *status);

/*
 * Like control_list(), of those devices that have the file @st (named @path, if not
 * NULL) as their image, or with @any_layer anywhere in their chain.
 */
int *control_find(const struct stat *st, const char *path, bool any_layer);

/*
 * The number that "/dev/qcow7", "qcow7", "7" or a link to the node names, or -1
 * for any other @name.
 */
int device_number(const char *name);

/* What is in a file of /sys/block/qcowN/qcow, or NULL. */
char *attribute(int index, const char *name);

/* Say that a device is not there. */
int not_attached(const char *name);

/* QCOW_FORMAT_* of "raw" or "qcow2", 0 for any other name. */
int format_of_name(const char *name);
const char *name_of_format(int format);

/* By QCOW_DISCARD_* */
extern const char * const discard_names[3];
extern const char * const compress_names[4];

/*
 * users.c: phrases, or NULL where nobody is to be seen.
 *
 * lock_holder: who has an advisory lock on @byte of the file @st, as "PID (command)"
 * or "/dev/qcowN".
 * device_holder: what keeps a device in use until somebody undoes it, a mount for
 * example: "mounted on /mnt".
 * device_swap: the node of it, or of a partition, that is in use as swap.
 * device_openers: "open in PID (command)", of processes; never NULL.
 */
char *lock_holder(const struct stat *st, int byte);
char *device_holder(int index);
char *device_swap(int index);
char *device_openers(int index);

/* util.c: messages, strict parsing, strings */

static inline void free_pointer(void *pointer)
{
	free(*(void **)pointer);
}

/* Of a local pointer: free it at the end of its scope. */
#define autofree	__attribute__((cleanup(free_pointer)))

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

/*
 * Print "qcowctl: MESSAGE" as exactly one line on standard error, whatever bytes
 * the file names in it have. fail() returns @code for "return fail(...)".
 */
int fail(enum qcowctl_exit code, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* The exit code that an errno from opening or reading a file calls for. */
enum qcowctl_exit exit_of_errno(int err);

/* Without memory the process ends with EXIT_SYSTEM: these never return NULL. */
_Noreturn void out_of_memory(void);
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void *xreallocarray(void *p, size_t n, size_t size);
#define xstrdup(s)	xasprintf("%s", s)

/* @s with its control characters escaped, as names of files may have them. */
char *printable(const char *s);

/* Append @item to the comma-separated list *@list, which may be NULL. */
void list_append(char **list, const char *item);

/* @s as one word for a shell, quoted only where it has to be. */
char *shell_quote(const char *s);

/* Decimal, nothing before or after it. */
bool parse_number(const char *s, int *number);

/* The same with an optional K, M, G or T, or k, m, g, t (powers of 1024). */
bool parse_size(const char *s, uint64_t *bytes);

/* True if both are the same file, or nodes of the same block device. */
bool same_file(const struct stat *a, const struct stat *b);

/* What a small file (of /sys or /proc) has but the end of its last line, or NULL. */
char *read_text(const char *path);

#endif /* QCOWCTL_H */
