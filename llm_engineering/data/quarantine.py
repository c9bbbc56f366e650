"""What was read and not kept, with its reason and its place. Kept + quarantined = read, always."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
