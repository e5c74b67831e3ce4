# Every target makes what it needs in .venv and is safe to run twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GROUPS = $(BIN)/python -c "import sys,tomllib;g=tomllib.load(open('pyproject.toml','rb'))['dependency-groups'];print('\n'.join(r for n in sys.argv[1:] for r in g[n]))"
REFERENCE := .venv-reference
REFERENCE_NEW := .venv-reference-1.6.1
XDIST ?= 3
PYTEST := $(BIN)/python -m pytest
FILES ?= tests

.PHONY: serve test test-parallel test-alone check bench interop flaky soak clean format

serve: $(VENV)/.serve
	@$(BIN)/stator serve --engine echo --workers 2 --port 0 --isolated

test: $(VENV)/.test $(VENV)/.torch $(REFERENCE)/.ready $(REFERENCE_NEW)/.ready
	$(PYTEST) -n $(XDIST) --dist loadfile -m "not load and not soak" tests
	$(PYTEST) -m "load and not soak" tests

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

interop: $(VENV)/.test $(REFERENCE)/.ready $(REFERENCE_NEW)/.ready
	$(PYTEST) -m "interop and not soak" tests/interop

bench: $(VENV)/.test $(REFERENCE)/.ready $(REFERENCE_NEW)/.ready
	$(BIN)/python -m benchmarks

flaky: $(VENV)/.test $(VENV)/.torch
	for i in $$(seq 20); do $(PYTEST) -q $(FILES) || exit 1; done

soak: $(VENV)/.test $(REFERENCE)/.ready $(REFERENCE_NEW)/.ready
	$(PYTEST) -m soak --timeout 1800 $(FILES)

clean:
	rm -rf $(VENV) $(REFERENCE) $(REFERENCE_NEW)

$(VENV)/.serve: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[serve,models]"
	touch $@

$(VENV)/.test: $(VENV)/.serve
	$(GROUPS) test > $(VENV)/requirements-test.txt
	$(PIP) -r $(VENV)/requirements-test.txt
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(GROUPS) check > $(VENV)/requirements-check.txt
	$(PIP) -r $(VENV)/requirements-check.txt
	touch $@

# torch alone and pinned: plain resolution would fetch gigabytes of CUDA where a CPU wheel is at hand.
$(VENV)/.torch: $(VENV)/.test
	$(PIP) "torch==2.13.0"
	$(PIP) -e ".[transformers]"
	touch $@

$(REFERENCE)/.ready:
	test -x $(REFERENCE)/bin/python || $(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet --disable-pip-version-check "ai-dynamo-runtime==1.3.1" "ai-dynamo==1.3.1" uvloop msgspec
	touch $@

$(REFERENCE_NEW)/.ready:
	test -x $(REFERENCE_NEW)/bin/python || $(PYTHON) -m venv $(REFERENCE_NEW)
	$(REFERENCE_NEW)/bin/python -m pip install --quiet --disable-pip-version-check "ai-dynamo-runtime==1.6.1" uvloop msgspec
	touch $@
