# make demo: a real campaign on this machine.   make test: everything that needs no cluster.
# `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-detuned test test-cluster proof proof-cluster lint cluster cluster-down clean

help:
	@echo "make demo           a real campaign of 12 experiments on this machine (no GPU, no key)"
	@echo "make demo-detuned   the same from two constants made three times worse: how much is recovered"
	@echo "make test           the tests that need no cluster and no root"
	@echo "make cluster        a real Slurm and Apptainer on this machine (Debian or Ubuntu, root)"
	@echo "make test-cluster   the tests on that cluster"
	@echo "make cluster-down   ends what make cluster started"
	@echo "make proof          the heavy figures; rewrites tests/bench/RESULTS.md"
	@echo "make proof-cluster  the long nights on that cluster"

demo: $(INSTALLED)
	$(BIN)/autoresearch demo

demo-detuned: $(INSTALLED)
	$(BIN)/autoresearch demo --detuned

test: lint
	$(BIN)/python -m pytest -m "not cluster and not proof" -n auto --maxprocesses 4 --dist loadgroup --durations=15
	@$(BIN)/python tests/bench/results.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cluster:
	bash slurm/cluster.sh up

cluster-down:
	bash slurm/cluster.sh down

test-cluster: $(INSTALLED) cluster
	$(BIN)/python -m pytest -m "cluster and not proof" --durations=15

proof: $(INSTALLED)
	$(BIN)/python -m pytest -m "proof and not cluster"
	$(BIN)/python tests/bench/all.py

proof-cluster: $(INSTALLED) cluster
	$(BIN)/python -m pytest -m "proof and cluster"

clean:
	rm -rf $(VENV) build *.egg-info

$(INSTALLED): pyproject.toml requirements.lock install.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) bash install.sh
	@touch $@
