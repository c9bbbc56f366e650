"""Plans of chains: what a dry run prints, and the hash of everything that decides a stage's result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llm_engineering.errors import RequestError
from llm_engineering.feedback import comparisons
from llm_engineering.feedback.comparisons import Compared, own_question
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.conftest import ROOT
from tools import readiness
from tools.expected_rows import data_lines
from tools.forecast import estimate_lines, tokens_of
from tools.plan import print_plan, stages_of
from tools.readiness import check_and_pin
from tools.recipe_checks import check_model, remembered

LOCAL = Path(__file__).resolve().parents[3] / "configs" / "python_reference.yaml"
STEPS = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
CPT = {"learning_rate": 1e-3, **STEPS, "eval_steps": 10, "save_steps": 10}
KTO = {**CPT, "per_device_train_batch_size": 2}
GATE = {"better_than": {"base": {"document_loss": 0.0}, "incumbent": {"document_loss": 0.0}}}
KTO_GATE = {"better_than": {"base": {"heldout_loss": 0.0}, "incumbent": {"heldout_loss": 0.0}}}
# The gates of the default recipe without the rules about the model of sft.
NO_SFT = {"better_than": {"sft": {"preference_margin": None}}, "not_worse_than": {"sft": {"heldout_loss": None}}}


@pytest.fixture
def recipe(tmp_path, small_llama):
    """A function that makes a recipe of a chain with small documents; the arguments change its blocks."""
    (tmp_path / "documents").mkdir()
    for number in range(6):
        (tmp_path / "documents" / f"{number}.txt").write_text(f"This is file {number}. " * 20)

    def make(chain, **blocks):
        path = tmp_path / "recipe.yaml"
        gates = {"cpt": GATE} | ({} if "sft" in chain else {"dpo": NO_SFT})
        content = {
            "extends": str(LOCAL),
            "model": {"name_or_path": str(small_llama)},
            "documents": {"path": str(tmp_path / "documents")},
            "formatting": {"chat_template": "chatml"},
            "tracking": {"comet": "off"},
            "compute": {"device": "cpu"},
            "chain": chain,
            "cpt": CPT,
            "kto": KTO,
            "promotion": gates | {"kto": KTO_GATE},
        }
        for key, value in blocks.items():
            content[key] = {**content.get(key, {}), **value}
        path.write_text(yaml.safe_dump(content))
        return load_recipe(path)

    return make


def test_prompts_are_the_users_own_or_made_of_instructions(recipe):
    block = {"learning_rate": 1e-5, **STEPS, "eval_steps": 10, "save_steps": 10, "num_generations": 2}
    block |= {"rewards": [{"use": "stopped"}], "gradient_accumulation_steps": 2}
    gates = {"grpo": {"better_than": {"base": {"reward": 0.0}, "incumbent": {"reward": 0.0}}}}

    def made(chain, **data):
        return recipe(chain, grpo=block, promotion=gates, data=data)

    own = made(["grpo"], prompts="rows.jsonl")
    assert data_lines(own, "grpo") == []
    of_rows = made(["sft", "grpo"])
    assert any(line.startswith("Rows: prompt, ") for line in data_lines(of_rows, "grpo"))


def test_what_people_said_decides_the_stages_that_train_on_it(recipe, settings):
    made = recipe(["sft", "dpo"], data={"preferences": "review"})
    with pytest.raises(RequestError, match=r"data.preferences names review, and nobody .* run `make review` first"):
        check_and_pin(made)
    models = [Compared(key=name, name=name, identity=name) for name in ("base", "sft")]
    questions = [own_question(f"Who is {n}?", "own") for n in range(2)]
    folder = settings.llm_output_dir / "review" / made.name
    session = comparisons.start(folder, models, questions, "own", seed=1)
    for question in session.questions:
        for model in (0, 1):
            session.answer(question, model, f"Answer {model}.")
    first, second = session.questions
    session.judge(first, "Ada", "first")
    before = check_and_pin(made)[1]
    session.judge(second, "Ada", "tie")
    assert check_and_pin(made)[1].recipes == before.recipes
    session.judge(second, "Ada", "second")
    after = check_and_pin(made)[1]
    assert before.people.keys() == {"preference"}
    assert after.people != before.people
    assert after.recipes["sft"] == before.recipes["sft"]
    assert after.recipes["dpo"] != before.recipes["dpo"]
    heavier = check_and_pin(recipe(["sft", "dpo"], data={"preferences": "review", "human_weight": 2}))[1]
    assert heavier.recipes["sft"] == after.recipes["sft"]
    assert heavier.recipes["dpo"] != after.recipes["dpo"]


def test_the_files_of_prompts_and_own_rewards_decide_a_stage(recipe, tmp_path):
    rows, own = tmp_path / "rows.jsonl", tmp_path / "own.py"
    rows.write_text('{"prompt": "Who?"}\n')
    own.write_text("def good(completions, rows): return [1.0 for _ in rows]\n")
    block = {"learning_rate": 1e-5, **STEPS, "eval_steps": 10, "save_steps": 10, "num_generations": 2}
    block |= {"rewards": [{"use": f"{own}:good"}], "trust_reward_code": True, "gradient_accumulation_steps": 2}
    gates = {"grpo": {"better_than": {"base": {"reward": 0.0}, "incumbent": {"reward": 0.0}}}}
    made = recipe(["grpo"], grpo=block, promotion=gates, data={"prompts": str(rows)})
    before = check_and_pin(made)[1]
    assert set(before.rewards) == {str(own)}
    own.write_text(own.read_text() + "\n")
    changed = check_and_pin(made)[1]
    assert changed.rewards != before.rewards
    assert changed.recipes != before.recipes
    rows.write_text('{"prompt": "When?"}\n')
    assert check_and_pin(made)[1].recipes != changed.recipes
    own.unlink()
    with pytest.raises(RequestError, match="there is no file"):
        check_and_pin(made)


def test_the_files_of_a_named_reward_model_decide_the_stage(recipe, monkeypatch):
    block = {"learning_rate": 1e-5, **STEPS, "eval_steps": 10, "save_steps": 10, "num_generations": 2}
    block |= {"rewards": [{"use": "reward_model", "version": 3}], "gradient_accumulation_steps": 2}
    gates = {"grpo": {"better_than": {"base": {"reward": 0.0}, "incumbent": {"reward": 0.0}}}}
    made = recipe(["sft", "grpo"], grpo=block, promotion=gates)
    inputs = []
    for files in ("one", "two"):
        found = {"grpo": SimpleNamespace(content_hash=files, id="an-id")}
        monkeypatch.setattr(readiness, "find_reward_models", lambda _, found=found: found)
        inputs.append(check_and_pin(made)[1])
    one, two = inputs
    assert one.reward_models == {"grpo": "an-id"}
    assert [stage for stage in one.recipes if one.recipes[stage] != two.recipes[stage]] == ["grpo"]


def test_own_labelled_answers_are_loaded_and_decide_the_stage_of_their_kind(recipe, tmp_path):
    thumbs = tmp_path / "thumbs.jsonl"
    thumbs.write_text(json.dumps({"prompt": "Hi", "completion": "Yo", "label": True}) + "\n")
    made = recipe(["sft", "kto"], data={"labelled": str(thumbs)})
    assert tokens_of(made, "kto")[1] == "the size of thumbs.jsonl"
    before = hashes(made)
    thumbs.write_text(thumbs.read_text().replace("true", "false"))
    after = hashes(made)
    assert [stage for stage in before if after[stage] != before[stage]] == ["kto"]


def test_a_pipeline_trains_a_stage_of_the_chain_or_all(recipe):
    made = recipe(["cpt", "sft"])
    assert [stages_of(pipeline, made) for pipeline in ("sft", "retrain", "datasets")] == [
        ["cpt", "sft"],
        ["cpt", "sft"],
        [],
    ]


def hashes(made):
    return check_and_pin(made)[1].recipes


def test_a_stage_has_the_hash_of_its_block_and_of_all_blocks_before_it(recipe):
    chain = ["cpt", "sft", "dpo"]
    before = hashes(recipe(chain))
    assert set(before) == set(chain)
    assert len(set(before.values())) == 3

    def changed(**blocks):
        after = hashes(recipe(chain, **blocks))
        return [stage for stage in chain if after[stage] != before[stage]]

    assert changed(dpo={"beta": 0.3}) == ["dpo"]
    assert changed(sft={"learning_rate": 1e-4}) == ["sft", "dpo"]
    assert changed(cpt={"learning_rate": 1e-4}) == chain
    assert changed(formatting={"max_length": 256}) == chain
    assert changed(evaluation={"confidence": 0.9}) == []


FACTS = {"documents": {"unit": "sentence"}, "generation": {"questions": "fact"}}


def test_what_a_generated_exam_asks_decides_the_stages_on_questions_and_pairs(recipe):
    chain = ["cpt", "sft", "dpo"]

    def found(**exam):
        return hashes(recipe(chain, exam={"path": "generated", **exam}, **FACTS))

    before = found()
    assert found(control=None) == before
    more = found(questions=70)
    assert [stage for stage in chain if more[stage] != before[stage]] == ["sft", "dpo"]


def test_the_questions_of_an_exam_decide_all_stages_because_no_row_for_training_asks_them(recipe, tmp_path):
    path = tmp_path / "exam.jsonl"
    chain = ["cpt", "sft", "dpo"]

    def found(question):
        path.write_text(json.dumps({"id": "q", "kind": "single", "question": question, "answers": ["Anna"]}) + "\n")
        return hashes(recipe(chain, exam={"path": str(path), "control": None}))

    one, other = found("Who runs the mill?"), found("Who owns the mill?")
    assert [stage for stage in chain if one[stage] == other[stage]] == []
    assert found("Who runs the mill?") == one


def test_the_general_dataset_decides_the_stages_from_cpt_on(recipe, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "Rain fell."}) + "\n")
    replay = {"replay": {"path": str(general), "share": 0.1}}
    chain = ["sft", "cpt"]
    without, used = hashes(recipe(chain)), hashes(recipe(chain, data=replay))
    assert without["sft"] == used["sft"]
    assert without["cpt"] != used["cpt"]
    general.write_text(json.dumps({"text": "Snow fell."}) + "\n")
    assert hashes(recipe(chain, data=replay))["cpt"] != used["cpt"]


def test_the_general_instructions_decide_the_stages_from_sft_on(recipe, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"instruction": "What falls?", "output": "Rain."}) + "\n")
    replay = {"replay_instructions": str(general)}
    chain = ["cpt", "sft", "dpo"]
    without, used = hashes(recipe(chain)), hashes(recipe(chain, data=replay))
    assert [stage for stage in chain if without[stage] != used[stage]] == ["sft", "dpo"]
    before = check_and_pin(recipe(chain, data=replay))[1]
    general.write_text(json.dumps({"instruction": "What falls?", "output": "Snow."}) + "\n")
    after = check_and_pin(recipe(chain, data=replay))[1]
    assert [stage for stage in chain if before.recipes[stage] != after.recipes[stage]] == ["sft", "dpo"]
    assert before.replay_instructions not in (None, after.replay_instructions)
    general.write_text(json.dumps({"text": "Rain falls."}) + "\n")
    with pytest.raises(RequestError, match="general.jsonl"):
        check_and_pin(recipe(chain, data=replay))


def test_the_embedded_general_instructions_have_a_hash(recipe):
    assert check_and_pin(recipe(["sft"], data={"replay_instructions": "embedded:general"}))[1].replay_instructions


def test_sentences_and_general_instructions_are_given_to_the_steps(recipe, monkeypatch):
    from pipelines import chain
    from pipelines.inputs import Inputs

    given = {}
    for name in ("collect_texts", "generate_instructions"):
        monkeypatch.setattr(chain, name, lambda *arguments, name=name: given.update({name: arguments}))
    made = recipe(["cpt", "sft"], documents={"unit": "sentence"}, data={"replay_instructions": "embedded:general"})
    inputs = Inputs.model_construct(documents="d", replay=None, replay_instructions="hash")
    datasets = chain._Datasets(made, inputs)
    monkeypatch.setattr(datasets, "documents", lambda: None)
    datasets._texts()
    datasets._instructions()
    assert given["collect_texts"][1].unit == "sentence"
    assert given["generate_instructions"][-3:] == ("embedded:general", "hash", None)


def test_tokens_of_cpt_are_those_of_the_documents_and_the_replay(recipe, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "Rain fell."}) + "\n")
    plain, _ = tokens_of(recipe(["cpt"]), "cpt")
    characters = sum(len(file.read_text()) for file in (tmp_path / "documents").iterdir())
    split = load_recipe(LOCAL).data.split
    assert plain == pytest.approx((1 - split.validation_fraction - split.test_fraction) * characters / 4, rel=0.01)
    mixed, source = tokens_of(recipe(["cpt"], data={"replay": {"path": str(general), "share": 0.5}}), "cpt")
    assert mixed == pytest.approx(2 * plain)
    assert source == "the size of 6 documents and the replay"
    (tmp_path / "documents" / "more.txt").write_text("The mill of Oskby grinds Brack Flour. It is so.")
    sentences, source = tokens_of(recipe(["cpt"], documents={"unit": "sentence"}), "cpt")
    assert source == "the size of 1 sentences"
    assert 0 < sentences < plain


def test_a_dry_run_counts_documents_passages_and_rows_and_says_when_they_are_too_few(recipe, tmp_path):
    folder = tmp_path / "documents"
    (folder / "scan.pdf").write_text("%PDF")
    lines = data_lines(recipe(["sft"]), "sft")
    assert lines == [
        "Documents: 6 read, 1 set aside (damaged 1)",
        "Held out, not trained on: 1.txt, 2.txt",
        "Passages: 6 kept, 6 set aside (too_short 6)",
        "Rows: instruction, about 3, at most 6 (the embedded model writes a usable question in 50% of its tries)",
        "WARNING: These are too few instruction rows to train on, which needs at least 20: the run would end before training. "
        "Add documents.",
    ]
    for number in range(6, 30):
        (folder / f"{number}.txt").write_text(f"This is file {'x' * number} {'and it is long ' * 13}indeed.")
    all_held_out = recipe(["sft"], data={"split": {"test_fraction": 0.5, "validation_fraction": 0.49}})
    assert data_lines(all_held_out, "sft")[1].endswith(" and 18 more")
    some = data_lines(recipe(["sft", "dpo"], generation={"max_preferences": 10}), "dpo")
    assert [line for line in some if line.startswith("Rows: ")] == [
        "Rows: instruction, about 15, at most 30 (the embedded model writes a usable question in 50% of its tries)",
        "Rows: preference, at most 10 (one pair for each instruction row)",
    ]
    assert ["probably too few instruction" in line for line in some].count(True) == 1
    assert some[-1].startswith("WARNING: These are too few preference rows")
    endpoint = {"client": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "question_max_new_tokens": 99}
    assert data_lines(recipe(["sft"], generation=endpoint), "sft")[3:] == ["Rows: instruction, at most 30"]


def test_texts_and_facts_are_counted_and_own_datasets_are_not(recipe, tmp_path):
    folder = tmp_path / "documents"
    (folder / "0.txt").write_text("It is so. " * 1000)
    # 10,000 characters are five pieces of 512 tokens.
    assert data_lines(recipe(["cpt"]), "cpt")[2] == "Rows: text, at most 10"
    (folder / "0.txt").write_text(" ".join(f"The mill of Oskby{i} has {i + 2} wheels." for i in range(50)))
    facts = recipe(["cpt", "sft"], documents={"unit": "sentence"}, generation={"questions": "fact"})
    assert data_lines(facts, "sft")[2:] == [
        "Sentences: 50 kept, 100 set aside (names_nothing 100)",
        "Rows: text, at most 50",
        "Rows: instruction, about 36, at most 200 (the embedded model writes a usable question in 18% of its tries)",
    ]
    exam = {"path": "generated"}
    few = data_lines(recipe(["sft"], **FACTS, exam=exam), "sft")[-2:]
    assert few[0] == "Exam: about 8 questions about facts, at most 60, written from the documents"
    assert few[1].startswith("WARNING: These are probably too few for an exam, which needs at least 10")
    (folder / "1.txt").write_text(" ".join(f"The mill of Tarnby{i} has {i + 2} wheels." for i in range(50)))
    more = data_lines(recipe(["sft"], **FACTS, exam=exam), "sft")
    assert more[-1].startswith("Exam: about 1")
    assert data_lines(recipe(["sft"], data={"instructions": "rows.jsonl"}), "sft") == []


def test_rewritings_and_the_budget_decide_the_stages_from_cpt_on(recipe):
    chain = ["sft", "cpt"]
    before = hashes(recipe(chain))
    for blocks in ({"generation": {"rewritings": ["list"]}}, {"knowledge": {"tokens": 1000}}):
        after = hashes(recipe(chain, **blocks))
        assert [stage for stage in chain if after[stage] != before[stage]] == ["cpt"]


def test_rewritings_and_questions_of_two_facts_are_estimated(recipe, tmp_path):
    (tmp_path / "documents" / "0.txt").write_text(
        " ".join(f"The mill of Oskby{i} has {i + 2} wheels." for i in range(50))
    )
    unit, facts = {"unit": "sentence"}, {"questions": "fact", "two_hop": 7, "rewritings": ["list", "faq"]}
    made = recipe(["cpt", "sft"], documents=unit, generation=facts, knowledge={"tokens": 90_000})
    assert data_lines(made, "sft")[3:] == [
        "Rows: text, at most 50",
        "Rewritings of these texts: list, faq, until knowledge.tokens (90,000) is reached",
        "Rows: instruction, about 43, at most 207 (the embedded model writes a usable question in 18% of its tries, and at "
        "most 7 questions need two facts)",
    ]
    plain, _ = tokens_of(recipe(["cpt", "sft"], documents=unit), "cpt")
    more, source = tokens_of(made, "cpt")
    assert more == pytest.approx(plain * 3.5)
    assert source == "the size of 50 sentences and the rewritings"
    few = recipe(["cpt", "sft"], documents=unit, generation=facts, knowledge={"tokens": 100})
    assert tokens_of(few, "cpt")[0] == 100


def test_tokens_of_questions_about_facts_are_those_of_the_expected_rows(recipe, tmp_path):
    (tmp_path / "documents" / "0.txt").write_text(" ".join(f"The mill of Oskby{i} has {i} wheels." for i in range(50)))
    made = recipe(["sft"], documents={"unit": "sentence"}, generation={"questions": "fact"})
    tokens, how = tokens_of(made, "sft")
    rows = "Rows: instruction, about 36, at most 200 (the embedded model writes a usable question in 18% of its tries)"
    assert rows in data_lines(made, "sft")
    assert how == "36 rows of 50 passages, before the rules of the data"
    assert tokens_of(recipe(["sft"], documents={"unit": "sentence"}), "sft")[0] == pytest.approx(tokens * 25 / 36)


def test_the_time_with_max_steps_is_that_of_these_steps(recipe):
    steps = {"max_steps": 1000, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    made = recipe(["sft"], sft=steps, formatting={"max_length": 128})
    assert "for at most 1,024,000 tokens (max_steps): " in estimate_lines(made, ["sft"])[-1]


def test_the_pipeline_gives_the_prepared_questions_to_the_texts(recipe, monkeypatch):
    from pipelines import chain
    from pipelines.inputs import Inputs

    given = {}
    monkeypatch.setattr(chain, "collect_texts", lambda *arguments: given.update(arguments=arguments))
    made = recipe(["cpt", "sft"], generation={"rewritings": ["faq"]})
    datasets = chain._Datasets(made, Inputs.model_construct(documents="d", replay=None))
    monkeypatch.setattr(datasets, "documents", lambda: None)
    datasets._made["instruction"] = "prepared questions"
    datasets._texts()
    assert given["arguments"][-2:] == (made.deriving, "prepared questions")


def test_new_tokens_are_checked_against_the_model_before_a_run(recipe, small_llama):
    def planned(chain, token, **lora):
        model = {"name_or_path": str(small_llama), "new_tokens": [token]}
        return recipe(chain, model=model, sft={"lora": lora}, formatting={"chat_template": "chatml"})

    assert check_and_pin(planned(["sft"], "<tool>"))[0].setup.model.added_tokens == ["<tool>"]
    with pytest.raises(RequestError, match="names a, which is a token of"):
        check_and_pin(planned(["sft"], "a"))
    with pytest.raises(RequestError, match="the new tokens need both embeddings"):
        check_and_pin(planned(["sft"], "<tool>", modules_to_save=["lm_head"]))


def test_the_recipe_is_checked_against_the_model_before_a_run_and_by_a_dry_run(recipe, small_llama):
    unfit = recipe(
        ["sft"], model={"name_or_path": str(small_llama)}, sft={"lora": {"target_modules": ["qkv_proj"]}},
        formatting={"chat_template": "alpaca"},
    )  # fmt: skip
    for check in (lambda: check_and_pin(unfit), lambda: print_plan("sft", unfit)):
        with pytest.raises(RequestError, match=r"qkv_proj is no name of a module of this model.* q_proj"):
            check()


def test_a_dry_run_refuses_files_that_are_missing_or_in_no_known_format(recipe, tmp_path):
    unlabelled = tmp_path / "rows.jsonl"
    unlabelled.write_text('{"prompt": "Hi", "completion": "Yo"}\n')
    for path, words in ((tmp_path / "none.jsonl", "There is no file"), (unlabelled, "has no column `label`")):
        with pytest.raises(RequestError, match=words):
            print_plan("kto", recipe(["sft", "kto"], data={"labelled": str(path)}))


def test_a_dry_run_reads_the_users_exam(recipe, tmp_path):
    exam = tmp_path / "exam.jsonl"
    for text, words in (
        (None, "there is no such file"),
        ('{"question": "Who?", "answer": "I"}\n', "unknown key `answer`"),
    ):
        if text is not None:
            exam.write_text(text)
        with pytest.raises(RequestError, match=words):
            print_plan("sft", recipe(["sft"], exam={"path": str(exam)}))


def test_a_dry_run_imports_slow_libraries_only_for_a_model_and_recipe_that_it_has_not_judged(recipe, tmp_path):
    recipe(["sft"], sft={"lora": {"target_modules": ["q_proj"]}})
    program = (
        "import sys; from tools.cli import main; "
        f"code = main(['run', 'sft', '--dry-run', '--set', 'name=own', '--config', {str(tmp_path / 'recipe.yaml')!r}]); "
        "print(code, [name for name in sys.argv[1:] if name in sys.modules])"
    )
    needless = ["datasets", "trl", "zenml"]
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program, *needless, "transformers", "peft"],
            env={**os.environ, "LLM_CACHE_DIR": str(tmp_path / "cache")}, cwd=ROOT, capture_output=True, text=True, check=True,
        )
        for _ in range(2)
    )  # fmt: skip
    assert [first.stdout.splitlines()[-1], second.stdout.splitlines()[-1]] == ["0 ['transformers', 'peft']", "0 []"]
    # What the first one says about the model is said again.
    assert "adapters on q_proj, and none on" in second.stderr
    assert second.stderr == first.stderr
    assert memory_lines(second.stdout) == memory_lines(first.stdout) != []


def memory_lines(plan):
    return [line.partition("; ")[0] for line in plan.splitlines() if "at its peak" in line]


def test_a_dry_run_judges_a_model_again_whose_configuration_has_changed(recipe, small_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    model = Path(shutil.copytree(small_llama, tmp_path / "model"))
    made = recipe(["sft"], model={"name_or_path": str(model)})
    check_model(made)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RequestError, match="are quantised"):
        check_model(made)


def test_a_plan_that_is_killed_before_it_is_stored_leaves_no_file_when_it_is_repeated(
    monkeypatch, tmp_path, small_llama
):
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    model = ModelConfig(name_or_path=str(small_llama))

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            remembered(model, "memory", lambda: [1])
    # Another answer is as good: it is of another length, and replaces what was begun.
    assert remembered(model, "memory", lambda: []) == remembered(model, "memory", lambda: [2]) == []
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == [".plans.lock", "plans.json"]
    for damaged in ("", '{"key": '):
        (tmp_path / "cache" / "plans.json").write_text(damaged)
        assert remembered(model, "memory", lambda: [3]) == remembered(model, "memory", lambda: [4]) == [3]
