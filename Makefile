# Two commands: `make demo` trains a language model in a few minutes, `make test` runs every test
# on TensorFlow, JAX and PyTorch. Both make .venv; nothing is installed elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU builds. PyPI's tensorflow and newest torch bring gigabytes for GPUs along.
TORCH ?= torch==2.13.0
TENSORFLOW ?= tensorflow-cpu>=2.20
BACKENDS ?= jax torch tensorflow

.PHONY: demo test test-all test-% fuzz lint docs links release results benchmark clean

demo: $(VENV)/.demo
	KERAS_BACKEND=jax $(BIN)/python examples/language_model.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/run.py $(BACKENDS)

# With the sweeps: all GPUs that kernels are compiled for, all pairs of masks and segments, all
# cells of the exports' table, more of every case by the interpreters. Before a release.
test-all: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/run.py --all $(BACKENDS)

# Thousands of random cases of each fuzz test, new ones in every run: hours on a slow machine.
FUZZ_EXAMPLES ?= 3000
fuzz: $(VENV)/.test
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) \
		$(BIN)/python -m pytest tests/test_fuzz.py tests/test_faults.py tests/test_hostile.py || exit 1; \
	done

# One backend, any pytest arguments: make test-jax ARGS="-k masks"
test-%: $(VENV)/.test
	KERAS_BACKEND=$* $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# build/docs/index.html, to be read from the disk: nothing is loaded from elsewhere.
docs: $(VENV)/.docs
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# Whether what the pages link to is there: this one needs the network.
links: $(VENV)/.docs
	KERAS_BACKEND=jax $(BIN)/python -m sphinx -q -b linkcheck docs build/links

# dist/; then for each backend a bare environment with the wheel, in which a layer runs.
release: test-all
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	set -e; for backend in $(BACKENDS); do \
	  bare=$$(mktemp -d); $(PYTHON) -m venv $$bare; \
	  case $$backend in torch) first="$(TORCH)";; tensorflow) first="$(TENSORFLOW)";; *) first=jax;; esac; \
	  (cd $$bare; unset PYTHONPATH; bin/pip install --quiet "$$first" $(CURDIR)/dist/*.whl; \
	  KERAS_BACKEND=$$backend bin/python -c "import keras_xlstm, numpy; \
	    x = numpy.zeros((1, 5, 3), 'float32'); \
	    print(keras_xlstm.__file__, keras_xlstm.layers.mLSTM(8)(x).shape)"); \
	  rm -rf $$bare; \
	done

# Figures of benchmarks/results/ into RESULTS.md, README and docs.
results: $(VENV)/.test
	$(BIN)/python benchmarks/render.py
	$(BIN)/python benchmarks/plot.py

benchmark: $(VENV)/.benchmark
	$(BIN)/python benchmarks/cpu.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[jax,examples]"
	touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[jax,docs]"
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TENSORFLOW)"
	$(BIN)/python -m pip install --quiet --editable ".[jax,examples,test,docs,xlstm,transformers]"
	$(BIN)/python -m pip install --quiet --editable ".[export-jax,export-tensorflow,export-torch]"
	$(BIN)/python -m pip install --quiet --no-deps aeon==1.6.0  # a data set of an example
	touch $@

$(VENV)/.benchmark: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable ".[benchmark]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
