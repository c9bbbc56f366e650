"""Does the work of `make run-sft` with only transformers, PEFT and torch, without this project:

    python -m benchmarks.bare_chain generate|train|evaluate WORK.json

`generate` generates all questions in batches. `train` trains an adapter on packed rows, with evaluations in between.
`evaluate` scores held-out rows and answers some of them, with the base model and with the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run one of the three."""
    stage, path = sys.argv[1:]
    work = json.loads(Path(path).read_text(encoding="utf-8"))
    {"generate": _generate, "train": _train, "evaluate": _evaluate}[stage](work)


def _load(work: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"])), tokenizer


def _answers(model: Any, processor: Any, prompts: list[str], batch: int, **settings: Any) -> None:
    import torch

    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch):
        inputs = processor(
            prompts[start : start + batch], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, pad_token_id=processor.pad_token_id, **settings)


def _generate(work: dict[str, Any]) -> None:
    model, tokenizer = _load(work)
    for part in work["questions"]:
        stop = {"stop_strings": part["stop"], "tokenizer": tokenizer} if part["stop"] else {}
        prompts, batch = part["prompts"], work["generation_batch"]
        _answers(model, tokenizer, prompts, batch, max_new_tokens=part["max_new_tokens"], **stop)


def _losses(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch: int) -> None:
    """Compute the losses of rows, padded to the longest row of their batch."""
    import torch

    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        longest = max(len(row["input_ids"]) for row in some)
        ids = torch.tensor([r["input_ids"] + [tokenizer.pad_token_id] * (longest - len(r["input_ids"])) for r in some])
        labels = torch.tensor([r["labels"] + [-100] * (longest - len(r["labels"])) for r in some])
        mask = torch.tensor([[1] * len(r["labels"]) + [0] * (longest - len(r["labels"])) for r in some])
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.item()


def _train(work: dict[str, Any]) -> None:
    import peft
    import torch

    model, tokenizer = _load(work)
    policy = peft.get_peft_model(model, peft.LoraConfig(**work["lora"], task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=work["learning_rate"])
    ids = [token for row in work["train"] for token in row["input_ids"]]
    labels = [label for row in work["train"] for label in row["labels"]]
    length, batch = work["max_length"], work["train_batch"]
    starts = range(0, len(ids), length)
    step = 0
    for _ in range(work["epochs"]):
        for number, start in enumerate(starts, 1):
            row = torch.tensor([ids[start : start + length]]), torch.tensor([labels[start : start + length]])
            with torch.autocast("cpu", getattr(torch, work["dtype"]), enabled=work["dtype"] != "float32"):
                loss = policy(input_ids=row[0], labels=row[1], use_cache=False).loss / batch
            loss.backward()
            if number % batch == 0 or number == len(starts):
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % work["eval_steps"] == 0:
                    policy.eval()
                    _losses(policy, tokenizer, work["validation"], work["eval_batch"])
                    policy.train()
    policy.save_pretrained(work["adapter"])


def _evaluate(work: dict[str, Any]) -> None:
    import contextlib

    import peft

    model, tokenizer = _load(work)
    policy = peft.PeftModel.from_pretrained(model, work["adapter"]).eval()
    for named in (policy.disable_adapter(), contextlib.nullcontext()):
        with named:
            _losses(policy, tokenizer, work["test"], work["evaluation_batch"])
            _answers(
                policy,
                tokenizer,
                work["answered"],
                work["evaluation_batch"],
                max_new_tokens=work["answer_max_new_tokens"],
            )


if __name__ == "__main__":
    main()
