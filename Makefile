PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --constraint constraints.txt --editable
DEPENDENCIES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-kafka test-slow lint format types bench bench-embed bench-index bench-endurance clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.dev ## set up .venv with everything for development

demo: $(VENV)/.demo ## the whole trip on this machine; IMAGES=folder for pictures of one's own
	@$(RUN) -m deploy.demo $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

test: $(VENV)/.dev ## every test that takes seconds, on real Valkey and Tansu; ARGS go to pytest
	$(RUN) -m pytest -m "not apache_kafka and not slow" $(ARGS)

test-kafka: $(VENV)/.dev ## the tests that need Apache Kafka; wants java and mvn
	$(RUN) -m pytest -m "apache_kafka and not slow" $(ARGS)

test-slow: $(VENV)/.dev ## the tests that take minutes
	$(RUN) -m pytest -m slow $(ARGS)

lint: $(VENV)/.dev ## ruff: lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.dev ## let ruff repair what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.dev ## mypy, strict
	$(RUN) -m mypy

bench: $(VENV)/.dev ## the whole trip against the clock; ARGS go to the benchmark
	$(RUN) -m tests.bench.pipeline $(ARGS)

bench-embed: $(VENV)/.dev ## accuracy and speed of the embedder
	$(RUN) -m tests.bench.embed $(ARGS)

bench-index: $(VENV)/.dev ## recall and speed of the index
	$(RUN) -m tests.bench.index $(ARGS)

bench-endurance: $(VENV)/.dev ## time to be ready, memory over many events
	$(RUN) -m tests.bench.endurance $(ARGS)

clean: ## remove everything that was made here
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache *.egg-info demo-report.html
	find . -name __pycache__ -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: $(DEPENDENCIES) | $(RUN)
	@echo "installing what the demo needs into $(VENV) (about 6 GB with torch, once)"
	@$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.dev: $(DEPENDENCIES) | $(RUN)
	$(INSTALL) '.[dev,bench]'
	@touch $@ $(VENV)/.demo
