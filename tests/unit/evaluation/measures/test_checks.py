"""The user's own checks: which answers pass, and which files are refused."""

import json

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.checks import Check, check_report, read_checks


@pytest.mark.parametrize(
    ("conditions", "answer", "failures"),
    [
        ({"must_contain": ["a", "list"]}, "a list", 0),
        ({"must_contain": ["a", "tuple", "set"]}, "a list", 2),
        ({"must_contain": "List"}, "a list", 1),
        ({"must_not_contain": ["tuple"]}, "a list", 0),
        ({"must_not_contain": ["list", "a "]}, "a list", 2),
        ({"regex": r"^a (list|set)$"}, "a list", 0),
        ({"regex": "(?i)LIST"}, "a list", 0),
        ({"regex": r"\d"}, "a list", 1),
        ({"exact": "a list"}, " a list\n", 0),
        ({"exact": "a list"}, "a list.", 1),
        ({"must_contain": "list", "exact": "a"}, "a", 1),
        ({"exact": ""}, "", 0),
    ],
)
def test_an_answer_passes_if_it_meets_every_condition(conditions, answer, failures):
    check = Check.model_validate({"prompt": "What is it?", **conditions})
    assert len(check.failures(answer)) == failures


def test_the_system_message_comes_first():
    check = Check(prompt="Why?", system="Be short.", exact="So.")
    assert [(m.role, m.content) for m in check.messages] == [("system", "Be short."), ("user", "Why?")]


GOOD = json.dumps({"prompt": "Why?", "must_contain": "because"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "Why?"', ["JSON"]),
        ('{"prompt": "Why?"}', ["it has no condition"]),
        ('{"must_contain": "x"}', ["`prompt`"]),
        ('{"prompt": "", "exact": "x"}', ["`prompt`"]),
        ('{"prompt": "Why?", "must_contian": "x", "exact": "y"}', ["unknown key `must_contian`", "must_contain"]),
        ('{"prompt": "Why?", "must_contain": [""]}', ["must_contain.0"]),
        ('{"prompt": "Why?", "must_contain": 3}', ["must_contain"]),
        ('{"prompt": "Why?", "regex": "("}', ["`regex`", "'(' is not a regular expression"]),
        ("[]", ["line 3"]),
        ("null", ["line 3"]),
    ],
)
def test_the_error_names_the_bad_line(tmp_path, line, words):
    file = tmp_path / "checks.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(RequestError) as error:
        read_checks(str(file))
    for word in (f"{file}, line 3:", *words):
        assert word in str(error.value)


def test_files_without_checks_are_refused(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_checks(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="holds no check"):
        read_checks(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(RequestError, match="cannot be read"):
        read_checks(str(tmp_path / "latin.jsonl"))


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    file = tmp_path / "checks.jsonl"
    # U+2028 within a string does not end a line of JSONL.
    file.write_text(json.dumps({"prompt": "a\u2028b", "exact": "c"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [check.prompt for check in read_checks(str(file))] == ["a\u2028b"]


def test_the_report_lists_the_unmet_conditions_of_each_answer():
    checks = [Check(prompt="One?", exact="1"), Check(prompt="Two?", must_contain=["2"])]
    found = check_report(checks, {"base": ["1", "3"], "sft": ["1", "2"]})
    assert found["passed"] == {"base": 1, "sft": 2}
    assert found["rows"][1]["answers"]["base"] == {"text": "3", "failures": ["lacks '2'"]}
