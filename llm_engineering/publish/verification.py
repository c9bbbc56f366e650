"""Holds the saved form of a model to the trained one on held-out rows, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from llm_engineering.errors import WorkError
from llm_engineering.formatting.render import IGNORE_INDEX

# Nats: the same sums in another order differ by less in float32, and any mistake of a merge by more.
TOLERANCE = 0.001
# Of what training changed, rounding to half precision may lose at most this share on average. bfloat16 keeps 8 bits: an
# adapter on the default model loses 0.04. Without the adapter it is 1.
MAX_LOST_SHARE = 0.1


class HeldoutRow(NamedTuple):
    """A formatted row: token ids, and labels of the same length that are -100 where nothing is compared."""

    id: str
    input_ids: list[int]
    labels: list[int]


class TokenScores(NamedTuple):
    """What a model says at each answer token of a row; tensors of shape `(answer tokens,)`.

    Attributes:
        log_probs: of the row's own token, in nats.
        top: id of the most probable token.
        lead: log-probability of the most probable token above that of the next one, in nats.
    """

    log_probs: torch.Tensor
    top: torch.Tensor
    lead: torch.Tensor


class Verification(BaseModel):
    """What a comparison found.

    Attributes:
        dtype: of the saved weights.
        same_top: tokens at which both have the same most probable token.
        mean_difference, largest_difference: of log-probabilities, absolute, in nats a token.
        mean_training_effect: the same between the base and the trained model.
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
        """The figures for people."""
        cost = "" if self.dtype == "float32" else ": this is what rounding costs, and float32 would not"
        return (
            f"saved in {self.dtype}, {self.same_top} of {self.tokens} answer tokens of {self.rows} held-out rows have "
            f"the same most probable token as the trained model; log-probabilities differ by "
            f"{self.mean_difference:.4f} nats on average and {self.largest_difference:.4f} at most (training moved "
            f"them by {self.mean_training_effect:.3f} on average){cost}"
        )


def precision(dtype: torch.dtype) -> str:
    """Its name, as recipes and files have it."""
    return str(dtype).removeprefix("torch.")


def token_scores(model: PreTrainedModel | PeftModel, rows: Sequence[HeldoutRow]) -> list[TokenScores]:
    """Score the labelled tokens of each row, a row at a time, so that padding plays no part."""
    scores = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.input_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
            labels = torch.tensor(row.labels[1:])
            answer = labels != IGNORE_INDEX
            log_probs = torch.log_softmax(logits[answer], dim=-1)
            best = log_probs.topk(2, dim=-1)
            own = log_probs.gather(1, labels[answer].unsqueeze(1)).squeeze(1)
            scores.append(TokenScores(own, best.indices[:, 0], best.values[:, 0] - best.values[:, 1]))
    return scores


def check_same(rows: Sequence[HeldoutRow], trained: Sequence[TokenScores], other: Sequence[TokenScores]) -> None:
    """Whether two models are the same one, both computed in float32.

    Every log-probability must agree within `TOLERANCE`, and every most probable token must be the same; where the
    trained model itself puts two tokens nearer to each other than that, either.

    Raises:
        WorkError: says which row differs at which token, and by how much.
    """
    for row, ours, theirs in zip(rows, trained, other, strict=True):
        # A number that is none is as far away as can be.
        difference = (ours.log_probs - theirs.log_probs).abs().nan_to_num(nan=torch.inf)
        at = int(difference.argmax())
        if difference[at] > TOLERANCE:
            raise _refused(
                f"on held-out row {row.id} the log-probability of answer token {at + 1} is {difference[at]:.3f} nats "
                f"off the trained model's, and {TOLERANCE:g} is allowed"
            )
        lost = (ours.top != theirs.top) & (ours.lead > TOLERANCE)
        if lost.any():
            at = int(lost.int().argmax())
            raise _refused(
                f"on held-out row {row.id} another token than the trained model's is the most probable one at answer "
                f"token {at + 1}, where that leads by {ours.lead[at]:.3f} nats"
            )


def verify(
    rows: Sequence[HeldoutRow],
    trained: Sequence[TokenScores],
    saved: Sequence[TokenScores],
    untrained: Sequence[TokenScores],
    dtype: torch.dtype,
) -> Verification:
    """Compare the scores of the saved model with those of the trained one, all computed in float32.

    Saved in float32 it must be the same model. What half precision costs is measured, and must be below
    `MAX_LOST_SHARE` of what training changed.

    Args:
        untrained: the scores of the base model.
        dtype: precision of the saved weights.

    Raises:
        WorkError: says by how much they differ.
    """
    if dtype == torch.float32:
        check_same(rows, trained, saved)
    differences = _differences(trained, saved)
    mean = float(differences.mean())
    effect = float(_differences(trained, untrained).mean())
    # Where weights are too large for float16 the mean is no number, which is below nothing.
    if dtype != torch.float32 and not mean <= MAX_LOST_SHARE * effect:
        raise _refused(
            f"rounding to {precision(dtype)} moves log-probabilities by {mean:.2g} nats on average, and all of training "
            f"moved them by {effect:.2g}. With --set compute.dtype=float32 nothing is lost"
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


def _differences(one: Sequence[TokenScores], other: Sequence[TokenScores]) -> torch.Tensor:
    return torch.cat([(a.log_probs - b.log_probs).abs() for a, b in zip(one, other, strict=True)])


def _refused(why: str) -> WorkError:
    return WorkError(f"The merged model is not the trained one and is not registered: {why}.")
