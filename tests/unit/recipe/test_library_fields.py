"""Fields of TRL's and PEFT's classes as keys of a recipe: which are taken, which are refused, and that they reach the library."""

import json
import subprocess
import sys

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.recipe.block import fields_of
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from llm_engineering.recipe.training_blocks import REFUSED_TRL
from tests.conftest import ROOT

LOCAL = ROOT / "configs" / "python_reference.yaml"


def test_the_file_is_that_of_the_installed_library():
    command = [sys.executable, "docs/reference/library_fields.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [SFTConfig, DPOConfig, KTOConfig, RewardConfig, LoraConfig])
def test_every_field_is_a_key_or_is_refused_with_a_reason(block):
    known = fields_of(block.config_class).keys()
    # `load_best` is the recipe's name for it.
    taken = {*block.allowed(), *block.model_fields, "load_best_model_at_end"}
    assert known <= taken | block.refused.keys()
    assert not block.refused.keys() - REFUSED_TRL.keys() - known, "refused, but no field of the library"
    values = [reason for reasons in block.refused_values.values() for reason in reasons.values()]
    assert all(len(reason.split()) > 3 for reason in [*block.refused.values(), *values])


def test_fields_of_training_guides_are_taken():
    recipe = load_recipe(
        LOCAL,
        [
            "sft.warmup_steps=5",
            "sft.lr_scheduler_type=cosine_with_restarts",
            "sft.optim=paged_adamw_8bit",
            "sft.neftune_noise_alpha=5",
            "sft.adam_beta2=0.95",
            "sft.dataloader_num_workers=2",
            "sft.save_total_limit=3",
            "sft.save_strategy=epoch",
            "sft.save_steps=null",
            "sft.eval_strategy=epoch",
            "sft.eval_steps=null",
            "sft.load_best_model_at_end=true",
            "dpo.f_divergence_type=js_divergence",
        ],
    )
    assert recipe.sft.library_arguments == {
        "warmup_steps": 5.0,
        "neftune_noise_alpha": 5.0,
        "adam_beta2": 0.95,
        "dataloader_num_workers": 2,
    }
    assert (recipe.sft.load_best, recipe.sft.save_total_limit, recipe.sft.eval_steps) == (True, 3, None)
    assert recipe.dpo.library_arguments == {"f_divergence_type": "js_divergence"}
    # As a job carries it to another process.
    assert SFTConfig.model_validate(json.loads(recipe.sft.model_dump_json())) == recipe.sft


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["sft.adam_bta2=0.9"], "unknown key `sft.adam_bta2`. Did you mean `sft.adam_beta2`?"),
        (["sft.adam_beta2=two"], "`sft.adam_beta2` is 'two': Input should be a valid number"),
        (["sft.output_dir=x"], "`sft.output_dir` cannot be set: .*LLM_OUTPUT_DIR"),
        (["sft.activation_offloading=true"], "`sft.activation_offloading` cannot be set: .*gradient_checkpointing"),
        (["dpo.max_length=9"], "`dpo.max_length` cannot be set: formatting.max_length"),
        (["sft.optim=adam"], "`sft.optim`: Input should be 'adamw_torch'"),
        (["sft.warmup_steps=3", "sft.warmup_ratio=0.2"], "warmup_steps and warmup_ratio are both set"),
        (["sft.eval_strategy=epoch"], "eval_steps has no effect with eval_strategy epoch: .*null"),
        (["sft.eval_steps=null"], "eval_steps is missing"),
        (["sft.lr_scheduler_type=cosine_with_min_lr"], "needs its smallest learning rate"),
        (["sft.optim=galore_adamw"], "needs optim_target_modules"),
        (["sft.load_best=true", "sft.load_best_model_at_end=true"], "are the same key"),
        (["sft.load_best=true", "sft.save_strategy=epoch", "sft.save_steps=null"], "must be the same"),
        (["dpo.sync_ref_model=true"], "choose sft.method full"),
        (["sft.lora.modules_to_safe=[lm_head]"], "Did you mean `sft.lora.modules_to_save`?"),
        (["sft.lora.task_type=CAUSAL_LM"], "`sft.lora.task_type` cannot be set: the stage decides it"),
        (["sft.lora.bias=all"], "`sft.lora.bias` cannot be all: .*lora_bias"),
        (["sft.lora.init_lora_weights=eva"], "`sft.lora.init_lora_weights` cannot be eva: .*before training"),
        (["sft.lora.init_lora_weights=lora_ga"], "cannot be lora_ga"),
        (["sft.lora.init_lora_weights=pissa_niter_x"], "should match pattern"),
        (["sft.lora.init_lora_weights=svd"], "'gaussian', 'olora', 'pissa', 'orthogonal' or 'mica'"),
        (["sft.lora.velora_config={groups: 2}"], "Extra inputs are not permitted"),
        (["sft.lora.velora_config={init_type: batch_average_once}"], "cannot be resumed"),
        (["sft.lora.trainable_token_indices={wte: [a]}"], "should be a valid integer"),
        (["sft.lora.rank_pattern={q_proj: 0}"], "rank_pattern: q_proj is 0"),
        (["sft.lora.rank_pattern={q_proj: a}", "sft.lora.init_lora_weights=orthogonal"], "q_proj is 'a'"),
        (["sft.lora.layers_to_transform=[0]"], "needs target_modules as a list"),
        (["sft.lora.layers_pattern=h", "sft.lora.target_modules=[c_attn]"], "no effect without layers_to_transform"),
        (["sft.lora.ensure_weight_tying=true"], "set one of them, or remove it"),
        (["sft.lora.use_dora=true", "sft.lora.init_lora_weights=mica"], "cannot be combined"),
        (["sft.lora.use_dora=true", "sft.lora.init_lora_weights=pissa"], "cannot be converted"),
        (["sft.lora.lora_bias=true", "sft.lora.init_lora_weights=olora"], "no start value"),
        (["sft.lora.lora_bias=true", "sft.lora.use_dora=true"], "lora_bias does not work with use_dora"),
        (["sft.lora.target_parameters=[w]", "sft.lora.lora_dropout=0.1"], "does not work with lora_dropout"),
        (["sft.lora.init_lora_weights=orthogonal", "sft.lora.r=5"], "needs even ranks"),
        (["sft.method=qlora", "sft.lora.init_lora_weights=pissa_niter_4"], "keeps in 4 bits"),
        (["sft.method=qlora", "sft.lora.modules_to_save=[lm_head]"], "use method lora"),
        (["sft.method=qlora", "sft.lora.use_bdlora={nblocks: 2}"], "use method lora"),
        (["sft.method=qlora", "sft.lora.init_lora_weights=mica"], "use method lora"),
        (["sft.method=full", "sft.lora.modules_to_save=[lm_head]"], "sft.lora has no effect"),
        (
            ["compute.num_processes=2", "compute.distributed=fsdp2", "sft.lora.init_lora_weights=pissa"],
            "not tested with sharded weights",
        ),
        (["model.new_tokens=[a, ' b']"], "the new token ' b' is empty, or begins or ends with white space"),
        (["model.new_tokens=[a]", "model.new_special_tokens=[a]"], "the new token a is named twice"),
        (
            ["model.new_tokens=[a]", "sft.method=qlora"],
            "model.new_tokens with sft.method qlora .* set sft.method to lora",
        ),
        (["model.new_tokens=[a]", "sft.lora.trainable_token_indices=[5]"], "cannot be combined: remove one of them"),
        (
            ["model.new_special_tokens=[a]", "compute.backend=unsloth"],
            "unsloth does not train model.new_special_tokens",
        ),
        (
            ["compute.num_processes=2", "compute.distributed=fsdp2", "model.new_tokens=[a]"],
            "model.new_tokens changes the embeddings .* not tested with sharded weights",
        ),
    ],
)
def test_wrong_fields_are_refused_with_a_sentence(override, message):
    with pytest.raises(RequestError, match=message):
        load_recipe(LOCAL, override)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_16", "olora"])
