// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl list and qcowctl info. Both turn what the driver tells of a device into
 * a JSON object, and show that: as it is, as a line of a table, or as lines. Info
 * of a file is left to qemu-img info, which knows every format.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include <json-c/json.h>
#include <libsmartcols.h>

#include "qcowctl.h"

enum { OUTPUT, NOHEADINGS, BYTES_ONLY, LIST_JSON, LIST_OPTIONS };

static const struct option_help list_options[LIST_OPTIONS + 1] = {
	[OUTPUT] = { 'o', "output", "COLUMNS", "with commas; +COLUMNS adds to the usual ones" },
	[NOHEADINGS] = { 'n', "noheadings", NULL, "no line of headings" },
	[BYTES_ONLY] = { 'b', "bytes", NULL, "sizes in bytes" },
	[LIST_JSON] = { 'J', "json", NULL, "{\"devices\": [...]}, sizes in bytes" },
};

enum { INFO_JSON, FORCE_SHARE, INFO_OPTIONS };

static const struct option_help info_options[INFO_OPTIONS + 1] = {
	[INFO_JSON] = { 'J', "json", NULL, "as JSON, sizes in bytes" },
	[FORCE_SHARE] = { 'U', "force-share", NULL, "of a file even while it is written" },
};

#define DEFAULT_COLUMNS	"NAME,SIZE,RO,DEPTH,STATE,IMAGE"

/* What list can show. In lower case, these are the keys of a device's JSON object. */
static const char * const columns[] = {
	"NAME", "SIZE", "RO", "DEPTH", "STATE", "IMAGE", "MAJ:MIN", "IO", "DISCARD",
	"COMPRESS", "VERSION", "CLUSTER", "REFBITS", "OPENERS", "CACHE", "CACHE-LIMIT",
	"CACHE-HITS", "CACHE-MISSES", "CACHE-MODE", "READS", "WRITES", "DISCARDS", "ZEROES",
	"FLUSHES", "ERRORS", "ALLOCATED", "FREED",
};

static void add_text(struct json_object *object, const char *key, const char *text)
{
	json_object_object_add(object, key, json_object_new_string(text));
}

static void add_number(struct json_object *object, const char *key, uint64_t number)
{
	json_object_object_add(object, key, json_object_new_uint64(number));
}

static const char *encryption_name(__u32 encryption)
{
	static const char * const names[] = {
		[QCOW_ENCRYPTION_NONE] = "none",
		[QCOW_ENCRYPTION_AES] = "aes",
		[QCOW_ENCRYPTION_LUKS] = "luks",
	};

	return encryption < ARRAY_SIZE(names) ? names[encryption] : "unknown";
}

static struct json_object *load_layer(int index, unsigned int layer)
{
	struct json_object *object = NULL;
	struct qcow_layer_status status;
	const char *path = control_layer(index, layer, &status);

	if (!path)
		return NULL;
	object = json_object_new_object();
	add_text(object, "path", path);
	add_text(object, "format", name_of_format(status.format));
	add_number(object, "size", status.virtual_size);
	add_text(object, "io", status.direct ? "direct" : "buffered");
	if (status.format == QCOW_FORMAT_QCOW2) {
		add_number(object, "version", status.version);
		add_number(object, "cluster", status.cluster_size);
		add_text(object, "encryption", encryption_name(status.encryption));
	}
	return object;
}

