# `make run` and `make test` install what they need into .venv; nothing but Python 3.11 and make is assumed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# whole files side by side, one a core: what a file's tests share is made once
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-slow coverage lint style table1 recipes paper influence-study peft bench reliability clean

run: $(READY)
	$(BIN)/python run_regression.py --overwrite_output_dir

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m "slow or not slow"

coverage: $(READY)
	$(PYTEST) --cov --cov-report=term-missing

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

table1: $(READY)
	PYTHON=$(BIN)/python ./reproduce_table1.sh

recipes: $(READY)
	$(BIN)/python studies/recipes.py

paper: $(READY)
	PYTHON=$(BIN)/python ./reproduce_paper.sh

influence-study: $(READY)
	$(BIN)/python studies/influence.py $(if $(EXTERNAL_FILE),--external_file "$(EXTERNAL_FILE)")
	$(BIN)/python studies/influence_lds.py

peft: $(READY)
	$(BIN)/python studies/peft_comparison.py --tune
	$(BIN)/python studies/peft_comparison.py --tune_more
	$(BIN)/python studies/peft_comparison.py

bench: $(READY)
	$(BIN)/python bench.py --corpus

reliability: $(READY)
	$(BIN)/python studies/reliability.py

clean:
	rm -rf $(VENV) outputs work

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
