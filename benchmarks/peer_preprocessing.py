"""Times the preprocessing of LLaMA-Factory on made-up rows: python -m benchmarks.peer_preprocessing [--rows N]

LLaMA-Factory reads the file, converts the rows and tokenises them with labels. It keeps duplicates and rows with an
empty answer, truncates long rows without a word and fails at a broken line; so the rows here hold no broken line, and
none is longer than the default `--max-length`. Caches are fresh in every run.

Its environment is built once, below the cache folder: it asks for older versions of the libraries used here.
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

from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, ModelConfig

from benchmarks.rows import Shares, write_rows

PEER = "llamafactory==0.9.5"
DRIVER = Path(__file__).with_name("llamafactory_driver.py")

# What is compared with the peer: gets the file of rows, returns the seconds that it took.
Ours = Callable[[Path], float]


def compare(
    lines: int, seed: int, workers: Sequence[int], max_length: int, environment: Path, ours: Ours | None = None
) -> dict[str, Any]:
    """Rows a second of the peer for each number of workers, and of `ours` on the same file in the same run.

    Raises:
        RuntimeError: the peer could not be installed or failed; with the end of its output.
    """
    # torch comes with it, which has no place in the memory of what is compared.
    from llm_engineering.models.loading import model_path

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
            # Its upper bounds on libraries would refuse the torch that is installed.
            "DISABLE_VERSION_CHECK": "1",
        }
        done = _run([python, DRIVER, folder, tokenizer, workers, max_length], env)
    timed: dict[str, Any] = json.loads(done.splitlines()[-1])
    return timed


def _peer_python(environment: Path) -> Path:
    """The interpreter of the peer's environment, which is built if it is not there."""
    python = environment / "bin" / "python"
    ready = environment / "ready"
    if ready.is_file() and ready.read_text(encoding="utf-8") == PEER:
        return python
    print(f"Building an environment for {PEER} in {environment} (once, some minutes)", file=sys.stderr)
    venv.create(environment, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--upgrade", "pip"])
    _run([*pip, "install", "--quiet", "torch==2.13.0", PEER])
    # Both are imported and not needed for text, and their wheels may be built for another torch. transformers takes
    # torchvision's absence, and asks torchaudio for its version.
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
    """The command line, for this benchmark and for those that compare with it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=20_000, help="how many rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of the peer (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=1024, help="longest row in tokens (default: %(default)s)")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Settings().llm_cache_dir / "bench" / "llamafactory",
        help="the peer's environment, built if it is not there (default: %(default)s)",
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
