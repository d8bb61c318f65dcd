// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl list and qcowctl info. Both turn what the driver tells of a device into
 * a JSON object, and show that: as it is, as a line of a table, or as lines. Info
 * of a file is left to qemu-img info, which knows every format.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include <json-c/json.h>
#include <libsmartcols.h>

#include "chain.h"
#include "control.h"
#include "util.h"

enum { OUTPUT, NOHEADINGS, BYTES_ONLY, LIST_JSON };

static const struct option_help list_options[] = {
	[OUTPUT] = { 'o', "output", "COLUMNS", "with commas; +COLUMNS adds to the usual ones" },
	[NOHEADINGS] = { 'n', "noheadings", NULL, "no line of headings" },
	[BYTES_ONLY] = { 'b', "bytes", NULL, "sizes in bytes" },
	[LIST_JSON] = { 'J', "json", NULL, "{\"devices\": [...]}, sizes in bytes" },
};

enum { INFO_JSON, FORCE_SHARE };

static const struct option_help info_options[] = {
	[INFO_JSON] = { 'J', "json", NULL, "as JSON, sizes in bytes" },
	[FORCE_SHARE] = { 'U', "force-share", NULL, "of a file even while it is written" },
};

#define DEFAULT_COLUMNS	"name,size,ro,depth,state,image"

/* What list can show: the keys of a device's JSON object. */
static const char * const columns[] = {
	"name", "size", "ro", "depth", "state", "image", "maj:min", "io", "discard",
	"version", "cluster", "refbits", "openers", "cache", "cache-limit",
	"cache-hits", "cache-misses", "reads", "writes", "discards", "zeroes",
	"flushes", "errors", "allocated", "freed",
};

static bool is_size(const char *key)
{
	return !strcmp(key, "size") || !strcmp(key, "cluster") ||
	       !strcmp(key, "cache") || !strcmp(key, "cache-limit");
}

static void add_text(struct json_object *object, const char *key, const char *text)
{
	json_object_object_add(object, key, json_object_new_string(text));
}

static void add_number(struct json_object *object, const char *key, uint64_t number)
{
	json_object_object_add(object, key, json_object_new_uint64(number));
}

static const char *io_name(bool direct)
{
	return direct ? "direct" : "buffered";
}

static const char *discard_name(unsigned int discard)
{
	static const char * const names[] = {
		[QCOW_DISCARD_UNMAP] = "unmap",
		[QCOW_DISCARD_IGNORE] = "ignore",
		[QCOW_DISCARD_KEEP] = "keep",
	};

	return discard < ARRAY_SIZE(names) ? names[discard] : "unknown";
}

static char *state_name(unsigned int flags)
{
	char *state = NULL;

	if (flags & QCOW_STATUS_FAILED)
		list_append(&state, "failed");
	if (flags & QCOW_STATUS_CORRUPT)
		list_append(&state, "corrupt");
	if (flags & QCOW_STATUS_DETACHING)
		list_append(&state, "detaching");
	return state ? state : xstrdup("ok");
}

static int load_layer(int control, int index, unsigned int layer,
		      struct json_object **object)
{
	struct qcow_layer_status status;
	autofree char *path = NULL;
	int ret;

	ret = control_layer(control, index, layer, &status, &path);
	if (ret)
		return ret;
	*object = json_object_new_object();
	add_text(*object, "path", path);
	add_text(*object, "format", name_of_format(status.format));
	add_number(*object, "size", status.virtual_size);
	add_text(*object, "io", io_name(status.direct));
	if (status.format == QCOW_FORMAT_QCOW2) {
		add_number(*object, "version", status.version);
		add_number(*object, "cluster", status.cluster_size);
	}
	return 0;
}

static void add_status(struct json_object *object, const struct qcow_status *s)
{
	autofree char *state = state_name(s->flags);

	json_object_object_add(object, "ro",
			       json_object_new_boolean(s->flags & QCOW_STATUS_READ_ONLY));
	add_text(object, "state", state);
	add_text(object, "io", io_name(s->flags & QCOW_STATUS_DIRECT));
	add_text(object, "discard", discard_name(s->discard));
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
	add_number(object, "errors", s->errors);
	add_number(object, "allocated", s->clusters_allocated);
	add_number(object, "freed", s->clusters_freed);
}

