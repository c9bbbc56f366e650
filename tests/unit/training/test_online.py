"""GRPO and RLOO: losses of plain TRL, prompts and ends of the project, rewards without differences, and what is refused."""

import json
import re

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.chat_template import template_text
from llm_engineering.models.device import choose_device
from llm_engineering.models.revision import pin_revision
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.online_blocks import GRPOConfig, RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.grpo import FormattedGRPOTrainer
from llm_engineering.training.losses import ignores_left_padding
from llm_engineering.training.processes.job import Job
from llm_engineering.training.rewards import open_rewards
from llm_engineering.training.rloo import FormattedRLOOTrainer
from llm_engineering.training.trainer import online
from llm_engineering.training.trainer.online import online_trainer
from llm_engineering.training.training_run import prepare_run
from tests.conftest import ROOT
from tests.tiny_models import formatted, logged, question, train, write_model
from tests.unit.training.steps import break_off

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, STEPS = 8, 6
PATTERN = "(?s).*[a-z].*"
# Two prompts with two completions each in a step; a generation step fills two steps, and its completions are used twice.
SHARED = {
    "learning_rate": 2e-2, "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": STEPS,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2,
    "num_generations": 2, "max_completion_length": 6, "temperature": 0.9, "beta": 0.5, "logging_steps": 1,
}  # fmt: skip
OURS = {
    **SHARED, "warmup_ratio": 0.1, "eval_strategy": "epoch", "save_strategy": "epoch",
    "rewards": [{"use": "format", "pattern": PATTERN}, {"use": "length", "target": 6, "weight": 0.5}],
}  # fmt: skip
BLOCKS = {"grpo": GRPOConfig, "rloo": RLOOConfig}
OURS_OF = {"grpo": (FormattedGRPOTrainer, trl.GRPOConfig), "rloo": (FormattedRLOOTrainer, trl.RLOOConfig)}
PLAIN = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Both sides generate and compute with the same calls, so values differ only by the order of sums, if at all.
RELATIVE, ABSOLUTE = 1e-5, 1e-6


@pytest.fixture
def prompts(alpaca_tokenizer, tmp_path):
    return formatted("prompt", ROWS, alpaca_tokenizer, tmp_path)


def plain(stage, model, method, output, seed):
    """A trainer of TRL, as a user of TRL writes it, with the project's rewards written again."""

    def letters(completions, **kwargs):
        return [float(re.search("[a-z]", completion[0]["content"]) is not None) for completion in completions]

    def length(completion_ids, **kwargs):
        return [max(0.0, 1 - abs(len(ids) - 6) / 6) for ids in completion_ids]

    trainer_class, config_class = PLAIN[stage]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template_text("alpaca")
    rows = [{"prompt": [m.model_dump() for m in question(number).prompt]} for number in range(ROWS)]
    transformers.set_seed(seed)
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[letters, length],
        args=config_class(
            **SHARED, reward_weights=[1.0, 0.5], warmup_steps=0.1, output_dir=str(output), seed=seed, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**ADAPTER, task_type="CAUSAL_LM") if method == "lora" else None,
    )  # fmt: skip


def ours(stage, method="lora", **changes):
    adapter = {"lora": ADAPTER} if method == "lora" else {}
    return BLOCKS[stage].model_validate({**OURS, **adapter, "method": method, **changes})


