"""Times LLaMA-Factory's preprocessing. benchmarks.peer_preprocessing runs it with LLaMA-Factory's own Python.

Arguments: a folder with `rows.jsonl`, the tokenizer's folder, the number of workers, the longest row in tokens.
The last line of stdout is one JSON object.
"""

import json
import os
import sys
import time
from pathlib import Path

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer


def main() -> None:
    """Load, convert and tokenise the rows once. The time does not include imports and loading the tokenizer."""
    folder, tokenizer_folder, workers, max_length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}), encoding="utf-8")
    model, data, training, _, _ = get_train_args(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": tokenizer_folder,
            "dataset": "rows",
            "dataset_dir": str(folder),
            "template": "smollm2",
            "cutoff_len": max_length,
            "preprocessing_num_workers": workers,
            "overwrite_cache": True,
            "output_dir": str(folder / "output"),
            "report_to": "none",
        }
    )
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    before, started = os.times(), time.perf_counter()
    made = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
    seconds = time.perf_counter() - started
    # CPU time of this process and its workers. Wall time depends on other work of the machine.
    cpu_seconds = sum(os.times()[:4]) - sum(before[:4])
    tokens = sum(map(len, made["input_ids"]))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "rows_out": len(made), "tokens": tokens}))


if __name__ == "__main__":
    main()
