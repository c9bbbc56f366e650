"""Trains as a typical TRL script does, with default settings and padded batches:

    python -m benchmarks.plain_trl sft --model DIR --rows train.jsonl --output DIR
    python -m benchmarks.plain_trl dpo --model DIR --rows train.jsonl --output DIR --adapter SFT_ADAPTER

Rows are conversational, in TRL's columns. The last line of the output is JSON: the seconds of training and of its last
epoch, the number of steps, the loss, and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import time

from benchmarks.training_settings import BATCH, BETA, LEARNING_RATE, LORA, MAX_LENGTH, SEED


def main() -> None:
    """Train on all rows, `--epochs` times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("sft", "dpo"))
    for name in ("model", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--four-bits", action="store_true", help="QLoRA, which needs CUDA")
    arguments = parser.parse_args()

    import torch
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from benchmarks.last_epoch import LastEpoch

    stage = arguments.stage
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cuda.is_available() else torch.float32
    quantisation = None
    if arguments.four_bits:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, quantization_config=quantisation)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_dataset("json", data_files=arguments.rows, split="train")
    settings = {
        "output_dir": arguments.output,
        "per_device_train_batch_size": BATCH[stage],
        "learning_rate": LEARNING_RATE[stage],
        "num_train_epochs": arguments.epochs,
        "max_length": arguments.max_length,
        # TRL's default is bf16 on every device. On a CPU without bf16 instructions it is only slower.
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "report_to": "none",
        "seed": SEED,
    }
    clock = LastEpoch()
    trainer: SFTTrainer | DPOTrainer
    if stage == "sft":
        adapter = LoraConfig(**LORA, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[clock],
        )
    else:
        trainer = DPOTrainer(
            model=PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True),
            args=DPOConfig(**settings, beta=BETA),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[clock],
        )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(f"{arguments.output}/adapter")
    # Imported last: a plain script has none of this project's code while it trains.
    from llm_engineering.training.telemetry.work import peak_memory_bytes

    figures = {"seconds": seconds, "steps": trainer.state.global_step, **clock.figures()}
    print(json.dumps({**figures, "peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main()
