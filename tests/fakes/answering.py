"""Models for the pages of blind comparisons, which answer at once."""

from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.feedback.comparisons import Compared, own_question
from llm_engineering.review.comparison_pages import Answering, Model

BOOTSTRAP = Bootstrap(200, 0.95, 1)


def no_models() -> Answering:
    """No model can be compared."""
    return answering([])


def answering(names, judged=None, answer=lambda model, question: f"{model} says {question}", cuts=None) -> Answering:
    """Models that answer at once.

    Args:
        names: the keys of the models, which are their names too.
        judged: the verdicts of the judge.
        answer: the answer of a model to a question.
        cuts: the number of tokens at which each answer of a model is cut.
    """

    def begin(session):
        for key, question in session.questions.items():
            for side, model in enumerate(session.models):
                if (key, side) not in session.answers:
                    text = answer(model.key, question.prompt[-1].content)
                    session.answer(key, side, text, (cuts or {}).get(model.key))

    return Answering(
        models=lambda: [Model(name, name) for name in names],
        compared=lambda key, retrieval: Compared(key=key, name=key, identity=f"id of {key}", retrieval=retrieval),
        questions=lambda asked: [own_question(f"What is {n}?", f"row {n}") for n in range(40)],
        begin=begin,
        progress=lambda session: "",
        judge=lambda session: judged or {},
        bootstrap=BOOTSTRAP,
    )
