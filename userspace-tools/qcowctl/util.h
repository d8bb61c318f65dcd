/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What every part of qcowctl needs: exit codes, one-line messages, strict
 * parsing, strings.
 */
#ifndef QCOWCTL_UTIL_H
#define QCOWCTL_UTIL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>

/* The exit codes. Stable; qcowctl.8 and "qcowctl --help" list the same. */
#define QCOWCTL_EXITS(X)						\
	X(EXIT_OK,		0, "success")				\
	X(EXIT_SYSTEM,		1, "the system failed: I/O, memory, a missing program") \
	X(EXIT_USAGE,		2, "wrong usage")			\
	X(EXIT_REFUSED,		3, "image refused: not qcow2, damaged, unsupported") \
	X(EXIT_BUSY,		4, "busy: locked, in use, or the number is taken") \
	X(EXIT_ABSENT,		5, "no such device or file")		\
	X(EXIT_DENIED,		6, "not permitted, or the driver is not loaded") \
	X(EXIT_LEAKS,		7, "check: leaked clusters and nothing worse")

enum qcowctl_exit {
#define X(name, code, text)	name = code,
	QCOWCTL_EXITS(X)
#undef X
};

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
void warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* The exit code that an errno from opening or reading a file calls for. */
enum qcowctl_exit exit_of_errno(int err);

/* Never return NULL: without memory the process ends with EXIT_SYSTEM. */
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
char *xstrdup(const char *s);
char *xstrndup(const char *s, size_t n);
void *xreallocarray(void *p, size_t n, size_t size);

/* Append @item to the comma-separated list *@list, which may be NULL. */
void list_append(char **list, const char *item);

/* @s as one word for a shell, quoted only where it has to be. */
char *shell_quote(const char *s);

/* @path so that QEMU takes it neither for PROTOCOL:NAME nor for an option. */
char *plain_path(const char *path);

/* True if QEMU reads @name as PROTOCOL:..., its path_has_protocol(). */
bool has_protocol(const char *name);

/* Decimal, nothing before or after it, at most @max. */
bool parse_number(const char *s, uint64_t max, uint64_t *value);

/* The same with an optional K, M, G or T, or k, m, g, t (powers of 1024). */
bool parse_size(const char *s, uint64_t *bytes);

/* @bytes as people write it: 512, 64K, 1.5G. */
char *human_size(uint64_t bytes);

/* True if both are the same file, or nodes of the same block device. */
bool same_file(const struct stat *a, const struct stat *b);

/* The first line of a small file (of /sys or /proc), or NULL. */
char *read_line(const char *path);

#define MAX_OPTIONS	16

/**
 * struct command - one of qcowctl's commands
 * @name: as the user gives it
 * @operands: what it takes, for people
 * @summary: a sentence
 * @options: all but --help; @letter and @value may be missing
 * @option_count: at most MAX_OPTIONS
 * @min: fewest operands
 * @max: most operands, or -1
 * @more_help: prints the end of its help, may be NULL
 * @run: gets the value of each option, by its place in @options: NULL where it was
 *       not given, "" where it takes none; returns an exit code
 */
struct command {
	const char *name;
	const char *operands;
	const char *summary;
	const struct option_help {
		char letter;
		const char *name;
		const char *value;
		const char *help;
	} *options;
	int option_count;
	int min;
	int max;
	void (*more_help)(void);
	int (*run)(const char * const *options, int count, char **operands);
};

extern const struct command attach_command, detach_command, list_command,
			    info_command, check_command;

#endif /* QCOWCTL_UTIL_H */
