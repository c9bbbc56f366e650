"""DPO's losses, with a policy that differs from its reference, and precomputed references, on tiny models."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.dpo import dpo_trainer
from llm_engineering.training.policy import new_policy, save_policy, trained_policy
from llm_engineering.training.sft import sft_trainer
from llm_engineering.training.trainer import reference as shared
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import CPU, formatted, logged, prepared, train, training_setup, write_model

# All validation pairs are one batch, because AOT compares the pairs of a batch.
STEPS = REFERENCE_STEPS | {"save_steps": 2, "eval_steps": 2, "per_device_eval_batch_size": 4}
BETA, EPSILON, TAU = 0.5, 0.1, 0.05
# Of the weights that make a policy differ from its reference by some nats in each answer.
SPREAD = 4.0


@pytest.fixture
def start(setup, settings, tmp_path):
    """The folder of an adapter whose model differs from the base model. It is the same after any other test."""
    torch.manual_seed(0)
    policy = new_policy(setup.model, LoraConfig(), settings, choose_device(setup.compute))
    move(policy, 0)
    save_policy(policy, setup.model, tmp_path / "start")
    return tmp_path / "start"


def move(policy, seed):
    """Draw new weights for the adapter that is trained."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if name.endswith("lora_B.default.weight"):
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * SPREAD)


class Pairs:
    """Log-ratios of a batch of pairs in float64, policy over reference; tensors of shape `(pairs,)`.

    Attributes:
        chosen, rejected: log-ratios of the answers, in nats.
        lengths: tokens of the chosen and of the rejected answers.
        own, reference: the log-probability of the chosen answer minus that of the rejected one, for each model.
    """

    def __init__(self, policy, rows):
        policy = policy.double().eval()
        names = ("chosen_ids", "rejected_ids")
        sums = {}
        for adapter in ("default", "ref"):
            policy.set_adapter(adapter)
            sums[adapter] = torch.tensor(
                [[self.answer(policy, row["prompt_ids"], row[n]) for row in rows] for n in names]
            )
        self.chosen, self.rejected = sums["default"] - sums["ref"]
        self.own, self.reference = (sums[name][0] - sums[name][1] for name in ("default", "ref"))
        self.lengths = torch.tensor([[len(row[name]) for row in rows] for name in names])

    @staticmethod
    def answer(model, prompt, answer):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].double()
        predicted = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        return predicted.gather(1, torch.tensor(answer).unsqueeze(1)).sum().item()


def cross_entropy(logits, smoothing=0.0):
    """Binary cross-entropy with the target 1, or 1 - smoothing."""
    return (1 - smoothing) * softplus(-logits) + smoothing * softplus(logits)


def exo(p):
    """KL divergence of the model's preference from the smoothed label (arXiv:2402.00856, equation 16)."""
    model = torch.stack([logsigmoid(BETA * (p.chosen - p.rejected)), logsigmoid(BETA * (p.rejected - p.chosen))])
    label = torch.tensor([[1 - EPSILON], [EPSILON]], dtype=torch.float64).log()
    return (model.exp() * (model - label)).sum(dim=0)


def discopop(p):
    """Logistic and exponential loss, mixed by the log-ratio (arXiv:2406.08414, equation 5)."""
    logits = BETA * (p.chosen - p.rejected)
    share = torch.sigmoid(logits / TAU)
    return (1 - share) * cross_entropy(logits) + share * (-logits).exp()


