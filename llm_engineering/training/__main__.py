"""Train one stage without ZenML, for example in a container:

    python -m llm_engineering.training sft --recipe recipe.yaml --data formatted/ --output out/
    python -m llm_engineering.training dpo --recipe recipe.yaml --data formatted/ --output out/ --adapter sft_adapter/

`--data` is a DatasetDict on disk, as the formatting step writes it. Writes `out/adapter` and `out/report`.
The command starts as many processes as the recipe's `compute.num_processes`. torchrun or accelerate can start them too:

    torchrun --nproc-per-node 2 -m llm_engineering.training sft --set compute.num_processes=2 --recipe …
    accelerate launch --num_processes 2 -m llm_engineering.training sft --set compute.num_processes=2 --recipe …

The pipelines start the command with `--job FILE`: the file describes the whole run, and the command writes the result
beside it. On a machine whose other files are lost, add `--output DIR`: the command then copies the adapter, the report
and the trackers' archives to DIR, and prints an error instead of writing it to a file.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetDict, load_from_disk

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import Method, ModelConfig
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from llm_engineering.training.processes.job import RESULT_FILE, Job, Result, read_job, write_failure
from llm_engineering.training.trainer.checkpoints import remove_finished

# Nothing at the top of this module imports transformers, because unsloth must be imported before it.
if TYPE_CHECKING:
    from llm_engineering.training.processes.job import TrainingResult


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    if sys.platform == "win32":
        sys.exit(
            "Error: training does not run on Windows itself. Run it in WSL (wsl --install), where it runs as on Linux."
        )

    # Parse the command line
    parser = argparse.ArgumentParser(prog="python -m llm_engineering.training", description="Train one stage.")
    parser.add_argument("stage", choices=tuple(STAGES), nargs="?")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--adapter", type=Path, help="the adapter, or full model, of the stage before this one")
    parser.add_argument("--reward-model", type=Path, help="the reward model of the reward `reward_model`")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume-from", type=Path, metavar="DIR", help="a checkpoint of the same run to resume from")
    parser.add_argument("--job", type=Path, metavar="FILE", help="a file that describes the run, instead of a recipe")
    arguments = parser.parse_args()
    missing = [name for name in ("stage", "recipe", "data", "output") if getattr(arguments, name) is None]
    if arguments.job is None and missing:
        parser.error(f"missing: {', '.join(missing)}")

    # Set up the log: the main process alone shows progress
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        # Libraries read this variable when they are imported.
        os.environ["TQDM_DISABLE"] = "1"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")

    # Train. Without --output, the process that started a job reports its errors.
    reports_errors = arguments.job is None or arguments.output is not None
    try:
        if arguments.job is not None:
            _train_job(arguments.job, arguments.output)
        else:
            _train_recipe(arguments)
    except (RequestError, WorkError) as error:
        if reports_errors:
            print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main and reports_errors:
            print("Interrupted. A checkpoint is saved: the same command resumes from it.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _train_recipe(arguments: argparse.Namespace) -> None:
    """Train a stage of a recipe. Starts the processes, unless torchrun or accelerate has started them."""
    # Load the recipe
    recipe = load_recipe(arguments.recipe, arguments.set)
    stage = arguments.stage
    if stage not in recipe.chain:
        raise RequestError(
            f"The recipe's chain is {', '.join(recipe.chain)}, without {stage}. Add it, or name another stage."
        )
    config = recipe.block(stage)
    before = [name for name in recipe.chain_to(stage)[:-1] if STAGES[name].policy]
    if before and not (arguments.adapter and any(arguments.adapter.glob("*.safetensors"))):
        raise RequestError(f"{stage} starts from the model of {before[-1]}. Name its folder with --adapter.")

    scores = isinstance(config, RewardedConfig) and config.reward_model is not None
    if scores != (arguments.reward_model is not None):
        raise RequestError(
            f"{stage}.rewards names reward_model: name the folder of this model with --reward-model."
            if scores
            else f"--reward-model has no effect, because {stage} has no reward reward_model. Leave it out."
        )

    # Import the backend, before transformers
    is_launched = "WORLD_SIZE" in os.environ
    if is_launched and config.trains_with_unsloth:
        _import_backend(recipe.compute, recipe.method, config.model_dump(), recipe.model, arguments.adapter)
    from llm_engineering.models.chat_template import pin_chat_template
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.reward_model import check_base
    from llm_engineering.training.processes import ranks
    from llm_engineering.training.processes.launch import launch_training

    # Pin the model and the chat template
    model = pin_revision(recipe.model)
    recipe = recipe.model_copy(
        update={"model": model, "formatting": pin_chat_template(recipe.formatting, model, Settings())}
    )
    settings = Settings()
    settings.check_writable()
    if arguments.reward_model is not None:
        check_base(model, arguments.reward_model)

    # Train
    job = Job(
        stage=stage,
        config=config.model_dump(),
        setup=recipe.setup,
        data=arguments.data,
        start=arguments.adapter,
        resume_from=arguments.resume_from,
        reward_model=arguments.reward_model,
    )
    if is_launched:
        result = _train(job)
    else:
        result = launch_training(STAGES[stage].train_function(), job, _load_data(arguments.data), settings)

    # Copy the adapter and the report
    if ranks.is_main():
        for folder in (result.adapter, result.report):
            shutil.copytree(folder, arguments.output / folder.name, dirs_exist_ok=True)
        print(f"Adapter: {arguments.output / 'adapter'}")


def _train_job(file: Path, output: Path | None) -> None:
    """Train a job as one of its processes. Write the result, or the error, to `output` or beside the job."""
    # Read the job, and import its backend before transformers
    job = read_job(file)
    if STAGES[job.stage].block.trains_with_unsloth:
        _import_backend(job.setup.compute, job.setup.method, job.config, job.setup.model, job.start)
    from llm_engineering.training.processes import ranks

    # Train
    ranks.end_with_launcher()
    try:
        result = _train(job)
    except Exception as error:
        if output is None:
            write_failure(file.parent, ranks.rank(), error)
        elif not isinstance(error, RequestError | WorkError):
            traceback.print_exc()
            raise WorkError(f"{type(error).__name__}: {error}") from error
        raise

    # Write the result
    if ranks.is_main() and output is not None:
        _copy_results(result, output, Settings().llm_output_dir.resolve())
    elif ranks.is_main():
        place = Result(adapter=result.adapter, report=result.report)
        (file.parent / RESULT_FILE).write_text(place.model_dump_json(), encoding="utf-8")


def _copy_results(result: TrainingResult, output: Path, output_dir: Path) -> None:
    """Move the adapter, and copy the report and the trackers' files. Below `trackers`, these keep their relative paths.

    A copied adapter, which may be a full model, would lie twice on the disk, and in S3.
    """
    shutil.rmtree(output / result.adapter.name, ignore_errors=True)
    shutil.move(result.adapter, output / result.adapter.name)
    shutil.copytree(result.report, output / result.report.name, dirs_exist_ok=True)
    remove_finished(output_dir / "training")
    for folder in (output_dir / "comet", output_dir / "wandb", result.adapter.parent / "tensorboard"):
        if folder.is_dir():
            target = output / "trackers" / folder.relative_to(output_dir)
            shutil.copytree(folder, target, dirs_exist_ok=True, symlinks=True)


def _import_backend(
    compute: ComputeConfig, method: Method, config: Mapping[str, Any], model: ModelConfig, start: Path | None
) -> None:
    """Import unsloth if it is the backend: it patches transformers, so it must be imported first.

    It trains no reward models.
    """
    from llm_engineering.models.device import choose_backend, choose_device, import_backend, keys_beyond_unsloth
    from llm_engineering.recipe.model_blocks import LoraConfig, beyond_unsloth

    keys = keys_beyond_unsloth(start) if start else beyond_unsloth(config["lora"] or LoraConfig().model_dump())
    device = choose_device(compute)
    device = choose_backend(device, compute, method, adapter_keys=keys, new_tokens=model.added_tokens)
    import_backend(device, Settings().llm_cache_dir)


def _train(job: Job) -> TrainingResult:
    """Train a job as one of its processes."""
    from llm_engineering.models.device import check_processes, choose_device
    from llm_engineering.training.processes import ranks

    assert job.data is not None
    device = choose_device(job.setup.compute)
    check_processes(job.setup.compute, device)
    ranks.join(job.setup.compute, device.name)
    result: TrainingResult = STAGES[job.stage].train_function()(job, _load_data(job.data), Settings())
    ranks.leave()
    return result


def _load_data(folder: Path) -> DatasetDict:
    try:
        data = load_from_disk(str(folder))
    except OSError as error:
        raise RequestError(
            f"--data {folder} cannot be read as a dataset ({error}). Name the folder of a formatted dataset."
        ) from error
    if not isinstance(data, DatasetDict) or not {"train", "validation"} <= data.keys():
        raise RequestError(
            f"--data {folder} does not have the splits train and validation. Name the folder of a formatted dataset."
        )
    return data


if __name__ == "__main__":
    sys.exit(main())
