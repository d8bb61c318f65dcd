# SPDX-License-Identifier: GPL-2.0-only
#
# qcow.ko, and qcowctl. `make help` lists the targets.

KDIR ?= /lib/modules/$(shell uname -r)/build
prefix ?= /usr/local
override DESTDIR := $(if $(DESTDIR),$(abspath $(DESTDIR)))

kbuild = $(MAKE) -C $(KDIR) M=$(CURDIR) CONFIG_BLK_DEV_QCOW=m
tool = $(MAKE) -C userspace-tools/qcowctl prefix=$(prefix) DESTDIR=$(DESTDIR)

all: module tool

help:
	@echo 'Building:'
	@echo '  all        the module and qcowctl (default)'
	@echo '  module     drivers/block/qcow/qcow.ko; KDIR= is the kernel to build for'
	@echo '  tool       userspace-tools/qcowctl/qcowctl'
	@echo '  install    both, manual, header, udev rule; honours DESTDIR, prefix, udevdir'
	@echo '  clean'
	@echo
	@echo 'Testing (installs what it needs on Debian; kernels go to the cache):'
	@echo '  test       everything, under several kernels in virtual machines;'
	@echo '             QUICK=1 leaves out under other kernels than 6.1 what takes long,'
	@echo '             and does a quarter of what is done many times'
	@echo '  check      static checks'
	@echo '  kunit      unit tests of the driver'
	@echo '  coverage   which lines of the driver the tests execute'
	@echo '  soak       what looks for lost data, with random seeds, for TIME= seconds'
	@echo '             (14400); the sums of all runs are kept'
	@echo '  mutants    do the tests notice when the driver breaks one of its rules?'
	@echo '  bench      what requests cost, in virtual machines that count instructions;'
	@echo '             DEV=/dev/X or IMAGE=FILE on this machine, which is then only read,'
	@echo '             or with WRITE=1 overwritten'
	@echo '  demo       a Debian root file system on a qcow2 overlay, worked in'
	@echo '  guest-shell  a shell in a virtual machine with the driver (K=kernel)'

headers:
	@test -e $(KDIR)/Makefile || { \
		echo 'There are no kernel headers in $(KDIR):' \
		     'install linux-headers-$(shell uname -r), or give KDIR=' >&2; \
		exit 1; }

module: headers
	$(kbuild) modules

tool:
	$(tool) all

install: headers
	$(kbuild) modules_install INSTALL_MOD_PATH=$(or $(INSTALL_MOD_PATH),$(DESTDIR))
	$(tool) install
	install -D -m 644 include/uapi/linux/qcow.h \
		$(DESTDIR)$(prefix)/include/linux/qcow.h

clean:
	$(tool) clean
	test ! -e $(KDIR)/Makefile || $(kbuild) clean

test:
	tests/run $(if $(QUICK),-q)

check:
	tests/setup
	tests/check

kunit:
	tests/setup
	tests/run kunit

coverage:
	tests/setup
	QCOW_COVERAGE=1 tests/run -k debug

soak:
	tests/setup
	tests/soak $(TIME)

mutants:
	tests/setup
	tests/mutants/run

bench:
	$(if $(DEV)$(IMAGE),,tests/setup)
	tests/bench/run $(if $(DEV),-d $(DEV)) $(if $(IMAGE),-i $(IMAGE)) \
		$(if $(WRITE),-w)

demo:
	tests/setup
	tests/demo

guest-shell:
	tests/setup
	tests/guest/run $(if $(K),-k $(K))

.PHONY: all help headers module tool install clean test check kunit coverage bench \
	soak mutants demo guest-shell
