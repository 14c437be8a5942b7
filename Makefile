# make demo | test | lint | build. Each target makes its own virtual environment on first use.

PYTHON ?= python3
VENV := .venv
PIP_INSTALL = $(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
# Machines without AVX-512 test its source at the same width.
TEST_BUILD := --config-settings=cmake.define.LOLCATS_EMULATE_AVX512=ON
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
LINT_TOOLS := clang-format mypy numpy pydantic rich ruff torch typer types-PyYAML
CXX_FILES = $(shell git ls-files '*.c' '*.cpp' '*.h')

.PHONY: build clean demo lint test

demo: $(VENV)/demo/.ready
	$(VENV)/demo/bin/python -m examples.demo $(DEMO_ARGS)

test: build
	cd $(VENV)/test && bin/cmake -S $(CURDIR)/tests/ctest -B $(CURDIR)/build/ctest \
	  -Dlolcats_ops_DIR=$$(bin/python -m lolcats_ops --cmakedir) --log-level=WARNING
	$(VENV)/test/bin/cmake --build build/ctest
	$(VENV)/test/bin/ctest --test-dir build/ctest --output-on-failure
	$(VENV)/test/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/lint/.ready
	$(VENV)/lint/bin/ruff format --check
	$(VENV)/lint/bin/ruff check
	$(VENV)/lint/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/lint/bin/mypy

# Rebuilds what changed and installs it editable: Python sources are used from the checkout.
build: $(VENV)/test/.ready
	PATH=$(CURDIR)/$(VENV)/test/bin:$$PATH $(VENV)/test/bin/pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --no-deps $(TEST_BUILD) --editable .

clean:
	rm -rf build dist $(VENV)

$(VENV)/demo/.ready: pyproject.toml constraints.txt $(shell git ls-files kernels bindings)
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(BUILD_TOOLS)
	PATH=$(CURDIR)/$(@D)/bin:$$PATH $(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/test/.ready: pyproject.toml constraints.txt
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(BUILD_TOOLS)
	PATH=$(CURDIR)/$(@D)/bin:$$PATH $(PIP_INSTALL) --no-build-isolation $(TEST_BUILD) --editable '.[dev]'
	touch $@

$(VENV)/lint/.ready: pyproject.toml constraints.txt
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) $(LINT_TOOLS)
	touch $@
