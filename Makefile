# Every command of the course. The work is done by `python -m tools....`, so that machines without
# make (Windows) have the same commands; README.md lists them.

# Any Python from 3.11 on will do. TORCH_INDEX=cpu takes PyTorch's own CPU build (Linux, no GPU).
PYTHON ?= python3
TORCH_INDEX ?=
PORT ?= 8000
ARGS ?=

# What a shell may carry in and what would make results differ from everybody else's.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS VIRTUAL_ENV
export PYTHONUTF8 := 1
export TORCH_INDEX

ENV := .venv
BOOK_ENV := .venv-book
RUN := $(ENV)/bin/python
BOOK_RUN := $(BOOK_ENV)/bin/python
INSTALL := $(PYTHON) tools/environment.py

.DEFAULT_GOAL := help
.PHONY: help book test run notebooks experiments lab bench gpu set-url lock env env-book clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1 /' | \
	  while read -r name what; do printf '  make %-11s %s\n' "$$name" "$$what"; done

book: env-book ## build the web book; on a terminal, serve it (PORT=8000)
	@$(BOOK_RUN) -m tools.book --port "$(PORT)" $(ARGS)

test: env ## prove everything: lint, unit tests, notebooks, book (ARGS="--only unit")
	@CUDA_VISIBLE_DEVICES= $(RUN) -m tools.check $(ARGS)

run: env ## fine-tune the embedded model with QLoRA, before and after (ARGS="--help")
	@$(RUN) -m qlora_lab finetune $(ARGS)

notebooks: env ## execute all notebooks again and store their outputs (ARGS="04")
	@CUDA_VISIBLE_DEVICES= $(RUN) -m tools.run_notebooks $(ARGS)

experiments: env ## make the recorded results that are missing (ARGS="--list")
	@CUDA_VISIBLE_DEVICES= $(RUN) -m experiments $(ARGS)

lab: env ## open the notebooks in JupyterLab
	@$(INSTALL) $(ENV) requirements-lab.txt
	@$(RUN) -m jupyterlab notebooks $(ARGS)

bench: env ## measure speed against bitsandbytes and torchao
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target .bench-site -r requirements-bench.txt
	@CUDA_VISIBLE_DEVICES= PYTHONPATH=.bench-site $(RUN) -m benchmarks $(ARGS)

gpu: env ## on an NVIDIA card: repeat the proofs, record times and peak memory
	@bad=0; \
	  $(RUN) -m pytest tests/gpu -m gpu $(ARGS) || bad=1; \
	  $(RUN) -m tools.record_gpu || bad=1; \
	  for each in price step quantize; do $(RUN) -m benchmarks --gpu --only $$each || bad=1; done; \
	  exit $$bad

set-url: env ## give the course its public address (URL=https://github.com/owner/name)
	@$(RUN) -m tools.set_url "$(URL)"

lock: env ## write constraints.txt anew from the environment
	@$(RUN) -m tools.lock

clean: ## remove what was built; environments and your runs stay
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache .hypothesis .jupyter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf $(ENV) $(BOOK_ENV) .bench-site

# Not in the list: the environments. They re-install only when a requirement changes.
env:
	@$(INSTALL) $(ENV) requirements.txt --editable

env-book:
	@$(INSTALL) $(BOOK_ENV) requirements-book.txt
