# `make` alone lists the targets. Needs python3 (3.11 or newer), make and git; everything else goes into .venv.
#   make demo PYTHON=/path/to/python3.12      another interpreter
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow lint format bench fuzz clean

# Idle OpenMP threads sleep instead of spinning. When something else wants a core, spinning makes torch several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The benchmarks by folder, cheap ones first, then the others; `fuzz` has its own target, `mutation` needs mutmut. Which one
# shows what is in benchmarks/README.md.
BENCHMARKS := paper/paper_table speed/solver speed/trace_time promises/kill_resume promises/estimator promises/accuracy \
  promises/budget promises/exactness zoo/zoo
FOUND := $(filter-out promises/fuzz promises/mutation,$(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/[a-z]*/*.py)))
ARGS ?=
N ?= 1000

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with lmfx (editable), its extras and the development tools

# The first interpreter that is new enough, unless PYTHON names one. An earlier run that was killed half-way leaves no
# stamp, and so is done again.
$(STAMP): setup.py pyproject.toml constraints.txt
	@new='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  base=''; \
	  for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14); do \
	    if "$$candidate" -c "$$new" >/dev/null 2>&1; then base="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$base" ]; then \
	    echo 'lmfx needs Python 3.11 or newer, and found none in: $(or $(PYTHON),PATH). Try make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$base" --version)"; \
	  "$$base" -m venv --clear $(VENV); \
	fi; \
	echo 'installing; torch and its libraries are gigabytes, so the first time takes minutes'; \
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' \
	  | sed -nu -E 's/^ *(Downloading [^ ]+) (\(.*[MG]B\)).*/  \1 \2/p; s/^(Installing collected|Successfully).*/  \1/p'; \
	touch $@

demo: install ## train a small network, compress it to half its latency without training, write out/
	$(PY) examples/demo.py $(ARGS)

test: lint ## lint and types, then every test that needs neither a GPU nor long, in two processes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: install ## the tests marked slow
	$(PY) -m pytest -m slow -o timeout=1800 -o faulthandler_timeout=2000 $(ARGS)

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install ## let ruff put the code in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install ## every benchmark, one after the other (see docs/benchmarks.md)
	@failed=''; \
	for name in $(filter $(FOUND),$(BENCHMARKS)) $(filter-out $(BENCHMARKS),$(FOUND)); do \
	  echo "== benchmarks/$$name.py"; \
	  PYTHONPATH=. $(PY) "benchmarks/$$name.py" $(ARGS) || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

fuzz: install ## N random networks in all, see docs/fuzz.md: make fuzz N=20000 ARGS="--jobs 2"
	PYTHONPATH=. $(PY) benchmarks/promises/fuzz.py -n $(N) $(ARGS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
