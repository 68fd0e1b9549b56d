# Turnout's commands: each first sets up and builds what is missing. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build program compare picture test test-transformers sanitize sanitize-kernels fuzz format clean

# Starts a recipe in the Python environment of the set-up, which also holds cmake and ninja.
in_environment = python="$$(scripts/python.sh)"; export PATH="$$(dirname "$$python"):$$PATH";
configure = $(in_environment) cmake --preset $(1) -DPython_EXECUTABLE="$$python" >/dev/null;

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the Python environment and install what the build needs
	@scripts/setup.sh

build: setup ## build the library, the program and the tests
	@$(call configure,release) cmake --build --preset release

program: setup ## build the library and the program
	@$(call configure,release) cmake --build --preset release --target turnout_cli

compare: program ## train a MoE and its dense twin on real text and compare them (ARGS="…" passes options, RANKS=2 splits)
	@$(in_environment) $(if $(RANKS),torchrun --no-python --standalone --nproc-per-node $(RANKS)) build/bin/turnout compare $(ARGS)

picture: ## draw the main chart of a report as PNG (REPORT=runs/compare/report.html PNG=compare.png)
	@scripts/setup.sh browser
	@scripts/picture.sh "$(or $(REPORT),runs/compare/report.html)" "$(or $(PNG),compare.png)"

test: build sanitize-kernels ## run every test: C++, sanitized kernels, Python, installation
	@scripts/setup.sh browser
	@$(in_environment) ctest --preset release; python -m pytest

test-transformers: build ## run the tests of turnout.hf with another transformers (VERSION=5.7.0)
	@$(in_environment) there="$$PWD/build/transformers-$(or $(VERSION),5.7.0)"; \
	  test -d "$$there" || python -m pip install -q --target "$$there" transformers==$(or $(VERSION),5.7.0); \
	  PYTHONPATH="$$there" python -m pytest -q tests/python/hf

sanitize: setup ## run the C++ tests with the address and undefined-behaviour sanitizers
	@$(call configure,asan) cmake --build --preset asan; ctest --preset asan

sanitize-kernels: setup ## the same for the torch-free kernels alone
	@$(call configure,asan) cmake --build --preset asan --target kernels_test kernels_fuzz; ctest --preset asan -R kernels

fuzz: setup ## random kernel cases against the reference and damaged checkpoints, sanitized (ARGS="[cases [first seed]]")
	@$(call configure,asan) cmake --build --preset asan --target kernels_fuzz checkpoint_fuzz; \
	  build-asan/bin/kernels_fuzz $(or $(ARGS),100000); \
	  ASAN_OPTIONS=detect_leaks=0 build-asan/bin/checkpoint_fuzz $(or $(ARGS),50000)

format: ## format the C++ sources with clang-format
	@find include src cli tests -name '*.h' -o -name '*.cpp' | xargs clang-format -i

clean: ## remove what was built, but not .venv
	rm -rf build build-* dist
