"""Opens the client that the recipe names. No other module constructs clients."""

from __future__ import annotations

from pathlib import Path

from llm_engineering.generation.clients.endpoint import Endpoint
from llm_engineering.generation.store import STORE_FILE, AnswerStore
from llm_engineering.generation.types import Client, Transport
from llm_engineering.models.device import check_vllm, choose_device
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.generation_blocks import ClientConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings


def open_client(
    config: ClientConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    settings: Settings,
    chat_template: str | None = None,
    trained: Path | None = None,
) -> Client:
    """Open the client that the recipe names, with the answers stored by earlier runs.

    Args:
        chat_template: the recipe's `formatting.chat_template`. Only the local model uses it; endpoints have their own.
        trained: folder of an adapter or a full model, with which the local model answers instead of the base model.

    Raises:
        RequestError: the client's key, package, card or region is missing.
    """
    # Each client's libraries are imported only where it is used.
    if config.engine == "vllm":
        check_vllm("generation.engine", "transformers", choose_device(compute))
        from llm_engineering.generation.clients.vllm_model import VllmModel

        return VllmModel.load(model, compute, settings, chat_template, trained)
    if config.client == "local":
        from llm_engineering.generation.clients.local import LocalModel

        return LocalModel.load(model, compute, config.batch_size, settings, chat_template, trained)
    return open_endpoint(config, settings)


def check_access(config: ClientConfig, settings: Settings, max_new_tokens: int, json_field: str | None) -> None:
    """Send an endpoint one small request like those of the run, to find errors before any work. Skips the local model.

    Raises:
        RequestError: the key or region is missing, the endpoint cannot be reached, it refuses the key or the request,
            it does not know the model, it ignores the JSON schema, or it reports no usage although a cap needs it.
    """
    if config.client != "local":
        open_endpoint(config, settings).check_access(max_new_tokens, json_field)


def open_endpoint(config: ClientConfig, settings: Settings) -> Endpoint:
    """Open the endpoint that the recipe names, with the answers stored by earlier runs.

    Raises:
        RequestError: the API key, the AWS credentials or the AWS region are missing.
    """
    transport: Transport
    if config.client == "openai":
        from llm_engineering.generation.clients.chat_completions import ChatCompletions

        transport = ChatCompletions(config, settings.openai_api_key)
    else:
        from llm_engineering.generation.clients.bedrock import Bedrock

        transport = Bedrock(config)
    return Endpoint(transport, config, AnswerStore(settings.llm_output_dir / STORE_FILE))
