# make demo   trains a small Fluid on the embedded pictures (minutes on two cores) and draws
# make test   lints and runs the tests
# make lint   only lints
# make clean  removes the environment, the demo and all that was built
#
# Needs Python 3.11 to 3.13 and nothing else: the rest goes into .venv, at the versions of
# constraints.txt. `make PYTHON=python3.12 demo` chooses the Python that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

export TF_CPP_MIN_LOG_LEVEL := 3
# Large pages for what XLA allocates anew at every step: a tenth of a CPU step, in page faults.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo 'error: fluid_jax needs Python 3.11 to 3.13, and $(PYTHON) is not one of them:' \
	    'name one, as in make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup).'; exit 1; } >&2
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
	@echo 'Pictures: $(CURDIR)/demo/grid.png (prompts x seeds)'
	@echo '          $(CURDIR)/demo/decoding.gif (the order in which tokens are drawn)'

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# One file's tests stay in one process, so that they share what their fixtures train.
test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

clean:
	rm -rf .venv demo build dist fluid_jax.egg-info .pytest_cache .ruff_cache
