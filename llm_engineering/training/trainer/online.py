"""What GRPO and RLOO share: prompts as token ids, rewards, and completions that a checkpoint keeps while they are in use."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather  # type: ignore[import-untyped]
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.base_model import load_config
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.recipe.online_blocks import OnlineConfig
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.losses import ignores_left_padding
from llm_engineering.training.processes import ranks
from llm_engineering.training.rewards import Completion, Reward
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.trainer.loss_watch import LossWatch
from llm_engineering.training.trainer.reference import complete_reference, disable_dropout, frozen_copy
from llm_engineering.training.trainer.resumable import ByEpoch, ResumableTrainer
from llm_engineering.training.training_run import TrainingRun

Config = TypeVar("Config", bound=OnlineConfig)

# Generation steps without any difference between the rewards of a prompt, from the start of the run, after which it stops.
# With 32 completions a step, 320 have then been seen: a reward that 1 completion in 100 earns would have been seen with a
# probability of 96 %. A difference later than this would teach from single lucky completions.
FLAT_STEPS = 10
# Completions of the first and of the last generation step that the report shows.
_SHOWN = 4


def check_prompts(run: TrainingRun[Config]) -> None:
    """Check the prompts before the model is loaded.

    Raises:
        RequestError: a completion of the longest prompt may exceed the model's context, or the training split has too few
            prompts for one generation step.
    """
    stage, config = run.stage, run.config
    context = getattr(load_config(run.setup.model, run.settings).get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for split in ("train", "validation") for ids in run.data[split]["prompt_ids"])
    if context is not None and longest + config.max_completion_length > context:
        room = context - longest
        fitting = f"set {stage}.max_completion_length to at most {room}, or " if room > 0 else ""
        raise RequestError(
            f"The longest prompt has {longest} tokens, and with {stage}.max_completion_length "
            f"{config.max_completion_length} it exceeds the context of {run.setup.model.name_or_path}, {context} tokens: "
            f"{fitting}lower formatting.max_length."
        )
    prompts, rows = (
        config.generation_batch(run.setup.compute.num_processes) // config.num_generations,
        len(run.data["train"]),
    )
    if rows < prompts:
        raise RequestError(
            f"A generation step of {stage} takes {prompts} prompts, and the training split has {rows}: lower "
            f"{stage}.gradient_accumulation_steps or {stage}.per_device_train_batch_size, or add prompts."
        )


def online_trainer(
    run: TrainingRun[Config],
    policy: PreTrainedModel | PeftModel,
    config: Config,
    rewards: list[Reward],
    trainer_class: type[OnlineTrainer],
    arguments_class: type[TrainingArguments],
) -> OnlineTrainer:
    """Make TRL's trainer for tokenised prompts. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    shared = training_arguments(config, run.device, run.setup, run.folder)
    # The completions of a generation step stay the same if the batches become smaller.
    shared.pop("steps_per_generation", None)
    own = {
        "generation_batch_size": run.config.generation_batch(ranks.world_size()),
        "num_generations": config.num_generations,
        # One completion for each validation prompt. A batch of evaluation then needs no whole groups.
        "num_generations_eval": 1,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "beta": config.beta,
        "vllm_mode": config.vllm_mode,
        "reward_weights": [reward.weight for reward in config.rewards],
        "metric_for_best_model": "eval_reward",
        "greater_is_better": True,
    }
    return trainer_class(
        stage=run.stage,
        rewards=rewards,
        reference=frozen_copy(policy, needed=config.beta > 0),
        model=policy,
        args=arguments_class(**shared | own),
        train_dataset=run.data["train"],
        eval_dataset=run.data["validation"],
        processing_class=run.tokenizer,
    )


