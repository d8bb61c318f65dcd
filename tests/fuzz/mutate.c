// SPDX-License-Identifier: GPL-2.0-only
/*
 * mutate --seed N IMAGE: damage a valid qcow2 image in one to four places.
 *
 * Finds its structures as a reader would: header, extensions, tables of the disk and
 * of snapshots, counts, directories, compressed data, names. Then changes what they
 * say, mostly to something that is wrong in a way of its own: a limit and the number
 * beyond it, a pointer to another structure or to the one that it is in, two entries
 * exchanged. A line for each says what was done; the same seed does the same again.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_SPOTS	200000
#define MAX_PLACES	4096
/* So many empty entries of a table are of interest, too. */
#define SOME_EMPTY	8

#define OFFSET_MASK	0x00fffffffffffe00ULL

enum kind {
	HEADER, EXTENSION, BACKING_NAME, L1, L2, SUBCLUSTERS, PACKED, PACKED_DATA,
	REFTABLE, REFCOUNT, SNAPSHOT, SNAPSHOT_L1, SNAPSHOT_L2, BITMAP, BITMAP_TABLE,
	BITMAP_DATA, LUKS, KINDS
};

static const char * const kind_names[KINDS] = {
	"header field", "header extension", "backing file name", "L1 entry", "L2 entry",
	"subcluster bitmap", "compressed cluster's entry", "compressed data",
	"refcount table entry", "refcount", "snapshot table", "snapshot's L1 entry",
	"snapshot's L2 entry", "bitmap directory", "bitmap table entry", "bitmap data",
	"LUKS header",
};

/* A number in the file, of 1, 2, 4 or 8 bytes. */
struct spot {
	uint64_t at;
	unsigned int width;
};

static struct list {
	struct spot *spots;
	size_t count;
} lists[KINDS];

/* Clusters that something leads to */
static struct place {
	const char *what;
	uint64_t at;
} places[MAX_PLACES];
static size_t nr_places;

static uint8_t *file;
static uint64_t file_size;
static uint64_t cluster_size;
static bool extended;
static uint64_t state;

static uint64_t draw64(void)
{
	uint64_t z = state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	return z ^ z >> 31;
}

static uint64_t draw(uint64_t below)
{
	return below ? draw64() % below : 0;
}

/* What is behind the end of the file is zero. */
static uint64_t get(uint64_t at, unsigned int width)
{
	uint64_t value = 0;
	unsigned int i;

	for (i = 0; i < width; i++)
		value = value << 8 | (at + i < file_size ? file[at + i] : 0);
	return value;
}

static void put(uint64_t at, unsigned int width, uint64_t value)
{
	unsigned int i;

	for (i = width; i--; value >>= 8)
		if (at + i < file_size)
			file[at + i] = value;
}

static void add_spot(enum kind kind, uint64_t at, unsigned int width)
{
	struct list *list = &lists[kind];

	if (at >= file_size || width > file_size - at || list->count == MAX_SPOTS)
		return;
	if (!(list->count & (list->count - 1))) {
		list->spots = realloc(list->spots, (2 * list->count + 1) * sizeof(*list->spots));
		if (!list->spots)
			exit(2);
	}
	list->spots[list->count++] = (struct spot){ .at = at, .width = width };
}

/* Bytes, up to so many */
static void add_bytes(enum kind kind, uint64_t at, uint64_t length, uint64_t most)
{
	uint64_t i;

	for (i = 0; i < length && i < most; i++)
		add_spot(kind, at + i, 1);
}

static void add_place(const char *what, uint64_t at)
{
	if (nr_places < MAX_PLACES)
		places[nr_places++] = (struct place){ .what = what, .at = at };
}

/* Is an entry to be looked at? Those in use are, and a few others. */
static bool of_interest(uint64_t value, unsigned int *empty)
{
	return value || (*empty)++ < SOME_EMPTY;
}

static void find_packed(uint64_t entry)
{
	unsigned int offset_bits = 62 - (__builtin_ctzll(cluster_size) - 8);
	uint64_t at = entry & ((1ULL << offset_bits) - 1);
	uint64_t sectors = (entry & ~(3ULL << 62)) >> offset_bits;
	uint64_t length = (sectors + 1) * 512 - at % 512;

	add_bytes(PACKED_DATA, at, length, 64);
	add_bytes(PACKED_DATA, at + length / 2, length / 2, 64);
	add_place("compressed data", at & ~(cluster_size - 1));
}

