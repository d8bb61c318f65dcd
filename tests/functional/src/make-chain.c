// SPDX-License-Identifier: GPL-2.0-only
/*
 * make-chain TEMPLATE DEPTH DIR: a long backing chain, quickly.
 *
 * TEMPLATE is an overlay with 4 KiB clusters, an L2 table at 0x4000 with one
 * data cluster, which is at 0x5000, and `L000.qcow2` as its backing file. For i
 * from 1 to DEPTH - 1 it becomes DIR/L<i>.qcow2, on top of layer i - 1, with its
 * data at guest cluster i % 500, beginning with "layer <i>".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define L2	0x4000
#define DATA	0x5000

int main(int argc, char **argv)
{
	static const char base[] = "L000.qcow2";
	static unsigned char image[1 << 20];
	unsigned char entry[8], *name;
	char text[32], path[4096];
	size_t size;
	FILE *f;
	int depth, i;

	if (argc != 4) {
		fprintf(stderr, "usage: make-chain TEMPLATE DEPTH DIR\n");
		return 2;
	}
	f = fopen(argv[1], "r");
	if (!f) {
		perror(argv[1]);
		return 1;
	}
	size = fread(image, 1, sizeof(image), f);
	fclose(f);
	name = memmem(image, size, base, strlen(base));
	depth = atoi(argv[2]);
	if (size < DATA + 512 || !name || depth > 1000) {
		fprintf(stderr, "%s: not the overlay that is wanted\n", argv[1]);
		return 1;
	}
	memcpy(entry, image + L2, sizeof(entry));
	for (i = 1; i < depth; i++) {
		memset(image + L2, 0, 4096);
		memcpy(image + L2 + i % 500 * 8, entry, sizeof(entry));
		snprintf(text, sizeof(text), "L%03d", i - 1);
		memcpy(name, text, 4);
		snprintf(text, sizeof(text), "layer %04d", i);
		memcpy(image + DATA, text, strlen(text));
		snprintf(path, sizeof(path), "%s/L%03d.qcow2", argv[3], i);
		f = fopen(path, "w");
		if (!f || fwrite(image, 1, size, f) != size || fclose(f)) {
			perror(path);
			return 1;
		}
	}
	return 0;
}
