// SPDX-License-Identifier: GPL-2.0-only
/*
 * qcowctl: attaches QCOW2 images as block devices /dev/qcowN, with the qcow
 * kernel module. This file picks the command and reads its options.
 */
#include <getopt.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "qcowctl.h"

static int version(const char * const *values, char **operands)
{
	autofree char *module = read_text("/sys/module/qcow/version");
	bool loaded = !access("/sys/module/qcow", F_OK);

	(void)values;
	(void)operands;
	printf("qcowctl %s\nmodule %s\n", VERSION, module ?: loaded ? "unknown" : "not loaded");
	return EXIT_OK;
}

static const struct command version_command = {
	.name = "version",
	.operands = "",
	.summary = "Show the versions of this program and of the loaded module.",
	.options = &(struct option_help) { 0 },
	.run = version,
};

static const struct command * const commands[] = {
	&attach_command, &detach_command, &list_command, &info_command,
	&check_command, &version_command,
};

static int help(void)
{
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
	     "Exit codes:\n"
	     "  0  success\n"
	     "  1  the system failed: I/O, memory, a missing program\n"
	     "  2  wrong usage\n"
	     "  3  image refused: not qcow2, damaged, unsupported\n"
	     "  4  busy: locked, in use, or the number is taken\n"
	     "  5  no such device, file or snapshot\n"
	     "  6  not permitted, or the driver is not loaded\n"
	     "  7  check: leaked clusters and nothing worse");
	return EXIT_OK;
}

static int command_help(const struct command *command)
{
	const struct option_help *option;

	printf("Usage: qcowctl %s [options] %s\n%s\n\n", command->name,
	       command->operands, command->summary);
	for (option = command->options; option->name; option++) {
		const char *value = option->value ?: "";
		autofree char *name = xasprintf(*value == '[' ? "%s%s" : "%s %s",
						option->name, value);

		if (option->letter < MAX_OPTIONS)
			printf("     --%-22s %s\n", name, option->help);
		else
			printf(" -%c, --%-22s %s\n", option->letter, name, option->help);
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
	const struct option_help *options = command->options;
	struct option longs[MAX_OPTIONS + 2] = { { "help", no_argument, NULL, 'h' } };
	const char *values[MAX_OPTIONS] = { NULL };
	char shorts[2 * MAX_OPTIONS + 3] = ":h";
	char *end = shorts + strlen(shorts);
	int c, i, ret;

	for (i = 0; options[i].name; i++) {
		longs[i + 1] = (struct option) {
			.name = options[i].name,
			.has_arg = !options[i].value ? no_argument :
				   *options[i].value == '[' ? optional_argument :
							      required_argument,
			.val = options[i].letter,
		};
		if (options[i].letter >= MAX_OPTIONS)
			end += sprintf(end, options[i].value ? "%c:" : "%c", options[i].letter);
	}

	while ((c = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
		if (c == '?' || c == ':')
			return bad_option(command, c, argv);
		if (c == 'h')
			return command_help(command);
		for (i = 0; options[i].letter != c; i++)
			;
		values[i] = options[i].many && values[i] ?
			    xasprintf("%s\n%s", values[i], optarg) : optarg ?: "";
	}
	argc -= optind;
	if (argc < command->min || (command->max >= 0 && argc > command->max))
		return fail(EXIT_USAGE, "%s: %s operands; give %s, or try qcowctl %s --help",
			    command->name, argc < command->min ? "too few" : "too many",
			    *command->operands ? command->operands : "none",
			    command->name);
	ret = command->run(values, argv + optind);
	key_forget();
	return ret;
}

int main(int argc, char **argv)
{
	const char *name = argc > 1 ? argv[1] : "";
	int ret = -1;
	size_t i;

	setlocale(LC_CTYPE, "");
	setlinebuf(stderr);
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
		return fail(EXIT_SYSTEM, "standard output: %m; mend that and try again");
	return ret;
}