/* Everything about a device, its chain as an array. -ENODEV if it is gone. */
static int load_device(int control, int index, struct json_object **device)
{
	struct json_object *object = json_object_new_object();
	struct json_object *chain = json_object_new_array();
	struct json_object *layer;
	struct qcow_status status;
	autofree char *name = xasprintf("/dev/qcow%d", index);
	autofree char *path = xasprintf("/sys/block/qcow%d/dev", index);
	autofree char *numbers = read_line(path);
	unsigned int i;
	int ret;

	ret = control_status(control, index, &status);
	for (i = 0; !ret && i < status.layer_count; i++) {
		ret = load_layer(control, index, i, &layer);
		if (!ret)
			json_object_array_add(chain, layer);
	}
	layer = json_object_array_get_idx(chain, 0);
	if (ret || !layer) {
		json_object_put(chain);
		json_object_put(object);
		return ret && ret != -ENOENT ? ret : -ENODEV;
	}

	add_text(object, "name", name);
	add_text(object, "maj:min", numbers ? numbers : "");
	json_object_object_add(object, "image",
			       json_object_get(json_object_object_get(layer, "path")));
	add_status(object, &status);
	json_object_object_add(object, "chain", chain);
	*device = object;
	return 0;
}

static void print_json(struct json_object *object)
{
	puts(json_object_to_json_string_ext(object, JSON_C_TO_STRING_PRETTY |
					    JSON_C_TO_STRING_SPACED |
					    JSON_C_TO_STRING_NOSLASHESCAPE));
}

/* The value of @key as people read it. To be freed. */
static char *show(const char *key, struct json_object *value, bool bytes)
{
	if (json_object_is_type(value, json_type_boolean))
		return xstrdup(json_object_get_boolean(value) ? "yes" : "no");
	if (is_size(key) && !bytes)
		return human_size(json_object_get_uint64(value));
	return xstrdup(json_object_get_string(value));
}

static char *heading(const char *name)
{
	char *upper = xstrdup(name);
	char *c;

	for (c = upper; *c; c++)
		*c = toupper((unsigned char)*c);
	return upper;
}

static void list_help(void)
{
	size_t i;

	printf("\nColumns:");
	for (i = 0; i < ARRAY_SIZE(columns); i++) {
		autofree char *name = heading(columns[i]);

		printf("%s%s%s", i ? "," : "", i % 8 ? " " : "\n  ", name);
	}
	puts("");
}

/* Split @names; *@shown gets their entries of columns[], to be freed. */
static int choose_columns(const char *names, const char ***shown, size_t *count)
{
	bool more = *names == '+';
	autofree char *list = xasprintf("%s%s", more ? DEFAULT_COLUMNS "," : "", names + more);
	char *rest = list, *name;
	size_t i;

	*shown = NULL;
	*count = 0;
	while ((name = strsep(&rest, ","))) {
		for (i = 0; i < ARRAY_SIZE(columns); i++) {
			if (!strcasecmp(columns[i], name))
				break;
		}
		if (i == ARRAY_SIZE(columns))
			return fail(EXIT_USAGE, "list: no column '%s'; the columns are in qcowctl list --help",
				    name);
		*shown = xreallocarray(*shown, *count + 1, sizeof(**shown));
		(*shown)[(*count)++] = columns[i];
	}
	return EXIT_OK;
}

/* Copies of the devices with the chosen columns only, in their order. */
static struct json_object *select_columns(struct json_object *devices,
					  const char **shown, size_t count)
{
	struct json_object *selected = json_object_new_array();
	struct json_object *device, *object, *value;
	size_t i, j;

	for (i = 0; i < json_object_array_length(devices); i++) {
		device = json_object_array_get_idx(devices, i);
		object = json_object_new_object();
		for (j = 0; j < count; j++) {
			value = json_object_object_get(device, shown[j]);
			json_object_object_add(object, shown[j],
					       json_object_get(value));
		}
		json_object_array_add(selected, object);
	}
	return selected;
}

/* Return 0, or nonzero where memory ran out. */
static int print_table(struct json_object *devices, const char **shown, size_t count,
		       bool noheadings, bool bytes)
{
	struct libscols_table *table = scols_new_table();
	struct json_object *device, *value;
	struct libscols_column *column;
	struct libscols_line *line;
	int ret = !table;
	size_t i, j;

	for (j = 0; !ret && j < count; j++) {
		autofree char *name = heading(shown[j]);

		ret = !scols_table_new_column(table, name, 0, 0);
	}
	for (i = 0; !ret && i < json_object_array_length(devices); i++) {
		device = json_object_array_get_idx(devices, i);
		line = scols_table_new_line(table, NULL);
		ret = !line;
		for (j = 0; !ret && j < count; j++) {
			value = json_object_object_get(device, shown[j]);
			column = scols_table_get_column(table, j);
			if (json_object_is_type(value, json_type_int))
				scols_column_set_flags(column, SCOLS_FL_RIGHT);
			ret = scols_line_refer_data(line, j, show(shown[j], value, bytes));
		}
	}
	if (!ret) {
		scols_table_enable_noheadings(table, noheadings);
		ret = scols_print_table(table);
	}
	scols_unref_table(table);
	return ret;
}

