// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl: attaches QCOW2 images as block devices /dev/qcowN, with the qcow
 * kernel module. This file picks the command and reads its options.
 */
#include <errno.h>
#include <getopt.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

static int version(const char * const *options, int count, char **operands)
{
	autofree char *module = read_line("/sys/module/qcow/version");

	(void)options;
	(void)count;
	(void)operands;
	printf("qcowctl %s\n", VERSION);
	if (module)
		printf("module %s\n", module);
	else if (!access("/sys/module/qcow", F_OK))
		puts("module unknown");
	else
		puts("module not loaded");
	return EXIT_OK;
}

static const struct command version_command = {
	.name = "version",
	.operands = "",
	.summary = "Show the versions of this program and of the loaded module.",
	.run = version,
};

static const struct command * const commands[] = {
	&attach_command, &detach_command, &list_command, &info_command,
	&check_command, &version_command,
};

static int help(void)
{
	static const struct {
		int code;
		const char *text;
	} exits[] = {
#define X(name, code, text)	{ code, text },
		QCOWCTL_EXITS(X)
#undef X
	};
	size_t i;

	puts("Usage: qcowctl COMMAND [options]\n"
	     "Attach QCOW2 images as block devices /dev/qcowN.\n"
	     "\n"
	     "Commands:");
	for (i = 0; i < ARRAY_SIZE(commands); i++)
		printf("  %-8s  %s\n", commands[i]->name, commands[i]->summary);
	puts("\n"
	     "qcowctl COMMAND --help shows a command's options, qcowctl(8) explains them.\n"
	     "\n"
	     "Exit codes:");
	for (i = 0; i < ARRAY_SIZE(exits); i++)
		printf("  %d  %s\n", exits[i].code, exits[i].text);
	return EXIT_OK;
}

static int command_help(const struct command *command)
{
	const struct option_help *option = command->options;
	int i;

	printf("Usage: qcowctl %s [options] %s\n%s\n\n", command->name,
	       command->operands, command->summary);
	for (i = 0; i < command->option_count; i++, option++) {
		autofree char *name = xasprintf("%s %s", option->name,
						option->value ? option->value : "");

		printf(" %c%c%c --%-22s %s\n", option->letter ? '-' : ' ',
		       option->letter ? option->letter : ' ',
		       option->letter ? ',' : ' ', name, option->help);
	}
	puts(" -h, --help                   show this");
	if (command->more_help)
		command->more_help();
	return EXIT_OK;
}

static int bad_option(const struct command *command, int c, char **argv)
{
	const char *word = argv[optind - 1];
	char letter[3] = { '-', optopt, '\0' };

	/* Only a long option is a whole word; letters may be bundled. */
	if (optopt && strncmp(word, "--", 2))
		word = letter;
	return fail(EXIT_USAGE, "%s: option %s %s; try qcowctl %s --help",
		    command->name, word,
		    c == ':' ? "needs a value" : "cannot be understood", command->name);
}

static int run(const struct command *command, int argc, char **argv)
{
	struct option longs[MAX_OPTIONS + 2] = { 0 };
	char shorts[2 * MAX_OPTIONS + 3] = ":h";
	const char *values[MAX_OPTIONS] = { NULL };
	char *end = shorts + strlen(shorts);
	int c, i, which;

	for (i = 0; i < command->option_count; i++) {
		longs[i].name = command->options[i].name;
		longs[i].has_arg = command->options[i].value ? required_argument :
							       no_argument;
		if (command->options[i].letter)
			*end++ = command->options[i].letter;
		if (command->options[i].letter && command->options[i].value)
			*end++ = ':';
	}
	longs[i].name = "help";

	while ((c = getopt_long(argc, argv, shorts, longs, &which)) != -1) {
		if (c == '?' || c == ':')
			return bad_option(command, c, argv);
		/* A long option gives 0 and its place in the table. */
		for (i = 0; c && i < command->option_count; i++) {
			if (command->options[i].letter == c)
				which = i;
		}
		if (c == 'h' || (!c && which == command->option_count))
			return command_help(command);
		values[which] = optarg ? optarg : "";
	}
	argc -= optind;
	if (argc < command->min || (command->max >= 0 && argc > command->max))
		return fail(EXIT_USAGE, "%s: %s operands; give %s, or try qcowctl %s --help",
			    command->name, argc < command->min ? "too few" : "too many",
			    *command->operands ? command->operands : "none",
			    command->name);
	return command->run(values, argc, argv + optind);
}

int main(int argc, char **argv)
{
	const char *name = argc > 1 ? argv[1] : "";
	int ret = -1;
	size_t i;

	setlocale(LC_CTYPE, "");
	if (!strcmp(name, "--help") || !strcmp(name, "-h"))
		ret = help();
	if (!strcmp(name, "--version") || !strcmp(name, "-V"))
		name = "version";
	for (i = 0; ret < 0 && i < ARRAY_SIZE(commands); i++) {
		if (!strcmp(name, commands[i]->name))
			ret = run(commands[i], argc - 1, argv + 1);
	}
	if (ret < 0)
		return fail(EXIT_USAGE, "no command '%s'; try qcowctl --help", name);
	/* What was promised on standard output has to have got there. */
	if (!ret && (fflush(stdout) || ferror(stdout)))
		return fail(EXIT_SYSTEM, "standard output: %s; mend that and try again",
			    strerror(errno));
	return ret;
}
