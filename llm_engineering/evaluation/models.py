"""Scores held-out answers under several models that share one base, and generates the models' own answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.data.rows import Message
from llm_engineering.formatting.render import IGNORE_INDEX, prompt_ids
from llm_engineering.models.generate import batches_by_length, generate_ids
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.progress import Progress

BASE = "base"

# Token ids, and labels of the same length: -100 where a token is not scored.
Labelled = tuple[list[int], list[int]]


class AnswerScore(NamedTuple):
    """The sum of the log-probabilities of an answer's tokens, in nats, and the number of tokens."""

    log_prob: float
    tokens: int

    @property
    def mean(self) -> float:
        """The mean log-probability per token, in nats."""
        return self.log_prob / self.tokens


class Sample(NamedTuple):
    """A generated answer: its text, whether it ends with an end token, and its token ids, including the end token."""

    text: str
    stopped: bool
    ids: list[int]


class Models:
    """The base model, and the models trained from it: adapters or full models.

    Answers are generated greedily.

    Args:
        adapters: folders of the trained models by name, e.g. `sft` and `dpo`. The base model's name is `base`.
        repetition_penalty: as transformers' `generate` takes it; 1 is no penalty.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: Mapping[str, Path],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.repetition_penalty = repetition_penalty
        self.names = [BASE, *adapters]
        self.model: PreTrainedModel | PeftModel = base
        self.full: dict[str, PreTrainedModel] = {}
        for name, folder in adapters.items():
            if not (folder / "adapter_config.json").is_file():
                self.full[name] = _full_model(folder, base)
            elif isinstance(self.model, PeftModel):
                _add_adapter(self.model, name, folder)
            else:
                self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        self.model.eval()

    @contextmanager
    def use(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model of this name, in inference mode until the `with` block ends."""
        adapters_off: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.model, PeftModel) and name == BASE:
            adapters_off = self.model.disable_adapter()
        elif isinstance(self.model, PeftModel) and name not in self.full:
            self.model.set_adapter(name)
        with adapters_off, torch.inference_mode():
            yield self.full.get(name, self.model)

    def scores(self, name: str, rows: Sequence[Labelled], title: str) -> list[AnswerScore]:
        """Score the labelled tokens of each row, in the rows' order. `title` names the rows in progress lines."""
        scores: dict[int, AnswerScore] = {}
        progress = Progress(title, len(rows))
        with self.use(name) as model:
            for batch in batches_by_length([len(input_ids) for input_ids, _ in rows], self.batch_size):
                scores |= dict(zip(batch, self._score(model, [rows[i] for i in batch]), strict=True))
                progress.advance(len(batch))
        return [scores[index] for index in range(len(rows))]

    def _score(self, model: PreTrainedModel | PeftModel, rows: Sequence[Labelled]) -> list[AnswerScore]:
        """Score one batch, padded on the right to shape (rows, longest)."""
        longest = max(len(input_ids) for input_ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*input_ids, *[pad] * (longest - len(input_ids))] for input_ids, _ in rows])
        labels = torch.tensor([[*row, *[IGNORE_INDEX] * (longest - len(row))] for _, row in rows])
        mask = torch.tensor([[1] * len(input_ids) + [0] * (longest - len(input_ids)) for input_ids, _ in rows])
        ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view(len(rows), -1)
        counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        return [
            AnswerScore(-total, count)
            for total, count in zip(losses.double().sum(dim=1).tolist(), counts.tolist(), strict=True)
        ]

    def answer(self, name: str, messages: Sequence[Message], max_new_tokens: int) -> Sample:
        """Answer one conversation; see `answers`."""
        return self.answers(name, [messages], max_new_tokens)[0]

    def answers(
        self, name: str, prompts: Sequence[Sequence[Message]], max_new_tokens: int, title: str = ""
    ) -> list[Sample]:
        """Answer conversations greedily, in their order, with the chat template of training.

        `title` names the answers in progress lines; if it is empty, no progress is shown.
        """
        ids = [prompt_ids(messages, self.tokenizer) for messages in prompts]
        samples: dict[int, Sample] = {}
        progress = Progress(title, len(ids) if title else 0)
        with self.use(name) as model:
            ends = end_token_ids(model, self.tokenizer)
            for batch in batches_by_length([len(prompt) for prompt in ids], self.batch_size):
                new = generate_ids(
                    model,
                    self.tokenizer,
                    [ids[i] for i in batch],
                    max_new_tokens,
                    do_sample=False,
                    repetition_penalty=self.repetition_penalty,
                )
                for index, answer in zip(batch, new, strict=True):
                    text = str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
                    samples[index] = Sample(text, bool(answer) and answer[-1] in ends, answer)
                if title:
                    progress.advance(len(batch))
        return [samples[index] for index in range(len(ids))]


def _add_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Load another adapter of the same recipe beside the first."""
    config = LoraConfig.from_pretrained(str(folder))
    # With `ensure_weight_tying`, PEFT finds the output layer only while no other adapter has wrapped the embedding.
    first = next(iter(model.peft_config.values()))
    config.modules_to_tie = getattr(first, "modules_to_tie", None) if config.ensure_weight_tying else None
    model.add_adapter(name, config)
    model.load_adapter(str(folder), adapter_name=name)


def _full_model(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Load a full model with the precision, attention and device of the base model."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation
    )
    loaded.to(base.device)  # type: ignore[arg-type]
    loaded.eval()
    return loaded


def labelled_rows(formatted_sft: Dataset) -> list[Labelled]:
    """Token ids and labels of each formatted instruction row."""
    return [(row["input_ids"], row["labels"]) for row in formatted_sft]


def labelled_answer(prompt: list[int], answer: list[int]) -> Labelled:
    """Token ids of a prompt and its answer, with labels on the answer only."""
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer
