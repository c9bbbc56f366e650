"""The pages of *Data*: lists of datasets and their rows, and the decisions of reviewers on rows."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from llm_engineering.review.site import Context


def add_data_pages(app: FastAPI, context: Context) -> None:
    """Add the pages under `/data`."""

    @app.get("/data")
    def datasets() -> Response:
        return context.page("datasets.html", active="data", versions=context.reviews.list_datasets())