static int list(const char * const *options, int count, char **operands)
{
	const char *names = options[OUTPUT] ? options[OUTPUT] : DEFAULT_COLUMNS;
	struct json_object *devices, *root, *device;
	autofree const char **shown = NULL;
	autofree int *indices = NULL;
	size_t columns_shown, all, i;
	int control, ret;

	(void)count;
	(void)operands;
	ret = choose_columns(names, &shown, &columns_shown);
	if (ret)
		return ret;
	control = control_open(false);
	if (control < 0)
		return control_error(-control);
	devices = json_object_new_array();
	ret = control_list(control, &indices, &all);
	for (i = 0; !ret && i < all; i++) {
		ret = load_device(control, indices[i], &device);
		if (!ret)
			json_object_array_add(devices, device);
		else if (ret == -ENODEV)	/* detached meanwhile */
			ret = 0;
	}
	close(control);

	if (ret) {
		ret = control_error(-ret);
	} else if (options[LIST_JSON]) {
		root = json_object_new_object();
		json_object_object_add(root, "devices",
				       select_columns(devices, shown, columns_shown));
		print_json(root);
		json_object_put(root);
	} else if (json_object_array_length(devices) &&
		   print_table(devices, shown, columns_shown,
			       options[NOHEADINGS], options[BYTES_ONLY])) {
		ret = fail(EXIT_SYSTEM, "list: the table cannot be made: out of memory; try --json");
	}
	json_object_put(devices);
	return ret;
}

const struct command list_command = {
	.name = "list",
	.operands = "",
	.summary = "List the attached devices; where there are none, print nothing.",
	.options = list_options,
	.option_count = ARRAY_SIZE(list_options),
	.more_help = list_help,
	.run = list,
};

static int exec_qemu_img(const char *file, bool json, bool force_share)
{
	autofree char *path = plain_path(file);
	char *argv[] = {
		"qemu-img", "info", json ? "--output=json" : "--output=human",
		force_share ? "-U" : "--", path, NULL
	};
	struct stat st;

	if (stat(file, &st))
		return fail(exit_of_errno(errno), "%s: %s; name a device or a file, see qcowctl list",
			    file, strerror(errno));
	execvp(argv[0], argv);
	return fail(EXIT_SYSTEM, "%s: cannot run qemu-img, which reads files: %s; install qemu-utils",
		    file, strerror(errno));
}

/* One line a value, those of the chain's files below it. */
static void print_lines(struct json_object *object, const char *indent)
{
	size_t i;

	json_object_object_foreach(object, key, value) {
		autofree char *text = show(key, value, false);
		autofree char *bytes = show(key, value, true);

		if (json_object_is_type(value, json_type_array)) {
			for (i = 0; i < json_object_array_length(value); i++) {
				printf("%s %zu:\n", key, i);
				print_lines(json_object_array_get_idx(value, i), "  ");
			}
		} else if (strcmp(text, bytes)) {
			printf("%s%-13s %s (%s bytes)\n", indent, key, text, bytes);
		} else {
			printf("%s%-13s %s\n", indent, key, text);
		}
	}
}

static int show_device(int index, bool json)
{
	int control = control_open(false);
	struct json_object *device;
	int ret;

	if (control < 0)
		return control_error(-control);
	ret = load_device(control, index, &device);
	close(control);
	if (ret == -ENODEV)
		return fail(EXIT_ABSENT, "/dev/qcow%d: not attached; see qcowctl list",
			    index);
	if (ret)
		return control_error(-ret);
	if (json)
		print_json(device);
	else
		print_lines(device, "");
	json_object_put(device);
	return EXIT_OK;
}

static int info(const char * const *options, int count, char **operands)
{
	int index = device_number(operands[0]);

	(void)count;
	if (index < 0)
		return exec_qemu_img(operands[0], options[INFO_JSON],
				     options[FORCE_SHARE]);
	return show_device(index, options[INFO_JSON]);
}

const struct command info_command = {
	.name = "info",
	.operands = "DEVICE|FILE",
	.summary = "Show a device with its chain, or what qemu-img info says of a file.",
	.options = info_options,
	.option_count = ARRAY_SIZE(info_options),
	.min = 1,
	.max = 1,
	.run = info,
};
