"""Trains as a typical unsloth script does, with the settings of unsloth's notebooks and packed rows:

    python -m benchmarks.raw_unsloth --model DIR --rows train.jsonl --output DIR --batch 2 --max-length 2048

Rows are conversational, in TRL's columns. The last line of the output is JSON: the seconds of training and of its last
epoch, the number of steps, the loss, and the peak memory. unsloth needs CUDA.
"""

from __future__ import annotations

import argparse
import json
import time

from benchmarks.training_settings import LEARNING_RATE, LORA, SEED

# The linear layers of Llama, as in unsloth's notebooks.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(argv: list[str] | None = None) -> None:
    """Train an adapter on all rows, `--epochs` times."""
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, required=True, help="packed rows in a step")
    parser.add_argument("--max-length", type=int, required=True, help="tokens in a packed row")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--four-bits", action="store_true", help="QLoRA")
    arguments = parser.parse_args(argv)

    # unsloth patches the other libraries, so it is imported first.
    from unsloth import FastLanguageModel  # isort: skip

    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.last_epoch import LastEpoch

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=arguments.model,
        max_seq_length=arguments.max_length,
        dtype=None,
        load_in_4bit=arguments.four_bits,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA["r"],
        target_modules=TARGETS,
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    clock = LastEpoch()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=arguments.rows, split="train"),
        args=SFTConfig(
            output_dir=arguments.output,
            per_device_train_batch_size=arguments.batch,
            learning_rate=LEARNING_RATE["sft"],
            num_train_epochs=arguments.epochs,
            max_length=arguments.max_length,
            packing=True,
            optim="adamw_8bit",
            logging_steps=1,
            report_to="none",
            seed=SEED,
        ),
        callbacks=[clock],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    figures = {"seconds": seconds, "steps": trainer.state.global_step, **clock.figures()}
    print(json.dumps({**figures, "peak_memory_bytes": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    main()
