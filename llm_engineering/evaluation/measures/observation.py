"""The measures of one model: likelihoods of held-out answers, properties of its own answers, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from llm_engineering.data.rows import InstructionRow, PromptRow, is_blank, words
from llm_engineering.evaluation.heldout import HeldOut, HeldOutRow, RowT
from llm_engineering.evaluation.measures.canaries import Canary, completed
from llm_engineering.evaluation.measures.checks import Check
from llm_engineering.evaluation.measures.exam import Exam, by_document, take_exam
from llm_engineering.evaluation.measures.lm_eval_tasks import TaskResults, run_tasks
from llm_engineering.evaluation.models import AnswerScore, Labelled, Models, Sample
from llm_engineering.evaluation.statistics import Rows
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models.generate import context_length
from llm_engineering.recipe.evaluation_blocks import REWARD, REWARD_PREFIX, EvaluationConfig
from llm_engineering.training.rewards import Completion, Reward, weighted_sums

NGRAM = 4


class _Words(Tokenizer):  # type: ignore[misc]
    """Splits text of any script into words. The library's own tokenizer keeps only a to z and 0 to 9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.replace("_", " "))


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) by the library rouge-score: F1 over the longest common subsequence of words, from 0 to 1."""
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)


def repetition(ids: Sequence[int]) -> float:
    """The share of an answer's token 4-grams that occurred before: seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319).

    It is 0 for an answer of fewer than four tokens.
    """
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def heldout_loss(scores: Sequence[AnswerScore]) -> Rows:
    """The negative log-probability of the answers, in nats per token. Each token has the same weight."""
    return Rows.of([-score.log_prob for score in scores], [score.tokens for score in scores])


def question_gain(own: Sequence[AnswerScore], others: Sequence[Sequence[AnswerScore]]) -> Rows:
    """How much likelier an answer is after its own question than after other rows' questions, in nats per token.

    This is pointwise mutual information (Church and Hanks 1990), estimated with other rows' questions in place of all
    questions. It falls if a model learns the style of the answers, but not which answer belongs to which question.

    Args:
        own: scores of the answers after their own questions.
        others: scores after other questions, for each list of rows that `with_other_questions` returns.
    """
    gains = [
        score.log_prob - sum(other[index].log_prob for other in others) / len(others) for index, score in enumerate(own)
    ]
    return Rows.of(gains, [score.tokens for score in own])


def with_other_questions(rows: Sequence[Labelled], limit: int | None = None) -> list[list[Labelled]]:
    """The rows with other rows' questions: up to three lists, each with all rows.

    A question that does not fit into the context beside the answer loses its beginning.

    The questions come from rows at a distance of a quarter, a half and three quarters of all rows, because neighbouring
    rows are often of the same document.

    Args:
        limit: tokens of the model's context; None if it has no limit.
    """
    borders = [next(index for index, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in rows]
    shifted = []
    for shift in sorted({len(rows) * quarter // 4 for quarter in (1, 2, 3)} - {0}):
        combined = []
        for index, ((ids, labels), border) in enumerate(zip(rows, borders, strict=True)):
            other = (index + shift) % len(rows)
            question = rows[other][0][: borders[other]]
            if limit is not None:
                question = question[max(0, len(question) + len(ids) - border - limit) :]
            combined.append(([*question, *ids[border:]], [IGNORE_INDEX] * len(question) + labels[border:]))
        shifted.append(combined)
    return shifted


def preference_accuracy(chosen: Sequence[AnswerScore], rejected: Sequence[AnswerScore]) -> Rows:
    """1 for each pair whose chosen answer has the higher mean log-probability per token, else 0. Needs no reference model."""
    return Rows.of([c.mean > r.mean for c, r in zip(chosen, rejected, strict=True)])


def preference_margin(chosen: Sequence[AnswerScore], rejected: Sequence[AnswerScore]) -> Rows:
    """Each pair's mean log-probability per token of the chosen answer minus that of the rejected one, in nats."""
    return Rows.of([c.mean - r.mean for c, r in zip(chosen, rejected, strict=True)])