static void add_status(struct json_object *object, const struct qcow_status *s)
{
	autofree char *state = NULL;

	if (s->flags & QCOW_STATUS_FAILED)
		list_append(&state, "failed");
	if (s->flags & QCOW_STATUS_CORRUPT)
		list_append(&state, "corrupt");
	if (s->flags & QCOW_STATUS_DETACHING)
		list_append(&state, "detaching");
	if (s->flags & QCOW_STATUS_FROZEN)
		list_append(&state, "frozen");
	json_object_object_add(object, "ro",
			       json_object_new_boolean(s->flags & QCOW_STATUS_READ_ONLY));
	add_text(object, "state", state ?: "ok");
	add_text(object, "io", s->flags & QCOW_STATUS_DIRECT ? "direct" : "buffered");
	add_text(object, "discard", s->discard < ARRAY_SIZE(discard_names) ?
		 discard_names[s->discard] : "unknown");
	add_text(object, "compress", s->compress < ARRAY_SIZE(compress_names) ?
		 compress_names[s->compress] : "unknown");
	add_number(object, "size", s->virtual_size);
	add_number(object, "depth", s->layer_count);
	add_number(object, "version", s->version);
	add_number(object, "cluster", s->cluster_size);
	add_number(object, "refbits", s->refcount_bits);
	add_number(object, "openers", s->openers);
	add_number(object, "cache", s->cache_size);
	add_number(object, "cache-limit", s->cache_limit);
	add_number(object, "cache-hits", s->cache_hits);
	add_number(object, "cache-misses", s->cache_misses);
	add_number(object, "reads", s->reads);
	add_number(object, "writes", s->writes);
	add_number(object, "discards", s->discards);
	add_number(object, "zeroes", s->zeroes);
	add_number(object, "flushes", s->flushes);
	add_number(object, "inlined", s->inlined);
	add_number(object, "errors", s->errors);
	add_number(object, "allocated", s->clusters_allocated);
	add_number(object, "freed", s->clusters_freed);
}

/*
 * Everything about a device, its chain as an array. NULL with errno otherwise, which
 * is ENODEV if the device is gone.
 */
static struct json_object *load_device(int index)
{
	struct qcow_status status = { .size = sizeof(status), .index = index };
	autofree char *name = xasprintf("/dev/qcow%d", index);
	autofree char *path = xasprintf("/sys/block/qcow%d/dev", index);
	autofree char *numbers = read_text(path);
	autofree char *damage = attribute(index, "damage");
	autofree char *cache_mode = attribute(index, "cache_mode");
	struct json_object *device, *chain, *layer;
	unsigned int i;

	if (control_call(QCOW_CTL_STATUS, &status))
		return NULL;
	device = json_object_new_object();
	chain = json_object_new_array();
	for (i = 0; i < status.layer_count; i++) {
		layer = load_layer(index, i);
		if (!layer) {
			/* Another device has the number now. */
			if (errno == ENOENT)
				errno = ENODEV;
			return NULL;
		}
		json_object_array_add(chain, layer);
	}
	layer = json_object_array_get_idx(chain, 0);
	add_text(device, "name", name);
	add_text(device, "maj:min", numbers ?: "");
	json_object_object_add(device, "image",
			       json_object_get(json_object_object_get(layer, "path")));
	add_status(device, &status);
	if (cache_mode)
		add_text(device, "cache-mode", cache_mode);
	if (damage && *damage)
		add_text(device, "damage", damage);
	json_object_object_add(device, "chain", chain);
	return device;
}

/* @bytes as people write it: 512, 64K, 1.5G. */
static char *human_size(uint64_t bytes)
{
	static const char suffixes[] = "\0KMGTPE";
	unsigned int i = 0, tenths = 0;
	uint64_t whole = bytes;

	/* The tenths of the part below the unit, rounded down. */
	for (; whole > 1023; whole >>= 10, i++)
		tenths = (whole & 1023) * 10 >> 10;
	if (tenths)
		return xasprintf("%ju.%u%c", (uintmax_t)whole, tenths, suffixes[i]);
	return xasprintf("%ju%.1s", (uintmax_t)whole, suffixes + i);
}

/* The value of @key as people read it. */
static char *show(const char *key, struct json_object *value, bool bytes)
{
	if (json_object_is_type(value, json_type_boolean))
		return xstrdup(json_object_get_boolean(value) ? "yes" : "no");
	if (!bytes && (!strcmp(key, "size") || !strcmp(key, "cluster") ||
		       !strcmp(key, "cache") || !strcmp(key, "cache-limit")))
		return human_size(json_object_get_uint64(value));
	return xstrdup(json_object_get_string(value));
}

