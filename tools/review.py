"""The command `review`: pages on loopback on which people read rows, decide on them, and compare answers."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, prepare_zenml

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse

    from llm_engineering.recipe.recipe import Recipe
    from llm_engineering.review.browse import DatasetVersion
    from llm_engineering.review.drift import Covered


def review(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8240,
) -> int:
    """Read rows, decide on them and compare answers, on pages that only this machine can open, until Ctrl-C.

    The printed address contains a secret that is new at each start. Every decision is saved at once.

    Example: `llm-engineering review --port 8300`
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    recipe = load_recipe(config, overrides or ())

    import uvicorn

    from llm_engineering.feedback.served import served_folder
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.review.app import build_app
    from llm_engineering.review.site import Context, Reviews
    from tools.serve import HOST, bind

    settings = Settings()
    settings.check_writable()
    with socket.socket() as listener:
        bind(listener, port, "review")
        prepare_zenml()
        reviews = Reviews(
            recipe=recipe.name,
            folder=settings.llm_output_dir.resolve() / "review" / recipe.name,
            list_datasets=lambda: stored_datasets(recipe.name),
            served=served_folder(settings.llm_output_dir.resolve(), recipe.name),
            read_covered=lambda: covered_by(recipe),
        )
        context = Context(reviews)
        from tools.review_answers import answering

        app = build_app(context, port, answering(recipe, settings))

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                print(f"Review: http://{HOST}:{port}{context.root}/ (Ctrl-C ends it)", flush=True)

        # log_config=None: otherwise uvicorn would add its own handlers for the terminal.
        settings_of_server = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        with contextlib.suppress(KeyboardInterrupt):
            Server(settings_of_server).run(sockets=[listener])
    return 0


def stored_datasets(model: str) -> list[DatasetVersion]:
    """The datasets of all runs of a model, the newest first."""
    from llm_engineering.data.rows import SPLITS
    from llm_engineering.review.browse import DatasetVersion

    return [
        DatasetVersion(
            key=str(artifact.id),
            title=f"{artifact.artifact.name.replace('_', ' ')} {artifact.version}",
            created=f"{artifact.created:%Y-%m-%d %H:%M}",
            made_by=artifact.run.name if artifact.producer_pipeline_run_id else "",
            rows=", ".join(f"{name} {artifact.run_metadata.get(name, '?')}" for name in SPLITS),
        )
        for artifact in _artifacts(model)
    ]


def covered_by(recipe: Recipe) -> Covered:
    """The passages of a recipe's documents, and the held-out questions of its newest instructions.

    Raises:
        RequestError: the recipe reads no documents, they have no passage, or no run has made instructions.
    """
    from llm_engineering.documents.passages import chunks
    from llm_engineering.documents.read import read_documents
    from llm_engineering.review.drift import Covered

    if not recipe.reads_documents:
        raise RequestError(
            f"{recipe.name} reads no documents, so nothing says what they do not cover. Set documents.path and exam, or leave out "
            "data.instructions."
        )
    passages = chunks(read_documents(recipe.documents)[0], recipe.documents)
    newest = next((one for one in _artifacts(recipe.name) if one.artifact.name == "instruction_dataset"), None)
    heldout = [row["prompt"][-1]["content"] for row in newest.load()["test"]] if newest is not None else []
    if not passages or not heldout:
        raise RequestError(
            f"{recipe.name} has no held-out questions to compare with: create them from documents with `make datasets`."
        )
    return Covered(passages, heldout)


def _artifacts(model: str) -> Sequence[ArtifactVersionResponse]:
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from llm_engineering.data.rows import FEATURES

    found = depaginate(Client().list_artifact_versions, model=model, sort_by="desc:created", hydrate=True)
    names = {f"{kind}_dataset" for kind in FEATURES}
    return [artifact for artifact in found if artifact.artifact.name in names]