static void find_l2(enum kind kind, uint64_t table)
{
	unsigned int size = extended ? 16 : 8, empty = 0;
	uint64_t at, entry;

	for (at = table; at < table + cluster_size; at += size) {
		entry = get(at, 8);
		if (!of_interest(entry | (extended ? get(at + 8, 8) : 0), &empty))
			continue;
		if (extended)
			add_spot(SUBCLUSTERS, at + 8, 8);
		if (entry >> 62 & 1) {
			add_spot(PACKED, at, 8);
			find_packed(entry);
			continue;
		}
		add_spot(kind, at, 8);
		if (entry & OFFSET_MASK)
			add_place("data", entry & OFFSET_MASK);
	}
}

static void find_l1(enum kind kind, uint64_t table, uint64_t entries)
{
	unsigned int empty = 0;
	uint64_t i, entry;

	add_place("an L1 table", table);
	for (i = 0; i < entries && i < 4096; i++) {
		entry = get(table + 8 * i, 8);
		if (!of_interest(entry, &empty))
			continue;
		add_spot(kind, table + 8 * i, 8);
		if (entry & OFFSET_MASK) {
			add_place("an L2 table", entry & OFFSET_MASK);
			find_l2(kind == L1 ? L2 : SNAPSHOT_L2, entry & OFFSET_MASK);
		}
	}
}

static void find_refcounts(unsigned int order)
{
	uint64_t table = get(48, 8), length = get(56, 4) * cluster_size;
	unsigned int width = order < 3 ? 1 : 1 << (order - 3), empty = 0, none;
	uint64_t at, i, block;

	add_place("the refcount table", table);
	for (at = table; at < table + length && at < file_size; at += 8) {
		block = get(at, 8);
		if (!of_interest(block, &empty))
			continue;
		add_spot(REFTABLE, at, 8);
		if (!block)
			continue;
		add_place("a refcount block", block);
		for (i = none = 0; i < cluster_size; i += width)
			if (of_interest(get(block + i, width), &none))
				add_spot(REFCOUNT, block + i, width);
	}
}

static void find_fields(enum kind kind, uint64_t at, const char *widths)
{
	for (; *widths; at += *widths++ - '0')
		add_spot(kind, at, *widths - '0');
}

static void find_snapshots(void)
{
	uint64_t at = get(64, 8), count = get(60, 4), extra, strings;

	if (count)
		add_place("the snapshot table", at);
	for (; count-- && at < file_size; at = (at + 40 + extra + strings + 7) & ~7ULL) {
		find_fields(SNAPSHOT, at, "842244844");
		strings = get(at + 12, 2) + get(at + 14, 2);
		extra = get(at + 36, 4);
		find_fields(SNAPSHOT, at + 40, extra >= 24 ? "888" : extra >= 16 ? "88" : "");
		add_bytes(SNAPSHOT, at + 40 + extra, strings, 4);
		find_l1(SNAPSHOT_L1, get(at, 8), get(at + 8, 4));
	}
}

static void find_bitmaps(uint64_t at, uint64_t count)
{
	uint64_t table, entries, i, entry;
	unsigned int empty;

	add_place("the bitmap directory", at);
	for (; count-- && at < file_size;
	     at = (at + 24 + get(at + 18, 2) + get(at + 20, 4) + 7) & ~7ULL) {
		find_fields(BITMAP, at, "8441124");
		add_bytes(BITMAP, at + 24, get(at + 18, 2), 4);
		table = get(at, 8);
		entries = get(at + 8, 4);
		add_place("a bitmap's table", table);
		for (i = empty = 0; i < entries && table + 8 * i < file_size; i++) {
			entry = get(table + 8 * i, 8);
			if (!of_interest(entry, &empty))
				continue;
			add_spot(BITMAP_TABLE, table + 8 * i, 8);
			if (entry & OFFSET_MASK) {
				add_place("a bitmap", entry & OFFSET_MASK);
				add_bytes(BITMAP_DATA, entry & OFFSET_MASK, cluster_size, 64);
			}
		}
	}
}

