"""Accounts for every row: what each stage read, kept and quarantined, carried along with the dataset."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import DatasetDict, Features, Value

from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import to_dataset

_TEXT = Value("string")
_QUARANTINE_FEATURES = Features(dict.fromkeys(Quarantined.model_fields, _TEXT))
_COUNT_FEATURES = Features({"stage": _TEXT, "read": Value("int64"), "kept": Value("int64")})


class Ledger:
    """Counts by stage (`document`, `passage`, `instruction`, `preference`) and everything that was not kept."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.quarantine: list[Quarantined] = []

    def record(self, stage: str, read: int, kept: int, rejected: Sequence[Quarantined]) -> None:
        """Enter what one pass over a stage's rows did; a later pass continues from what the former kept.

        Raises:
            AssertionError: rows went missing: kept + quarantined is not what was read.
        """
        expected = self.kept.get(stage, read)
        if read != expected or read != kept + len(rejected):
            raise AssertionError(
                f"{stage}: {expected} rows were there, {read} read, {kept} kept, {len(rejected)} quarantined"
            )
        self.read.setdefault(stage, read)
        self.kept[stage] = kept
        self.quarantine += rejected

    def datasets(self) -> DatasetDict:
        """`quarantine` and `counts`, to be stored beside the rows."""
        counts = [{"stage": stage, "read": self.read[stage], "kept": self.kept[stage]} for stage in self.read]
        return DatasetDict(
            quarantine=to_dataset([row.model_dump() for row in self.quarantine], _QUARANTINE_FEATURES),
            counts=to_dataset(counts, _COUNT_FEATURES),
        )

    @classmethod
    def load(cls, stored: DatasetDict) -> Ledger:
        """The ledger that was stored beside rows."""
        ledger = cls()
        for count in stored["counts"]:
            ledger.read[count["stage"]] = count["read"]
            ledger.kept[count["stage"]] = count["kept"]
        ledger.quarantine = [Quarantined.model_validate(row) for row in stored["quarantine"]]
        return ledger
