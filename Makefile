# `make demo` and `make test` are all the set-up there is; each makes .venv and installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := torch==2.13.0+cpu
# Where pip's configured sources do not have the CPU build of torch, PyTorch's own index does.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-long test-slow check bench install clean

demo: install  ## Annotate 300 drawn scenes with the small checkpoint, on this CPU
	$(BIN)/r4b demo

test: install  ## All tests but the long and the slow ones
	$(BIN)/python -m pytest

test-long: install  ## Whole jobs that are killed, starved, cut off and submitted, and a browser: CI runs it too
	$(BIN)/python -m pytest -m "long and not slow"

test-slow: install  ## The full-size R-4B shape (about 12 GB of memory), whole jobs and kills on vLLM: most of an hour
	$(BIN)/python -m pytest -m slow

check: install  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## r4b run against a bare AsyncLLM loop, in alternation
	$(BIN)/python -m benchmarks.batch_overhead

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)" || $(BIN)/pip install --quiet "$(TORCH)" --index-url $(TORCH_INDEX)
	$(BIN)/pip install --quiet --editable ".[cpu,dev]"
	touch $(STAMP)

clean:  ## Remove what make and the demo left
	rm -rf .venv demo-output