static void find_extensions(uint64_t at, uint64_t end)
{
	uint64_t magic, length;

	for (; at + 8 <= end; at += 8 + ((length + 7) & ~7ULL)) {
		magic = get(at, 4);
		length = get(at + 4, 4);
		find_fields(EXTENSION, at, "44");
		if (!magic)
			break;
		if (magic == 0x23852875) {
			find_fields(EXTENSION, at + 8, "4488");
			find_bitmaps(get(at + 24, 8), get(at + 8, 4));
		} else if (magic == 0x0537be77) {
			find_fields(EXTENSION, at + 8, "88");
			add_place("the LUKS header", get(at + 8, 8));
			add_bytes(LUKS, get(at + 8, 8), get(at + 16, 8), 592);
			/* Key material */
			add_bytes(LUKS, get(at + 8, 8) + 4096, get(at + 16, 8), 64);
		} else {
			add_bytes(EXTENSION, at + 8, length, 16);
		}
	}
}

static void find_all(void)
{
	unsigned int order = 4;
	uint64_t length = 72;

	find_fields(HEADER, 0, "4484484488448");
	if (get(4, 4) == 3) {
		find_fields(HEADER, 72, "888441");
		extended = get(72, 8) & 16;
		order = get(96, 4);
		length = get(100, 4);
	}
	add_place("the header", 0);
	if (get(8, 8))
		add_bytes(BACKING_NAME, get(8, 8), get(16, 4), 1023);
	find_extensions(length, get(8, 8) ? get(8, 8) : cluster_size);
	find_l1(L1, get(40, 8), get(36, 4));
	find_refcounts(order);
	find_snapshots();
}

static uint64_t boundary(unsigned int width)
{
	static const uint64_t edges[] = {
		0, 1, 2, 7, 8, 9, 21, 22, 63, 64, 512, 1024, 65535, 65536, 1 << 20, 4 << 20,
		INT32_MAX, UINT32_MAX, 1ULL << 40, 1ULL << 55, 1ULL << 62, INT64_MAX,
		1ULL << 63, UINT64_MAX, UINT64_MAX - 65535,
	};
	uint64_t edge = edges[draw(sizeof(edges) / sizeof(*edges))];

	return draw(4) ? edge : edge + (draw(2) ? 1 : -1) * (1LL << draw(width * 8));
}

/* Somewhere that a pointer must not lead to; the flags stay, for the most part. */
static uint64_t pointer(const struct spot *spot, uint64_t old, const char **why)
{
	uint64_t end = (file_size + cluster_size - 1) & ~(cluster_size - 1);
	const struct place *place;
	uint64_t flags = old & 3ULL << 62, to;

	if (!draw(8))
		flags ^= draw(2) ? 1ULL << 63 : 1ULL << 62;
	switch (draw(10)) {
	case 0:
		*why = "its own table";
		to = spot->at & ~(cluster_size - 1);
		break;
	case 1:
		*why = "the last cluster";
		to = end - cluster_size;
		break;
	case 2:
		*why = "the end of the file";
		to = end;
		break;
	case 3:
		*why = "behind the end of the file";
		to = end + (cluster_size << draw(16));
		break;
	case 4:
		*why = "not aligned";
		to = (old & OFFSET_MASK) + (1 << draw(17));
		break;
	case 5:
		*why = "as high as can be";
		to = (1ULL << 56) - cluster_size;
		break;
	default:
		place = &places[draw(nr_places)];
		*why = place->what;
		to = place->at;
	}
	return flags | to | !draw(16);
}

static const struct spot *draw_spot(enum kind kind)
{
	return &lists[kind].spots[draw(lists[kind].count)];
}

static enum kind draw_kind(void)
{
	enum kind kind;

	for (;;) {
		kind = draw(KINDS);
		if (!lists[kind].count)
			continue;
		/* What is wrong in front hides the rest, and is soon tried. */
		if (kind > BACKING_NAME || !draw(4))
			return kind;
	}
}

