"""Settings that all sides of the training benchmarks share."""

from typing import Any

SEED = 42
MAX_LENGTH = 512
# Rows or pairs in a step. Our side packs the same number of tokens in a step into rows of 512.
BATCH = {"sft": 8, "dpo": 4}
LEARNING_RATE = {"sft": 5e-4, "dpo": 1e-4}
BETA = 0.1
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
