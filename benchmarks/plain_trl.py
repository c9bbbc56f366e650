"""Training as people write it, with TRL's default settings and padded batches:

    python -m benchmarks.plain_trl sft --model DIR --rows train.jsonl --output DIR
    python -m benchmarks.plain_trl dpo --model DIR --rows train.jsonl --output DIR --adapter SFT_ADAPTER

Rows are conversational, in TRL's columns. The last line printed is JSON: seconds of training, its steps, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from benchmarks.training_settings import BATCH, BETA, LEARNING_RATE, LORA, MAX_LENGTH, SEED


def main() -> None:
    """Train on all rows once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("sft", "dpo"))
    for name in ("model", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--adapter")
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    stage = arguments.stage
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_dataset("json", data_files=arguments.rows, split="train")
    settings = {
        "output_dir": arguments.output,
        "per_device_train_batch_size": BATCH[stage],
        "learning_rate": LEARNING_RATE[stage],
        "num_train_epochs": 1,
        "max_length": MAX_LENGTH,
        # TRL turns it on everywhere; on a CPU without such instructions it only slows down.
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "report_to": "none",
        "seed": SEED,
    }
    trainer: SFTTrainer | DPOTrainer
    if stage == "sft":
        adapter = LoraConfig(**LORA, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    else:
        trainer = DPOTrainer(
            model=PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True),
            args=DPOConfig(**settings, beta=BETA),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(f"{arguments.output}/adapter")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds, "steps": trainer.state.global_step, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