@pytest.mark.parametrize(("stage", "method"), [("grpo", "lora"), ("grpo", "full"), ("rloo", "lora"), ("rloo", "full")])
def test_losses_are_those_of_plain_trl(stage, method, small_llama, setup, settings, prompts, tmp_path):
    trainer = plain(stage, small_llama, method, tmp_path / "plain", setup.seed)
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = train(prompts, ours(stage, method), setup.model_copy(update={"method": method}), settings)

    assert len(expected) == STEPS
    for name in (
        "loss",
        "grad_norm",
        "learning_rate",
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "completions/mean_length",
    ):
        # A reward is logged in the step that generates.
        values = [entry[name] for entry in expected if name in entry]
        assert logged(result, name) == pytest.approx(values, rel=RELATIVE, abs=ABSOLUTE), name
    # The second use of the completions has another loss, and the policy has moved away from the reference.
    losses = [entry["loss"] for entry in expected]
    assert max(abs(loss) for loss in losses) > 1e-3
    assert [entry["kl"] for entry in expected if "kl" in entry][-1] != 0

    # A reward with the wrong sign has other losses, already in the first update.
    wrong = ours(stage, method, rewards=[{**OURS["rewards"][0], "weight": -1.0}, OURS["rewards"][1]])
    other = train(prompts, wrong, setup.model_copy(update={"method": method}), settings)
    assert logged(other, "loss") != pytest.approx(losses, rel=1e-2, abs=1e-4)


def made_trainer(stage, data, setup, settings, start=None, method="lora", **changes):
    config = ours(stage, method, **changes)
    setup = setup.model_copy(update={"method": method})
    job = Job(stage=stage, config=config.model_dump(), setup=setup, start=start)
    run = prepare_run(job, BLOCKS[stage], data, settings)
    rewards = open_rewards(config, setup, settings)
    return online_trainer(run, run.load_policy(), run.config, rewards, *OURS_OF[stage])


def begun(trainer):
    """The trainer as `train` sets it up before the first step."""
    trainer.model.train()
    trainer.state.max_steps = STEPS
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_completions_follow_the_formatted_prompt_and_end_with_each_end_token(
    stage, setup, settings, prompts, monkeypatch
):
    ends = [5, 9, 2]
    monkeypatch.setattr(online, "end_token_ids", lambda model, tokenizer: ends)
    trainer = made_trainer(stage, prompts, setup, settings, rewards=[{"use": "stopped"}])
    given = []

    def generate(input_ids, attention_mask, generation_config, **kwargs):
        given.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        assert generation_config.eos_token_id == ends
        new = torch.tensor([[30, 5, 31, 31], [30, 31, 9, 0], [30, 31, 30, 31], [2, 0, 0, 0]])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(trainer.accelerator.unwrap_model(trainer.model), "generate", generate)
    batch = [dict(prompts["train"][place]) for place in (0, 0, 1, 1)]
    output = begun(trainer)._generate_and_score_completions(batch)
    assert given == [row["prompt_ids"] for row in batch]
    assert output["completion_mask"].sum(dim=1).tolist() == [2, 3, 4, 1]
    shown = [(row["tokens"], row["stopped"], row["rewards"]["stopped"]) for row in trainer._shown["first"]]
    assert shown == [(2, True, 1.0), (3, True, 1.0), (4, False, 0.0), (1, True, 1.0)]
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.25]
    # All completions of the first prompt have the same reward.
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]


def trained_adapter(model, folder):
    """An adapter that differs from the base model."""
    torch.manual_seed(3)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(**ADAPTER, lora_dropout=0.3, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    policy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("stage", "method"), [("grpo", "lora"), ("grpo", "full"), ("rloo", "lora"), ("rloo", "full")])
def test_the_reference_is_the_model_that_the_stage_starts_from(
    stage, method, small_llama, setup, settings, prompts, tmp_path
):
    start = tmp_path / "start"
    if method == "lora":
        trained_adapter(small_llama, start)
    else:
        model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
        model.lm_head.weight.data *= 2
        model.save_pretrained(start)
    trainer = made_trainer(stage, prompts, setup, settings, start, method)
    batch = [dict(prompts["train"][place]) for place in (0, 0, 1, 1)]
    begun(trainer)
    trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(batch))
    # The base model is not the reference, and no dropout makes a difference.
    assert trainer._metrics["train"]["kl"] == [pytest.approx(0, abs=1e-6)]


