"""The recipe's chain: its stages, its blocks, and the gate of each stage."""

from pathlib import Path

import pytest
import yaml

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig
from llm_engineering.recipe.loading import load_recipe

LOCAL = Path(__file__).resolve().parents[3] / "configs" / "python_reference.yaml"
STEPS = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
CPT = {"learning_rate": 1e-3, **STEPS, "eval_steps": 10, "save_steps": 10}
# Removes the rules about the model of sft from a gate that a recipe inherits.
NO_SFT = {
    "better_than": {"sft": {"preference_margin": None}},
    "not_worse_than": {"sft": {"heldout_loss": None}},
}


def bounds(measure, **more):
    return {"better_than": {"base": {measure: 0.0}, "incumbent": {measure: 0.0}, **more}}


def recipe(folder, chain, promotion=None, **blocks):
    """The default recipe with another chain, a block for cpt, and its gate."""
    given = {"cpt": CPT, **blocks}
    gates = {"cpt": bounds("document_loss"), **(promotion or {})}
    path = folder / "recipe.yaml"
    content = {"extends": str(LOCAL), "chain": chain, **given, "promotion": gates}
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return load_recipe(path)


def refused(folder, words, *arguments, **blocks):
    with pytest.raises(RequestError) as error:
        recipe(folder, *arguments, **blocks)
    for word in words:
        assert word in " ".join(str(error.value).split())


def test_a_chain_has_its_blocks_in_its_order(tmp_path):
    whole = recipe(tmp_path, ["cpt", "sft", "dpo"])
    assert whole.chain_to("sft") == ["cpt", "sft"]
    assert [whole.kinds(stage) for stage in whole.chain] == [
        ["text"],
        ["text", "instruction"],
        ["text", "instruction", "preference"],
    ]
    assert whole.block("cpt").learning_rate == 1e-3
    assert whole.reads_documents
    assert load_recipe(LOCAL).chain == ["sft", "dpo"]
    judged = {
        "kto": {**STEPS, "learning_rate": 1e-4, "loss_type": "apo_zero_unpaired", "eval_steps": 5, "save_steps": 5}
    }
    gate = {"kto": bounds("preference_accuracy")}
    # Without the user's own, labelled answers are made of pairs, on which the run is measured too.
    assert recipe(tmp_path, ["sft", "kto"], gate, **judged).kinds("kto") == ["instruction", "preference", "labelled"]
    own = {"data": {"labelled": "thumbs.jsonl"}}
    refused(
        tmp_path,
        ["preference_accuracy, which a run that ends with kto does not measure"],
        ["sft", "kto"],
        gate,
        **judged,
        **own,
    )
    gate = {"kto": bounds("heldout_loss")}
    assert recipe(tmp_path, ["sft", "kto"], gate, **judged, **own).kinds("kto") == ["instruction", "labelled"]
    alone = recipe(tmp_path, ["dpo"], {"dpo": NO_SFT})
    assert alone.kinds("dpo") == ["instruction", "preference"]
    assert alone.method == "lora"


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (["cpt", "dpoo"], ["there is no stage dpoo: did you mean dpo"]),
        (["xyz"], ["there is no stage xyz: the stages are cpt, sft, dpo, kto"]),
        (["sft", "dpo", "sft"], ["the stage sft is named twice: remove one of them"]),
        ([], ["chain"]),
    ],
    ids=["near", "unknown", "twice", "empty"],
)
def test_a_chain_names_known_stages_once(chain, words, tmp_path):
    refused(tmp_path, words, chain)


def test_a_stage_needs_its_block(tmp_path):
    refused(tmp_path, ["chain has the stage cpt, and the block cpt is missing: add it"], ["cpt", "sft"], cpt=None)


def test_a_block_of_a_stage_that_the_chain_lacks_is_kept(tmp_path):
    assert recipe(tmp_path, ["sft"]).dpo is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", "full"), ("lora", {"r": 4})],
    ids=["method", "lora"],
)
def test_a_later_stage_trains_the_weights_of_the_first_one(key, value, tmp_path):
    words = [f"dpo.{key} has no effect, because dpo trains the weights of cpt further: set cpt.{key}"]
    refused(tmp_path, words, ["cpt", "dpo"], {"dpo": NO_SFT}, dpo={key: value})


