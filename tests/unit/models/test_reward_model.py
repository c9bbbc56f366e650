"""Reward models: saved, loaded from their own folder alone, and read at the last token of an answer."""

import json
import shutil

import peft
import pytest
import torch
from datasets import DatasetDict

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.reward_model import RewardModel, check_base, is_reward_model, padding_token
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.best_of import BestOf
from llm_engineering.publish.conversation import ChatSampling
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.reward_blocks import RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import RewardConfig, SFTConfig
from llm_engineering.training.rewards import Completion, open_rewards
from tests.tiny_models import formatted, logged, train, training_setup, write_model

STEPS = {
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model on an SFT adapter that also has a LoRA of the output layer: setup, settings, tokenizer, pairs, result."""
    folder = tmp_path_factory.mktemp("reward")
    setup = training_setup(write_model(folder / "model", "llama"))
    settings = Settings(llm_output_dir=folder / "outputs")
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}
    rows = formatted("instruction", 8, tokenizer, folder)
    sft = train(rows, SFTConfig(**STEPS, packing=False, lora=lora), setup, settings)
    pairs = formatted("preference", 16, tokenizer, folder)
    result = train(pairs, RewardConfig(**STEPS), setup, settings, start=sft.adapter)
    return setup, settings, tokenizer, pairs, result


def rows_of(pairs: DatasetDict, name: str) -> list[list[int]]:
    return [pair["prompt_ids"] + pair[name] for pair in pairs["validation"]]


def test_a_loaded_reward_model_has_the_validation_loss_of_training(trained, tmp_path):
    setup, settings, tokenizer, pairs, result = trained
    folder = shutil.copytree(result.adapter, tmp_path / "copied")
    model = RewardModel.load(setup.model, folder, tokenizer, setup.compute, settings)
    chosen, rejected = (torch.tensor(model.scores(rows_of(pairs, name))) for name in ("chosen_ids", "rejected_ids"))
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    assert loss == pytest.approx(logged(result, "eval_loss")[-1], abs=1e-6)
    assert (chosen > rejected).all()
    assert loss < 0.68


def test_a_reward_does_not_depend_on_the_other_rows_of_its_batch(trained):
    setup, settings, tokenizer, _, result = trained
    model = RewardModel.load(setup.model, result.adapter, tokenizer, setup.compute, settings)
    rows = [[5, 6, 7, 8, 9, 10], [5, 6], [7]]
    assert model.scores(rows) == pytest.approx([model.scores([row])[0] for row in rows], abs=1e-6)


def test_the_reward_is_read_at_the_end_token_also_where_the_tokenizer_pads_with_it(trained):
    setup, settings, tokenizer, pairs, result = trained
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != padding_token(tokenizer)
    model = RewardModel.load(setup.model, result.adapter, tokenizer, setup.compute, settings)
    (row, *_) = rows_of(pairs, "chosen_ids")
    assert row[-1] == tokenizer.eos_token_id
    ended, cut = model.scores([row, row[:-1]])
    assert abs(ended - cut) > 1e-4


def scored_by(trained, completions):
    """What the reward `reward_model` gives completions of the first validation prompt."""
    setup, settings, _, pairs, result = trained
    rewards = RewardSet.model_validate({"rewards": [{"use": "reward_model", "weight": 0.5}]})
    (reward,) = open_rewards(rewards, setup, settings, result.adapter)
    assert (reward.name, reward.weight) == ("reward_model", 0.5)
    return reward.score([pairs["validation"][0]] * len(completions), completions)


def test_the_reward_of_a_stage_is_the_score_of_the_model(trained):
    setup, settings, tokenizer, pairs, result = trained
    pair = pairs["validation"][0]
    rows = [[*pair["chosen_ids"]], [*pair["rejected_ids"]], [*pair["chosen_ids"]][:-1]]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    stopped = [True, True, False]
    written = [Completion(*each, len(ids), ids) for *each, ids in zip(texts, stopped, rows, strict=True)]
    found = scored_by(trained, written)
    model = RewardModel.load(setup.model, result.adapter, tokenizer, setup.compute, settings)
    assert found == model.scores([pair["prompt_ids"] + ids for ids in rows])
    assert found[0] > found[1]
    assert abs(found[0] - found[2]) > 1e-4


def test_an_answer_in_other_tokens_is_read_as_text_with_the_end_token(trained):
    tokenizer = trained[2]
    ids = tokenizer.encode("It is 3.", add_special_tokens=False)
    ended, cut = [*ids, tokenizer.eos_token_id], ids
    own = [Completion("It is 3.", True, 9, ended), Completion("It is 3.", False, 8, cut)]
    other = [completion._replace(ids=None) for completion in own]
    assert scored_by(trained, other) == scored_by(trained, own)
    assert len(set(scored_by(trained, own))) == 2


def test_a_reward_model_of_another_base_model_or_of_other_tokens_is_refused(trained, small_llama):
    setup, settings, _, _, result = trained
    check_base(setup.model, result.adapter)
    for other in ({"name_or_path": "other"}, {"revision": "later"}):
        with pytest.raises(RequestError, match="was trained on the base model .*revision test"):
            check_base(setup.model.model_copy(update=other), result.adapter)
    with pytest.raises(RequestError, match="holds no reward model"):
        check_base(setup.model, small_llama)
    chatml = setup.model_copy(update={"chat_template": "chatml"})
    rewards = RewardSet.model_validate({"rewards": [{"use": "reward_model"}]})
    with pytest.raises(RequestError, match="another tokenizer or chat template"):
        open_rewards(rewards, chatml, settings, result.adapter)


def test_a_model_that_writes_is_no_reward_model(trained, small_llama):
    setup, settings, tokenizer, _, result = trained
    assert is_reward_model(result.adapter)
    assert not is_reward_model(small_llama)
    with pytest.raises(RequestError, match="holds no reward model"):
        RewardModel.load(setup.model, small_llama, tokenizer, setup.compute, settings)


def test_the_adapter_keeps_only_what_the_decoder_has(trained):
    config = json.loads((trained[4].adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]


def test_best_of_chooses_the_answer_with_the_highest_reward(trained):
    setup, settings, tokenizer, _, result = trained
    chooser = BestOf.load(setup.model, result.adapter, tokenizer, setup.compute, settings, 4)
    model = load_model(setup.model, settings, choose_device(setup.compute)).eval()
    asked = [Message(role="user", content="What is 3?")]
    sampling = ChatSampling(temperature=1.0, seed=3)
    seen = []
    scores = chooser.rewards.scores
    chooser.rewards.scores = lambda rows: seen.extend(rows) or scores(rows)
    reply, rewards = chooser.answer(model, asked, 6, sampling)
    assert len(set(map(tuple, seen))) == len(seen) == len(rewards) == 4
    prompt = len(tokenizer.apply_chat_template([asked[0].model_dump()], add_generation_prompt=True)["input_ids"])
    best = seen[rewards.index(max(rewards))][prompt:]
    assert reply.text == tokenizer.decode(best, skip_special_tokens=True).strip()
    assert chooser.answer(model, asked, 6, sampling) == (reply, rewards)


def test_best_of_refuses_a_reward_model_of_another_chat_template(trained):
    setup, settings, _, _, result = trained
    other = load_tokenizer(ModelConfig(name_or_path=setup.model.name_or_path), settings, "chatml")
    with pytest.raises(RequestError, match="another tokenizer or chat template"):
        BestOf.load(setup.model, result.adapter, other, setup.compute, settings, 4)


def test_the_rows_of_new_tokens_that_sft_has_trained_come_along(tmp_path):
    """Also where the output layer shares its weights with the input embedding: a reward model has only the latter."""
    setup = training_setup(write_model(tmp_path / "model", "qwen3"), chat_template=None)
    setup = setup.model_copy(update={"model": setup.model.model_copy(update={"new_special_tokens": ["<x>"]})})
    settings = Settings(llm_output_dir=tmp_path / "outputs")
    tokenizer = load_tokenizer(setup.model, settings)
    rows = formatted("instruction", 4, tokenizer, tmp_path)
    new = tokenizer.convert_tokens_to_ids("<x>")
    rows = rows.map(lambda row: {name: [*row[name], new, row[name][-1]] for name in ("input_ids", "labels")})
    sft = train(rows, SFTConfig(**STEPS, packing=False), setup, settings)
    result = train(
        formatted("preference", 4, tokenizer, tmp_path), RewardConfig(**STEPS), setup, settings, start=sft.adapter
    )
    before, after = (peft.load_peft_weights(str(trained.adapter)) for trained in (sft, result))
    (name,) = (name for name in before if "trainable_tokens" in name)
    assert before[name].any()
    assert after[name].shape == before[name].shape
    plain = setup.model.model_copy(update={"new_special_tokens": []})
    model = RewardModel.load(plain, result.adapter, tokenizer, setup.compute, settings)
    assert len(set(model.scores([[5, new, 2], [5, 6, 2]]))) == 2
