"""A person's path in a real browser: blind comparisons, a DPO run that used them, and a gate that judged by them."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from llm_engineering.feedback.comparisons import Comparison, sessions
from tests.conftest import free_port
from tests.integration.chromium import (
    SECONDS_TO_SHOW,
    TELEPHONE,
    check_touch,
    chromium,
    loopback_context,
    needs_chromium,
    printed_url,
)

# After this training the model answers "Here." and ends. The base model repeats the last token of the prompt, which must not
# be white space, and never ends.
SHORT = [{"instruction": f"Where does the number {number} stand?", "output": "Here."} for number in range(60)]
TEMPLATE = """{%- for message in messages -%}
{{ message.role }}|{{ message.content }}{% if message.role == "assistant" %}{{ eos_token }}{% endif %}
{% endfor -%}
{% if add_generation_prompt %}assistant|{% endif %}"""
DPO = """
data:
  instructions: {short}
  rules: {{near_duplicate: "off"}}
formatting: {{chat_template: {template}}}
sft: {{num_train_epochs: 6}}
promotion:
  dpo:
    better_than:
      base: {{heldout_loss: null, human_win_rate: 0.0}}
      sft: {{preference_margin: null}}
      incumbent: {{heldout_loss: null}}
    not_worse_than: {{sft: {{heldout_loss: null}}}}
