"""Train without pipelines, e.g. in a container:

    python -m llm_engineering.training sft --recipe recipe.yaml --data formatted/ --output out/
    python -m llm_engineering.training dpo --recipe recipe.yaml --data formatted/ --output out/ --adapter sft_adapter/

`--data` is a DatasetDict on disk, as the formatting step makes it. Writes `out/adapter` and `out/report`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

from datasets import DatasetDict, load_from_disk

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.formatting.chat_template import pin_chat_template
from llm_engineering.models import pin_revision
from llm_engineering.recipes import load_recipe
from llm_engineering.settings import Settings
from llm_engineering.training.dpo import train_dpo
from llm_engineering.training.sft import train_sft


def main() -> int:
    """Parse the command line, train, and copy the results to the output folder."""
    parser = argparse.ArgumentParser(prog="python -m llm_engineering.training", description="Train one stage.")
    parser.add_argument("stage", choices=("sft", "dpo"))
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--adapter", type=Path, help="the SFT adapter, or full SFT model, that DPO starts from")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--resume-from", type=Path, metavar="DIR", help="a checkpoint of this very run to go on from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        recipe = recipe.model_copy(
            update={"model": pin_revision(recipe.model), "formatting": pin_chat_template(recipe.formatting)}
        )
        settings = Settings()
        settings.check_writable()
        data = _formatted(arguments.data)
        if arguments.stage == "sft":
            result = train_sft(data, recipe.sft, recipe.setup, settings, resume_from=arguments.resume_from)
        elif arguments.adapter is None or not any(arguments.adapter.glob("*.safetensors")):
            raise RequestError("DPO starts from an SFT adapter, or a full SFT model: give its folder with --adapter.")
        else:
            start, checkpoint = arguments.adapter, arguments.resume_from
            result = train_dpo(data, start, recipe.dpo, recipe.setup, settings, resume_from=checkpoint)
        for folder in (result.adapter, result.report):
            shutil.copytree(folder, arguments.output / folder.name, dirs_exist_ok=True)
    except (RequestError, WorkError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. A checkpoint is saved: the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    print(f"Adapter: {arguments.output / 'adapter'}")
    return 0


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
