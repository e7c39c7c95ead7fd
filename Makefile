# make demo: restore photos and look at them.  make demo-train: train a small model first.
# make test: all checks.  make slow: those that take minutes each.
# make compat: the extension and the kernels with every PyTorch and Triton supported; downloads 800 MB, takes an hour.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo demo-train test slow lint bench compat clean

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/r2r demo

demo-train: $(STAMP)
	$(BIN)/r2r demo --train --out demo-train

# One thread a process: OpenMP's threads wait busily, and would take the processors from each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p benchmarks.stamp --numprocesses auto --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

compat: $(STAMP)
	$(BIN)/python -m tests.r2r_kernels.compat

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf .venv build dist demo *.egg-info
