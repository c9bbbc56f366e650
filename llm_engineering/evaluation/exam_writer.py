"""Writes an exam about the user's documents, in wordings that are left out of training.

A writer that continues texts has written several questions about each fact, so one wording is held out of training. Of
passages, an endpoint copies the words of a fact, and writes a question that these words answer.

Each question is then asked of the writer twice. It is kept if the writer answers it right with the passage, and wrong without:
otherwise the question does not fit its answer, or it can be answered without the documents.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from llm_engineering.data.exam_answers import answers_right
from llm_engineering.data.rows import QUOTED_CHARS, REPLAY, InstructionRow, Quarantined, normalised, split_key, split_of
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.sentences import FUNCTION_WORDS, sentences
from llm_engineering.evaluation.measures.exam import ExamRow, cluster_numbers
from llm_engineering.generation.abstention import NAME, unanswerable
from llm_engineering.generation.facts import OPENING_WORDS
from llm_engineering.generation.instructions import instruction_problem
from llm_engineering.generation.prompts import ANSWER_EXAMPLES, read_prompt
from llm_engineering.generation.types import Answer, Client, Completer, Failure, Sampling
from llm_engineering.recipe.data_blocks import SplitConfig
from llm_engineering.recipe.evaluation_blocks import MIN_QUESTIONS, ExamConfig
from llm_engineering.recipe.generation_blocks import InstructionWriting

# At most one of this many rows is held out, so that most wordings of small datasets are still trained.
_ROWS_OF_A_QUESTION = 4
# One unanswerable question for this many others.
_OTHERS_OF_AN_UNANSWERABLE = 5
# Longer answers are seldom repeated word for word, also by a model that knows them.
_ANSWER_WORDS = 6
# Shorter words of a question say little about its wording, and so do those that say what kind of answer is asked for.
_LONG = 4
_KIND_WORDS = OPENING_WORDS | {"place"}


class WrittenExam(NamedTuple):
    """The questions of an exam, those that were set aside, and how many questions there were in all."""

    rows: list[ExamRow]
    quarantine: list[Quarantined]
    read: int


class _Draft(NamedTuple):
    """A question about a passage, and the words of the passage that answer it. Both are empty before they are written."""

    passage: Passage
    question: str = ""
    answer: str = ""


def write_exam(
    rows: Sequence[InstructionRow],
    passages: Sequence[Passage],
    client: Client,
    writing: InstructionWriting,
    exam: ExamConfig,
    split: SplitConfig,
    seed: int,
) -> WrittenExam:
    """Write up to `exam.questions` questions about facts of training documents, and a fifth as many unanswerable ones.

    The order in which facts are asked for depends on the seed and on each question alone. So an exam about more documents has
    many of the same questions, and asks few that an earlier model was trained on.

    With fewer than `MIN_QUESTIONS` questions about facts there is no exam, and all of them are set aside.

    Args:
        rows: the instructions that were written from the passages, and general ones.
        passages: the passages from which the rows were written.
    """
    written = [row for row in rows if row.origin != REPLAY]
    trained = [row for row in written if split_of(split_key(row), split) == "train"]
    questions = {normalised(row.prompt[0].content) for row in written}
    writer = _Writer(client, writing.question_max_new_tokens, exam.max_new_tokens, seed)
    is_written = writing.questions == "fact"
    if is_written:
        waiting = deque(_held_out(trained, passages, seed))
        most = min(exam.questions, len(written) // _ROWS_OF_A_QUESTION)
    else:
        waiting = deque([_Draft(passage)] for passage in _trained_passages(trained, passages, writing, seed))
        most = exam.questions
    kept: list[_Draft] = []
    quarantine: list[Quarantined] = []
    # As many facts as questions are missing are asked for at once, so that no question is checked in vain.
    while waiting and len(kept) < most:
        facts = [waiting.popleft() for _ in range(min(most - len(kept), len(waiting)))]
        drafts = [fact[0] for fact in facts]
        problems: list[Failure | None] = [None] * len(drafts)
        if not is_written:
            drafts, problems = writer.write(drafts, questions)
            questions |= {normalised(draft.question) for draft in drafts}
        problems = writer.check(drafts, problems)
        for fact, draft, problem in zip(facts, drafts, problems, strict=True):
            if problem is None:
                kept.append(draft)
                continue
            quarantine.append(_set_aside(draft, problem.reason, problem.detail))
            # Another wording of the fact may pass.
            waiting += [fact[1:]] if len(fact) > 1 else []
    if len(kept) < MIN_QUESTIONS:
        detail = f"{len(kept)} questions are left, and an exam needs {MIN_QUESTIONS}"
        quarantine += [_set_aside(draft, "too_few_questions", detail) for draft in kept]
        return WrittenExam([], quarantine, len(quarantine))
    made = [
        ExamRow(
            id=f"generated {number}",
            question=draft.question,
            answers=[draft.answer],
            facts=_names(draft),
            documents=[draft.passage.document],
            evidence=_evidence(draft),
        )
        for number, draft in enumerate(kept, 1)
    ]
    number = len(kept) // _OTHERS_OF_AN_UNANSWERABLE
    # Another seed than that of the pairs for DPO, so that the exam has no share of their questions.
    without = unanswerable(written, [passage.text for passage in passages], number, seed + 1)
    made += [
        ExamRow(id=f"unanswerable {number}", question=question, kind="unanswerable")
        for number, question in enumerate(without, 1)
    ]
    return WrittenExam(made, quarantine, len(made) + len(quarantine))


def _held_out(rows: Sequence[InstructionRow], passages: Sequence[Passage], seed: int) -> list[list[_Draft]]:
    """For each fact with several wordings, those that may be held out, in the order of their hashes.

    Questions are about the same fact if they have the same answer and the same passage, or the same answer and the same names.
    A wording that differs from another one in its first words alone is not held out: "Which person built it?" is no test for a
    model that was trained on "Who built it?".
    """
    of_source: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        of_source[passage.source].append(passage)
    drafts = [
        _Draft(stating, row.prompt[0].content, row.completion[0].content)
        for row in rows
        if (stating := _stating(row, of_source[row.source])) is not None
    ]
    keys = [
        [(normalised(draft.answer), draft.passage.id), (normalised(draft.answer), frozenset(_names(draft)))]
        for draft in drafts
    ]
    facts: dict[int, list[_Draft]] = defaultdict(list)
    for draft, fact in zip(drafts, cluster_numbers(keys), strict=True):
        facts[fact].append(draft)
    chosen = []
    for wordings in facts.values():
        counts = Counter(_wording(draft.question) for draft in wordings)
        others = [draft for draft in wordings if len(counts) > 1 and counts[_wording(draft.question)] == 1]
        if others:
            chosen.append(sorted(others, key=lambda draft: _order(normalised(draft.question), seed)))
    return sorted(chosen, key=lambda wordings: _order(normalised(wordings[0].question), seed))


def _stating(row: InstructionRow, passages: Sequence[Passage]) -> Passage | None:
    """The passage that a question was written from. Several sentences of a page have the same source."""
    answer, asked = row.completion[0].content, set(normalised(row.prompt[0].content).split())
    stating = [passage for passage in passages if answer in passage.text]
    return max(stating, key=lambda passage: len(asked & set(normalised(passage.text).split())), default=None)


def _wording(question: str) -> frozenset[str]:
    """The longer words of a question, without those that say what kind of answer is asked for."""
    words = normalised(question).split()
    return frozenset(
        word for word in words if len(word) >= _LONG and word not in FUNCTION_WORDS and word not in _KIND_WORDS
    )


def _names(draft: _Draft) -> list[str]:
    """Names for the fact of a question. Questions with the same answer about the same thing share one."""
    names = sorted(set(NAME.findall(draft.question))) or [draft.passage.document]
    return [f"{name}: {draft.answer}" for name in names]


def _evidence(draft: _Draft) -> str:
    """The sentence of the passage that has the answer, as it stands there."""
    text = draft.passage.text
    spans = [text[one.start : one.end] for one in sentences(text, with_headings=False)]
    return next((span for span in spans if draft.answer in span), text)


def _trained_passages(
    rows: Sequence[InstructionRow], passages: Sequence[Passage], writing: InstructionWriting, seed: int
) -> list[Passage]:
    """The passages of which a row is trained, in the order of their hashes."""
    sources, answers = {row.source for row in rows}, {row.completion[0].content for row in rows}
    trained = [p for p in passages if p.source in sources and (writing.answers == "model" or p.text in answers)]
    return sorted(trained, key=lambda passage: _order(passage.id, seed))


class _Writer(NamedTuple):
    """The client of the generation, which writes and answers questions of the exam."""

    client: Client
    question_max_new_tokens: int
    exam_max_new_tokens: int
    seed: int

    def write(self, drafts: Sequence[_Draft], taken: Collection[str]) -> tuple[list[_Draft], list[Failure | None]]:
        """Write a question about a fact of each passage, and say why it is unusable; None if it is usable.

        Args:
            taken: normalised questions that are not written, because a row that asks the same is left out of training, and its
                passage may have no other.
        """
        drafts = list(drafts)
        problems: list[Failure | None] = [None] * len(drafts)
        requests = [_request("exam_fact_endpoint", draft) for draft in drafts]
        for number, answer in enumerate(self._reply(requests, "answer", "facts for the exam")):
            drafts[number] = drafts[number]._replace(answer=answer.text)
            problems[number] = _answer_problem(answer, drafts[number].passage)
        left = [number for number, problem in enumerate(problems) if problem is None]
        requests = [_request("exam_question_endpoint", drafts[number]) for number in left]
        seen = set(taken)
        for number, question in zip(left, self._reply(requests, "question", "questions for the exam"), strict=True):
            drafts[number] = drafts[number]._replace(question=question.text)
            problems[number] = _question_problem(question, drafts[number], seen)
            seen.add(normalised(question.text))
        return drafts, problems

    def check(self, drafts: Sequence[_Draft], problems: Sequence[Failure | None]) -> list[Failure | None]:
        """Why the writer's own answers refuse a question; None for a question that they confirm.

        Args:
            problems: questions with a problem are not asked.
        """
        found = list(problems)
        for reason, with_passage in (("not_answered_with_passage", True), ("answered_without_passage", False)):
            left = [number for number, problem in enumerate(found) if problem is None]
            replies = self._answers([drafts[number] for number in left], with_passage)
            for number, reply in zip(left, replies, strict=True):
                draft = drafts[number]
                if isinstance(reply, Failure):
                    found[number] = reply
                elif answers_right(reply.text, [draft.answer], draft.question) != with_passage:
                    detail = f"the answer is {draft.answer}; the writer said: {reply.text[:QUOTED_CHARS]}"
                    found[number] = Failure(reason, detail)
        return found

    def _answers(self, drafts: Sequence[_Draft], with_passage: bool) -> Sequence[Answer | Failure]:
        """A model that continues texts answers 22 of 47 questions about 15 files right so, and 14 if it is asked in a chat."""
        what = f"answers {'with' if with_passage else 'without'} the passage"
        if isinstance(self.client, Completer):
            examples = read_prompt(ANSWER_EXAMPLES)
            if not with_passage:
                examples = re.sub(r"^Sentence: .*\n", "", examples, flags=re.MULTILINE)
            told = [f"Sentence: {draft.passage.text}\n" if with_passage else "" for draft in drafts]
            prompts = [
                f"{examples}\n\n{before}Question: {draft.question}\nAnswer:"
                for before, draft in zip(told, drafts, strict=True)
            ]
            return self.client.complete(prompts, Sampling(self.exam_max_new_tokens, stop=("\n",)), what)
        told = [f"{draft.passage.title}\n{draft.passage.text}\n\n" if with_passage else "" for draft in drafts]
        prompt = read_prompt("exam_answer_endpoint")
        requests = [
            prompt.format(text=before, question=draft.question) for before, draft in zip(told, drafts, strict=True)
        ]
        return self._reply(requests, "answer", what)

    def _reply(self, requests: Sequence[str], field: str, what: str) -> Sequence[Answer | Failure]:
        json_field = field if self.client.writes_json else None
        sampling = Sampling(self.question_max_new_tokens, self.client.temperature, self.seed, json_field=json_field)
        return self.client.answer([[{"role": "user", "content": text}] for text in requests], sampling, what)


def _answer_problem(answer: Answer | Failure, passage: Passage) -> Failure | None:
    if isinstance(answer, Failure):
        return answer
    if len(answer.text.split()) > _ANSWER_WORDS:
        return Failure("long_answer", f"more than {_ANSWER_WORDS} words", answer.text)
    if answer.text not in passage.text:
        return Failure("not_verbatim", "the passage does not have these words", answer.text)
    return None


def _question_problem(question: Answer | Failure, draft: _Draft, taken: Collection[str]) -> Failure | None:
    if isinstance(question, Failure):
        return question
    if f" {normalised(draft.answer)} " in f" {normalised(question.text)} ":
        return Failure("answer_in_question", draft.answer)
    reason = instruction_problem(question.text, draft.passage.text, "question")
    if not reason and normalised(question.text) in taken:
        reason = "repeated_question"
    return Failure(reason, "") if reason else None


def _request(prompt: str, draft: _Draft) -> str:
    words = {"title": draft.passage.title, "passage": draft.passage.text, "answer": draft.answer}
    return read_prompt(prompt).format(**words)


def _order(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def _set_aside(draft: _Draft, reason: str, detail: str) -> Quarantined:
    return draft.passage.set_aside("exam", reason, detail, draft.question)