def test_a_later_stage_may_repeat_the_method_and_the_adapter(tmp_path):
    """The default recipe names the method in sft, which may come after cpt."""
    same = recipe(tmp_path, ["cpt", "sft"], cpt={**CPT, "method": "lora", "lora": {"r": 16, "lora_alpha": 32}})
    assert same.lora.r == 16


def test_an_adapter_has_no_effect_with_the_method_full(tmp_path):
    words = ["cpt.lora has no effect with cpt.method full: remove it, or choose lora or qlora"]
    refused(tmp_path, words, ["cpt"], cpt={**CPT, "method": "full", "lora": {"r": 4}})


# The gate.


def test_every_stage_of_the_chain_has_a_gate(tmp_path):
    content = {"extends": str(LOCAL), "chain": ["cpt"], "cpt": CPT}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RequestError, match=r"promotion.cpt is missing: .*base: \{document_loss: 0.0\}"):
        load_recipe(path)


def test_the_example_of_a_missing_gate_fits_the_rows_of_the_run(tmp_path):
    content = yaml.safe_load(LOCAL.read_text())
    del content["promotion"]["dpo"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RequestError, match=r"promotion.dpo is missing: .*base: \{heldout_loss: 0.0\}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("chain", "stage", "measure"),
    [
        (["cpt", "sft"], "cpt", "heldout_loss"),
        (["sft", "dpo"], "sft", "preference_margin"),
        (["sft", "cpt"], "sft", "document_loss"),
        (["sft"], "sft", "reward"),
        (["sft"], "sft", "reward_stopped"),
        (["sft"], "sft", "exam_accuracy"),
        (["sft"], "sft", "checks"),
        (["sft"], "sft", "lm_eval_x"),
        (["sft"], "sft", "reward_accuracy"),
    ],
)
def test_a_rule_names_a_measure_of_its_run(chain, stage, measure, tmp_path):
    words = [
        f"promotion.{stage}.better_than.base names {measure}, which a run that ends with {stage} does not measure. It measures: ",
        f"Remove the rule, move it to a stage that measures {measure}, or set what {measure} needs in exam or evaluation",
    ]
    refused(tmp_path, words, chain, {stage: bounds(measure)})


def test_some_measures_need_no_held_out_rows(tmp_path):
    names = ["lm_eval_x", "checks", "canaries", "human_win_rate"]
    evaluation = {"lm_eval": {"tasks": ["x"]}, "checks": "checks.jsonl", "canaries": "canaries.jsonl"}
    gate = {"cpt": {**bounds("document_loss"), "not_worse_than": {"base": dict.fromkeys(names, 0.01)}}}
    found = recipe(tmp_path, ["cpt"], gate, evaluation=evaluation)
    assert sorted(found.measures("cpt")) == sorted(["document_loss", *names])


@pytest.mark.parametrize(
    ("chain", "stage", "than"),
    [(["cpt", "sft"], "cpt", "sft"), (["cpt", "sft"], "sft", "dpo"), (["cpt", "sft"], "cpt", "cpt"), (["dpo"], "dpo", "sft")],
    ids=["after", "not in the chain", "itself", "inherited"],
)  # fmt: skip
def test_a_rule_compares_with_a_model_before_it(chain, stage, than, tmp_path):
    measure = "document_loss" if stage == "cpt" else "heldout_loss"
    words = [
        f"promotion.{stage}.better_than.{than}: a run that ends with {stage} has no {than} model before it to compare with: "
        f"remove the key {than}"
    ]
    refused(tmp_path, words, chain, {stage: bounds(measure, **{than: {measure: 0.0}})})


def test_rules_of_stages_that_the_chain_lacks_are_not_judged(tmp_path):
    """The gate of dpo compares with sft, and this chain has neither."""
    assert recipe(tmp_path, ["cpt"]).promotion.dpo is not None


def test_a_rule_may_compare_with_each_model_before_it(tmp_path):
    gates = {
        "sft": bounds("heldout_loss", cpt={"heldout_loss": 0.0}),
        "dpo": {"not_worse_than": {"cpt": {"document_loss": 0.5}}},
    }
    found = recipe(tmp_path, ["cpt", "sft", "dpo"], gates)
    assert found.promotion.sft.better_than.bounds("cpt") == {"heldout_loss": 0.0}


# Keys that belong to cpt.