# The mean over pairs is the loss. The formulas are those of the papers that TRL's documentation names.
FORMULAS: dict[str, Callable[[Pairs], torch.Tensor]] = {
    "sigmoid": lambda p: cross_entropy(BETA * (p.chosen - p.rejected)),
    "sigmoid_norm": lambda p: cross_entropy(BETA * (p.chosen / p.lengths[0] - p.rejected / p.lengths[1])),
    "hinge": lambda p: (1 - BETA * (p.chosen - p.rejected)).clamp(min=0),
    "ipo": lambda p: (p.chosen / p.lengths[0] - p.rejected / p.lengths[1] - 1 / (2 * BETA)) ** 2,
    "robust": lambda p: (
        ((1 - EPSILON) * cross_entropy(BETA * (p.chosen - p.rejected)) - EPSILON * cross_entropy(BETA * (p.rejected - p.chosen)))
        / (1 - 2 * EPSILON)
    ),
    "exo_pair": exo,
    "nca_pair": lambda p: (
        cross_entropy(BETA * p.chosen) + (cross_entropy(-BETA * p.chosen) + cross_entropy(-BETA * p.rejected)) / 2
    ),
    "bco_pair": lambda p: cross_entropy(BETA * p.chosen) + cross_entropy(-BETA * p.rejected),
    "sppo_hard": lambda p: (p.chosen - 1 / (2 * BETA)) ** 2 + (p.rejected + 1 / (2 * BETA)) ** 2,
    "aot": lambda p: cross_entropy(BETA * (p.own.sort().values - p.reference.sort().values), EPSILON),
    "aot_unpaired": lambda p: cross_entropy(BETA * (p.chosen.sort().values - p.rejected.sort().values), EPSILON),
    "apo_zero": lambda p: torch.sigmoid(-BETA * p.chosen) + torch.sigmoid(BETA * p.rejected),
    "apo_down": lambda p: torch.sigmoid(BETA * p.chosen) + torch.sigmoid(BETA * (p.rejected - p.chosen)),
    "discopop": discopop,
}  # fmt: skip


def evaluated(config, policy, pairs, setup, settings, seed=None):
    """The validation loss of a policy that has moved away from its reference; without `seed`, it is the reference."""
    trainer = dpo_trainer(prepared(pairs, config, setup, settings), policy, config)
    if seed is not None:
        move(policy, seed)
    return trainer.evaluate()["eval_loss"]


def test_every_loss_has_the_value_of_its_formula(start, pairs, setup, settings):
    named = DPOConfig.model_fields["loss_type"].annotation.__args__
    assert set(named) == set(FORMULAS)
    measured = {}
    for name in named:
        smoothing = EPSILON if name in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
        # The references of half of the losses are precomputed.
        options = {"label_smoothing": smoothing, "precompute_ref_log_probs": len(measured) % 2 == 1}
        config = DPOConfig(**STEPS, **options, beta=BETA, loss_type=name)
        policy = trained_policy(setup.model, start, settings, choose_device(setup.compute))
        measured[name] = evaluated(config, policy, pairs, setup, settings, seed=1)
    batch = Pairs(policy, pairs["validation"])
    expected = {name: float(FORMULAS[name](batch).mean()) for name in named}
    assert measured == pytest.approx(expected, rel=1e-5)
    # These pairs tell each loss from the one with the answers swapped.
    batch.chosen, batch.rejected = batch.rejected, batch.chosen
    batch.own, batch.reference, batch.lengths = -batch.own, -batch.reference, batch.lengths.flip(0)
    swapped = {name: float(FORMULAS[name](batch).mean()) for name in named}
    assert all(abs(swapped[name] / expected[name] - 1) > 0.02 for name in named)


