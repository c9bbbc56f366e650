"""Every case of `python -m tests.cases` gets its expected verdict."""

import pytest

from tests.cases.__main__ import CASES
from tests.cases.case import FigureCase, agrees, verdict

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = [case for case in CASES if not (isinstance(case, FigureCase) and case.slow)]


@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_each_input_gets_its_expected_verdict(case, tmp_path, tokenizer):
    got = verdict(case, tmp_path, tokenizer)
    assert agrees(case, got), got
