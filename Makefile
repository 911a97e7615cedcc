# Everything needs only python3 (3.11 or newer) and make; it all happens in .venv.
PYTHON ?= python3
PORT   ?= 8000
BIN    := .venv/bin

.PHONY: demo test faults check serve train

demo: .venv/installed          ## train four models on a synthetic log and serve them
	$(BIN)/python -m training demo --port $(PORT)
	$(BIN)/python -m service --port $(PORT)

test: .venv/installed          ## every test but the slow ones
	$(BIN)/pytest

faults: .venv/installed        ## kill, starve and spoil for real, for minutes; ends with a table of promises and figures
	$(BIN)/pytest tests/faults -m slow

check: .venv/installed         ## linters, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: .venv/installed         ## serve what is in artifacts/
	$(BIN)/python -m service --port $(PORT)

train: .venv/installed         ## make train RECIPE=recipes/frappe/afm.toml
	$(BIN)/python -m training fit $(or $(RECIPE),$(error RECIPE= is missing, for example RECIPE=demo/afm.toml))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("factorlens needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,training,service,dev]'
	touch $@
