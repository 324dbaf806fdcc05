# Two commands set everything up: `make train` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

# Two processes of one thread each. The tests of a file mostly stay together, and so share what it has launched or
# compiled; the process that is through first takes over some of the other's.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

export TOKENIZERS_PARALLELISM := false

.PHONY: train test test-slow test-oldest bench gpu hub-kernel docs docs-figures dist lint lint-csrc format sanitize clean

train: $(VENV)/installed $(VENV)/fetched
	HF_HUB_OFFLINE=1 $(BIN)/qtuning train --report --eval-share 0.05 $(ARGS)

test: $(VENV)/installed lint
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/installed $(VENV)/fetched
	$(PYTEST) --slow $(ARGS)

# The trainers' tests on the oldest transformers that is supported, in an environment of its own.
OLDEST := transformers==5.0.0
test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja
	$(VENV)-oldest/bin/python -m pip install --quiet --no-build-isolation --editable '.[lora,report,test]' '$(TORCH)' '$(OLDEST)'
	$(VENV)-oldest/bin/python -m pytest tests/training tests/data $(ARGS)

bench: $(VENV)/installed $(VENV)/fetched
	$(BIN)/python -m pip install --quiet --editable '.[bench]' '$(TORCH)' --no-build-isolation
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.scoring $(STEP)
	$(BIN)/python -m benchmarks.step $(STEP)
	$(BIN)/python -m benchmarks.gpu_static

# Everything that only a GPU can show, in an environment of its own; a page and rows in benchmarks/results/gpu.
MINUTES ?= 25
gpu:
	@$(PYTHON) -m benchmarks.gpu_day --torch '$(TORCH)' --minutes $(MINUTES) $(ARGS)

# The Triton kernels as a package of the Hugging Face `kernels` library, in build/hub_kernel.
hub-kernel:
	@$(PYTHON) tools/hub_kernel/make.py

# The site, in build/site; without a network.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# What the pages take from the rows of benchmarks/results.
docs-figures: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_pages

# An sdist, a wheel made from it, and each tried in an environment of its own, which takes PyTorch and all else from
# this one (a path file adds its packages, not what is installed to be edited). Some tests and the site run from the sdist.
TRIED := build/dist
PARENT = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
dist: $(VENV)/installed
	$(BIN)/python -m pip install --quiet build
	rm -rf dist $(TRIED)
	$(BIN)/python -m build --no-isolation
	for kind in .whl .tar.gz; do \
	    python=$(TRIED)/$$kind/bin/python && $(PYTHON) -m venv --without-pip $(TRIED)/$$kind && \
	    echo $(PARENT) > $$($$python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth && \
	    $(BIN)/python -m pip --python $$python install --quiet --no-deps --no-build-isolation --ignore-installed dist/*$$kind && \
	    $$python -P tests/try_installed.py || exit 1; \
	done
	tar -xf dist/*.tar.gz -C $(TRIED)
	cd $(TRIED)/qtuning_kernels-*/ && ../.tar.gz/bin/python -P -m pytest -q --import-mode=append $(TRIED_TESTS)
	cd $(TRIED)/qtuning_kernels-*/ && NO_MKDOCS_2_WARNING=1 ../.tar.gz/bin/python -m mkdocs build --strict
TRIED_TESTS := tests/kernels/test_cuda_emulated.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/codespell

lint-csrc: $(VENV)/installed
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The build's own packages come first, so that the package is built against the torch that it will run with.
# Triton serves the tests of the GPU kernels; a CUDA build of torch brings its own.
$(VENV)/installed: pyproject.toml setup.py Makefile $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[lora,demo,report,docs,test]' '$(TORCH)'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TRITON)'
	touch $@

$(VENV)/fetched: $(VENV)/installed
	$(BIN)/qtuning fetch
	touch $@

# The kernels' tests on a build with the address and undefined-behaviour sanitizers; installs nothing. -P and append
# put that build before the sources. Python itself leaks by design, so leaks are not looked for.
SANITIZED := build/sanitize/lib
sanitize: $(VENV)/installed
	QTUNING_NATIVE=1 QTUNING_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYTHONPATH=$(SANITIZED) \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(BIN)/python -P -m pytest --import-mode=append -q --backend native tests/kernels/test_token_stats.py tests/kernels/test_linear.py tests/kernels/test_native.py \
	    -k "not compiles and not schemas and not exp2_over" $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info qtuning_kernels/_C*.so
