"""Checks everything that a run needs before it starts, pins the model's revision, and hashes the inputs."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.load import check_evaluation
from llm_engineering.data.reading.sources import dataset_hash
from llm_engineering.documents.general_instructions import check_replayed_instructions
from llm_engineering.documents.read import documents_hash
from llm_engineering.documents.texts import check_replay
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.requirements import check_exam, check_requirements
from llm_engineering.feedback.agreement import judged_questions
from llm_engineering.feedback.human_rows import note, take_snapshot
from llm_engineering.feedback.people import folder_of, said_about, snapshots
from llm_engineering.generation.clients.open import check_access
from llm_engineering.models.chat_template import pin_chat_template
from llm_engineering.models.revision import pin_revision
from llm_engineering.publish.signing import check_signer
from llm_engineering.recipe.data_blocks import REVIEW, DataConfig, rows_key
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import PackedConfig
from llm_engineering.recipe.stages import STAGES
from llm_engineering.training.rewards import GRADE_FIELD, own_function, reward_files
from llm_engineering.training.telemetry.tracking import check_trackers
from pipelines.inputs import Inputs
from tools.cli import PROJECT_ROOT, prepare_zenml
from tools.recipe_checks import check_machine, check_model, remembered, with_held_out_documents

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse

logger = logging.getLogger("llm_engineering.run")

# Environment variable of a scheduled job with the commit of its code. The job has the files, but not the git history.
CODE_VARIABLE = "LLM_CODE_VERSION"
# Keys of the client that change how answers are fetched, but not the answers.
_HOW_NOT_WHAT = {"concurrency", "timeout_s", "max_retries", "max_total_tokens", "max_cost_usd", "prices"}


def check_and_pin(recipe: Recipe) -> tuple[Recipe, Inputs]:
    """Check everything that a run needs; returns the recipe with the model's exact revision, and hashes of its inputs.

    Raises:
        RequestError: a file or model is missing, the format of a dataset is unknown, a folder cannot be written to,
            or this machine lacks something that the recipe needs.
    """
    settings = Settings()
    settings.check_writable()
    check_signer(settings)
    uses_unsloth = check_machine(recipe)
    check_trackers(recipe.tracking)
    # boto3, transformers and peft take seconds to import, so each function here imports them where the recipe needs them.
    if recipe.compute.sagemaker is not None:
        from llm_engineering.cloud.sagemaker.account import Account
        from llm_engineering.cloud.sagemaker.cost import cost_sentences
        from llm_engineering.cloud.sagemaker.preflight import check

        account = Account.resolve(recipe.compute.sagemaker, settings)
        check(recipe, account, settings)
        for line in cost_sentences(recipe.compute.sagemaker, account):
            logger.info("%s", line)
    if recipe.compute.skypilot is not None:
        from llm_engineering.cloud.skypilot import check_skypilot

        check_skypilot(recipe.compute.skypilot)
    recipe = with_held_out_documents(recipe)
    data = recipe.data
    documents = documents_hash(recipe.documents) if recipe.reads_documents else None
    kinds = ("instruction", "preference", "labelled", "prompt")
    own: dict[str, Any] = {
        rows_key(kind): _datasets([data.file(kind), data.test_file(kind)], kind, data) for kind in kinds
    }
    all_said = {kind: said_about(recipe, kind, settings) for kind in recipe.kinds(recipe.chain[-1])}
    people = {kind: said for kind, said in all_said.items() if said is not None}
    judged = judged_questions(folder_of(REVIEW, recipe.name, settings))
    rewards = check_rewards(recipe)
    replay = None
    if data.replay is not None:
        check_replay(data.replay)
        replay = dataset_hash(data.replay.path)
    replay_instructions = check_replayed_instructions(data.replay_instructions)
    check_evaluation(data.decontaminate_against)
    evaluation = "-".join(map(dataset_hash, data.decontaminate_against)) or None
    _check_client(recipe)
    checks = check_requirements(recipe.evaluation, settings)
    exam = check_exam(recipe)
    model = pin_revision(recipe.model)
    recipe = recipe.model_copy(
        update={"model": model, "formatting": pin_chat_template(recipe.formatting, model, settings)}
    )
    _check_tokenizer(recipe)
    check_model(recipe)
    reward_models = find_reward_models(recipe)
    for stage in recipe.chain:
        config = recipe.block(stage)
        if uses_unsloth and isinstance(config, PackedConfig) and config.packing:
            from llm_engineering.models.base_model import load_config
            from llm_engineering.training.unsloth_policy import check_packable

            check_packable(load_config(recipe.model, settings).model_type, stage)
    unused = [stage for stage in STAGES if getattr(recipe, stage) is not None and stage not in recipe.chain]
    if unused:
        logger.info("Not used, because chain is %s: %s", ", ".join(recipe.chain), ", ".join(unused))
    shared = {
        "inputs": [documents if recipe.learns_from_documents else None, own["instructions"], evaluation],
        "client": recipe.generation.part(ClientConfig).model_dump(mode="json", exclude=_HOW_NOT_WHAT),
        "writing": recipe.generation.part(InstructionWriting).model_dump(mode="json"),
        **recipe.model_dump(mode="json", include={"model", "seed", "formatting"}),
        "documents": recipe.documents.model_dump() if recipe.learns_from_documents else None,
        # The weight of people's rows decides only where they are.
        "data": recipe.data.checks.model_dump(exclude={"human_weight"}),
        **({"people": [people["instruction"].hash, data.human_weight]} if "instruction" in people else {}),
    }
    return recipe, Inputs(
        documents=documents,
        **own,
        judged=note(judged, snapshots(settings)) if judged else None,
        people={kind: take_snapshot(said, snapshots(settings)) for kind, said in people.items()},
        replay=replay,
        replay_instructions=replay_instructions,
        evaluation=evaluation,
        checks=checks,
        rewards=rewards,
        exam=exam,
        recipes=_stage_hashes(
            recipe,
            shared,
            {
                **own,
                "people": {kind: [said.hash, data.human_weight] for kind, said in people.items()},
                "rewards": rewards,
                "reward_models": {stage: found.content_hash for stage, found in reward_models.items()},
                "replay": replay,
                "replay_instructions": replay_instructions,
                "exam": exam,
            },
        ),
        code=code_version(),
        reward_models={stage: str(found.id) for stage, found in reward_models.items()},
    )


def check_rewards(recipe: Recipe) -> dict[str, str]:
    """Load the rewards of the user's own, and ask each judge; returns the hash of each file with a reward by its path.

    Raises:
        RequestError: a file or a function is missing, or a judge cannot be reached.
    """
    hashes: dict[str, str] = {}
    for stage in recipe.chain:
        block = recipe.block(stage)
        if not isinstance(block, RewardedConfig):
            continue
        for reward in block.rewards:
            if reward.own_function is not None:
                own_function(reward)
            if reward.judge is not None:
                try:
                    check_access(reward.judge, Settings(), reward.judge.max_new_tokens, GRADE_FIELD)
                except RequestError as error:
                    raise RequestError(
                        f"{stage}.rewards, judge (read generation.* as its block judge): {error}"
                    ) from error
        hashes |= reward_files(block)
    return hashes


def find_reward_models(recipe: Recipe) -> dict[str, ArtifactVersionResponse]:
    """Find the reward models that the recipe names by their version; returns their artifacts by the stage, or `evaluation`.

    Raises:
        RequestError: a version does not exist, has no reward model, or has one of another base model or with other tokens.
    """
    named = {"evaluation": recipe.evaluation.reward_model}
    for stage in recipe.chain:
        block = recipe.block(stage)
        if isinstance(block, RewardedConfig) and block.reward_model is not None:
            named[stage] = block.reward_model.version
    found: dict[str, ArtifactVersionResponse] = {}
    for user, version in named.items():
        if version is None:
            continue
        prepare_zenml()
        from llm_engineering.models.reward_model import check_base, check_tokens
        from llm_engineering.models.tokenizer import load_tokenizer
        from tools.model_versions.versions import reward_model_artifact

        try:
            found[user] = reward_model_artifact(recipe.name, version)
            folder = found[user].load().path
            check_base(recipe.model, folder)
            tokenizer = load_tokenizer(recipe.model, Settings(), recipe.formatting.chat_template)
            check_tokens(folder, tokenizer, Settings(), recipe.model.trust_remote_code)
        except RequestError as error:
            key = "evaluation.reward_model" if user == "evaluation" else f"{user}.rewards, reward_model"
            raise RequestError(f"{key}, version {version}: {error}") from error
    return found


def _stage_hashes(recipe: Recipe, shared: dict[str, Any], own: dict[str, Any]) -> dict[str, str]:
    """For each stage, the hash of everything that decides its result, with all stages before it.

    Args:
        shared: what decides the result of every stage.
        own: hashes of the files that only the stages of one kind of rows read.
    """
    hashes: dict[str, str] = {}
    decided = dict(shared)
    for stage in recipe.chain:
        decided[stage] = recipe.block(stage).model_dump(mode="json")
        rows = STAGES[stage].rows
        from_pairs = recipe.data.made_of(rows) == "preference"
        if rows == "labelled" and not from_pairs:
            decided["labelled"] = own["labelled"]
        if from_pairs:
            decided["preferences"] = own["preferences"]
        for kind in {rows, recipe.data.made_of(rows)} & own["people"].keys() - {"instruction"}:
            decided[f"people_{kind}"] = own["people"][kind]
        if rows == "prompt":
            decided["prompts"], decided["rewards"] = own["prompts"], own["rewards"]
        if stage in own["reward_models"]:
            decided[f"{stage}_reward_model"] = own["reward_models"][stage]
        # Pairs and prompts are made of the instructions that are left after duplicates, also those of general rows, are dropped.
        made = "preferences" if from_pairs else "prompts" if rows == "prompt" else None
        if rows == "instruction" or (made is not None and not own[made]):
            decided["replay_instructions"] = own["replay_instructions"]
        # Its questions are left out of training.
        if recipe.exam is not None and not recipe.exam.is_generated:
            decided["exam"] = own["exam"]
        elif rows != "text" and recipe.exam is not None:
            decided["exam"] = recipe.exam.model_dump(include={"questions", "max_new_tokens"})
        if rows == "text" and recipe.deriving is not None:
            deriving = recipe.deriving
            decided["rewritings"] = [deriving.writing.model_dump(mode="json"), deriving.tokens, deriving.epochs]
            decided["replay_instructions"] = own["replay_instructions"]
        if rows == "text":
            decided["replay"] = [own["replay"], recipe.data.replay.model_dump() if recipe.data.replay else None]
        hashes[stage] = recipe_hash(decided)
    return hashes


def _check_tokenizer(recipe: Recipe) -> None:
    """Check the chat template, the end token and the new tokens.

    The embedded model's own template is known to be correct. It is not checked, so that the model is unpacked only
    when a step needs it.
    """
    is_known = recipe.model.name_or_path == EMBEDDED_MODEL and not recipe.model.added_tokens
    if not is_known or recipe.formatting.chat_template is not None:
        # The revision of a folder is a hash of its files.
        asked = ["tokenizer", recipe.model.model_dump(mode="json"), recipe.formatting.chat_template]
        for note in remembered(recipe.model, asked, lambda: _notes_on_tokenizer(recipe)):
            logger.warning("%s", note)


def _notes_on_tokenizer(recipe: Recipe) -> list[str]:
    from llm_engineering.formatting.template_check import check_chat_template
    from llm_engineering.models.base_model import load_config
    from llm_engineering.models.tokenizer import check_rows, load_tokenizer

    tokenizer = load_tokenizer(recipe.model, Settings(), recipe.formatting.chat_template)
    rows = load_config(recipe.model, Settings()).get_text_config().vocab_size
    check_rows(tokenizer, rows, recipe.model.added_tokens)
    return check_chat_template(tokenizer)


def _check_client(recipe: Recipe) -> None:
    """Send the endpoint one small request, if the recipe uses one to write questions, answers or rejected answers."""
    writing = recipe.generation
    if recipe.data.file("instruction") is None:
        check_access(writing.part(ClientConfig), Settings(), writing.question_max_new_tokens, "instruction")
    elif writing.rewritings:
        check_access(writing.part(ClientConfig), Settings(), writing.rewriting_max_new_tokens, "text")
    elif recipe.data.file("preference") is None and writing.rejected_by == "client":
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