static void damage_number(enum kind kind, const struct spot *spot)
{
	uint64_t old = get(spot->at, spot->width), new;
	const struct spot *other;
	const char *why = "";
	char exchanged[64];

	switch (draw(spot->width == 8 ? 9 : 5)) {
	case 0:
		why = "a bit";
		new = old ^ 1ULL << draw(spot->width * 8);
		break;
	case 1:
		why = "one more or less";
		new = old + (draw(2) ? 1 : -1);
		break;
	case 2:
		why = "by chance";
		new = draw64();
		break;
	case 3:
		other = draw_spot(kind);
		if (other->width == spot->width) {
			snprintf(exchanged, sizeof(exchanged), "exchanged with that at 0x%" PRIx64,
				 other->at);
			why = exchanged;
			new = get(other->at, other->width);
			put(other->at, other->width, old);
			break;
		}
		/* fall through */
	case 4:
		why = "a limit";
		new = boundary(spot->width);
		break;
	default:
		new = pointer(spot, old, &why);
	}
	put(spot->at, spot->width, new);
	printf("%s at 0x%" PRIx64 ": 0x%" PRIx64 " becomes 0x%" PRIx64 " (%s)\n",
	       kind_names[kind], spot->at, old, get(spot->at, spot->width), why);
}

static void damage_bytes(enum kind kind, const struct spot *spot)
{
	uint64_t i, length = 1 + draw(64), what = draw(3);

	for (i = 0; i < length; i++)
		put(spot->at + i, 1, what == 2 ? draw(256) : what ? 0xff : 0);
	printf("%s at 0x%" PRIx64 ": %" PRIu64 " bytes of %s\n", kind_names[kind], spot->at,
	       length, what == 2 ? "noise" : what ? "ones" : "zeroes");
}

static void damage_cluster(void)
{
	const struct place *from = &places[draw(nr_places)], *to = &places[draw(nr_places)];
	uint64_t i;

	for (i = 0; i < cluster_size && to->at + i < file_size; i++)
		file[to->at + i] = get(from->at + i, 1);
	printf("%s at 0x%" PRIx64 ": a copy of %s at 0x%" PRIx64 "\n", to->what, to->at,
	       from->what, from->at);
}

/* The new length */
static uint64_t damage_length(void)
{
	const struct place *place = &places[draw(nr_places)];
	uint64_t to;

	switch (draw(4)) {
	case 0:
		to = draw(file_size);
		break;
	case 1:
		to = file_size + (1ULL << draw(31));
		break;
	default:
		to = place->at + (draw(2) ? draw(cluster_size) : 0);
	}
	printf("length: %" PRIu64 " becomes %" PRIu64 "\n", file_size, to);
	return to;
}

static void die(const char *what)
{
	fprintf(stderr, "mutate: %s: %s\n", what, strerror(errno));
	exit(2);
}

int main(int argc, char **argv)
{
	unsigned int count, i;
	uint64_t length;
	enum kind kind;
	struct stat st;
	int fd;

	if (argc != 4 || strcmp(argv[1], "--seed")) {
		fprintf(stderr, "usage: mutate --seed N IMAGE\n");
		return 2;
	}
	state = strtoull(argv[2], NULL, 0);
	fd = open(argv[3], O_RDWR);
	if (fd < 0 || fstat(fd, &st))
		die(argv[3]);
	file_size = st.st_size;
	length = file_size;
	file = mmap(NULL, file_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		die(argv[3]);
	if (get(0, 4) != 0x514649fb || get(20, 4) < 9 || get(20, 4) > 21) {
		fprintf(stderr, "mutate: %s: that is no qcow2 image\n", argv[3]);
		return 2;
	}
	cluster_size = 1ULL << get(20, 4);
	find_all();

	count = 1 + draw(4);
	for (i = 0; i < count; i++) {
		switch (draw(16)) {
		case 0:
			length = damage_length();
			break;
		case 1:
			damage_cluster();
			break;
		case 2:
			kind = draw_kind();
			damage_bytes(kind, draw_spot(kind));
			break;
		default:
			kind = draw_kind();
			damage_number(kind, draw_spot(kind));
		}
	}
	if (munmap(file, file_size) || (length != file_size && ftruncate(fd, length)) || close(fd))
		die(argv[3]);
	return 0;
}
