# Everything needs only python3 (3.11 or newer) and make; it all happens in .venv.
PYTHON ?= python3
PORT   ?= 8000
REQUESTS ?= 1000000
BIN    := .venv/bin

.PHONY: demo test faults check serve train lock sbom audit

demo: .venv/installed          ## train four models on a synthetic log and serve them
	$(BIN)/python -m training demo --port $(PORT)
	$(BIN)/python -m service --port $(PORT)

test: .venv/installed          ## every test but the slow ones
	$(BIN)/pytest

faults: .venv/installed        ## kill, starve and spoil for real, for minutes; ends with a table of promises and figures
	$(BIN)/pytest tests/faults -m slow --requests $(REQUESTS)

check: .venv/installed         ## linters, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: .venv/installed         ## serve what is in artifacts/
	$(BIN)/python -m service --port $(PORT)

train: .venv/installed         ## make train RECIPE=recipes/frappe/afm.toml
	$(BIN)/python -m training fit $(or $(RECIPE),$(error RECIPE= is missing, for example RECIPE=demo/afm.toml))

lock: .venv/supply/installed   ## docker/*.lock from pyproject.toml and constraints.txt, with the hash of everything
	$(call locked,cpu,cpu service)
	$(call locked,gpu,gpu service)
	$(call locked,training,cpu training)

sbom: .venv/supply/installed   ## sbom.<image>.json, CycloneDX, from the locks
	for image in cpu gpu training; do \
	  .venv/supply/bin/cyclonedx-py requirements docker/requirements.$$image.lock -o sbom.$$image.json || exit 1; done

audit: .venv/supply/installed  ## asks the network for known holes in what the locks name
	for image in cpu gpu training; do \
	  .venv/supply/bin/pip-audit --require-hashes --disable-pip -r docker/requirements.$$image.lock || exit 1; done

# setuptools builds our own package in the image, so that its build takes nothing that is not locked.
locked = echo setuptools | .venv/supply/bin/uv pip compile --quiet pyproject.toml - $(addprefix --extra ,$(2) signing) \
	--constraint constraints.txt --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --output-file docker/requirements.$(1).lock

.venv/supply/installed: Makefile
	$(PYTHON) -m venv .venv/supply
	.venv/supply/bin/pip install --quiet uv cyclonedx-bom pip-audit
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("factorlens needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,training,service,dev]'
	touch $@
