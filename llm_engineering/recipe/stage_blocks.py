"""The recipe's blocks of the training stages. `stages.py` has the table of the stages.

A block has the stage's own keys, and takes all other fields of the stage's TRL class, except those in `refused`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.model_blocks import Method
from llm_engineering.recipe.training_blocks import REFUSED_TRL, TrainConfig

# Fields of trl.SFTConfig that the project sets, for the stages that train with TRL's SFTTrainer.
_REFUSED_SFT = {
    **REFUSED_TRL,
    "chat_template_path": "formatting.chat_template is the template of every stage",
    "dataset_text_field": "formatting tokenises the rows before training",
    "dataset_kwargs": "formatting tokenises the rows before training",
    "eos_token": "model.eos_token names the token that ends an answer",
    "shuffle_dataset": "rows are drawn in the order of the seed",
    "packing_strategy": "rows are packed by best-fit decreasing, which keeps every row whole",
    "eval_packing": "validation rows are not packed, so that the loss does not depend on it",
    "completion_only_loss": "formatting.train_on_prompt says what is trained",
    "assistant_only_loss": "formatting.train_on_prompt says what is trained",
    "loss_type": "the loss is the likelihood of the trained tokens, computed from hidden states",
}


class PackedConfig(TrainConfig):
    """The keys of the stages that train with TRL's SFTTrainer.

    `train_sampling_strategy: group_by_length` puts rows of similar length into one batch, which saves padding if rows
    are not packed.
    """

    config_class = "trl.SFTConfig"
    refused: ClassVar[dict[str, str]] = _REFUSED_SFT

    packing: bool = True
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"

    @model_validator(mode="after")
    def _sampling(self) -> Self:
        if self.packing and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy {self.train_sampling_strategy} has no effect with packing, which fills every "
                "row to max_length: set packing to false, or remove it"
            )
        return self


class CPTConfig(PackedConfig):
    """Continued pre-training with TRL's SFTTrainer: every token of the documents is trained.

    `embedding_learning_rate` is the learning rate of the input and output embeddings where they are trained, which is
    with method `full`, or with `lora.modules_to_save`. They need a smaller rate than the adapter: 2 to 10 times smaller
    is usual. Null gives them the rate of all weights.
    """

    refused: ClassVar[dict[str, str]] = {
        **_REFUSED_SFT,
        "eos_token": "model.eos_token names the token that ends a document",
        "completion_only_loss": "every token of a document is trained",
        "assistant_only_loss": "every token of a document is trained",
    }

    embedding_learning_rate: float | None = Field(None, gt=0)


class SFTConfig(PackedConfig):
    """Supervised fine-tuning with TRL's SFTTrainer: the answers are trained."""


# The pair losses of TRL 1.14. TRL's `sft` is left out: it ignores the rejected answer.
DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]


class ReferenceConfig(TrainConfig):
    """The keys of the stages that compare the model with a reference, which is the model that the stage starts from.

    With `precompute_ref_log_probs` the reference runs once before training, instead of in every step.
    """

    refused: ClassVar[dict[str, str]] = {
        **REFUSED_TRL,
        "disable_dropout": "policy and reference run without dropout, so that only their weights differ",
    }

    beta: float = Field(0.1, gt=0)
    precompute_ref_log_probs: bool = False

    def needs_whole_weights(self, method: Method) -> bool:
        """TRL takes whole weights for the reference of a full fine-tune, and for log-probabilities that are precomputed."""
        return self.precompute_ref_log_probs or method == "full"


class DPOConfig(ReferenceConfig):
    """Direct preference optimisation with TRL's DPOTrainer; the reference is the model that the stage starts from.

    `sft_weight` adds the SFT loss of the chosen answers with this weight (Pang et al. 2024, arXiv:2404.19733). Without it, a chosen answer
    that the model would never give stays improbable: DPO is content when the rejected one becomes less probable still.
    """

    config_class = "trl.DPOConfig"
    refused: ClassVar[dict[str, str]] = {
        **ReferenceConfig.refused,
        "loss_weights": "a run has one loss, loss_type, to which sft_weight adds the SFT loss",
        "train_sampling_strategy": "pairs are drawn at random",
    }

    loss_type: DPOLoss = "sigmoid"
    sft_weight: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _loss(self) -> Self:
        smoothed, loss = ("robust", "exo_pair", "aot", "aot_unpaired"), self.loss_type
        if self.label_smoothing > 0 and loss not in smoothed:
            raise ValueError(
                f"label_smoothing has no effect with loss_type {loss}: remove it, or choose {' or '.join(smoothed)}"
            )
        if self.label_smoothing == 0 and loss in ("robust", "exo_pair"):
            usual = "0.1, the share of wrong labels" if loss == "robust" else "1e-3"
            raise ValueError(f"loss_type {loss} needs label_smoothing above 0, e.g. {usual}")
        if loss in ("aot", "aot_unpaired") and self.per_device_train_batch_size == 1:
            raise ValueError(
                f"loss_type {loss} compares the sorted pairs of a batch: per_device_train_batch_size must be above 1"
            )
        return self


class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation with TRL's KTOTrainer; the reference is the model that the stage starts from.

    Each row is one answer and a label, good or bad. `desirable_weight` and `undesirable_weight` are the weights of the losses
    of good and of bad answers. Their weighted numbers should be between 1:1 and 4:3 (Ethayarajh et al. 2024,
    arXiv:2402.01306, equation 8); the run prints them. `loss_type: apo_zero_unpaired` (D'Oosterlinck et al. 2024,
    arXiv:2408.06266) needs no estimate of the KL divergence, and so one forward pass of the model and one of the reference less.
    """

    config_class = "trl.KTOConfig"
    refused: ClassVar[dict[str, str]] = {
        **ReferenceConfig.refused,
        "train_sampling_strategy": "rows are shuffled once with the seed, because the KL divergence of a batch is estimated "
        "from its own answers",
    }

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _batch(self) -> Self:
        if self.loss_type == "kto" and self.per_device_train_batch_size == 1:
            raise ValueError(
                "loss_type kto estimates the KL divergence from the other answers of a batch: per_device_train_batch_size must "
                "be above 1, and should be 4 or more; or set loss_type to apo_zero_unpaired"
            )
        return self


class RewardConfig(TrainConfig):
    """A reward model with TRL's RewardTrainer: its score of the chosen answer rises above that of the rejected one.

    The loss is -log sigmoid(chosen - rejected) (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5). It
    says nothing about the level of the rewards: `center_rewards_coefficient` adds the square of the sum of both, so that rewards
    stay near 0 (Eisenstein et al. 2023, arXiv:2312.09244, equation 2; 0.01 is usual). The stage makes a model that scores
    answers and writes none, so a later stage starts from the last stage before it that writes.
    """

    config_class = "trl.RewardConfig"
    # unsloth has kernels for models that predict tokens only.
    trains_with_unsloth: ClassVar[bool] = False
    refused: ClassVar[dict[str, str]] = {
        **REFUSED_TRL,
        "chat_template_path": "formatting.chat_template is the template of every stage",
        "eos_token": "model.eos_token names the token that ends an answer",
        "pad_to_multiple_of": "pairs are padded to the longest answer of a batch",
        "train_sampling_strategy": "pairs are drawn at random",
    }

    center_rewards_coefficient: float | None = Field(None, ge=0)
