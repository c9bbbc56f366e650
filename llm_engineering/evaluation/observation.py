"""Observes one model: its scores of held-out answers, its own answers, and its results on lm-eval's tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from llm_engineering.data.rows import InstructionRow
from llm_engineering.evaluation.checks import Check
from llm_engineering.evaluation.heldout import HeldOut, HeldOutRow, RowT
from llm_engineering.evaluation.lm_eval_tasks import TaskResults, run_tasks
from llm_engineering.evaluation.measures import (
    AnswerScore,
    Labelled,
    Models,
    Sample,
    heldout_loss,
    preference_accuracy,
    preference_margin,
    question_gain,
    with_other_questions,
)
from llm_engineering.evaluation.statistics import Rows
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig

# Scripts that put no space between words count by the character, as is usual for them: kana, and Chinese characters.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
NGRAM = 4


class _Words(Tokenizer):  # type: ignore[misc]
    """Words of any script. The library's own tokenizer knows only a to z and 0 to 9."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 over the longest common subsequence of words, from 0 to 1, by the library rouge-score."""
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's token 4-grams that repeat an earlier one: seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319).

    0 for an answer of fewer than four tokens.
    """
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Work(NamedTuple):
    """What every model is asked to do.

    Attributes:
        ours: the held-out rows as this recipe renders them.
        places: of the rows that are answered.
        checks: the user's own, perhaps none.
    """

    ours: HeldOut
    places: Sequence[int]
    checks: Sequence[Check]

    @property
    def asked(self) -> list[InstructionRow]:
        """The rows that are answered."""
        return [self.ours.rows[place].row for place in self.places]


@dataclass(frozen=True)
class Observation:
    """What one model did.

    Attributes:
        rows: by measure, the value on each row.
        answers: to the rows at the work's places.
        check_answers: to the checks' prompts.
        tasks: lm-eval's results; None without tasks.
    """

    rows: dict[str, Rows]
    answers: list[Sample]
    check_answers: list[str]
    tasks: TaskResults | None


def observe(
    models: Models, name: str, shown_as: str, given: HeldOut, work: Work, config: EvaluationConfig, seed: int
) -> Observation:
    """Let a model do all of the work.

    Args:
        name, shown_as: the model's name among `models`, and in the report.
        given: the held-out rows as this model's tokenizer renders them.
    """
    rows: dict[str, Rows] = {}
    scores = _scores(models, name, given.rows, work.ours.rows, 0, f"held-out rows, {shown_as}")
    rows["heldout_loss"] = rows["perplexity"] = heldout_loss(scores)
    ways = with_other_questions([row.answers[0] for row in given.rows])
    if ways:
        what = f"held-out answers after other questions, {shown_as}"
        rows["question_gain"] = question_gain(scores, [models.scores(name, moved, what) for moved in ways])
    if given.pairs:
        chosen, rejected = (
            _scores(models, name, given.pairs, work.ours.pairs, place, f"{answer} answers, {shown_as}")
            for place, answer in enumerate(("chosen", "rejected"))
        )
        rows["preference_accuracy"] = preference_accuracy(chosen, rejected)
        rows["preference_margin"] = preference_margin(chosen, rejected)
    asked = [given.rows[place] for place in work.places]
    prompts = [row.row.prompt for row in asked]
    answers = models.answers(name, prompts, config.max_new_tokens, f"answers, {shown_as}")
    rows |= _behaviour(answers, asked)
    messages = [check.messages for check in work.checks]
    said = models.answers(name, messages, config.max_new_tokens, f"own check, {shown_as}") if messages else []
    check_answers = [sample.text for sample in said]
    if work.checks:
        passed = [not check.failures(text) for check, text in zip(work.checks, check_answers, strict=True)]
        rows["checks"] = Rows.of(passed)
    tasks = None
    if config.lm_eval is not None:
        with models.use(name) as model:
            tasks = run_tasks(model, models.tokenizer, config.lm_eval, config.batch_size, seed)
    return Observation(rows, answers, check_answers, tasks)


def _behaviour(answers: Sequence[Sample], asked: Sequence[HeldOutRow[InstructionRow]]) -> dict[str, Rows]:
    texts = [row.row.completion[0].content for row in asked]
    return {
        "rouge_l": Rows.of([rouge_l(answer.text, text) for answer, text in zip(answers, texts, strict=True)]),
        "stopped": Rows.of([answer.stopped for answer in answers]),
        "repetition": Rows.of([repetition(answer.ids) for answer in answers]),
        "length_ratio": Rows.of(
            [len(answer.ids) for answer in answers], [_first_answer_tokens(row.answers[0]) for row in asked]
        ),
        "empty": Rows.of([not answer.text for answer in answers]),
    }


def _scores(
    models: Models,
    name: str,
    given: Sequence[HeldOutRow[RowT]],
    ours: Sequence[HeldOutRow[RowT]],
    place: int,
    what: str,
) -> list[AnswerScore]:
    """Scores of the rows' answers at a place, a token being one of this recipe's tokenizer for every model.

    The log-probability of a text is comparable between tokenizers; its share for each of their tokens is not.
    """
    scores = models.scores(name, [row.answers[place] for row in given], what)
    return [
        AnswerScore(score.log_prob, _scored_tokens(row.answers[place])) for score, row in zip(scores, ours, strict=True)
    ]


def _scored_tokens(labelled: Labelled) -> int:
    # The first token follows nothing, so that no model can say it.
    return sum(label != IGNORE_INDEX for label in labelled[1][1:])


def _first_answer_tokens(labelled: Labelled) -> int:
    labels = labelled[1]
    start = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    return next((i - start for i in range(start, len(labels)) if labels[i] == IGNORE_INDEX), len(labels) - start)
