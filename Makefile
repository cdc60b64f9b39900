# One environment (.venv) with the exact versions of constraints.txt; nothing but Python 3.11, pip and make is needed.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-sft test soak check bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-8s %s\n' "$$name" "$$what"; done

install: $(INSTALLED) ## Make .venv with everything in it

demo: $(INSTALLED) ## Text to tokens to a trained model that fills in masks, in a few minutes on two cores
	$(BIN)/python demo/run.py

demo-sft: $(INSTALLED) ## Pairs to a model that answers held-out questions, in a few minutes on two cores
	$(BIN)/python demo/sft.py

# Three tests at a time, since they wait much; the tests of one file share what they start.
test: $(INSTALLED) ## Run every test
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

soak: $(INSTALLED) ## Every layout of up to 8 processes, and a run that is killed 50 times: hours on two cores
	$(BIN)/pytest tests/distributed/test_layouts.py tests/integration/test_resume.py --every-layout
	$(BIN)/pytest tests/integration/test_faults.py -k killed --kills 50 --timeout 7200

check: $(INSTALLED) ## Lint, format, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## Engine and head against plain ones, layouts against arithmetic, checkpoints against torch's, cost of guards, cleaning
	$(BIN)/python benchmarks/engine_vs_plain.py
	$(BIN)/python benchmarks/engine_vs_plain.py --vocabulary 126464 --steps 2 --rounds 1
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/guards.py
	$(BIN)/python benchmarks/cleaning.py

clean: ## Remove what the commands above made, .venv and runs/demo included
	rm -rf $(VENV) runs/demo runs/demo_sft runs/demo_reversal build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that nothing that asks for "some torch" brings another one. DeepSpeed arrives as source;
# DS_BUILD_OPS=0 builds none of its C++ ops, so no compiler is needed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		"Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --use-pep517 --constraint constraints.txt --editable '.[dev]'
	@touch $@