@pytest.mark.parametrize("unpadded", [True, False], ids=["answers", "logits"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_precomputed_reference_in_bf16_is_the_policy_before_training(
    method, unpadded, start, pairs, setup, settings, monkeypatch
):
    if not unpadded:
        monkeypatch.setattr(shared, "keeps_rows_apart", lambda policy, by_row: False)
    setup = setup.model_copy(update={"compute": CPU.model_copy(update={"dtype": "bfloat16"}), "method": method})
    for precomputed in (False, True):
        config = DPOConfig(**STEPS, precompute_ref_log_probs=precomputed, method=method)
        policy = prepared(pairs, config, setup, settings, start=start if method == "lora" else None).load_policy()
        loss = evaluated(config, policy, pairs, setup, settings)
        assert loss == pytest.approx(math.log(2), abs=1e-5), precomputed


@pytest.mark.parametrize(("precomputed", "kept"), [(False, True), (True, False)])
def test_a_full_model_keeps_a_second_model_only_if_each_step_asks_it(precomputed, kept, pairs, setup, settings):
    config = DPOConfig(**STEPS, precompute_ref_log_probs=precomputed, method="full")
    run = prepared(pairs, config, setup, settings)
    trainer = dpo_trainer(run, run.load_policy(), config)
    assert (trainer.ref_model is not None) == kept


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"precompute_ref_log_probs": True}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"method": "full"}),
        # Its positions are learned, and counted from the start of a row.
        ("gpt2", {}),
    ],
    ids=str,
)
def test_a_prompt_is_computed_once_for_both_answers_with_the_same_losses(
    kind, options, settings, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    setup = training_setup(write_model(tmp_path / "model", kind))
    setup = setup.model_copy(update={"method": options.get("method", "lora")})
    pairs = formatted("preference", 8, load_tokenizer(setup.model, settings, "alpaca"), tmp_path)
    # AdamW would divide by a gradient that is only rounding, and change its weight by the whole learning rate.
    config = DPOConfig(**STEPS | {"learning_rate": 1.0}, **options, optim="sgd")
    once = train(pairs, config, setup, settings)
    assert "prompts: computed once for both answers" in caplog.text
    monkeypatch.setattr(shared, "continues_prompts", lambda policy: False)
    twice = train(pairs, config, setup, settings)
    assert "prompts: computed for each answer, because" in caplog.text
    for name in ("loss", "grad_norm", "eval_loss", "logps/chosen", "logps/rejected"):
        assert logged(once, name) == pytest.approx(logged(twice, name), rel=1e-5), name
    assert logged(once)[-1] < 0.9 * logged(once)[0]
    # The prompts of the pairs that were trained, less than half of their tokens.
    assert 0.5 < once.summary["flops"] / twice.summary["flops"] < 0.9


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mistral", "only sdpa without sliding windows can share them"), ("logits", "the logits are of whole batches")],
)
def test_a_model_that_cannot_share_a_prompt_is_named(kind, reason, settings, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    if kind == "logits":
        monkeypatch.setattr(shared, "keeps_rows_apart", lambda policy, by_row: False)
    setup = training_setup(write_model(tmp_path / "model", "mistral" if kind == "mistral" else "llama"))
    pairs = formatted("preference", 8, load_tokenizer(setup.model, settings, "alpaca"), tmp_path)
    config = DPOConfig(**STEPS)
    run = prepared(pairs, config, setup, settings)
    trainer = dpo_trainer(run, run.load_policy(), config)
    assert f"prompts: computed for each answer, because {reason}" in caplog.text
    assert not trainer.shortcuts.shares_prompts
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precomputed_references_train_the_same(dtype, start, pairs, setup, settings):
    setup = setup.model_copy(update={"compute": CPU.model_copy(update={"dtype": dtype})})
    losses = []
    for precomputed in (False, True):
        result = train(pairs, DPOConfig(**STEPS, precompute_ref_log_probs=precomputed), setup, settings, start=start)
        losses.append([*logged(result), *logged(result, "eval_loss")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5 if dtype == "float32" else 1e-3)
    assert len(set(losses[0])) > 1


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_adapter_on_a_quantised_base_stays_in_float32(stage, start, rows, pairs, setup, settings):
    policy = trained_policy(setup.model, start, settings, choose_device(setup.compute))
    # A quantised base needs a card. TRL recognises it by this attribute.
    policy.get_base_model().is_loaded_in_4bit = True
    before = {name: weight.clone() for name, weight in policy.named_parameters() if weight.requires_grad}
    if stage == "sft":
        config = SFTConfig(**STEPS, packing=False)
        sft_trainer(prepared(rows, config, setup, settings), policy, config)
    else:
        config = DPOConfig(**STEPS)
        loss = evaluated(config, policy, pairs, setup, settings)
        assert loss == pytest.approx(math.log(2), abs=1e-6)
    after = {name: weight for name, weight in policy.named_parameters() if name in before}
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert policy.is_loaded_in_4bit


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_full_model_is_probed_in_the_precision_of_training(stage, rows, pairs, setup, settings, monkeypatch):
    """Flash attention, which a CPU cannot run, raises an error for float32 tensors."""
    seen = set()
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, *args, **kwargs):
        seen.add(value.dtype)
        return real(query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    setup = setup.model_copy(update={"compute": CPU.model_copy(update={"dtype": "bfloat16"}), "method": "full"})
    # Without this, the attention of short rows on a CPU is computed by plain matrix products.
    for limit in ("SHORT", "TOGETHER"):
        monkeypatch.setattr(f"llm_engineering.training.losses.{limit}", 0)
    data, config, trainer = {
        "sft": (rows, SFTConfig(**STEPS, packing=False, method="full"), sft_trainer),
        "dpo": (pairs, DPOConfig(**STEPS, method="full"), dpo_trainer),
    }[stage]
    run = prepared(data, config, setup, settings)
    trainer(run, run.load_policy(), config)
    assert seen == {torch.bfloat16}