def test_replay_needs_a_stage_that_trains_on_text(tmp_path):
    replay = {"replay": {"path": "general.jsonl"}}
    assert recipe(tmp_path, ["cpt"], data=replay).data.replay.share == 0.1
    words = ["data.replay has no effect, because no stage of chain trains on text: remove it, or add cpt"]
    refused(tmp_path, words, ["sft", "dpo"], data=replay)


def test_rows_of_people_stand_beside_those_of_a_file(tmp_path):
    named = {"preferences": ["rows.jsonl", "review"], "instructions": "review", "human_weight": 3}
    data = recipe(tmp_path, ["sft", "dpo"], data=named).data
    assert [data.file(kind) for kind in ("instruction", "preference", "labelled")] == [None, "rows.jsonl", None]
    assert [data.people(kind) for kind in ("instruction", "preference", "labelled")] == [["review"], ["review"], []]
    assert data.made_of("labelled") == "preference"
    assert data.checks.human_weight == 3
    refused(tmp_path, ["a list names at most one file"], ["sft"], data={"instructions": ["a.jsonl", "b.jsonl"]})
    refused(tmp_path, ["a list names at most one file"], ["sft"], data={"instructions": []})
    refused(tmp_path, ["test_instructions is set"], ["sft"], data={"instructions": "review", "test_instructions": "t"})
    refused(tmp_path, ["prompts: feedback has no meaning"], ["sft"], data={"prompts": "feedback"})
    refused(tmp_path, ["data.human_weight has no effect"], ["sft"], data={"human_weight": 2})
    data = DataConfig(texts="review", labelled="review", prompts=["prompts.jsonl", "review"])
    assert [data.people(kind) for kind in ("text", "labelled", "prompt")] == [["review"]] * 3
    assert (data.file("prompt"), data.file("labelled"), data.made_of("labelled")) == (
        "prompts.jsonl",
        None,
        "preference",
    )
    assert data.checks.texts is None
    refused(tmp_path, ["data.texts names review, which has no effect"], ["sft"], data={"texts": "review"})
    words = ["data.preferences names review, which has no effect, because no stage of chain needs preference rows"]
    refused(tmp_path, words, ["sft"], data={"preferences": "review"})


def test_general_instructions_need_a_stage_that_trains_on_instructions(tmp_path):
    replay = {"replay_instructions": "embedded:general"}
    made = recipe(tmp_path, ["cpt", "sft"], data=replay)
    assert made.data.replay_instructions == "embedded:general"
    assert made.data.checks.replay_instructions is None
    words = ["data.replay_instructions has no effect, because no stage of chain trains on instructions: remove it, or add sft"]  # fmt: skip
    refused(tmp_path, words, ["cpt"], data=replay)
    refused(tmp_path, words, ["dpo"], {"dpo": NO_SFT}, data=replay)


def test_the_least_length_of_a_passage_has_no_effect_on_sentences(tmp_path):
    exam = {"path": "embedded:handbook", "control": None}
    documents = {"path": "embedded:handbook", "unit": "sentence", "passage_min_chars": 100}
    words = ["documents.passage_min_chars has no effect with documents.unit sentence", "remove it"]
    refused(tmp_path, words, ["cpt"], documents=documents)
    refused(tmp_path, words, ["cpt"], documents=documents, exam={**exam, "retrieval_passages": 0})
    # Retrieval cuts passages of this length, whatever the unit is.
    assert (
        recipe(tmp_path, ["cpt"], documents=documents, exam={**exam, "retrieval_passages": 2}).documents.unit
        == "sentence"
    )
    # The default recipe has the default, and what a recipe writes can be read again.
    made = recipe(tmp_path, ["cpt"], documents={"unit": "sentence", "passage_max_chars": 150})
    assert type(made).model_validate(made.model_dump()) == made


def test_the_exam_about_the_handbook_is_for_models_that_learn_the_handbook(tmp_path):
    exam = {"path": "embedded:handbook"}
    words = ["exam.path embedded:handbook asks about the embedded handbook", "my_docs", "configs/own_documents.yaml"]
    refused(tmp_path, words, ["cpt", "sft"], documents={"path": "my_docs"}, exam=exam)
    assert recipe(tmp_path, ["cpt", "sft"], documents={"path": "my_docs"}, exam=None).exam is None
    assert recipe(tmp_path, ["cpt", "sft"], documents={"path": "embedded:handbook"}, exam=exam).exam.path


