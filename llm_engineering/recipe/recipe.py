"""The recipe: one YAML file that describes the whole chain, from documents to promotion.

An unknown key is refused, and some code reads every key. This module has the checks between blocks; each block checks
its own keys. `recipe_keys.py` lists the blocks.
"""

from __future__ import annotations

from typing import Self, get_args

from pydantic import model_validator

from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK, PEOPLE, DocumentsConfig, rows_key
from llm_engineering.recipe.evaluation_blocks import (
    EXAM_MEASURES,
    GENERATED_EXAM,
    REWARD,
    REWARD_MEASURE,
)
from llm_engineering.recipe.generation_blocks import FROM_QUESTIONS, MIN_JSON_TOKENS
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.online_blocks import OnlineConfig
from llm_engineering.recipe.recipe_keys import RecipeKeys
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.stage_blocks import PackedConfig, ReferenceConfig
from llm_engineering.recipe.stages import STAGES, Kind

_UNSHARDED = "use compute.distributed ddp, or deepspeed with zero_stage 1 or 2"


class Recipe(RecipeKeys):
    """A whole recipe. Keys of two blocks that contradict each other are refused."""

    @model_validator(mode="after")
    def _stages(self) -> Self:
        first, *later = self.chain
        for name in self.chain:
            if getattr(self, name) is None:
                raise ValueError(f"chain has the stage {name}, and the block {name} is missing: add it")
        for name in later:
            for key in ("method", "lora"):
                own, chosen = getattr(self.block(name), key), getattr(self, key)
                if own is not None and own != chosen:
                    raise ValueError(
                        f"{name}.{key} has no effect, because {name} trains the weights of {first} further: set "
                        f"{first}.{key}, and {name}.{key} to null"
                    )
        if self.method == "full" and self.block(first).lora not in (None, LoraConfig()):
            raise ValueError(f"{first}.lora has no effect with {first}.method full: remove it, or choose lora or qlora")
        trained = {STAGES[name].rows for name in self.chain}
        for key, is_set, kind, rows, stage in (
            ("data.replay", self.data.replay is not None, "text", "text", "cpt"),
            (
                "data.replay_instructions",
                self.data.replay_instructions is not None,
                "instruction",
                "instructions",
                "sft",
            ),
            ("generation.rewritings", bool(self.generation.rewritings), "text", "text", "cpt"),
        ):
            if is_set and kind not in trained:
                raise ValueError(
                    f"{key} has no effect, because no stage of chain trains on {rows}: remove it, or add {stage}"
                )
        return self

    @model_validator(mode="after")
    def _reward_models(self) -> Self:
        order = list(STAGES)
        for place, name in enumerate(self.chain):
            if STAGES[name].policy:
                continue
            later = next((stage for stage in self.chain[place:] if order.index(stage) < order.index(name)), None)
            if later is not None:
                raise ValueError(
                    f"chain has {later} after {name}, and {later} has no use for a reward model: put {name} after {later}"
                )
            if place == 0 and self.model.added_tokens:
                raise ValueError(
                    f"chain begins with {name}, which does not train the rows of new tokens: put sft before it, or remove the "
                    "tokens from model"
                )
            if self.compute.backend == "unsloth":
                raise ValueError(
                    f"compute.backend unsloth trains no reward models: set it to auto, with which {name} uses transformers"
                )
            if self.compute.shards_weights:
                raise ValueError(f"{name} was not tested with sharded weights: {_UNSHARDED}")
        return self

    @model_validator(mode="after")
    def _new_tokens(self) -> Self:
        if not self.model.added_tokens:
            return self
        first, compute = self.chain[0], self.compute
        key = f"model.{'new_tokens' if self.model.new_tokens else 'new_special_tokens'}"
        if self.method == "qlora":
            raise ValueError(
                f"{key} with {first}.method qlora would be trained in bf16, as TRL trains all weights on a quantised base "
                f"model, and bf16 loses small updates of whole rows: set {first}.method to lora, or remove the tokens"
            )
        if self.lora.library_arguments.get("trainable_token_indices"):
            raise ValueError(
                f"{key} and {first}.lora.trainable_token_indices cannot be combined: remove one of them, or train the whole "
                f"embeddings with {first}.lora.modules_to_save"
            )
        if compute.backend == "unsloth":
            raise ValueError(
                f"compute.backend unsloth does not train {key}: use transformers, or auto, or remove the tokens"
            )
        if compute.distributed == "fsdp2" or compute.zero_stage == 3:
            raise ValueError(
                f"{key} changes the embeddings when the model is loaded, which was not tested with sharded weights: {_UNSHARDED}"
            )
        return self

    @model_validator(mode="after")
    def _knowledge(self) -> Self:
        if self.knowledge is not None and not any(STAGES[name].rows == "text" for name in self.chain):
            raise ValueError(
                "knowledge.tokens limits the texts of cpt, and chain has no stage on text: remove knowledge, or add cpt"
            )
        from_questions = next((kind for kind in self.generation.rewritings if kind in FROM_QUESTIONS), None)
        if from_questions and self.generation.client == "local" and self.data.file("instruction") is not None:
            raise ValueError(
                f"generation.rewritings: {from_questions} is made of generated questions, and data.instructions takes their "
                "place: remove it, or data.instructions"
            )
        return self

    @model_validator(mode="after")
    def _people(self) -> Self:
        made = self.kinds(self.chain[-1])
        taken = [kind for kind in get_args(Kind) if self.data.people(kind)]
        unused = next((kind for kind in taken if kind not in made), None)
        if unused is not None:
            raise ValueError(
                f"data.{rows_key(unused)} names {' and '.join(self.data.people(unused))}, which has no effect, because no stage of "
                f"chain needs {unused} rows: remove it, or add a stage"
            )
        if self.data.human_weight > 1 and not taken:
            raise ValueError(
                f"data.human_weight has no effect, because no rows of people are trained on: add {' or '.join(PEOPLE)} to "
                "the key of rows that the chain trains, e.g. data.instructions, or remove data.human_weight"
            )
        return self

    @model_validator(mode="after")
    def _gates(self) -> Self:
        for stage in self.chain:
            if self.promotion.rules(stage) is None:
                kinds = self.kinds(stage)
                measure = "heldout_loss" if "instruction" in kinds else "document_loss" if "text" in kinds else REWARD
                rules = f"base: {{{measure}: 0.0}}, incumbent: {{{measure}: 0.0}}"
                if not STAGES[stage].policy:
                    rules = f"base: {{{REWARD_MEASURE}: 0.0}}"
                raise ValueError(
                    f"promotion.{stage} is missing: say what a model that ends with {stage} must reach, e.g. "
                    f"{{better_than: {{{rules}}}}}"
                )
        for rule in self.promotion.all_rules():
            if rule.run not in self.chain:
                continue
            measured = self.measures(rule.run)
            if rule.measure not in measured:
                raise ValueError(
                    f"promotion.{rule.path} names {rule.measure}, which a run that ends with {rule.run} does not measure. It "
                    f"measures: {', '.join(measured)}. Remove the rule, move it to a stage that measures {rule.measure}, or set "
                    f"what {rule.measure} needs in exam or evaluation"
                )
            before = [stage for stage in self.chain_to(rule.run)[:-1] if STAGES[stage].policy]
            if rule.than in STAGES and rule.than not in before:
                raise ValueError(
                    f"promotion.{rule.path}: a run that ends with {rule.run} has no {rule.than} model before it to compare "
                    f"with: remove the key {rule.than}"
                )
            reads = rule.than in STAGES and STAGES[rule.than].rows == "text"
            if reads and rule.measure in EXAM_MEASURES.values():
                raise ValueError(
                    f"promotion.{rule.path} names {rule.measure}, and the model of {rule.than} takes no exam in a run that ends "
                    f"with {rule.run}: compare with base, or remove the rule"
                )
        return self

    @model_validator(mode="after")
    def _exam(self) -> Self:
        asks_handbook = self.exam is not None and self.exam.path == EMBEDDED_HANDBOOK
        if asks_handbook and self.learns_from_documents and self.documents.path != EMBEDDED_HANDBOOK:
            raise ValueError(
                f"exam.path {EMBEDDED_HANDBOOK} asks about the embedded handbook, and the model learns from "
                f"{self.documents.path}: set exam.path to a file of your own questions, or extend "
                "configs/own_documents.yaml, whose exam is written from the documents"
            )
        if self.exam is not None and self.exam.is_generated:
            self._check_generated_exam()
        return self

    def _check_generated_exam(self) -> None:
        path = f"exam.path {GENERATED_EXAM}"
        own = self.data.file("instruction")
        if own is not None:
            raise ValueError(
                f"{path} writes questions about the documents from which the instructions are generated, and "
                f"data.instructions is {own}: set exam.path to a file of your own questions, or exam to null"
            )
        if "instruction" not in self.kinds(self.chain[-1]):
            raise ValueError(
                f"{path} asks in other wordings what a stage has learned to answer, and chain has no stage on instructions: "
                "add sft, or set exam.path to a file of your own questions"
            )
        if self.generation.client == "local" and self.generation.questions != "fact":
            raise ValueError(
                f"{path} needs several questions about one fact, and client local writes them only with generation.questions "
                "fact: set it, with documents.unit sentence, or choose another client, or set exam.path to a file of your own "
                "questions"
            )

    @model_validator(mode="after")
    def _unit(self) -> Self:
        documents, default = self.documents, DocumentsConfig()
        cuts = documents.unit == "passage" or (self.exam is not None and self.exam.retrieval_passages > 0)
        # A recipe that extends one with the default keeps it.
        if not cuts and documents.passage_min_chars != default.passage_min_chars:
            raise ValueError(
                "documents.passage_min_chars has no effect with documents.unit sentence, because a sentence may be short: "
                "remove it, or set documents.unit to passage"
            )
        return self

    @model_validator(mode="after")
    def _online(self) -> Self:
        compute = self.compute
        for stage, config in self.blocks.items():
            if not isinstance(config, OnlineConfig):
                continue
            problem = config.generation_problem(stage, compute)
            if problem:
                raise ValueError(problem)
            if compute.shards_weights:
                raise ValueError(f"{stage} generates completions with the whole weights in each process: {_UNSHARDED}")
            if compute.backend == "unsloth":
                raise ValueError(
                    f"compute.backend unsloth does not train {stage}: use auto, which trains {stage} with transformers and "
                    "the other stages with unsloth where it is installed"
                )
            if config.library_arguments.get("use_vllm") and compute.device == "cpu":
                raise ValueError(f"{stage}.use_vllm needs CUDA, and compute.device is cpu: remove it, or use auto")
        return self

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        writing = self.generation
        writes_json = writing.client != "local" and writing.response_format != "text"
        if writes_json and self.data.file("instruction") is None:
            for key, good in (("question_max_new_tokens", 200), ("answer_max_new_tokens", 512)):
                tokens = getattr(writing, key)
                if tokens is not None and tokens < MIN_JSON_TOKENS:
                    raise ValueError(
                        f"generation.{key} {tokens} is too few with client {writing.client}, which answers in JSON: set at "
                        f"least {MIN_JSON_TOKENS}; {good} is a good value"
                    )
        if writing.questions == "fact" and self.documents.unit != "sentence":
            raise ValueError(
                "generation.questions fact writes about one sentence each: set documents.unit to sentence, or questions to "
                "passage"
            )
        compute, first, blocks = self.compute, self.chain[0], self.blocks
        for stage, block in blocks.items():
            if isinstance(block, RewardedConfig):
                problem = block.rewards_problem(stage, self.reward_stage(stage), compute)
                if problem:
                    raise ValueError(problem)
        if compute.device == "cpu" and compute.dtype == "float16":
            raise ValueError(
                "compute.dtype float16 does not train on compute.device cpu: use bfloat16 or float32, or auto"
            )
        if compute.device == "cpu" and compute.attn_implementation == "flash_attention_2":
            raise ValueError("compute.attn_implementation flash_attention_2 needs CUDA: use sdpa, or auto")
        best = [stage for stage, config in blocks.items() if config.load_best]
        if best and compute.sagemaker is not None and compute.sagemaker.instance_count > 1:
            raise ValueError(
                f"{best[0]}.load_best reads the best checkpoint in every process, but only the first machine has it on its "
                "disk: set load_best to false, or compute.sagemaker.instance_count to 1"
            )
        if self.method == "qlora" and compute.shards_weights:
            raise ValueError(
                f"{first}.method qlora keeps its weights in 4 bits, which cannot be sharded here: {_UNSHARDED}"
            )
        if self.lora.moves_base_weights and compute.shards_weights:
            raise ValueError(
                f"{first}.lora.init_lora_weights moves a part of the base weights into the adapter, which was not tested with "
                f"sharded weights: {_UNSHARDED}, or another start value"
            )
        for stage, config in blocks.items():
            if "8bit" in config.optim and compute.distributed != "ddp":
                raise ValueError(
                    f"{stage}.optim {config.optim} has a state that is not sharded with compute.distributed "
                    f"{compute.distributed}: use auto or adamw_torch, or compute.distributed ddp"
                )
            if not isinstance(config, ReferenceConfig):
                continue
            if config.library_arguments.get("sync_ref_model") and self.method != "full":
                raise ValueError(
                    f"{stage}.sync_ref_model moves the reference towards the model, and with {first}.method {self.method} "
                    f"the reference is an adapter, which TRL cannot move: remove it, or choose {first}.method full"
                )
            if config.precompute_ref_log_probs and compute.num_processes > 1:
                raise ValueError(
                    f"{stage}.precompute_ref_log_probs works only with compute.num_processes 1: set "
                    f"{stage}.precompute_ref_log_probs to false (the reference then runs in every step)"
                )
        if compute.backend == "unsloth" and compute.device == "cpu":
            raise ValueError("compute.backend unsloth needs CUDA, and compute.device is cpu: use transformers, or auto")
        if compute.backend == "unsloth" and self.lora.beyond_unsloth:
            raise ValueError(
                f"compute.backend unsloth has no {first}.lora.{self.lora.beyond_unsloth[0]}: use transformers, or auto, or "
                "remove the key"
            )
        packed = [stage for stage, config in blocks.items() if isinstance(config, PackedConfig) and config.packing]
        if compute.backend == "unsloth" and self.method == "full" and packed:
            raise ValueError(
                f"compute.backend unsloth trains {first}.method full with a forward pass that does not get the borders of "
                f"packed rows: set {packed[0]}.packing to false, or use transformers"
            )
        if self.tracking.comet != "auto" and self.tracking.workspace is not None:
            raise ValueError(
                f"tracking.workspace has no effect with tracking.comet {self.tracking.comet}: remove it, or set auto"
            )
        return self
