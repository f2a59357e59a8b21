# SPDX-License-Identifier: Apache-2.0
# What a developer types. Every target sets up what it needs in .venv, so `make demo` or `make test` can be the first.
#
#   make demo PYTHON=python3.12        the interpreter that .venv is made with (any from 3.10 on)
#   make test PYTEST_ARGS="-k nearest" arguments for pytest
#   make test VITKERN_CUDA=OFF         how to build; docs/environment.md has all such variables

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Two workers must not build the emulated kernels at once.
PYTEST = VITKERN_EMULATED="$$($(BIN)/python -m tests.emulated)" $(BIN)/python -m pytest
# A worker that dies ends the run: with groups, pytest-xdist 3.8 would try its test again for ever.
PARALLEL := --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadgroup -p no:benchmark
PYTHON_FILES := python triton_kernels tests tools benchmarks examples

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

##@ Run

demo: setup  ## A layer checked and timed against plain torch, here and on a card: 10 minutes and 3 GB the first time, then 2
	$(BIN)/vitkern doctor
	$(BIN)/vitkern demo --output build/demo

test: setup  ## All tests that can run here, 20 minutes on two cores, 12 GB of memory; others are listed with the reason
	$(PYTEST) -m "not alone" $(PARALLEL) $(PYTEST_ARGS)
	$(PYTEST) -m alone $(PYTEST_ARGS)

test-ecosystem:  ## Models of timm, torchvision, transformers and mmcv with ours, in an environment of its own
	$(MAKE) VENV=.venv-ecosystem .venv-ecosystem/.ecosystem
	.venv-ecosystem/bin/python -m pytest tests/ecosystem tests/test_models_checkpoints.py tests/test_docs_code.py $(PYTEST_ARGS)

test-detectors:  ## Detectors of ultralytics and rfdetr, trained with ours, in an environment of their own
	$(MAKE) VENV=.venv-detectors .venv-detectors/.detectors
	.venv-detectors/bin/python -m pytest tests/ecosystem/test_training.py tests/ecosystem/test_compiled_detectors.py \
	  tests/ecosystem/test_deterministic_layers.py -k "ultralytics or rfdetr" $(PYTEST_ARGS)

test-kernels:  ## Our layer by way of Hugging Face's kernels, in an environment of its own: it wants an older transformers
	$(MAKE) VENV=.venv-kernels .venv-kernels/.kernels
	.venv-kernels/bin/python -m pytest tests/ecosystem/test_kernels.py $(PYTEST_ARGS)

bench: tables  ## All that is timed: the tables, a page of all ops in build/bench, the same rows through pytest-benchmark
	$(BIN)/vitkern bench run --quick --json build/bench/run.json
	$(BIN)/vitkern bench report build/bench/run.json
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

tables: setup  ## The tables of the README: vitkern, plain torch and every peer that is installed
	for what in ms_deform_attn ms_deform_attn_fused adapter_bottleneck token_pool vit_adapter; do \
	  $(BIN)/python -m benchmarks.bench_$$what $(BENCH_ARGS) || exit 1; done
	$(BIN)/python -m benchmarks.bench_patch
	$(BIN)/python -m benchmarks.bench_host_cost

speed: setup  ## The picture of the README: measures it and draws docs/speed.svg, about 5 minutes on a quiet machine
	$(BIN)/python -m benchmarks.speed $(SPEED_ARGS)

# The time limit of a call: what is left goes on with the next. BORROW=1: PYTHON's own packages, torch first of all, serve
# where there is no network.
PART := correct
SECONDS := 540
gpu:  ## On a card, PART=correct|sanitize|bench|tune|counts|model, in calls of SECONDS=540 that go on; DRY=1 lists what would run
ifdef DRY
	@$(MAKE) --silent setup
	@$(BIN)/python -m benchmarks.gpu $(PART) --dry --seconds $(SECONDS) $(GPU_ARGS)
else
	@architectures=$$(tools/gpu_architectures) && $(MAKE) --silent VENV=.venv-gpu VITKERN_CUDA=ON \
	  VITKERN_CUDA_ARCHITECTURES=$$architectures .venv-gpu/.built
	@test $(PART) = build || .venv-gpu/bin/python -m benchmarks.gpu $(PART) --seconds $(SECONDS) \
	  $(if $(FRESH),--fresh) $(GPU_ARGS)
endif

##@ Check

check: lint typecheck setup  ## The quick half of ci: lint, types and the tests that are not slow
	$(PYTEST) -m "not alone and not slow" $(PARALLEL) $(PYTEST_ARGS)

emulate: setup  ## The CUDA kernels, run on the CPU
	$(PYTEST) -k emulated $(PARALLEL) $(PYTEST_ARGS)

MINUTES := 1
fuzz: setup  ## Random calls of all ops on all backends, for MINUTES=1, against an oracle in numpy
	VENV=$(VENV) tools/fuzz --minutes $(MINUTES) $(FUZZ_ARGS)

SEEDS := 3
CUDA_RACES = VITKERN_EMULATED_RACES="$$($(BIN)/python -m tests.emulated --races)" VITKERN_SEEDS=$(SEEDS) $(BIN)/python -m pytest
races: setup  ## CUDA kernels, emulated: no two accesses race, SEEDS=3 schedules a call give the same bits
	$(CUDA_RACES) -m "" tests/test_races.py tests/test_schedules.py $(PARALLEL) $(PYTEST_ARGS)

libtsan: setup  ## The race detector beside gcc's libtsan, on ms_deform_attn: both report the same, or why not. Minutes
	$(BIN)/python -m tests.libtsan --check

