// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl check, and the repair that comes before an attach. Both are the work of
 * qemu-img, done while we hold QEMU's locks on the image, or the driver does, so that
 * nobody gets in between: qemu-img itself is told to take none.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "qcowctl.h"

#define AUTOCLEAR_BITMAPS	0x1
#define AUTOCLEAR_KNOWN		0x3

/* What the exit codes of qemu-img check mean */
enum { CHECK_CLEAN = 0, CHECK_ERRORS = 2, CHECK_LEAKS = 3 };

/* What timeout(1) exits with, and programs that are not there */
#define TIMED_OUT	124
#define EXIT_NOT_FOUND	127
#define CANNOT_OPEN	126

/* How QEMU is to open a file, without locking it. */
static struct json_object *file_options(const char *path)
{
	struct json_object *options = json_object_new_object();
	struct stat st;
	bool block = !stat(path, &st) && S_ISBLK(st.st_mode);

	json_object_object_add(options, "driver",
			       json_object_new_string(block ? "host_device" : "file"));
	json_object_object_add(options, "filename", json_object_new_string(path));
	json_object_object_add(options, "locking", json_object_new_string("off"));
	return options;
}

char *qemu_name(const char *image, const char *data)
{
	struct json_object *options = json_object_new_object();
	char *name;

	json_object_object_add(options, "driver", json_object_new_string("qcow2"));
	json_object_object_add(options, "file", file_options(image));
	if (data)
		json_object_object_add(options, "data-file", file_options(data));
	json_object_object_add(options, "backing", NULL);
	name = xasprintf("json:%s", json_object_to_json_string_ext(options,
								   JSON_C_TO_STRING_PLAIN));
	json_object_put(options);
	return name;
}