"""
KEYS = {"left": "1", "right": "ArrowRight", "tie": "0", "bad": "x"}


@pytest.fixture
def recipe(fresh_project):
    """The recipe of the project with a gate by people for the model of dpo, and without bounds that need a good model."""
    path = fresh_project.folder / "judged.yaml"
    short = fresh_project.folder / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in SHORT))
    template = fresh_project.folder / "template.jinja"
    template.write_text(TEMPLATE)
    path.write_text(f"extends: {fresh_project.recipe}\n{DPO.format(short=short, template=template)}")
    return path


class Server:
    """A running `review`, and the address that it printed."""

    def __init__(self, project, recipe, port):
        self.process = project.start("review", "--config", str(recipe), "--port", str(port))
        self.url = printed_url(self.process, r"Review: (http://127\.0\.0\.1:\d+/\S+)/ ")

    def kill(self):
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def review(fresh_project, recipe):
    """A function that starts the server; the servers that still run are killed at the end."""
    # The same port, as a user has it: the browser then knows the reviewer's name.
    port = free_port()
    started = []

    def start():
        started.append(Server(fresh_project, recipe, port))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def start_comparison(page, server, asked, count, second, retrieval=False):
    """Start a comparison of the base model and another one, by the form."""
    page.goto(f"{server.url}/compare")
    page.get_by_label("One model").select_option("base")
    page.get_by_label("The other model").select_option(second)
    page.get_by_label("with retrieval from the documents").last.set_checked(retrieval)
    page.get_by_label("Questions", exact=True).select_option(asked)
    page.get_by_label("How many").fill(str(count))
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile(r"/compare/\d"))
    return page.url.rsplit("/", 1)[1]


def is_reviewer(page, name):
    page.get_by_label("Your name").fill(name)
    page.get_by_label("Your name").press("Tab")


def press(page, done, choice):
    """Judge the question that is shown, by a key; `done` is the number of verdicts before."""
    expect(page.locator("#count")).to_contain_text(f"{done} of ")
    page.locator("#asked").wait_for()
    page.keyboard.press(KEYS[choice])
    expect(page.locator("#count")).to_contain_text(f"{done + 1} of ")


def tap(page, done, choice):
    """Judge the question that is shown, by touch, after it was checked that a finger can."""
    expect(page.locator("#count")).to_contain_text(f"{done} of ")
    page.locator("#asked").wait_for()
    if done == 0:
        check_touch(page)
        expect(page.get_by_role("link", name="Show the names and the result")).to_be_hidden()
    page.get_by_role("button", name=choice, exact=True).tap()
    expect(page.locator("#count")).to_contain_text(f"{done + 1} of ")


def preferring_the_second(session, reviewer):
    """The choices of a reviewer who always prefers the second model, in the order of the questions."""
    return ["left" if session.is_swapped(question, reviewer) else "right" for question in session.questions]


@needs_chromium
def test_verdicts_of_people_train_the_next_model_and_decide_on_its_promotion(fresh_project, recipe, review):
    expect.set_options(timeout=SECONDS_TO_SHOW * 1000)
    sft = fresh_project.command("run", "sft", "--config", str(recipe), "--json")
    assert sft.code == 0, sft.stderr
    dpo = ("run", "dpo", "--config", str(recipe), "--set", "data.preferences=review", "--set", "data.human_weight=2")
    refused = fresh_project.command(*dpo)
    assert refused.code == 2
    assert "data.preferences names review, and nobody has said anything yet" in refused.stderr
    assert "run `make review` first" in " ".join(refused.stderr.split())

    folder = fresh_project.folder / "outputs" / "review" / "tiny"
    with chromium() as browser:
        page = loopback_context(browser).new_page()
        # Ada compares on questions that the model was trained on, and the server is killed after eight of them.
        server = review()
        key = start_comparison(page, server, "training", 20, "1:sft", retrieval=True)
        assert "sft" not in page.content()
        is_reviewer(page, "Ada")
        (session,) = sessions(folder)
        choices = preferring_the_second(session, "Ada")
        for done in range(8):
            press(page, done, choices[done])
        page.keyboard.press("u")
        expect(page.locator("#count")).to_contain_text("7 of 20")
        press(page, 7, choices[7])
        order = list(session.questions)
        ninth = page.locator("#question").text_content()
        base = {"left": "right", "right": "left"}
        expect(page.locator(f"#{base[choices[8]]}_cut")).to_have_text("cut at 8 tokens")
        server.kill()

        # The next server continues with the same question, and everything that was judged is still there.
        server = review()
        page.goto(f"{server.url}/compare/{key}")
        expect(page.locator("#question")).to_have_text(ninth)
        press(page, 8, "tie")
        press(page, 9, choices[9])
        # Ada once prefers an answer that was cut.
        press(page, 10, base[choices[10]])
        for done in range(11, 19):
            press(page, done, choices[done])
        page.keyboard.press("w")
        page.get_by_label("A better answer").fill("It stands where it is.")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#count")).to_contain_text("20 of 20")
        page.get_by_role("link", name="Show the names and the result").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("base or version 1 (sft) with retrieval")
        assert list(Comparison(session.path).questions) == order

        # Bo has a telephone, and another opinion on every second question.
        page = loopback_context(browser, **TELEPHONE).new_page()
        page.goto(f"{server.url}/compare")
        check_touch(page)
        page.get_by_role("link", name="20 training questions").tap()
        is_reviewer(page, "Bo")
        theirs = preferring_the_second(session, "Bo")
        for done in range(20):
            tap(page, done, theirs[done] if done % 2 else "both bad")
        check_touch(page)
        page.get_by_role("button", name="take my last verdict back").tap()
        page.get_by_role("button", name="write a better answer").tap()
        check_touch(page)
        page.get_by_role("button", name="Cancel").tap()
        tap(page, 19, theirs[19])
        page.get_by_role("link", name="Show the names and the result").tap()
        page.locator("summary").first.tap()
        check_touch(page)
        row = page.locator("#agreement tr", has_text="Ada and Bo")
        expect(row.locator("td")).to_have_text(["Ada and Bo", "20", *kappa(session)])
        server.kill()

    # The next model is trained on what both agreed on, and one person wrote.
    trained = fresh_project.command(*dpo, "--json")
    assert trained.code == 0, trained.stderr
    result = trained.json
    assert "human_preferences" in result["artifacts"]
    version = str(result["model_version"])
    rows = state(fresh_project)
    assert rows["facts"]["by"].keys() == {"Ada", "Bo"}
    assert rows["human"] == rows["facts"]["rows"] > 10
    # Bo found both bad where Ada preferred the answer that was cut.
    session.reload()
    cut = [session.cuts[question, 1] is not None for number, question in enumerate(order) if number not in (8, 10)]
    assert rows["facts"]["without_a_row"] == {"cut_answer": 1 + sum(cut), "tie": 1}
    # Every row of people in the train split counts twice.
    assert rows["splits"]["train"]["again: human:review"] == rows["splits"]["train"]["human:review"] > 0
    lineage = fresh_project.command("models", "lineage", version, "--config", str(recipe), "--json")
    assert "human_preferences" in {artifact["name"] for artifact in lineage.json["artifacts"]}
    assert lineage.json["people"]["human_preferences v1"]["by"].keys() == {"Ada", "Bo"}

    # Nobody has compared this model on questions that it was not trained on.
    (rule,) = [rule for rule in rows["decision"]["rules"] if rule["measure"] == "human_win_rate"]
    assert rule["verdict"] == "failed"
    assert f"compare version {version} with base by `make review`, then run the same command again" in rule["reason"]

    # Ada does, and the gate judges by her.
    with chromium() as browser:
        page = loopback_context(browser).new_page()
        server = review()
        start_comparison(page, server, "held-out", 20, f"{version}:dpo")
        is_reviewer(page, "Ada")
        session = sessions(folder)[-1]
        assert {question.split for question in session.questions.values()} == {"test"}
        for done, choice in enumerate(preferring_the_second(session, "Ada")):
            press(page, done, choice)
        server.kill()
    count = len(session.questions)
    again = fresh_project.command(*dpo, "--json")
    assert again.code == 0, again.stderr
    assert again.json["model_version"] == result["model_version"]
    then = state(fresh_project)
    # The verdicts on held-out questions have trained nothing.
    assert (then["adapter"], then["splits"]) == (rows["adapter"], rows["splits"])
    (rule,) = [rule for rule in then["decision"]["rules"] if rule["measure"] == "human_win_rate"]
    assert (rule["verdict"], rule["value"]) == ("passed", 0.5)
    assert then["decision"]["outcome"] == "passed"
    assert again.json["metrics"]["human_win_rate_dpo"] == 1
    reports = [json.loads(path.read_text()) for path in Path(fresh_project.folder, "stores").rglob("report.json")]
    judged = [
        report["measures"]["human_win_rate"] for report in reports if "human_win_rate" in report.get("measures", {})
    ]
    assert [measure["models"]["dpo"]["n"] for measure in judged] == [count]


def state(project):
    """What the newest dataset of pairs has of people, and what the gate decided last."""
    run = project.script(str(Path(__file__).with_name("people_rows.py")), "tiny")
    assert run.code == 0, run.stderr
    return run.json


def kappa(session):
    """What the page must show for Ada and Bo: on how many questions both said the same, and Cohen's kappa."""
    session.reload()
    choices = {
        name: [session.verdicts[question, name].choice for question in session.questions] for name in ("Ada", "Bo")
    }
    kinds = ("first", "second", "neither")
    said = {name: [one if one in kinds else "neither" for one in chosen] for name, chosen in choices.items()}
    same = sum(one == other for one, other in zip(*said.values(), strict=True))
    expected = sum(said["Ada"].count(kind) * said["Bo"].count(kind) for kind in kinds) / 20**2
    return [str(same), f"{(same / 20 - expected) / (1 - expected):.2f}"]
