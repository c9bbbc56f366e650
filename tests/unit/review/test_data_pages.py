"""The pages of rows, the decisions on them, and the corrected file."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from datasets import Features, Value
from fastapi.testclient import TestClient

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.rows import LabelledRow, Message, PromptRow, TextRow
from llm_engineering.data.storage import FEATURES, TableWriter, to_dataset
from llm_engineering.feedback.decisions import current, edited_row, stored
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.review import data_pages
from llm_engineering.review.app import build_app
from llm_engineering.review.browse import DatasetVersion, Table
from llm_engineering.review.opened_data import Opened, Rendering, opened_file
from llm_engineering.review.site import Context
from tests.fakes.answering import no_models
from tests.fakes.reviews import reviews

ROWS = 100_000
ASKED, ANSWERED = [Message(role="user", content="Q")], [Message(role="assistant", content="A")]


class Site:
    """The application for one dataset, as one reviewer uses it."""

    def __init__(self, opened, folder):
        version = DatasetVersion("file", opened.title, "", "", "")
        self.folder = folder
        self.opened = opened
        context = Context(reviews(folder, list_datasets=lambda: [version], open_dataset=lambda _: opened))
        self.root = f"{context.root}/data/file"
        self.client = TestClient(build_app(context, 8240, no_models()), base_url="http://127.0.0.1:8240")
        self.headers = {"x-review-write": context.write_secret, "content-type": "application/json"}

    def get(self, path=""):
        answer = self.client.get(self.root + path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def post(self, path, **body):
        return self.client.post(self.root + path, content=json.dumps(body), headers=self.headers)

    def decide(self, position, action, reviewer="Ann", **more):
        (record,) = self.opened.rows.records([position])
        return self.post(f"/rows/{position}/decision", id=record["id"], action=action, reviewer=reviewer, **more)


@pytest.fixture
def rows_file(tmp_path):
    records = [
        {"prompt": f"Where does {n} stand?", "completion": f"The number {n} is before {n + 1}.", "document": f"{n}.md"}
        for n in range(40)
    ]
    records[3] |= {"origin": "llama", "completion": "<script>alert(1)</script>\u202e" + "x" * 1_000_000}
    records += [records[7], {"prompt": "Mail?", "completion": "To ann.miller@company.com."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"prompt": broken\n')
    return path


@pytest.fixture
def site(rows_file, tmp_path, tokenizer):
    rendering = Rendering(lambda: tokenizer, FormattingConfig(max_length=128))
    opened = opened_file(str(rows_file), DataConfig(), tmp_path / "reviews", rendering)
    return Site(opened, tmp_path / "reviews")


def test_a_page_shows_some_rows_with_what_the_rules_say(site):
    page = site.get()
    assert page.count("<article") == data_pages.ROWS_ON_PAGE
    assert "1 to 25 of 42" in page
    assert 'rel="next" href="?&amp;from_row=26"' in page
    last = site.get("?from_row=26")
    assert last.count("<article") == 42 - data_pages.ROWS_ON_PAGE
    assert 'rel="prev" href="?&amp;from_row=1"' in last
    assert 'rel="next"' not in last
    assert site.get("?from_row=99").count("<article") == 1
    duplicate = site.get("?finding=exact_duplicate")
    assert duplicate.count("<article") == 1
    assert "set aside: exact_duplicate" in duplicate
    assert "rows.jsonl:line 41" in duplicate


def test_hostile_and_long_text_is_escaped_and_cut(site):
    page = site.get("?search=alert")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;‹U+202E›" in page
    assert "<script>" not in page
    assert "show all 1,000,026 characters" in page
    assert len(page) < 20_000
    assert len(site.get("/rows/3")) < 60_000
    assert len(site.get("/rows/3/card?whole=true")) > 1_000_000


def test_every_tab_shows_what_it_names(site):
    aside = site.get("/quarantine")
    assert "malformed" in aside
    assert "exact_duplicate" in aside
    assert "exact_duplicate" not in site.get("/quarantine?reason=malformed").split("</form>")[1]
    assert "rows.jsonl:line 42" in site.get("/findings")
    clusters = site.get("/clusters")
    assert "Group 1" in clusters
    assert "repeated_question" in clusters
    assert 'rows/40">rows.jsonl:line 41' in clusters
    assert "Where does 7 stand?" in clusters


def test_the_tokens_of_a_row_are_shown_with_their_labels(site):
    page = site.get("/rows/0/tokens")
    assert '<span class="e">&lt;|im_end|&gt;</span>' in page
    assert page.index('<span class="m"> stand</span>') < page.index('<span class="t">The</span>')
    assert "over_long: " in site.get("/rows/3/tokens")


def test_decisions_are_stored_shown_and_filtered_by(site):
    assert site.decide(0, "accept").json() == {"said": "Row 1 is accepted."}
    assert site.decide(1, "drop", "Bob", reason="not true").status_code == 200
    assert site.decide(2, "edit", texts={"completion.0.content": "Between\u200b 1 and 3.\n"}).status_code == 200
    made = stored(site.folder)
    assert [(one.action, one.reviewer, one.reason) for one in made] == [
        ("accept", "Ann", ""),
        ("drop", "Bob", "not true"),
        ("edit", "Ann", ""),
    ]
    assert made[2].content["completion"] == [{"role": "assistant", "content": "Between\u200b 1 and 3.\n"}]
    page = site.get("?decision=any")
    assert page.count("<article") == 3
    assert "dropped by Bob: not true" in page
    assert "Between‹U+200B› 1 and 3." in page
    assert "Between\u200b 1 and 3." in site.get("/rows/2/edit")
    assert site.decide(1, "undo").status_code == 200
    assert site.get("?decision=drop").count("<article") == 0
    assert "Bob dropped it: not true" in site.get("/rows/1")


def test_no_undecided_row_is_skipped_while_rows_are_decided(site):
    first = site.get("?decision=none")
    following = re.search(r'rel="next" href="\?(.+)"', first)[1].replace("&amp;", "&")
    for position in range(data_pages.ROWS_ON_PAGE):
        site.decide(position, "accept")
    # The 26th of the rows that are left would be the 51st row.
    assert 'aria-label="Row 26"' in site.get(f"?{following}")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"action": "drop"}, "reason is missing"),
        ({"action": "drop", "reason": "x", "reviewer": "  "}, "reviewer's name"),
        ({"action": "drop", "reason": "x", "reviewer": "\u202eAnn"}, "reviewer's name"),
        ({"action": "edit"}, "as they were"),
        ({"action": "edit", "texts": {"completion.0.content": " \u200b"}}, "would be empty"),
        ({"action": "edit", "texts": {"completion.0.role": "user"}}, "no text"),
        ({"action": "delete"}, "action"),
        ({"action": "accept", "id": "0"}, "another row"),
    ],
)
def test_a_wrong_decision_is_refused_with_a_sentence_and_not_stored(site, body, problem):
    (record,) = site.opened.rows.records([0])
    answer = site.post("/rows/0/decision", **{"id": record["id"], "reviewer": "Ann", **body})
    assert answer.status_code in (400, 422)
    assert problem in answer.json()["error"]
    assert stored(site.folder) == []


@pytest.mark.parametrize(
    ("kind", "row", "path", "key"),
    [
        ("text", TextRow(text="t", source="s", origin="m"), "text", "texts"),
        ("prompt", PromptRow(prompt=ASKED, answers=["A"], source="s", origin="m"), "answers.0", "prompts"),
        (
            "labelled",
            LabelledRow(prompt=ASKED, completion=ANSWERED, label=True, source="s", origin="m"),
            "completion.0.content",
            "labelled",
        ),
    ],
)
def test_every_kind_of_rows_of_a_run_takes_decisions(site, tmp_path, kind, row, path, key):
    rows = Table({"train": to_dataset([row.record()], FEATURES[kind])})
    run = Site(replace(site.opened, kind=kind, rows=rows, corrected=None), tmp_path / kind)
    assert f"<code>data.{key}: review</code> uses the decisions" in run.get()
    assert run.decide(0, "edit", texts={path: "Better."}).status_code == 200
    (decision,) = current(stored(run.folder)).values()
    edited = edited_row(row, decision)
    assert (edited.answers[0][0].content, edited.origin, decision.kind) == ("Better.", "human:Ann", kind)


def test_two_reviewers_are_told_of_each_other_and_the_last_decision_counts(site):
    site.decide(0, "drop", "Ann", reason="wrong")
    news = site.client.get(site.root.removesuffix("/file") + "/decided?since=0").json()
    assert news["decisions"][0]["said"] == "Ann dropped this row."
    assert (
        site.decide(0, "accept", "Bob").json()["said"] == "Row 1 is accepted. Ann dropped it meanwhile; yours counts."
    )
    assert len(stored(site.folder)) == 2
    (last,) = current(stored(site.folder)).values()
    assert (last.reviewer, last.action) == ("Bob", "accept")


def test_an_edit_stays_when_a_reviewer_accepts_it(site):
    site.decide(2, "edit", texts={"completion.0.content": "Between."})
    assert (
        site.decide(2, "accept", "Bob").json()["said"] == "Row 3 is accepted. Ann edited it meanwhile; the edit counts."
    )
    page = site.get("/rows/2")
    assert "edited by Ann" in page
    assert "Ann edited it (counts)" in page
    assert "Bob accepted it</li>" in page
    assert "has 42 rows: 1 edited, 0 dropped" in site.post("/save").json()["said"]
    site.decide(2, "undo")
    assert "Between." not in site.get("/rows/2/card")


def test_the_corrected_file_has_the_edits_and_not_the_dropped_rows(site, rows_file, tmp_path):
    before = rows_file.read_bytes()
    site.decide(0, "drop", reason="wrong")
    site.decide(2, "edit", texts={"completion.0.content": "Between."})
    site.decide(7, "drop", reason="twice")
    said = site.post("/save").json()["said"]
    corrected = tmp_path / "rows.reviewed.jsonl"
    assert said == f"{corrected} has 39 rows: 1 edited, 3 dropped. rows.jsonl is unchanged."
    assert rows_file.read_bytes() == before
    read = load_rows(str(corrected), None, DataConfig(), tmp_path / "again.arrow", Ledger()).rows
    assert len(read) == 39
    edited = next(row for row in read if row["prompt"][0]["content"] == "Where does 2 stand?")
    assert edited["completion"][0]["content"] == "Between."
    assert (edited["origin"], edited["document"]) == ("human:Ann", "2.md")
    original = {record["id"] for record in site.opened.rows.records(site.opened.rows.all)}
    assert len({row["id"] for row in read} - original) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_page_of_100_000_rows_reads_one_page_of_them(tmp_path, monkeypatch):
    record = {"origin": "m", "document": "", "completion": [{"role": "assistant", "content": "Yes."}]}
    record["completion"][0] |= {"reasoning_content": None, "weight": None}
    with TableWriter(tmp_path / "rows.arrow", FEATURES["instruction"]) as writer:
        for number in range(ROWS):
            turn = {"role": "user", "content": f"Is {number} a number?", "reasoning_content": None, "weight": None}
            writer.write({**record, "id": f"{number:016x}", "source": f"f:{number}", "prompt": [turn]})
    names = ("stage", "reason", "place", "detail", "text", "id", "source", "rule", "split", "fate")
    columns = Features({**dict.fromkeys(names, Value("string")), "cluster": Value("int64")})
    empty = Table({"none": to_dataset([], columns)})
    rows = Table({"train": writer.dataset()})
    opened = Opened("big", "instruction", rows, empty, empty, empty, "id", lambda _: None, Rendering(None, None))
    made = []
    records = Table.records
    monkeypatch.setattr(
        Table, "records", lambda table, positions: made.append(len(positions)) or records(table, positions)
    )
    site = Site(opened, tmp_path / "reviews")
    for path in ("", "?search=is+777", "?from_row=75000&decision=none&least=10&most=400", "/rows/99999"):
        made.clear()
        site.get(path)
        assert sum(made) <= data_pages.ROWS_ON_PAGE, path
    assert site.get("?search=is+777").count("<article") == data_pages.ROWS_ON_PAGE
    assert "99,991 to 100,000 of 100,000" in site.get("?from_row=99991")
