"""Trains with DeepSpeed on a processor: python -m tests.integration.deepspeed_runs DATA FOLDER

Each config of DEEPSPEED is trained by two processes on machines without a shared disk, which are interrupted and started again.
The outcomes are in FOLDER/NAME-cut and FOLDER/NAME-resumed.
"""

import multiprocessing
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed

from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.stage_blocks import SFTConfig
from tests.integration import test_processes as processes

STOPPED_IN = 3


def main(data: Path, folder: Path) -> None:
    """Run all trainings, one after the other."""
    for way, config in processes.DEEPSPEED.items():
        cut, resumed = folder / f"{way}-cut", folder / f"{way}-resumed"
        run(cut, data, processes.smaller(config), way, {1: (processes.signal_at, (STOPPED_IN,))})
        shutil.copytree(cut, resumed)
        run(resumed, data, processes.smaller(config), way, {})


def run(folder: Path, data: Path, config: SFTConfig, way: str, sabotage: Mapping[int, Any]) -> None:
    """Train in two processes, and wait for them."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    compute = {"distributed": "deepspeed", "zero_stage": int(way[-1])}
    arguments = (port, folder, "sft", config, data, None, sabotage, compute, True)
    ranks = [multiprocessing.Process(target=one_rank, args=((rank, 2), *arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(processes.TIMEOUT_S)


def one_rank(*arguments: Any) -> None:
    """Train as one process. accelerate does not tell DeepSpeed of the processes if they are on a processor."""
    join = processes.ranks.join

    def joined(compute: ComputeConfig, device: str) -> None:
        join(compute, device)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

    processes.ranks.join = joined
    processes.one_rank(*arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
