# Inlay: what a person needs to know is `make demo`, `make test` and `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

CACHE   ?= $(or $(INLAY_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/inlay)
PREFIX  ?= /usr/local
DESTDIR ?=

GUEST   := target/guest
TARGET  := x86_64-unknown-linux-gnu
AGENT   := target-guest/$(TARGET)/guest/inlay-agent
INLAY   := target/release/inlay
HOST    := target/debug/nested-host

.PHONY: help demo test bench fuzz guest install setup build lint unit e2e deny place FORCE

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: place build guest ## Set everything up and run containers in microVMs through real containerd
	$(HOST) setup
	$(HOST) demo

test: place setup lint unit e2e ## Set everything up and run every test

bench: place build guest ## Measure, print tables, and write docs/performance.md (ONLY="words of a section's title")
	$(HOST) setup
	cargo build --release -p benches --bins
	target/release/report $(if $(ONLY),"$(ONLY)")

# Found out before anything is built.
place:
	@for dir in "$(CURDIR)" "$(CACHE)"; do \
	    case $$dir/ in /tmp/* | /run/* | /dev/shm/*) \
	        echo "$$dir: the host that containers run in has /tmp, /run and /dev/shm of its own. Clone to another place, or set INLAY_CACHE" >&2; \
	        exit 1 ;; \
	    esac; \
	done

guest: setup ## Build the guest's kernel, initrds and image (cached by content)
	guest/kernel/build --out $(GUEST)
	guest/kernel/check-cuts $(GUEST)/kernel-config
	guest/tools/build --out $(GUEST)
	$(MAKE) --no-print-directory $(AGENT)
	cargo build -q --release -p guest-image
	for flavour in minimal full tools; do \
	    target/release/inlay-image --manifest guest/image/manifests/$$flavour.toml --file agent=$(AGENT) \
	        --file init=guest/tools/init --file fio=$(GUEST)/fio --file socat=$(GUEST)/socat \
	        --cache $(CACHE)/packages --out $(GUEST)/inlay-$$flavour.initrd; \
	done
	target/release/inlay-image --form image --manifest guest/image/manifests/minimal.toml --file agent=$(AGENT) \
	    --cache $(CACHE)/packages --out $(GUEST)/inlay-minimal.img

install: build guest ## Install inlay, its shim name and the guest below PREFIX (default /usr/local)
	install -D -m 755 $(INLAY) $(DESTDIR)$(PREFIX)/bin/inlay
	ln -sf inlay $(DESTDIR)$(PREFIX)/bin/containerd-shim-inlay-v2
	install -D -m 644 -t $(DESTDIR)/usr/share/inlay $(GUEST)/vmlinux $(GUEST)/inlay-minimal.initrd $(GUEST)/inlay-full.initrd $(GUEST)/inlay-minimal.img
	test -e $(DESTDIR)/etc/inlay/configuration.toml || \
	    install -D -m 644 deploy/configuration.toml $(DESTDIR)/etc/inlay/configuration.toml

setup: ## Install the Debian packages that building and testing need, after naming them
	@deploy/setup

# Linked with all that it needs: a start loads and ties no libraries, which took a fifth of its processor time, and the program
# runs under any distribution.
build: setup ## Build the host's programs
	cargo rustc --release -p inlay --bin inlay -- -C target-feature=+crt-static
	cargo build -p inlay-tests --bins

lint: setup ## Formatting and clippy, where this toolchain has them
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else echo "skipped: no rustfmt in this toolchain"; fi
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy -q --workspace --all-targets -- -D warnings; \
	    else echo "skipped: no clippy in this toolchain"; fi
	@cargo metadata -q --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu --manifest-path tests/fuzz/Cargo.toml >/dev/null || \
	    { echo "tests/fuzz/Cargo.lock is not what its crates want: cargo update --workspace --manifest-path tests/fuzz/Cargo.toml" >&2; exit 1; }

unit: setup $(AGENT) ## Unit tests, and tests on this machine's own /dev/kvm where it has one
	cargo test --workspace

e2e: place build guest ## Containers through real containerd, in the nested host where there is no virtualization
	$(HOST) setup
	$(HOST) test

fuzz: setup ## Fuzz what guests, backends and files may say, SECONDS=60 for each target, JOBS=1 at a time
	@deploy/setup fuzz
	JOBS=$(or $(JOBS),1) SECONDS_PER_TARGET=$(or $(SECONDS),60) tests/fuzz/run

deny: ## Check the licences of everything that is linked (needs cargo-deny)
	cargo deny check licenses bans sources

# The agent is static and carries the C library of libseccomp: the target's flags must not reach build scripts, so
# the target is named.
$(AGENT): export RUSTFLAGS := -C target-feature=+crt-static -C relocation-model=static
$(AGENT): export LIBSECCOMP_LINK_TYPE := static
$(AGENT): export LIBSECCOMP_LIB_PATH := /usr/lib/x86_64-linux-gnu
$(AGENT): setup FORCE
	cargo build -p guest-agent --profile guest --target $(TARGET) --target-dir target-guest

FORCE:
