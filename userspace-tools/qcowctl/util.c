// SPDX-License-Identifier: GPL-2.0-only
/*
 * Messages, strict parsing, strings. Knows nothing of images or devices.
 */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

static void __attribute__((noreturn)) out_of_memory(void)
{
	fputs("qcowctl: out of memory\n", stderr);
	exit(EXIT_SYSTEM);
}

static char *xvasprintf(const char *fmt, va_list ap)
{
	char *s;

	if (vasprintf(&s, fmt, ap) < 0)
		out_of_memory();
	return s;
}

static bool is_control(char c)
{
	return (c >= 0 && c < 0x20) || c == 0x7f;
}

/* File names may hold line breaks and terminal sequences: escape controls. */
static void print_message(const char *prefix, const char *fmt, va_list ap)
{
	autofree char *message = xvasprintf(fmt, ap);
	autofree char *line = xreallocarray(NULL, strlen(message) + 1, 4);
	char *out = line;
	const char *s;

	for (s = message; *s; s++) {
		if (is_control(*s))
			out += sprintf(out, "\\%03o", *s);
		else
			*out++ = *s;
	}
	*out = '\0';
	fprintf(stderr, "qcowctl: %s%s\n", prefix, line);
}

int fail(enum qcowctl_exit code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	print_message("", fmt, ap);
	va_end(ap);
	return code;
}

void warn(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	print_message("warning: ", fmt, ap);
	va_end(ap);
}

enum qcowctl_exit exit_of_errno(int err)
{
	switch (err) {
	case ENOENT:
	case ENOTDIR:
	case ENODEV:
	case ENXIO:
		return EXIT_ABSENT;
	case EACCES:
	case EPERM:
	case EROFS:
		return EXIT_DENIED;
	case EBUSY:
	case ETXTBSY:
	case EEXIST:
	case EAGAIN:
		return EXIT_BUSY;
	default:
		return EXIT_SYSTEM;
	}
}

char *xasprintf(const char *fmt, ...)
{
	va_list ap;
	char *s;

	va_start(ap, fmt);
	s = xvasprintf(fmt, ap);
	va_end(ap);
	return s;
}

char *xstrdup(const char *s)
{
	return xstrndup(s, strlen(s));
}

char *xstrndup(const char *s, size_t n)
{
	char *copy = strndup(s, n);

	if (!copy)
		out_of_memory();
	return copy;
}

void *xreallocarray(void *p, size_t n, size_t size)
{
	p = reallocarray(p, n ? n : 1, size);
	if (!p)
		out_of_memory();
	return p;
}

void list_append(char **list, const char *item)
{
	autofree char *shorter = *list;

	*list = shorter ? xasprintf("%s, %s", shorter, item) : xstrdup(item);
}

char *shell_quote(const char *s)
{
	char *quoted = xreallocarray(NULL, strlen(s) + 1, 4);
	bool plain = *s, control = false;
	const char *c;
	char *out;

	for (c = s; *c; c++) {
		control |= is_control(*c);
		plain &= isalnum((unsigned char)*c) || strchr("%+,-./:=@_", *c);
	}
	out = stpcpy(quoted, plain ? "" : control ? "$'" : "'");
	for (c = s; *c; c++) {
		if (is_control(*c))
			out += sprintf(out, "\\%03o", *c);
		else if (control && (*c == '\'' || *c == '\\'))
			out += sprintf(out, "\\%c", *c);
		else if (*c == '\'')
			out = stpcpy(out, "'\\''");
		else
			*out++ = *c;
	}
	strcpy(out, plain ? "" : "'");
	return quoted;
}

char *plain_path(const char *path)
{
	if (has_protocol(path) || *path == '-')
		return xasprintf("./%s", path);
	return xstrdup(path);
}

bool has_protocol(const char *name)
{
	return name[strcspn(name, ":/")] == ':';
}

bool parse_number(const char *s, uint64_t max, uint64_t *value)
{
	char *end;

	if (!isdigit((unsigned char)*s))
		return false;
	errno = 0;
	*value = strtoull(s, &end, 10);
	return !errno && !*end && *value <= max;
}

bool parse_size(const char *s, uint64_t *bytes)
{
	static const char suffixes[] = "KMGT";
	size_t digits = strspn(s, "0123456789");
	unsigned int shift = 0;
	autofree char *number = xstrndup(s, digits);
	const char *suffix;

	if (s[digits]) {
		suffix = strchr(suffixes, toupper((unsigned char)s[digits]));
		if (!suffix || s[digits + 1])
			return false;
		shift = 10 * (suffix - suffixes + 1);
	}
	if (!parse_number(number, UINT64_MAX >> shift, bytes))
		return false;
	*bytes <<= shift;
	return true;
}

char *human_size(uint64_t bytes)
{
	static const char suffixes[] = "\0KMGTPE";
	unsigned int i = 0;
	uint64_t tenths;

	while (i < 6 && bytes >> (10 * (i + 1)))
		i++;
	if (!i)
		return xasprintf("%ju", (uintmax_t)bytes);
	/* The tenths of the part below the unit, rounded down. */
	tenths = ((bytes >> (10 * (i - 1))) & 1023) * 10 >> 10;
	if (tenths)
		return xasprintf("%ju.%ju%c", (uintmax_t)(bytes >> (10 * i)),
				 (uintmax_t)tenths, suffixes[i]);
	return xasprintf("%ju%c", (uintmax_t)(bytes >> (10 * i)), suffixes[i]);
}

bool same_file(const struct stat *a, const struct stat *b)
{
	if (S_ISBLK(a->st_mode) || S_ISBLK(b->st_mode))
		return S_ISBLK(a->st_mode) && S_ISBLK(b->st_mode) &&
		       a->st_rdev == b->st_rdev;
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

char *read_line(const char *path)
{
	FILE *f = fopen(path, "re");
	char *line = NULL;
	size_t size = 0;
	ssize_t len;

	if (!f)
		return NULL;
	len = getline(&line, &size, f);
	fclose(f);
	if (len < 0) {
		free(line);
		return NULL;
	}
	line[strcspn(line, "\n")] = '\0';
	return line;
}
