/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What header.c needs of the kernel, for a program. Included before it (-include).
 */
#ifndef FUZZ_KERNEL_H
#define FUZZ_KERNEL_H

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define S64_MAX			LLONG_MAX
#define BIT_ULL(n)		(1ULL << (n))
#define min_t(type, a, b)	((type)(a) < (type)(b) ? (type)(a) : (type)(b))
#define sizeof_field(type, f)	sizeof(((type *)0)->f)
#define __packed		__attribute__((packed))
#define __printf(a, b)		__attribute__((format(printf, a, b)))

#define be16_to_cpu(x)		be16toh(x)
#define be32_to_cpu(x)		be32toh(x)
#define be64_to_cpu(x)		((u64)be64toh(x))

static inline __printf(3, 4) int scnprintf(char *buf, size_t size, const char *fmt, ...)
{
	va_list ap;
	int len;

	va_start(ap, fmt);
	len = vsnprintf(buf, size, fmt, ap);
	va_end(ap);
	return !size ? 0 : len < (int)size ? len : (int)size - 1;
}

/* What is called with each input, by libFuzzer or by fuzz_main.c */
int LLVMFuzzerTestOneInput(const u8 *data, size_t size);

#endif /* FUZZ_KERNEL_H */
