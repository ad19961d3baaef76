# Every target makes the environment it needs: .venv, from the exact versions in requirements.lock, without torch.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: run test test-all torture lint audit benchmark lock clean

run: .venv/ready
	$(RUN) -m vitmed.main --config=configs/quickstart.py --sweep --workdir=runs/quickstart
	$(RUN) -m vitmed.report --workdir=runs/quickstart --out=runs/quickstart-report

# Two processes, each with files of its own: most tests compile and so keep one core busy. Their models make few steps, so the quick
# tests compile in half the time, to slower programs; all tests take what XLA makes of them for users.
PROCESSES ?= 2
test: .venv/ready
	XLA_FLAGS=--xla_backend_optimization_level=0 $(RUN) -m pytest -n $(PROCESSES) --dist loadfile -m "not slow"

test-all: .venv/ready
	$(RUN) -m pytest -n $(PROCESSES) --dist loadfile

# Runs killed 50 times, and more than 10,000 damaged files; make torture SEED=7 repeats what another one drew.
SEED ?= $(shell date +%s)
torture: .venv/ready
	VITMED_KILLS=25 VITMED_FUZZ=1000 VITMED_SEED=$(SEED) $(RUN) -m pytest -s -o faulthandler_timeout=0 tests/test_kills.py tests/test_disks.py tests/test_fuzz.py

lint: .venv/ready
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

# Known vulnerabilities of the locked versions; needs uv and the network.
audit:
	uvx pip-audit --requirement requirements.lock --no-deps --disable-pip

# With PEER="python path/to/step.py" each patch size is measured beside that command, in turn.
benchmark: .venv/ready
ifdef PEER
	$(RUN) -m benchmarks.compare --peer="$(PEER)" --patches=28,14,7,4,2,1
	$(RUN) -m benchmarks.compare --peer="$(PEER)" --rank=3 --batch=8 --patches=14,7,4
else
	$(RUN) -m benchmarks.step --patches=28,14,7,4,2,1
	$(RUN) -m benchmarks.step --rank=3 --batch=8 --patches=14,7,4
endif

# Needs uv; resolves pyproject.toml anew. Torch and what only torch needs are left out: vitmed never imports them.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra medical --extra hub --extra dev \
	    --no-annotate --no-header --no-emit-index-url --output-file requirements.lock \
	    $(foreach name,torch torchvision mpmath sympy setuptools,--no-emit-package $(name))

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitmed needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv build dist vitmed.egg-info .pytest_cache .ruff_cache
