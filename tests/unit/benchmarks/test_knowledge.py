"""The benchmark of knowledge: invented worlds, and the arms on a random model of two layers."""

import json
import re

import pytest

from benchmarks import knowledge
from benchmarks.gate import Gate
from benchmarks.knowledge import ARMS, TRAINED, Bench, measure, open_small_bench
from benchmarks.knowledge_figures import RECIPE, Key, arms_table, decisions, pooled
from benchmarks.knowledge_world import FACTS, QUESTIONS, TWO_HOP, UNANSWERABLE, WORDINGS, make_world
from llm_engineering.data.exam_answers import answers_right
from llm_engineering.evaluation.measures.exam import Exam

SEED, TOKENS = 1, 1500


def asked(world):
    return {row.question: row for row in world.exam() if row.kind != "unanswerable"}


def test_a_world_and_its_documents_depend_on_the_seed_alone():
    one, again, other = make_world(3), make_world(3), make_world(4)
    assert one == again
    assert one.documents() == again.documents()
    assert one.exam() == again.exam()
    assert one.documents() != other.documents()


def test_each_fact_stands_in_five_documents_in_other_wordings():
    world = make_world(1)
    documents = world.documents()
    for company in world.companies:
        for fact in FACTS:
            said = [text.format(**vars(company)) for text in WORDINGS[fact]]
            assert len({name for text in said for name, document in documents.items() if text in document}) == 5
            assert len({re.sub(r"\W+", " ", text) for text in said}) == 5


def test_the_wordings_of_the_exam_are_in_no_document():
    texts = " ".join(make_world(1).documents().values()).casefold()
    for wording in (*(text for both in QUESTIONS.values() for text in both), *TWO_HOP, *UNANSWERABLE):
        # Three words in a row that are not a name.
        for part in re.split(r"\{\w+\}", wording.casefold()):
            words = re.findall(r"\w+", part)
            for run in zip(words, words[1:], words[2:], strict=False):
                assert f" {' '.join(run)} " not in texts, wording


@pytest.mark.parametrize("companies", [3, 4, 10])
def test_swapping_changes_the_answers_and_nothing_else(companies):
    world = make_world(2, companies)
    swapped = world.swapped()
    right, wrong = asked(world), asked(swapped)
    assert right.keys() == wrong.keys()
    assert all(not answers_right(wrong[question].answers[0], row.answers) for question, row in right.items())
    for fact in FACTS:
        values = [[getattr(company, fact) for company in one.companies] for one in (world, swapped)]
        assert sorted(values[0]) == sorted(values[1])
    assert [company.name for company in world.companies] == [company.name for company in swapped.companies]
    assert world.documents().keys() == swapped.documents().keys()


def test_questions_about_one_fact_of_one_seed_are_a_cluster():
    exams = [Exam(make_world(seed).exam(), [], 4) for seed in (1, 1)]
    together = pooled(exams)
    assert len({row.id for row in together.rows}) == len(together.rows)
    single = [index for index, row in enumerate(together.rows) if row.kind == "single"]
    clusters = [together.clusters[index] for index in single]
    # Two questions about each fact, and the second world has facts of its own.
    assert len(set(clusters)) == len(single) / 2 == 2 * 10 * len(FACTS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return open_small_bench(tmp_path_factory.mktemp("knowledge"))


@pytest.fixture(scope="module")
def figures(bench):
    return measure(bench, [SEED], [TOKENS], ARMS)


def test_each_arm_has_a_row_with_its_differences(figures):
    rows = {Key(row["arm"], row["tokens"]): row for row in figures["arms"]}
    untrained = [arm for arm in ARMS if arm.startswith("base")]
    assert set(rows) == {Key(arm, None if arm in untrained else TOKENS) for arm in ARMS}
    for key, row in rows.items():
        measures = {"exam_accuracy", "exam_multi_hop", "exam_abstention"}
        # With passages, no general question is asked.
        measures |= set() if key.arm.endswith("+retrieval") else {"exam_control"}
        assert set(row["measures"]) == measures
        assert set(row["minus_base"]) == (set() if key.arm == "base" else measures)
        assert set(row["recipe_minus"]) == (measures if key.tokens and key.arm != RECIPE else set())
        assert len(row["accuracy_by_seed"]) == 1
    json.dumps(figures)


def test_the_gate_judges_the_recipe_and_the_arms_that_must_fail(figures):
    judged = {row["arm"]: row for row in figures["gate"]}
    assert set(judged) == {"recipe", "passages", "swapped"}
    for row in judged.values():
        assert (row["promoted"], row["of"]) == (0, 1)
        assert row["failed_rules"][0][0].startswith("exam_accuracy better than base by more than 0.3")
    assert set(figures["swapped_facts_said"]) == {str(TOKENS)}
    assert set(figures["questions_also_trained"]) == {"passages", "recipe", "swapped"}


def test_a_finished_arm_is_not_trained_again(bench, figures, monkeypatch):
    def train(*_arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(Bench, "_train", train)
    assert measure(bench, [SEED], [TOKENS], ARMS) == figures
    with pytest.raises(AssertionError, match="trained again"):
        measure(bench, [SEED], [TOKENS + 1], ["documents"])


def test_right_answers_count_and_answers_of_swapped_documents_are_found(bench):
    exam = bench.exam(SEED)
    swapped = {row.id: row for row in bench.world(SEED, swapped=True)[0].exam()}
    blank = {row.id: "" for row in exam.rows}
    right = {row.id: row.answers[0] if row.answers else "" for row in exam.rows}
    wrong = {id_: swapped[id_].answers[0] if id_ in swapped and swapped[id_].answers else "" for id_ in blank}
    found = {Key("base", None): [blank], Key("recipe", 9): [right], Key("swapped", 9): [wrong]}
    gate = Gate.of(bench.recipe)
    rows = {row["arm"]: row for row in arms_table(gate, [exam], found)}
    assert rows["recipe"]["measures"]["exam_accuracy"]["value"] == 1
    assert rows["swapped"]["measures"]["exam_accuracy"]["value"] == 0
    assert rows["swapped"]["recipe_minus"]["exam_accuracy"]["low"] > 0
    promoted = {row["arm"]: row["promoted"] for row in decisions(gate, [exam], found)}
    assert promoted == {"recipe": 1, "swapped": 0}
    assert knowledge._swapped_facts(bench, [SEED], found) == {"9": 1.0}


def test_all_arms_but_the_base_model_are_trained_on_some_stage():
    assert {arm.removesuffix("+retrieval") for arm in ARMS} == {"base", *TRAINED}
    assert all(sum(arm.stages.values()) == pytest.approx(1) for arm in TRAINED.values())
