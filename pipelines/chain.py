"""The pipelines: documents → datasets → the stages of the recipe's chain → evaluation → promotion."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from zenml import pipeline
from zenml.client import Client

from llm_engineering.recipe.data_blocks import rows_key
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting, PreferenceWriting
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.reward_blocks import NEED_ANSWERS, RewardedConfig
from llm_engineering.recipe.stages import FIRST_OF_KIND, STAGES
from pipelines.inputs import Inputs
from pipelines.promote import promote
from steps.data import (
    add_human,
    collect_prompts,
    collect_texts,
    format_rows,
    generate_instructions,
    generate_preferences,
    label_preferences,
    load,
    prepare,
    read_documents,
)
from steps.evaluation import evaluate
from steps.training import train_step
from steps.written_exam import write_exam


@pipeline
def generate_datasets(recipe: Recipe, inputs: Inputs) -> None:
    """Generate the datasets of the chain, without training."""
    datasets = _Datasets(recipe, inputs)
    for kind in recipe.kinds(recipe.chain[-1]):
        datasets.of(kind)


@pipeline
def retrain(recipe: Recipe, inputs: Inputs, incumbent: Any = None) -> None:
    """The whole chain as one run. `incumbent` is the adapter in production; None if there is none."""
    _train_and_judge(recipe, inputs, recipe.chain, incumbent)


def run_stage(recipe: Recipe, inputs: Inputs, stage: str, incumbent: Any = None) -> None:
    """Documents to the evaluated adapter of a stage. The adapters of earlier runs that it needs are in `inputs`."""
    _train_and_judge(recipe, inputs, recipe.trained_with(stage), incumbent)


@pipeline
def sweep_trial(recipe: Recipe, inputs: Inputs, stage: str, seed: int | None = None) -> None:
    """Train the chain up to a stage, and evaluate nothing: the test split stays untouched.

    Args:
        seed: replaces the recipe's seed in training alone, so that the data stays the same.
    """
    _train(recipe, inputs, recipe.chain_to(stage), seed)


def stage_pipeline(stage: str) -> Any:
    """The pipeline of a stage, which has the stage's name."""
    return pipeline(name=stage)(run_stage)


class _Datasets:
    """Adds the steps that make the dataset of each kind, each once."""

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.recipe, self.inputs = recipe, inputs
        self._documents: Any = None
        self._written: Any = None
        self._exam: Any = None
        self._made: dict[str, Any] = {}

    def of(self, kind: str, start: Any = None) -> Any:
        """The dataset of a kind, checked and split. `start` is the adapter that the stage starts from, if it has one."""
        if kind not in self._made:
            own = self.recipe.data.file(kind)
            make: dict[str, Callable[[], Any]] = {
                "text": self._texts,
                "instruction": self._candidates,
                "preference": partial(self._preferences, start),
                "labelled": partial(self._labelled, start),
                "prompt": lambda: collect_prompts(self.of("instruction")),
            }
            candidates = make[kind]() if own is None else self._own(kind, own)
            step = prepare.with_options(substitutions={"kind": kind})
            self._made[kind] = step(
                kind,
                candidates,
                self.recipe.data.checks,
                self.inputs.evaluation,
                self.recipe.exam,
                self.inputs.exam,
                # The exam asks about the documents, so they stay whole.
                self.exam() if kind != "text" else None,
                *((self._human(kind), *self._asked(kind)) if self.recipe.data.people(kind) else ()),
                id=f"prepare_{rows_key(kind)}",
            )
        return self._made[kind]

    def _human(self, kind: str) -> Any:
        """What people had said about the rows of a kind when the run began."""
        rows = rows_key(kind)
        step = add_human.with_options(substitutions={"rows": rows})
        return step(kind, rows, self.inputs.people[kind], id=f"add_human_{rows}")

    def _asked(self, kind: str) -> list[Any]:
        """The instructions, if the run has them: answers of people must not be to their held-out questions."""
        return (
            [self.of("instruction")]
            if kind in ("preference", "labelled") and "instruction" in self.recipe.kinds(self.recipe.chain[-1])
            else []
        )

    def documents(self) -> Any:
        """The documents; None if the recipe does not read them."""
        if self._documents is None and self.recipe.reads_documents:
            self._documents = read_documents(self.recipe.documents, self.inputs.documents)
        return self._documents

    def exam(self) -> Any:
        """The exam that is written from the documents; None if the recipe has none, or names a file of questions."""
        recipe = self.recipe
        if self._exam is None and recipe.exam is not None and recipe.exam.is_generated:
            self._exam = write_exam(
                self._candidates(),
                self.documents(),
                recipe.documents,
                recipe.model,
                recipe.formatting.chat_template,
                recipe.compute.one_process,
                recipe.generation.part(ClientConfig),
                recipe.generation.part(InstructionWriting),
                recipe.exam,
                recipe.data.split,
                recipe.seed,
            )
        return self._exam

    def _candidates(self) -> Any:
        """The generated instructions before they are checked, made once: the exam is chosen from them too."""
        if self._written is None:
            self._written = self._instructions()
        return self._written

    def _texts(self) -> Any:
        recipe, data = self.recipe, self.recipe.data
        return collect_texts(
            self.documents(),
            recipe.documents,
            recipe.seed,
            data.replay,
            data.split,
            self.inputs.replay,
            recipe.deriving,
            self.of("instruction") if recipe.derives_from_questions else None,
        )

    def _instructions(self) -> Any:
        recipe, data = self.recipe, self.recipe.data
        return generate_instructions(
            self.documents(),
            recipe.documents,
            recipe.model,
            recipe.formatting.chat_template,
            recipe.compute.one_process,
            recipe.generation.part(ClientConfig),
            recipe.generation.part(InstructionWriting),
            recipe.seed,
            data.replay_instructions,
            self.inputs.replay_instructions,
            data.split if recipe.generation.two_hop else None,
        )

    def _preferences(self, start: Any) -> Any:
        recipe, data = self.recipe, self.recipe.data
        return generate_preferences(
            self.of("instruction"),
            self.documents() if data.file("instruction") is None else None,
            recipe.model,
            recipe.formatting.chat_template,
            recipe.compute.one_process,
            recipe.generation.rejecting_client,
            recipe.generation.part(PreferenceWriting),
            recipe.seed,
            *(
                (recipe.documents, recipe.generation.part(InstructionWriting), start, self.exam())
                if recipe.generation.unanswerable
                else ()
            ),
        )

    def _labelled(self, start: Any) -> Any:
        data = self.recipe.data
        if data.made_of("labelled") == "labelled":
            return None
        return label_preferences(self.of("preference", start), data.test_preferences is not None)

    def _own(self, kind: str, path: str) -> Any:
        data, rows = self.recipe.data, rows_key(kind)
        step = load.with_options(substitutions={"kind": kind})
        replay = (data.replay_instructions, self.inputs.replay_instructions) if kind == "instruction" else (None, None)
        given = getattr(self.inputs, rows)
        return step(kind, path, data.test_file(kind), data.format, data.columns, given, *replay, id=f"load_{rows}")


class _Trained(NamedTuple):
    """Outputs of the steps up to the last training step.

    Attributes:
        formatted: the formatted rows of each kind, on which the models are compared: those of the first stage with this kind.
        scorer: the reward model of the last stage with rewards.
    """

    datasets: _Datasets
    formatted: dict[str, Any]
    adapters: dict[str, Any]
    report: Any
    scorer: Any


