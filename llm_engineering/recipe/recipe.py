"""The recipe: one YAML file that describes the whole chain, from documents to promotion.

Unknown keys are refused, and every field is read by some code. Checks between blocks stand here, those inside a block
stand with it.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, FormattingConfig, ModelHubConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, PromotionConfig
from llm_engineering.recipe.generation_blocks import (
    MIN_JSON_TOKENS,
    GenerationConfig,
)
from llm_engineering.recipe.training_blocks import (
    DPOConfig,
    LoraConfig,
    ModelConfig,
    SFTConfig,
    TrackingConfig,
    TrainingSetup,
)


class Recipe(Block):
    """The whole chain."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")
    seed: int = Field(42, ge=0)
    model: ModelConfig = ModelConfig()
    documents: DocumentsConfig = DocumentsConfig()
    generation: GenerationConfig = GenerationConfig()
    data: DataConfig = DataConfig()
    formatting: FormattingConfig = FormattingConfig()
    sft: SFTConfig
    dpo: DPOConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    hub: ModelHubConfig | None = None

    @property
    def setup(self) -> TrainingSetup:
        """The part of the recipe that both training stages share."""
        return TrainingSetup(
            model=self.model,
            method=self.sft.method,
            max_length=self.formatting.max_length,
            chat_template=self.formatting.chat_template,
            train_on_prompt=self.formatting.train_on_prompt,
            compute=self.compute,
            tracking=self.tracking,
            seed=self.seed,
        )

    @property
    def evaluation_setup(self) -> TrainingSetup:
        """The same for evaluation, which is one process, here, wherever training runs."""
        return self.setup.model_copy(update={"compute": self.compute.one_process})

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        writing = self.generation
        writes_json = writing.client != "local" and writing.response_format != "text"
        if writes_json and self.data.instructions is None:
            if writing.question_max_new_tokens < MIN_JSON_TOKENS:
                raise ValueError(
                    f"generation.question_max_new_tokens {writing.question_max_new_tokens} is too few with client "
                    f"{writing.client}, which answers in JSON: at least {MIN_JSON_TOKENS}, 200 is a good value"
                )
            if writing.answer_max_new_tokens is not None and writing.answer_max_new_tokens < MIN_JSON_TOKENS:
                raise ValueError(
                    f"generation.answer_max_new_tokens {writing.answer_max_new_tokens} is too few with client "
                    f"{writing.client}, which answers in JSON: at least {MIN_JSON_TOKENS}, 512 is a good value"
                )
        for path, measure in self.promotion.measures():
            if not self.evaluation.computes(measure):
                raise ValueError(
                    f"promotion.{path} names {measure}, which the evaluation of this recipe does not compute: "
                    "ask for it in the block evaluation, or remove the rule"
                )
        if self.sft.method == "full" and self.sft.lora != LoraConfig():
            raise ValueError("sft.lora has no effect with sft.method full: remove it, or choose lora or qlora")
        if self.compute.device == "cpu" and self.compute.dtype == "float16":
            raise ValueError(
                "compute.dtype float16 does not train on compute.device cpu: use bfloat16 or float32, or auto"
            )
        if self.compute.device == "cpu" and self.compute.attn_implementation == "flash_attention_2":
            raise ValueError("compute.attn_implementation flash_attention_2 needs CUDA: use sdpa, or auto")
        compute = self.compute
        best = [stage for stage, config in (("sft", self.sft), ("dpo", self.dpo)) if config.load_best]
        if best and compute.sagemaker is not None and compute.sagemaker.instance_count > 1:
            raise ValueError(
                f"{best[0]}.load_best reads the best checkpoint in every process, and only the first of several machines "
                "has it on its disk: set it to false, or compute.sagemaker.instance_count to 1"
            )
        if self.sft.method == "qlora" and (compute.distributed == "fsdp2" or compute.zero_stage == 3):
            raise ValueError(
                "sft.method qlora keeps its weights in 4 bits, which are not sharded here: use compute.distributed ddp, "
                "or deepspeed with zero_stage 1 or 2"
            )
        for stage, optim in (("sft", self.sft.optim), ("dpo", self.dpo.optim)):
            if optim == "adamw_8bit" and compute.distributed != "ddp":
                raise ValueError(
                    f"{stage}.optim adamw_8bit has a state that is not sharded with compute.distributed "
                    f"{compute.distributed}: use auto or adamw_torch, or ddp"
                )
        if self.dpo.precompute_ref_log_probs and compute.num_processes > 1:
            raise ValueError(
                "dpo.precompute_ref_log_probs is for compute.num_processes 1: set it to false, and the reference is "
                "asked at every step"
            )
        if self.compute.backend == "unsloth" and self.compute.device == "cpu":
            raise ValueError("compute.backend unsloth needs CUDA, and compute.device is cpu: use transformers, or auto")
        if self.compute.backend == "unsloth" and self.sft.lora.use_dora:
            raise ValueError(
                "compute.backend unsloth has no kernels for sft.lora.use_dora: use transformers, or auto, or no DoRA"
            )
        if self.compute.backend == "unsloth" and self.sft.method == "full" and self.sft.packing:
            raise ValueError(
                "compute.backend unsloth trains sft.method full with a forward that is not told where packed rows begin: "
                "set sft.packing to false, or use transformers"
            )
        if self.tracking.comet != "auto" and self.tracking.workspace is not None:
            raise ValueError(
                f"tracking.workspace is only used online, and tracking.comet is {self.tracking.comet}: remove one"
            )
        return self