static void list_help(void)
{
	size_t i;

	printf("\nColumns:");
	for (i = 0; i < ARRAY_SIZE(columns); i++)
		printf("%s%s%s", i ? "," : "", i % 8 ? " " : "\n  ", columns[i]);
	puts("");
}

/* Make a column of each of @names, "+A,B" or "A,B". */
static int add_columns(struct libscols_table *table, const char *names)
{
	bool more = *names == '+';
	autofree char *list = xasprintf("%s%s", more ? DEFAULT_COLUMNS "," : "", names + more);
	char *rest = list, *name;
	size_t i;

	while ((name = strsep(&rest, ","))) {
		for (i = 0; i < ARRAY_SIZE(columns); i++) {
			if (!strcasecmp(columns[i], name))
				break;
		}
		if (i == ARRAY_SIZE(columns))
			return fail(EXIT_USAGE, "list: no column '%s'; the columns are in qcowctl list --help",
				    name);
		if (!scols_table_new_column(table, columns[i], 0, 0))
			out_of_memory();
	}
	return EXIT_OK;
}

static void add_line(struct libscols_table *table, struct json_object *device, bool bytes)
{
	struct libscols_line *line = scols_table_new_line(table, NULL);
	struct libscols_column *column;
	size_t i;

	for (i = 0; i < scols_table_get_ncols(table); i++) {
		column = scols_table_get_column(table, i);
		json_object_object_foreach(device, key, value) {
			if (strcasecmp(key, scols_column_get_name(column)))
				continue;
			if (json_object_is_type(value, json_type_int)) {
				scols_column_set_flags(column, SCOLS_FL_RIGHT);
				scols_column_set_json_type(column, SCOLS_JSON_NUMBER);
			} else if (json_object_is_type(value, json_type_boolean)) {
				scols_column_set_json_type(column, SCOLS_JSON_BOOLEAN);
			}
			if (scols_line_refer_data(line, i, show(key, value, bytes)))
				out_of_memory();
		}
	}
}

static int list(const char * const *values, char **operands)
{
	bool bytes = values[BYTES_ONLY] || values[LIST_JSON];
	struct libscols_table *table = scols_new_table();
	autofree int *indices = NULL;
	struct json_object *device;
	size_t i;
	int ret;

	(void)operands;
	if (!table)
		out_of_memory();
	scols_table_set_name(table, "devices");
	scols_table_enable_json(table, !!values[LIST_JSON]);
	scols_table_enable_noheadings(table, !!values[NOHEADINGS]);
	ret = add_columns(table, values[OUTPUT] ?: DEFAULT_COLUMNS);
	if (ret)
		return ret;
	indices = control_open() ? control_list() : NULL;
	if (!indices)
		return control_error();
	for (i = 0; indices[i] >= 0; i++) {
		device = load_device(indices[i]);
		if (device)
			add_line(table, device, bytes);
		else if (errno != ENODEV)	/* detached meanwhile */
			return control_error();
		json_object_put(device);
	}
	if (scols_print_table(table))
		out_of_memory();
	return EXIT_OK;
}

const struct command list_command = {
	.name = "list",
	.operands = "",
	.summary = "List the attached devices; where there are none, print nothing.",
	.options = list_options,
	.more_help = list_help,
	.run = list,
};

static int exec_qemu_img(const char *file, bool json, bool force_share)
{
	char *argv[] = {
		"qemu-img", "info", json ? "--output=json" : "--output=human",
		force_share ? "-U" : "--", plain_path(file), NULL
	};
	struct stat st;

	if (stat(file, &st))
		return fail(exit_of_errno(errno), "%s: %m; name a device or a file, see qcowctl list",
			    file);
	execvp(argv[0], argv);
	return fail(EXIT_SYSTEM, "%s: cannot run qemu-img, which reads files: %m; install qemu-utils",
		    file);
}

