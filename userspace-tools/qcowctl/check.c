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

/* What no program exits with */
enum { CANNOT_OPEN = 256, HAS_BITMAPS };

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

char *qemu_name(const char *image, const char *data, int encryption)
{
	const char *format = encryption == QCOW_ENCRYPTION_LUKS ? "luks" : "aes";
	struct json_object *options = json_object_new_object();
	char *name;

	json_object_object_add(options, "driver", json_object_new_string("qcow2"));
	json_object_object_add(options, "file", file_options(image));
	if (data)
		json_object_object_add(options, "data-file", file_options(data));
	json_object_object_add(options, "backing", NULL);
	if (encryption) {
		json_object_object_add(options, "encrypt.format",
				       json_object_new_string(format));
		json_object_object_add(options, "encrypt.key-secret",
				       json_object_new_string("key"));
	}
	name = xasprintf("json:%s", json_object_to_json_string_ext(options,
								   JSON_C_TO_STRING_PLAIN));
	json_object_put(options);
	return name;
}

int run_program(char **argv, bool quiet)
{
	pid_t self = getpid(), pid;
	int status, fd;

	pid = fork();
	if (!pid) {
		/* It goes with us; our locks go with it, see open_file(). */
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		if (getppid() != self)
			_exit(EXIT_SYSTEM);
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

/* What qemu-img is to check, and how */
struct job {
	const char *image;
	const char *data;	/* its data file, or NULL */
	int encryption;		/* QCOW_ENCRYPTION_* */
	int secret;		/* file with its passphrase, if it is encrypted */
	const char *seconds;	/* that it may take, or NULL */
	bool quiet;
};

/*
 * Run qemu-img check, or have qemu-io open the image as to write it if @opens.
 * Returns what that exits with.
 */
static int run_qemu(const struct job *job, bool repair, bool opens)
{
	autofree char *name = qemu_name(job->image, job->data, job->encryption);
	/* One that is not asked for does no harm. */
	autofree char *secret = job->encryption ?
		xasprintf("--object=secret,id=key,file=/dev/fd/%d", job->secret) :
		xstrdup("--object=secret,id=key,data=");
	char *argv[] = {
		"timeout", "--foreground", (char *)job->seconds,
		"qemu-img", "check", secret, name, repair ? "-r" : NULL, "all", NULL
	};
	char *opening[] = { "qemu-io", secret, "-c", "quit", name, NULL };

	return run_program(opens ? opening : job->seconds ? argv : argv + 3, job->quiet);
}

/*
 * Where there are bitmaps, or autoclear bits that QEMU does not know, -r writes the
 * header before it has read the snapshot table, and frees all snapshots as leaks (QEMU
 * 7.2). Opened in the usual way, the image loses what is out of date, is repaired if
 * it is dirty, and keeps the snapshots.
 */
static bool loses_snapshots(const struct header *header)
{
	return header->snapshots &&
	       (header->autoclear & ~(uint64_t)AUTOCLEAR_KNOWN || header->bitmaps);
}

/*
 * *@status becomes that of qemu-img check, or of what has to be done before. The
 * programs get the files that we have open and locked: others may have their names now.
 */
static int run_check_chain(const struct chain *chain, bool repair, bool quiet, int *status)
{
	const struct qcow_layer *layer = chain->layers;
	autofree char *image = xasprintf("/proc/self/fd/%d", layer->fd);
	autofree char *data = layer->flags & QCOW_LAYER_DATA_FILE ?
			      xasprintf("/proc/self/fd/%d", layer->data_fd) : NULL;
	const char *path = chain->files[0].path;
	struct job job = {
		.image = image, .data = data, .secret = chain->secret, .quiet = quiet,
	};
	struct header header;
	int ret;

	ret = header_read(layer->fd, path, true, &header);
	if (ret)
		return ret;
	job.encryption = header.encryption;
	if (!repair || !loses_snapshots(&header)) {
		*status = run_qemu(&job, repair, false);
		return EXIT_OK;
	}
	*status = run_qemu(&job, false, true);
	if (*status) {
		*status = *status == EXIT_NOT_FOUND ? *status : CANNOT_OPEN;
		return EXIT_OK;
	}
	ret = header_read(layer->fd, path, true, &header);
	if (ret)
		return ret;
	repair = !loses_snapshots(&header);
	*status = run_qemu(&job, repair, false);
	if (!repair && (*status == CHECK_ERRORS || *status == CHECK_LEAKS))
		*status = HAS_BITMAPS;
	return EXIT_OK;
}

int repair_dirty(const struct chain *chain, bool refuse)
{
	const uint64_t marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT;
	const char *path = chain->files[0].path;
	autofree char *plain = plain_path(path);
	autofree char *word = shell_quote(plain);
	int fd = chain->layers[0].fd, ret, status;
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
	ret = run_check_chain(chain, true, true, &status);
	if (ret)
		return ret;
	if (status == EXIT_NOT_FOUND)
		return fail(EXIT_REFUSED, "%s: there is no qemu-img to repair it; install qemu-utils, or run elsewhere: qemu-img check -f qcow2 -r all %s",
			    path, word);
	if (status != CHECK_CLEAN || header_read(fd, path, true, &header) ||
	    header.incompatible & marks)
		return fail(EXIT_REFUSED, "%s: cannot be repaired; see what qcowctl check %s says, or use --read-only",
			    path, word);
	return fail(EXIT_OK, "warning: %s: repaired", path);
}

enum { REPAIR, TIMEOUT, DATA_FILE, KEY_FILE, KEYRING, OPTIONS };

static const struct option_help options[OPTIONS + 1] = {
	[REPAIR] = { 'r', "repair", NULL, "mend what is wrong; not of a DEVICE" },
	[TIMEOUT] = { 't', "timeout", "SECONDS",
		"most time for which a DEVICE's writers wait (default: 60)" },
	[DATA_FILE] = { DATA_FILE, "data-file", "FILE",
		"where an IMAGE's external data file is" },
	[KEY_FILE] = { KEY_FILE, "key-file", "FILE", "has the passphrase of an encrypted image" },
	[KEYRING] = { KEYRING, "keyring", "NAME", "take it from the user key of this name" },
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
	case HAS_BITMAPS:
		return fail(EXIT_REFUSED, "%s: has snapshots, which qemu-img check -r would delete where there are bitmaps, too; remove these first, with qemu-img bitmap --remove",
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

/* Ask for the passphrase of a device's image, if it is encrypted. */
static int device_secret(struct chain *chain, const char *device, const char *image,
			 struct job *job)
{
	struct qcow_layer layer = { .fd = open(image, O_RDONLY | O_CLOEXEC) };
	struct header header;
	int ret;

	if (layer.fd < 0)
		return fail(EXIT_ABSENT, "%s: its image %s cannot be reached by that name; detach it, and check the image",
			    device, image);
	chain->image = image;
	chain->layers = &layer;
	ret = header_read(layer.fd, image, true, &header);
	if (!ret && header.encryption)
		ret = key_unlock(chain, &header, &layer);
	job->encryption = header.encryption;
	job->secret = chain->secret;
	close(layer.fd);
	return ret;
}

/*
 * Check the image of a device while the driver has it frozen, and its locks, too.
 * However we end, so does that.
 */
static int check_device(int index, const char *seconds, struct chain *chain)
{
	autofree char *name = xasprintf("/dev/qcow%d", index);
	struct qcow_freeze freeze = {
		.size = sizeof(freeze), .index = index, .timeout = atoi(seconds),
	};
	struct qcow_thaw thaw = { .size = sizeof(thaw), .index = index };
	autofree char *image = attribute(index, "image");
	autofree char *data = attribute(index, "data_file");
	autofree char *read_only = attribute(index, "read_only");
	autofree char *swap = device_swap(index), *now = NULL;
	struct job job = { .image = image, .data = data, .seconds = seconds };
	int status;

	if (!control_open())
		return control_error();
	/* What is written last may need memory that is free only when swap is written. */
	if (swap)
		return fail(EXIT_BUSY, "%s: in use as swap, which must not wait for a check; swapoff %s first",
			    name, swap);
	if (!image)
		return not_attached(name);
	status = device_secret(chain, name, image, &job);
	if (status)
		return status;
	/* Of one that is read-only nobody waits for the end. */
	if (read_only && !strcmp(read_only, "1"))
		job.seconds = NULL;
	if (control_call(QCOW_CTL_FREEZE, &freeze))
		return freeze_failed(name);
	/* Meanwhile it may have become another device. */
	now = attribute(index, "image");
	if (!now || strcmp(now, image))
		return fail(EXIT_BUSY, "%s: was just attached anew; try again", name);
	status = run_qemu(&job, false, false);
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
		.key_files = values[KEY_FILE],
		.keyring = values[KEYRING],
		.image_only = true,
	};
	const char *path = operands[0], *seconds = values[TIMEOUT] ?: "60";
	int index = device_number(path), number, ret, status;

	if (!parse_number(seconds, &number) || !number || number > QCOW_FREEZE_TIMEOUT_MAX)
		return fail(EXIT_USAGE, "check: --timeout cannot be '%s'; give seconds, from 1 to %d",
			    seconds, QCOW_FREEZE_TIMEOUT_MAX);
	if (index >= 0 && chain.data_file)
		return fail(EXIT_USAGE, "check: --data-file goes with an image only; leave it out");
	if (index >= 0 && !repair)
		return check_device(index, seconds, &chain);
	if (index >= 0) {
		autofree char *name = xasprintf("/dev/qcow%d", index);
		autofree char *image = attribute(index, "image");

		return !image ? not_attached(name) :
			fail(EXIT_BUSY, "%s: cannot be repaired while it is attached; detach it, and check %s",
			     name, image);
	}
	ret = chain_open(&chain, path) ?: run_check_chain(&chain, repair, false, &status);
	return ret ?: judge(status, path, repair, false);
}

const struct command check_command = {
	.name = "check",
	.operands = "IMAGE|DEVICE",
	.summary = "Look for errors in an image's metadata, with qemu-img check.",
	.options = options,
	.min = 1, .max = 1,
	.run = check,
};