def test_start_values_of_an_adapter_are_taken(init):
    recipe = load_recipe(LOCAL, [f"sft.lora.init_lora_weights={json.dumps(init)}", "sft.lora.bias=none"])
    assert recipe.sft.lora.library_arguments == {"init_lora_weights": init, "bias": "none"}
    assert recipe.sft.lora.r == 16
    assert SFTConfig.model_validate(json.loads(recipe.sft.model_dump_json())) == recipe.sft


def test_all_wrong_fields_of_a_block_are_named_at_once():
    with pytest.raises(RequestError) as error:
        load_recipe(LOCAL, ["sft.adam_beta2=two", "sft.report_to=wandb", "sft.lerning_rate=1"])
    lines = str(error.value).splitlines()
    assert [line.partition("`sft.")[2].partition("`")[0] for line in lines] == [
        "adam_beta2",
        "report_to",
        "lerning_rate",
    ]


def test_a_recipe_is_checked_without_the_libraries():
    code = (
        "import sys\nfrom llm_engineering.recipe.loading import load_recipe\n"
        f"load_recipe({str(LOCAL)!r}, ['sft.warmup_steps=5', 'dpo.ld_alpha=0.5', 'sft.lora.init_lora_weights=pissa'])\n"
        "print(sorted({'trl', 'torch', 'transformers', 'peft'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
