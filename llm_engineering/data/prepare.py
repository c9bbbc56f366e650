"""Checks, judges and splits candidate rows. The result is a dataset for training.

Three passes over files do this: `examine` checks each row, `judge` compares the rows by their hashes, and `_Writer`
writes each row to its split or to the quarantine. No pass holds the rows in memory.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value

from llm_engineering.data.dataset_rules import OVER_QUARTER, RowIndex, Verdict, Verdicts, judge
from llm_engineering.data.examine import Examiner, examine
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.private import redacted
from llm_engineering.data.rows import MIN_ROWS, SPLITS, Message, Quarantined, Row, read_row
from llm_engineering.data.similarity import EvaluationIndex
from llm_engineering.data.storage import (
    FEATURES,
    TableWriter,
    dataset_batches,
    stream_batches,
    stream_records,
    to_dataset,
)
from llm_engineering.errors import RequestError
from llm_engineering.progress import Progress, counted
from llm_engineering.recipe.data_blocks import DataConfig

logger = logging.getLogger(__name__)

SUSPICIOUS_ROWS = 10
# With at least this many rows, judging takes seconds and is logged.
BIG_ROWS = 100_000
# Rows of a cluster that a message names. The table of clusters has all of them.
_NAMED = 3
_SHOWN_CHARS = 300
_TEXT = Value("string")
_FINDINGS = Features(dict.fromkeys(("id", "source", "rule", "detail"), _TEXT))
_CLUSTERS = Features({"cluster": Value("int64"), **dict.fromkeys(("id", "source", "split", "fate"), _TEXT)})
_SUSPICIOUS = Features(dict.fromkeys(("id", "source", "findings", "prompt", "answer"), _TEXT))
_RAW_FINDINGS = Features({"row": Value("int64"), "rule": _TEXT, "detail": _TEXT})


class Prepared(NamedTuple):
    """The result of `prepare`.

    Attributes:
        splits: the kept rows of `train`, `validation` and `test`.
        findings: what rules report about kept rows.
        clusters: every row of every cluster of duplicates, and whether it was kept.
        suspicious: the rows that most rules match, worst first.
        leaked: the number of held-out rows that also occurred in an earlier split of `SPLITS`.
        seconds: the duration of `check`, `judge` and `write`.
    """

    splits: DatasetDict
    findings: Dataset
    clusters: Dataset
    suspicious: Dataset
    leaked: int
    seconds: dict[str, float]

    def tables(self) -> dict[str, Dataset]:
        """The tables that the data report shows."""
        return {"findings": self.findings, "clusters": self.clusters, "suspicious": self.suspicious}


def prepare(
    candidates: Dataset,
    kind: str,
    config: DataConfig,
    ledger: Ledger,
    folder: Path,
    own_test: Dataset | None = None,
    evaluation: EvaluationIndex | None = None,
    inspected: bool = False,
) -> Prepared:
    """Check, judge and split rows.

    Args:
        kind: the kind of the rows. It is also the stage in the ledger. The user's own test split has the
            stage of its kind and `_test`, e.g. `instruction_test`.
        folder: the folder for the files of all passes.
        own_test: the user's own test split; `candidates` are then split into training and validation.
        evaluation: rows that training rows must not share n-grams with (`data.decontaminate_against`).
        inspected: only report: treat all candidates as training rows, and keep rows that leak into `own_test`.

    Raises:
        RequestError: rows leak into the user's own test split, and `data.strict` is on.
    """
    parts = [(kind, candidates, "train" if inspected else None)]
    if own_test is not None:
        parts.append((f"{kind}_test", own_test, "test"))
    valid = TableWriter(folder / "valid.arrow", FEATURES[kind])
    raw_findings = TableWriter(folder / "raw-findings.arrow", _RAW_FINDINGS)
    progress = Progress("rows checked", sum(len(dataset) for _, dataset, _ in parts))
    ends: dict[str, int] = {}
    times = [time.monotonic()]
    with RowIndex(folder, config) as index:
        for stage, dataset, split in parts:
            examiner = Examiner(stage, kind, config, split, own_test is not None, evaluation)
            for batch in examine(dataset_batches(dataset), len(dataset), examiner):
                for position, rule, detail in batch.findings:
                    raw_findings.write({"row": index.rows + position, "rule": rule, "detail": detail})
                ledger.set_aside(batch.rejected)
                index.add(batch)
                valid.write_batch(batch.kept)
                progress.advance(batch.kept.num_rows + len(batch.rejected))
            ends[stage] = index.rows
        times.append(time.monotonic())
        if index.rows >= BIG_ROWS:
            logger.info("Looking for duplicates and leaks among %s", counted(index.rows, "row"))
        verdicts = judge(index, config, remove_leaks=not inspected)
        times.append(time.monotonic())
        writer = _Writer(kind, valid, raw_findings, index, verdicts, ends, folder)
        if config.strict and own_test is not None and verdicts.leaked:
            raise RequestError(writer.refusal())
        writer.write(ledger)
        times.append(time.monotonic())
    for stage, dataset, _ in parts:
        ledger.record(stage, len(dataset), writer.kept[stage])
    took = dict(zip(("check", "judge", "write"), (end - start for start, end in pairwise(times)), strict=True))
    return writer.prepared(took)


def check_splits(splits: DatasetDict, kind: str, ledger: Ledger) -> None:
    """Check that every split has rows.

    Raises:
        RequestError: a split is empty.
    """
    rows = sum(len(part) for part in splits.values())
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in ledger.by_reason(kind).items())
        raise RequestError(
            f"No {kind} row is left: all rows were set aside ({reasons or 'nothing was read'}). "
            "`make inspect DATA=file` shows each row of a file with its reason."
        )
    empty = [name for name, part in splits.items() if not len(part)]
    if empty:
        few = f", at least {MIN_ROWS} are needed" if rows < MIN_ROWS else ""
        raise RequestError(
            f"The {kind} dataset has {counted(rows, 'row')}{few}, and the {' and '.join(empty)} split came out empty. Rows of one "
            "document or prompt go to the same split: add data, or raise data.split.test_fraction and "
            "data.split.validation_fraction."
        )


class _Writer:
    """The third pass: writes every row to its split or to the quarantine, and the findings about it."""

    def __init__(
        self,
        kind: str,
        valid: TableWriter,
        raw_findings: TableWriter,
        index: RowIndex,
        verdicts: Verdicts,
        ends: dict[str, int],
        folder: Path,
    ) -> None:
        self.kind = kind
        self.valid = valid
        self.index = index
        self.raw = stream_records(raw_findings.dataset())
        self.next_raw = next(self.raw, None)
        self.row_splits = index.column("splits")
        self.languages = list(index.languages)
        self.codes = index.column("codes")
        self.verdicts = verdicts
        self.cluster_of = {row: rows for rows in verdicts.clusters for row in rows}
        self.ends = ends
        self.kept: Counter[str] = Counter()
        # A heap of (rules that match, -row number, record), of at most SUSPICIOUS_ROWS entries.
        self.worst: list[tuple[int, int, dict[str, str]]] = []
        self.splits = {name: TableWriter(folder / f"{name}.arrow", valid.features) for name in SPLITS}
        self.findings = TableWriter(folder / "findings.arrow", _FINDINGS)
        self.clusters = TableWriter(folder / "clusters.arrow", _CLUSTERS)

    def write(self, ledger: Ledger) -> None:
        """Write all rows and clusters."""
        self.valid.close()
        start = 0
        for batch in stream_batches(self.valid.path):
            rows = range(start, start + batch.num_rows)
            dropped = {row: verdict for row in rows if (verdict := self.verdicts.drop_of(row)) is not None}
            splits = [-1 if row in dropped else int(self.row_splits[row]) for row in rows]
            for number, name in enumerate(SPLITS):
                chosen = [position for position, one in enumerate(splits) if one == number]
                if chosen:
                    self.splits[name].write_batch(batch.take(pa.array(chosen)))
            for row in rows:
                findings = self._findings_of(row)
                if row in dropped:
                    verdict = dropped[row]
                    detail = self._detail(row, verdict)
                    content = self._row(batch, row - start)
                    ledger.set_aside([Quarantined.of_row(content, self._stage(row), verdict.rule, detail)])
                else:
                    self.kept[self._stage(row)] += 1
                    if findings:
                        self._report(row, findings, self._row(batch, row - start))
            start += batch.num_rows
        for number, members in enumerate(self.verdicts.clusters):
            for row in members:
                drop = self.verdicts.drop_of(row)
                split = SPLITS[int(self.row_splits[row])]
                fate = drop.rule if drop is not None else "kept"
                self.clusters.write({"cluster": number, **self.index.names(row), "split": split, "fate": fate})

    def prepared(self, seconds: dict[str, float]) -> Prepared:
        """Open everything that was written."""
        worst = sorted(self.worst, key=lambda entry: entry[:2], reverse=True)
        return Prepared(
            splits=DatasetDict({name: table.dataset() for name, table in self.splits.items()}),
            findings=self.findings.dataset(),
            clusters=self.clusters.dataset(),
            suspicious=to_dataset([record for *_, record in worst], _SUSPICIOUS),
            leaked=len(self.verdicts.leaked),
            seconds=seconds,
        )

    def refusal(self) -> str:
        """The message that refuses a test split with leaks."""
        leaks = [
            f"{self._source(row)} is like {self._source(verdict.other)}"
            for row, verdicts in self.verdicts.by_row.items()
            for verdict in verdicts
            if verdict.rule == "leaks_into_test"
        ]
        return (
            f"{len(self.verdicts.leaked)} rows of the test split are also in the training data, and data.strict is on: "
            f"{'; '.join(leaks[:_NAMED])}{' …' if len(leaks) > _NAMED else ''}. Remove them from one of the two files, "
            "or set data.strict to false, which removes them from the training data."
        )

    def _findings_of(self, row: int) -> list[tuple[str, str]]:
        """Rule and detail of every report on a row: first of the rules for single rows, then of the comparisons."""
        findings = []
        while self.next_raw is not None and self.next_raw["row"] == row:
            findings.append((self.next_raw["rule"], self.next_raw["detail"]))
            self.next_raw = next(self.raw, None)
        reported = (verdict for verdict in self.verdicts.by_row.get(row, ()) if not verdict.drops)
        return findings + [(verdict.rule, self._detail(row, verdict)) for verdict in reported]

    def _report(self, row: int, findings: Sequence[tuple[str, str]], content: Row) -> None:
        names = self.index.names(row)
        for rule, detail in findings:
            self.findings.write({**names, "rule": rule, "detail": detail})
        # If two rows match equally many rules, the earlier row is shown.
        entry = (len({rule for rule, _ in findings}), -row)
        if len(self.worst) < SUSPICIOUS_ROWS or entry > self.worst[0][:2]:
            shown = {
                **names,
                "findings": "; ".join(f"{rule}: {detail}" if detail else rule for rule, detail in findings),
                "prompt": _shown(content.prompt),
                "answer": _shown(content.answers[0]),
            }
            push = heapq.heappush if len(self.worst) < SUSPICIOUS_ROWS else heapq.heapreplace
            push(self.worst, (*entry, shown))

    def _detail(self, row: int, verdict: Verdict) -> str:
        if verdict.rule == "length_outlier":
            return "far shorter or longer than the other rows"
        if verdict.rule == "language_outlier":
            return f"in the language {self.languages[int(self.codes[row])]}, unlike nearly all other rows"
        if verdict.rule == OVER_QUARTER:
            split = int(self.row_splits[row])
            limit = counted(self.verdicts.limits[split], "row")
            return (
                f"the {SPLITS[split]} split keeps {limit} of each document, so that none has more than a quarter of it"
            )
        other = self._source(verdict.other)
        if verdict.rule == "exact_duplicate":
            return f"first seen at {other}"
        if verdict.rule == "conflicting_answers":
            what = (
                "the same answer with the other label"
                if self.kind == "labelled"
                else "another answer to the same prompt"
            )
            return f"the row at {other} has {what}"
        cluster = self.cluster_of.get(row, [])
        rest = list(islice((one for one in cluster if one not in (row, verdict.other)), _NAMED))
        more = f", with {', '.join(map(self._source, rest))}" if rest else ""
        more += f" and {len(cluster) - 2 - _NAMED} others" if len(cluster) - 2 > _NAMED else ""
        return f"of the row at {other}{more}"

    def _stage(self, row: int) -> str:
        return next(stage for stage, end in self.ends.items() if row < end)

    def _source(self, row: int) -> str:
        return self.index.names(row)["source"]

    def _row(self, batch: pa.RecordBatch, position: int) -> Row:
        record: dict[str, Any] = batch.slice(position, 1).to_pylist()[0]
        return read_row(record, self.kind)


def _shown(messages: Sequence[Message]) -> str:
    return redacted("\n".join(message.content for message in messages))[:_SHOWN_CHARS]
