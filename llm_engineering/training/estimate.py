"""Peak memory and time of training, before it starts: from the model's shapes, the recipe, and a matmul on this machine.

Nothing is loaded: the model is built of fake tensors, which have shapes and no content.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_engineering.models.device import Device, choose_optimiser
from llm_engineering.recipe.training_blocks import DPOConfig, Method, SFTConfig, TrainConfig
from llm_engineering.training.losses import CHUNK
from llm_engineering.training.policy import lora_config

# A weight in 4 bits, and its share of the doubly quantised block constants: 8/64 + 32/(64·256) bits (QLoRA,
# arXiv:2305.14314, section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# What is there besides: on a CPU Python with torch, transformers and TRL (515 MiB), and what the C library keeps of freed
# memory (200 MiB; both measured by benchmarks/estimate), on a card the context and workspaces of CUDA and cuBLAS.
OVERHEAD_BYTES = {"cpu": 715 * 2**20, "cuda": 1024 * 2**20}
# The share of the matmul rate that training reaches. CPU: measured by benchmarks/estimate. CUDA: the 38 to 43 % that
# Llama 3 reports of the card's peak (arXiv:2407.21783, table 4); not measured here.
UTILISATION = {"cpu": 0.6, "cuda": 0.4}
GIB = 2**30


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
        """All of them."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._asdict().items() if value >= GIB / 200)
        return f"{self.total / GIB:.1f} GiB ({parts})"


class Shapes(NamedTuple):
    """What the model's shapes say.

    Attributes:
        weights: bytes of all weights without the adapter.
        trained: number of trained weights.
        matmul: weights that every token is multiplied with: of the linear layers, and of the output embedding.
        activations: bytes that one forward keeps for its backward, without logits.
        layers: number of decoder layers.
        hidden: width of what goes from layer to layer.
        hidden_bytes: bytes of one of its numbers.
        vocabulary: number of logits of a token.
        attention_width: heads times their width, summed over the layers.
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


def shapes(
    model: PreTrainedConfig, sft: SFTConfig, device: Device, rows: int, length: int, trust_remote_code: bool = False
) -> Shapes:
    """Build the model of fake tensors, with its adapter, and run one forward of `rows × length` tokens through it."""
    full, four_bits = sft.method == "full", sft.method == "qlora"
    attention = device.attn_implementation
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            model,
            dtype=torch.float32 if full else device.dtype,
            # It keeps as much, and needs no card to be asked.
            attn_implementation="sdpa" if attention == "flash_attention_2" else attention,
            trust_remote_code=trust_remote_code,
        )
        head = base.get_output_embeddings()
        linear = [m for m in base.modules() if m is not head and isinstance(m, nn.Linear | Conv1D)]
        in_linear = sum(m.weight.numel() for m in linear)
        if four_bits:
            # As prepare_model_for_kbit_training does: what is not in 4 bits is in float32.
            held = {id(m.weight) for m in linear}
            for parameter in base.parameters():
                if id(parameter) not in held:
                    parameter.data = parameter.data.float()
            outside = sum(p.numel() for p in base.parameters()) - in_linear
            weights = in_linear * NF4_BYTES + outside * 4.0
        else:
            weights = float(sum(p.nbytes for p in base.parameters()))
        policy: nn.Module = base if full else peft.get_peft_model(base, lora_config(sft.lora))
    policy.train()
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    kept, hidden = _forward(base, policy, device, rows, length)
    text = model.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        weights=weights,
        trained=trained,
        matmul=in_linear + (head.weight.numel() if head is not None else 0),
        activations=kept,
        layers=text.num_hidden_layers,
        hidden=hidden.shape[-1],
        hidden_bytes=4 if four_bits or full else hidden.element_size(),
        vocabulary=text.vocab_size,
        attention_width=text.num_hidden_layers * text.num_attention_heads * width,
    )


def _forward(
    base: PreTrainedModel, policy: nn.Module, device: Device, rows: int, length: int
) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps of the decoder's forward besides the weights, each memory once; and its output."""
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        own = _materialise(policy)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        half = device.dtype != torch.float32
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
            ids = torch.zeros(rows, length, dtype=torch.long)
            hidden: torch.Tensor = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in kept.values()), hidden


