# Two commands matter: `make lab` opens the course, `make test` tests it. Both set the environment up first.
#   make lab ARGS=--no-browser       a server without a screen: prints the address to open
#   make lab PYTHON=python3.12       another Python (3.11 to 3.13)
#   make lab TORCH_BACKEND=cpu       the small PyTorch build, without CUDA
# Syntax of GNU Make 3.81, which macOS ships.
PYTHON ?= python3
TORCH_BACKEND ?=
ARGS ?=
BIN = .venv/bin
SUDO = $(shell [ "$$(id -u)" = 0 ] || echo sudo)
TIERS = unit parity notebooks serving browser cluster bench

.PHONY: help setup lab test check lint test-long node node-up node-down node-status
.PHONY: image system-packages constraints clean parity-environment parity-libraries peers vllm-environment
.PHONY: $(TIERS:%=test-%)

help:
	@sed -n 's/^\([a-z$$(][^:=]*\):.*## /make \1: /p' Makefile

setup: ## the environment in .venv, and the model in the cache
	@$(PYTHON) tools/setup.py --torch-backend "$(TORCH_BACKEND)"

lab: setup ## JupyterLab on your copy of the first notebook
	@$(BIN)/python tools/lab.py $(ARGS)

test: setup ## every tier that this machine can run; ARGS goes to pytest
	@$(BIN)/python tests/run.py $(ARGS)

$(TIERS:%=test-%): setup ## one tier
	@$(BIN)/python tests/run.py $(@:test-%=%) $(ARGS)

test-long: setup ## long fault and soak runs
	@$(BIN)/python tests/run.py long $(ARGS)

check: setup lint ## lint, types and the unit tests, in four minutes
	@$(BIN)/python tests/run.py unit $(ARGS)

# They pin an older transformers than the lab, so they get .venv-parity, which uv fills from outside this folder, where
# pyproject.toml's constraints do not hold.
parity-environment: setup ## torchao, optimum-quanto, llm-compressor, for parity-libraries and bench: 5 GB more, once
	@.venv/uv/bin/uv venv --quiet --allow-existing --python $(BIN)/python .venv-parity
	@cd / && $(CURDIR)/.venv/uv/bin/uv pip install --quiet --python $(CURDIR)/.venv-parity/bin/python \
	    $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) \
	    --requirements $(CURDIR)/tests/parity/libraries.txt --editable $(CURDIR)

parity-libraries: parity-environment ## labkit.quant beside them; writes parity.json
	@.venv-parity/bin/python tests/parity/libraries.py $(or $(ARGS),--out data/measurements/parity.json)

# llama.cpp has no wheel that uses all of a processor: it is compiled for the one that is here, with OpenMP, its default.
peers: setup ## llama.cpp and onnxruntime, for `labkit bench`: compiles ten minutes, once; needs g++ and cmake
	@.venv/uv/bin/uv venv --quiet --allow-existing --python $(BIN)/python .venv-peers
	@cd / && CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" $(CURDIR)/.venv/uv/bin/uv pip install \
	    --quiet --python $(CURDIR)/.venv-peers/bin/python --requirements $(CURDIR)/tests/bench/peers.txt

vllm-environment: setup ## vllm on the CPU, for `labkit bench`: 6 GB more, once
	@.venv/uv/bin/uv venv --quiet --allow-existing --python $(BIN)/python .venv-vllm
	@cd / && $(CURDIR)/.venv/uv/bin/uv pip install --quiet --python $(CURDIR)/.venv-vllm/bin/python \
	    --requirements $(CURDIR)/tests/bench/vllm.txt --override $(CURDIR)/tests/bench/vllm-overrides.txt

lint: setup ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

node: setup ## build the test node, a Kubernetes for this machine: once, a quarter of an hour
	@$(BIN)/python cluster/node build

node-up node-down node-status: setup ## start the test node, stop it, look at it
	@$(BIN)/python cluster/node $(@:node-%=%) $(ARGS)

image: setup ## the model server's image, for the test node, with buildah: 3 minutes and 20 GB, once
	@$(BIN)/python cluster/images/build.py --torch-backend "$(TORCH_BACKEND)" $(ARGS)

system-packages: ## what some tests need beyond Python, on Debian and Ubuntu
	$(SUDO) apt-get install -y --no-install-recommends $$(cat tools/system-packages.txt)

constraints: setup ## resolve the versions anew from pyproject.toml
	.venv/uv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header \
	    --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-package labkit -o constraints.txt

clean: ## remove .venv, .venv-parity and .venv-peers; work/ and the cache stay
	rm -rf .venv .venv-parity .venv-peers
