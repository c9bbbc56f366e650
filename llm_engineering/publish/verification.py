"""Compares the saved model with the trained model on held-out rows, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.progress import Progress, counted
from llm_engineering.recipe.data_blocks import ExportConfig

# In nats. Float32 results that differ only in the order of summation are closer than this; a wrong merge differs by more.
TOLERANCE = 0.001
# Training changes log-probabilities, and so does rounding to half precision. The mean change by rounding may be at most
# this share of the mean change by training. In bfloat16, which has 8 significant bits, the share is 0.04 for an adapter on
# the default model. It would be 1 for a model without its adapter.
MAX_LOST_SHARE = 0.1
# In nats a token: the mean difference that a GGUF file may have without quantisation. llama.cpp also computes in half
# precision where the weights have it.
MAX_CONVERSION_DIFFERENCE = 0.05


class HeldoutRow(NamedTuple):
    """A formatted row: token ids, and labels of the same length; tokens with the label -100 are not compared."""

    id: str
    input_ids: list[int]
    labels: list[int]


class TokenScores(NamedTuple):
    """Scores of a model at each answer token of a row; tensors of shape `(answer tokens,)`.

    Attributes:
        log_probs: log-probability of the row's token, in nats.
        top: id of the most probable token.
        lead: log-probability of the most probable token minus that of the second one, in nats.
    """

    log_probs: torch.Tensor
    top: torch.Tensor
    lead: torch.Tensor


class Verification(BaseModel):
    """The result of a comparison.

    Attributes:
        dtype: precision of the saved weights.
        rows, tokens: number of rows, and of their answer tokens.
        same_top: number of tokens at which both models have the same most probable token.
        mean_difference, largest_difference: absolute differences of log-probabilities, in nats a token.
        mean_training_effect: the mean difference between the base model and the trained model.
    """

    model_config = ConfigDict(frozen=True)

    dtype: str
    rows: int
    tokens: int
    same_top: int
    mean_difference: float
    largest_difference: float
    mean_training_effect: float

    @property
    def sentence(self) -> str:
        """The result in words."""
        cost = "" if self.dtype == "float32" else ": this is the cost of rounding; float32 has none"
        return (
            f"saved in {self.dtype}, {self.same_top} of {self.tokens} answer tokens of {counted(self.rows, 'held-out row')} have the "
            f"same most probable token as the trained model; log-probabilities differ by {self.mean_difference:.4f} nats "
            f"on average and {self.largest_difference:.4f} at most (training changed them by "
            f"{self.mean_training_effect:.3f} on average){cost}"
        )


def precision(dtype: torch.dtype) -> str:
    """The name of a precision in recipes and files, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def token_scores(
    model: PreTrainedModel | PeftModel, rows: Sequence[HeldoutRow], progress: Progress | None = None
) -> list[TokenScores]:
    """Score the labelled tokens of each row, one row at a time, so that padding has no effect."""
    scores = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.input_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
            labels = torch.tensor(row.labels[1:])
            answer = labels != IGNORE_INDEX
            scores.append(scored(logits[answer], labels[answer]))
            if progress is not None:
                progress.advance()
    return scores


def scored(logits: torch.Tensor, tokens: torch.Tensor) -> TokenScores:
    """Score tokens by the logits of shape `(tokens, vocabulary)` that predict them."""
    log_probs = torch.log_softmax(logits, dim=-1)
    best = log_probs.topk(2, dim=-1)
    own = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return TokenScores(own, best.indices[:, 0], best.values[:, 0] - best.values[:, 1])


def check_same(rows: Sequence[HeldoutRow], trained: Sequence[TokenScores], other: Sequence[TokenScores]) -> None:
    """Check that two models, both computed in float32, are the same.

    Every log-probability must agree within `TOLERANCE`. Every most probable token must be the same, unless the trained
    model's two most probable tokens are closer than `TOLERANCE`.

    Raises:
        WorkError: the models differ; the message has the row, the token and the difference.
    """
    for row, ours, theirs in zip(rows, trained, other, strict=True):
        # A nan counts as an infinite difference.
        difference = (ours.log_probs - theirs.log_probs).abs().nan_to_num(nan=torch.inf)
        at = int(difference.argmax())
        if difference[at] > TOLERANCE:
            raise _refused(
                f"on held-out row {row.id} the log-probability of answer token {at + 1} differs by {difference[at]:.3f} "
                f"nats from the trained model's, and {TOLERANCE:g} is allowed"
            )
        lost = (ours.top != theirs.top) & (ours.lead > TOLERANCE)
        if lost.any():
            at = int(lost.int().argmax())
            raise _refused(
                f"on held-out row {row.id} another token is the most probable one at answer token {at + 1}, where the "
                f"trained model's token leads by {ours.lead[at]:.3f} nats"
            )


