"""Plans and checks a run before it starts: its steps, its memory and time, and everything that it reads.

`preflight` checks everything that can be checked before costly work, pins the model's revision and hashes the inputs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.preflight import check
from llm_engineering.data.formats import dataset_hash, open_dataset
from llm_engineering.data.load import check_evaluation
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import documents_hash, read_documents
from llm_engineering.documents.replay import check_replayed_instructions
from llm_engineering.documents.texts import check_replay
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.requirements import check_exam, check_requirements
from llm_engineering.formatting.template_check import check_chat_template
from llm_engineering.generation.open import check_access
from llm_engineering.models.base_model import check_generation_config, load_config, pin_revision
from llm_engineering.models.device import Device, check_processes, check_training, choose_backend, choose_device
from llm_engineering.models.fit import check_fit
from llm_engineering.models.tokenizer import check_rows, load_tokenizer, pin_chat_template
from llm_engineering.recipe.data_blocks import DataConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import FIRST_OF_KIND, STAGES
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, DPOConfig, PackedConfig, TrainConfig
from llm_engineering.training.cpt import check_trained_embeddings
from llm_engineering.training.estimate import (
    UTILISATION,
    Memory,
    Shapes,
    batch_shape,
    flops_per_token,
    free_memory,
    matmul_rate,
    peak_memory,
    remedy,
    shapes,
)
from llm_engineering.training.tracking import check_trackers
from llm_engineering.training.unsloth_policy import check_packable
from pipelines.inputs import Inputs
from tools.cli import PROJECT_ROOT
from tools.expected_rows import CHARACTERS_PER_TOKEN, TEXT_OF_KIND, data_lines

logger = logging.getLogger("llm_engineering.run")

# Environment variable of a scheduled job with the commit of its code. The job has the files, but not the git history.
CODE_VARIABLE = "LLM_CODE_VERSION"
# Keys of the client that change how answers are fetched, but not the answers.
_HOW_NOT_WHAT = {"concurrency", "timeout_s", "max_retries", "max_total_tokens", "max_cost_usd", "prices"}
# Tokens that a chat template adds around a question and an answer.
TEMPLATE_TOKENS = 30
# File formats in which the number of bytes is about the number of characters: they are not compressed.
_PLAIN = (".json", ".jsonl", ".csv")
GIB = 2**30


def stages_of(pipeline: str, recipe: Recipe) -> list[str]:
    """The stages that a pipeline trains, in order.

    Raises:
        RequestError: the pipeline is a stage that is not in the recipe's chain.
    """
    if pipeline == "datasets":
        return []
    chain: list[str] = recipe.chain
    if pipeline == "retrain":
        return chain
    if pipeline not in chain:
        raise RequestError(
            f"The recipe's chain is {', '.join(chain)}, without the stage {pipeline}. Add it to chain, or run one of "
            "these stages."
        )
    return recipe.trained_with(pipeline)


def planned_steps(pipeline: str, recipe: Recipe) -> list[str]:
    """The steps of a pipeline with this recipe. ZenML may run those that do not depend on each other in another order."""
    trained = stages_of(pipeline, recipe)
    last = trained[-1] if trained else recipe.chain[-1]
    made: list[str] = []
    for kind in recipe.kinds(last):
        made += [step for step in _dataset_steps(kind, recipe) if step not in made]
    if not trained:
        return made
    kinds: set[str] = set()
    for stage in recipe.chain_to(last):
        if stage in trained or STAGES[stage].rows not in kinds:
            made.append(f"format_{stage}")
        made += [f"train_{stage}"] if stage in trained else []
        kinds.add(STAGES[stage].rows)
    made += [f"format_{FIRST_OF_KIND[kind]}" for kind in recipe.kinds(last) if kind not in kinds]
    made += ["read_documents"] if recipe.reads_documents and "read_documents" not in made else []
    # A run that needs no instructions still takes the exam.
    made += [step for step in ("generate_instructions", "write_exam") if _writes_exam(recipe) and step not in made]
    return [*made, f"evaluate_{last}", "promote"]


def _dataset_steps(kind: str, recipe: Recipe) -> list[str]:
    """The steps that make the dataset of a kind."""
    own = {"instruction": recipe.data.instructions, "preference": recipe.data.preferences}.get(kind)
    reading = ["read_documents"] if kind == "text" or recipe.data.instructions is None else []
    make = "collect_texts" if kind == "text" else f"generate_{kind}s"
    exam = ["write_exam"] if kind == "instruction" and _writes_exam(recipe) else []
    if kind == "text" and recipe.derives_from_questions:
        reading = list(dict.fromkeys([*reading, *_dataset_steps("instruction", recipe)]))
    return [*([f"load_{kind}s"] if own is not None else [*reading, make]), *exam, f"prepare_{kind}s"]


def _writes_exam(recipe: Recipe) -> bool:
    return recipe.exam is not None and recipe.exam.is_generated


def print_plan(pipeline: str, recipe: Recipe) -> None:
    """Print the resolved recipe as YAML, the steps, the rows to expect, and an estimate of training's memory and time."""
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    print(f"\nWould run {pipeline}: {' → '.join(planned_steps(pipeline, recipe))}")
    trained = stages_of(pipeline, recipe)
    before = [stage for stage in recipe.chain_to(trained[-1]) if stage not in trained] if trained else []
    if before:
        print(f"If no {before[-1]} model of this recipe is registered, the pipeline {before[-1]} runs first.")
    try:
        check_model(recipe)
    except (OSError, ValueError) as error:
        print(f"Not checked against the model: its configuration cannot be read ({_first(error)}).")
    rows = data_lines(recipe, trained[-1] if trained else recipe.chain[-1])
    if rows:
        print("\n" + "\n".join(rows))
    print("\n" + "\n".join(estimate_lines(recipe, trained)))


def preflight(recipe: Recipe) -> tuple[Recipe, Inputs]:
    """Check everything that a run needs; returns the recipe with the model's exact revision, and hashes of its inputs.

    Raises:
        RequestError: a file or model is missing, the format of a dataset is unknown, a folder cannot be written to,
            or this machine lacks something that the recipe needs.
    """
    Settings().check_writable()
    uses_unsloth = _check_machine(recipe)
    check_trackers(recipe.tracking)
    if recipe.compute.sagemaker is not None:
        check(recipe, Account.resolve(recipe.compute.sagemaker, Settings()), Settings())
    data = recipe.data
    documents = documents_hash(recipe.documents) if recipe.reads_documents else None
    instructions = _datasets([data.instructions, data.test_instructions], "instruction", data)
    preferences = _datasets([data.preferences, data.test_preferences], "preference", data)
    replay = None
    if data.replay is not None:
        check_replay(data.replay)
        replay = dataset_hash(data.replay.path)
    replay_instructions = check_replayed_instructions(data.replay_instructions)
    check_evaluation(data.decontaminate_against)
    evaluation = "-".join(map(dataset_hash, data.decontaminate_against)) or None
    _check_client(recipe)
    checks = check_requirements(recipe.evaluation, Settings())
    exam = check_exam(recipe)
    model = pin_revision(recipe.model)
    recipe = recipe.model_copy(
        update={"model": model, "formatting": pin_chat_template(recipe.formatting, model, Settings())}
    )
    _check_tokenizer(recipe)
    check_model(recipe)
    for stage in recipe.chain:
        config = recipe.block(stage)
        if uses_unsloth and isinstance(config, PackedConfig) and config.packing:
            check_packable(load_config(recipe.model, Settings()).model_type, stage)
    unused = [stage for stage in STAGES if getattr(recipe, stage) is not None and stage not in recipe.chain]
    if unused:
        logger.info("Not used, because chain is %s: %s", ", ".join(recipe.chain), ", ".join(unused))
    shared = {
        "inputs": [documents if recipe.learns_from_documents else None, instructions, evaluation],
        "client": recipe.generation.part(ClientConfig).model_dump(mode="json", exclude=_HOW_NOT_WHAT),
        "writing": recipe.generation.part(InstructionWriting).model_dump(mode="json"),
        **recipe.model_dump(mode="json", include={"model", "seed", "formatting"}),
        "documents": recipe.documents.model_dump() if recipe.learns_from_documents else None,
        "data": recipe.data.checks.model_dump(),
    }
    return recipe, Inputs(
        documents=documents,
        instructions=instructions,
        preferences=preferences,
        replay=replay,
        replay_instructions=replay_instructions,
        evaluation=evaluation,
        checks=checks,
        exam=exam,
        recipes=_stage_hashes(
            recipe,
            shared,
            {"preferences": preferences, "replay": replay, "replay_instructions": replay_instructions},
        ),
        code=code_version(),
    )


