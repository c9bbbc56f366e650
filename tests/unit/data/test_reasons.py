"""Every reason of the quarantine has a sentence."""

import ast

from llm_engineering.data.formats.conversations import MEANINGFUL
from llm_engineering.data.reasons import REASONS
from llm_engineering.data.rows import ROW_CLASSES
from llm_engineering.feedback.decisions import DROPPED
from llm_engineering.recipe.data_blocks import RulesConfig
from tests.conftest import ROOT

# The calls that set a row, passage or document aside; one of their arguments is the reason.
CALLS = {"BadRowError", "UnreadableError", "UnrenderableError", "RowRefusedError", "Failure", "not_read", "_set_aside", "_rejected",
         "_quarantined", "Quarantined", "_aside"}  # fmt: skip
PACKAGES = ("data", "documents", "formatting", "generation", "evaluation", "feedback")


def written_reasons():
    """The reasons that the code writes as texts: single words, but for the names of the kinds."""
    for package in PACKAGES:
        for file in (ROOT / "llm_engineering" / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in CALLS:
                    continue
                named = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
                texts = [value.value for value in named or node.args if isinstance(value, ast.Constant)]
                yield from (text for text in texts if str(text).replace("_", "").isalpha() and text not in ROW_CLASSES)


def test_every_reason_has_one_sentence():
    found = set(written_reasons())
    assert len(found) > 40
    rules = {*RulesConfig.model_fields, DROPPED}
    assert (found | rules | set(MEANINGFUL.values())) - REASONS.keys() == set()
    for sentence in REASONS.values():
        assert sentence[0].isupper()
        assert sentence.endswith(".")
