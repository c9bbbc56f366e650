"""Runs the cases, and prints for each the verdict before its fault was repaired, the right one, and the one that it got.

python -m tests.cases [WORDS]

With words, only the cases whose name contains them. Exit code 1 if any verdict differs from the right one.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import tools.cli  # noqa: F401  It sets the variables that libraries read when they are imported.
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.settings import Settings
from tests.cases.case import Case, agrees, verdict
from tests.cases.figures import FIGURES
from tests.cases.refusals import MACHINES, MODELS, REQUESTS
from tests.cases.rendered import MEANING, TEMPLATES
from tests.cases.table import INPUTS

CASES: list[Case] = [*INPUTS, *MEANING, *TEMPLATES, *MODELS, *REQUESTS, *MACHINES, *FIGURES]


def main(words: str) -> int:
    """Run the cases whose name contains `words`."""
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)), Settings())
    cases = [case for case in CASES if words in case.name]
    differ = 0
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            got = verdict(case, Path(folder), tokenizer)
        differ += not agrees(case, got)
        print("ok     " if agrees(case, got) else "differs", case.name)
        print(
            f"        before:   {case.before or 'right'}\n        expected: {case.expected}\n        got:      {got}",
            flush=True,
        )
    print(f"{len(cases) - differ} of {len(cases)} verdicts are the expected ones.")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