def _train(recipe: Recipe, inputs: Inputs, trained: list[str], seed: int | None = None) -> _Trained:
    """Train stages of the chain.

    Args:
        trained: the stages to train. The adapters of the stages before them come from earlier runs.
        seed: the seed of training, if it is not the recipe's.
    """
    setup = recipe.setup if seed is None else recipe.setup.model_copy(update={"seed": seed})
    # A later stage finds an adapter by this hash, and must not start from one with another seed.
    ending = "" if seed is None else f"-seed{seed}"
    datasets = _Datasets(recipe, inputs)
    adapters = {stage: Client().get_artifact_version(number) for stage, number in inputs.adapters.items()}
    formatted: dict[str, Any] = {}
    report: Any = None
    start: Any = None
    scorer: Any = None
    for stage in recipe.chain_to(trained[-1]):
        kind, block = STAGES[stage].rows, recipe.block(stage)
        if isinstance(block, RewardedConfig):
            scorer = _reward_model(recipe, inputs, stage, block, adapters)
        if stage in trained or kind not in formatted:
            rows = _format(recipe, stage, kind, datasets.of(kind, start))
            formatted.setdefault(kind, rows)
        if stage in trained:
            adapters[stage], report = train_step(STAGES[stage])(
                rows,
                stage,
                STAGES[stage].train,
                block.model_dump(),
                setup,
                inputs.recipes[stage] + ending,
                start,
                scorer if isinstance(block, RewardedConfig) else None,
                id=f"train_{stage}",
            )
        # A reward model is no start for another stage.
        start = adapters[stage] if STAGES[stage].policy else start
    return _Trained(datasets, formatted, adapters, report, scorer)


def _train_and_judge(recipe: Recipe, inputs: Inputs, trained: list[str], incumbent: Any) -> None:
    """Train stages of the chain, evaluate the model of every stage, and judge the last one."""
    last = trained[-1]
    chain = recipe.chain_to(last)
    datasets, formatted, adapters, report, scorer = _train(recipe, inputs, trained)
    for kind in recipe.kinds(last):
        if kind not in formatted:
            formatted[kind] = _format(recipe, FIRST_OF_KIND[kind], kind, datasets.of(kind))
    retrieves = recipe.exam is not None and recipe.exam.retrieval_passages > 0
    rewarded = recipe.rewarded(last)
    evaluation = evaluate(
        chain,
        recipe.evaluation,
        recipe.evaluation_setup,
        inputs.checks,
        recipe.exam,
        inputs.exam,
        recipe.documents if retrieves else None,
        datasets.exam(),
        rewards=rewarded.reward_set if rewarded is not None else None,
        reward_code=inputs.rewards,
        reward_model=scorer,
        reward_judge=_earlier(inputs, "evaluation"),
        max_completion_length=getattr(rewarded, "max_completion_length", None),
        incumbent=incumbent,
        documents=datasets.documents() if retrieves else None,
        judged=inputs.judged,
        epochs={s: recipe.block(s).num_train_epochs for s in chain if STAGES[s].rows in ("text", "instruction")},
        # Nothing is measured on labelled answers.
        **{f"formatted_{kind}": rows for kind, rows in formatted.items() if kind != "labelled"},
        **{f"{kind}_dataset": datasets.of(kind) for kind in formatted},
        **{f"{stage}_adapter": adapter for stage, adapter in adapters.items()},
        id=f"evaluate_{last}",
    )
    promote(evaluation, report, recipe, inputs.code, inputs.incumbent, list(inputs.adapters.values()))


def _reward_model(
    recipe: Recipe, inputs: Inputs, stage: str, block: RewardedConfig, adapters: Mapping[str, Any]
) -> Any:
    """The model of a stage's reward `reward_model`: of the version that it names, or of this chain; None without this reward."""
    if block.reward_model is None:
        return None
    trained = recipe.reward_stage(stage)
    if block.reward_model.version is not None or trained is None:
        return _earlier(inputs, stage)
    return adapters[trained]


def _earlier(inputs: Inputs, user: str) -> Any:
    """The reward model of an earlier run that a stage or the evaluation names; None if it names none."""
    return Client().get_artifact_version(inputs.reward_models[user]) if user in inputs.reward_models else None


def _format(recipe: Recipe, stage: str, kind: str, dataset: Any) -> Any:
    step = format_rows.with_options(substitutions={"stage": stage})
    block = recipe.block(stage) if stage in recipe.chain else None
    epochs = block.num_train_epochs if block is not None else None
    comparing = (
        [reward.use for reward in block.rewards if reward.use in NEED_ANSWERS]
        if isinstance(block, RewardedConfig)
        else []
    )
    formatted, _ = step(
        stage,
        kind,
        dataset,
        recipe.model,
        recipe.formatting,
        recipe.data.train_unfit,
        epochs,
        comparing,
        id=f"format_{stage}",
    )
    return formatted
