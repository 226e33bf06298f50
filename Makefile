# `make demo` and `make test` set everything up by themselves, in .venv, and a second run installs nothing.
#   make PYTHON=/path/to/python3.12 ...    another interpreter         make test ARGS="-k ct -x"    arguments for pytest
#   make TORCH=torch==2.12.1 setup         another torch (only for a .venv without one)
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test demo demo-mri lint format bench claims data clean distclean

TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
HASH := $(shell cat pyproject.toml scripts/setup_env.py | cksum | cut -d ' ' -f 1)
# The first interpreter that can make a virtual environment; looked for only when one has to be made.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { command -v $$p; break; }; done)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.stamp-test-$(HASH)  ## create .venv and install the package with all that it needs
	@:

# One stamp per set of extras (.stamp-test-*, .stamp-dev-*, .stamp-bench-*) and per content of pyproject.toml.
$(VENV)/.stamp-%-$(HASH):
	@[ -x $(PY) ] && $(PY) -m pip --version >/dev/null 2>&1 || { \
		[ -n "$(PYTHON)" ] || { echo "No Python 3.10 to 3.13 that can make virtual environments was found: install one" \
			"(on Debian and Ubuntu with its python3-venv), or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }; \
		"$(PYTHON)" -m venv $(VENV) || { echo "$(PYTHON) could not make the virtual environment $(VENV):" \
			"install its venv module (Debian and Ubuntu: python3-venv), or name another one with PYTHON=..." >&2; exit 1; }; }
	@$(PY) scripts/setup_env.py --torch '$(TORCH)' $*
	@rm -f $(VENV)/.stamp-$*-*; touch $@

test: setup  ## run the test suite (two processes; ARGS="-k word" selects)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

demo: setup  ## reconstruct a real chest CT slice from 20 and 60 views: outputs/demo/report.html
	$(PY) -m invrecon.demo $(ARGS)

demo-mri: setup  ## reconstruct brain slices from a 4th and an 8th of simulated k-space: outputs/demo-mri/report.html
	$(PY) -m invrecon.demo_mri $(ARGS)

lint: setup $(VENV)/.stamp-dev-$(HASH)  ## ruff (rules, docstrings, format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup $(VENV)/.stamp-dev-$(HASH)  ## let ruff mend and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup $(VENV)/.stamp-bench-$(HASH)  ## run the benchmarks that need no GPU: tables here, JSON in outputs/bench
	@mkdir -p outputs/bench; status=0; for path in benchmarks/[a-z]*.py; do \
		name=$$(basename $$path .py); case $$name in dip|rgb|tune) continue;; esac; echo "== $$name"; \
		$(PY) -m benchmarks.$$name --json outputs/bench/$$name.json $(ARGS) || status=1; done; exit $$status

claims: setup  ## put every published claim to the test: tables and verdicts in benchmarks/claims (hours; goes on)
	$(PY) -m benchmarks.claims $(ARGS)

data: setup  ## make the CT sample of data/ again, from its public source
	$(PY) scripts/make_sample_data.py $(ARGS)

clean:  ## remove caches and builds (outputs/ and .venv stay)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find invrecon tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv, too
	rm -rf $(VENV)
