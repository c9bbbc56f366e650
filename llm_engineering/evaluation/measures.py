"""What several models that share one base do with held-out rows: scores of given answers, and answers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.data.rows import Message
from llm_engineering.evaluation.statistics import Rows
from llm_engineering.formatting.render import IGNORE_INDEX, prompt_ids
from llm_engineering.models.generate import batches_by_length, generate_ids
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.progress import Progress

BASE = "base"

# Token ids, and labels of the same length: -100 where nothing is scored.
Labelled = tuple[list[int], list[int]]


class AnswerScore(NamedTuple):
    """Sum of the log-probabilities of an answer's tokens, in nats, and how many tokens it has."""

    log_prob: float
    tokens: int

    @property
    def mean(self) -> float:
        """Mean log-probability a token."""
        return self.log_prob / self.tokens


class Sample(NamedTuple):
    """An answer, whether the model ended it by itself, and its token ids, with the end token where there is one."""

    text: str
    stopped: bool
    ids: list[int]


class Models:
    """The base model and what was trained from it by name, e.g. `sft` and `dpo`: adapters, or full models.

    `base` is the model as it was. Answers are greedy, with `repetition_penalty` (1 is none).
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
                self.model.load_adapter(str(folder), adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        self.model.eval()

    @contextmanager
    def use(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model under this name, for the time of the `with` block."""
        if name in self.full:
            with torch.inference_mode():
                yield self.full[name]
            return
        plain: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.model, PeftModel):
            if name == BASE:
                plain = self.model.disable_adapter()
            else:
                self.model.set_adapter(name)
        with plain, torch.inference_mode():
            yield self.model

    def scores(self, name: str, rows: Sequence[Labelled], what: str) -> list[AnswerScore]:
        """Score the labelled tokens of each `(input_ids, labels)` row, in the rows' order. `what` is shown as progress."""
        scores: dict[int, AnswerScore] = {}
        progress = Progress(what, len(rows))
        with self.use(name) as model:
            for batch in batches_by_length([len(input_ids) for input_ids, _ in rows], self.batch_size):
                scores |= dict(zip(batch, self._score(model, [rows[i] for i in batch]), strict=True))
                progress.advance(len(batch))
        return [scores[index] for index in range(len(rows))]

    def _score(self, model: PreTrainedModel | PeftModel, rows: Sequence[Labelled]) -> list[AnswerScore]:
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
        """The greedy answer to a conversation, prompted as in training."""
        return self.answers(name, [messages], max_new_tokens)[0]

    def answers(
        self, name: str, prompts: Sequence[Sequence[Message]], max_new_tokens: int, what: str = ""
    ) -> list[Sample]:
        """The greedy answers to conversations, in their order, in batches of like length padded on the left.

        `what` is shown with the progress; empty for none.
        """
        ids = [prompt_ids(messages, self.tokenizer) for messages in prompts]
        samples: dict[int, Sample] = {}
        progress = Progress(what, len(ids) if what else 0)
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
                samples |= {i: self._sample(answer, ends) for i, answer in zip(batch, new, strict=True)}
                if what:
                    progress.advance(len(batch))
        return [samples[index] for index in range(len(ids))]

    def _sample(self, ids: list[int], ends: Sequence[int]) -> Sample:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Sample(text, bool(ids) and ids[-1] in ends, ids)


def _full_model(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """A full model in the precision, with the attention and on the device of the base model."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation
    )
    loaded.to(base.device)  # type: ignore[arg-type]
    loaded.eval()
    return loaded


def heldout_loss(scores: Sequence[AnswerScore]) -> Rows:
    """Negative log-probability of the answers' tokens, in nats a token; each token weighs the same."""
    return Rows.of([-score.log_prob for score in scores], [score.tokens for score in scores])


def question_gain(own: Sequence[AnswerScore], others: Sequence[Sequence[AnswerScore]]) -> Rows:
    """How much likelier an answer is after its own question than after those of other rows, in nats a token.

    A model that learns how answers sound, and not which answer belongs to which question, loses it: pointwise mutual
    information (Church and Hanks 1990) with the other rows' questions in place of all questions.

    Args:
        own: after the row's own question.
        others: for each of several ways to give every row another row's question.
    """
    gains = [
        score.log_prob - sum(other[index].log_prob for other in others) / len(others) for index, score in enumerate(own)
    ]
    return Rows.of(gains, [score.tokens for score in own])


def with_other_questions(rows: Sequence[Labelled]) -> list[list[Labelled]]:
    """The rows with what stands before the first answer taken from other rows, in up to three ways.

    Rows of one document stand together, so the others are a quarter, a half and three quarters of all rows away.
    """
    borders = [next(place for place, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in rows]
    ways = []
    for shift in sorted({len(rows) * quarter // 4 for quarter in (1, 2, 3)} - {0}):
        moved = []
        for index, ((ids, labels), border) in enumerate(zip(rows, borders, strict=True)):
            other = (index + shift) % len(rows)
            question = rows[other][0][: borders[other]]
            moved.append(([*question, *ids[border:]], [IGNORE_INDEX] * len(question) + labels[border:]))
        ways.append(moved)
    return ways


def preference_accuracy(chosen: Sequence[AnswerScore], rejected: Sequence[AnswerScore]) -> Rows:
    """Whether a pair's chosen answer has the higher mean log-probability a token, under one model alone."""
    return Rows.of([c.mean > r.mean for c, r in zip(chosen, rejected, strict=True)])


def preference_margin(chosen: Sequence[AnswerScore], rejected: Sequence[AnswerScore]) -> Rows:
    """A pair's chosen minus its rejected mean log-probability a token, in nats."""
    return Rows.of([c.mean - r.mean for c, r in zip(chosen, rejected, strict=True)])


def labelled_rows(formatted_sft: Dataset) -> list[Labelled]:
    """What is scored of each formatted instruction row."""
    return [(row["input_ids"], row["labels"]) for row in formatted_sft]


def labelled_answers(formatted_dpo: Dataset, answer: str) -> list[Labelled]:
    """What is scored of each pair's `chosen` or `rejected` answer."""
    rows: list[dict[str, Any]] = list(formatted_dpo)
    return [labelled_answer(row["prompt_ids"], row[f"{answer}_ids"]) for row in rows]


def labelled_answer(prompt: list[int], answer: list[int]) -> Labelled:
    """An answer to a prompt, of which the answer is scored."""
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer
