#!/usr/bin/env python3
"""SkyPilot's command `sky`, and `ssh` to its machines, as this project uses them. A machine is a folder below FAKE_SKY.

Exit codes and JSON are those of SkyPilot 0.14.1. The machine's home is not the folder of the task, as on Slurm.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml


def root() -> Path:
    """The folder of the machines."""
    return Path(os.environ["FAKE_SKY"])


def main() -> int:
    """Do what the command line says; returns the exit code."""
    with (root() / "commands").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "ssh":
        return subprocess.run(arguments[-1], shell=True, cwd=root(), check=False).returncode
    return {"launch": launch, "queue": queue, "status": status, "logs": logs, "cancel": cancel, "down": down}[
        arguments[0]
    ](arguments[1:])


def launch(arguments: list[str]) -> int:
    """Start a machine and its next task."""
    task = yaml.safe_load(Path(arguments[-1]).read_text())
    if task["resources"].get("infra") == "nowhere":
        print("\x1b[31mValueError: Cluster nowhere not found.\x1b[0m")
        return 1
    if "--dryrun" in arguments:
        return 0
    machine = root() / arguments[arguments.index("--cluster") + 1]
    workdir, number = machine / "sky_workdir", len(list(machine.glob("*.pid"))) + 1
    shutil.copytree(task["workdir"], workdir, dirs_exist_ok=True)
    # The task belongs to the machine: it has no parent here, and its end is its exit code in a file.
    script = f"({task['setup']}) && (bash <<'RUN'\n{task['run']}\nRUN\n); echo $? > {machine}/{number}.code"
    with (machine / f"{number}.log").open("w") as log:
        environment = {**os.environ, **task["envs"]}
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=workdir, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    (machine / f"{number}.pid").write_text(str(process.pid))
    return 0


def _state(machine: Path, number: int) -> str:
    code = machine / f"{number}.code"
    if not code.is_file():
        return "RUNNING"
    return {"0": "SUCCEEDED", "cancelled": "CANCELLED"}.get(code.read_text().strip(), "FAILED")


def queue(arguments: list[str]) -> int:
    """The tasks of a machine."""
    machine = root() / arguments[0]
    numbers = [int(file.stem) for file in machine.glob("*.pid")]
    tasks = [{"job_id": number, "status": _state(machine, number)} for number in numbers]
    print(f"Fetching job queue for: {machine.name}")
    print(json.dumps({machine.name: tasks} if tasks else {}))
    return 0


def status(arguments: list[str]) -> int:
    """The machine."""
    found = {"name": arguments[0], "cloud": "Fake", "region": "here", "resources_str": "1x(cpus=2)"}
    print(json.dumps([found] if (root() / arguments[0]).is_dir() else []))
    return 0


def logs(arguments: list[str]) -> int:
    """Follow a task to its end."""
    machine, number = root() / arguments[-2], int(arguments[-1])
    if not machine.is_dir():
        print(f"Cluster '{machine.name}' does not exist.")
        return 1
    while _state(machine, number) == "RUNNING":
        time.sleep(0.1)
    for line in (machine / f"{number}.log").read_text().splitlines():
        print(f"\x1b[36m(task, pid=1)\x1b[0m {line}")
    return {"SUCCEEDED": 0, "CANCELLED": 103}.get(_state(machine, number), 100)


def cancel(arguments: list[str]) -> int:
    """Kill a task, as SkyPilot does it on Slurm."""
    machine, number = root() / arguments[-2], arguments[-1]
    os.killpg(int((machine / f"{number}.pid").read_text()), 9)
    (machine / f"{number}.code").write_text("cancelled")
    return 0


def down(arguments: list[str]) -> int:
    """End a machine."""
    shutil.rmtree(root() / arguments[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
