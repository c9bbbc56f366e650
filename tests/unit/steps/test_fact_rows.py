"""The step that generates instructions counts every question about a fact."""

from collections import Counter

from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.generation.prompts import ANSWER_EXAMPLES, FACT_EXAMPLES
from llm_engineering.generation.types import Answer
from llm_engineering.recipe.data_blocks import DocumentsConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.tiny_models import CPU
from tools.cli import prepare_zenml

prepare_zenml()

import steps.data  # noqa: E402 — ZenML looks for the project when steps are imported

SENTENCE = "The Amber Bell of Corvin was cast long ago by the smith Odo Renn, who lived by the river."


class Asked:
    identity = "scripted"

    def complete(self, prompts, sampling, what, banned=()):
        text = "Odo Renn" if what == "answers from the sentence" else "cast the Amber Bell?"
        return [Answer(text) for _ in prompts]


def test_each_answer_counts_once_for_each_file_of_examples_and_round(monkeypatch):
    logged = []
    monkeypatch.setattr(steps.data, "open_client", lambda *arguments: Asked())
    monkeypatch.setattr(steps.data, "log_rows", lambda *arguments, **facts: logged.append(facts["prompts"]))
    documents = DatasetDict(
        documents=Dataset.from_list([{"id": "1", "source": "doc.md", "title": "Bells", "text": SENTENCE}]),
        **Ledger().datasets(),
    )
    made = steps.data.generate_instructions.entrypoint.__wrapped__(
        documents=documents,
        config=DocumentsConfig(passage_min_chars=10),
        model=ModelConfig(),
        chat_template=None,
        compute=CPU,
        client=ClientConfig(),
        writing=InstructionWriting(questions="fact"),
        seed=1,
        replay=None,
        replay_hash=None,
    )
    assert [row["prompt"][0]["content"] for row in made["rows"]] == [
        "Who cast the Amber Bell?",
        "Which person cast the Amber Bell?",
    ]
    counts = {count["stage"]: (count["read"], count["kept"]) for count in made["counts"]}
    # Two answers, two files, two rounds. The second round writes the same questions again.
    assert counts["instruction"] == (8, 2)
    reasons = Counter(row["reason"] for row in made["quarantine"])
    assert reasons == {"not_confirmed": 4, "repeated_question": 2}
    assert tuple(logged[0]) == (*FACT_EXAMPLES, ANSWER_EXAMPLES)
