BIN := .venv/bin
.PHONY: demo test check sweep faults hosts libraries trackers setup bench bench-quick clean help

help:            ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.run  ## train on Fashion-MNIST with all defaults (sets everything up the first time)
	@tools/get_data
	@$(BIN)/miniai train --recipe fashion-fast

test: .venv/.dev  ## every notebook as a test, and the pytest suite: a process a core, each computing on one thread
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: .venv/.dev  ## are notebooks, modules and README in step?
	@$(BIN)/python tools/nb check

bench: .venv/.dev  ## measure, and write bench/results/
	@for script in bench/*.py; do test $$script = bench/report.py || { echo $$script; $(BIN)/python $$script; }; done

bench-quick: .venv/.dev  ## each benchmark at toy size, in a few minutes: does it run, and what would it say? Into .bench/
	@for script in bench/*.py; do test $$script = bench/report.py || { echo $$script; \
		MINIAI_BENCH_RESULTS=.bench MINIAI_BENCH_ANYWAY=1 $(BIN)/python $$script --small || exit 1; }; done

sweep: .venv/.dev  ## the tape against all of PyTorch's own test material
	@PYTHONPATH=. $(BIN)/python tests/sweep.py

faults: .venv/.dev  ## kill real training processes, 20 times each, and compare to the bit
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py

hosts: .venv/.dev  ## three hosts made of this machine train together, and the cable of one is pulled
	@PYTHONPATH=. $(BIN)/python tests/hosts.py

libraries: .libraries/.made  ## transformers and timm on our engine, ours inside theirs, ours in ONNX
	@PYTHONPATH=. $(BIN)/python tests/libraries.py

trackers: .trackers/.made  ## TensorBoard, trackio, Weights & Biases and torchmetrics themselves, in runs that stop and go on
	@PYTHONPATH=.:.trackers $(BIN)/python -m pytest -q tests/test_loggers.py

setup: .venv/.dev  ## the development environment, nothing else

.venv/.run: pyproject.toml constraints.txt tools/setup
	@tools/setup run
	@touch $@

.venv/.dev: pyproject.toml constraints.txt tools/setup
	@tools/setup dev
	@touch .venv/.run $@

# only what .venv has not; without dependencies, so that nothing brings another PyTorch along
LIBRARIES := transformers tokenizers regex timm onnx onnx-ir onnxscript onnxruntime ml-dtypes protobuf flatbuffers

.libraries/.made: constraints.txt | .venv/.dev
	@rm -rf .libraries
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .libraries --constraint constraints.txt $(LIBRARIES)
	@touch $@

TRACKERS := tensorboard absl-py grpcio markdown tensorboard-data-server werkzeug protobuf \
	trackio brotli gradio-client httpx httpcore orjson python-multipart starlette uvicorn \
	wandb pydantic pydantic-core annotated-types typing-inspection requests urllib3 charset-normalizer certifi googleapis-common-protos \
	opentelemetry-api opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions \
	opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-otlp-proto-common \
	torchmetrics lightning-utilities

.trackers/.made: constraints.txt | .venv/.dev
	@rm -rf .trackers
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .trackers --constraint constraints.txt $(TRACKERS)
	@touch $@

clean:           ## remove the environment and what was made
	rm -rf .venv .libraries .trackers .bench build *.egg-info .pytest_cache .ruff_cache .hypothesis .nbtext
