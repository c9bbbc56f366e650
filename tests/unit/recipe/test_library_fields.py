"""Fields of TRL's classes as keys of a recipe: which are taken, which are refused, and that they reach TRL."""

import json
import subprocess
import sys

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.recipe.library_fields import fields_of
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.training_blocks import DPOConfig, SFTConfig
from tests.conftest import ROOT

LOCAL = ROOT / "configs" / "local.yaml"


def test_the_file_is_that_of_the_installed_library():
    command = [sys.executable, "docs/reference/trl_fields.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [SFTConfig, DPOConfig])
def test_every_field_is_a_key_or_is_refused_with_a_reason(block):
    known = fields_of(block.config_class).keys()
    # `load_best` is the recipe's name for it.
    taken = {*block.allowed(), *block.model_fields, "load_best_model_at_end"}
    assert known <= taken | block.refused.keys()
    assert not block.refused.keys() - known, "refused, but no field of the library"
    assert all(len(reason.split()) > 3 for reason in block.refused.values())


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
    ],
)
def test_wrong_fields_are_refused_with_a_sentence(override, message):
    with pytest.raises(RequestError, match=message):
        load_recipe(LOCAL, override)


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
        f"load_recipe({str(LOCAL)!r}, ['sft.warmup_steps=5', 'dpo.ld_alpha=0.5'])\n"
        "print(sorted({'trl', 'torch', 'transformers', 'peft'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
