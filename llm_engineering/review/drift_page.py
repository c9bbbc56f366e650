"""The page *Drift*: a list of questions to write documents for, and its files."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi.responses import Response

from llm_engineering.feedback.served import Asked, asked_questions
from llm_engineering.review.drift import PERCENTILE, Drift, find_drift
from llm_engineering.review.site import Context

ROWS = 100


def add_drift_page(app: FastAPI, context: Context) -> None:
    """Add the page `/drift`, and its list as `/drift/questions.jsonl` and `/drift/questions.txt`."""
    reviews = context.reviews

    @lru_cache(maxsize=1)
    def compared(_: tuple[tuple[str, int], ...]) -> tuple[Asked, Drift | None]:
        asked = asked_questions(reviews.served)
        return asked, find_drift(asked, reviews.read_covered()) if asked.questions else None

    def newest() -> tuple[Asked, Drift | None]:
        # The log only grows, so its files and their sizes say whether there is more to compare.
        files = sorted(reviews.served.glob("*.jsonl"))
        return compared(tuple((file.name, file.stat().st_size) for file in files))

    @app.get("/drift")
    def drift(page: Annotated[int, Query(ge=1)] = 1) -> Response:
        asked, found = newest()
        rows = found.uncovered[(page - 1) * ROWS : page * ROWS] if found is not None else []
        pages = -(-len(found.uncovered) // ROWS) if found is not None else 0
        return context.page(
            "drift.html",
            active="drift",
            asked=asked,
            found=found,
            rows=rows,
            page=page,
            last_page=pages,
            percentile=PERCENTILE,
        )

    @app.get("/drift/questions.jsonl")
    def as_json_lines() -> Response:
        _, found = newest()
        return _file("".join(f"{json.dumps(one._asdict())}\n" for one in (found.uncovered if found else [])), "jsonl")

    @app.get("/drift/questions.txt")
    def as_text() -> Response:
        _, found = newest()
        return _file(
            "".join(f"{' '.join(one.question.split())}\n" for one in (found.uncovered if found else [])), "txt"
        )


def _file(content: str, suffix: str) -> Response:
    # Not shown in the browser: the text is what anybody asked.
    headers = {"Content-Disposition": f'attachment; filename="questions.{suffix}"'}
    return Response(content.encode("utf-8", "replace"), media_type="text/plain; charset=utf-8", headers=headers)
