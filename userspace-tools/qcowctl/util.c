// SPDX-License-Identifier: GPL-2.0-only
/*
 * Messages, strict parsing, strings. Knows nothing of images or devices.
 */
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "qcowctl.h"

void out_of_memory(void)
{
	fputs("qcowctl: out of memory\n", stderr);
	exit(EXIT_SYSTEM);
}

int fail(enum qcowctl_exit code, const char *fmt, ...)
{
	autofree char *message = NULL;
	autofree char *text = NULL;
	va_list ap;

	va_start(ap, fmt);
	if (vasprintf(&message, fmt, ap) < 0)
		out_of_memory();
	va_end(ap);
	text = printable(message);
	fprintf(stderr, "qcowctl: %s\n", text);
	return code;
}

char *printable(const char *s)
{
	char *text = xreallocarray(NULL, strlen(s) + 1, 4), *out = text;
	unsigned char c, next;

	for (; (c = *s); s++) {
		next = s[1];
		if (iscntrl(c)) {
			out += sprintf(out, "\\%03o", c);
		} else if (c == 0xc2 && next >= 0x80 && next < 0xa0) {
			/* UTF-8 has more of them. */
			out += sprintf(out, "\\%03o\\%03o", c, next);
			s++;
		} else {
			*out++ = c;
		}
	}
	*out = 0;
	return text;
}

enum qcowctl_exit exit_of_errno(int err)
{
	if (err == ENOENT || err == ENOTDIR || err == ENODEV || err == ENXIO)
		return EXIT_ABSENT;
	if (err == EACCES || err == EPERM || err == EROFS)
		return EXIT_DENIED;
	if (err == EBUSY || err == ETXTBSY || err == EEXIST || err == EAGAIN)
		return EXIT_BUSY;
	return EXIT_SYSTEM;
}

char *xasprintf(const char *fmt, ...)
{
	va_list ap;
	char *s;

	va_start(ap, fmt);
	if (vasprintf(&s, fmt, ap) < 0)
		out_of_memory();
	va_end(ap);
	return s;
}

void *xreallocarray(void *p, size_t n, size_t size)
{
	p = reallocarray(p, n, size);
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
	char *quoted, *out;

	if (*s && !s[strcspn(s, " \t\n!\"#$&'()*;<>?[\\]^`{|}~")])
		return xstrdup(s);
	quoted = xreallocarray(NULL, strlen(s) + 1, 4);
	out = stpcpy(quoted, "'");
	for (; *s; s++) {
		if (*s == '\'')
			out = stpcpy(out, "'\\''");
		else
			*out++ = *s;
	}
	strcpy(out, "'");
	return quoted;
}

bool parse_size(const char *s, uint64_t *bytes)
{
	static const char suffixes[] = "KMGT";
	const char *suffix;
	char *end;

	errno = 0;
	*bytes = strtoull(s, &end, 10);
	if (!isdigit((unsigned char)*s) || errno)
		return false;
	if (!*end)
		return true;
	suffix = strchr(suffixes, toupper((unsigned char)*end));
	return suffix && !end[1] &&
	       !__builtin_mul_overflow(*bytes, 1024ULL << 10 * (suffix - suffixes), bytes);
}

bool parse_number(const char *s, int *number)
{
	uint64_t value;

	if (s[strspn(s, "0123456789")] || !parse_size(s, &value) || value > INT_MAX)
		return false;
	*number = value;
	return true;
}

bool same_file(const struct stat *a, const struct stat *b)
{
	if (S_ISBLK(a->st_mode) && S_ISBLK(b->st_mode))
		return a->st_rdev == b->st_rdev;
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

char *read_text(const char *path)
{
	FILE *f = fopen(path, "re");
	char *text = NULL;
	size_t room = 0;
	ssize_t n = -1;

	if (f) {
		n = getdelim(&text, &room, 0, f);
		fclose(f);
	}
	/* Empty is as good as nothing. */
	if (n > 0 && text[n - 1] == '\n')
		text[--n] = 0;
	if (n > 0)
		return text;
	free(text);
	return NULL;
}
