# The two commands of a new clone: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-fast lint format lock clean

demo: $(READY)
	$(BIN)/gora-serve demo --output gora-demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 8
	$(BIN)/python -m pytest -m "e2e and not slow" -n 2 --dist loadfile

test-fast: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 8

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY)
	$(BIN)/python requirements/make_lock.py

# torch comes first and by itself: the default index where it has the CPU build, else PyTorch's own CPU index.
$(READY): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch; assert torch.__version__ == '$(TORCH)'.split('==')[1]" 2>/dev/null \
	  || $(BIN)/pip install --no-deps $(TORCH) \
	  || $(BIN)/pip install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $(READY)

clean:
	rm -rf .venv gora-demo
