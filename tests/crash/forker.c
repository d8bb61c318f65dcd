// SPDX-License-Identifier: GPL-2.0-only
/*
 * forker.so: a program that is run many times, loaded once.
 *
 * Preloaded into a program, it waits for requests on the socket FORKER_FD before
 * the program has begun, and forks for each: there the program runs as it always
 * does. Most of the time that qemu-img takes to check a small image goes into
 * loading its libraries.
 *
 * A request is a length and then strings: the file for its output, and the
 * arguments. The answer is the status of the process, as of waitpid().
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_WORDS 512

typedef int start_fn(int (*main)(int, char **, char **), int argc, char **argv,
		     void (*init)(void), void (*fini)(void),
		     void (*rtld_fini)(void), void *stack_end);

/* Returns in each child, with its arguments in @words; their number. */
static int serve(int fd, char **words)
{
	static char text[65536];
	uint32_t length;

	while (recv(fd, &length, sizeof(length), MSG_WAITALL) == sizeof(length) &&
	       length < sizeof(text) &&
	       recv(fd, text, length, MSG_WAITALL) == (ssize_t)length) {
		pid_t pid = fork();
		int status = -1;

		if (!pid) {
			char *at = text + strlen(text) + 1;
			int n = 0, i, out;

			out = open(text, O_WRONLY | O_CREAT | O_TRUNC, 0644);
			if (out < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0)
				_exit(127);
			close(out);
			close(fd);
			while (at < text + length && n < MAX_WORDS / 2) {
				words[n++] = at;
				at += strlen(at) + 1;
			}
			/* The environment follows the arguments, as on a stack. */
			words[n] = NULL;
			for (i = 0; environ[i] && n + i + 2 < MAX_WORDS; i++)
				words[n + 1 + i] = environ[i];
			words[n + 1 + i] = NULL;
			return n;
		}
		if (pid > 0)
			waitpid(pid, &status, 0);
		if (write(fd, &status, sizeof(status)) != sizeof(status))
			break;
	}
	_exit(0);
}

int __libc_start_main(int (*main)(int, char **, char **), int argc, char **argv,
		      void (*init)(void), void (*fini)(void),
		      void (*rtld_fini)(void), void *stack_end)
{
	static char *words[MAX_WORDS];
	start_fn *start = dlsym(RTLD_NEXT, "__libc_start_main");
	const char *fd = getenv("FORKER_FD");

	if (fd) {
		unsetenv("LD_PRELOAD");
		unsetenv("FORKER_FD");
		argc = serve(atoi(fd), words);
		argv = words;
	}
	return start(main, argc, argv, init, fini, rtld_fini, stack_end);
}
