"""Accounts for every row: what each stage read, kept and quarantined. Kept + quarantined = read, always.

The account is stored with the dataset that it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from datasets import DatasetDict, Features, Value
from pydantic import BaseModel, ConfigDict

from llm_engineering.data.rows import to_dataset
from llm_engineering.data.storage import TableWriter, stream_records, work_folder


class Quarantined(BaseModel):
    """One thing that was read and not kept.

    Attributes:
        stage: `document`, `passage`, `instruction` or `preference`.
        reason: a short name that counts group by, e.g. `empty_answer`.
        source: the file or document it comes from.
        place: where in the source, e.g. `line 7` or `characters 120-560`.
        detail: what exactly was wrong.
        text: the start of what was read.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    reason: str
    source: str
    place: str
    detail: str = ""
    text: str = ""

    def named(self) -> str:
        """`source, place: reason`, for messages."""
        return f"{self.source}, {self.place}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


def by_reason(rows: Iterable[Quarantined]) -> dict[str, int]:
    """Counts by reason, most frequent first."""
    return dict(Counter(row.reason for row in rows).most_common())


EXAMPLES_PER_REASON = 3
_TEXT = Value("string")
_QUARANTINE_FEATURES = Features(dict.fromkeys(Quarantined.model_fields, _TEXT))
_COUNT_FEATURES = Features({"stage": _TEXT, "read": Value("int64"), "kept": Value("int64")})


class Ledger:
    """Counts by stage (`document`, `passage`, `instruction`, `preference`) and everything that was not kept.

    What was set aside stands on disk; in memory are its counts and a few examples of each reason.
    """

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.reasons: dict[str, Counter[str]] = {}
        self.examples: dict[str, list[Quarantined]] = {}
        self._entered: Counter[str] = Counter()
        self._table = TableWriter(work_folder() / "quarantine.arrow", _QUARANTINE_FEATURES)

    def set_aside(self, rows: Iterable[Quarantined]) -> None:
        """Write rows that are not kept; `record` then closes the books of their pass."""
        for row in rows:
            self._table.write(row.model_dump())
            self.reasons.setdefault(row.stage, Counter())[row.reason] += 1
            examples = self.examples.setdefault(row.reason, [])
            if len(examples) < EXAMPLES_PER_REASON:
                examples.append(row)

    def record(self, stage: str, read: int, kept: int, rejected: Iterable[Quarantined] = ()) -> None:
        """Enter what one pass over a stage's rows did; a later pass continues from what the former kept.

        Args:
            rejected: what is set aside now, besides what `set_aside` was told since the last pass.

        Raises:
            AssertionError: rows went missing: kept + quarantined is not what was read.
        """
        self.set_aside(rejected)
        total = self.reasons.setdefault(stage, Counter()).total()
        quarantined = total - self._entered[stage]
        expected = self.kept.get(stage, read)
        if read != expected or read != kept + quarantined:
            raise AssertionError(
                f"{stage}: {expected} rows were there, {read} read, {kept} kept, {quarantined} quarantined"
            )
        self._entered[stage] = total
        self.read.setdefault(stage, read)
        self.kept[stage] = kept

    def by_reason(self, stage: str) -> dict[str, int]:
        """Counts of what a stage set aside, most frequent first."""
        return dict(self.reasons.get(stage, Counter()).most_common())

    def quarantine(self) -> Iterator[Quarantined]:
        """Everything that was set aside, in order. Nothing can be set aside after this."""
        for record in stream_records(self._table.dataset()):
            yield Quarantined.model_validate(record)

    def datasets(self) -> DatasetDict:
        """`quarantine` and `counts`, to be stored beside the rows. Nothing can be set aside after this."""
        counts = [{"stage": stage, "read": self.read[stage], "kept": self.kept[stage]} for stage in self.read]
        return DatasetDict(quarantine=self._table.dataset(), counts=to_dataset(counts, _COUNT_FEATURES))

    @classmethod
    def load(cls, stored: DatasetDict) -> Ledger:
        """The ledger that was stored beside rows."""
        ledger = cls()
        for count in stored["counts"]:
            ledger.read[count["stage"]] = count["read"]
            ledger.kept[count["stage"]] = count["kept"]
        ledger.set_aside(Quarantined.model_validate(row) for row in stream_records(stored["quarantine"]))
        ledger._entered = Counter({stage: reasons.total() for stage, reasons in ledger.reasons.items()})
        return ledger
