"""Versions that `models deploy` refuses before anything is created in the account."""

from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from llm_engineering.cloud.sagemaker import endpoints, preflight
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.publish.signing import SIGNATURE, STATEMENT
from tests.conftest import ROOT
from tools.cli import main
from tools.model_versions import deployment, signatures, versions


@pytest.fixture
def refused(settings, monkeypatch, capfd):
    """A function that deploys version 3, whose last stage is `reward`, and returns the exit code and the error."""
    version = SimpleNamespace(number=3, model=SimpleNamespace(name="tiny"))
    monkeypatch.setattr(deployment, "prepare_zenml", lambda: None)
    monkeypatch.setattr(versions, "find_version", lambda *_: version)
    monkeypatch.setattr(Account, "resolve", lambda *_: None)
    monkeypatch.setattr(preflight, "check_endpoint", lambda *_: None)
    for module, name in ((versions, "merged_model"), (endpoints, "deploy")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the version was not refused"))

    monkeypatch.setattr(versions, "trained_adapter", lambda _: SimpleNamespace(name="reward"))

    def deploy():
        recipe = str(ROOT / "configs" / "python_reference.yaml")
        code = main(["models", "deploy", "--config", recipe, "--version", "3", "--instance-type", "ml.g5.xlarge"])
        return code, " ".join(capfd.readouterr().err.split())

    return deploy


@pytest.fixture
def model(monkeypatch):
    """Version 3 holds a model of sft."""
    found = SimpleNamespace(version=versions.find_version("tiny", "3"), described="tiny version 3")
    monkeypatch.setattr(versions, "find_model", lambda *_: found)


def test_a_reward_model_is_refused(refused):
    code, error = refused()
    assert code == 2
    assert "Version 3 of python-reference holds a reward model, which scores answers and writes none" in error


def test_a_version_without_a_signature_is_refused_if_one_is_required(refused, model, monkeypatch):
    monkeypatch.setenv("LLM_REQUIRE_SIGNATURE", "true")
    monkeypatch.setattr(signatures, "signatures_of", lambda _: {})
    code, error = refused()
    assert code == 2
    assert "Tiny version 3 has no signature, and LLM_REQUIRE_SIGNATURE is set. Sign it: make sign VERSION=3" in error


def test_a_version_whose_signature_another_key_made_is_refused(refused, model, tmp_path, monkeypatch):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "own.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("LLM_SIGNING_PUBLIC_KEY", str(tmp_path / "own.pub"))
    (tmp_path / STATEMENT).write_text("{}")
    (tmp_path / SIGNATURE).write_text("{}")
    signature = SimpleNamespace(load=lambda: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(signatures, "signatures_of", lambda _: {signatures.VERSION: signature})
    monkeypatch.setattr(signatures, "parts_of", lambda _: {signatures.VERSION: {}})
    code, error = refused()
    assert code == 1
    assert "The signature of tiny version 3 is refused, because model.sig was changed" in error
