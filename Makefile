# Two commands set everything up from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
# Processes that share the test files: JAX makes little of a second core with programs as small as theirs.
JOBS ?= 2
DEMO := runs/demo-seed$(SEED)
# The newest JAX wants a newer Python than the oldest that we support.
PYTHON_NEWEST ?= python3.12
# Each algorithm against its oracle, and gradients: what `test-full` runs again with XLA's normal optimization, and with other versions of JAX.
ORACLES := compilation piecewise mean_field encodings objectives gradients masks dense_crf gaussian permutohedral
CORE := $(ORACLES:%=tests/unit/core/test_core_%.py) -m "not slow and not full" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full test-jax test-slow lint wheel docs clean

$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not v >= (3, 11, 4) and "pwcrf_jax needs Python 3.11.4 or newer (tar archives are unpacked with its filter), $(PYTHON) is %d.%d.%d; try make PYTHON=python3.12" % v[:3])'
	@echo "Setting up $(VENV) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,lint,docs]" >&2
	@touch $@

# Trains on the built-in synthetic set, then prints the table and a last line of JSON. SEED=1 for another seed.
demo: $(VENV)/installed
	@$(BIN)/python train.py --config configs/demo.py --workdir $(DEMO) --config.seed=$(SEED) --config.data.data_dir=runs/tfds
	@$(BIN)/python eval.py --workdir $(DEMO)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not full" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# More rows of what `make test` tests, and deeper checks, then the core's against oracles as users compile them. CI runs both.
test-full: $(VENV)/installed
	$(BIN)/python -m pytest -m "full and not slow" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
	PWCRF_TESTS_OPTIMIZED=1 $(BIN)/python -m pytest $(CORE)
	@$(MAKE) --no-print-directory test-jax

# The core's tests against oracles with the oldest and the newest JAX that setup.cfg allows. Without PYTHON_NEWEST: the newest for PYTHON.
test-jax:
	.ci/environment oldest $(VENV)-oldest $(PYTHON)
	$(VENV)-oldest/bin/python -m pytest $(CORE)
	.ci/environment newest $(VENV)-newest $(PYTHON_NEWEST) $(PYTHON)
	$(VENV)-newest/bin/python -m pytest $(CORE)
	@cat $(VENV)-oldest/jax $(VENV)-newest/jax

# The report is tried in Chromium, if there is one on the PATH, and buckets in an emulator of Google Cloud Storage.
test-slow: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[browser,test-gcs]" >&2
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check pwcrf_jax configs tests benchmarks examples scripts train.py eval.py
	$(BIN)/mypy

# dist/: sdist and wheel, the wheel tried in a clean environment outside of the checkout.
wheel: $(VENV)/installed
	.ci/try_wheel $(BIN)/python

# The site as plain files in site/; to search it, `python -m http.server -d site`.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
