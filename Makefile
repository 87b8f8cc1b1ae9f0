PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo readme test lab notebooks portraits portraits-onward clean

help: ## list the targets
	@awk -F ':.*## ' '/^[^\t].*:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Read before anything is installed, so that an old Python says so in words and not in a traceback of pip's.
define CHECK_PYTHON
import sys
sys.exit(sys.version_info < (3, 11) and "sliderspace needs Python 3.11 or newer and $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2] or 0)
endef
export CHECK_PYTHON

# torch and torchvision come from one pip call: a CUDA torchvision does not import beside a CPU torch.
.venv/.done: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	@$(BIN)/python -c "import torchvision" || { echo "torch and torchvision do not fit each other: install both from one index"; exit 1; }
	@touch $@

demo: .venv/.done ## make the pictures of the README in demo/, with the bundled model
	$(BIN)/sliderspace demo --output demo

readme: demo ## put the demo's pictures into the README and its tables into docs/report.md
	$(BIN)/python benchmarks/truth.py demo/space.safetensors --output demo/truth
	$(BIN)/python tools/readme.py

# One thread gives the same sums on every machine, and nothing fights for the cores.
test notebooks: export OMP_NUM_THREADS ?= 1
test notebooks: export HF_HUB_OFFLINE = 1
test: export SLIDERSPACE_SMALL = 1

test: .venv/.done ## run everything CI checks: lint, notebooks in sync and clean, notebooks and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check . sliderspace/__init__.py sliderspace/*/__init__.py
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A core is left to the browser, which shows the board's pictures sooner then.
lab: export OMP_NUM_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 1 ? n - 1 : 1)))
lab: .venv/.done ## open the quickstart in JupyterLab
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/studies/quickstart.ipynb

notebooks: .venv/.done ## export the notebooks to sliderspace/, run them all and keep their outputs
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py

portraits: .venv/.done ## make the next bundled model, from nothing, in portraits-build/
	$(BIN)/python -m sliderspace.portraits.recipe --output portraits-build
	$(BIN)/python -m sliderspace.portraits.distill --output portraits-build

# The state lies outside this folder; the model that it has come to is written into STATE/model when it is stopped.
PORTRAITS ?= portraits-next
STATE ?= $(HOME)/.cache/sliderspace/portraits-onward
portraits-onward: export OMP_NUM_THREADS ?= 1
portraits-onward: .venv/.done ## train the next bundled model on, behind everything else, until stopped
	nice -n 19 $(BIN)/python -m sliderspace.portraits.recipe --output $(STATE) --init $(PORTRAITS) --onward

clean: ## remove what the targets made, but for .venv and portraits-build, which took long
	rm -rf demo tests/output build dist _docs _proc *.egg-info .pytest_cache .ruff_cache
	find nbs sliderspace tests tools -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
