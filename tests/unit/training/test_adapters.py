"""Each field of PEFT's LoraConfig that a recipe may set, in a real chain: train, save, load, start DPO, merge."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.observation import heldout_loss
from llm_engineering.evaluation.models import Models, labelled_rows
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.publish.merge import Trained, merge
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.estimate import shapes
from llm_engineering.training.policy import new_policy
from llm_engineering.training.telemetry.flops import TrainingFlops
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import CPU, logged, train, training_setup, write_model
from tests.unit.training.steps import interrupt

STEPS = REFERENCE_STEPS | {"max_steps": 3, "save_steps": 3, "eval_steps": 3}
IDS = torch.tensor([[5, 9, 11, 2, 40, 41]])
ROWS = [HeldoutRow("row", [5, 6, 7, 8, 2], [-100, -100, 7, 8, 2])]

# For each case the model, and the keys of the block.
CASES = {
    "patterns": (
        "llama",
        {
            "exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3},
            "use_rslora": True, "lora_dropout": 0.1, "bias": "none",
        },
    ),
    "layers": (
        "llama",
        {
            "layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj", "down_proj"],
            "init_lora_weights": "gaussian",
        },
    ),
    "mica": ("llama", {"init_lora_weights": "mica", "target_modules": None}),
    "not zero": ("gpt2", {"init_lora_weights": False, "lora_bias": True}),
    "pissa": (
        "llama",
        {
            "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5},
        },
    ),
    "pissa in GPT-2": ("gpt2", {"init_lora_weights": "pissa"}),
    "pissa and an embedding": ("llama", {"init_lora_weights": "pissa_niter_4", "modules_to_save": ["embed_tokens"]}),
    "olora of the output": ("llama", {"init_lora_weights": "olora", "target_modules": ["lm_head", "v_proj"]}),
    "embeddings": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embeddings, two copies": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embeddings, one copy": (
        "tied",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "LoRA of a tied embedding": ("tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tokens": ("tied", {"trainable_token_indices": [5, 9, 40]}),
    "parameters": ("llama", {"target_parameters": ["q_proj.weight", "up_proj.weight"], "target_modules": []}),
    "velora": ("llama", {"velora_config": {"num_groups": 4}, "init_lora_weights": "orthogonal"}),
    "bdlora": ("llama", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the three models. Input and output embeddings of `tied` and `gpt2` are the same weights."""
    folder = tmp_path_factory.mktemp("models")
    tied = LlamaForCausalLM.from_pretrained(write_model(folder / "tied", "llama"))
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder / "tied")
    return {kind: write_model(folder / kind, kind) for kind in ("llama", "gpt2")} | {"tied": folder / "tied"}


def sft_config(**lora):
    return SFTConfig(**STEPS, packing=False, lora=LoraConfig(r=4, **lora))


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def test_every_field_is_tried():
    tried = {name for _, lora in CASES.values() for name in lora}
    assert tried >= LoraConfig.allowed().keys()


@pytest.mark.parametrize("case", CASES)
def test_the_saved_adapter_is_the_trained_model_on_the_plain_base(
    case, folders, rows, pairs, alpaca_tokenizer, settings, trained, tmp_path
):
    kind, lora = CASES[case]
    setup, device = training_setup(folders[kind]), choose_device(CPU)
    base = load_model(setup.model, settings, device)
    untrained = logits_of(base)

    # SFT starts at the base model, and changes it
    sft = train(rows, sft_config(**lora), setup, settings)
    assert not torch.allclose(logits_of(trained[0]), untrained, atol=1e-2)
    saved = json.loads((sft.adapter / "adapter_config.json").read_text())
    # PEFT writes the modules that it found, and all fields of a config.
    written = lora.keys() - {"target_modules", "modules_to_save", "use_bdlora", "velora_config"}
    if not LoraConfig(**lora).moves_base_weights:
        assert {name: saved[name] for name in written} == {name: lora[name] for name in written}
    if case == "pissa":
        # The scale stays: with use_rslora it is alpha / sqrt(r).
        assert (saved["init_lora_weights"], saved["r"], saved["lora_alpha"]) == (
            True,
            8,
            pytest.approx(32 * math.sqrt(2)),
        )

    # DPO starts at the SFT model: neither answer is preferred yet
    dpo = train(pairs, DPOConfig(**STEPS), setup, settings, start=sft.adapter)
    first = next(entry for entry in dpo.summary["history"] if "loss" in entry)
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-5), 0)

    # Evaluation loads both beside each other
    models = Models(base, {"sft": sft.adapter, "dpo": dpo.adapter}, alpaca_tokenizer, batch_size=2)
    for name, logits in (("dpo", logits_of(trained[1])), ("sft", logits_of(trained[0])), ("base", untrained)):
        with models.use(name) as model:
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, atol=1e-4, rtol=1e-4)

    # The merged model is the trained one
    merge(Trained(setup.model, dpo.adapter), ROWS, device, torch.float32, settings, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(trained[1]), atol=1e-4, rtol=1e-4)
    separate = case in ("tied embeddings, two copies", "LoRA of a tied embedding")
    assert merged.config.tie_word_embeddings == (kind != "llama" and not separate)


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        ("sft", {"init_lora_weights": "pissa_niter_4", "modules_to_save": ["embed_tokens"], "lora_dropout": 0.1}),
        ("dpo", {"velora_config": {"num_groups": 4}, "trainable_token_indices": [5, 9]}),
        ("dpo", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ],
    ids=["sft", "dpo of tokens", "dpo of embeddings"],
)
def test_a_resumed_run_ends_with_the_same_bytes(stage, lora, folders, rows, pairs, settings):
    setup = training_setup(folders["tied"])
    whole = sft = train(rows, sft_config(**lora), setup, settings)

    def run():
        if stage == "sft":
            return train(rows, sft_config(**lora), setup, settings)
        return train(pairs, DPOConfig(**STEPS), setup, settings, start=sft.adapter)

    if stage == "dpo":
        whole = run()
    expected = (whole.adapter / "adapter_model.safetensors").read_bytes()
    interrupt(2, run)
    resumed = run()
    assert resumed.summary["resumed_from"] == "checkpoint-2"
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == expected