def _stage_hashes(recipe: Recipe, shared: dict[str, Any], own: dict[str, str | None]) -> dict[str, str]:
    """For each stage, the hash of everything that decides its result, with all stages before it.

    Args:
        shared: what decides the result of every stage.
        own: hashes of the files that only the stages of one kind of rows read.
    """
    hashes: dict[str, str] = {}
    decided = dict(shared)
    for stage in recipe.chain:
        decided[stage] = recipe.block(stage).model_dump(mode="json")
        if STAGES[stage].rows == "preference":
            decided["preferences"] = own["preferences"]
        # Pairs are written for the instructions that are left after duplicates, also those of general rows, are dropped.
        if STAGES[stage].rows == "instruction" or (STAGES[stage].rows == "preference" and not own["preferences"]):
            decided["replay_instructions"] = own["replay_instructions"]
        # Its questions are left out of training.
        if STAGES[stage].rows != "text" and recipe.exam is not None and recipe.exam.is_generated:
            decided["exam"] = recipe.exam.model_dump(include={"questions", "max_new_tokens"})
        if STAGES[stage].rows == "text" and recipe.deriving is not None:
            deriving = recipe.deriving
            decided["rewritings"] = [deriving.writing.model_dump(mode="json"), deriving.tokens, deriving.epochs]
            decided["replay_instructions"] = own["replay_instructions"]
        if STAGES[stage].rows == "text":
            decided["replay"] = [own["replay"], recipe.data.replay.model_dump() if recipe.data.replay else None]
        hashes[stage] = recipe_hash(decided)
    return hashes


def _check_machine(recipe: Recipe) -> bool:
    """Check the device, the processes and the method of training; returns whether unsloth will be the backend.

    For SageMaker this is True only if the recipe says `backend: unsloth`. With `backend: auto` the job decides, because
    only the job can inspect its machine.
    """
    compute = recipe.compute
    if compute.target == "sagemaker":
        choose_device(compute.one_process)
        return compute.backend == "unsloth"
    device = choose_device(compute)
    check_processes(compute, device)
    return _checked(recipe, device).backend == "unsloth"


def _checked(recipe: Recipe, device: Device) -> Device:
    """Check the method and the optimisers, and choose the backend."""
    for stage in recipe.chain:
        check_training(stage, recipe.method, recipe.block(stage).optim, device)
    keys, new = recipe.lora.beyond_unsloth, recipe.model.added_tokens
    return choose_backend(device, recipe.compute, recipe.method, adapter_keys=keys, new_tokens=new)


def _check_tokenizer(recipe: Recipe) -> None:
    """Check the chat template, the end token and the new tokens.

    The embedded model's own template is known to be correct. It is not checked, so that the model is unpacked only
    when a step needs it.
    """
    is_known = recipe.model.name_or_path == EMBEDDED_MODEL and not recipe.model.added_tokens
    if not is_known or recipe.formatting.chat_template is not None:
        tokenizer = load_tokenizer(recipe.model, Settings(), recipe.formatting.chat_template)
        rows = load_config(recipe.model, Settings()).get_text_config().vocab_size
        check_rows(tokenizer, rows, recipe.model.added_tokens)
        for note in check_chat_template(tokenizer):
            logger.warning("%s", note)


def check_model(recipe: Recipe) -> None:
    """Check the recipe against the model's configuration, without its weights.

    Raises:
        RequestError: the model cannot be trained as the recipe says.
    """
    if recipe.model.name_or_path != EMBEDDED_MODEL:
        check_generation_config(recipe.model, Settings())
    trained = check_fit(recipe, load_config(recipe.model, Settings()))
    if recipe.cpt is not None and "cpt" in recipe.chain and recipe.cpt.embedding_learning_rate is not None:
        check_trained_embeddings(trained)


