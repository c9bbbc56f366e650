"""Has the model of an endpoint rewrite each passage in other forms, and checks every claim against the passage."""

from __future__ import annotations

from collections.abc import Sequence

from llm_engineering.data.rows import Quarantined, TextRow, normalised
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.sentences import known_names
from llm_engineering.generation.derived.claims import missing_claims
from llm_engineering.generation.prompts import prompt_hash, read_prompt
from llm_engineering.generation.types import Client, Failure, Sampling
from llm_engineering.recipe.generation_blocks import Rewriting, TextWriting


def prompt_file(kind: Rewriting) -> str:
    """The prompt file of a kind."""
    return f"rewrite_{kind}"


def rewrite_by_endpoint(
    passages: Sequence[Passage], client: Client, writing: TextWriting, seed: int
) -> tuple[list[TextRow], list[Quarantined]]:
    """Have the client rewrite each passage once in every kind of `writing.rewritings`.

    A rewriting with a name, number or date that is not in its passage is quarantined, and so is a copy of the passage.
    """
    names = known_names(passage.text for passage in passages)
    rows: list[TextRow] = []
    quarantine: list[Quarantined] = []
    for kind in writing.rewritings:
        prompt = read_prompt(prompt_file(kind))
        requests = [
            [{"role": "user", "content": prompt.format(title=passage.title, passage=passage.text)}]
            for passage in passages
        ]
        sampling = Sampling(writing.rewriting_max_new_tokens, client.temperature, seed, json_field="text")
        versioned = f"{kind} (prompt {prompt_hash(prompt_file(kind))})"
        for passage, outcome in zip(passages, client.answer(requests, sampling, f"{kind} rewritings"), strict=True):
            problem = outcome if isinstance(outcome, Failure) else _problem(outcome.text, passage, names)
            if problem is not None:
                detail = f"{versioned}: {problem.detail}" if problem.detail else versioned
                quarantine.append(passage.set_aside("text", problem.reason, detail, problem.text))
                continue
            rows.append(
                TextRow(
                    text=outcome.text.strip(),
                    source=passage.source,
                    origin=f"{versioned} by {client.identity}",
                    document=passage.document,
                )
            )
    return rows, quarantine


def _problem(text: str, passage: Passage, names: set[str]) -> Failure | None:
    if normalised(text) == normalised(passage.text):
        return Failure("copied_passage", "", text)
    missing = missing_claims(text, f"{passage.title}\n{passage.text}", names)
    return Failure("claim_not_in_passage", ", ".join(missing), text) if missing else None
