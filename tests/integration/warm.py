"""Work that every command of ZenML would repeat. The fork server imports this module last, and its processes inherit the results."""

import gc
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from sqlalchemy.orm import configure_mappers
from transformers import LlamaConfig
from zenml.config.global_config import GlobalConfiguration
from zenml.utils.source_utils import set_custom_source_root

from llm_engineering.data.examine import language_of
from llm_engineering.models.device import Device
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.stages import STAGES
from llm_engineering.training.estimate import shapes
from llm_engineering.training.telemetry.work import installed_packages
from steps.caching import code_version
from tests.fakes.warm_python import list_packages_once
from tests.tiny_models import SIZES

# The relations between the classes of ZenML's store.
configure_mappers()
# The steps. As in `prepare_zenml`, they need a source root; the commands set their own. ZenML would look for a code
# repository in the store, and so open the store of the user, which the commands would then use too.
set_custom_source_root(str(Path(__file__).parents[2]))
with patch("zenml.utils.code_repository_utils.find_active_code_repository", return_value=None):
    for module in ("pipelines.chain", "pipelines.repeats"):
        import_module(module)
assert GlobalConfiguration.get_instance() is None
set_custom_source_root(None)
# The syntax trees of the project's modules, which are cached.
for stage in STAGES.values():
    code_version("steps.training", "train", also=stage.train)
# The versions of the packages.
installed_packages()
list_packages_once()
# The model that identifies languages.
language_of("The language of this sentence is English.")
# Torch's tables of operators for fake tensors. These have no values, so nothing is computed.
shapes(LlamaConfig(vocab_size=300, **SIZES), "lora", LoraConfig(), Device("cpu", torch.float32, "sdpa", []), 1, 8)
# A garbage collection in a forked process would visit a million objects of the libraries, and so copy their memory.
gc.collect()
gc.freeze()
