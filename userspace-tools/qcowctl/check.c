// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl check, and the repair that comes before an attach. Both are the work of
 * qemu-img, done while we hold QEMU's locks on the image, so that nobody gets in
 * between: qemu-img itself is told to take none.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "qcowctl.h"

#define EXIT_NOT_FOUND	127

/* What the exit codes of qemu-img check mean */
enum { CHECK_CLEAN = 0, CHECK_ERRORS = 2, CHECK_LEAKS = 3 };

/* How QEMU is to open a file, as NODE.OPTION=VALUE,..., without locking it. */
static char *file_options(const char *node, const char *path)
{
	autofree char *quoted = xreallocarray(NULL, 2 * strlen(path) + 1, 1);
	const char *from = path;
	char *to = quoted;
	struct stat st;
	bool block;

	block = !stat(path, &st) && S_ISBLK(st.st_mode);
	/* A comma ends a value, but for one that is doubled. */
	do {
		if (*from == ',')
			*to++ = ',';
		*to++ = *from;
	} while (*from++);
	return xasprintf("%s.driver=%s,%s.locking=off,%s.filename=%s", node,
			 block ? "host_device" : "file", node, node, quoted);
}

int run_program(char **argv, bool quiet)
{
	int status, fd;
	pid_t pid;

	pid = fork();
	if (!pid) {
		fd = quiet ? open("/dev/null", O_WRONLY) : -1;
		if (fd >= 0) {
			dup2(fd, STDOUT_FILENO);
			dup2(fd, STDERR_FILENO);
		}
		execvp(argv[0], argv);
		_exit(EXIT_NOT_FOUND);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		return EXIT_SYSTEM;
	return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_SYSTEM;
}

/* Run qemu-img check on the image of a chain. Returns what it exits with. */
static int run_check(const struct chain *chain, bool repair, bool quiet)
{
	bool data = chain->layers[0].flags & QCOW_LAYER_DATA_FILE;
	autofree char *file = file_options("file", chain->files[0].path);
	autofree char *data_file = data ? file_options("data-file", chain->files[1].path) : NULL;
	autofree char *options = xasprintf("driver=qcow2,%s%s%s", file, data ? "," : "",
					   data_file ?: "");
	char *argv[] = {
		"qemu-img", "check", "--image-opts", options,
		repair ? "-r" : NULL, "all", NULL
	};

	return run_program(argv, quiet);
}

int repair_dirty(const struct chain *chain, bool refuse)
{
	const uint64_t marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
	const char *path = chain->files[0].path;
	autofree char *plain = plain_path(path);
	autofree char *word = shell_quote(plain);
	int fd = chain->layers[0].fd, ret;
	struct header header;

	/* Damage is not for us to mend unasked: the driver refuses the image. */
	ret = header_read(fd, path, true, &header);
	if (ret || (header.incompatible & marks) != INCOMPAT_DIRTY)
		return ret;
	if (refuse)
		return fail(EXIT_REFUSED, "%s: is marked dirty, it was not closed cleanly; leave out --no-repair, run qemu-img check -f qcow2 -r all %s, or use --read-only",
			    path, word);
	fail(EXIT_OK, "warning: %s: is marked dirty, it was not closed cleanly; repairing it with qemu-img check -r all",
	     path);
	ret = run_check(chain, true, true);
	if (ret == EXIT_NOT_FOUND)
		return fail(EXIT_REFUSED, "%s: there is no qemu-img to repair it; install qemu-utils, or run elsewhere: qemu-img check -f qcow2 -r all %s",
			    path, word);
	if (ret != CHECK_CLEAN || header_read(fd, path, true, &header) ||
	    header.incompatible & marks)
		return fail(EXIT_REFUSED, "%s: cannot be repaired; see what qemu-img check -f qcow2 -r all %s says, or use --read-only",
			    path, word);
	return fail(EXIT_OK, "warning: %s: repaired", path);
}

/* The image of an attached device, if it may be looked at. */
static int image_of_device(int index, bool repair, char **path)
{
	autofree char *image = xasprintf("/sys/block/qcow%d/qcow/image", index);
	autofree char *read_only = xasprintf("/sys/block/qcow%d/qcow/read_only", index);
	autofree char *value = read_line(read_only);

	*path = read_line(image);
	if (!*path || !value)
		return not_attached(xasprintf("/dev/qcow%d", index));
	if (repair || strcmp(value, "1"))
		return fail(EXIT_BUSY, "/dev/qcow%d: %s; detach it, and check %s",
			    index, repair ? "cannot be repaired while it is attached" :
					    "is attached for writing, and changes",
			    *path);
	return EXIT_OK;
}

enum { REPAIR, OPTIONS };

static const struct option_help options[OPTIONS + 1] = {
	[REPAIR] = { 'r', "repair", NULL, "mend what is wrong; not of a DEVICE" },
};

static int check(const char * const *values, char **operands)
{
	bool repair = values[REPAIR];
	/* Backing files are not looked at, and what they are does not matter. */
	struct chain chain = { .read_only = !repair, .backing_format = QCOW_FORMAT_RAW };
	int index = device_number(operands[0]);
	char *path = operands[0];
	int ret = EXIT_OK;

	if (index >= 0)
		ret = image_of_device(index, repair, &path);
	ret = ret ?: chain_open(&chain, path);
	if (ret)
		return ret;
	switch (run_check(&chain, repair, false)) {
	case CHECK_CLEAN:
		return EXIT_OK;
	case CHECK_ERRORS:
		return fail(EXIT_REFUSED, "%s: is damaged; %s", path, repair ?
			    "not all of it could be repaired" :
			    "qcowctl check --repair mends what can be");
	case CHECK_LEAKS:
		return fail(EXIT_LEAKS, "%s: has leaked clusters, which take space and do no harm; qcowctl check --repair frees them",
			    path);
	case EXIT_NOT_FOUND:
		return fail(EXIT_SYSTEM, "%s: cannot run qemu-img, which checks images; install qemu-utils",
			    path);
	default:
		return fail(EXIT_SYSTEM, "%s: qemu-img could not check it; see above", path);
	}
}

const struct command check_command = {
	.name = "check",
	.operands = "IMAGE|DEVICE",
	.summary = "Look for errors in an image's metadata, with qemu-img check.",
	.options = options,
	.min = 1, .max = 1,
	.run = check,
};
