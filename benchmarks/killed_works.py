"""What `file_kills` interrupts: stores, journals, reports, checkpoints and models, and a whole run of the command line."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, DatasetDict

from benchmarks.file_kills import Did, Work
from llm_engineering.cloud.schedules.run_records import Place, RunRecord
from llm_engineering.feedback import human_rows
from llm_engineering.feedback.decisions import Decision, store, stored
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Reply
from llm_engineering.publish.exports.gguf import write_gguf
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.reports.data_report import inspect_file
from llm_engineering.training.processes.job import RUN_ID
from llm_engineering.training.trainer import checkpoints
from tests.tiny_models import KINDS, tiny_tokenizer, train, training_setup, write_model
from tools.model_versions.versions import copy_model

_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
_COUNT = 4
_TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
# What differs between two runs of the same training.
_TIMED = ("runtime", "_per_second", "seconds", "peak_memory_bytes", "padding_share", "resumed_from")


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _answers(folder: Path, did: Did) -> None:
    with AnswerStore(folder / "answers.jsonl") as answers:
        for number in range(_COUNT):
            key = f"answer-{number}"
            if key not in answers.answers:
                answers.add({key: Reply(f"The answer {number}.")})
                did(key)


def _stored_answers(folder: Path) -> dict[str, str]:
    # A torn line stays in the store. Its answer is written again after it.
    return {key: reply.text for key, reply in AnswerStore(folder / "answers.jsonl").answers.items()}


def _decisions(folder: Path, did: Did) -> None:
    known = {decision.id for decision in stored(folder)}
    for number in range(_COUNT):
        row = f"row-{number}"
        if row not in known:
            store(folder, Decision(id=row, kind="instruction", action="drop", reviewer="A", time=_NOON.isoformat()))
            did(row)


def _snapshot(folder: Path, _: Did) -> None:
    name = human_rows.note({"rows": [{"prompt": "Who?", "completion": "Anna."}]}, folder / "said")
    assert human_rows.noted(name, folder / "said")


def _record(folder: Path, _: Did) -> None:
    place = Place(str(folder))
    # What `schedule list` reads must be whole at any time.
    assert all(record.run == "one" for record in place.records())
    place.write(RunRecord(run="one", began=_NOON))
    place.write(RunRecord(run="one", began=_NOON, ended=_NOON, outcome="promoted"))


def _write_rows(folder: Path) -> None:
    rows = [{"instruction": f"What is {n}?", "output": f"It is the number {n} of these rows."} for n in range(40)]
    lines = [json.dumps(row) for row in [*rows, rows[0], {"instruction": "Why?", "output": ""}]]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _report(folder: Path, _: Did) -> None:
    tokenizer = tiny_tokenizer(("<|endoftext|>",), _TEMPLATE)
    with patch("llm_engineering.reports.data_report.datetime") as clock:
        # The page shows the date.
        clock.now.return_value = _NOON
        inspect_file(str(folder / "rows.jsonl"), None, tokenizer, DataConfig(), FormattingConfig(), folder / "report")


def _write_model(folder: Path) -> None:
    write_model(folder / "model", KINDS["llama"]._replace(template=_TEMPLATE))


def _sft(folder: Path, did: Did) -> None:
    """Four steps with two checkpoints, one of which is kept until the end."""
    torch.set_num_threads(1)
    rows = [
        {"id": f"r{i}", "input_ids": [1, *range(20 + i, 30 + i), 0], "labels": [IGNORE_INDEX] * 4 + [*range(23 + i, 30 + i), 0]}
        for i in range(6)
    ]  # fmt: skip
    data = DatasetDict(train=Dataset.from_list(rows[:4]), validation=Dataset.from_list(rows[4:]))
    config = SFTConfig(
        learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        save_steps=1, eval_steps=2, logging_steps=1, packing=False, save_total_limit=2, lora=LoraConfig(r=2),
    )  # fmt: skip
    publish = checkpoints.publish

    def published(partial: Path, final: Path, identity: Any) -> None:
        publish(partial, final, identity)
        did(final.name)

    # A pipeline stores the model, and then removes the checkpoints. A stored model is not trained again.
    stored_model = folder / "stored"
    if not stored_model.exists():
        settings = Settings(llm_output_dir=folder)
        with patch("llm_engineering.training.trainer.resumable.publish", published):
            result = train(
                data, config, training_setup(folder / "model", max_length=64), settings, parameters={RUN_ID: "one"}
            )
        copy_model(result.adapter, {"README.md": b"A card."}, stored_model)
    checkpoints.remove_finished(folder / "training")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(v) for name, v in value.items() if not name.endswith(_TIMED)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _trained(folder: Path) -> dict[str, Any]:
    (summary,) = folder.glob("training/*/report/report.json")
    return {
        "adapter": _hashes(summary.parents[1] / "adapter"),
        "summary": _without_times(json.loads(summary.read_text(encoding="utf-8"))),
    }


def _export(folder: Path, _: Did) -> None:
    torch.set_num_threads(1)
    # The command refuses an output that exists.
    if not (folder / "copied").exists():
        copy_model(folder / "model", {"README.md": b"A card."}, folder / "copied")
    if not (folder / "model.gguf").exists():
        write_gguf(folder / "model", folder / "model.gguf", "tiny")


_ALL = (
    Work("answers", _answers, _stored_answers),
    Work("decisions", _decisions, _hashes),
    Work("snapshot", _snapshot, _hashes),
    Work("record", _record, _hashes),
    Work("report", _report, _hashes, _write_rows),
    Work("sft", _sft, _trained, _write_model),
    Work("export", _export, _hashes, _write_model),
)
WORKS = {work.name: work for work in _ALL}