def test_rewards_without_differences_stop_the_run(setup, settings, prompts, monkeypatch):
    monkeypatch.setattr(online, "FLAT_STEPS", 2)
    config = ours("grpo", rewards=[{"use": "exact_answer"}], max_steps=20)
    with pytest.raises(WorkError) as error:
        train(prompts, config, setup, settings)
    words = str(error.value)
    assert "grpo learned nothing in its first 2 generation steps" in words
    assert "(on average exact_answer 0)" in words
    assert "grpo.temperature" in words


def test_flat_steps_after_the_first_difference_do_not_stop_the_run(setup, settings, prompts, monkeypatch):
    monkeypatch.setattr(online, "FLAT_STEPS", 1)
    real, seen = online.OnlineTrainer._check_spread, []

    def check(self, rewards):
        # A difference in the first generation step only.
        self._flat_share = 1.0 if seen else 0.5
        seen.append(rewards)
        real(self, rewards)

    monkeypatch.setattr(online.OnlineTrainer, "_check_spread", check)
    train(prompts, ours("grpo"), setup, settings)
    assert len(seen) > 1


def test_the_summary_has_completions_of_the_first_and_the_last_generation_step(setup, settings, prompts):
    result = train(prompts, ours("rloo"), setup, settings)
    shown = json.loads(json.dumps(result.summary["completions"]))
    assert [shown[part][0]["step"] for part in ("first", "last")] == [1, 5]
    for row in shown["first"] + shown["last"]:
        assert row["prompt"].startswith("What is")
        assert set(row["rewards"]) == {"format", "length"}
        assert row["rewards"]["format"] == float(re.search("[a-z]", row["completion"]) is not None)
    assert result.summary["labels"] == []
    assert result.summary["seconds"]["generate"] > 0
    entry = next(entry for entry in result.summary["history"] if "loss" in entry)
    assert {"reward", "reward_std", "rewards/format/mean", "kl", "entropy", "frac_reward_zero_std"} <= entry.keys()
    assert {"completions/mean_length", "completions/clipped_ratio", "tokens_per_second"} <= entry.keys()
    assert "eval_reward" in result.summary["history"][-2]


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_run_resumes_inside_the_use_of_its_completions(stage, setup, settings, prompts):
    config = ours(stage, save_strategy="steps", save_steps=1, max_steps=7)
    whole = train(prompts, config, setup, settings)
    break_off(3, lambda: train(prompts, config, setup, settings))
    resumed = train(prompts, config, setup, settings)
    # The completions of four steps are generated before the first and the fifth step.
    assert resumed.summary["resumed_from"] == "checkpoint-2"
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name)
    assert resumed.summary["completions"] == whole.summary["completions"]


def test_the_order_of_an_epoch_is_the_same_in_a_resumed_run():
    whole, resumed = (online.PromptsByEpoch(range(12), mini_repeat_count=2, batch_size=3, seed=7) for _ in range(2))
    first = list(whole)
    for sampler in (whole, resumed):
        sampler.set_epoch(1)
    second = list(whole)
    assert second == list(resumed) != first
    assert sorted(second) == sorted(first)


def test_smaller_batches_take_over_the_stored_completions(setup, settings, prompts, tmp_path):
    trainer = begun(made_trainer("grpo", prompts, setup, settings))
    batch = [dict(prompts["train"][place]) for place in (0, 0, 1, 1, 2, 2, 3, 3)]
    trainer._prepare_inputs(batch)
    trainer._step = 1
    trainer._save_rng_state(str(tmp_path))
    smaller = made_trainer("grpo", prompts, setup, settings, per_device_train_batch_size=2, steps_per_generation=4)
    smaller._restore_completions(tmp_path)
    assert smaller._step == 2
    (wanted,) = [batch["completion_ids"] for batch in trainer._buffered_inputs[1:]]
    assert torch.equal(torch.cat([batch["completion_ids"] for batch in smaller._buffered_inputs[2:]]), wanted)