def test_no_rule_compares_an_exam_with_a_model_that_only_read_the_documents(tmp_path):
    handbook = {"documents": {"path": "embedded:handbook"}, "exam": {"path": "embedded:handbook"}}
    words = ["promotion.sft.better_than.cpt", "takes no exam in a run that ends with sft", "compare with base"]
    refused(tmp_path, words, ["cpt", "sft"], {"sft": bounds("heldout_loss", cpt={"exam_accuracy": 0.0})}, **handbook)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_the_share_of_replay_is_between_0_and_1(share, tmp_path):
    refused(tmp_path, ["`data.replay.share`"], ["cpt"], data={"replay": {"path": "general.jsonl", "share": share}})


def test_only_cpt_has_a_rate_of_the_embeddings(tmp_path):
    refused(tmp_path, ["sft.embedding_learning_rate"], ["sft"], sft={"embedding_learning_rate": 1e-4})


FACTS = {"questions": "fact", "question_max_new_tokens": 20}
SENTENCES = {"path": "my_docs", "unit": "sentence"}


def test_a_generated_exam_needs_documents_and_questions_that_a_stage_learns(tmp_path):
    exam = {"path": "generated"}
    blocks = {"documents": SENTENCES, "generation": FACTS, "exam": exam}
    made = recipe(tmp_path, ["cpt", "sft"], **blocks)
    assert made.exam.is_generated
    assert (made.exam.questions, made.exam.control) == (60, "embedded:general")
    endpoint = {"client": "openai", "model": "m", "base_url": "http://127.0.0.1:1/v1", "question_max_new_tokens": 200}
    assert recipe(tmp_path, ["sft"], generation=endpoint, exam=exam).exam.is_generated
    words = ["exam.path generated", "data.instructions is rows.jsonl: set exam.path to a file"]
    refused(tmp_path, words, ["cpt", "sft"], **blocks, data={"instructions": "rows.jsonl"})
    refused(tmp_path, ["exam.path generated", "no stage on instructions: add sft"], ["cpt"], **blocks)
    refused(tmp_path, ["client local writes them only with generation.questions fact"], ["sft"], exam=exam)
    two_hop = {"sft": bounds("heldout_loss", base={"exam_multi_hop": 0.1})}
    refused(
        tmp_path, ["names exam_multi_hop, which a run that ends with sft does not measure"], ["sft"], two_hop, **blocks
    )
    alone = {**blocks, "exam": {**exam, "control": None}}
    general = {"sft": bounds("heldout_loss", base={"exam_control": 0.1})}
    refused(
        tmp_path, ["names exam_control, which a run that ends with sft does not measure"], ["sft"], general, **alone
    )


def test_the_number_of_questions_is_for_generated_exams(tmp_path):
    blocks = {"documents": SENTENCES, "generation": FACTS}
    assert recipe(tmp_path, ["sft"], exam={"path": "generated", "questions": 20}, **blocks).exam.questions == 20
    refused(
        tmp_path, ["questions has no effect with path my.jsonl"], ["sft"], exam={"path": "my.jsonl", "questions": 20}
    )
    refused(tmp_path, ["`exam.questions`"], ["sft"], exam={"path": "generated", "questions": 9}, **blocks)


def test_rewritings_and_the_budget_decide_the_texts(tmp_path):
    plain = recipe(tmp_path, ["cpt", "sft"])
    assert (plain.deriving, plain.derives_from_questions) == (None, False)
    lists = recipe(tmp_path, ["cpt", "sft"], generation={"rewritings": ["list"]})
    assert (lists.deriving.tokens, lists.derives_from_questions) == (None, False)
    assert recipe(tmp_path, ["cpt", "sft"], generation={"rewritings": ["faq"]}).derives_from_questions
    capped = recipe(tmp_path, ["cpt", "sft", "dpo"], knowledge={"tokens": 1000})
    assert (capped.deriving.tokens, capped.derives_from_questions) == (1000, True)
    assert capped.deriving.epochs == {"text": 1, "instruction": capped.block("sft").num_train_epochs}
    # Without a stage on questions only the texts are counted.
    assert not recipe(tmp_path, ["cpt"], knowledge={"tokens": 1000}).derives_from_questions


