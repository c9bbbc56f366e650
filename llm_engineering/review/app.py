"""The application of `make review`: its pages, and the checks that every request must pass."""

from __future__ import annotations

import logging
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.review.comparison_pages import Answering, add_comparison_pages
from llm_engineering.review.data_pages import add_data_pages
from llm_engineering.review.drift_page import add_drift_page
from llm_engineering.review.site import Context

logger = logging.getLogger(__name__)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Otherwise a link to another site would send it the token.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def build_app(context: Context, port: int, answering: Answering) -> FastAPI:
    """The application. Its server must listen on loopback only.

    Args:
        port: the port of the server, which the `Host` of each request must name.
    """
    app = FastAPI(openapi_url=None)
    app.add_middleware(Protection, context=context, port=port)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))

    @app.get("/")
    def start() -> Response:
        return RedirectResponse(f"{context.root}/data")

    add_data_pages(app, context)
    add_comparison_pages(app, context, answering)
    add_drift_page(app, context)
    _add_error_pages(app, context)
    return app


def _add_error_pages(app: FastAPI, context: Context) -> None:
    def failed(request: Request, sentence: str, status: int) -> Response:
        if request.method == "POST":
            return JSONResponse({"error": sentence}, status)
        return context.page("error.html", status, active="", sentence=sentence)

    @app.exception_handler(RequestError)
    def wrong_request(request: Request, error: RequestError) -> Response:
        return failed(request, str(error), 400)

    @app.exception_handler(WorkError)
    def failed_work(request: Request, error: WorkError) -> Response:
        return failed(request, str(error), 500)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])
        return failed(request, f"{where}: {problem['msg'].removeprefix('Value error, ')}.", 422)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s failed", request.url.path.removeprefix(context.root), exc_info=error)
        return failed(request, f"{type(error).__name__}: {error}. The terminal of this server has the traceback.", 500)

    @app.exception_handler(HTTPException)
    def no_page(request: Request, error: HTTPException) -> Response:
        sentence = "There is no such page. Choose one above." if error.status_code == 404 else error.detail
        return failed(request, sentence, error.status_code)


class Protection:
    """Refuses every request that does not come from a page of this server, and adds the headers of all answers.

    A request must name this server as its host, so that no other name can be made to point at it (DNS rebinding), and its
    path must begin with the token. A write must besides be JSON with the secret of the pages, and come from this origin:
    a form or a script of another site can do none of this.
    """

    def __init__(self, app: ASGIApp, context: Context, port: int) -> None:
        self.app = app
        self.context = context
        self.hosts = (f"127.0.0.1:{port}", f"localhost:{port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        problem = self._problem(scope)
        if problem:
            await PlainTextResponse(f"{problem}\n", 403)(scope, receive, send_with_headers)
            return
        await self.app({**scope, "root_path": self.context.root}, receive, send_with_headers)

    def _problem(self, scope: Scope) -> str:
        """Why a request is refused; empty if it is not."""
        if scope["type"] != "http":
            return "This server has only pages."
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self.hosts:
            return "This server does not have this name. Open the address that `make review` printed."
        token = scope["path"][1:].partition("/")[0]
        if not _same(token, self.context.token):
            return "The address lacks the token of this server. Open the address that `make review` printed last."
        if scope["method"] in ("GET", "HEAD"):
            return ""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin not in (None, f"http://{host}") or site not in (None, "same-origin"):
            return "Another site tried to write. Only pages of this server may."
        if scope["method"] != "POST" or headers.get("content-type", "").partition(";")[0] != "application/json":
            return "A write must be a POST of JSON."
        if not _same(headers.get("x-review-write", ""), self.context.write_secret):
            return "A write must come from a page of this server. Reload the page."
        return ""


def _same(one: str, other: str) -> bool:
    # In constant time, so that the duration does not show how many characters are right.
    return secrets.compare_digest(one.encode("utf-8", "replace"), other.encode())