def _check_client(recipe: Recipe) -> None:
    """Send the endpoint one small request, if the recipe uses one to write questions, answers or rejected answers."""
    writing = recipe.generation
    if recipe.data.instructions is None:
        check_access(writing.part(ClientConfig), Settings(), writing.question_max_new_tokens, "instruction")
    elif writing.rewritings:
        check_access(writing.part(ClientConfig), Settings(), writing.rewriting_max_new_tokens, "text")
    elif recipe.data.preferences is None and writing.rejected_by == "client":
        check_access(writing.part(ClientConfig), Settings(), writing.rejected_max_new_tokens, None)


def code_version() -> str:
    """The commit of this project, with `+changes` if files differ from it; CODE_VARIABLE, if set, takes precedence."""
    if os.environ.get(CODE_VARIABLE):
        return os.environ[CODE_VARIABLE]
    git = ["git", "-C", str(PROJECT_ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {importlib.metadata.version('llm-engineering')}, not a git checkout"
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _datasets(references: Sequence[str | None], kind: str, config: DataConfig) -> str | None:
    """Open the datasets, so that an unreadable one is refused now; returns their hash, or None without datasets."""
    named = [reference for reference in references if reference is not None]
    for reference in named:
        open_dataset(reference, kind, config)
    return "-".join(map(dataset_hash, named)) or None


def estimate_lines(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """An estimate of training's memory and time, as lines of text. Only the model's configuration is downloaded."""
    if not stages:
        return []
    lines: list[str] = []
    try:
        device = _other_device(recipe) if recipe.compute.sagemaker else _device(recipe)
    except RequestError as error:
        lines.append(f"This machine cannot train this recipe: {error}")
        device = _other_device(recipe)
    try:
        found = {stage: _shapes(recipe, stage, device) for stage in stages}
    except (OSError, ValueError) as error:
        reason = f"the configuration of {recipe.model.name_or_path} cannot be read ({_first(error)})"
        return [*lines, f"No estimate: {reason}."]
    here = not lines and recipe.compute.sagemaker is None
    where = "On this machine" if here else "On another machine"
    if recipe.compute.sagemaker is not None:
        where = f"On {recipe.compute.sagemaker.instance_type}"
    lines.append(f"{where} ({device.name}, {str(device.dtype).removeprefix('torch.')}, {device.backend}):")
    rate = matmul_rate(device) if here else 0.0
    for stage in stages:
        config = recipe.block(stage)
        memory = _memory(recipe, config, found[stage], device)
        free = f"; {free_memory(device) / GIB:.1f} GiB are free" if here else ""
        lines.append(f"{stage}: about {memory} at its peak, with rows of max_length{free}")
        if here:
            warning = _warning(recipe, stage, config, memory, device)
            lines += [f"WARNING: {warning}"] if warning else []
            lines.append(f"{stage}: {_time(recipe, stage, config, found[stage], rate, device)}")
    if recipe.compute.backend == "unsloth" or device.backend == "unsloth":
        lines.append("This estimate is for transformers. unsloth should need less memory and time.")
    return lines


def warn_of_memory(recipe: Recipe, stages: Sequence[str]) -> None:
    """Log a warning for each stage that may need more memory than is free. SageMaker jobs are not checked.

    Raises:
        RequestError: this machine cannot train the recipe.
    """
    if recipe.compute.target == "sagemaker":
        return
    device = _device(recipe)
    for stage in stages:
        config = recipe.block(stage)
        try:
            found = _shapes(recipe, stage, device)
        except (OSError, ValueError) as error:
            logger.warning("The memory that %s needs cannot be estimated: %s", stage, _first(error))
            continue
        warning = _warning(recipe, stage, config, _memory(recipe, config, found, device), device)
        if warning:
            logger.warning("%s", warning)


def tokens_of(recipe: Recipe, stage: str) -> tuple[float, str] | None:
    """The maximum number of tokens of an epoch, and its source; None if it is unknown before the data is prepared."""
    kind = STAGES[stage].rows
    split = recipe.data.split
    share = 1 - split.validation_fraction - split.test_fraction
    if kind == "text":
        texts, _ = read_documents(recipe.documents)
        by_sentence = recipe.documents.unit == "sentence"
        parts = cut_passages(texts, recipe.documents, recipe.seed)[0] if by_sentence else texts
        tokens = share * sum(len(part.text) for part in parts) / CHARACTERS_PER_TOKEN
        tokens *= 1 + sum(TEXT_OF_KIND[kind] for kind in recipe.generation.rewritings)
        if recipe.knowledge is not None:
            tokens = min(tokens, recipe.knowledge.tokens / recipe.block(stage).num_train_epochs)
        replayed = recipe.data.replay.share if recipe.data.replay is not None else 0.0
        beside = ["the rewritings"] if recipe.generation.rewritings else []
        beside += ["the replay"] if replayed else []
        return tokens / (1 - replayed), " and ".join(
            [f"the size of {len(parts)} {'sentences' if by_sentence else 'documents'}", *beside]
        )
    own = recipe.data.instructions if kind == "instruction" else recipe.data.preferences
    if own is not None:
        return _own_tokens(own, share)
    if recipe.data.instructions is not None:
        return None
    writing = recipe.generation
    documents, _ = read_documents(recipe.documents)
    passages, _ = cut_passages(documents, recipe.documents, recipe.seed)
    answers = [len(passage.text) / CHARACTERS_PER_TOKEN for passage in passages]
    if writing.answers == "model" and writing.answer_max_new_tokens is not None:
        answers = [float(writing.answer_max_new_tokens)] * len(passages)
    prompt = writing.question_max_new_tokens + TEMPLATE_TOKENS
    if kind == "preference":
        answers = [
            2 * prompt + answer + writing.rejected_max_new_tokens for answer in answers[: writing.max_preferences]
        ]
    else:
        answers = [min(prompt + answer, recipe.formatting.max_length) for answer in answers]
    return share * sum(answers), f"one row for each of {len(answers)} passages, before the rules of the data"


def _own_tokens(reference: str, share: float) -> tuple[float, str] | None:
    path = Path(reference).expanduser()
    if not path.is_file() or path.suffix not in _PLAIN:
        return None
    return share * path.stat().st_size / CHARACTERS_PER_TOKEN, f"the size of {path.name}"


def _device(recipe: Recipe) -> Device:
    return _checked(recipe, choose_device(recipe.compute))


def _other_device(recipe: Recipe) -> Device:
    """A device of another machine, for the estimate: a CUDA card, or a CPU if `compute.device` is cpu."""
    dtype = torch.bfloat16 if recipe.compute.dtype == "auto" else getattr(torch, recipe.compute.dtype)
    return Device("cpu" if recipe.compute.device == "cpu" else "cuda", dtype, "sdpa", [])


def _shapes(recipe: Recipe, stage: str, device: Device) -> Shapes:
    rows, length = batch_shape(recipe.block(stage), recipe.formatting.max_length)
    model = load_config(recipe.model, Settings())
    return shapes(model, recipe.method, recipe.lora, device, rows, length, recipe.model.trust_remote_code)


def _memory(recipe: Recipe, config: TrainConfig, found: Shapes, device: Device) -> Memory:
    rows, length = batch_shape(config, recipe.formatting.max_length)
    return peak_memory(found, config, device, recipe.method, rows, length)


def _warning(recipe: Recipe, stage: str, config: TrainConfig, memory: Memory, device: Device) -> str:
    free = free_memory(device)
    if memory.total <= free:
        return ""
    where = "the card" if device.name == "cuda" else "this machine"
    return (
        f"{stage} may need {memory.total / GIB:.1f} GiB of memory, and {where} has {free / GIB:.1f} GiB free. "
        f"If memory runs out: {remedy(config, stage, recipe.method)}."
    )


def _time(recipe: Recipe, stage: str, config: TrainConfig, found: Shapes, rate: float, device: Device) -> str:
    known = tokens_of(recipe, stage)
    length = recipe.formatting.max_length
    flops = flops_per_token(found, config, recipe.method, length)
    speed = rate * UTILISATION[device.name] / flops
    how = (
        f"{speed:,.0f} tokens a second, from {flops / 1e9:.2f} GFLOP a token and {UTILISATION[device.name]:.0%} of the "
        f"{rate / 1e9:,.0f} GFLOP a second that matrix products reach here"
    )
    if known is None:
        return f"about {how}; the number of tokens is known only after the data is formatted"
    epoch, source = known
    tokens = epoch * config.num_train_epochs
    if config.max_steps > 0:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        tokens = min(tokens, config.max_steps * batch * length * (2 if isinstance(config, DPOConfig) else 1))
    return f"about {_duration(tokens / speed)} for at most {tokens:,.0f} tokens ({source}): {how}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
