# An active virtual environment is used as it is; otherwise .venv is made.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
INSTALLED := $(VENV)/.eah-kernels-installed

.PHONY: demo test lint resources bench bench-device clean

demo: $(INSTALLED)
	$(VENV)/bin/eah demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

resources: $(INSTALLED)
	TRITON_INTERPRET=0 $(VENV)/bin/python bench/resources.py $(if $(ALL),--all)

bench: $(INSTALLED)
	$(VENV)/bin/python bench/attention.py
	$(VENV)/bin/python bench/model.py
	$(VENV)/bin/python bench/report.py --readme

bench-device:
	bash bench/device.sh

clean:
	rm -rf .venv build *.egg-info

# The native extension is built with the torch that is installed, hence first torch and then, not isolated, the rest.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/cpu/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch "setuptools>=77"
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@
