# Every target sets itself up: the first one run creates .venv and installs the project into it, once.
#   PYTHON=python3.12   the interpreter for .venv        TORCH=torch==2.11.0   another torch, or a path to a wheel
#   WORKERS=4           test processes                   VENV=path             another place for .venv

PYTHON  ?=
TORCH   ?= torch==2.13.0
VENV    ?= .venv
WORKERS ?= 2

BIN        := $(VENV)/bin
STAMP      := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST     := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench aot evidence lint clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@sed -n 's/^# \{3\}/  /p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install the project there; the others do it by themselves

# One thread: two were many times slower where the second core had other work (benchmarks/results/NOTES.md).
demo: $(STAMP) ## Train a teacher on digits, distil it to one step, write runs/demo/report.html
	$(ONE_THREAD) $(BIN)/fastdistill demo

test: $(STAMP) ## Run the tests: first the kernels, interpreted on the CPU, then all the others
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels
	$(PYTEST) --ignore=tests/kernels

bench: $(STAMP) ## Run every benchmark that needs no GPU: each checks its numbers before it measures
	set -e; for benchmark in run.cpu_attention count.driver_memory count.launches run.precision; do $(BIN)/python -m fastdistill.benchmarks.$$benchmark; done
	$(ONE_THREAD) $(BIN)/fastdistill bench --suite dit,mmdit,norms,block,step,scaling --quick --device cpu

aot: $(STAMP) ## Compile every kernel for GPUs that need not be there, about ten minutes: benchmarks/results/aot.md
	$(ONE_THREAD) $(BIN)/python -m fastdistill.benchmarks.compile.aot_table --jobs $(WORKERS)

evidence: $(STAMP) ## Train every method on the ring and on digits, three seeds, an hour and a half: docs/evidence, docs/methods.md
	seq $(WORKERS) | $(ONE_THREAD) xargs -P $(WORKERS) -I % $(BIN)/python -m fastdistill.benchmarks.methods.evidence --train-only
	$(ONE_THREAD) $(BIN)/python -m fastdistill.benchmarks.methods.evidence --collect
	$(ONE_THREAD) $(BIN)/python -m fastdistill.benchmarks.methods.method_figures --runs runs/evidence

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find benchmarks/ fastdistill/ kernels/ tests/ -name __pycache__ -type d -prune -exec rm -rf {} +

# With the newest candidate that is at least 3.11 and can do it; over what an interrupted run left, if anything.
define CREATE_VENV
for python in $(CANDIDATES); do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	if $$python -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "Creating $(VENV) with $$python"; exec $$python -m venv $(VENV); \
	fi; \
	without_venv=$${without_venv:-$$python}; \
done; \
if [ -n "$$without_venv" ]; then \
	echo "$$without_venv can't create virtual environments: Debian and Ubuntu ship that part separately." >&2; \
	package=$$($$without_venv -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	echo "As root, run: apt-get install $$package    Then this command again." >&2; \
else \
	echo "fastdistill needs Python 3.11, 3.12 or 3.13, and none of these is one: $(CANDIDATES)." >&2; \
	echo "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
fi; \
exit 1
endef

$(STAMP): pyproject.toml setup.py
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { $(CREATE_VENV); }
	@nvidia-smi -L >/dev/null 2>&1 || echo "No NVIDIA GPU here: a CPU build of torch is enough, and is taken if pip finds one." \
		"If pip fetches CUDA packages instead (several GB), all works too; CONTRIBUTING.md says how to spare them."
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[train,dev]"
	@touch $@
