# make demo   train small models on speech, digits and points, print the tables of speeds (DATA=folder_or_file)
# make test   the whole test suite, JOBS tests at a time
# make check  lint, format and types
# make gpu    on a machine with a GPU, with the python (GPU_PYTHON) that has a CUDA torch, triton, numpy,
#             pytest and hypothesis:
#             gpu-test (in GPU_JOBS processes), gpu-check (compute-sanitizer) and gpu-bench, each also alone; OUT is
#             where the figures go, ONLY a regular expression for the names of what is measured
# make gpu-tune  there too: measure the kernels' tiles and write the table that they read (minutes)
# make bench  the benchmarks, and the tables and plots of README.md and bench/README.md from them

PYTHON ?= python3
GPU_PYTHON ?= python3
JOBS ?= 2
GPU_JOBS ?= 12
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/emulator/*)

.PHONY: demo test gpu gpu-installed gpu-test gpu-check gpu-bench gpu-tune check format bench clean

demo: $(VENV)/built
	$(BIN)/python -P -m fastgen demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/built
	FASTGEN_REQUIRE=cpu OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

gpu: gpu-test gpu-check gpu-bench

gpu-installed:
	FASTGEN_BUILD=none $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(GPU_PYTHON) csrc/cuda/build.py fastgen/_cuda.so

ON_GPU = FASTGEN_REQUIRE=triton,cuda FASTGEN_TEST_DEVICE=cuda $(GPU_PYTHON) -m pytest
GPU_TESTS = $(patsubst %,tests/test_%.py,gpu gpu_generation triton_paths affine_coupling actnorm nearest_code \
	vector_quantize code_statistics wavenet_layer masked_conv2d image_lstm nade gaussian_rsample_kl other_device)
# all but what fills the GPU in GPU_JOBS processes, since most of the time goes into compiling kernels
gpu-test: gpu-installed
	+$(MAKE) --jobs $(GPU_JOBS) --keep-going --output-sync $(patsubst %,gpu-shard-%,$(shell seq $(GPU_JOBS)))
	$(ON_GPU) tests/test_gpu.py tests/test_gpu_generation.py -k beyond $(ARGS)

gpu-shard-%:
	FASTGEN_TEST_SHARD=$*/$(GPU_JOBS) $(ON_GPU) $(GPU_TESTS) -k "not beyond" $(ARGS)

SANITIZED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTGEN_REQUIRE=triton,cuda FASTGEN_TEST_DEVICE=cuda compute-sanitizer \
	--error-exitcode 1
gpu-check: gpu-installed
	$(SANITIZED) $(GPU_PYTHON) -m pytest tests/test_gpu.py tests/test_gpu_generation.py -k smallest
	$(SANITIZED) --tool racecheck $(GPU_PYTHON) -m pytest tests/test_gpu_generation.py -k smallest

gpu-bench: gpu-installed
	$(GPU_PYTHON) bench/gpu.py $(if $(OUT),--out "$(OUT)") $(if $(ONLY),--only "$(ONLY)")

gpu-tune: gpu-installed
	$(GPU_PYTHON) bench/tune.py

check: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/built
	$(BIN)/python -P -m fastgen bench $(ARGS)

# torch first, then the rest without build isolation: the extension is compiled against the torch that runs it
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info fastgen/*.so
