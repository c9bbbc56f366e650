"""Times the preprocessing of LLaMA-Factory on made-up rows: python -m benchmarks.peer_preprocessing [--rows N]

LLaMA-Factory reads the file, converts the rows and tokenises them with labels. It keeps duplicates and rows with an empty
answer, truncates long rows without a warning, and fails at a broken line. So the rows of this benchmark have no broken
line, and none is longer than the default `--max-length`. Each run starts with empty caches.

LLaMA-Factory needs older versions of some libraries, so it gets its own environment below the cache folder, built once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.alpaca_rows import Shares, write_rows
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.recipe.settings import Settings

PEER = "llamafactory==0.9.5"
DRIVER = Path(__file__).with_name("llamafactory_driver.py")

# The other side of the comparison: takes the file of rows, and returns its seconds.
Ours = Callable[[Path], float]


def compare(
    lines: int, seed: int, workers: Sequence[int], max_length: int, environment: Path, ours: Ours | None = None
) -> dict[str, Any]:
    """Rows per second of the peer for each number of workers, and of `ours` on the same file.

    Raises:
        RuntimeError: the peer could not be installed or failed. The message has the end of its output.
    """
    # It imports torch, whose memory must not count for the side that is compared.
    from llm_engineering.models.base_model import model_path

    python = _peer_python(environment)
    tokenizer = model_path(ModelConfig(name_or_path=EMBEDDED_MODEL), Settings())
    with tempfile.TemporaryDirectory(prefix="peer-preprocessing-") as scratch:
        folder = Path(scratch)
        rows = folder / "rows.jsonl"
        counts = write_rows(rows, lines, seed, Shares(broken=0))
        result: dict[str, Any] = {"peer": PEER, "rows": asdict(counts), "bytes": rows.stat().st_size, "workers": {}}
        for number in workers:
            timed = _time_peer(python, folder, tokenizer, number, max_length)
            result["workers"][str(number)] = {**timed, "rows_per_s": lines / timed["seconds"]}
        if ours is not None:
            seconds = ours(rows)
            result["ours"] = {"seconds": seconds, "rows_per_s": lines / seconds}
    return result


def _time_peer(python: Path, folder: Path, tokenizer: str, workers: int, max_length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="peer-cache-") as cache:
        env = os.environ | {
            "HF_HOME": cache,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # The upper bounds of its requirements exclude the installed torch.
            "DISABLE_VERSION_CHECK": "1",
        }
        done = _run([python, DRIVER, folder, tokenizer, workers, max_length], env)
    timed: dict[str, Any] = json.loads(done.splitlines()[-1])
    return timed


def _peer_python(environment: Path) -> Path:
    """The interpreter of the peer's environment. Builds the environment if it does not exist."""
    python = environment / "bin" / "python"
    ready = environment / "ready"
    if ready.is_file() and ready.read_text(encoding="utf-8") == PEER:
        return python
    print(f"Building an environment for {PEER} in {environment} (once, some minutes)", file=sys.stderr)
    venv.create(environment, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--upgrade", "pip"])
    _run([*pip, "install", "--quiet", "torch==2.13.0", PEER])
    # LLaMA-Factory imports both, does not need them for text, and their wheels may be built for another torch.
    # transformers works without torchvision, and only reads torchaudio's version.
    _run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"])
    packages = _run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    stand_in = Path(packages, "torchaudio")
    stand_in.mkdir(exist_ok=True)
    (stand_in / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")
    _run([python, "-c", "import llamafactory.data, llamafactory.model"], os.environ | {"DISABLE_VERSION_CHECK": "1"})
    ready.write_text(PEER, encoding="utf-8")
    return python


def _run(command: Sequence[object], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = " ".join(map(str, command))
        raise RuntimeError(f"`{words}` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def options(description: str | None) -> argparse.ArgumentParser:
    """The command line of this benchmark and of the benchmarks that compare with it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=20_000, help="number of rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="numbers of the peer's workers (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=1024, help="longest row in tokens (default: %(default)s)")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Settings().llm_cache_dir / "bench" / "llamafactory",
        help="folder of the peer's environment, built if missing (default: %(default)s)",
    )
    return parser


def main() -> None:
    """Time the peer alone and print one JSON object."""
    arguments = options("Time the preprocessing of LLaMA-Factory.").parse_args()
    print(
        json.dumps(
            compare(arguments.rows, arguments.seed, arguments.workers, arguments.max_length, arguments.environment)
        )
    )


if __name__ == "__main__":
    main()
