"""Makes pairs of a record that has several answers to one question."""

from __future__ import annotations

from typing import Any

from llm_engineering.data.formats.conversations import BadRowError, from_json

# Columns that hold several answers to one question. Without scores, those of the first three are in order, the best one
# first, as LLaMA-Factory writes them.
_ORDERED = ("output", "response", "answer")
_SEVERAL = (*_ORDERED, "completion", "outputs", "responses", "answers", "completions")
# Columns of a number for each answer, and keys of it beside an answer, with 1 if more is better and -1 for a rank.
_SCORES = {"scores": 1, "ratings": 1, "rewards": 1, "ranks": -1}
_SCORE = {"score": 1, "overall_score": 1, "rating": 1, "reward": 1, "rank": -1}
_DECODED = {"outputs", "responses", "answers", "completions", *_SCORES}
_TEXT = ("text", "answer", "response", "content", "output", "completion")


def as_pairs(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A record with several answers as one record for each pair; a list of the record itself if it has no such answers.

    The best answer is the chosen one, and each answer with a lower score is once the rejected one. `chosen` and `rejected`
    may also be lists of texts: each text of the one is paired with each of the other.

    Raises:
        BadRowError: `equal_scores`: no answer is worse than another.
    """
    if value.get("chosen") is not None and value.get("rejected") is not None:
        chosen, rejected = _texts(value["chosen"]), _texts(value["rejected"])
        return [{**value, "chosen": one, "rejected": other} for one in chosen for other in rejected]
    # One answer may itself be the JSON text of a list, so only the columns of several answers are decoded.
    value = {name: from_json(content) if name in _DECODED else content for name, content in value.items()}
    name = next((name for name in _SEVERAL if isinstance(value.get(name), list)), None)
    if name is None:
        return [value]
    scored = _scored(value, name)
    if len(scored) < 2:
        return [value]
    scored.sort(key=lambda answer: -answer[1])
    rest = {key: content for key, content in value.items() if key != name and key not in _SCORES}
    pairs = [
        {**rest, "chosen": scored[0][0], "rejected": answer} for answer, score in scored[1:] if score < scored[0][1]
    ]
    if not pairs:
        raise BadRowError("equal_scores", f"its {len(scored)} answers have the same score, so none is a rejected one")
    return pairs


def _scored(value: dict[str, Any], name: str) -> list[tuple[str, float]]:
    """The answers of a column with their scores, more being better; empty if they are no texts or have no order."""
    answers = value[name]
    if all(isinstance(answer, dict) for answer in answers):
        text, score = (next((k for k in keys if all(k in a for a in answers)), "") for keys in (_TEXT, _SCORE))
        pairs = [(answer.get(text), answer.get(score)) for answer in answers]
        sign = _SCORE.get(score, 1)
    else:
        column = next((column for column in _SCORES if isinstance(value.get(column), list)), "")
        scores = value[column] if column else [-n for n in range(len(answers))] if name in _ORDERED else []
        pairs = list(zip(answers, scores, strict=True)) if len(scores) == len(answers) else []
        sign = _SCORES.get(column, 1)
    if not all(isinstance(text, str) and isinstance(score, int | float) for text, score in pairs):
        return []
    return [(text, sign * score) for text, score in pairs]


def _texts(value: Any) -> list[Any]:
    """The texts of a list of texts; a list of the value itself if it is anything else."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    return list(value) if is_list else [value]
