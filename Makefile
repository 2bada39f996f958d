# Two commands for everyone: `make run` and `make test`. Each sets up what it needs in a virtual
# environment of its own (.venv; another with VENV=...).

PYTHON ?= python3
VENV ?= .venv
# Processes that the tests run in: most tests use one core.
WORKERS ?= 2
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc fastnorm -name '*.cpp' -o -name '*.hpp' -o -name '*.py' -o -name '*.pyi')

.PHONY: run test test-cuda test-gpu lint bench bench-gpu examples develop sanitize clean

# The main job: large arrays, every version and backend, checked and timed; writes table, JSON and plot.
run: $(VENV)/.installed
	$(BIN)/fastnorm bench

test: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# The CUDA kernels without a GPU: in Numba's simulator, and compiled.
test-cuda: $(VENV)/.cuda
	$(BIN)/pytest -n $(WORKERS) --dist worksteal tests/test_cuda_*.py

# On a machine with a GPU: the whole suite, real device arrays included, then compute-sanitizer.
test-gpu: $(VENV)/.gpu
	.ci/gpu $(abspath $(BIN))

# The roof of the GPU, then every case against PyTorch; a table and JSON in bench/results.
bench-gpu: $(VENV)/.gpu
	$(BIN)/python bench/cuda.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -P -m mypy.stubtest fastnorm._core
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.hpp')

# pytest-benchmark: staged, alt and fused, by backend, op, shape and dtype, a few cases of each. Then what the
# kernels are judged by: large and cached arrays, small calls, dtypes, threads, networks, against the memory floor
# and the peers that are installed; tables, JSON, a plot by size, and which targets are met. Some nine minutes.
bench: $(VENV)/.installed
	$(BIN)/pytest bench
	$(BIN)/fastnorm bench --targets

examples: $(VENV)/.installed
	$(BIN)/python examples/run_all.py

# Editable: Python changes take effect at once, C++ changes at the next import.
develop: $(VENV)/.environment
	$(BIN)/pip install -q scikit-build-core pybind11 cmake ninja
	$(BIN)/pip install -q --no-build-isolation -Ceditable.rebuild=true -Cbuild-dir=build/editable -e '.[bench,examples,test]'
	touch $(VENV)/.installed

# The extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.installed
	.ci/sanitize $(abspath $(BIN))

$(VENV)/.environment:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.environment $(SOURCES)
	$(BIN)/pip install -q '.[bench,examples,test]'
	touch $@

# The packages of the extra 'cuda', 420 MB.
CUDA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cuda"])
$(VENV)/.cuda: $(VENV)/.installed
	$(BIN)/pip install -q $$($(BIN)/python -c '$(CUDA)')
	touch $@

$(VENV)/.gpu: $(VENV)/.installed
	$(BIN)/pip install -q '.[bench,cuda,examples,test]' torch cupy-cuda13x
	touch $@

clean:
	rm -rf $(VENV) build dist
