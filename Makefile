# make install | make demo | make test | make lint
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint clean

install: $(VENV)/installed

# DS_BUILD_OPS=0: DeepSpeed's CUDA ops are built when first used, not here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,experiments]"
	touch $@

demo: install
	$(BIN)/python -m cllm4rec demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Plain tests first: what they find, the slow ones would find later.
test: lint
	$(BIN)/pytest -m "not ray"
	$(BIN)/pytest -m ray

clean:
	rm -rf $(VENV) runs
