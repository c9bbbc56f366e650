"""What all pages of the review share: what they show, the Jinja templates, and how hostile text is made visible."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import AfterValidator

from llm_engineering.documents.passages import Passage
from llm_engineering.review.browse import DatasetVersion
from llm_engineering.review.opened_data import Opened

# The pages of the navigation: path and name.
PAGES = (("data", "Data"), ("compare", "Compare"), ("drift", "Drift"))
MAX_NAME_CHARS = 80
# Characters that no font shows: control characters but tab and line feed, those that turn the direction of text, fillers,
# the tags that hide whole sentences, and lone surrogates, which UTF-8 cannot write. The two joiners U+200C and U+200D are
# not in it: Persian, Hindi and emoji need them, and they move no other text.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def visible(value: Any) -> Any:
    """A text whose unseen characters are replaced by their names, e.g. `‹U+202E›`. Other values stay as they are.

    Jinja applies it to each expression of a template, before it escapes the result.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSEEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", value)


def as_typed(text: str) -> Markup:
    """A text for a form field, escaped but with its unseen characters, so that saving it changes nothing else."""
    return escape(text.encode("utf-8", "replace").decode())


def _name(value: str) -> str:
    name = " ".join(value.split())
    if not name or len(name) > MAX_NAME_CHARS or visible(name) != name:
        raise ValueError(f"a reviewer's name has 1 to {MAX_NAME_CHARS} visible characters")
    return name


# The name of a reviewer, in the body of a write.
Reviewer = Annotated[str, AfterValidator(_name)]


class Covered(NamedTuple):
    """What the documents cover: all their passages, and questions that were written from them and held out."""

    passages: Sequence[Passage]
    heldout: Sequence[str]


@dataclass(frozen=True)
class Reviews:
    """What the pages show, and where they store what people say.

    Attributes:
        recipe: the name of the recipe.
        folder: the folder of all reviews of the recipe.
        list_datasets: returns the dataset versions that can be browsed, the newest first.
        served: the folder of what the recipe's server logs.
        read_covered: returns what the documents cover.
        open_dataset: returns a dataset by the `key` of its version. Raises a RequestError if there is none.
    """

    recipe: str
    folder: Path
    list_datasets: Callable[[], Sequence[DatasetVersion]]
    served: Path
    read_covered: Callable[[], Covered]
    open_dataset: Callable[[str], Opened]


@dataclass(frozen=True)
class Context:
    """What the functions that add pages receive.

    Attributes:
        token: the first part of each path. Whoever does not know it gets no page.
        write_secret: the header `X-Review-Write` of each write. Pages hand it to their script.
    """

    reviews: Reviews
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    write_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def root(self) -> str:
        """The start of the path of each page."""
        return f"/{self.token}"

    def page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Render a template. Besides `values` it knows `root`, `navigation`, `recipe` and `write_secret`."""
        shared = {
            "root": self.root,
            "recipe": self.reviews.recipe,
            "write_secret": self.write_secret,
            "navigation": PAGES,
        }
        return HTMLResponse(_TEMPLATES.get_template(template).render(**shared, **values), status)


def paged(found: int, size: int, number: int) -> tuple[int, int]:
    """The number of the page to show of a list, and the number of its pages."""
    pages = max(1, -(-found // size))
    return min(max(1, number), pages), pages


_TEMPLATES = Environment(
    loader=PackageLoader("llm_engineering.review"),
    autoescape=True,
    finalize=visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(as_typed=as_typed, path=lambda text: quote(text, safe=""))
