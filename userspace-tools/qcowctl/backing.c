// SPDX-License-Identifier: GPL-2.0-only
/*
 * Names of backing files mean here what they mean to QEMU, or are refused:
 *
 *   base.img          beside the overlay: the directory part of the path that the
 *                     overlay was opened by, symbolic links not followed
 *   /dir/base.img     as it is
 *   file:base.img     QEMU takes it from the working directory
 *   json:{...}        likewise; a tree of options that comes down to one file
 *   nbd:...           any other protocol: refused
 *
 * Names of external data files likewise, but that a relative one is taken from
 * beside the image, too, where QEMU takes it from its working directory.
 */
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>
#include <linux/qcow.h>

#include "chain.h"
#include "util.h"

static bool is_file_driver(const char *driver)
{
	return !strcmp(driver, "file") || !strcmp(driver, "host_device");
}

static int wrong_protocol(const char *overlay, const char *what,
			  const char *protocol)
{
	return fail(EXIT_REFUSED, "%s: its %s is reached by the protocol '%s'; only local files and block devices can be attached",
		    overlay, what, protocol);
}

/* @name has a protocol: leave the path behind it if that is a local one. */
static int strip_protocol(const char *overlay, const char *what,
			  const char *name, char **path)
{
	size_t len = strcspn(name, ":");
	autofree char *protocol = xstrndup(name, len);

	if (!is_file_driver(protocol))
		return wrong_protocol(overlay, what, protocol);
	*path = xstrdup(name + len + 1);
	return EXIT_OK;
}

/* Take the string @key out of @options; NULL if there is none. To be freed. */
static char *take(struct json_object *options, const char *key)
{
	struct json_object *value = json_object_object_get(options, key);
	char *string;

	if (!json_object_is_type(value, json_type_string))
		return NULL;
	string = xstrdup(json_object_get_string(value));
	json_object_object_del(options, key);
	return string;
}

/* Turn "file": {"filename": ...} into the other way to write it, "file.filename". */
static void flatten(struct json_object *options)
{
	struct json_object *file = json_object_object_get(options, "file");

	if (!json_object_is_type(file, json_type_object))
		return;
	json_object_object_foreach(file, name, value) {
		autofree char *key = xasprintf("file.%s", name);

		json_object_object_add(options, key, json_object_get(value));
	}
	json_object_object_del(options, "file");
}

/* Reduce @options to one local file; what is left over in them is refused. */
static int reduce(const char *overlay, const char *what,
		  struct json_object *options, char **path, int *format)
{
	autofree char *driver = take(options, "driver");
	autofree char *protocol = take(options, "file.driver");
	autofree char *filename = take(options, "file.filename");

	if (driver && format_of_name(driver)) {
		*format = format_of_name(driver);
	} else if (driver && !protocol && !filename) {
		/* The file itself, with no format driver on it: raw. */
		*format = QCOW_FORMAT_RAW;
		protocol = xstrdup(driver);
		filename = take(options, "filename");
	} else if (driver) {
		return fail(EXIT_REFUSED, "%s: its %s has the format '%s'; only raw and qcow2 can be attached",
			    overlay, what, driver);
	}
	if (protocol && !is_file_driver(protocol))
		return wrong_protocol(overlay, what, protocol);
	json_object_object_foreach(options, key, value) {
		(void)value;
		return fail(EXIT_REFUSED, "%s: the json: name of its %s has the option '%s'; only driver, file.driver and file.filename, all strings, can be followed",
			    overlay, what, key);
	}
	if (!filename || !*filename)
		return fail(EXIT_REFUSED, "%s: the json: name of its %s has no file.filename; correct it with qemu-img rebase -u",
			    overlay, what);
	if (!protocol && has_protocol(filename))
		return strip_protocol(overlay, what, filename, path);
	*path = xstrdup(filename);
	return EXIT_OK;
}

static int resolve_json(const char *overlay, const char *what, const char *text,
			char **path, int *format)
{
	struct json_tokener *parser = json_tokener_new();
	struct json_object *options = NULL;
	bool complete = false;
	int ret;

	if (parser) {
		options = json_tokener_parse_ex(parser, text, strlen(text));
		complete = json_tokener_get_parse_end(parser) == strlen(text);
		json_tokener_free(parser);
	}
	if (!complete || !json_object_is_type(options, json_type_object)) {
		ret = fail(EXIT_REFUSED, "%s: the json: name of its %s is not one JSON object; correct it with qemu-img rebase -u",
			   overlay, what);
	} else {
		flatten(options);
		ret = reduce(overlay, what, options, path, format);
	}
	json_object_put(options);
	return ret;
}

int backing_resolve(const char *overlay, const char *what, const char *name,
		    char **path, int *format)
{
	const char *slash = strrchr(overlay, '/');
	int dir = slash ? slash + 1 - overlay : 0;

	*format = 0;
	if (!strncmp(name, "json:", 5))
		return resolve_json(overlay, what, name + 5, path, format);
	if (has_protocol(name))
		return strip_protocol(overlay, what, name, path);
	*path = xasprintf("%.*s%s", *name == '/' ? 0 : dir, overlay, name);
	return EXIT_OK;
}