def test_the_best_checkpoint_is_converted(rows, alpaca_tokenizer, folders, settings):
    """The learning rate grows until it ruins the model, so the last checkpoint is not the best."""
    setup = training_setup(folders["tied"])
    spoilt = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.9, "num_train_epochs": 3}
    spoilt |= {"packing": False, "save_steps": 1, "eval_steps": 1, "load_best": True}
    lora = LoraConfig(r=4, init_lora_weights="pissa", modules_to_save=["embed_tokens", "lm_head"])
    result = train(rows, SFTConfig(**REFERENCE_STEPS | spoilt, lora=lora), setup, settings)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["init_lora_weights"] is True
    losses = logged(result, "eval_loss")
    assert losses.index(min(losses)) < len(losses) - 1
    base = load_model(setup.model, settings, choose_device(CPU))
    models = Models(base, {"sft": result.adapter}, alpaca_tokenizer, batch_size=4)
    measured = heldout_loss(models.scores("sft", labelled_rows(rows["validation"]), "loss")).value
    assert measured == pytest.approx(min(losses), abs=1e-4)


def test_trained_copies_on_a_half_precision_base_are_float32(folders, rows, pairs, settings):
    setup = training_setup(folders["tied"], CPU.model_copy(update={"dtype": "bfloat16"}))
    sft = train(rows, sft_config(modules_to_save=["embed_tokens"]), setup, settings)
    weights = load_file(sft.adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # The reference has the same weights, not their bf16 roundings. Precomputed log-probabilities are sums in bf16.
    for precompute, tolerance in ((False, 1e-6), (True, 0.02)):
        dpo = train(pairs, DPOConfig(**STEPS, precompute_ref_log_probs=precompute), setup, settings, start=sft.adapter)
        assert logged(dpo)[0] == pytest.approx(math.log(2), abs=tolerance)


def test_precomputed_references_have_the_trained_tokens(folders, rows, pairs, settings):
    setup = training_setup(folders["tied"])
    adapter = train(rows, sft_config(trainable_token_indices=[5, 9, 40]), setup, settings).adapter
    dpo = train(pairs, DPOConfig(**STEPS, precompute_ref_log_probs=True), setup, settings, start=adapter)
    assert logged(dpo)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_operations_of_a_trained_output_layer_are_counted_once(folders, settings):
    model, device = training_setup(folders["llama"]).model, choose_device(CPU)
    plain, whole = (
        TrainingFlops.of(new_policy(model, LoraConfig(r=4, **lora), settings, device))
        for lora in ({}, {"modules_to_save": ["lm_head"]})
    )
    # A trained matrix takes 6 operations for each weight, a frozen one 4.
    assert plain.head * 6 == whole.head * 4 > 0
    assert plain.body == whole.body


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_takes_every_field(case, folders, settings):
    kind, lora = CASES[case]
    setup, device = training_setup(folders[kind]), choose_device(CPU)
    policy = new_policy(setup.model, LoraConfig(r=4, **lora), settings, device)
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    config = load_model(setup.model, settings, device).config
    assert shapes(config, "lora", LoraConfig(r=4, **lora), device, 2, 16).trained == trained


@pytest.mark.parametrize(
    ("kind", "lora", "words"),
    [
        ("llama", {"rank_pattern": {"c_attn": 2}}, "rank_pattern: c_attn is the name of no layer"),
        ("llama", {"modules_to_save": ["wte", "lm_head"]}, "modules_to_save: the model has no module wte"),
        ("llama", {"exclude_modules": ["c_attn"]}, "exclude_modules: the model has no module c_attn"),
        ("llama", {"trainable_token_indices": [5000]}, "has the tokens 0 to 280, and no token 5000"),
        ("llama", {"trainable_token_indices": {"wte": [5]}}, "does not fit"),
        ("llama", {"lora_bias": True}, "q_proj has no bias"),
        ("llama", {"target_modules": ["c_attn", "q_proj"]}, "c_attn is no name of a module of this model.* k_proj, "),
        ("llama", {"target_modules": "q_proj,v_proj"}, "regular expression for whole names, and it matches no layer"),
        ("llama", {"target_modules": "(q_proj"}, "is no regular expression"),
        ("llama", {"target_parameters": ["experts.down_proj"]}, "down_proj is no name of a parameter"),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "the layers 0 to 1, and no layer 2"),
        ("gpt2", {"init_lora_weights": "olora"}, "Use pissa"),
        ("gpt2", {"use_bdlora": {"target_modules_bd_a": ["c_attn"], "nblocks": 2}}, "does not fit"),
        ("tied", {"init_lora_weights": "pissa", "target_modules": ["lm_head", "v_proj"]}, "input embeddings too"),
        ("llama", {"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "embeddings are not tied"),
        ("gpt2", {"ensure_weight_tying": True, "modules_to_save": ["wte", "lm_head"]}, "named embed_tokens"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_training(kind, lora, words, folders, settings):
    with pytest.raises(RequestError, match=words):
        new_policy(training_setup(folders[kind]).model, LoraConfig(r=4, **lora), settings, choose_device(CPU))
