"""What the review knows of the models of blind comparisons."""

import pytest

from llm_engineering.feedback import comparisons
from llm_engineering.feedback.comparisons import Compared, own_question
from tools.cli import prepare_zenml

prepare_zenml()

from tools.servers.review_answers import judged_in  # noqa: E402

ANSWERS = {"base": "It is red.", "dpo": "It is blue."}
QUESTIONS = ("Who?", "What?", "When?", "Where?")


def sample(question, **answers):
    texts = {name: {"text": text, "stopped": True} for name, text in (ANSWERS | answers).items()}
    return {"prompt": question, "reference": "", "answers": texts}


REPORT = {
    "newest": "dpo",
    "samples": [sample("Who?"), sample("What?"), sample("When?"), sample("Where?", dpo="It is green.")],
    "judge": {"duels": {"dpo-base": {"outcomes": [["won", "tie"], ["won", "lost"], ["lost", "lost"], ["won", "won"]]}}},
}


@pytest.mark.parametrize(
    ("names", "verdicts"),
    [
        (["base", "dpo"], {"Who?": "second", "What?": "neither", "When?": "first"}),
        (["dpo", "base"], {"Who?": "first", "What?": "neither", "When?": "second"}),
        (["sft", "base"], {}),
    ],
)
def test_the_judge_is_asked_only_about_the_same_answers(names, verdicts, tmp_path):
    models = [Compared(key=name, name=name, identity=name) for name in names]
    session = comparisons.start(tmp_path, models, [own_question(text, "own") for text in QUESTIONS], "own", seed=1)
    for key in session.questions:
        for side, name in enumerate(names):
            session.answer(key, side, ANSWERS.get(name, ""))
    found = judged_in(REPORT, names, session)
    assert {session.questions[key].prompt[0].content: verdict for key, verdict in found.items()} == verdicts
    assert judged_in({**REPORT, "judge": None}, names, session) == {}
