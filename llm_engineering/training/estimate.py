"""Estimates peak memory and time of training from the model's shapes, the recipe, and a matmul on this machine.

No weights are loaded: the model consists of fake tensors, which have a shape and no content.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llm_engineering.models.device import Device, choose_optimiser
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, Method
from llm_engineering.recipe.online_blocks import OnlineConfig, RLOOConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, KTOConfig, ReferenceConfig, RewardConfig
from llm_engineering.recipe.training_blocks import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Tokens in a chunk of `losses`. Their logits take 25 MB in fp32 with a vocabulary of 49,152, and 66 MB with Llama 3's 128,256.
CHUNK = 128
# Bytes of a weight: 4 bits, and its share of the doubly quantised block constants, 8/64 + 32/(64·256) bits (QLoRA,
# arXiv:2305.14314, section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Memory beside the model. CPU: Python with torch, transformers and TRL (515 MiB), and freed memory that the C library
# keeps (200 MiB); both measured by benchmarks/estimate. CUDA: context and workspaces of CUDA and cuBLAS.
OVERHEAD_BYTES = {"cpu": 715 * 2**20, "cuda": 1024 * 2**20}
# Share of the matmul rate that training reaches. CPU: measured by benchmarks/estimate. CUDA: Llama 3 reports 38 to 43 %
# of the GPU's peak (arXiv:2407.21783, table 4); not measured here.
UTILISATION = {"cpu": 0.6, "cuda": 0.4}
GIB = 2**30
_ONE_PROCESS = ComputeConfig()
# The blocks of the stages on pairs: a row of theirs is two for the model.
PAIRS = (DPOConfig, RewardConfig)


class Memory(NamedTuple):
    """Bytes at the peak of a training step."""

    weights: float
    reference: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._asdict().items() if value >= GIB / 200)
        return f"{self.total / GIB:.1f} GiB ({parts})"


class Shapes(NamedTuple):
    """Sizes that the estimate needs, taken from the model's shapes.

    Attributes:
        weights: bytes of all weights without the adapter.
        matmul: number of weights that each token is multiplied with: linear layers and output embedding.
        activations: bytes that one forward pass keeps for its backward pass, without logits.
        hidden: width of the hidden states between layers.
        hidden_bytes: bytes of one number of the hidden states.
        vocabulary: number of logits per token.
        attention_width: heads × head size, summed over the layers.
        cache_width: numbers in the keys and values of a token, summed over the layers.
    """

    weights: float
    trained: int
    matmul: int
    activations: int
    layers: int
    hidden: int
    hidden_bytes: int
    vocabulary: int
    attention_width: int
    cache_width: int = 0


def shapes(
    model: PreTrainedConfig,
    method: Method,
    lora: LoraConfig,
    device: Device,
    rows: int,
    length: int,
    trust_remote_code: bool = False,
    *,
    scores: bool = False,
) -> Shapes:
    """Build the model and its adapter from fake tensors, and run one forward pass of `rows × length` tokens.

    Args:
        scores: whether the model scores rows, as a reward model, and has no output layer for tokens.
    """
    # These imports take seconds, and a plan whose shapes are known does without.
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    from llm_engineering.models.base_model import fitting_attention
    from llm_engineering.models.fit import on_meta, shape_config
    from llm_engineering.models.reward_model import with_reward_adapter
    from llm_engineering.training.policy import in_float32

    full, four_bits = method == "full", method == "qlora"
    # sdpa keeps as many activations as FlashAttention, and does not need a GPU.
    attention = "sdpa" if device.attn_implementation == "flash_attention_2" else device.attn_implementation
    base = on_meta(
        *(model, torch.float32 if full else device.dtype, fitting_attention(model, attention), trust_remote_code),
        scores=scores,
    )
    with torch.device("meta"):
        if not full:
            in_float32(base, lora.library_arguments.get("modules_to_save"))
        head = base.get_output_embeddings()
        linear = [m for m in base.modules() if m is not head and isinstance(m, nn.Linear | Conv1D)]
        in_linear = sum(m.weight.numel() for m in linear)
        if four_bits:
            # As in prepare_model_for_kbit_training, all weights outside the linear layers are float32.
            quantised = {id(m.weight) for m in linear}
            for parameter in base.parameters():
                if id(parameter) not in quantised:
                    parameter.data = parameter.data.float()
            outside = sum(p.numel() for p in base.parameters()) - in_linear
            weights = in_linear * NF4_BYTES + outside * 4.0
        else:
            weights = float(sum(p.nbytes for p in base.parameters()))
        policy: nn.Module = base
        if not full:
            adapter = shape_config(lora)
            policy = with_reward_adapter(base, adapter, None) if scores else get_peft_model(base, adapter)
    policy.train()
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    activations, hidden = _forward(base, policy, device, rows, length)
    text = model.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        weights=weights,
        trained=trained,
        matmul=in_linear + (head.weight.numel() if head is not None else 0),
        activations=activations,
        layers=text.num_hidden_layers,
        hidden=hidden.shape[-1],
        hidden_bytes=4 if four_bits or full else hidden.element_size(),
        vocabulary=text.vocab_size,
        attention_width=text.num_hidden_layers * text.num_attention_heads * width,
        cache_width=2
        * text.num_hidden_layers
        * width
        * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
    )


def _forward(
    base: PreTrainedModel, policy: nn.Module, device: Device, rows: int, length: int
) -> tuple[int, torch.Tensor]:
    """Run the decoder's forward pass.

    Returns:
        Two values: the bytes that autograd saves besides the weights (memory that tensors share counts once), and the
        last hidden states.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks

    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        weights = _materialise(policy)

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        half = device.dtype != torch.float32
        with saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
            ids = torch.zeros(rows, length, dtype=torch.long)
            hidden: torch.Tensor = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in saved.values()), hidden


