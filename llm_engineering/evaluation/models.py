"""Scores held-out answers under several models that share one base, and generates the models' own answers."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.data.rows import Message
from llm_engineering.formatting.render import IGNORE_INDEX, prompt_ids
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Reply
from llm_engineering.models.base_model import load_model, weights_hash
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import batches_by_length, context_length, generate_ids
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.progress import Progress
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)

BASE = "base"
# Name of the file in the output folder.
STORE_FILE = "evaluation_answers.jsonl"

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

    @property
    def cut(self) -> int | None:
        """The number of tokens at which the answer was cut; None if it ended by itself."""
        return None if self.stopped else len(self.ids)


class StoredAnswers(NamedTuple):
    """Stores answers, so that a killed evaluation continues, and no later run asks a model the same questions again.

    Attributes:
        identities: for each model everything, besides the questions, that its answers depend on.
    """

    store: AnswerStore
    identities: Mapping[str, str]


class Models:
    """The base model, and the models trained from it: adapters or full models.

    Answers are generated greedily.

    Args:
        adapters: folders of the trained models by name, e.g. `sft` and `dpo`. The base model's name is `base`.
        repetition_penalty: as transformers' `generate` takes it; 1 is no penalty.
        stored: answers of earlier evaluations; None generates every answer.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: Mapping[str, Path],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        repetition_penalty: float = 1.0,
        stored: StoredAnswers | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.repetition_penalty = repetition_penalty
        self.stored = stored
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

    @classmethod
    def load(
        cls,
        base: ModelConfig,
        adapters: Mapping[str, Path],
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        compute: ComputeConfig,
        settings: Settings,
    ) -> Models:
        """Load the models on this machine, with the answers of earlier evaluations."""
        device = choose_device(compute)
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        revision = base.revision or weights_hash(Path(base.name_or_path))
        identity = f"{base.name_or_path}@{revision} on {device.name} in {device.dtype}, {versions}"
        identity += f", new tokens {base.added_tokens}" if base.added_tokens else ""
        identities = {BASE: identity} | {name: f"{identity}, {weights_hash(path)}" for name, path in adapters.items()}
        stored = StoredAnswers(AnswerStore(settings.llm_output_dir / STORE_FILE), identities)
        model = load_model(base, settings, device)
        return cls(model, adapters, tokenizer, config.batch_size, config.repetition_penalty, stored)

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
        self,
        name: str,
        prompts: Sequence[Sequence[Message]],
        max_new_tokens: int,
        title: str = "",
        batch_size: int | None = None,
    ) -> list[Sample]:
        """Answer conversations with the chat template of training; see `complete`."""
        ids = [prompt_ids(messages, self.tokenizer) for messages in prompts]
        return self.complete(name, ids, max_new_tokens, title, batch_size)

    def complete(
        self, name: str, ids: Sequence[list[int]], max_new_tokens: int, title: str = "", batch_size: int | None = None
    ) -> list[Sample]:
        """Continue prompts of tokens greedily, in their order.

        An answer ends with the model's context. A prompt that fills the context gets an empty answer.

        Args:
            title: names the answers in progress lines; if it is empty, no progress is shown.
            batch_size: replaces the batch size of these models, e.g. for very short prompts.
        """
        samples: dict[int, Sample] = {}
        progress = Progress(title, len(ids) if title else 0)
        with self.use(name) as model:
            ends = end_token_ids(model, self.tokenizer)
            limit = context_length(model) or sys.maxsize
            too_long = sum(len(prompt) >= limit for prompt in ids)
            if too_long:
                logger.warning("%d prompts fill the context of %d tokens and are not answered", too_long, limit)
            for batch in batches_by_length([len(prompt) for prompt in ids], batch_size or self.batch_size):
                fitting = [i for i in batch if len(ids[i]) < limit]
                room = min(max_new_tokens, limit - max((len(ids[i]) for i in fitting), default=0))
                new = self._answer_batch(name, model, [ids[i] for i in fitting], room) if fitting else []
                found = dict(zip(fitting, new, strict=True))
                for index in batch:
                    answer = found.get(index, [])
                    text = str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
                    samples[index] = Sample(text, bool(answer) and answer[-1] in ends, answer)
                if title:
                    progress.advance(len(batch))
        return [samples[index] for index in range(len(ids))]

    def _answer_batch(
        self, name: str, model: PreTrainedModel | PeftModel, prompts: list[list[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """The token ids of each answer. They are stored by batch, because rounding depends on the whole batch."""

        def generate() -> list[list[int]]:
            options = {"do_sample": False, "repetition_penalty": self.repetition_penalty}
            return generate_ids(model, self.tokenizer, prompts, max_new_tokens, **options)

        if self.stored is None:
            return generate()
        store, identity = self.stored.store, self.stored.identities[name]
        ends = end_token_ids(model, self.tokenizer)
        asked = json.dumps([identity, prompts, max_new_tokens, self.repetition_penalty, ends])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:24]
        keys = [f"{digest}-{row}" for row in range(len(prompts))]
        if not store.answers.keys() >= set(keys):
            with store:
                store.add({key: Reply(json.dumps(ids)) for key, ids in zip(keys, generate(), strict=True)})
        return [json.loads(store.answers[key].text) for key in keys]


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
    # The class of the base model: it may come from the model's own code, and AutoModel would ask whether to run that.
    loaded = type(base).from_pretrained(folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation)
    loaded.to(base.device)  # type: ignore[arg-type]
    loaded.eval()
    return loaded


def labelled_rows(formatted_sft: Dataset) -> list[Labelled]:
    """Token ids and labels of each formatted instruction row."""
    return [(row["input_ids"], row["labels"]) for row in formatted_sft]


def labelled_answer(prompt: list[int], answer: list[int]) -> Labelled:
    """Token ids of a prompt and its answer, with labels on the answer only."""
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer
