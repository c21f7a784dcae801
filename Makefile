# Two commands: `make demo` trains a language model in a few minutes, `make test` runs every test
# on TensorFlow, JAX and PyTorch. Both make .venv; nothing is installed elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU builds. PyPI's tensorflow and newest torch bring gigabytes for GPUs along.
TORCH ?= torch==2.13.0
TENSORFLOW ?= tensorflow-cpu>=2.20
BACKENDS ?= jax torch tensorflow

.PHONY: demo test test-% fuzz lint benchmark clean

demo: $(VENV)/.demo
	KERAS_BACKEND=jax $(BIN)/python examples/language_model.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/run.py $(BACKENDS)

# Thousands of random cases of each fuzz test, new ones in every run: hours on a slow machine.
FUZZ_EXAMPLES ?= 3000
fuzz: $(VENV)/.test
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) \
		$(BIN)/python -m pytest tests/test_fuzz.py tests/test_faults.py || exit 1; \
	done

# One backend, any pytest arguments: make test-jax ARGS="-k masks"
test-%: $(VENV)/.test
	KERAS_BACKEND=$* $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.benchmark
	$(BIN)/python benchmarks/cpu.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[jax,examples]"
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TENSORFLOW)"
	$(BIN)/python -m pip install --quiet --editable ".[jax,examples,test,xlstm,transformers]"
	$(BIN)/python -m pip install --quiet --editable ".[export-jax,export-tensorflow,export-torch]"
	$(BIN)/python -m pip install --quiet --no-deps aeon==1.6.0  # a data set of an example
	touch $@

$(VENV)/.benchmark: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable ".[benchmark]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
