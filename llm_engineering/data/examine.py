"""Examines rows one by one, in batches and on all cores: rules, split, language, and hashes for finding duplicates."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from llm_engineering.data.duplicates import EvaluationIndex, Sketches, sketch
from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.private import redacted
from llm_engineering.data.rows import (
    INSTRUCTION_FEATURES,
    PREFERENCE_FEATURES,
    SPLITS,
    InstructionRow,
    Message,
    PreferenceRow,
    instruction_row,
    normalised,
    preference_row,
    prompt_text,
    row_text,
    split_key,
    split_of,
)
from llm_engineering.data.rules import RowRules, is_generated
from llm_engineering.recipe.data_blocks import DataConfig

# Reading more changes nothing for ordinary text and costs about 1 µs a character.
MAX_CHARS = 200
# Of 75 sentences of two to eight words, 15 each in English, German, French, Spanish and Chinese, 54 are named at this
# floor and none wrongly (at 0.5: 64, two wrongly; without: 72, three wrongly). Short Spanish is often left unnamed, as
# Galician is so near. None of 15 snippets of code and 10 names or single words reaches even 0.3.
MIN_CONFIDENCE = 0.6
# py3langid's label for what is in no language.
_NO_LANGUAGE = "zxx"


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> str | None:
    """The ISO 639 code of a text's language, by its first MAX_CHARS characters; None where that is not certain."""
    language, confidence = _identifier().classify(text.strip()[:MAX_CHARS])
    return language if confidence >= MIN_CONFIDENCE and language != _NO_LANGUAGE else None


# Starting a process takes some seconds, as long as one process needs for so many rows.
_ROWS_FOR_PROCESSES = 20_000


class Examined(NamedTuple):
    """A batch of rows after the first look. Arrays have a value for each kept row.

    Attributes:
        kept: the rows as Arrow, with their ids.
        rejected: rows that a rule dropped.
        findings: position in `kept`, rule and detail of what a rule reports.
        ids, prompts, answers, others: hashes of the row, its prompt, what is learned, and what is rejected (0 for
            instruction rows).
        sides: index into `SPLITS`.
        generated: 1 where a model wrote of the row, else 0.
        lengths: characters of prompt and answer.
        languages: ISO 639-1 codes; empty where the text is too short to tell.
    """

    kept: pa.RecordBatch
    rejected: list[Quarantined]
    findings: list[tuple[int, str, str]]
    ids: NDArray[np.uint64]
    prompts: NDArray[np.uint64]
    answers: NDArray[np.uint64]
    others: NDArray[np.uint64]
    sides: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    languages: list[str]
    sketches: Sketches


class Examiner:
    """The first look at rows of one kind.

    Args:
        stage: what the quarantine counts by.
        kind: `instruction` or `preference`.
        side: the split of all rows; None splits them by their document or prompt.
        evaluation: rows that training rows must not share n-grams with.
    """

    def __init__(
        self,
        stage: str,
        kind: str,
        config: DataConfig,
        side: str | None,
        has_own_test: bool,
        evaluation: EvaluationIndex | None,
    ) -> None:
        self.stage = stage
        self.kind = kind
        self.config = config
        self.side = side
        self.has_own_test = has_own_test
        self.evaluation = evaluation
        self.rules = RowRules(config.rules)

    def __call__(self, batch: pa.RecordBatch) -> Examined:
        """Examine a batch of records in the columns of the canonical rows."""
        to_row = instruction_row if self.kind == "instruction" else preference_row
        kept: list[InstructionRow | PreferenceRow] = []
        sides: list[int] = []
        rejected: list[Quarantined] = []
        findings: list[tuple[int, str, str]] = []
        for record in batch.to_pylist():
            row: InstructionRow | PreferenceRow = to_row(record)
            side = self.side or split_of(split_key(row), self.config.split, self.has_own_test)
            checked = self.rules.check(row)
            reason, detail = checked.reason, checked.detail
            if not reason and self.evaluation is not None and side == "train":
                shared = self.evaluation.match(checked.row)
                if shared:
                    reason, detail = "contaminated", f"shares with data.decontaminate_against: {redacted(shared)}"
            if reason:
                rejected.append(_quarantined(self.stage, checked.row, reason, detail))
                continue
            findings += [(len(kept), finding.rule, finding.detail) for finding in checked.findings]
            kept.append(checked.row)
            sides.append(SPLITS.index(side))
        texts = [row_text(row) for row in kept]
        records = [row.record() for row in kept]
        features = INSTRUCTION_FEATURES if self.kind == "instruction" else PREFERENCE_FEATURES
        looks_for_language = self.config.rules.language_outlier != "off"
        return Examined(
            kept=pa.RecordBatch.from_pylist(records, schema=features.arrow_schema),
            rejected=rejected,
            findings=findings,
            ids=np.array([int(record["id"], 16) for record in records], np.uint64),
            prompts=np.array([_hash(prompt_text(row)) for row in kept], np.uint64),
            answers=np.array([_hash(_folded(learned(row))) for row in kept], np.uint64),
            others=np.array(
                [_hash(_folded(row.rejected)) if isinstance(row, PreferenceRow) else 0 for row in kept], np.uint64
            ),
            sides=np.array(sides, np.uint8),
            generated=np.array([is_generated(row) for row in kept], np.uint8),
            lengths=np.array([len(text) for text in texts], np.uint32),
            languages=[(language_of(text) or "") if looks_for_language else "" for text in texts],
            sketches=sketch(texts, self.config.near_duplicate_threshold),
        )


def examine(batches: Iterable[pa.RecordBatch], rows: int, examiner: Examiner) -> Iterator[Examined]:
    """Examine batches in their order, in several processes if there are rows enough.

    Args:
        rows: how many there are in all.
    """
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    if rows < _ROWS_FOR_PROCESSES or processes == 1:
        yield from map(examiner, batches)
        return
    waiting: deque[Future[Examined]] = deque()
    # Not forked: a process with threads (torch, Arrow) may hang in its copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(examiner,)) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_examine, batch))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _quarantined(stage: str, row: InstructionRow | PreferenceRow, reason: str, detail: str) -> Quarantined:
    # Redacted before it is cut: a key that is cut in two is not recognised.
    text = redacted(row.prompt[-1].content)[:200] if row.prompt else ""
    return Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)


def learned(row: InstructionRow | PreferenceRow) -> list[Message]:
    """The answer that training makes likelier."""
    return row.completion if isinstance(row, InstructionRow) else row.chosen


_examiner: Examiner


def _start(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    # Ctrl-C reaches every process of the terminal; the one that collects the results ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's process does not notice that the one it works for was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _examine(batch: pa.RecordBatch) -> Examined:
    return _examiner(batch)


def _folded(messages: list[Message]) -> str:
    text = "\n".join(message.content for message in messages)
    return normalised(text) or text


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass")))
