"""The models of blind comparisons: which there are, what they are asked, and their answers, made in the background."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_engineering.data.rows import REPEATED, REPLAY, SPLITS, Message, instruction_row
from llm_engineering.data.storage import stream_records
from llm_engineering.documents.passages import Passage, chunks
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.measures.exam import retrieve, with_passages
from llm_engineering.evaluation.measures.human_preference import identities
from llm_engineering.evaluation.models import BASE, Models
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.feedback.comparisons import Compared, Comparison, Question, question_of
from llm_engineering.generation.derived.question_wordings import OTHER_WORDING
from llm_engineering.models.chat_template import pin_chat_template
from llm_engineering.models.revision import check_unchanged, pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from llm_engineering.review.comparison_pages import Answering, Model
from pipelines.registry import stages
from tools.model_versions.versions import all_versions, find_model, newest_artifacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("llm_engineering.review")

# The first batch is small, so that people can begin to judge while the models answer the others.
_FIRST = 4
# Which split the questions of a source are from.
_SPLIT_OF = {"held-out": SPLITS[2], "training": SPLITS[0]}


class _Side(NamedTuple):
    """A model to load: its base model, its tokenizer, and the folder of its weights, or None for the base model itself."""

    base: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None


def answering(recipe: Recipe, settings: Settings) -> Answering:
    """What the pages of *Compare* need to know about the models of a recipe on this machine."""
    config = recipe.evaluation
    answerer = Answerer(recipe, settings)
    return Answering(
        models=lambda: _models(recipe.name),
        compared=lambda key, retrieval: _compared(recipe, key, retrieval),
        questions=lambda asked: _questions(recipe, asked),
        begin=answerer.begin,
        progress=answerer.progress,
        judge=lambda session: _judged(recipe.name, session),
        bootstrap=Bootstrap(config.bootstrap_samples, config.confidence, recipe.seed),
    )


class Answerer:
    """Answers the questions of sessions one after the other, in one thread, so that one pair of models is in memory.

    Answers are greedy, at most as long as those of the evaluation, and stored as they come: after a kill, only what is missing
    is answered.
    """

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self._recipe, self._settings = recipe, settings
        self._queue: queue.Queue[Path] = queue.Queue()
        self._lock = threading.Lock()
        # What to say about each session that waits, is answered now, or failed.
        self._said: dict[Path, str] = {}
        self._active: set[Path] = set()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, session: Comparison) -> None:
        """Answer a session in the background, unless it is answered or waits already."""
        with self._lock:
            if session.path in self._active or all(map(session.is_answered, session.questions)):
                return
            self._active.add(session.path)
            self._said[session.path] = "The comparison waits for the models."
        self._queue.put(session.path)

    def progress(self, session: Comparison) -> str:
        """What happens to a session, in a sentence; empty if its questions are being answered, or are answered."""
        return self._said.get(session.path, "")

    def _work(self) -> None:
        while True:
            path = self._queue.get()
            try:
                self._answer(Comparison(path))
                self._said[path] = ""
            except (RequestError, WorkError) as error:
                self._said[path] = str(error)
            except Exception as error:
                # The page must say why no answer comes, whatever happened in this thread.
                logger.exception("The models could not answer")
                self._said[path] = f"The models could not answer ({error}): reload the page to try again."
            finally:
                with self._lock:
                    self._active.discard(path)

    def _answer(self, session: Comparison) -> None:
        self._said[session.path] = "The models are being loaded."
        asked = list(session.questions.values())
        prompts = [self._prompts(asked, model.retrieval) for model in session.models]
        loaded = _load([model.key for model in session.models], self._recipe, self._settings)
        self._said[session.path] = ""
        size = self._recipe.evaluation.batch_size
        for start, end in pairwise([0, *range(min(_FIRST, size), len(asked), size), len(asked)]):
            places = range(start, end)
            for side, (models, name) in enumerate(loaded):
                left = [place for place in places if (asked[place].id, side) not in session.answers]
                texts = [prompts[side][place] for place in left]
                samples = models.answers(name, texts, self._recipe.evaluation.max_new_tokens) if texts else []
                for place, sample in zip(left, samples, strict=True):
                    session.answer(asked[place].id, side, sample.text, sample.cut)

    def _prompts(self, asked: Sequence[Question], retrieval: bool) -> list[list[Message]]:
        """The conversation of each question, with passages of the documents before the last turn, as in the exam."""
        if not retrieval:
            return [question.prompt for question in asked]
        recipe = self._recipe
        count = recipe.exam.retrieval_passages if recipe.exam is not None else 0
        count = count or ExamConfig.model_fields["retrieval_passages"].default
        passages: list[Passage] = chunks(read_documents(recipe.documents)[0], recipe.documents)
        last = [question.prompt[-1] for question in asked]
        found = retrieve([turn.content for turn in last], passages, count)
        return [
            [*question.prompt[:-1], turn.model_copy(update={"content": with_passages(turn.content, best)})]
            for question, turn, best in zip(asked, last, found, strict=True)
        ]


def _models(model: str) -> list[Model]:
    """The base model, and the models of all versions, the newest first."""
    state = stages(model)
    held = {version.number: "in production" for version in state.production[-1:]}
    held |= {state.staging.number: "in staging"} if state.staging is not None else {}
    found = [Model(BASE, "the base model")]
    for version in all_versions(model):
        artifacts = newest_artifacts(version)
        note = f", {held[version.number]}" if version.number in held else ""
        made = [name for name, stage in STAGES.items() if stage.policy and f"{name}_adapter" in artifacts]
        number = version.number
        found += [Model(f"{number}:{stage}", f"version {number} ({stage}{note})") for stage in reversed(made)]
    return found


def _compared(recipe: Recipe, key: str, retrieval: bool) -> Compared:
    if key not in {model.key for model in _models(recipe.name)}:
        raise RequestError("There is no such model any more: reload the page and choose another one.")
    side = _side(key, recipe, Settings())
    known = identities(side.base, {} if side.folder is None else {key: side.folder})
    # Without the stage of the registry, which changes.
    number, _, stage = key.partition(":")
    name = BASE if key == BASE else f"version {number} ({stage})"
    return Compared(key=key, name=name, identity=known[key], retrieval=retrieval)


def _side(key: str, recipe: Recipe, settings: Settings) -> _Side:
    if key == BASE:
        base = pin_revision(recipe.model)
        template = pin_chat_template(recipe.formatting, base, settings).chat_template
        return _Side(base, load_tokenizer(base, settings, template), None)
    number, _, stage = key.partition(":")
    found = find_model(recipe, number)
    check_unchanged(found.base)
    folder = found.folders[stage]
    # The tokenizer is saved with the trained model, with the chat template of training.
    return _Side(found.base, load_tokenizer(found.base.saved_in(folder), settings), folder)


def _load(keys: Sequence[str], recipe: Recipe, settings: Settings) -> list[tuple[Models, str]]:
    """The models of both sides, each with its name there. Models of one base model and chat template are loaded together."""
    sides = {key: _side(key, recipe, settings) for key in keys}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, side in sides.items():
        base = side.base
        prompts = (side.tokenizer.chat_template, side.tokenizer.eos_token, side.tokenizer.bos_token)
        same = (base.name_or_path, base.revision, tuple(base.added_tokens), *prompts)
        groups.setdefault(same, []).append(key)
    loaded: dict[str, tuple[Models, str]] = {}
    for group in groups.values():
        # PEFT takes no `:` in the name of an adapter.
        named = {key: BASE if sides[key].folder is None else key.replace(":", "_") for key in group}
        adapters = {named[key]: folder for key in group if (folder := sides[key].folder) is not None}
        first = sides[group[0]]
        models = Models.load(first.base, adapters, first.tokenizer, recipe.evaluation, recipe.compute.here, settings)
        loaded |= {key: (models, named[key]) for key in group}
    return [loaded[key] for key in keys]


def _questions(recipe: Recipe, asked: str) -> list[Question]:
    """The questions of a split of the newest instructions, each once and without general ones."""
    from tools.dataset import newest_dataset

    dataset = newest_dataset(recipe, "instruction")[1].load()
    split = _SPLIT_OF[asked]
    rows = map(instruction_row, stream_records(dataset[split]))
    others = (OTHER_WORDING, REPEATED, REPLAY)
    return [question_of(row, split) for row in rows if not row.origin.startswith(others)]


def _judged(model: str, session: Comparison) -> dict[str, str]:
    """The verdicts of the judge of the evaluation on the same answers, by question: `first`, `second` or `neither`."""
    keys = [compared.key for compared in session.models]
    if any(compared.retrieval for compared in session.models):
        return {}
    found: dict[str, str] = {}
    for version in all_versions(model):
        if not any(key.startswith(f"{version.number}:") for key in keys):
            continue
        report = newest_artifacts(version).get("evaluation_report")
        if report is not None:
            names = [BASE if key == BASE else key.removeprefix(f"{version.number}:") for key in keys]
            found |= judged_in(report.load().report(), names, session)
    return found


def judged_in(report: Mapping[str, Any], names: Sequence[str], session: Comparison) -> dict[str, str]:
    """The verdicts of the judge in an evaluation report, on the questions of a session to which it knew the same answers.

    Args:
        names: the names of the session's models in the report.
    """
    newest = report["newest"]
    duels = (report["judge"] or {}).get("duels", {})
    other = next((name for name in names if name != newest), None)
    duel = duels.get(f"{newest}-{other}")
    if duel is None or newest not in names:
        return {}
    by_prompt = {question.prompt[-1].content: key for key, question in session.questions.items()}
    scores = {"won": 1, "lost": -1}
    found: dict[str, str] = {}
    # Both lists are in the order of the rows; the report shows the first answers only.
    for sample, outcomes in zip(report["samples"], duel["outcomes"], strict=False):
        key = by_prompt.get(sample["prompt"])
        texts = [sample["answers"][name]["text"] for name in names]
        if key is None or texts != [session.answers.get((key, side)) for side in (0, 1)]:
            continue
        score = sum(scores.get(outcome, 0) for outcome in outcomes) * (1 if names[0] == newest else -1)
        found[key] = "first" if score > 0 else "second" if score < 0 else "neither"
    return found
