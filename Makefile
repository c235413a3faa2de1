# Fresh machine: `make train` or `make test` is the only command that you need.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# transformers 4.x beside the 5.x of .venv, whose other packages it sees through a .pth file
OTHER := .venv-transformers-4
OTHER_STAMP := $(OTHER)/.installed
# lm-evaluation-harness beside .venv, whose packages it sees in the same way
HARNESS := .venv-harness
HARNESS_STAMP := $(HARNESS)/.installed
# processes of `make test`
TEST_WORKERS ?= 2
# of each measurement of a whole pass by `make bench`, half of it for the small model; 5 does for a look
BENCH_SECONDS ?= 20
.DEFAULT_GOAL := help
.PHONY: help train test test-all test-slurm test-harness harness faults check docs bench clean

help:
	@echo "make train     install if needed, then raw text to a trained model on this CPU"
	@echo "make test      install if needed, then the tests (20 minutes on two cores)"
	@echo "make test-all  every test, also the slow ones, under transformers 4.x and lm-eval"
	@echo "make test-slurm  every job script on a private SLURM (as root; slurm-wlm and munge)"
	@echo "make harness   .venv-harness/bin/pretrain harness run, with lm-evaluation-harness"
	@echo "make test-harness  the tests of that"
	@echo "make faults    kills, full disks, damage, hangs only"
	@echo "make check     format, lint and types"
	@echo "make docs      the documentation as a site, in out/site"
	@echo "make bench     what this machine can measure: the loader; with a GPU, kernels and steps too (some 20 min; BENCH_SECONDS=5: half)"
	@echo "make clean     remove what make train produced (not .venv*)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(OTHER_STAMP): $(STAMP)
	$(BIN)/python -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		transformers==4.53.2 tokenizers==0.21.4 huggingface-hub==0.36.2
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(OTHER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	touch $@

# The .pth file first, so that pip adds only what .venv lacks.
$(HARNESS_STAMP): $(STAMP)
	$(BIN)/python -m venv $(HARNESS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(HARNESS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[harness]'
	touch $@

harness: $(HARNESS_STAMP)

train: $(STAMP)
	$(BIN)/pretrain data tokenizer
	$(BIN)/pretrain data build
	$(BIN)/pretrain train
	$(BIN)/pretrain evaluate run.dir=out/runs/tiny
	$(BIN)/pretrain generate run.dir=out/runs/tiny generate.prompt='def ' generate.max_new_tokens=100

# Whole files to each process, because tests of a file share what they build. A test that even its own limit
# does not end (pyproject.toml), as in native code or in a wait after it, ends its process and shows all stacks.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu' -n $(TEST_WORKERS) --dist loadfile \
		--max-worker-restart 0 -o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true

test-all: $(STAMP) $(OTHER_STAMP) $(HARNESS_STAMP)
	$(BIN)/python -m pytest

# A test that cannot run here fails.
test-slurm: $(STAMP)
	PRETRAIN_SLURM_TESTS=required $(BIN)/python -m pytest -m slurm tests/slurm \
		-o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true

# So does one here without the environment.
test-harness: $(HARNESS_STAMP)
	PRETRAIN_HARNESS_TESTS=required $(BIN)/python -m pytest tests/tasks/harness

faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# Goes on after a benchmark whose check failed, and fails at the end.
bench: $(STAMP)
	@case '$(BENCH_SECONDS)' in ''|0*|*[!0-9]*) \
		echo 'BENCH_SECONDS=$(BENCH_SECONDS) must be a whole number from 1 on.' >&2; exit 2;; esac
	status=0; \
	$(BIN)/python kernels/benchmarks/loader.py || status=1; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python kernels/benchmarks/micro.py || status=1; \
		$(BIN)/python kernels/benchmarks/step.py rows=1,2,3,4 depths=2/8,8/8,56/8,24/4 \
			seconds=$(BENCH_SECONDS) || status=1; \
		$(BIN)/python kernels/benchmarks/step.py presets=huginn-100m rows=1,2,3,4,8 \
			paths=reference,compiled,fused,fused+fp8 seconds=$$(( ($(BENCH_SECONDS) + 1) / 2 )) || status=1; \
	fi; exit $$status

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/env/*.sh slurm/*.sbatch slurm/sites/*.sh .ci/run

# Fails on a link or a section that is not there. The variable silences a notice about the theme's end (pyproject.toml).
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "out/site/index.html; with search: $(BIN)/python -m http.server --directory out/site"

clean:
	rm -rf out
