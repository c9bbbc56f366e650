"""Signatures from the run to the export: signed versions are verified, and changed files are refused by name."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.fakes.hub import running_hub
from tests.integration.conftest import Project, Run, make_project
from tools.servers.serve import free_port


def write_keys(folder: Path, name: str) -> dict[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return {"LLM_SIGNING_KEY": str(private), "LLM_SIGNING_PUBLIC_KEY": str(public)}


@dataclass
class Signing:
    """A project with version 1, which its run signed, and version 2, which is not signed.

    Attributes:
        keys: the environment that signs and verifies.
        places: the folders of version 1's artifacts by name.
    """

    plain: Project
    keys: dict[str, str]
    run: Run
    output: Path
    export: Run
    places: dict[str, Path]

    def command(self, *arguments: str, **env: str) -> Run:
        return self.project(**env).command(*arguments, "--config", str(self.plain.recipe))

    def project(self, **env: str) -> Project:
        return replace(self.plain, env=self.plain.env | self.keys | env)


@pytest.fixture(scope="module")
def signed(tiny_model, unused, tmp_path_factory) -> Signing:
    plain = make_project(tmp_path_factory.mktemp("signatures"), tiny_model, unused)
    keys = write_keys(plain.folder, "own")
    run = replace(plain, env=plain.env | keys).run("sft")
    assert run.code == 0, run.stderr
    made = Signing(plain, keys, run, plain.folder / "exported", run, {})
    made.export = made.command("models", "export", "--version", "1", "--output", str(made.output))
    assert made.export.code == 0, made.export.stderr
    lineage = made.command("models", "lineage", "1", "--json").json
    made.places = {artifact["name"]: Path(artifact["uri"]) for artifact in lineage["artifacts"]}
    second = plain.run("sft", "--set", "sft.learning_rate=1e-3")
    assert second.code == 0, second.stderr
    return made


def signatures(signed: Signing) -> list[Path]:
    return sorted(signed.plain.folder.rglob("signatures/**/model.sig"), key=lambda file: file.stat().st_mtime_ns)


def test_a_run_signs_its_version_and_an_export_the_merged_model(signed):
    assert "Signed:      tiny version 1: sft_adapter v1, instruction_dataset v1\n" in signed.run.stderr
    assert "Signature:   verified, tiny version 1\n" in signed.export.stderr
    assert "Signed:      tiny version 1: merged_model v1\n" in signed.export.stderr
    assert "Signature:   verified, the merged model of tiny version 1\n" in signed.export.stderr
    statement = json.loads((signed.output / "lineage.json").read_text())
    named = {subject["name"] for subject in statement["subject"]}
    written = {file.name for file in signed.output.iterdir()}
    assert named == written - {"README.md", "lineage.json", "model.sig"}
    origins = {origin["name"] for origin in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"sft_adapter v1", "instruction_dataset v1", "instructions.jsonl"} <= origins
    assert str(signed.plain.folder) not in (signed.output / "lineage.json").read_text()


def test_people_without_this_project_verify_an_export(signed):
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed.output), "--signature",
               str(signed.output / "model.sig"), "--public_key", signed.keys["LLM_SIGNING_PUBLIC_KEY"]]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_and_no_output_contains_the_key(signed):
    secret = Path(signed.keys["LLM_SIGNING_KEY"]).read_text().splitlines()[1]
    assert secret not in signed.run.stdout + signed.run.stderr + signed.export.stderr
    with_key = [
        file for file in signed.plain.folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()
    ]
    assert with_key == [Path(signed.keys["LLM_SIGNING_KEY"])]


def test_one_changed_byte_in_each_kind_of_artifact_is_refused_by_every_command(signed):
    merged = next(iter(signed.plain.folder.rglob("merged_model/**/model.safetensors")))
    statement = signatures(signed)[0].with_name("lineage.json")
    changed = {
        signed.places["sft_adapter"] / "files" / "adapter_model.safetensors": "sft_adapter-v1/files/adapter_model.safetensors",
        next(signed.places["instruction_dataset"].rglob("train/*.arrow")): "instruction_dataset-v1/hf_datasets/train/",
        merged: "model.safetensors",
        statement: "lineage.json",
    }  # fmt: skip
    project = signed.project(HF_TOKEN="token")
    done = project.script("tests.integration.tampered", str(project.recipe), str(free_port()), *map(str, changed))
    assert done.code == 0, done.stderr
    for file, named in changed.items():
        refusals = done.json[str(file)]
        assert set(refusals) >= {"serve", "promote", "export", "push"}
        for command, (code, stderr) in refusals.items():
            assert code == 1, (command, file, stderr)
            last = stderr.splitlines()[-1]
            if command == "sign":
                assert "Error: tiny version 1 is not signed, because " in last
                assert file.name in last
            else:
                assert last.startswith("Error: The signature of "), last
                assert f"Hash mismatch for '{named}" in last
    listed = signed.command("models", "list", "--json").json["versions"]
    assert "production" not in [version["stage"] for version in listed]


def test_every_command_accepts_an_unchanged_version_and_no_other_key(signed):
    port = free_port()
    process = signed.project(LLM_REQUIRE_SIGNATURE="true").start(
        "serve", "--version", "1", "--port", str(port), "--config", str(signed.plain.recipe)
    )
    try:
        assert process.stdout.readline().startswith("Serving: "), process.stderr.read()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    other = write_keys(signed.plain.folder, "other")["LLM_SIGNING_PUBLIC_KEY"]
    refused = signed.command("models", "promote", "1", LLM_SIGNING_PUBLIC_KEY=other)
    assert refused.code == 1
    assert "model.sig was changed, or " in refused.stderr
    assert "other.pub did not sign it" in refused.stderr
    promoted = signed.command("models", "promote", "1", LLM_REQUIRE_SIGNATURE="true")
    assert promoted.code == 0, promoted.stderr
    assert promoted.stderr.count("Signature:   verified, ") == 2
    with running_hub("token") as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "token", "HF_HOME": str(signed.plain.folder / "hub"),
                  "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "LLM_REQUIRE_SIGNATURE": "true"}  # fmt: skip
        licences = ("--set", "hub.license=mit", "--set", "hub.base_license=mit")
        pushed = signed.command("models", "push", "--version", "1", "--repo", "someone/tiny", *licences, **online)
        assert pushed.code == 0, pushed.stderr
        published = hub.repos["someone/tiny"].files
    assert set(published) == {file.name for file in signed.output.iterdir()}
    assert published["model.sig"] == (signed.output / "model.sig").read_bytes()


def test_an_unsigned_version_is_accepted_and_said_unless_signatures_are_required(signed):
    promote = ("models", "promote", "2", "--force", "--note", "a test")
    required = signed.command(*promote, LLM_REQUIRE_SIGNATURE="true")
    assert required.code == 2
    assert (
        "Tiny version 2 has no signature, and LLM_REQUIRE_SIGNATURE is set. Sign it: make sign VERSION=2."
        in required.stderr
    )
    allowed = signed.command(*promote)
    assert allowed.code == 0, allowed.stderr
    assert "Signature:   tiny version 2 has no signature. Sign it: make sign VERSION=2\n" in allowed.stderr
    # What is signed cannot be verified without a key.
    promote = ("models", "promote", "1", "--force", "--note", "a test")
    unknown = signed.command(*promote, LLM_SIGNING_PUBLIC_KEY="", LLM_REQUIRE_SIGNATURE="true")
    assert unknown.code == 2
    assert "Tiny version 1 is signed, but the signature was not verified" in unknown.stderr
    back = signed.command(*promote, LLM_SIGNING_PUBLIC_KEY="")
    assert back.code == 0, back.stderr
    assert "Set LLM_SIGNING_PUBLIC_KEY to the key that signs" in back.stderr


def test_signing_needs_a_key_before_any_work(signed):
    missing = signed.command("models", "sign", "2", LLM_SIGNING_KEY="")
    assert missing.code == 2
    assert "No key is set to sign with. Set LLM_SIGNING_KEY" in missing.stderr
    run = signed.project(LLM_SIGNING_KEY="nowhere.pem").run("sft", "--set", "sft.learning_rate=2e-3")
    assert run.code == 2
    assert "The key nowhere.pem cannot be read" in run.stderr


def test_a_killed_signing_is_repeated_and_a_deleted_version_leaves_no_signature(signed):
    before = signatures(signed)
    for place in ("before the signature is written", "before it is linked"):
        arguments = (place, "models", "sign", "2", "--config", str(signed.plain.recipe))
        killed = signed.project().script("tests.integration.killed_signing", *arguments)
        assert killed.code == -signal.SIGKILL, killed.stderr
        unsigned = signed.command("models", "promote", "2", LLM_REQUIRE_SIGNATURE="true")
        assert "Tiny version 2 has no signature" in unsigned.stderr
    signing = signed.command("models", "sign", "2")
    assert signing.code == 0, signing.stderr
    own = signatures(signed)[-1]
    promote = ("models", "promote", "2", "--force", "--note", "a test")
    promoted = signed.command(*promote, LLM_REQUIRE_SIGNATURE="true")
    assert promoted.code == 0, promoted.stderr
    # Not even the repeat of its run signs it again.
    repeat = signed.project().run("sft", "--set", "sft.learning_rate=1e-3")
    assert repeat.code == 0, repeat.stderr
    assert "Signed:" not in repeat.stderr
    assert signed.command("models", "rollback").code == 0
    deleted = signed.command("models", "delete", "2", "--yes")
    assert deleted.code == 0, deleted.stderr
    assert not own.exists()
    assert set(before) <= set(signatures(signed))
