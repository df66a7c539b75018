# Two commands: `make run` and `make test`. Both make the virtual environment when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test lint typecheck venv constraints clean

run: venv
	$(BIN)/mla-pipeline run --approve

test: venv lint typecheck
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: venv
	$(BIN)/mypy pipelines steps kernels container examples

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than 3.11: install Python 3.11 or newer, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# Pins what is installed now; run it in an environment whose tests passed. Local build tags (+cpu) are dropped.
constraints:
	@{ echo '# Exact versions of one environment in which the tests passed; made by `make constraints`.'; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+[A-Za-z0-9.]*$$//' | grep -E '^[A-Za-z0-9._-]+=='; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) .mla