def _materialise(model: nn.Module) -> set[int]:
    """Replace the model's meta tensors by fake CPU tensors, because autocast ignores meta tensors.

    Tied weights share one fake tensor.

    Returns:
        The ids of the storages of the fake tensors.
    """
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return fakes[id(tensor)]

    for module in model.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in groups:
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return {tensor.untyped_storage()._cdata for tensor in fakes.values()}


def peak_memory(
    sizes: Shapes,
    config: TrainConfig,
    device: Device,
    method: Method,
    rows: int,
    length: int,
    compute: ComputeConfig = _ONE_PROCESS,
) -> Memory:
    """Estimate the bytes at the peak of a training step with batches of `rows × length` tokens, in each process.

    The sum is weights + reference + optimiser + max(activations + logits, gradients). These are the parts that ZeRO
    counts (arXiv:1910.02054, section 3); the activations come from the model's own graph:

    - weights: float32 for `full`; autocast's half-precision copies count as activations. The device's precision for
      `lora`. For `qlora` 4 bits in linear layers and float32 elsewhere. Adapters are float32.
    - reference (DPO, KTO, and GRPO and RLOO with a `beta`): a copy of the adapter, or of the full model unless it is precomputed;
      and the model of the reward `reward_model`.
    - optimiser: AdamW's two moments for each trained weight, in float32 or in 8 bits (arXiv:2110.02861).
    - gradients: float32 for each trained weight. With accumulation they exist during the whole backward pass; without
      it, they grow while the activations are freed.
    - activations: the tensors that autograd saves in a forward pass, plus the average of one layer for the gradients in the
      backward pass. With gradient checkpointing (arXiv:1604.06174): the input of each layer, and the tensors of one layer.
      GRPO and RLOO need no activations while they generate, but the keys and values of a generation step.
    - logits: none in a reward model, else four float32 copies: for all tokens of a batch in DPO and KTO with unsloth or with
      `use_weighting`, for all tokens of completions in GRPO and RLOO, and for 128 tokens elsewhere. A model that needs the
      logits of whole batches for another reason (`why_not_from_hidden_states`) takes more.

    Where `compute` shards a part, each process has its share of it. A step gathers the sharded weights of one layer at a time.

    The real peak depends on the allocator; benchmarks/estimate compares it with this estimate.
    """
    tokens, processes = rows * length, compute.num_processes
    trained = 4.0 * sizes.trained
    weights = sizes.weights + (0.0 if method == "full" else trained)
    reference = 0.0
    if isinstance(config, ReferenceConfig):
        reference = trained
        if method == "full":
            reference = 0.0 if config.precompute_ref_log_probs else sizes.weights
    elif isinstance(config, OnlineConfig) and (config.beta or isinstance(config, RLOOConfig)):
        # TRL's RLOOTrainer copies an adapter even if no KL term needs it.
        reference = trained if method != "full" else sizes.weights if config.beta else 0.0
    if isinstance(config, OnlineConfig) and config.reward_model is not None:
        # Its input embedding has the size of the output embedding that it lacks.
        reference += sizes.matmul * device.dtype.itemsize
    eight_bits = "8bit" in choose_optimiser(config.optim, device, compute.distributed)[0]
    one_layer = sizes.activations / sizes.layers
    activations = sizes.activations + one_layer
    if config.gradient_checkpointing:
        activations = tokens * sizes.hidden * sizes.hidden_bytes * sizes.layers + one_layer
    whole = isinstance(config, ReferenceConfig) and (
        device.backend == "unsloth" or config.library_arguments.get("use_weighting", False)
    )
    logits = 16.0 * (tokens if whole else min(tokens, CHUNK)) * sizes.vocabulary
    if isinstance(config, RewardConfig):
        logits = 0.0
    if isinstance(config, OnlineConfig):
        logits = 16.0 * rows * config.max_completion_length * sizes.vocabulary
        cache = config.generation_batch(processes) / processes * length * sizes.cache_width * sizes.hidden_bytes
        activations = max(activations, cache - logits)
    accumulates = config.gradient_accumulation_steps > 1
    gradients = trained if accumulates else max(0.0, trained - activations - logits)
    optimiser = (0.5 if eight_bits else 2.0) * trained
    if compute.distributed != "ddp":
        optimiser /= processes
        gradients /= processes if compute.zero_stage != 1 else 1
    if compute.shards_weights:
        weights = weights / processes + sizes.weights / sizes.layers
        reference /= processes if not config.needs_whole_weights(method) else 1
    return Memory(
        weights, reference, gradients, optimiser, activations, logits, float(OVERHEAD_BYTES[device.name])
    )  # fmt: skip


