"""Commands in processes that are forked from one which has imported the libraries: seconds less for each command.

Imported is what reads no setting when it is imported, but for those of the hub: where they differ, another way is
taken (`Project.command`). What the commands do, and how they end, is their own.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES = ("zenml.client", "zenml.zen_stores.sql_zen_store", "datasets", "matplotlib.pyplot", "peft",
              "transformers.trainer", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer")  # fmt: skip


def run_module(
    module: str, arguments: Sequence[str], env: Mapping[str, str], folder: Path, output: Path, timeout_s: float
) -> int:
    """`python -m module arguments` in `folder`; its streams go to `output`/stdout and `output`/stderr.

    Returns its exit code; that of a signal is below zero, as in subprocess.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    process = context.Process(target=_run, args=(module, list(arguments), dict(env), folder, output))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{module} {' '.join(arguments)} took longer than {timeout_s} s")
    return process.exitcode


def _run(module: str, arguments: list[str], env: dict[str, str], folder: Path, output: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (output / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [module, *arguments]
    sys.path[0] = str(folder)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
