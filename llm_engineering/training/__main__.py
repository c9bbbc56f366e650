"""Train without pipelines, e.g. in a container:

    python -m llm_engineering.training sft --recipe recipe.yaml --data formatted/ --output out/
    python -m llm_engineering.training dpo --recipe recipe.yaml --data formatted/ --output out/ --adapter sft_adapter/

`--data` is a DatasetDict on disk, as the formatting step makes it. Writes `out/adapter` and `out/report`.
It starts the recipe's `compute.num_processes` by itself; started by torchrun or accelerate, it is one of them:

    torchrun --nproc-per-node 2 -m llm_engineering.training sft --set compute.num_processes=2 --recipe …
    accelerate launch --num_processes 2 -m llm_engineering.training sft --set compute.num_processes=2 --recipe …

`--job FILE` is what the pipelines start: everything stands in the file, and the answer is written beside it. With
`--output DIR` the adapter, the report and the archives of trackers go there, and an error is said: the form for a machine
of which nothing else is kept.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetDict, load_from_disk

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import Method
from llm_engineering.training.job import RESULT_FILE, Job, Result, Stage, read_job, write_failure

if TYPE_CHECKING:
    from llm_engineering.training.job import TrainingResult


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llm_engineering.training", description="Train one stage.")
    parser.add_argument("stage", choices=("sft", "dpo"), nargs="?")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--adapter", type=Path, help="the SFT adapter, or full SFT model, that DPO starts from")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume-from", type=Path, metavar="DIR", help="a checkpoint of this very run to go on from")
    parser.add_argument(
        "--job", type=Path, metavar="FILE", help="a whole training run as a file, in place of all others"
    )
    arguments = parser.parse_args()
    missing = [name for name in ("stage", "recipe", "data", "output") if getattr(arguments, name) is None]
    if arguments.job is None and missing:
        parser.error(f"missing: {', '.join(missing)}")
    is_main = os.environ.get("RANK", "0") == "0"
    # Before any library reads it: one progress bar is enough.
    if not is_main:
        os.environ["TQDM_DISABLE"] = "1"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")
    try:
        if arguments.job is not None:
            _train_job(arguments.job, arguments.output)
        else:
            _train_recipe(arguments)
    except (RequestError, WorkError) as error:
        # The process that wrote the job says what is left beside it.
        if arguments.job is None or arguments.output is not None:
            print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main and (arguments.job is None or arguments.output is not None):
            print("Interrupted. A checkpoint is saved: the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _train_job(file: Path, output: Path | None) -> None:
    """Train a job as one of its processes, and leave the result, or the reason of a failure, in `output` or beside it."""
    job = read_job(file)
    _import_backend(job.setup.compute, job.setup.method, job.config, job.start)
    from llm_engineering.training import ranks

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
    if ranks.is_main() and output is not None:
        _copy_results(result, output, Settings().llm_output_dir.resolve())
    elif ranks.is_main():
        place = Result(adapter=result.adapter, report=result.report)
        (file.parent / RESULT_FILE).write_text(place.model_dump_json(), encoding="utf-8")


def _copy_results(result: TrainingResult, output: Path, output_dir: Path) -> None:
    """Copy adapter and report, and below `trackers` what trackers keep on disk, at its place in the output folder."""
    for folder in (result.adapter, result.report):
        shutil.copytree(folder, output / folder.name, dirs_exist_ok=True)
    for kept in (output_dir / "comet", output_dir / "wandb", result.adapter.parent / "tensorboard"):
        if kept.is_dir():
            shutil.copytree(kept, output / "trackers" / kept.relative_to(output_dir), dirs_exist_ok=True, symlinks=True)


def _train_recipe(arguments: argparse.Namespace) -> None:
    """Train what the command line says: in one of the processes that something else started, or in all of them."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    config = recipe.sft if arguments.stage == "sft" else recipe.dpo
    if arguments.stage == "dpo" and not (arguments.adapter and any(arguments.adapter.glob("*.safetensors"))):
        raise RequestError("DPO starts from an SFT adapter, or a full SFT model: give its folder with --adapter.")
    if "WORLD_SIZE" in os.environ:
        _import_backend(recipe.compute, recipe.sft.method, config.model_dump(), arguments.adapter)
    from llm_engineering.models.loading import pin_revision
    from llm_engineering.models.tokenizer import pin_chat_template
    from llm_engineering.training import ranks
    from llm_engineering.training.launch import launch_training

    recipe = recipe.model_copy(
        update={"model": pin_revision(recipe.model), "formatting": pin_chat_template(recipe.formatting)}
    )
    settings = Settings()
    settings.check_writable()
    job = Job(
        stage=arguments.stage,
        config=config.model_dump(),
        setup=recipe.setup,
        data=arguments.data,
        start=arguments.adapter,
        resume_from=arguments.resume_from,
    )
    if "WORLD_SIZE" in os.environ:
        result = _train(job)
    else:
        result = launch_training(_stage(job.stage), job, _formatted(arguments.data), settings)
    if ranks.is_main():
        for folder in (result.adapter, result.report):
            shutil.copytree(folder, arguments.output / folder.name, dirs_exist_ok=True)
        print(f"Adapter: {arguments.output / 'adapter'}")


def _import_backend(compute: ComputeConfig, method: Method, config: Mapping[str, Any], start: Path | None) -> None:
    """Import what changes transformers, before transformers: nothing at the top of this module imports it."""
    from llm_engineering.models.device import choose_backend, choose_device, import_backend, uses_dora

    use_dora = uses_dora(start) if start else bool(config["lora"]["use_dora"])
    device = choose_backend(choose_device(compute), compute, method, use_dora=use_dora)
    import_backend(device, Settings().llm_cache_dir)


def _train(job: Job) -> TrainingResult:
    from llm_engineering.models.device import check_processes, choose_device
    from llm_engineering.training import ranks

    assert job.data is not None
    device = choose_device(job.setup.compute)
    check_processes(job.setup.compute, device)
    ranks.join(job.setup.compute, device.name)
    result = _stage(job.stage)(job, _formatted(job.data), Settings())
    ranks.leave()
    return result


def _stage(name: Stage) -> Callable[[Job, DatasetDict, Settings], TrainingResult]:
    from llm_engineering.training.dpo import train_dpo_job
    from llm_engineering.training.sft import train_sft_job

    return train_sft_job if name == "sft" else train_dpo_job


def _formatted(folder: Path) -> DatasetDict:
    try:
        data = load_from_disk(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise RequestError(f"--data {folder} is no dataset folder that can be read ({error}).") from error
    if not isinstance(data, DatasetDict) or not {"train", "validation"} <= data.keys():
        raise RequestError(f"--data {folder} holds no formatted dataset with the splits train and validation.")
    return data


if __name__ == "__main__":
    sys.exit(main())
