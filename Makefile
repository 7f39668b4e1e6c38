BIN := .venv/bin
.PHONY: demo test check sweep faults libraries setup bench clean help

help:            ## what can be made
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.run  ## train on Fashion-MNIST with all defaults (sets everything up the first time)
	@tools/get_data
	@$(BIN)/miniai train

test: .venv/.dev  ## every notebook as a test, and the pytest suite
	@$(BIN)/python -m pytest

check: .venv/.dev  ## are notebooks, modules and README in step?
	@$(BIN)/python tools/nb check

bench: .venv/.dev  ## measure, and write bench/results/
	@for script in bench/*.py; do echo $$script; $(BIN)/python $$script; done

sweep: .venv/.dev  ## the tape against all of PyTorch's own test material
	@PYTHONPATH=. $(BIN)/python tests/sweep.py

faults: .venv/.dev  ## kill real training processes, 20 times each, and compare to the bit
	@PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py

libraries: .libraries/.made  ## transformers and timm on our engine, ours inside theirs, ours in ONNX
	@PYTHONPATH=. $(BIN)/python tests/libraries.py

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

clean:           ## remove the environment and what was made
	rm -rf .venv .libraries build *.egg-info .pytest_cache .ruff_cache .hypothesis .nbtext
