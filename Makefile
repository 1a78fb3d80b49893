# make demo: a workflow on this machine, nothing else to install.   make test: the whole test suite.
# Both create .venv on their first run and are quick on the next ones; setup.cfg or pyproject.toml changed: they update it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
METADATA := setup.cfg pyproject.toml
# Airflow has requirements of its own: it is installed beside the project, with the Celery that its provider needs.
AIRFLOW_VENV ?= .venv-airflow
AIRFLOW := apache-airflow==3.3.2 apache-airflow-providers-standard celery==5.6.3 kombu==5.6.2 psycopg2-binary asyncpg
PYTEST_ARGS ?=
# Most tests wait for a server or a process, so more of them than there are processors pay.
TEST_WORKERS ?= 4
# A file's tests stay on one worker (servers, modules' fixtures); tests/conftest.py puts the long files first.
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(COVERAGE)
# Every CI sets CI; on a desk coverage only costs time.
COVERAGE = $(if $(CI),--cov --cov-report=term:skip-covered)
TIERS := test-unit test-contract test-integration test-acceptance

# The first that can create a virtual environment; 3.11 is what we develop on. PYTHON=... chooses another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$name -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

.PHONY: help demo test $(TIERS) test-airflow lint docs proto bench images clean

help:
	@echo 'make demo    create .venv, install, run examples/sales/dag.json on an embedded system'
	@echo 'make test    install the test needs and run the whole suite (PYTEST_ARGS="-k name" for a part, TEST_WORKERS=4)'
	@echo '             make test-unit, test-contract, test-integration and test-acceptance run one tier'
	@echo 'make test-airflow  install Airflow into .venv-airflow (a minute, 400 MB) and let its scheduler run tasks through us'
	@echo 'make lint    ruff, mypy --strict, import-linter'
	@echo 'make docs    build the documentation as .cache/site (python3 -m http.server -d .cache/site shows it)'
	@echo 'make bench   the benchmarks, each beside its floor'
	@echo 'make images  build leoflow-task-base:latest, leoflow-agent:latest and leoflow-system:latest (TAG=... names another tag)'
	@echo 'make proto   regenerate leoflow_celery/protocol/agent_pb2.py from agent.proto'
	@echo 'make clean   remove .venv and every generated file'

demo: $(VENV)/.lite
	$(BIN)/python examples/sales/demo.py

test: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS)

$(TIERS): test-%: $(VENV)/.test
	$(PYTEST) tests/$* $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

test-airflow: $(VENV)/.test $(AIRFLOW_VENV)/.airflow
	LEOFLOW_TEST_REQUIRE=airflow-scheduler LEOFLOW_TEST_AIRFLOW_VENV=$(abspath $(AIRFLOW_VENV)) \
		$(BIN)/python -m pytest tests/acceptance/test_airflow.py $(PYTEST_ARGS)

proto: $(VENV)/.lint
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. leoflow_celery/protocol/agent.proto

bench: $(VENV)/.lite
	for file in $$(grep -l '__main__' bench/*.py); do \
		name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m bench.$$name; done

images: $(VENV)/.python
	$(BIN)/python scripts/images.py --tag $(or $(TAG),latest) $(if $(BASE_IMAGE),--base $(BASE_IMAGE))

clean:
	rm -rf $(VENV) $(AIRFLOW_VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then \
		if command -v python3 >/dev/null && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
			echo 'Python is here, but it cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv'; \
		else \
			echo 'Python 3.11 or newer is needed. On Debian and Ubuntu: apt-get install python3 python3-venv'; \
		fi >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp per set of extras: each is installed once, and again when the metadata changed.
$(VENV)/.lite $(VENV)/.test $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.python $(METADATA)
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@

$(AIRFLOW_VENV)/.airflow: $(VENV)/.python $(METADATA)
	$(PYTHON) -m venv $(AIRFLOW_VENV)
	$(AIRFLOW_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(AIRFLOW) --editable '.[airflow]'
	@touch $@