counts: setup  ## Counts what CUDA kernels that have changed ask of memory, emulated, and draws docs/counts.md: up to 45 minutes
	$(BIN)/python -m benchmarks.counts $(COUNTS_ARGS)

# A sanitizer ends the process, a worker's too, so its report is not captured until the end of a test. Tests that only
# call the same kernels again, or code that is not sanitized, are left out; test_cuda_emulated.py has the emulated
# kernels' attention.
NOT_SANITIZED := reference- or triton- or cpu-wide or -gradcheck- or -repeat- or test_drawn_ \
  or cuda-emulated-ordered or cuda-emulated-ms_deform
sanitize: build/sanitize/.done  ## CPU and emulated CUDA kernels under AddressSanitizer and UBSan
	VITKERN_EMULATED="$$($(BIN)/python -m tests.emulated --sanitize)" tools/sanitized -m pytest --capture=no \
	  -m "not alone and not slow" tests/test_cpu_kernels.py tests/test_cpu_kernels_fused.py \
	  tests/test_cuda_emulated.py tests/test_contract.py tests/test_architecture.py \
	  -k "not ($(NOT_SANITIZED))" $(PARALLEL) $(PYTEST_ARGS)

lint: $(VENV)/.requirements  ## Style of Python and C++, and what is wrong with workflows
	$(BIN)/ruff check . tools/prose
	$(BIN)/ruff format --check . tools/prose
	$(BIN)/python tools/prose
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/zizmor --quiet --offline --no-progress .github/workflows

typecheck: setup  ## mypy, strict on the package
	$(BIN)/mypy

ci:  ## All checks before a merge, the tests last
	$(MAKE) lint
	$(MAKE) typecheck
	$(MAKE) sanitize
	$(MAKE) docs
	$(MAKE) fuzz
	$(MAKE) races
	$(MAKE) test

docs: .venv-docs/.docs  ## The site in build/site, in an environment of its own; whatever mkdocs warns of fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

##@ Build

setup: $(VENV)/.built  ## .venv with everything pinned, and the package built into it

dist: $(VENV)/.requirements  ## Source distribution and wheel, in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

format: $(VENV)/.requirements  ## Rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

clean:  ## Remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.built
	find $(PYTHON_FILES) -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## Remove .venv too
	rm -rf $(VENV) .venv-ecosystem .venv-detectors .venv-kernels .venv-docs .venv-gpu

help:  ## This list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo test test-ecosystem test-detectors test-kernels bench tables speed gpu check emulate fuzz races libtsan counts sanitize lint typecheck ci docs setup dist format clean distclean help

# ---- How .venv comes about -------------------------------------------------------------------------------------------
# One stamp a step, written when the step has succeeded. A killed pip may leave a package that looks installed and is
# not, so .unfinished stands while pip writes; where it is still there, it is newer than .made and .venv starts afresh.

$(VENV)/.made: $(wildcard $(VENV)/.unfinished)
	@PYTHON="$(PYTHON)" BORROW="$(BORROW)" tools/make_venv $(VENV)
	@touch $@

$(VENV)/.requirements: $(VENV)/.made $(if $(BORROW),,$(wildcard requirements/*.txt))
ifndef BORROW
	@echo "Installing torch, tools and test requirements into $(VENV): minutes, once"
	@touch $(VENV)/.unfinished
	@$(PIP) install -r requirements/torch.txt
	@$(PIP) install -c requirements/torch.txt -r requirements/build.txt -r requirements/dev.txt
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -c requirements/torch.txt -r requirements/triton.txt
	@rm $(VENV)/.unfinished
endif
	@touch $@

# Python files are read where they lie, so only what is compiled or describes the package asks for a new build; and so
# does a build option other than the last one.
BUILD_OPTIONS := CUDA=$(VITKERN_CUDA) ARCHITECTURES=$(VITKERN_CUDA_ARCHITECTURES)
ifneq ($(shell cat $(VENV)/.built 2>/dev/null),$(BUILD_OPTIONS))
.PHONY: $(VENV)/.built
endif
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

$(VENV)/.built: $(VENV)/.requirements $(SOURCES)
	@echo "Building vitkern"
	@rm -f $@
	@$(PIP) install --no-build-isolation --no-deps --ignore-installed --editable .
	@echo "$(BUILD_OPTIONS)" > $@

$(VENV)/.ecosystem: $(VENV)/.built $(wildcard requirements/ecosystem*.txt)
	@$(PIP) install -c requirements/torch.txt -r requirements/ecosystem-common.txt
	@$(PIP) install --no-deps -r requirements/ecosystem.txt
	@touch $@

$(VENV)/.detectors: $(VENV)/.built $(wildcard requirements/detectors*.txt)
	@$(PIP) install -c requirements/torch.txt -r requirements/detectors-common.txt
	@$(PIP) install --no-deps -r requirements/detectors.txt
	@touch $@

$(VENV)/.kernels: $(VENV)/.built requirements/kernels.txt
	@$(PIP) install -c requirements/torch.txt -r requirements/kernels.txt
	@touch $@

.venv-docs/.docs: requirements/docs.txt
	@PYTHON="$(PYTHON)" tools/make_venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

build/sanitize/.done: $(VENV)/.requirements $(SOURCES) $(shell find python triton_kernels -name '*.py')
	@echo "Building vitkern with sanitizers"
	@rm -f $@
	@tools/build_sanitized $(VENV)
	@touch $@
