/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The backing chain of an image: open, locked, in order. chain.c drives header.c
 * (which name?), backing.c (which file?) and lock.c (may we?) file by file.
 *
 * What returns int returns EXIT_OK, or an exit code after a message.
 */
#ifndef QCOWCTL_CHAIN_H
#define QCOWCTL_CHAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

/**
 * struct chain - an image and its backing files
 * @layers: the image first: the name that each was opened by, the descriptor,
 *          QCOW_FORMAT_*, and what it is, to find loops. An external data file
 *          follows its image, with @data set.
 * @count: how many there are
 */
struct chain {
	struct chain_layer {
		char *path;
		int fd;
		int format;
		bool data;
		struct stat st;
	} *layers;
	size_t count;
};

/**
 * chain_open - open and lock a qcow2 image and all its backing files
 * @chain: what was opened, for chain_close() also after an error
 * @image: path of the image
 * @read_only: open and lock the image for reading; the others always are
 * @data_file: path of the image's external data file, or NULL for what its
 *             header says
 * @backing_format: what backing files are whose format no header names, or 0 to
 *                  refuse them
 */
int chain_open(struct chain *chain, const char *image, bool read_only,
	       const char *data_file, int backing_format);
void chain_close(struct chain *chain);

/* QCOW_FORMAT_* of "raw" or "qcow2", 0 for any other name. */
int format_of_name(const char *name);
const char *name_of_format(int format);

/**
 * struct header - the part of a header that leads to other files
 * @backing_name: name of the backing file as it is written there, or NULL
 * @backing_format: its format's name, or NULL if the header does not say
 * @has_data_file: there is an external data file
 * @data_name: its name as it is written there, or NULL
 */
struct header {
	char *backing_name;
	char *backing_format;
	bool has_data_file;
	char *data_name;
};

/* Read the header of a file that is said to be qcow2; @top: by the user. */
int header_read(int fd, const char *path, bool top, struct header *header);
void header_free(struct header *header);

/* True if the file begins like a qcow2 image: for hints, never to decide. */
bool has_qcow2_magic(int fd);

/**
 * backing_resolve - find the file that a name in a header means
 * @overlay: path by which the image was opened whose header has the name
 * @what: "backing file" or "data file", for messages
 * @name: the name in the header, not empty
 * @path: the file's path, to be freed
 * @format: QCOW_FORMAT_* if the name itself says it (json:), else 0
 */
int backing_resolve(const char *overlay, const char *what, const char *name,
		    char **path, int *format);

/**
 * lock_image - lock one file of a chain as QEMU would
 * @fd: the file; the locks live as long as this open file, so as long as the
 *      driver keeps it
 * @path: its name, for messages
 * @write: lock for a writer, who needs to be alone; else for a reader, who
 *         shares the file with readers
 *
 * Where the file system has no such locks this warns and goes on, as QEMU does.
 */
int lock_image(int fd, const char *path, bool write);

/*
 * check.c: repair an image that was opened for writing, if it has the dirty bit,
 * or @refuse to; @data: its external data file, or NULL. Says what it does.
 */
int repair_dirty(int fd, const char *path, const char *data, bool refuse);

/* Run a program, without its output if @quiet; what it exits with, or 127. */
int run_program(char **argv, bool quiet);

/* Say who lets nobody open the file for writing, as the driver does (ETXTBSY). */
int lock_denied(const char *path);

#endif /* QCOWCTL_CHAIN_H */
