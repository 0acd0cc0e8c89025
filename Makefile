# Every command of the project. `make help` lists them.
STACK ?= stacks/demo.toml
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A CPU build of torch where there is no NVIDIA driver and an index offers one, otherwise the default build.
TORCH := torch==2.13.0
EXTRAS := serve,build,trt-rtx,demo,bench,dev

# A GPU machine may bring its own interpreter: `PYTHON=python3 make test-gpu` takes it as it is, without .venv.
ifneq ($(filter environment command line,$(origin PYTHON)),)
ON_GPU := PYTHONPATH=$(CURDIR) $(PYTHON)
GPU_SETUP :=
else
ON_GPU := $(BIN)/python
GPU_SETUP := setup
endif

.PHONY: help setup demo engines serve bench bench-llm flagship test soak chaos fuzz test-gpu bench-gpu lint clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready ## create .venv with everything pinned by constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.12 setup"; exit 1; }
	@echo "Setting up .venv (a few minutes, most of it downloads)"
	@$(PYTHON) -m venv --clear .venv
	@command -v nvidia-smi >/dev/null || $(PIP) install "$(TORCH)+cpu" 2>/dev/null || true
	@$(PIP) install -c constraints.txt "$(TORCH)"
	@$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: setup ## train, plan, build, compile, serve and measure the demo stack
	@$(BIN)/build-engines demo-models build/demo/models
	@$(BIN)/build-engines plan stacks/demo.toml
	@$(BIN)/build-engines build stacks/demo.toml
	@$(BIN)/triton-repo write stacks/demo.toml
	@$(BIN)/triton-repo serve stacks/demo.toml --free-ports -- $(BIN)/client bench --quick --output build/demo

engines: setup ## build every engine of STACK and its Triton repository
	@case "$(STACK)" in stacks/demo.toml) $(BIN)/build-engines demo-models build/demo/models;; esac
	@$(BIN)/build-engines build $(STACK)
	@$(BIN)/triton-repo write $(STACK)

serve: setup ## serve STACK with Triton on 127.0.0.1 until interrupted
	@$(BIN)/triton-repo serve $(STACK)

bench: engines ## measure STACK against PyTorch: engines alone, then served
	@$(BIN)/build-engines measure $(STACK)
	@$(BIN)/build-engines random-model build/bert-base/models/encoder
	@$(BIN)/build-engines build stacks/bert-base.toml
	@$(BIN)/build-engines measure stacks/bert-base.toml
	@$(BIN)/triton-repo serve $(STACK) --free-ports -- $(BIN)/client bench --output build/bench

bench-llm: setup ## measure a random Llama of 189 M parameters against Transformers: in process, then served
	@$(BIN)/build-engines random-model --llm build/llama-189m/models/llama
	@$(BIN)/build-engines build stacks/llama-189m.toml
	@$(BIN)/build-engines measure stacks/llama-189m.toml
	@$(BIN)/triton-repo write stacks/llama-189m.toml
	@$(BIN)/triton-repo serve stacks/llama-189m.toml --free-ports -- \
	  $(BIN)/client bench --prompt-tokens 128 --new-tokens 48 --output build/llama-189m

flagship: setup ## a random EEVE-shaped 10.8 B model to an INT8 TensorRT-RTX engine (45 GB of disk)
	@$(BIN)/build-engines flagship build/flagship

# Those of a server measure times, and have the cores to themselves.
test: setup ## run all tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_imports.py tests/unit tests/fuzz
	@$(BIN)/python -m pytest tests/serving tests/gpu

chaos: setup ## kill, stop, fill and corrupt what a served stack needs, and measure what its clients see (3 minutes)
	@$(BIN)/python -m pytest tests/reliability/chaos -s

OVERLOAD_SECONDS ?= 120
soak: SECONDS ?= 1800
soak: setup ## overload for OVERLOAD_SECONDS (120), then a mixed load for SECONDS (1800); figures in build/reliability
	@ONECARD_OVERLOAD_SECONDS=$(OVERLOAD_SECONDS) ONECARD_SOAK_SECONDS=$(SECONDS) \
	  $(BIN)/python -m pytest tests/reliability/load -s

fuzz: SECONDS ?= 60
fuzz: setup ## fuzz every target in tests/fuzz for SECONDS (60) each; where atheris has no wheel, by hypothesis
	@$(PIP) install -c constraints.txt -e ".[fuzz]" 2>/dev/null || true
	@$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

test-gpu: $(GPU_SETUP) ## run the tests that need a GPU; a table and build/gpu/test.json say what ran and what could not
	@$(ON_GPU) -m pytest tests/gpu

bench-gpu: $(GPU_SETUP) ## measure engines on this GPU against Transformers and its limits: build/gpu/bench.json, bench.txt
	@$(ON_GPU) -m build_engines.cli bench-gpu build/gpu

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean: ## remove everything that was built, and .venv
	@rm -rf build .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
