"""The command `review`: pages on loopback on which people read rows, decide on them, and compare answers."""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, prepare_zenml

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from zenml.models import ArtifactVersionResponse

    from llm_engineering.documents.document import Document
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.review.browse import DatasetVersion
    from llm_engineering.review.opened_data import Opened, Rendering
    from llm_engineering.review.site import Covered, Reviews


def review(
    file: Annotated[
        str,
        typer.Argument(
            metavar="[DATA]",
            help="A file to review, as for `inspect`. Default: the datasets of the recipe's runs.",
            show_default=False,
        ),
    ] = "",
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8240,
) -> int:
    """Read, correct and judge data and answers on a page of this machine until Ctrl-C.

    Only this machine can open the pages. The printed address contains a secret that is new at each start. Every decision is saved at once.

    Example: `llm-engineering review rows.jsonl`
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    recipe = load_recipe(config, overrides or ())

    from llm_engineering.recipe.settings import Settings
    from llm_engineering.review.app import build_app
    from llm_engineering.review.site import Context
    from tools.servers.review_answers import answering
    from tools.servers.serve import HOST, bind, serve_app

    settings = Settings()
    settings.check_writable()
    with socket.socket() as listener:
        bind(listener, port, "review")
        prepare_zenml()
        context = Context(reviews_of(recipe, file, settings))
        app = build_app(context, port, answering(recipe, settings))

        with contextlib.suppress(KeyboardInterrupt):
            serve_app(app, listener, f"Review: http://{HOST}:{port}{context.root}/", access_log=False)
    return 0


def reviews_of(recipe: Recipe, file: str, settings: Settings) -> Reviews:
    """What the pages show: a file, or without one the datasets of the recipe's runs.

    Raises:
        RequestError: the file is missing, empty or in no known format.
    """
    from llm_engineering.feedback.people import folder_of
    from llm_engineering.recipe.data_blocks import FEEDBACK, REVIEW
    from llm_engineering.review.browse import DatasetVersion
    from llm_engineering.review.opened_data import Rendering, opened_file
    from llm_engineering.review.site import Reviews

    folder = folder_of(REVIEW, recipe.name, settings).resolve()
    rendering = Rendering(functools.cache(lambda: _tokenizer(recipe, settings)), recipe.formatting)
    shown = functools.partial(
        Reviews,
        recipe=recipe.name,
        folder=folder,
        served=folder_of(FEEDBACK, recipe.name, settings).resolve(),
        read_covered=lambda: covered_by(recipe),
    )
    if not file:
        return shown(
            list_datasets=lambda: stored_datasets(recipe.name),
            open_dataset=functools.cache(lambda key: _open_stored(recipe.name, key, rendering)),
        )
    opened = opened_file(file, recipe.data, folder, rendering)
    version = DatasetVersion("file", opened.title, "", "", f"{opened.rows.rows} rows")

    def open_file(key: str) -> Opened:
        if key != version.key:
            raise RequestError(f"This server reviews {file} only. Start another one for a dataset of a run.")
        return opened

    return shown(list_datasets=lambda: [version], open_dataset=open_file)


def stored_datasets(model: str) -> list[DatasetVersion]:
    """The datasets of all runs of a model, the newest first."""
    from llm_engineering.data.rows import SPLITS
    from llm_engineering.review.browse import DatasetVersion

    return [
        DatasetVersion(
            key=str(artifact.id),
            title=_title(artifact),
            created=f"{artifact.created:%Y-%m-%d %H:%M} UTC",
            made_by=artifact.run.name if artifact.producer_pipeline_run_id else "",
            rows=", ".join(f"{name} {artifact.run_metadata[name]}" for name in SPLITS),
        )
        for artifact in _artifacts(model)
    ]


def _open_stored(model: str, key: str, rendering: Rendering) -> Opened:
    from llm_engineering.review.opened_data import opened_run

    artifact = next((one for one in _artifacts(model) if str(one.id) == key), None)
    if artifact is None:
        raise RequestError(f"{model} has no such dataset. Choose one of the list.")

    @functools.cache
    def documents() -> Dataset | None:
        from tools.model_versions.versions import with_origins

        found = next((one for one in with_origins([artifact]) if one.artifact.name == "documents"), None)
        return found.load()["documents"] if found is not None else None

    def document(source: str) -> Document | None:
        import pyarrow.compute as pc

        from llm_engineering.documents.document import Document

        table = documents()
        records = table.data.table.filter(pc.field("source") == source).to_pylist() if table is not None else []
        return Document.model_validate(records[0]) if records else None

    kind = artifact.artifact.name.removesuffix("_dataset")
    return opened_run(_title(artifact), kind, artifact.load(), document, rendering)


def _title(artifact: ArtifactVersionResponse) -> str:
    return f"{artifact.artifact.name.replace('_', ' ')} {artifact.version}"


def covered_by(recipe: Recipe) -> Covered:
    """The passages of a recipe's documents, and the held-out questions of its newest instructions.

    Raises:
        RequestError: the recipe reads no documents, they have no passage, or no run has made instructions.
    """
    from llm_engineering.documents.passages import chunks
    from llm_engineering.documents.read import read_documents
    from llm_engineering.review.site import Covered

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


def _artifacts(model: str) -> list[ArtifactVersionResponse]:
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from llm_engineering.data.storage import FEATURES

    found = depaginate(Client().list_artifact_versions, model=model, sort_by="desc:created", hydrate=True)
    names = {f"{kind}_dataset" for kind in FEATURES}
    return [artifact for artifact in found if artifact.artifact.name in names]


def _tokenizer(recipe: Recipe, settings: Settings) -> PreTrainedTokenizerBase:
    from llm_engineering.models.chat_template import pin_chat_template
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer

    model = pin_revision(recipe.model)
    formatting = pin_chat_template(recipe.formatting, model, settings)
    return load_tokenizer(model, settings, formatting.chat_template)