class Work(NamedTuple):
    """The work that every model does.

    Attributes:
        ours: the held-out rows, rendered by this recipe.
        indices: the rows that the models answer.
        checks: the user's own checks; may be empty.
        canaries: planted secrets; may be empty.
        exam: the questions about the documents; None if the recipe has no exam.
        retrieving: the models that take the exam also with passages of the documents.
        unexamined: the models that take no exam.
        prompts: prompts with their formatted records, whose answers the rewards score.
        rewards: those of the last stage on rewards; may be empty.
        max_completion_length: the longest answer to a prompt, in tokens.
    """

    ours: HeldOut
    indices: Sequence[int]
    checks: Sequence[Check]
    exam: Exam | None = None
    retrieving: frozenset[str] = frozenset()
    unexamined: frozenset[str] = frozenset()
    prompts: Sequence[tuple[PromptRow, Mapping[str, Any]]] = ()
    rewards: Sequence[Reward] = ()
    max_completion_length: int = 0
    canaries: Sequence[Canary] = ()

    @property
    def asked(self) -> list[InstructionRow]:
        """The rows that the models answer."""
        return [self.ours.rows[index].row for index in self.indices]


@dataclass(frozen=True)
class Observation:
    """The results of one model.

    Attributes:
        rows: the values on each row, by measure.
        answers: the answers to the rows at the work's indices.
        check_answers: the answers to the prompts of the checks.
        tasks: the results of lm-eval; None if the recipe has no tasks.
        exam: the answers to the exam, of the model and perhaps of the model with retrieval, by name.
        rewarded: the answers to the work's prompts.
    """

    rows: dict[str, Rows]
    answers: list[Sample]
    check_answers: list[str]
    tasks: TaskResults | None
    exam: dict[str, dict[int, Sample]]
    rewarded: list[Sample]


def observe(
    models: Models, name: str, shown_as: str, given: HeldOut, work: Work, config: EvaluationConfig, seed: int
) -> Observation:
    """Have one model do the work.

    Args:
        name: the model's name among `models`.
        shown_as: its name in the report and in progress lines.
        given: the held-out rows, rendered by this model's tokenizer.
    """
    rows: dict[str, Rows] = {}
    if given.texts:
        documents = by_document([text.row for text in given.texts])
        scores = _document_scores(models, name, given, work.ours, shown_as)
        rows["document_loss"] = heldout_loss(scores).in_clusters(documents)
    others: list[list[Labelled]] = []
    if given.rows:
        scores = _scores(models, name, given.rows, work.ours.rows, 0, f"held-out rows, {shown_as}")
        documents = by_document([row.row for row in given.rows])
        rows["heldout_loss"] = rows["perplexity"] = heldout_loss(scores).in_clusters(documents)
        others = with_other_questions([row.answers[0] for row in given.rows], context_length(models.model))
    # With a single row there is no other question.
    if others:
        title = f"held-out answers after other questions, {shown_as}"
        other_scores = [models.scores(name, combined, title) for combined in others]
        rows["question_gain"] = question_gain(scores, other_scores).in_clusters(documents)
    if given.pairs:
        chosen, rejected = (
            _scores(models, name, given.pairs, work.ours.pairs, index, f"{answer} answers, {shown_as}")
            for index, answer in enumerate(("chosen", "rejected"))
        )
        documents = by_document([row.row for row in given.pairs])
        rows["preference_accuracy"] = preference_accuracy(chosen, rejected).in_clusters(documents)
        rows["preference_margin"] = preference_margin(chosen, rejected).in_clusters(documents)
    asked = [given.rows[index] for index in work.indices]
    prompts = [row.row.prompt for row in asked]
    answers = models.answers(name, prompts, config.max_new_tokens, f"answers, {shown_as}")
    if asked:
        documents = by_document([row.row for row in asked])
        rows |= {key: found.in_clusters(documents) for key, found in _behaviour(answers, asked).items()}
    rewarded: list[Sample] = []
    if work.prompts:
        prompts = [row.prompt for row, _ in work.prompts]
        rewarded = models.answers(name, prompts, work.max_completion_length, f"answers to prompts, {shown_as}")
        rows |= _rewards(rewarded, work, given is work.ours)
    check_answers: list[str] = []
    if work.checks:
        prompts = [check.messages for check in work.checks]
        samples = models.answers(name, prompts, config.max_new_tokens, f"own checks, {shown_as}")
        check_answers = [sample.text for sample in samples]
        rows["checks"] = Rows.of(
            [not check.failures(text) for check, text in zip(work.checks, check_answers, strict=True)]
        )
    if work.canaries:
        rows["canaries"] = Rows.of(completed(models, name, work.canaries, f"canaries, {shown_as}"))
    tasks = None
    if config.lm_eval is not None:
        with models.use(name) as model:
            tasks = run_tasks(model, models.tokenizer, config.lm_eval, config.batch_size, seed)
    taken = {}
    if work.exam is not None and shown_as not in work.unexamined:
        taken = take_exam(models, name, shown_as, work.exam, shown_as in work.retrieving)
    return Observation(rows, answers, check_answers, tasks, taken, rewarded)


