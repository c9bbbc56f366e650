"""The recipe: one YAML file that describes the whole chain, from documents to promotion.

An unknown key is refused, and some code reads every key. This module has the checks between blocks; each block checks
its own keys.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, FormattingConfig, ModelHubConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, PromotionConfig
from llm_engineering.recipe.generation_blocks import MIN_JSON_TOKENS, GenerationConfig
from llm_engineering.recipe.training_blocks import (
    DPOConfig,
    LoraConfig,
    ModelConfig,
    SFTConfig,
    TrackingConfig,
    TrainingSetup,
)


class Recipe(Block):
    """A whole recipe."""

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
        """The keys that both training stages share."""
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
        """The same keys for evaluation, which always runs in one process on this machine."""
        return self.setup.model_copy(update={"compute": self.compute.one_process})

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        writing = self.generation
        writes_json = writing.client != "local" and writing.response_format != "text"
        if writes_json and self.data.instructions is None:
            for key, good in (("question_max_new_tokens", 200), ("answer_max_new_tokens", 512)):
                tokens = getattr(writing, key)
                if tokens is not None and tokens < MIN_JSON_TOKENS:
                    raise ValueError(
                        f"generation.{key} {tokens} is too few with client {writing.client}, which answers in JSON: set at "
                        f"least {MIN_JSON_TOKENS}; {good} is a good value"
                    )
        for path, measure in self.promotion.measures():
            if not self.evaluation.computes(measure):
                raise ValueError(
                    f"promotion.{path} names {measure}, which the evaluation of this recipe does not compute: "
                    "add it to the block evaluation, or remove the rule"
                )
        compute = self.compute
        if self.sft.method == "full" and self.sft.lora != LoraConfig():
            raise ValueError("sft.lora has no effect with sft.method full: remove it, or choose lora or qlora")
        if compute.device == "cpu" and compute.dtype == "float16":
            raise ValueError(
                "compute.dtype float16 does not train on compute.device cpu: use bfloat16 or float32, or auto"
            )
        if compute.device == "cpu" and compute.attn_implementation == "flash_attention_2":
            raise ValueError("compute.attn_implementation flash_attention_2 needs CUDA: use sdpa, or auto")
        best = [stage for stage, config in (("sft", self.sft), ("dpo", self.dpo)) if config.load_best]
        if best and compute.sagemaker is not None and compute.sagemaker.instance_count > 1:
            raise ValueError(
                f"{best[0]}.load_best reads the best checkpoint in every process, but only the first machine has it on its "
                "disk: set load_best to false, or compute.sagemaker.instance_count to 1"
            )
        if self.sft.method == "qlora" and (compute.distributed == "fsdp2" or compute.zero_stage == 3):
            raise ValueError(
                "sft.method qlora keeps its weights in 4 bits, which cannot be sharded here: use compute.distributed ddp, "
                "or deepspeed with zero_stage 1 or 2"
            )
        if self.sft.lora.moves_base_weights and (compute.distributed == "fsdp2" or compute.zero_stage == 3):
            raise ValueError(
                "sft.lora.init_lora_weights moves a part of the base weights into the adapter, which was not tested with "
                "sharded weights: use compute.distributed ddp, or deepspeed with zero_stage 1 or 2, or another start value"
            )
        for stage, optim in (("sft", self.sft.optim), ("dpo", self.dpo.optim)):
            if "8bit" in optim and compute.distributed != "ddp":
                raise ValueError(
                    f"{stage}.optim {optim} has a state that is not sharded with compute.distributed "
                    f"{compute.distributed}: use auto or adamw_torch, or compute.distributed ddp"
                )
        if self.dpo.library_arguments.get("sync_ref_model") and self.sft.method != "full":
            raise ValueError(
                f"dpo.sync_ref_model moves the reference towards the model, and with sft.method {self.sft.method} the "
                "reference is an adapter, which TRL cannot move: remove it, or choose sft.method full"
            )
        if self.dpo.precompute_ref_log_probs and compute.num_processes > 1:
            raise ValueError(
                "dpo.precompute_ref_log_probs works only with compute.num_processes 1: set dpo.precompute_ref_log_probs to "
                "false (the reference then runs in every step)"
            )
        if compute.backend == "unsloth" and compute.device == "cpu":
            raise ValueError("compute.backend unsloth needs CUDA, and compute.device is cpu: use transformers, or auto")
        if compute.backend == "unsloth" and self.sft.lora.beyond_unsloth:
            raise ValueError(
                f"compute.backend unsloth has no sft.lora.{self.sft.lora.beyond_unsloth[0]}: use transformers, or auto, or "
                "remove the key"
            )
        if compute.backend == "unsloth" and self.sft.method == "full" and self.sft.packing:
            raise ValueError(
                "compute.backend unsloth trains sft.method full with a forward pass that does not get the borders of packed "
                "rows: set sft.packing to false, or use transformers"
            )
        if self.tracking.comet != "auto" and self.tracking.workspace is not None:
            raise ValueError(
                f"tracking.workspace has no effect with tracking.comet {self.tracking.comet}: remove it, or set auto"
            )
        return self
