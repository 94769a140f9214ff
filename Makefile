# make train   see the idea at work: trains small networks on the CPU, in two to four minutes
# make test    prove the code: exports, clean notebooks, every notebook run, pytest; make test-gpu: the tests that need a GPU
# make docs    the site, into _docs/ (pip alone); make readme: README.md from nbs/index.ipynb
# make bench   one section of the benchmark on a GPU: make bench SECTION=speed ARGS='--rounds 30'; chapter 22 lists them
# make hooks   before you change notebooks: git merges them cell by cell, Jupyter saves them clean
# Each sets up .venv if it is missing. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# one stamp for what was asked for: a change of content sets up again, a new date does not
READY := $(VENV)/.ready-$(shell cat settings.ini pyproject.toml setup.py constraints.txt | cksum | cut -d' ' -f1)
SCRATCH := .check
export OMP_NUM_THREADS ?= 1
# what Python compiles is kept, even where the shell says not to: without it each worker, notebook and child compiles PyTorch's source anew, 13 s
unexport PYTHONDONTWRITEBYTECODE
SECTION ?= speed
# without a GPU the Triton kernels are tested in Triton's interpreter, which has to be chosen before Triton is imported
ifeq ($(shell command -v nvidia-smi),)
export TRITON_INTERPRET = 1
endif
.PHONY: setup train bench test test-export test-clean test-nbs test-py test-gpu docs api readme export clean-nbs colab hooks release-check
.DELETE_ON_ERROR:

train: $(READY)
	@env -u OMP_NUM_THREADS PYTHONWARNINGS=ignore::FutureWarning $(BIN)/vt_drloc_demo

bench: $(READY)
	@env -u OMP_NUM_THREADS $(BIN)/python -m vt_drloc.bench --section $(SECTION) $(ARGS)

# One after the other, also under make -j, so that the first failure is the last thing said
test: $(READY)
	@$(MAKE) --no-print-directory test-export
	@$(MAKE) --no-print-directory test-clean
	@$(MAKE) --no-print-directory test-nbs
	@$(MAKE) --no-print-directory test-py

test-export: $(READY)
	@echo "== 1/4 vt_drloc/ is what the notebooks export"
	@rm -rf $(SCRATCH) && mkdir $(SCRATCH) && cp -a pyproject.toml settings.ini setup.py _quarto.yml nbs vt_drloc $(SCRATCH)/
	@cd $(SCRATCH) && $(CURDIR)/$(BIN)/nbdev-export
	@diff -r -x __pycache__ vt_drloc $(SCRATCH)/vt_drloc || { echo "vt_drloc/ differs from what the notebooks export: run 'make export'"; exit 1; }
	@rm -rf $(SCRATCH)

test-clean: $(READY)
	@echo "== 2/4 the notebooks are clean and hold no error"
	@rm -rf $(SCRATCH) && mkdir $(SCRATCH) && cp -a pyproject.toml settings.ini setup.py _quarto.yml nbs vt_drloc $(SCRATCH)/
	@cd $(SCRATCH) && $(CURDIR)/$(BIN)/nbdev-clean
	@diff -rq nbs $(SCRATCH)/nbs || { echo "these notebooks are not clean: run 'make clean-nbs'"; exit 1; }
	@! grep -rl --include='*.ipynb' '"output_type": "error"' nbs || { echo "these notebooks hold an error as output: run them again"; exit 1; }
	@rm -rf $(SCRATCH)

test-nbs: $(READY)
	@echo "== 3/4 every notebook runs"
	@echo "   left out here: cells flagged cuda (need a GPU), data (need a download), slow (take long)"
	@$(BIN)/python tools/notebooks.py

test-py: $(READY)
	@echo "== 4/4 pytest"
	@$(BIN)/python -m pytest -n 3 --dist loadfile -rs tests/

# What CI skips, for a machine with a GPU; writes a record, which chapter 22 shows
test-gpu: $(READY)
	@env -u OMP_NUM_THREADS $(BIN)/python tools/gpu_tests.py $(ARGS)

docs: $(READY)
	@$(BIN)/python tools/site.py docs

# The reference pages alone; `make docs` makes them too, nbdev-docs does not
api: $(READY)
	@$(BIN)/python tools/site.py api

readme: $(READY)
	@$(BIN)/python tools/site.py readme

export: $(READY)
	@$(BIN)/nbdev-export

clean-nbs: $(READY)
	@$(BIN)/nbdev-clean

# The first cell of every notebook, with the address of settings.ini; needs nothing installed
colab:
	@$(PYTHON) tools/colab.py

# nbdev's hooks for git and Jupyter. Git calls the nbdev of this .venv, the one that the tests and CI use
hooks: $(READY)
	@$(BIN)/nbdev-install-hooks
	@git config --local merge.jupyternotebook.driver '"$(abspath $(BIN))/nbdev-merge" %O %A %B %P'
	@git config --local diff.jupyternotebook.command '"$(abspath $(BIN))/nbdev-diff-driver"'

# What must be true before a release; needs nothing installed
release-check:
	@! grep -n SET_ME settings.ini pyproject.toml || { echo "no release yet: set the owner (user) in settings.ini and the urls in pyproject.toml"; exit 1; }
	@v=$$(sed -n 's/^version *= *//p' settings.ini); grep -q "^## $$v" CHANGELOG.md || { echo "no release yet: CHANGELOG.md has no section '## $$v'"; exit 1; }
	@$(PYTHON) tools/colab.py --check
	@echo "ready for a release"

setup: $(READY)

$(READY):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: make PYTHON=python3.11 (remove $(VENV) first)")'
	@echo "setting up $(VENV), several minutes the first time"
	@$(BIN)/python -m pip install -q uv || echo "uv cannot be had, pip does it"
	@if $(BIN)/uv --version >/dev/null 2>&1; then $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	@rm -f $(VENV)/.ready-* && touch $@
