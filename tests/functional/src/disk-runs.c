// SPDX-License-Identifier: GPL-2.0-only
/*
 * disk-runs FILE [OFFSET LENGTH]: what is in a file or device, in one line, as runs of
 * sectors of one byte: `41:64k 00:512 61:1024k`; ?? are sectors of several bytes.
 * Numbers may end in k or M. A device, which needs them, is read directly, at once.
 */
#include <ctype.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512

static uint64_t number(const char *text)
{
	char *end;
	uint64_t n = strtoull(text, &end, 0);

	return tolower(*end) == 'k' ? n << 10 : tolower(*end) == 'm' ? n << 20 : n;
}

/* The byte that a sector consists of, or -1. */
static int byte_of(const unsigned char *sector)
{
	return memcmp(sector, sector + 1, SECTOR - 1) ? -1 : *sector;
}

static void print_run(int byte, uint64_t length)
{
	if (byte < 0)
		printf("??");
	else
		printf("%02x", byte);
	printf(length % 1024 ? ":%" PRIu64 : ":%" PRIu64 "k",
	       length % 1024 ? length : length / 1024);
}

int main(int argc, char **argv)
{
	uint64_t offset = 0, length, pos, start = 0;
	unsigned char *data;
	struct stat st;
	int fd;

	if (argc != 2 && argc != 4) {
		fprintf(stderr, "usage: disk-runs FILE [OFFSET LENGTH]\n");
		return 2;
	}
	fd = open(argv[1], O_RDONLY);
	if (fd < 0 || fstat(fd, &st) ||
	    (S_ISBLK(st.st_mode) && fcntl(fd, F_SETFL, O_DIRECT))) {
		perror(argv[1]);
		return 1;
	}
	length = st.st_size;
	if (argc > 2) {
		offset = number(argv[2]);
		length = number(argv[3]);
	}
	if (posix_memalign((void **)&data, 4096, length + SECTOR) ||
	    pread(fd, data, length, offset) != (ssize_t)length) {
		perror(argv[1]);
		return 1;
	}
	for (pos = SECTOR; pos <= length; pos += SECTOR) {
		if (pos < length && byte_of(data + pos) == byte_of(data + start))
			continue;
		print_run(byte_of(data + start), pos - start);
		putchar(pos < length ? ' ' : '\n');
		start = pos;
	}
	return 0;
}