int run_program(char **argv, bool quiet)
{
	int status, fd;
	pid_t pid;

	pid = fork();
	if (!pid) {
		/* What it does to files is for as long as we hold them. */
		prctl(PR_SET_PDEATHSIG, SIGTERM);
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

/*
 * Run qemu-img check on an image, and its data file if it has one, for so many
 * @seconds at most, if not NULL. Returns what it exits with, or CANNOT_OPEN.
 */
static int run_check(const char *image, const char *data, const char *seconds,
		     bool repair, bool open_first, bool quiet)
{
	autofree char *name = qemu_name(image, data);
	char *argv[] = {
		"timeout", "--foreground", (char *)seconds,
		"qemu-img", "check", name, repair ? "-r" : NULL, "all", NULL
	};
	char *opening[] = { "qemu-io", "-c", "quit", name, NULL };
	int status = open_first ? run_program(opening, quiet) : 0;

	if (status)
		return status == EXIT_NOT_FOUND ? status : CANNOT_OPEN;
	return run_program(seconds ? argv : argv + 3, quiet);
}

/*
 * Where bitmaps or autoclear bits are not up to date, -r writes the header before it
 * has read the snapshot table, and frees all snapshots as leaks (QEMU 7.2). Opened
 * in the usual way, the image loses what is out of date, and keeps the snapshots.
 */
static bool loses_snapshots(const struct header *header)
{
	return header->snapshots &&
	       (header->autoclear & ~(uint64_t)AUTOCLEAR_KNOWN ||
		(header->bitmaps && !(header->autoclear & AUTOCLEAR_BITMAPS)));
}

static int run_check_chain(const struct chain *chain, bool repair, bool quiet)
{
	bool data = chain->layers[0].flags & QCOW_LAYER_DATA_FILE;
	struct header header;

	return header_read(chain->layers[0].fd, chain->files[0].path, true, &header) ?:
	       run_check(chain->files[0].path, data ? chain->files[1].path : NULL, NULL,
			 repair, repair && loses_snapshots(&header), quiet);
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
		return fail(EXIT_REFUSED, "%s: is marked dirty, it was not closed cleanly; leave out --no-repair, run qcowctl check --repair %s, or use --read-only",
			    path, word);
	fail(EXIT_OK, "warning: %s: is marked dirty, it was not closed cleanly; repairing it with qemu-img check -r all",
	     path);
	ret = run_check_chain(chain, true, true);
	if (ret == EXIT_NOT_FOUND)
		return fail(EXIT_REFUSED, "%s: there is no qemu-img to repair it; install qemu-utils, or run elsewhere: qemu-img check -f qcow2 -r all %s",
			    path, word);
	if (ret != CHECK_CLEAN || header_read(fd, path, true, &header) ||
	    header.incompatible & marks)
		return fail(EXIT_REFUSED, "%s: cannot be repaired; see what qcowctl check %s says, or use --read-only",
			    path, word);
	return fail(EXIT_OK, "warning: %s: repaired", path);
}

enum { REPAIR, TIMEOUT, DATA_FILE, OPTIONS };

static const struct option_help options[OPTIONS + 1] = {
	[REPAIR] = { 'r', "repair", NULL, "mend what is wrong; not of a DEVICE" },
	[TIMEOUT] = { 't', "timeout", "SECONDS",
		"most time for which a DEVICE's writers wait (default: 60)" },
	[DATA_FILE] = { DATA_FILE, "data-file", "FILE",
		"where an IMAGE's external data file is" },
};

/* What @status of qemu-img check means for the image @path. */
static int judge(int status, const char *path, bool repair, bool attached)
{
	const char *first = attached ? "detach it, and " : "";

	switch (status) {
	case CHECK_CLEAN:
		return EXIT_OK;
	case CHECK_ERRORS:
		return fail(EXIT_REFUSED, "%s: is damaged; %s%s", path, first, repair ?
			    "not all of it could be repaired" :
			    "qcowctl check --repair mends what can be");
	case CHECK_LEAKS:
		return fail(EXIT_LEAKS, "%s: has leaked clusters, which take space and do no harm; %sqcowctl check --repair frees them",
			    path, first);
	case CANNOT_OPEN:
		return fail(EXIT_REFUSED, "%s: has snapshots, which qemu-img check -r may delete, and qemu-io cannot open it to prevent that; repair a copy, with qemu-img check -f qcow2 -r all",
			    path);
	case EXIT_NOT_FOUND:
		return fail(EXIT_SYSTEM, "%s: cannot run qemu-img, which checks images; install qemu-utils",
			    path);
	default:
		return fail(EXIT_SYSTEM, "%s: qemu-img could not check it; see above", path);
	}
}

static int freeze_failed(const char *name)
{
	if (errno == ENODEV)
		return not_attached(name);
	if (errno == EPERM || errno == ENOTTY || errno == E2BIG)
		return control_error();
	if (errno == EBUSY)
		return fail(EXIT_BUSY, "%s: is being checked, or attached, just now; try again",
			    name);
	return fail(EXIT_SYSTEM, "%s: not everything can be written: %m; see the kernel log, detach it, and check its image",
		    name);
}

/*
 * Check the image of a device while the driver has it frozen, and its locks, too.
 * However we end, so does that.
 */
static int check_device(int index, const char *seconds)
{
	autofree char *name = xasprintf("/dev/qcow%d", index);
	struct qcow_freeze freeze = {
		.size = sizeof(freeze), .index = index, .timeout = atoi(seconds),
	};
	struct qcow_thaw thaw = { .size = sizeof(thaw), .index = index };
	autofree char *image = NULL, *data = NULL, *read_only = NULL;
	autofree char *swap = device_swap(index);
	int status;

	if (!control_open())
		return control_error();
	/* What is written last may need memory that is free only when swap is written. */
	if (swap)
		return fail(EXIT_BUSY, "%s: in use as swap, which must not wait for a check; swapoff %s first",
			    name, swap);
	if (control_call(QCOW_CTL_FREEZE, &freeze))
		return freeze_failed(name);
	image = attribute(index, "image");
	data = attribute(index, "data_file");
	read_only = attribute(index, "read_only");
	if (!image || access(image, R_OK))
		return fail(EXIT_ABSENT, "%s: its image %s cannot be reached by that name; detach it, and check the image",
			    name, image ?: "");
	/* Of one that is read-only nobody waits for the end. */
	status = run_check(image, data, read_only && !strcmp(read_only, "1") ? NULL : seconds,
			   false, false, false);
	if (control_call(QCOW_CTL_THAW, &thaw) || status == TIMED_OUT)
		return fail(EXIT_BUSY, "%s: the check took longer than %s seconds, and what it said is of no meaning; use a larger --timeout, or detach it, and check %s",
			    name, seconds, image);
	return judge(status, image, false, true);
}

static int check(const char * const *values, char **operands)
{
	bool repair = values[REPAIR];
	/* Backing files are not looked at, and what they are does not matter. */
	struct chain chain = {
		.read_only = !repair,
		.must_write = repair,
		.data_file = values[DATA_FILE],
		.backing_format = QCOW_FORMAT_RAW,
	};
	const char *path = operands[0], *seconds = values[TIMEOUT] ?: "60";
	int index = device_number(path), number, ret;

	if (!parse_number(seconds, &number) || !number || number > QCOW_FREEZE_TIMEOUT_MAX)
		return fail(EXIT_USAGE, "check: --timeout cannot be '%s'; give seconds, from 1 to %d",
			    seconds, QCOW_FREEZE_TIMEOUT_MAX);
	if (index >= 0 && chain.data_file)
		return fail(EXIT_USAGE, "check: --data-file goes with an image only; leave it out");
	if (index >= 0 && !repair)
		return check_device(index, seconds);
	if (index >= 0) {
		autofree char *name = xasprintf("/dev/qcow%d", index);
		autofree char *image = attribute(index, "image");

		return !image ? not_attached(name) :
			fail(EXIT_BUSY, "%s: cannot be repaired while it is attached; detach it, and check %s",
			     name, image);
	}
	ret = chain_open(&chain, path);
	return ret ?: judge(run_check_chain(&chain, repair, false), path, repair, false);
}

const struct command check_command = {
	.name = "check",
	.operands = "IMAGE|DEVICE",
	.summary = "Look for errors in an image's metadata, with qemu-img check.",
	.options = options,
	.min = 1, .max = 1,
	.run = check,
};