@pytest.mark.parametrize(
    ("chain", "blocks", "words"),
    [
        (
            ["cpt"],
            {"generation": {"rewritings": ["faq", "summary"]}},
            [
                "client local cannot make summary, which an endpoint writes",
                "faq, dialogue, list, reordered",
                "client openai",
            ],
        ),
        (
            ["cpt"],
            {
                "generation": {
                    "client": "openai",
                    "model": "m",
                    "question_max_new_tokens": 99,
                    "rewritings": ["reordered"],
                }
            },
            ["client openai cannot make reordered, which client local makes", "summary, faq, list, dialogue, reworded"],
        ),
        (
            ["cpt"],
            {"generation": {"client": "openai", "model": "m", "response_format": "text", "rewritings": ["list"]}},
            ["response_format text is for models that cannot write it"],
        ),
        (["cpt"], {"generation": {"rewritings": ["list", "list"]}}, ["names list twice"]),
        (["cpt"], {"generation": {"rewriting_max_new_tokens": 99}}, ["rewriting_max_new_tokens has no effect"]),
        (["sft"], {"generation": {"rewritings": ["list"]}}, ["generation.rewritings has no effect", "add cpt"]),
        (["sft"], {"knowledge": {"tokens": 9}}, ["knowledge.tokens limits the texts of cpt", "add cpt"]),
        (
            ["cpt", "sft"],
            {"generation": {"rewritings": ["faq"]}, "data": {"instructions": "rows.jsonl"}},
            ["faq is made of generated questions", "data.instructions"],
        ),
        (["sft"], {"generation": {"two_hop": 5}}, ["two_hop joins two questions about facts", "questions to fact"]),
    ],
)
def test_rewritings_that_nothing_can_make_are_refused(chain, blocks, words, tmp_path):
    refused(tmp_path, words, chain, **blocks)


REWARD = {"learning_rate": 1e-3, **STEPS, "eval_strategy": "epoch", "save_strategy": "epoch"}
CHANCE = {"better_than": {"base": {"reward_accuracy": 0.0}}}


def test_a_run_that_ends_with_a_reward_model_needs_only_pairs(tmp_path):
    chain = recipe(tmp_path, ["sft", "reward"], {"reward": CHANCE}, reward=REWARD)
    assert chain.kinds("reward") == ["instruction", "preference"]
    alone = recipe(tmp_path, ["reward"], {"reward": CHANCE}, reward=REWARD)
    assert alone.kinds("reward") == ["preference"]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (bounds("reward_accuracy"), ["better_than.incumbent has no effect", "compared with chance"]),
        ({"better_than": {"base": {}}}, ["a reward model must be better than chance", "{reward_accuracy: 0.0}"]),
        (
            {"better_than": {"base": {"heldout_loss": 0.0}}},
            ["promotion.reward.better_than.base names heldout_loss", "It measures: reward_accuracy. Remove"],
        ),
        (None, ["promotion.reward is missing", "{better_than: {base: {reward_accuracy: 0.0}}}"]),
    ],
)
def test_a_reward_model_is_judged_by_its_accuracy_against_chance(tmp_path, rules, words):
    refused(tmp_path, words, ["sft", "reward"], {"reward": rules}, reward=REWARD)


@pytest.mark.parametrize(
    ("chain", "blocks", "words"),
    [
        (["sft", "reward", "dpo"], {}, ["chain has dpo after reward", "put reward after dpo"]),
        (
            ["reward"],
            {"model": {"new_tokens": ["<x>"]}},
            ["does not train the rows of new tokens", "put sft before it"],
        ),
        (["sft", "reward"], {"compute": {"backend": "unsloth"}}, ["unsloth trains no reward models"]),
        (
            ["sft", "reward"],
            {"compute": {"num_processes": 2, "distributed": "fsdp2"}},
            ["reward was not tested with sharded weights"],
        ),
    ],
)
def test_what_a_reward_model_does_not_support_is_refused(tmp_path, chain, blocks, words):
    refused(tmp_path, words, chain, {"reward": CHANCE}, reward=REWARD, **blocks)


def test_the_block_takes_the_fields_of_trl_and_refuses_those_of_other_blocks(tmp_path):
    given = {**REWARD, "center_rewards_coefficient": 0.01, "disable_dropout": False}
    block = recipe(tmp_path, ["sft", "reward"], {"reward": CHANCE}, reward=given).reward
    assert block.center_rewards_coefficient == 0.01
    assert block.library_arguments == {"disable_dropout": False}
    words = ["reward.eos_token", "model.eos_token names the token"]
    refused(tmp_path, words, ["sft", "reward"], {"reward": CHANCE}, reward={**REWARD, "eos_token": "x"})