def _rewards(answers: Sequence[Sample], work: Work, own_tokens: bool) -> dict[str, Rows]:
    """The weighted sum of the rewards of each answer, and each single reward.

    Args:
        own_tokens: whether the model that answered has this recipe's tokenizer.
    """
    completions = [
        Completion(answer.text, answer.stopped, len(answer.ids), answer.ids if own_tokens else None)
        for answer in answers
    ]
    sums, scores = weighted_sums(work.rewards, [record for _, record in work.prompts], completions)
    documents = by_document([row for row, _ in work.prompts])
    values = {REWARD: sums, **{REWARD_PREFIX + name: found for name, found in scores.items()}}
    return {measure: Rows.of(found).in_clusters(documents) for measure, found in values.items()}


def _behaviour(answers: Sequence[Sample], asked: Sequence[HeldOutRow[InstructionRow]]) -> dict[str, Rows]:
    """The measures of a model's own answers to the rows that it was asked."""
    texts = [row.row.completion[0].content for row in asked]
    return {
        "rouge_l": Rows.of([rouge_l(answer.text, text) for answer, text in zip(answers, texts, strict=True)]),
        "stopped": Rows.of([answer.stopped for answer in answers]),
        "repetition": Rows.of([repetition(answer.ids) for answer in answers]),
        "length_ratio": Rows.of(
            [len(answer.ids) for answer in answers], [_first_answer_tokens(row.answers[0]) for row in asked]
        ),
        "empty": Rows.of([is_blank(answer.text) for answer in answers]),
    }


def _scores(
    models: Models,
    name: str,
    given: Sequence[HeldOutRow[RowT]],
    ours: Sequence[HeldOutRow[RowT]],
    answer: int,
    title: str,
) -> list[AnswerScore]:
    """Score one answer of each row, with token counts of this recipe's tokenizer for every model.

    The log-probability of a text is comparable between tokenizers, but the number of tokens that it is divided by is not.

    Args:
        answer: index of the answer within a row: 0, or for the rejected answer of a pair 1.
    """
    scores = models.scores(name, [row.answers[answer] for row in given], title)
    return [
        AnswerScore(score.log_prob, _scored_tokens(row.answers[answer]))
        for score, row in zip(scores, ours, strict=True)
    ]


def _document_scores(models: Models, name: str, given: HeldOut, ours: HeldOut, shown_as: str) -> list[AnswerScore]:
    """Score each held-out document: the sum over its pieces, with token counts of this recipe's tokenizer."""
    parts = [piece for text in given.texts for piece in text.answers]
    scores = iter(models.scores(name, parts, f"held-out documents, {shown_as}"))
    return [
        AnswerScore(sum(next(scores).log_prob for _ in text.answers), sum(map(_scored_tokens, own.answers)))
        for text, own in zip(given.texts, ours.texts, strict=True)
    ]


def _scored_tokens(labelled: Labelled) -> int:
    # The first token has no token before it that could predict it, so no model scores it.
    return sum(label != IGNORE_INDEX for label in labelled[1][1:])


def _first_answer_tokens(labelled: Labelled) -> int:
    """The length of the first answer of a conversation, in tokens."""
    labels = labelled[1]
    start = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return next((i - start for i in range(start, len(labels)) if labels[i] == IGNORE_INDEX), len(labels) - start)
