"""Examines rows one by one, in batches and on all cores: rules, split, language, and hashes for finding duplicates."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from llm_engineering.data.private import redacted
from llm_engineering.data.row_rules import check_row, is_generated
from llm_engineering.data.rows import (
    REPLAY,
    SPLITS,
    LabelledRow,
    Quarantined,
    Row,
    TextRow,
    folded,
    read_row,
    row_text,
    split_key,
    split_of,
)
from llm_engineering.data.similarity import EvaluationIndex, Sketches, sketch
from llm_engineering.data.storage import FEATURES
from llm_engineering.recipe.data_blocks import DataConfig

# The language of a text is judged by its first characters. More of them change nothing for ordinary text, and cost about
# 1 µs each.
MAX_CHARS = 200
# Measured on 75 sentences of two to eight words, 15 each in English, German, French, Spanish and Chinese: at this
# threshold 54 get a language and none a wrong one (at 0.5: 64, two wrong; without a threshold: 72, three wrong). Short
# Spanish often gets none, because Galician is so similar. 15 snippets of code and 10 single words stay below 0.3.
MIN_CONFIDENCE = 0.6
# py3langid's label for a text in no language.
_NO_LANGUAGE = "zxx"


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> str | None:
    """The ISO 639 code of a text's language, judged by its first MAX_CHARS characters; None if it is uncertain."""
    language, confidence = _identifier().classify(unicodedata.normalize("NFC", text.strip()[:MAX_CHARS]))
    return language if confidence >= MIN_CONFIDENCE and language != _NO_LANGUAGE else None


# Starting more processes takes seconds. In this time one process examines this many rows.
_ROWS_FOR_PROCESSES = 20_000


class Examined(NamedTuple):
    """A batch of rows after the checks of single rows. Arrays have one value for each kept row.

    Attributes:
        kept: the kept rows in Arrow format, with their ids.
        rejected: rows that a rule drops.
        findings: for each report of a rule, the position in `kept`, the rule and the detail.
        ids, prompts, answers, rejected_answers: hashes of the row, its prompt, its answer (the chosen one of a pair), and its
            rejected answer (0 for instruction rows).
        documents: hashes of the names of the rows' documents; 0 for a row without one.
        splits: the split, as an index into `SPLITS`.
        labels: 2 for a good answer, 1 for a bad one, 0 for a row without a label.
        generated: 1 if a model wrote a part of the row, else 0.
        lengths: characters of prompt and answer.
        languages: ISO 639-1 codes; empty if the language is uncertain.
    """

    kept: pa.RecordBatch
    rejected: list[Quarantined]
    findings: list[tuple[int, str, str]]
    ids: NDArray[np.uint64]
    prompts: NDArray[np.uint64]
    answers: NDArray[np.uint64]
    rejected_answers: NDArray[np.uint64]
    documents: NDArray[np.uint64]
    splits: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    languages: list[str]
    sketches: Sketches


@dataclass(frozen=True)
class Examiner:
    """Checks single rows of one kind, and computes the hashes that `judge` compares.

    Args:
        stage: the stage under which the quarantine counts rejected rows.
        split: the split of all rows; None splits them by their document or prompt.
        evaluation: rows that training rows must not share n-grams with.
    """

    stage: str
    kind: str
    config: DataConfig
    split: str | None
    has_own_test: bool
    evaluation: EvaluationIndex | None

    def __call__(self, batch: pa.RecordBatch) -> Examined:
        """Examine a batch of records that have the columns of the canonical rows."""
        kept: list[Row] = []
        splits: list[int] = []
        rejected: list[Quarantined] = []
        findings: list[tuple[int, str, str]] = []
        for record in batch.to_pylist():
            row = read_row(record, self.kind)
            split = self.split or split_of(split_key(row), self.config.split, self.has_own_test)
            if row.origin == REPLAY:
                split = "train"
            checked = check_row(row, self.config.rules)
            reason, detail = checked.reason, checked.detail
            if not reason and self.evaluation is not None and split == "train":
                shared = self.evaluation.match(checked.row)
                if not shared and isinstance(checked.row, TextRow) and is_generated(checked.row):
                    shared = self.evaluation.question_in(checked.row.text)
                if shared:
                    reason, detail = "contaminated", f"shares with data.decontaminate_against: {redacted(shared)}"
            if reason:
                rejected.append(Quarantined.of_row(checked.row, self.stage, reason, detail))
                continue
            findings += [(len(kept), finding.rule, finding.detail) for finding in checked.findings]
            kept.append(checked.row)
            splits.append(SPLITS.index(split))
        texts = [row_text(row) for row in kept]
        records = [row.record() for row in kept]
        detects_language = self.config.rules.language_outlier != "off"
        return Examined(
            kept=pa.RecordBatch.from_pylist(records, schema=FEATURES[self.kind].arrow_schema),
            rejected=rejected,
            findings=findings,
            ids=np.array([int(record["id"], 16) for record in records], np.uint64),
            # Two texts without a prompt do not answer the same question.
            prompts=np.array([_hash(folded(row.prompt or row.answers[0])) for row in kept], np.uint64),
            answers=np.array([_hash(folded(row.answers[0])) for row in kept], np.uint64),
            rejected_answers=np.array(
                [_hash(folded(row.answers[1])) if row.answers[1:] else 0 for row in kept], np.uint64
            ),
            documents=np.array([_hash(row.document) if row.document else 0 for row in kept], np.uint64),
            splits=np.array(splits, np.uint8),
            labels=np.array([1 + row.label if isinstance(row, LabelledRow) else 0 for row in kept], np.uint8),
            generated=np.array([is_generated(row) for row in kept], np.uint8),
            lengths=np.array([len(text) for text in texts], np.uint32),
            languages=[(language_of(text) or "") if detects_language else "" for text in texts],
            sketches=sketch(texts, self.config.near_duplicate_threshold),
        )


def examine(batches: Iterable[pa.RecordBatch], rows: int, examiner: Examiner) -> Iterator[Examined]:
    """Examine batches in order, in several processes if there are at least `_ROWS_FOR_PROCESSES` rows.

    Args:
        rows: the number of rows in all batches.
    """
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    if rows < _ROWS_FOR_PROCESSES or processes == 1:
        yield from map(examiner, batches)
        return
    waiting: deque[Future[Examined]] = deque()
    # Spawned, because the fork of a process with threads (torch, Arrow) may hang.
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


_examiner: Examiner


def _start(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner
    # Ctrl-C reaches every process of the terminal. The parent process handles it and ends these workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker of a pool does not notice that its parent process was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _examine(batch: pa.RecordBatch) -> Examined:
    return _examiner(batch)


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass")))