def _materialise(model: nn.Module) -> set[int]:
    """Put fake tensors of the CPU in the place of the model's meta tensors, once for what is tied; their storages.

    Operations of meta tensors know no autocast.
    """
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return fakes[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return {tensor.untyped_storage()._cdata for tensor in fakes.values()}


def peak_memory(found: Shapes, config: TrainConfig, device: Device, method: Method, rows: int, length: int) -> Memory:
    """Bytes at the peak of a training step with batches of `rows × length` tokens.

    weights + reference + optimiser + max(activations + logits, gradients), the parts of ZeRO's account
    (arXiv:1910.02054, section 3) with activations counted on the model's own graph:

    - weights: float32 for `full` (copies in half precision, which autocast keeps, are among the activations); the
      device's precision for `lora`; 4 bits for `qlora`, and float32 for what is not in linear layers. Adapters are float32.
    - optimiser: two float32 moments for each trained weight (AdamW), or two bytes in 8 bits (arXiv:2110.02861).
    - gradients: float32 for each trained weight. With accumulation they are there during the next backward too;
      without it, they come as activations go.
    - activations: what autograd keeps of a forward, and as much as one layer keeps for the gradients on their way
      back. With gradient checkpointing (arXiv:1604.06174): the input of each layer, and once what one layer keeps.
    - logits: vocabulary × 128 tokens, four times over in float32. A model whose logits have to be made of whole batches
      (`why_not_from_hidden_states`) takes more than this.

    The real peak varies with the allocator; benchmarks/estimate compares.
    """
    tokens = rows * length
    is_dpo = isinstance(config, DPOConfig)
    trained = 4.0 * found.trained
    weights = found.weights + (0.0 if method == "full" else trained)
    reference = 0.0
    if is_dpo:
        reference = found.weights if method == "full" else trained
    eight_bits = choose_optimiser(config.optim, device)[0] == "adamw_8bit"
    one_layer = found.activations / found.layers
    activations = found.activations + one_layer
    if config.gradient_checkpointing:
        activations = tokens * found.hidden * found.hidden_bytes * found.layers + one_layer
    logits = 16.0 * min(tokens, CHUNK) * found.vocabulary
    accumulates = config.gradient_accumulation_steps > 1
    beyond = activations + logits
    gradients = trained if accumulates else max(0.0, trained - beyond)
    return Memory(
        weights, reference, gradients, (0.5 if eight_bits else 2.0) * trained, activations, logits,
        float(OVERHEAD_BYTES[device.name]),
    )  # fmt: skip


def flops_per_token(found: Shapes, config: TrainConfig, method: Method, length: int) -> float:
    """Floating-point operations for one trained token, in rows of `length`.

    A forward is 2 for each weight that a token meets (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and 2 · 2 for
    each pair of tokens and number of an attention head, over half of the row on average. A backward is as much again
    for the gradients of activations, and once more for those of weights, which adapters do without. Gradient
    checkpointing adds a forward; DPO's reference another, unless it is precomputed.
    """
    attention = 4 * found.attention_width * length / 2
    passes = 3.0 if method == "full" else 2.0
    passes += 1.0 if config.gradient_checkpointing else 0.0
    reference = isinstance(config, DPOConfig) and not config.precompute_ref_log_probs
    passes += 1.0 if reference else 0.0
    # Attention has no weights: both of its operands are activations.
    extra = attention if method != "full" else 0.0
    return passes * (2 * found.matmul + attention) + extra


def matmul_rate(device: Device, seconds: float = 0.5) -> float:
    """Floating-point operations a second of square matrix products in the device's precision, over `seconds`."""
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
    """Bytes that are free: on the card, or of the machine's memory."""
    if device.name == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def batch_shape(config: TrainConfig, max_length: int) -> tuple[int, int]:
    """Rows and length of the largest batch; of pairs, chosen and rejected answers are rows of their own."""
    rows = config.per_device_train_batch_size
    return (2 * rows if isinstance(config, DPOConfig) else rows), max_length


def remedy(config: TrainConfig, stage: str, method: Method) -> str:
    """What to change where the memory does not suffice."""
    options = []
    if config.per_device_train_batch_size > 1:
        options.append(
            f"lower {stage}.per_device_train_batch_size and raise {stage}.gradient_accumulation_steps as much"
        )
    if not config.gradient_checkpointing:
        options.append(f"set {stage}.gradient_checkpointing to true (slower by a forward)")
    if method != "qlora":
        options.append("choose sft.method " + ("lora or qlora" if method == "full" else "qlora, with CUDA"))
    return "; ".join([*options, "lower formatting.max_length"])
