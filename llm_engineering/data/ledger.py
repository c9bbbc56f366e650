"""Accounts for every row: what each stage read, kept and quarantined. Kept + quarantined = read, always.

The ledger is stored with its dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from datasets import DatasetDict, Features, List, Value

from llm_engineering.data.rows import Quarantined
from llm_engineering.data.storage import TableWriter, stream_records, to_dataset, work_folder

EXAMPLES_PER_REASON = 3


_TEXT = Value("string")
QUARANTINE_FEATURES = Features(dict.fromkeys(Quarantined.model_fields, _TEXT))
_COUNT_FEATURES = Features(
    {"stage": _TEXT, **dict.fromkeys(("read", "kept", "drafts"), Value("int64")), "unread": List(_TEXT)}
)


class Ledger:
    """Counts by stage, and everything that was quarantined.

    The quarantined rows are written to disk. Memory holds their counts and a few examples of each reason.
    """

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        # Rows of each stage that the writer set aside, e.g. unusable questions. They never were rows of the data.
        self.drafts: dict[str, int] = {}
        self.reasons: dict[str, Counter[str]] = {}
        self.examples: dict[str, list[Quarantined]] = {}
        # Columns of the files of each stage that no row was made of.
        self.unread: dict[str, list[str]] = {}
        # Quarantined rows of each stage that earlier calls of `record` have counted.
        self._recorded: Counter[str] = Counter()
        self._table = TableWriter(work_folder() / "quarantine.arrow", QUARANTINE_FEATURES)

    def set_aside(self, rows: Iterable[Quarantined]) -> None:
        """Write quarantined rows. The next call of `record` counts them."""
        for row in rows:
            self._table.write(row.model_dump())
            self.reasons.setdefault(row.stage, Counter())[row.reason] += 1
            examples = self.examples.setdefault(row.reason, [])
            if len(examples) < EXAMPLES_PER_REASON:
                examples.append(row)

    def record(
        self, stage: str, read: int, kept: int, rejected: Iterable[Quarantined] = (), *, writes: bool = False
    ) -> None:
        """Record one pass over a stage's rows. The next pass must read what this pass kept.

        Args:
            rejected: rows to set aside now, in addition to those that `set_aside` wrote since the last pass.
            writes: whether a model wrote the rows in this pass, so that what is set aside are unusable drafts.

        Raises:
            AssertionError: rows went missing: kept + quarantined differs from read.
        """
        self.set_aside(rejected)
        total = self.reasons.setdefault(stage, Counter()).total()
        quarantined = total - self._recorded[stage]
        expected = self.kept.get(stage, read)
        if read != expected or read != kept + quarantined:
            raise AssertionError(
                f"{stage}: expected {expected} rows, read {read}, kept {kept}, quarantined {quarantined}"
            )
        self._recorded[stage] = total
        if writes:
            self.drafts[stage] = quarantined
        self.read.setdefault(stage, read)
        self.kept[stage] = kept

    def add(self, stage: str, rows: int) -> None:
        """Count rows that are added to those that the last pass kept."""
        self.read[stage] += rows
        self.kept[stage] += rows

    def by_reason(self, stage: str) -> dict[str, int]:
        """Quarantined rows of a stage by reason, most frequent first."""
        return dict(self.reasons.get(stage, Counter()).most_common())

    def quarantine(self) -> Iterator[Quarantined]:
        """Everything that was quarantined, in order. This closes the file, so do not call `set_aside` afterwards."""
        for record in stream_records(self._table.dataset()):
            yield Quarantined.model_validate(record)

    def datasets(self) -> DatasetDict:
        """The datasets `quarantine` and `counts`, to store beside the rows. Do not call `set_aside` afterwards."""
        counts = [
            {
                "stage": stage,
                "read": self.read[stage],
                "kept": self.kept[stage],
                "drafts": self.drafts.get(stage, 0),
                "unread": self.unread.get(stage, []),
            }
            for stage in self.read
        ]
        return DatasetDict(quarantine=self._table.dataset(), counts=to_dataset(counts, _COUNT_FEATURES))

    @classmethod
    def load(cls, stored: DatasetDict) -> Ledger:
        """Read a ledger that `datasets` made."""
        ledger = cls()
        for count in stored["counts"]:
            ledger.read[count["stage"]] = count["read"]
            ledger.kept[count["stage"]] = count["kept"]
            # Datasets of earlier versions do not tell drafts from other rows.
            ledger.drafts[count["stage"]] = count.get("drafts", 0)
            ledger.unread[count["stage"]] = count.get("unread", [])
        ledger.set_aside(Quarantined.model_validate(row) for row in stream_records(stored["quarantine"]))
        ledger._recorded = Counter({stage: reasons.total() for stage, reasons in ledger.reasons.items()})
        return ledger