/* One line a value, those of the chain's files below it. */
static void print_lines(struct json_object *object, const char *indent)
{
	size_t i;

	json_object_object_foreach(object, key, value) {
		autofree char *raw = show(key, value, false);
		autofree char *text = printable(raw);
		autofree char *bytes = show(key, value, true);

		if (json_object_is_type(value, json_type_array) && strcmp(key, "flags")) {
			for (i = 0; i < json_object_array_length(value); i++) {
				printf("%s %zu:\n", key, i);
				print_lines(json_object_array_get_idx(value, i), "  ");
			}
		} else if (strcmp(raw, bytes)) {
			printf("%s%-13s %s (%s bytes)\n", indent, key, text, bytes);
		} else {
			printf("%s%-13s %s\n", indent, key, text);
		}
	}
}

/* The image's snapshots and bitmaps, as qemu-img tells of them; one of --temp has none. */
static void add_told(struct json_object *device)
{
	const char *image = json_object_get_string(json_object_object_get(device, "image"));
	autofree char *name = qemu_name(image, NULL, QCOW_ENCRYPTION_NONE);
	autofree char *word = shell_quote(name);
	autofree char *command = xasprintf("exec qemu-img info -U --output=json %s 2>/dev/null",
					   word);
	struct json_object *told, *of, *from, *to, *snapshots;
	FILE *pipe = popen(command, "r");
	char date[] = "YYYY-MM-DDThh:mm:ssZ";
	time_t seconds;
	size_t i;

	told = pipe ? json_object_from_fd(fileno(pipe)) : NULL;
	if (pipe)
		pclose(pipe);
	if (!told) {
		if (!access(image, F_OK))
			fail(EXIT_OK, "warning: %s: qemu-img cannot say which snapshots and bitmaps it has; install qemu-utils",
			     image);
		return;
	}
	snapshots = json_object_new_array();
	of = json_object_object_get(told, "snapshots");
	for (i = 0; of && i < json_object_array_length(of); i++) {
		from = json_object_array_get_idx(of, i);
		to = json_object_new_object();
		add_text(to, "id", json_object_get_string(json_object_object_get(from, "id")));
		add_text(to, "name",
			 json_object_get_string(json_object_object_get(from, "name")));
		seconds = json_object_get_int64(json_object_object_get(from, "date-sec"));
		strftime(date, sizeof(date), "%FT%TZ", gmtime(&seconds));
		add_text(to, "date", date);
		json_object_array_add(snapshots, to);
	}
	json_object_object_add(device, "snapshots", snapshots);
	of = json_object_object_get(told, "format-specific");
	of = json_object_object_get(json_object_object_get(of, "data"), "bitmaps");
	json_object_object_add(device, "bitmaps",
			       of ? json_object_get(of) : json_object_new_array());
	json_object_put(told);
}

static int info(const char * const *values, char **operands)
{
	int index = device_number(operands[0]);
	struct json_object *device;

	if (index < 0)
		return exec_qemu_img(operands[0], values[INFO_JSON], values[FORCE_SHARE]);
	if (!control_open())
		return control_error();
	device = load_device(index);
	if (!device)
		return errno == ENODEV ? not_attached(xasprintf("/dev/qcow%d", index)) :
					 control_error();
	add_told(device);
	if (values[INFO_JSON])
		puts(json_object_to_json_string_ext(device, JSON_C_TO_STRING_PRETTY |
						    JSON_C_TO_STRING_SPACED |
						    JSON_C_TO_STRING_NOSLASHESCAPE));
	else
		print_lines(device, "");
	return EXIT_OK;
}

const struct command info_command = {
	.name = "info",
	.operands = "DEVICE|FILE",
	.summary = "Show a device with its chain, or what qemu-img info says of a file.",
	.options = info_options,
	.min = 1, .max = 1,
	.run = info,
};