@pytest.mark.parametrize(
    ("changes", "compute", "words"),
    [
        ({"num_generations": 3}, {}, "writes 8 completions, which are no whole groups of num_generations 3: set "
         "grpo.num_generations to 2 or 4 or 8, or grpo.steps_per_generation to 3"),
        ({"num_generations": 8, "steps_per_generation": None}, {}, "or grpo.gradient_accumulation_steps to 2"),
        ({"steps_per_generation": None, "generation_batch_size": 6}, {}, "must be a multiple of 4"),
        ({"num_generations": 3}, {"num_processes": 3}, ""),
    ],
)  # fmt: skip
def test_generation_steps_hold_whole_groups(changes, compute, words):
    problem = ours("grpo", **changes).generation_problem("grpo", ComputeConfig(**compute))
    assert words in problem
    assert bool(problem) == bool(words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grpo.num_generations=3"], "grpo.num_generations to 2 or 4 or 8 or 16 or 32"),
        (["compute.distributed=fsdp2", "compute.num_processes=2", "compute.device=cuda"], "the whole weights in each process"),
        (["compute.backend=unsloth"], "compute.backend unsloth does not train grpo"),
        (["grpo.use_vllm=true", "compute.device=cpu"], "grpo.use_vllm needs CUDA"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_generate_is_refused(overrides, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ROOT / "configs" / "grpo_arithmetic.yaml", overrides)


@pytest.mark.parametrize("number", [0, 1])
def test_a_group_has_two_completions_at_least(number):
    with pytest.raises(ValueError, match="num_generations"):
        ours("rloo", num_generations=number)


@pytest.mark.parametrize("name", ["num_generations_eval", "reward_weights", "sync_ref_model", "vllm_server_host"])
def test_fields_that_the_project_sets_are_refused(name):
    with pytest.raises(ValueError, match="wrong fields"):
        ours("grpo", **{name: 1})


def test_a_completion_must_fit_the_context(setup, settings, prompts):
    with pytest.raises(
        RequestError, match="exceeds the context of .* 2048 tokens: set grpo.max_completion_length to at"
    ):
        train(prompts, ours("grpo", max_completion_length=2040), setup, settings)


def test_a_generation_step_needs_enough_prompts(setup, settings, prompts):
    with pytest.raises(RequestError, match="takes 16 prompts, and the training split has 8"):
        train(prompts, ours("grpo", steps_per_generation=8), setup, settings)


def test_vllm_is_refused_where_it_is_missing(setup, settings, prompts):
    with pytest.raises(RequestError, match="grpo.use_vllm needs CUDA and the package vllm, and .*use_vllm=false"):
        train(prompts, ours("grpo", use_vllm=True), setup, settings)


def test_models_whose_positions_count_the_padding_are_refused(setup, settings, alpaca_tokenizer, tmp_path):
    model = setup.model.model_copy(update={"name_or_path": str(write_model(tmp_path / "model", "gpt2"))})
    rows = formatted("prompt", ROWS, alpaca_tokenizer, tmp_path)
    with pytest.raises(RequestError, match="grpo cannot train gpt2: TRL pads the prompts"):
        train(rows, ours("grpo"), setup.model_copy(update={"model": model}), settings)


def test_rounded_rotary_positions_count_as_ignoring_the_padding():
    """In bfloat16 the hidden states of the embedded model change by 2 % after padding, as positions are rounded."""
    compute = ComputeConfig(device="cpu", dtype="bfloat16")
    model = load_model(pin_revision(ModelConfig()), Settings(), choose_device(compute))
    assert ignores_left_padding(model)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_in_bfloat16(stage, method, setup, settings, prompts):
    """An adapter is in float32, and the base model in bfloat16."""
    setup = setup.model_copy(update={"compute": ComputeConfig(device="cpu", dtype="bfloat16")})
    result = train(prompts, ours(stage, method, max_steps=2), setup, settings)
    assert result.summary["steps"] == 2