def flops_per_token(sizes: Shapes, config: TrainConfig, method: Method, length: int) -> float:
    """Floating-point operations for one trained token, in rows of `length` tokens.

    A forward pass takes 2 operations for each weight that a token is multiplied with (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). Attention takes 4 operations for each earlier token and each unit of attention width;
    on average half of the row is earlier. A backward pass takes the same again for the gradients of activations, and,
    without an adapter, once more for the gradients of weights. Gradient checkpointing adds a forward pass. The
    reference of DPO or KTO adds another, unless it is precomputed. KTO's estimate of the KL divergence adds one of the
    model and one of the reference. GRPO and RLOO add one to generate, one for the log-probabilities before the update, and with a
    `beta` one of the reference.
    """
    attention = 4 * sizes.attention_width * length / 2
    passes = 3.0 if method == "full" else 2.0
    passes += 1.0 if config.gradient_checkpointing else 0.0
    reference = isinstance(config, ReferenceConfig) and not config.precompute_ref_log_probs
    estimates = isinstance(config, KTOConfig) and config.loss_type == "kto"
    passes += (1.0 if reference else 0.0) * (2.0 if estimates else 1.0) + (1.0 if estimates else 0.0)
    if isinstance(config, OnlineConfig):
        passes += 3.0 if config.beta else 2.0
    # Attention has no weights: both of its operands are activations, and each needs a gradient.
    extra = attention if method != "full" else 0.0
    return passes * (2 * sizes.matmul + attention) + extra


def matmul_rate(device: Device, seconds: float = 0.5) -> float:
    """Measure the FLOP/s of square matrix products in the device's precision, for about `seconds`."""
    size = 8192 if device.name == "cuda" else 1024
    one = torch.ones(size, size, dtype=device.dtype, device=device.name)
    other = torch.ones(size, size, dtype=device.dtype, device=device.name)

    def products(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            one @ other
        if device.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    products(2)
    once = products(2) / 2
    count = max(1, round(seconds / once))
    return 2 * size**3 * count / products(count)


def free_memory(device: Device) -> int:
    """Free memory of the GPU, or of the machine, in bytes."""
    if device.name == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def batch_shape(config: TrainConfig, max_length: int) -> tuple[int, int]:
    """Rows and length of the largest batch. A completion follows its prompt.

    A pair is two rows, one for each answer, also if DPO computes their prompt once: the prompt may be short.
    """
    rows = config.per_device_train_batch_size
    if isinstance(config, OnlineConfig):
        return rows, max_length + config.max_completion_length
    return (2 * rows if isinstance(config, PAIRS) else rows), max_length


def remedy(config: TrainConfig, stage: str, method: Method) -> str:
    """What to change if the memory is too small."""
    options = []
    if config.per_device_train_batch_size > 1:
        options.append(
            f"lower {stage}.per_device_train_batch_size and raise {stage}.gradient_accumulation_steps by the same factor"
        )
    if not config.gradient_checkpointing:
        options.append(f"set {stage}.gradient_checkpointing to true (one more forward pass in each step)")
    if method != "qlora":
        options.append("choose the method " + ("lora or qlora" if method == "full" else "qlora, with CUDA"))
    return "; ".join([*options, "lower formatting.max_length"])
