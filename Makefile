# make install | make demo | make weights | make lint | make test | make docs
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo weights lint test docs clean

install: $(VENV)/installed

# DS_BUILD_OPS=0: DeepSpeed compiles its CUDA ops when they are first used, not here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,experiments]"
	touch $@

demo: install
	$(BIN)/python -m cllm4rec demo

weights: install
	$(BIN)/python -m cllm4rec weights

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Plain tests first: they fail faster than those that start Ray.
test: lint
	$(BIN)/pytest -m "not ray"
	$(BIN)/pytest -m ray

# The page of all settings is written from the schema. A warning is an error, and so is a broken link.
docs: install
	$(BIN)/python -m cllm4rec.config.reference > docs/config.md
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) build runs