class OnlineTrainer(ResumableTrainer):
    """Base class of GRPO's and RLOO's trainers. It must come before TRL's trainer in the list of bases.

    The training rows have `prompt_ids`, and what the rewards read. TRL would render and tokenise the prompts itself.

    Args:
        stage: names the recipe's block in messages.
        rewards: each scores the completions; the training arguments have their weights.
        reference: the frozen start of a full model; None for an adapter, or without a KL term.
    """

    # Set by TRL.
    args: Any
    generation_config: Any
    generation_kwargs: dict[str, Any]
    num_generations: Any
    num_iterations: int
    _step: int
    _buffered_inputs: Any

    def __init__(
        self, *args: Any, stage: str, rewards: Sequence[Reward], reference: PreTrainedModel | None, **kwargs: Any
    ) -> None:
        self.stage, self.rewards = stage, rewards
        self._rows: Sequence[dict[str, Any]] = []
        self._shown: dict[str, list[dict[str, Any]]] = {}
        self._flat_share = 0.0
        # Generation steps without any difference between rewards; None after the first difference.
        self._flat_steps: int | None = 0
        arguments, policy, tokenizer = kwargs["args"], kwargs["model"], kwargs["processing_class"]
        if not ignores_left_padding(policy):
            raise RequestError(
                f"{stage} cannot train {policy.config.model_type}: TRL pads the prompts of a batch on the left and passes no "
                "positions, and this model would count the padding. Choose a model with rotary positions, or dpo or kto."
            )
        ends = end_token_ids(policy, tokenizer)
        if arguments.use_vllm:
            arguments.generation_kwargs = {**(arguments.generation_kwargs or {}), "stop_token_ids": ends}
        # With a KL term, TRL would load the reference of a full model from the base model's files.
        beta = arguments.beta
        if reference is not None:
            arguments.beta = 0.0
        super().__init__(*args, reward_funcs=[reward.score for reward in rewards], **kwargs)
        if reference is not None:
            self.beta = arguments.beta = beta
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if isinstance(policy, PeftModel) and "ref" in policy.peft_config:
            complete_reference(policy)
            # The copy has the dropout of the adapter's configuration.
            disable_dropout(policy)
        self.reward_func_names = [reward.name for reward in rewards]
        self.eos_token_ids = ends
        if not arguments.use_vllm:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = ends
        # The loss is about 0 in each step, because the advantages of a group add up to 0. So its size says nothing.
        self._watch = LossWatch(factor=math.inf)
        self.flops, self.forwards = TrainingFlops.of(policy), int(beta > 0)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> PromptsByEpoch:
        """TRL's sampler, with the order of each epoch from its number."""
        return PromptsByEpoch(
            data_source=self.train_dataset if dataset is None else dataset,  # type: ignore[arg-type]
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.model is not None
        training, started = self.model.training, time.perf_counter()
        self._rows = inputs
        # A prompt without messages: TRL then decodes completions as text, and looks for no calls of tools in them.
        # accelerate enters autocast in the forward pass of training alone. An adapter in float32 on a base in bfloat16 needs it
        # to generate too.
        with self.accelerator.autocast():
            output: dict[str, Any] = super()._generate_and_score_completions([{"prompt": ""} for _ in inputs])  # type: ignore[misc]
        # In evaluation a group has one completion, which has no spread.
        self._metrics["eval"].pop("frac_reward_zero_std", None)
        if training:
            # TRL's own share depends on how advantages are scaled, and in RLOO on the KL divergence.
            self._metrics["train"]["frac_reward_zero_std"][-1] = self._flat_share
            seconds = time.perf_counter() - started
            self.work.seconds["generate"] += seconds
            self.work.seconds["forward_backward"] -= seconds
        return output

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [row["prompt_ids"] for row in self._rows], None, {}

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """The rewards of all processes, of shape (completions, rewards).

        Raises:
            WorkError: no group has had two different rewards since the start, for `FLAT_STEPS` generation steps.
        """
        assert self.model is not None
        written = [
            Completion(
                text=str(self.processing_class.decode(ids, skip_special_tokens=True)).strip(),  # type: ignore[union-attr]
                stopped=bool(ids) and ids[-1] in self.eos_token_ids,
                tokens=len(ids),
                ids=ids,
            )
            for ids in completion_ids_list
        ]
        scores = [reward.score(self._rows, written) for reward in self.rewards]
        device = self.accelerator.device
        rewards: torch.Tensor = gather(torch.tensor(scores, dtype=torch.float32, device=device).T.contiguous())
        if self.model.training:
            groups = (rewards @ torch.tensor(self.args.reward_weights, device=device)).view(-1, self.num_generations)
            flat = torch.isclose(groups.amax(dim=1), groups.amin(dim=1))
            self._flat_share = float(flat.float().mean())
            self._show(written, scores)
            self._check_spread(rewards)
        return rewards

    def _show(self, written: list[Completion], scores: list[list[float]]) -> None:
        """Remember completions of the first prompts for the report, one for each prompt."""
        step = self.num_generations if len(written) >= _SHOWN * self.num_generations else 1
        shown = [
            {
                "step": self.state.global_step + 1,
                "prompt": self._rows[place]["prompt"][-1]["content"],
                "completion": written[place].text,
                "tokens": written[place].tokens,
                "stopped": written[place].stopped,
                "rewards": {name: values[place] for name, values in zip(self.reward_func_names, scores, strict=True)},
            }
            for place in range(0, len(written), step)[:_SHOWN]
        ]
        self._shown.setdefault("first", shown)
        self._shown["last"] = shown

    def _check_spread(self, rewards: torch.Tensor) -> None:
        if self._flat_steps is None or self._flat_share < 1:
            self._flat_steps = None
            return
        self._flat_steps += 1
        uses = self.args.steps_per_generation * self.num_iterations
        planned = math.ceil(self.state.max_steps * self.args.gradient_accumulation_steps / uses)
        if self._flat_steps < min(FLAT_STEPS, planned):
            return
        means = ", ".join(
            f"{name} {value:.3g}"
            for name, value in zip(self.reward_func_names, rewards.mean(dim=0).tolist(), strict=True)
        )
        example = self._shown["last"][0]
        raise WorkError(
            f"{self.stage} learned nothing in its first {self._flat_steps} generation steps: all completions of a prompt had "
            f"the same reward each time (on average {means}). One completion, to {example['prompt']!r}: "
            f"{example['completion']!r}. Choose a reward that some of these completions earn and others do not, raise "
            f"{self.stage}.num_generations or {self.stage}.temperature, or train sft on such answers first."
        )

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if model.training:
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            self.count(mask.sum(dim=1).tolist(), int(inputs["completion_mask"].sum()), mask.numel())
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return loss

    def _weight(self, inputs: Any) -> int:
        return len(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without TRL's seconds of a step, which `work` measures."""
        self._metrics["train"].pop("step_time", None)
        super().log(logs, start_time)

    def summary(self) -> dict[str, Any]:
        """The completions of the first and the last generation step that the report shows."""
        return {"completions": self._shown}

    def _window(self) -> dict[str, Any]:
        return {**super()._window(), "flat_steps": self._flat_steps, "shown": self._shown}

    def _save_rng_state(self, output_dir: str) -> None:
        """Save also the completions that the next steps train, with the number of rows that this process has trained."""
        super()._save_rng_state(output_dir)
        trained = self._step * self.args.per_device_train_batch_size
        state = {"trained_rows": trained, "batches": self._buffered_inputs}
        torch.save(state, _completions_file(Path(output_dir)))

    def restore_window(self, checkpoint: Path) -> dict[str, Any]:
        """Restore also the completions in use, and those that the report shows."""
        window = super().restore_window(checkpoint)
        self._flat_steps, self._shown = window["flat_steps"], window["shown"]
        self._restore_completions(checkpoint)
        return window

    def _restore_completions(self, checkpoint: Path) -> None:
        """Restore the completions in use. The batches may have become smaller since."""
        state = torch.load(_completions_file(checkpoint), map_location=self.accelerator.device, weights_only=True)
        self._step = state["trained_rows"] // self.args.per_device_train_batch_size
        first, *others = state["batches"]
        whole = {
            name: value if value is None or value.ndim == 0 else torch.cat([value, *(batch[name] for batch in others)])
            for name, value in first.items()
        }
        self._buffered_inputs = split_tensor_dict(whole, self.args.steps_per_generation)


class PromptsByEpoch(ByEpoch, RepeatSampler):
    """TRL's sampler of whole groups, with an order for each epoch."""


def _completions_file(checkpoint: Path) -> Path:
    return checkpoint / (f"completions_{ranks.rank()}.pth" if ranks.world_size() > 1 else "completions.pth")
