PYTHON ?= python3
VENV ?= .venv

.PHONY: protos
protos:  ## Generates the Python code of protos/ (committed; a test holds that it is current).
	$(VENV)/bin/python -m protos.generate