def verify(
    rows: Sequence[HeldoutRow],
    trained: Sequence[TokenScores],
    saved: Sequence[TokenScores],
    untrained: Sequence[TokenScores],
    dtype: torch.dtype,
) -> Verification:
    """Compare the scores of the saved model with those of the trained one, all computed in float32.

    Saved in float32, it must be the same model. In half precision, the mean difference must be at most `MAX_LOST_SHARE`
    of the mean effect of training.

    Args:
        untrained: the scores of the base model.
        dtype: precision of the saved weights.

    Raises:
        WorkError: the models differ by more than the allowed difference.
    """
    if dtype == torch.float32:
        check_same(rows, trained, saved)
    differences = _differences(trained, saved)
    mean = float(differences.mean())
    effect = float(_differences(trained, untrained).mean())
    # Weights that are too large for float16 give nan, which `not … <=` refuses.
    if dtype != torch.float32 and not mean <= MAX_LOST_SHARE * effect:
        raise _refused(
            f"rounding to {precision(dtype)} changes log-probabilities by {mean:.2g} nats on average, and training changed "
            f"them by {effect:.2g}. Save without loss: --set compute.dtype=float32"
        )
    return Verification(
        dtype=precision(dtype),
        rows=len(rows),
        tokens=len(differences),
        same_top=sum(int((ours.top == theirs.top).sum()) for ours, theirs in zip(trained, saved, strict=True)),
        mean_difference=mean,
        largest_difference=float(differences.max()),
        mean_training_effect=effect,
    )


class FileCheck(BaseModel):
    """How a written file differs from the model in its own precision, which transformers computes.

    Attributes:
        computed_by: the program that computes the file: llama.cpp a GGUF file, transformers safetensors files.
        quant: the kind of quantisation; None if the weights keep their precision.
        tensors: number of tensors by their type in the file. llama.cpp mixes several, and takes a larger one for a matrix whose
            rows it cannot divide into blocks of 256.
        rows, tokens: number of held-out rows, and of their answer tokens.
        same_top: number of tokens at which both have the same most probable token.
        logprob_loss: by how much the log-probabilities of the rows' tokens fell on average, in nats a token.
        mean_difference: the mean of the absolute differences.
        asked: number of the exam's questions about one fact of the documents; 0 without an exam.
        right, right_before: how many of them the file answers right, and how many the trained model did.
    """

    model_config = ConfigDict(frozen=True)

    computed_by: Literal["llama.cpp", "transformers"] = "llama.cpp"
    quant: str | None
    tensors: dict[str, int]
    rows: int
    tokens: int
    same_top: int
    logprob_loss: float
    mean_difference: float
    asked: int
    right: int
    right_before: int

    @property
    def sentence(self) -> str:
        """The result in words."""
        exam = (
            f"; it answers {self.right} of {self.asked} exam questions right, and the trained model {self.right_before}"
        )
        return (
            f"{self.computed_by} finds the same most probable token at {self.same_top} of {self.tokens} answer tokens of "
            f"{counted(self.rows, 'held-out row')}; log-probabilities fall by {self.logprob_loss:.4f} nats on average and differ "
            f"by {self.mean_difference:.4f}"
            f"{exam if self.asked else ''}"
        )

    @property
    def file_format(self) -> str:
        """The format of the file."""
        return "GGUF" if self.computed_by == "llama.cpp" else "safetensors"

    @property
    def described(self) -> str:
        """The kind of quantisation and the types of the tensors."""
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.tensors.items()))
        return f"{self.file_format}, {self.quant or 'not quantised'} (tensors: {types})"

    def require(self, bounds: ExportConfig) -> None:
        """Raise a WorkError if the file differs more than the bounds allow."""
        lost = self.right_before - self.right
        larger = "Choose a larger kind, e.g. QUANT=Q8_0" if self.file_format == "GGUF" else "Export it without QUANT"
        for is_kept, problem in (
            (
                self.quant or self.mean_difference <= MAX_CONVERSION_DIFFERENCE,
                f"its log-probabilities differ from the model's by {self.mean_difference:.3g} nats on average, so llama.cpp does "
                "not compute this model. Export it as safetensors",
            ),
            (
                not self.quant or self.logprob_loss <= bounds.max_logprob_loss,
                f"{self.quant} lowers log-probabilities by {self.logprob_loss:.3g} nats on average, and "
                f"export.max_logprob_loss is {bounds.max_logprob_loss:g}. {larger}",
            ),
            (
                lost <= bounds.max_exam_loss * self.asked,
                f"it answers {self.right} of {self.asked} exam questions right, the trained model {self.right_before}, and "
                f"export.max_exam_loss is {bounds.max_exam_loss:g}. {larger}",
            ),
        ):
            if not is_kept:
                raise WorkError(f"The {self.file_format} file is not kept: {problem}.")


def compare_files(model: Sequence[TokenScores], file: Sequence[TokenScores]) -> dict[str, Any]:
    """The measures of `FileCheck` that follow from the scores of the same rows."""
    losses = torch.cat([before.log_probs - after.log_probs for before, after in zip(model, file, strict=True)])
    return {
        "tokens": len(losses),
        "same_top": sum(int((before.top == after.top).sum()) for before, after in zip(model, file, strict=True)),
        "logprob_loss": float(losses.mean()),
        "mean_difference": float(losses.abs().mean()),
    }


def _differences(one: Sequence[TokenScores], other: Sequence[TokenScores]) -> torch.Tensor:
    return torch.cat([(a.log_probs - b.log_probs).abs() for a, b in zip(one, other, strict=True)])


def _refused(why: str) -> WorkError:
    return WorkError(f"The merged model is not the trained one and is not registered: {why}.")
