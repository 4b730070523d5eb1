# make demo      the whole job on real data, in a few minutes
# make test      quick tests, slow tests, doctests
# make lint      ruff, mypy, clang-format
# make docs      the documentation as a site in build/docs, links checked, warnings are errors
# make sanitize  the extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make bench     measure everything that this machine can, against its rivals
# make soak      long runs: a result store of a hundred million cells
# Each makes .venv and installs what it needs, and installs again when native code or build files change.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
BUILD_INPUTS := CMakeLists.txt pyproject.toml constraints.txt guda_fast/_version.py \
	$(shell find csrc cmake kernels -type f -not -name '*.pyc')
CPP_SOURCES = $(shell find csrc kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Also read by pip's isolated build environments.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs format sanitize bench soak clean

demo: $(INSTALLED)
	$(BIN)/guda-fast demo

# One process a core with one thread each: small tensors gain nothing from more.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow" --durations=10
	$(BIN)/python -m pytest -q --doctest-modules --pyargs guda_fast
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow

# mypy reads a wheel's files: through the editable install it finds each module twice.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	rm -rf build/typed
	GUDA_FAST_NATIVE=OFF $(BIN)/pip install -q --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p guda_fast

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# From scratch: what is left of an earlier build would give its warnings once only.
docs: $(INSTALLED)
	rm -rf build/docs
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees -E docs build/docs

sanitize: $(INSTALLED)
	.ci/sanitize

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks run all

SOAK := benchmarks/results/store_soak
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak.store $(SOAK).csv > $(SOAK).log

clean:
	rm -rf build .venv

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("guda_fast needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/pip install -q -e '.[dev]'
	touch $@
