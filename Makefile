# make setup  installs fluid_jax and its dependencies into .venv
# make demo   trains a small model on the embedded images (minutes on two cores) and samples from it
# make test   runs the linter and the tests
# make lint   runs the linter
# make clean  removes .venv, the demo and all build outputs
#
# This needs only Python 3.11, 3.12, or 3.13 with a C++ compiler. Dependencies are installed into .venv, with the versions in
# constraints.txt. `make PYTHON=python3.12 setup` selects the Python version of .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

export TF_CPP_MIN_LOG_LEVEL := 3
# XLA allocates memory in every step. Huge pages save about 10% of the time of a step on CPUs.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo 'error: fluid_jax needs Python 3.11 to 3.13, but $(PYTHON) is another version:' \
	    'select a version, as in make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup).'; exit 1; } >&2
	@$(PYTHON) -c 'import os, shlex, shutil, sys; \
	    compiler, *_ = *shlex.split(os.environ.get("CXX", "c++")), ""; \
	    sys.exit(sys.version_info >= (3, 13) and not shutil.which(compiler))' || { \
	  echo 'error: with Python 3.13, a package that seqio needs (editdistance) is compiled, but there is' \
	    'no C++ compiler: install one, such as g++, or use Python 3.11 or 3.12.'; exit 1; } >&2
	@echo "Installing into .venv with $$($(PYTHON) --version): about a minute, 4 GB."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python \
	  -c constraints.txt -b constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m fluid_jax.main --config=configs/demo.py --workdir=demo/run
	@$(BIN)/python -m fluid_jax.sample --workdir=demo/run \
	  --prompts_file=configs/demo_prompts.txt --out demo/grid.png --animation demo/decoding.gif
	@echo 'Images: $(CURDIR)/demo/grid.png (one row per prompt, one column per seed)'
	@echo '        $(CURDIR)/demo/decoding.gif (tokens in the order of sampling)'

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# All tests of a file run in one process, because their fixtures train models for several tests.
test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

clean:
	rm -rf .venv demo build dist fluid_jax.egg-info .pytest_cache .ruff_cache
