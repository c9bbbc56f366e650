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

# Nats, by the precision of the saved weights: what rounding them once may move the log-probability of a token by.
# bfloat16 keeps 8 bits: with an adapter on the default model it moves 1,096 tokens by 0.06 on average and 0.7 at most,
# and changes the order of two tokens that are up to 0.4 apart. float16 keeps 11, and float32 changes nothing.
TOLERANCE = {torch.float32: 0.001, torch.float16: 0.2, torch.bfloat16: 1.5}
# Of what training changed, at most this share may be lost on average: there it is 0.04, without the adapter 1.
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
        same_top: tokens at which both have the same most probable token; at the others, the trained model's own lead
            was within the tolerance.
        mean_difference, largest_difference: of log-probabilities, absolute, in nats a token.
        mean_training_effect: the same between the base and the trained model; None for a full model, whose base is not
            part of it.
    """

    model_config = ConfigDict(frozen=True)

    dtype: str
    rows: int
    tokens: int
    same_top: int
    mean_difference: float
    largest_difference: float
    mean_training_effect: float | None

    @property
    def sentence(self) -> str:
        """The figures for people."""
        effect = "" if self.mean_training_effect is None else f" (training moved it by {self.mean_training_effect:.3f})"
        return (
            f"{self.same_top} of {self.tokens} answer tokens of {self.rows} held-out rows have the same most probable "
            f"token, at the others two are as good as equal; log-probabilities differ by {self.mean_difference:.4f} "
            f"nats on average{effect}, at most by {self.largest_difference:.4f}, saved in {self.dtype}"
        )


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


def verify(
    rows: Sequence[HeldoutRow],
    trained: Sequence[TokenScores],
    saved: Sequence[TokenScores],
    dtype: torch.dtype,
    untrained: Sequence[TokenScores] | None = None,
) -> Verification:
    """Compare the scores of the saved model with those of the trained one, both computed in float32.

    Log-probabilities must agree within `TOLERANCE`, and the most probable token must be the same unless the trained
    model itself puts two tokens nearer to each other than that. Where `untrained` is given, the scores of the base model, the
    mean difference must also be below `MAX_LOST_SHARE` of what training changed.

    Args:
        dtype: precision of the saved weights.

    Raises:
        WorkError: says which row differs at which token, and by how much.
    """
    precision = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[dtype]
    for row, ours, theirs in zip(rows, trained, saved, strict=True):
        # A number that is none is as far away as can be.
        difference = (ours.log_probs - theirs.log_probs).abs().nan_to_num(nan=torch.inf)
        at = int(difference.argmax())
        if difference[at] > tolerance:
            raise _refused(
                f"on held-out row {row.id} the log-probability of answer token {at + 1} is {difference[at]:.3f} nats "
                f"off the trained model's, and {precision} weights explain {tolerance:g}"
            )
        lost = (ours.top != theirs.top) & (ours.lead > tolerance)
        if lost.any():
            at = int(lost.int().argmax())
            raise _refused(
                f"on held-out row {row.id} another token than the trained model's is the most probable one at answer "
                f"token {at + 1}, where that leads by {ours.lead[at]:.3f} nats, and {precision} weights explain "
                f"{tolerance:g}"
            )
    differences = _differences(trained, saved)
    mean = float(differences.mean())
    effect = None if untrained is None else float(_differences(trained, untrained).mean())
    if effect is not None and mean > MAX_LOST_SHARE * effect:
        raise _refused(
            f"saving in {precision} moves log-probabilities by {mean:.2g} nats on average, and all of training moved "
            f"them by {effect:.2g}: too much of it is rounded away"
        )
    return Verification(
        dtype=precision,
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
    return WorkError(
        f"The merged model is not the trained one and is not registered: {why}. If the weights' precision is the "
        "cause, --set compute.dtype=float32 shows it."
    )
