"""The pages of *Data*: lists of datasets and their rows, and the decisions of reviewers on rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import numpy as np
from fastapi import Depends, FastAPI
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel

from llm_engineering.data.rows import read_row
from llm_engineering.errors import RequestError
from llm_engineering.feedback.decisions import Decision, content_of, current, store, stored
from llm_engineering.progress import counted
from llm_engineering.recipe.data_blocks import rows_key
from llm_engineering.review.browse import Filter, Table
from llm_engineering.review.opened_data import Opened, write_corrected
from llm_engineering.review.row_cards import DONE, Card, cards_of, chosen_rows, rules_of
from llm_engineering.review.row_views import (
    LISTED_CHARS,
    SHOWN_CHARS,
    parts_of,
    place_of,
    token_views,
    with_texts,
)
from llm_engineering.review.site import Context, Reviewer, paged

ROWS_ON_PAGE = 25
RECORDS_ON_PAGE = 50
CLUSTERS_ON_PAGE = 20
# Rows of a cluster on a page. A file may repeat one row thousands of times.
MEMBERS_SHOWN = 12


class Decide(BaseModel):
    """The body of a decision on a row.

    Attributes:
        texts: the texts that an edit changes, by their path.
        seen: how many decisions were stored when the reviewer's page was made.
    """

    id: str
    action: Literal["accept", "edit", "drop", "undo"]
    reviewer: Reviewer
    reason: str = ""
    texts: dict[str, str] = {}
    seen: int = 0


def read_filter(
    search: str = "",
    split: str = "",
    source: str = "",
    finding: str = "",
    decision: str = "",
    least: str = "",
    most: str = "",
) -> Filter:
    """The filter in the query of an address. A number that is none is no bound."""
    bounds = [int(text) if text.isdecimal() else None for text in (least, most)]
    return Filter(search.strip(), split, source.strip(), finding, decision, *bounds)


Filtered = Annotated[Filter, Depends(read_filter)]


def add_data_pages(app: FastAPI, context: Context) -> None:
    """Add the pages under `/data`."""
    reviews = context.reviews

    def page(template: str, opened: Opened, key: str, **values: Any) -> Response:
        counts = {"rows": opened.rows.rows, "quarantine": opened.quarantine.rows, "findings": opened.findings.rows}
        counts["clusters"] = len(np.unique(opened.clusters.numbers("cluster")))
        shared: dict[str, Any] = {"key": key, "opened": opened, "counts": counts, "rows_name": rows_key(opened.kind)}
        return context.page(template, active="data", **shared, **values)

    def card_of(opened: Opened, position: int, limit: int | None = None) -> Card:
        (card,) = cards_of(opened, [_valid(opened, position)], current(stored(reviews.folder)), limit)
        return card

    def card_page(key: str, position: int, whole: bool) -> Response:
        opened = reviews.open_dataset(key)
        card = card_of(opened, position, None if whole else LISTED_CHARS)
        return context.page("card.html", key=key, opened=opened, card=card, query="")

    @app.get("/data")
    def datasets() -> Response:
        versions = reviews.list_datasets()
        if len(versions) == 1:
            return RedirectResponse(f"{context.root}/data/{versions[0].key}")
        return context.page("datasets.html", active="data", versions=versions)

    @app.get("/data/decided")
    def decided(since: int) -> dict[str, Any]:
        made = stored(reviews.folder)
        news = [
            {"id": one.id, "reviewer": one.reviewer, "said": f"{one.reviewer} {DONE[one.action]} this row."}
            for one in made[since:]
        ]
        return {"count": len(made), "decisions": news}

    @app.get("/data/{key}")
    def rows(key: str, wanted: Filtered, from_row: str = "") -> Response:
        opened = reviews.open_dataset(key)
        made = stored(reviews.folder)
        last = current(made)
        chosen = chosen_rows(opened, wanted, last)
        # Pages begin at a row and have no numbers: rows leave the list of the undecided ones while they are decided on.
        start = int(np.searchsorted(chosen, int(from_row) - 1)) if from_row.isdecimal() else 0
        start = min(start, max(0, len(chosen) - 1))
        shown = chosen[start:][:ROWS_ON_PAGE]
        return page(
            "rows.html",
            opened,
            key,
            cards=cards_of(opened, shown, last, LISTED_CHARS),
            wanted=wanted,
            query=_query(wanted),
            found=len(chosen),
            decided=len(opened.rows.where("id", equals=last.keys())),
            rules=rules_of(opened),
            seen=len(made),
            start=start,
            from_row=from_row,
            earlier=int(chosen[max(0, start - ROWS_ON_PAGE)]) + 1 if start else None,
            later=int(chosen[start + ROWS_ON_PAGE]) + 1 if start + ROWS_ON_PAGE < len(chosen) else None,
        )

    @app.get("/data/{key}/rows/{position}")
    def row(key: str, position: int, wanted: Filtered, whole: bool = False) -> Response:
        opened = reviews.open_dataset(key)
        made = stored(reviews.folder)
        last = current(made)
        (card,) = cards_of(opened, [_valid(opened, position)], last, None if whole else SHOWN_CHARS)
        chosen = chosen_rows(opened, wanted, last)
        at = int(np.searchsorted(chosen, position))
        after = at + 1 if at < len(chosen) and chosen[at] == position else at
        document = opened.document(card.row.document) if card.row.document else None
        return page(
            "row.html",
            opened,
            key,
            card=card,
            query=_query(wanted),
            earlier=int(chosen[at - 1]) if at else None,
            later=int(chosen[after]) if after < len(chosen) else None,
            place=place_of(card.original, document, whole) if document is not None else None,
            original=parts_of(card.original),
            history=[one for one in made if one.id == card.original.id],
            whole=whole,
            seen=len(made),
        )

    @app.get("/data/{key}/rows/{position}/card")
    def card(key: str, position: int, whole: bool = False) -> Response:
        return card_page(key, position, whole)

    @app.get("/data/{key}/rows/{position}/edit")
    def edit_form(key: str, position: int) -> Response:
        opened = reviews.open_dataset(key)
        card = card_of(opened, position)
        return context.page("edit.html", card=card)

    @app.get("/data/{key}/rows/{position}/tokens")
    def tokens(key: str, position: int) -> Response:
        opened = reviews.open_dataset(key)
        card = card_of(opened, position)
        tokenizer = opened.rendering.tokenizer()
        views, problem = token_views(card.row, opened.kind, tokenizer, opened.rendering.formatting)
        return context.page("tokens.html", views=views, problem=problem, end=tokenizer.eos_token)

    @app.post("/data/{key}/rows/{position}/decision")
    def decide(key: str, position: int, body: Decide) -> dict[str, Any]:
        opened = reviews.open_dataset(key)
        made = stored(reviews.folder)
        (card,) = cards_of(opened, [_valid(opened, position)], current(made), None)
        if card.original.id != body.id:
            raise RequestError("The dataset has another row here now. Reload the page.")
        if card.is_made_later:
            raise RequestError("This row repeats another row in other words. Decide on that row.")
        content = None
        if body.action == "edit":
            content = content_of(with_texts(card.row, opened.kind, body.texts))
        elif body.action == "drop" and not body.reason.strip():
            raise RequestError("The reason is missing. Write why the row is dropped.")
        decision = Decision(
            id=body.id,
            kind=opened.kind,
            action=body.action,
            reviewer=body.reviewer,
            reason=body.reason.strip(),
            content=content,
            source=card.original.source,
            dataset=opened.title,
        )
        store(reviews.folder, decision)
        others = [one for one in made[body.seen :] if one.id == body.id and one.reviewer != body.reviewer]
        counts = "the edit" if (body.action, card.done) == ("accept", DONE["edit"]) else "yours"
        meanwhile = f" {others[-1].reviewer} {DONE[others[-1].action]} it meanwhile; {counts} counts." if others else ""
        return {"said": f"Row {position + 1} is {DONE[body.action]}.{meanwhile}"}

    @app.post("/data/{key}/save")
    def save(key: str) -> dict[str, str]:
        opened = reviews.open_dataset(key)
        if opened.corrected is None:
            raise RequestError(
                f"A dataset of a run is not a file. A recipe with `data.{rows_key(opened.kind)}: review` uses its decisions."
            )
        done = write_corrected(opened, current(stored(reviews.folder)))
        return {
            "said": f"{done.path} has {counted(done.rows, 'row')}: {done.edited} edited, {done.dropped} dropped. "
            f"{opened.title} is unchanged."
        }

    @app.get("/data/{key}/quarantine")
    def quarantine(key: str, reason: str = "", search: str = "", page_number: int = 1) -> Response:
        opened = reviews.open_dataset(key)
        return records_page(key, opened, opened.quarantine, "quarantine", "reason", reason, search, page_number)

    @app.get("/data/{key}/findings")
    def findings(key: str, reason: str = "", search: str = "", page_number: int = 1) -> Response:
        opened = reviews.open_dataset(key)
        return records_page(key, opened, opened.findings, "findings", "rule", reason, search, page_number)

    def records_page(
        key: str, opened: Opened, table: Table, tab: str, column: str, reason: str, search: str, page_number: int
    ) -> Response:
        chosen = table.where(column, equals=[reason]) if reason else table.all
        if search.strip():
            chosen = np.intersect1d(chosen, table.holding(search.strip()))
        number, pages = paged(len(chosen), RECORDS_ON_PAGE, page_number)
        shown = table.records(chosen[(number - 1) * RECORDS_ON_PAGE :][:RECORDS_ON_PAGE])
        joined = "place" if tab == "quarantine" else "id"
        return page(
            "records.html",
            opened,
            key,
            tab=tab,
            records=[{"reason": record[column], **record} for record in shown],
            places=_places(opened.rows, [record[joined] for record in shown]),
            joined=joined,
            reasons=table.counts(column),
            reason=reason,
            search=search,
            found=len(chosen),
            query=urlencode({"reason": reason, "search": search}),
            number=number,
            pages=pages,
        )

    @app.get("/data/{key}/clusters")
    def clusters(key: str, page_number: int = 1) -> Response:
        opened = reviews.open_dataset(key)
        numbers = opened.clusters.numbers("cluster")
        total = len(np.unique(numbers))
        number, pages = paged(total, CLUSTERS_ON_PAGE, page_number)
        first = (number - 1) * CLUSTERS_ON_PAGE
        places = np.arange(*np.searchsorted(numbers, [first, first + CLUSTERS_ON_PAGE]))
        records = opened.clusters.records(places)
        members = [list(rows) for _, rows in groupby(records, key=lambda record: record["cluster"])]
        ids = [record["id"] for rows in members for record in rows[:MEMBERS_SHOWN]]
        rows = _places(opened.rows, ids)
        texts = {row: _start_of(opened, position) for row, position in rows.items()}
        aside = opened.quarantine.where("place", equals=[row for row in ids if row not in texts])
        texts |= {record["place"]: record["text"] for record in opened.quarantine.records(aside)}
        return page(
            "clusters.html",
            opened,
            key,
            clusters=members,
            shown=MEMBERS_SHOWN,
            first=first,
            places=rows,
            texts=texts,
            query="",
            number=number,
            pages=pages,
        )


def _places(table: Table, ids: Sequence[str]) -> dict[str, int]:
    positions = table.where("id", equals=ids)
    return {record["id"]: int(at) for at, record in zip(positions, table.records(positions), strict=True)}


def _start_of(opened: Opened, position: int) -> str:
    row = read_row(opened.rows.records([position])[0], opened.kind)
    return (
        " ".join(part.text[:150] for part in parts_of(row) if part.role == "question")[:200]
        or parts_of(row)[0].text[:200]
    )


def _valid(opened: Opened, position: int) -> int:
    if not 0 <= position < opened.rows.rows:
        raise RequestError(f"The dataset has no row {position + 1}. It has {counted(opened.rows.rows, 'row')}.")
    return position


def _query(wanted: Filter) -> str:
    return urlencode({name: value for name, value in wanted._asdict().items() if value not in ("", None)})
