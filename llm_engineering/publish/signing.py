"""Signs folders and verifies them, in the format of OpenSSF model signing: a Sigstore bundle with an in-toto statement.

The package model-signing computes and checks the signatures. It is an extra, and is imported only when it is needed.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.publish.dataset_card import public_name
from llm_engineering.recipe.settings import Settings

# The signature of a folder, and the statement of lineage, which is one of the signed files.
SIGNATURE = "model.sig"
STATEMENT = "lineage.json"
# The value of LLM_SIGNING_KEY for signatures without a key, with a short-lived certificate of Sigstore.
KEYLESS = "keyless"
# The model card is not signed: each export writes it anew, and people edit it on the hub.
_UNSIGNED = ("README.md", SIGNATURE)
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
# The beginning of the library's message about changed files. The rest is a Python list of texts, with the bytes of digests.
_CHANGED = "Signature mismatch: "
# A changed signature fails at any place of the library that reads it.
_REFUSED = (ValueError, KeyError, TypeError, AttributeError, IndexError)


def statement(subjects: Mapping[str, str], lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage of a model version as an in-toto statement with SLSA's provenance as predicate.

    It is published with the model, so it contains no paths and names of this machine and its users.

    Args:
        subjects: SHA-256 of the signed files by name.
        lineage: what `models lineage --json` prints.
    """
    origins = [_origin(public_name(lineage["base_model"]), None, revision=lineage["base_revision"])]
    for made in lineage["artifacts"]:
        name = f"{made['name']} v{made['version']}"
        origins.append(_origin(name, made["sha256"], **{key: made[key] for key in ("step", "code", "from")}))
    for reader, sources in lineage["sources"].items():
        origins += [_origin(public_name(file), value, read_by=reader) for file, value in sources.items()]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in subjects.items()],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:llm-engineering:chain:v1",
                "externalParameters": {key: lineage[key] for key in ("model", "version", "recipe_hash")},
                "internalParameters": {"code_version": lineage["code_version"]},
                "resolvedDependencies": origins,
            },
            "runDetails": {"builder": {"id": "urn:llm-engineering"}, "metadata": {"invocationId": lineage["run"]}},
        },
    }


def _origin(name: str, sha256: str | None, **annotations: Any) -> dict[str, Any]:
    return {"name": name, **({"digest": {"sha256": sha256}} if sha256 else {}), "annotations": annotations}


def check_signer(settings: Settings) -> None:
    """Check that this machine can sign, if it is set up to sign. The message contains nothing of the key.

    Raises:
        RequestError: the package is missing, or the file with the key cannot be read, or has no key that can sign.
    """
    if settings.llm_signing_key in (None, KEYLESS):
        return
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    _library()
    path = Path(str(settings.llm_signing_key))
    try:
        key = load_pem_private_key(path.read_bytes(), _password(settings))
    except OSError as error:
        raise RequestError(f"The key {path} cannot be read: {error.strerror}. Correct LLM_SIGNING_KEY.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise RequestError(
            f"{path} has no private key on the curve P-256, P-384 or P-521 in PEM format, or its password is wrong. Correct "
            "LLM_SIGNING_KEY or LLM_SIGNING_PASSWORD, or make a key: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        )


def sign(folder: Path, signature: Path, settings: Settings) -> None:
    """Write the signature of all files of a folder.

    Raises:
        RequestError: the package is missing, or the key cannot be read.
        WorkError: Sigstore cannot be reached, or it refuses the identity.
    """
    check_signer(settings)
    config = _library().signing.Config().set_hashing_config(_hashing())
    if settings.llm_signing_key != KEYLESS:
        key = Path(str(settings.llm_signing_key))
        config.use_elliptic_key_signer(private_key=key, password=_password(settings)).sign(folder, signature)
        return
    from sigstore.errors import Error

    try:
        config.use_sigstore_signer(use_ambient_credentials=True).sign(folder, signature)
    except (Error, OSError) as error:
        raise WorkError(
            f"Sigstore cannot sign {folder.name}: {error}. Check the network and the login, and run the command again."
        ) from error


def can_verify(settings: Settings) -> bool:
    """Whether it is set whose signatures count: a public key, or an identity with its issuer."""
    return bool(settings.llm_signing_public_key or (settings.llm_signing_identity and settings.llm_signing_issuer))


def verify(folder: Path, signature: Path, settings: Settings, name: str) -> None:
    """Check that a folder has exactly the signed files, and that the expected key or identity signed them.

    Args:
        name: what the folder is, for the message.

    Raises:
        RequestError: the package is missing, or the public key cannot be read.
        WorkError: a file was changed, lost or added, the signature itself was changed, or another key has signed.
    """
    config = _library().verifying.Config().set_hashing_config(_hashing())
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import Error

    key, identity = settings.llm_signing_public_key, settings.llm_signing_identity
    try:
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        else:
            config.use_sigstore_verifier(identity=identity, oidc_issuer=settings.llm_signing_issuer)
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(
            f"{key or identity} cannot verify signatures: it needs a PEM file with a public key on the curve P-256, P-384 or "
            "P-521, or the network for an identity. Correct LLM_SIGNING_PUBLIC_KEY or LLM_SIGNING_IDENTITY."
        ) from error
    try:
        config.verify(folder, signature)
    except (*_REFUSED, InvalidSignature, Error) as error:
        # The library compares the files last, so another error is about the signature itself.
        why = f"{SIGNATURE} was changed, or {key or identity} did not sign it"
        if str(error).startswith(_CHANGED):
            changes = [text.partition(": Expected ")[0] for text in literal_eval(str(error).removeprefix(_CHANGED))]
            why = f"its files are not those that were signed: {'; '.join(changes)}"
        raise WorkError(
            f"The signature of {name} is refused, because {why}. Restore the files, or train the model again."
        ) from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise RequestError(
            "Signatures need the package model-signing, which is not installed. Install it: "
            ".venv/bin/pip install -c requirements.lock -e '.[signing]'"
        ) from error
    return model_signing


def _hashing() -> Any:
    config = _library().hashing.Config()
    # Files are links to the artifacts, so that nothing is copied. Files of git count as all others.
    return config.set_ignored_paths(paths=_UNSIGNED, ignore_git_paths=False).set_allow_symlinks(True)


def _password(settings: Settings) -> bytes | None:
    # Bytes: model-signing declares text, and passes it on to a function that takes only bytes.
    secret = settings.llm_signing_password
    return None if secret is None else secret.get_secret_value().encode()
