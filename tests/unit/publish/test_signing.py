"""Signatures of folders: what they refuse, and with whose key."""

import json
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.publish import signing
from llm_engineering.recipe.settings import Settings


def write_keys(folder, name, password=None, key=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return {"llm_signing_key": str(private), "llm_signing_public_key": public}


@pytest.fixture
def keys(tmp_path):
    return Settings(_env_file=None, **write_keys(tmp_path, "own"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny-3"
    (folder / "sft_adapter-v1").mkdir(parents=True)
    (folder / "sft_adapter-v1" / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "lineage.json").write_text("{}")
    return folder


@pytest.fixture
def signature(folder, keys, tmp_path):
    signing.sign(folder, tmp_path / "model.sig", keys)
    return tmp_path / "model.sig"


def test_an_unchanged_folder_is_accepted_under_another_name_and_through_links(folder, signature, keys, tmp_path):
    signing.verify(folder, signature, keys, "it")
    linked = tmp_path / "elsewhere"
    shutil.copytree(folder, linked, copy_function=lambda source, target: linked.joinpath(target).symlink_to(source))
    (linked / "README.md").write_text("the card is not signed")
    signing.verify(linked, signature, keys, "it")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: (f / "sft_adapter-v1" / "weights.bin").write_bytes(bytes(255) + b"\1"), "Hash mismatch for "
         "'sft_adapter-v1/weights.bin'"),
        (lambda f: (f / "lineage.json").write_text("{ }"), "signed: Hash mismatch for 'lineage.json'\\. Restore"),
        (lambda f: (f / "sft_adapter-v1" / "weights.bin").unlink(), "Missing files .*: sft_adapter-v1/weights.bin"),
        (lambda f: (f / "sft_adapter-v1" / "code.py").touch(), "Extra files .*: sft_adapter-v1/code.py"),
        (lambda f: (f / ".gitignore").touch(), "Extra files .*: .gitignore"),
        (lambda f: (f / "sft_adapter-v1" / "README.md").touch(), "Extra files .*: sft_adapter-v1/README.md"),
    ],
)  # fmt: skip
def test_a_changed_lost_or_added_file_is_named(folder, signature, keys, change, named):
    change(folder)
    with pytest.raises(WorkError, match=f"The signature of tiny version 3 is refused, .*{named}"):
        signing.verify(folder, signature, keys, "tiny version 3")


def test_a_changed_byte_of_the_signature_is_refused(folder, signature, keys):
    """At every 13th byte. The last character before the padding of base64 has bits without a meaning."""
    content = signature.read_bytes()
    for place in range(0, len(content), 13):
        signature.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if content[place + 1 : place + 2] == b"=":
            continue
        with pytest.raises(WorkError, match=r"model.sig was changed, or .*own.pub did not sign it"):
            signing.verify(folder, signature, keys, "it")


def test_another_key_is_refused(folder, signature, tmp_path):
    other = Settings(_env_file=None, **write_keys(tmp_path, "other"))
    with pytest.raises(WorkError, match=r"model.sig was changed, or .*other.pub did not sign it"):
        signing.verify(folder, signature, other, "it")


def test_a_key_with_a_password_signs_and_a_wrong_password_is_refused_without_naming_it(folder, tmp_path):
    keys = write_keys(tmp_path, "locked", b"right")
    right = Settings(_env_file=None, **keys, llm_signing_password="right")
    signing.sign(folder, tmp_path / "locked.sig", right)
    signing.verify(folder, tmp_path / "locked.sig", right, "it")
    for password in ("wrong-one", None):
        with pytest.raises(RequestError, match="or its password is wrong") as refused:
            signing.check_signer(Settings(_env_file=None, **keys, llm_signing_password=password))
        assert "wrong-one" not in str(refused.value)
    assert "right" not in repr(right)


def test_a_file_that_is_no_fitting_key_is_refused(folder, signature, tmp_path):
    rsa_key = write_keys(tmp_path, "rsa", key=rsa.generate_private_key(65537, 2048))
    for private in (rsa_key["llm_signing_key"], rsa_key["llm_signing_public_key"]):
        with pytest.raises(RequestError, match="has no private key on the curve P-256"):
            signing.check_signer(Settings(_env_file=None, llm_signing_key=str(private)))
    with pytest.raises(RequestError, match="nowhere cannot be read: No such file"):
        signing.check_signer(Settings(_env_file=None, llm_signing_key="nowhere"))
    for public in (rsa_key["llm_signing_public_key"], tmp_path / "nowhere", folder / "lineage.json"):
        with pytest.raises(RequestError, match="cannot verify signatures: it needs a PEM file with a public key"):
            signing.verify(folder, signature, Settings(_env_file=None, llm_signing_public_key=public), "it")


def test_without_the_package_the_extra_is_named(folder, signature, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: signing.verify(folder, signature, keys, "it"), lambda: signing.check_signer(keys)):
        with pytest.raises(RequestError, match=r"model-signing, which is not installed. Install it: .*\[signing\]"):
            call()


def test_the_program_of_model_signing_verifies_the_folder_too(folder, signature, keys):
    shutil.copy(signature, folder)
    (folder / "README.md").write_text("a card")
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature",
               str(folder / "model.sig"), "--public_key", str(keys.llm_signing_public_key)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "lineage.json").write_text("[]")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lineage.json" in done.stdout + done.stderr


def test_the_statement_names_origins_with_hashes_and_nothing_of_this_machine():
    lineage = {
        "model": "tiny", "version": 3, "recipe_hash": "5e", "code_version": "c0de", "run": "sft-1",
        "base_model": "/home/someone/base", "base_revision": "folder-1",
        "artifacts": [
            {"name": "sft_adapter", "version": "1", "sha256": "a1", "step": "train", "code": "c0de", "from": ["formatted_sft v1"],
             "uri": "/home/someone/store"},
            {"name": "old", "version": "1", "sha256": None, "step": "", "code": "", "from": []},
        ],
        "sources": {"instruction_candidates v1": {"/home/someone/rows.jsonl": "b2"}},
        "people": {"human_instructions v1": {"by": {"someone": 2}}}, "changes": [{"by": "someone@host"}],
    }  # fmt: skip
    found = signing.statement({"sft_adapter-v1/weights.bin": "d3"}, lineage)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert found["subject"] == [{"name": "sft_adapter-v1/weights.bin", "digest": {"sha256": "d3"}}]
    build = found["predicate"]["buildDefinition"]
    assert build["externalParameters"] == {"model": "tiny", "version": 3, "recipe_hash": "5e"}
    assert build["internalParameters"] == {"code_version": "c0de"}
    named = {origin["name"]: origin.get("digest") for origin in build["resolvedDependencies"]}
    assert named == {"base": None, "sft_adapter v1": {"sha256": "a1"}, "old v1": None, "rows.jsonl": {"sha256": "b2"}}
    assert "someone" not in json.dumps(found)
