"""The blocks of a recipe, and what follows from several of them. `recipe.py` has the checks between the blocks."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import (
    DataConfig,
    DocumentsConfig,
    ExportConfig,
    FormattingConfig,
    KnowledgeConfig,
    ModelHubConfig,
    ServingConfig,
)
from llm_engineering.recipe.evaluation_blocks import (
    DOCUMENT_MEASURES,
    EXAM_MEASURES,
    HUMAN_MEASURE,
    PAIR_MEASURES,
    QUESTION_MEASURES,
    REWARD,
    REWARD_MEASURE,
    REWARD_PREFIX,
    TASK_MEASURE,
    EvaluationConfig,
    ExamConfig,
    PromotionConfig,
)
from llm_engineering.recipe.generation_blocks import FROM_QUESTIONS, ClientConfig, GenerationConfig, TextWriting
from llm_engineering.recipe.model_blocks import LoraConfig, Method, ModelConfig
from llm_engineering.recipe.reward_blocks import RewardedConfig
from llm_engineering.recipe.stages import STAGES, Kind, with_stages
from llm_engineering.recipe.sweep_block import SweepConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainConfig, TrainingSetup


class DerivingSetup(Block):
    """What decides the rewritings of the documents.

    Attributes:
        tokens: the most tokens to train on, see `KnowledgeConfig`; None without a limit.
        epochs: epochs of all stages on rows of a kind together, by the kind: `text` and `instruction`.
    """

    writing: TextWriting
    client: ClientConfig
    model: ModelConfig
    compute: ComputeConfig
    formatting: FormattingConfig
    tokens: int | None
    epochs: dict[Kind, float]


class _FirstBlocks(Block):
    """`chain` names the training stages in their order; each has a block of its name. A stage trains the model of the
    stage before it further, and the first one starts from the base model.
    """

    name: str = Field(max_length=96, pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")
    seed: int = Field(42, ge=0)
    chain: list[str] = Field(["sft", "dpo"], min_length=1)
    model: ModelConfig = ModelConfig()
    documents: DocumentsConfig = DocumentsConfig()
    generation: GenerationConfig = GenerationConfig()
    knowledge: KnowledgeConfig | None = None
    data: DataConfig = DataConfig()
    formatting: FormattingConfig = FormattingConfig()

    @field_validator("chain")
    @classmethod
    def _known_stages(cls, chain: list[str]) -> list[str]:
        for name in chain:
            if name not in STAGES:
                near = get_close_matches(name, STAGES, n=1)
                known = f"did you mean {near[0]}" if near else f"the stages are {', '.join(STAGES)}"
                raise ValueError(f"there is no stage {name}: {known}")
        twice = next((name for name in chain if chain.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the stage {twice} is named twice: remove one of them")
        return chain

    @field_validator("name")
    @classmethod
    def _name_of_a_repository(cls, name: str) -> str:
        # The rules of the hub, where the model and its dataset can be published. Servers of models have the same rules.
        if "--" in name or ".." in name or name.endswith(("-", ".", ".git")):
            raise ValueError(
                f"{name} cannot be the name of a model on the hub or at a server: remove `--`, `..`, and `-`, `.` or "
                "`.git` at the end"
            )
        return name


# A block for each row of the table of stages.
_StageBlocks: Any = with_stages("_StageBlocks", lambda stage: (stage.block | None, None), _FirstBlocks)


class RecipeKeys(_StageBlocks):  # type: ignore[misc]
    """The blocks of a recipe."""

    evaluation: EvaluationConfig = EvaluationConfig()
    exam: ExamConfig | None = None
    promotion: PromotionConfig
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    serving: ServingConfig = ServingConfig()
    export: ExportConfig = ExportConfig()
    hub: ModelHubConfig | None = None
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _comparable_trials(self) -> Self:
        if self.sweep is not None:
            problem = self.sweep.problem(self.chain, self.blocks)
            if problem:
                raise ValueError(problem)
        return self

    def block(self, stage: str) -> TrainConfig:
        """The block of a stage of the chain."""
        found = getattr(self, stage)
        assert isinstance(found, TrainConfig)
        return found

    @property
    def blocks(self) -> dict[str, TrainConfig]:
        """The blocks of the chain's stages, in their order."""
        return {stage: self.block(stage) for stage in self.chain}

    def chain_to(self, stage: str) -> list[str]:
        """The stages of the chain up to and with `stage`."""
        chain: list[str] = self.chain
        return chain[: chain.index(stage) + 1]

    def trained_with(self, stage: str) -> list[str]:
        """The stages that a run of `stage` trains, in order: the stages on texts directly before it, and `stage`.

        A model that has only read the documents is not what a user asks for, so it gets no run of its own unless the
        user names its stage.
        """
        stages = self.chain_to(stage)
        first = len(stages) - 1
        while first > 0 and STAGES[stages[first - 1]].rows == "text":
            first -= 1
        return stages[first:]

    def kinds(self, stage: str) -> list[Kind]:
        """The kinds of rows that training and evaluating a stage of the chain need, in the order of their making.

        A stage on preferences or labelled answers is evaluated on instruction rows too, unless it makes a reward model. Without
        the user's own, labelled answers are made of preferences, and prompts of instructions.
        """
        trained = {STAGES[name].rows for name in self.chain_to(stage)}
        answers = trained & {"preference", "labelled"} and STAGES[stage].policy
        needed = trained | ({"instruction"} if answers else set())
        needed |= {"preference"} if any(self.data.made_of(kind) == "preference" for kind in trained) else set()
        needed |= {"instruction"} if "prompt" in trained and self.data.file("prompt") is None else set()
        kinds: tuple[Kind, ...] = ("text", "instruction", "preference", "labelled", "prompt")
        return [kind for kind in kinds if kind in needed]

    def measures(self, stage: str) -> list[str]:
        """The measures of a run that ends with a stage of the chain, as far as the recipe shows them.

        A run may lack some: nobody has compared its models, a split has no rows, or the exam has no question of a kind.
        """
        if not STAGES[stage].policy:
            return [REWARD_MEASURE]
        kinds, evaluation, exam, rewarded = self.kinds(stage), self.evaluation, self.exam, self.rewarded(stage)
        asks = "instruction" in kinds
        found = [HUMAN_MEASURE]
        if exam is not None:
            unasked = {"multi_hop"} if exam.is_generated else set()
            unasked |= {"control"} if exam.control is None else set()
            found += [name for kind, name in EXAM_MEASURES.items() if kind not in unasked]
        found += QUESTION_MEASURES if asks else ()
        found += DOCUMENT_MEASURES if "text" in kinds else ()
        found += PAIR_MEASURES if "preference" in kinds else ()
        if rewarded is not None:
            found += [REWARD, *(REWARD_PREFIX + name for name in rewarded.reward_names)]
        found += [name for name in ("checks", "canaries") if getattr(evaluation, name) is not None]
        found += ["judge_win_rate"] if asks and evaluation.judge is not None else []
        found += ["reward_model_win_rate"] if asks and evaluation.reward_model is not None else []
        found += [TASK_MEASURE + task for task in evaluation.lm_eval.tasks] if evaluation.lm_eval is not None else []
        return found

    @property
    def method(self) -> Method:
        """What is trained: all weights, or an adapter. The first stage of the chain decides."""
        return self.block(self.chain[0]).method or "lora"

    @property
    def lora(self) -> LoraConfig:
        """The adapter of the chain."""
        return self.block(self.chain[0]).lora or LoraConfig()

    @property
    def reads_documents(self) -> bool:
        """Whether a run reads `documents`: to learn from them, or to find passages for the exam."""
        return self.learns_from_documents or (self.exam is not None and self.exam.retrieval_passages > 0)

    @property
    def learns_from_documents(self) -> bool:
        """Whether training depends on `documents`: a stage trains on them, or instructions are written from them."""
        kinds = self.kinds(self.chain[-1])
        return "text" in kinds or ("instruction" in kinds and self.data.file("instruction") is None)

    def rewarded(self, stage: str) -> RewardedConfig | None:
        """The block of the last stage on rewards of a run that ends with a stage; None if there is none."""
        blocks = [self.block(name) for name in self.chain_to(stage)]
        return next((block for block in reversed(blocks) if isinstance(block, RewardedConfig)), None)

    def reward_stage(self, stage: str) -> str | None:
        """The last stage before a stage of the chain that trains a reward model; None if there is none."""
        return next((name for name in reversed(self.chain_to(stage)[:-1]) if not STAGES[name].policy), None)

    @property
    def setup(self) -> TrainingSetup:
        """The keys that all training stages share."""
        return TrainingSetup(
            model=self.model,
            method=self.method,
            max_length=self.formatting.max_length,
            chat_template=self.formatting.chat_template,
            train_on_prompt=self.formatting.train_on_prompt,
            compute=self.compute,
            tracking=self.tracking,
            seed=self.seed,
        )

    @property
    def deriving(self) -> DerivingSetup | None:
        """What decides the rewritings; None if there are none, and no limit of tokens to check."""
        if not self.generation.rewritings and self.knowledge is None:
            return None
        tokens = self.knowledge.tokens if self.knowledge is not None else None
        epochs: dict[Kind, float] = {"text": 0.0, "instruction": 0.0}
        for stage in self.chain:
            kind = STAGES[stage].rows
            if kind in epochs:
                epochs[kind] += self.block(stage).num_train_epochs
        return DerivingSetup(
            writing=self.generation.part(TextWriting),
            client=self.generation.part(ClientConfig) if self.generation.client != "local" else ClientConfig(),
            model=self.model,
            compute=self.compute.one_process,
            formatting=self.formatting,
            tokens=tokens,
            epochs=epochs,
        )

    @property
    def derives_from_questions(self) -> bool:
        """Whether the texts depend on the instructions: rewritings are made of them, or their tokens are counted."""
        counted = self.knowledge is not None and any(STAGES[name].rows == "instruction" for name in self.chain)
        return counted or (
            self.generation.client == "local" and any(kind in FROM_QUESTIONS for kind in self.generation.rewritings)
        )

    @property
    def evaluation_setup(self) -> TrainingSetup:
        """The same keys for evaluation, which always runs in one process on this machine."""
        return self.setup.model_copy(update={"compute": self.compute.one_process})
