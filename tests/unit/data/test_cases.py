"""Every case of `python -m tests.cases` gets its expected verdict."""

import pytest

from tests.cases.__main__ import agrees, verdict
from tests.cases.table import CASES


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_input_gets_its_expected_verdict(case, tmp_path, tokenizer):
    got = verdict(case, tmp_path, tokenizer)
    assert agrees(case, got), got
