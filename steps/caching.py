"""Adds the library functions that a step calls to ZenML's cache key.

ZenML's cache key covers only a step's own source. Here every step also gets a hash of all project code that it can reach.
The code is read as syntax trees, and functions, classes and constants are followed by name from the step through the modules
of this project. So a change of code reruns the steps that use it, and a change of a comment or docstring reruns nothing. The
hash is in the step's environment, which is part of the cache key and shown in the dashboard.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from zenml import step

PROJECT_PACKAGES = ("llm_engineering", "steps", "pipelines")
# A new version of one of these libraries may change the result of a step.
LIBRARIES = (
    "accelerate",
    "beautifulsoup4",
    "bitsandbytes",
    "bm25s",
    "datasets",
    "deepspeed",
    "detect-secrets",
    "flash-attn",
    "jinja2",
    "lm-eval",
    "peft",
    "phonenumberslite",
    "py3langid",
    "pypdf",
    "python-docx",
    "python-pptx",
    "rensa",
    "rouge-score",
    "scipy",
    "semantic-text-splitter",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "unsloth-zoo",
)

IMPORT_TIME = "<import time>"


def project_step(
    *, files: Sequence[Path] = (), in_job: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """ZenML's `step`, with a cache key that covers all project code it reaches, the library versions and `files`.

    A step with several outputs must name a materializer for each output. With one materializer for all outputs, ZenML 0.98
    takes their order from a set. This order, and so the cache key, differs between processes.

    Args:
        in_job: whether the step uses a model. Then it is a SageMaker job with `compute.sagemaker.scope: chain`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        version = code_version(function.__module__, function.__name__, tuple(files))
        if in_job:
            # By its name, so that the cache key does not cover the code that starts jobs.
            function = import_module("steps.job_scope").sent_to_job(function)
        return step(environment={"CODE_VERSION": version}, **options)(function)

    return decorate


def code_version(module: str, name: str, files: Sequence[Path] = (), also: tuple[str, str] | None = None) -> str:
    """Hash (twelve hex digits) of the code reachable from `module.name`, the library versions and the files.

    Args:
        also: module and name of a function that the code imports by its name, so that it cannot be followed.
    """
    digest = hashlib.sha256()
    for library in LIBRARIES:
        digest.update(f"{library}=={_version(library)}\n".encode())
    for file in files:
        digest.update(file.read_bytes())
    found = reachable(module, name) | (reachable(*also) if also else {})
    for key, node in sorted(found.items()):
        digest.update(f"{key}\n{_dump(node)}\n".encode())
    return digest.hexdigest()[:12]


@cache
def _version(library: str) -> str:
    """The installed version; empty for a library of an extra that is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def reachable(module: str, name: str) -> dict[str, ast.AST]:
    """The definitions that `module.name` can reach, by their full name; `module.name` is one of them."""
    found: dict[str, ast.AST] = {}
    queue = [(module, name)]
    while queue:
        current, wanted = queue.pop()
        key = f"{current}.{wanted}"
        if key in found or current.partition(".")[0] not in PROJECT_PACKAGES:
            continue
        definition = _definitions(current).get(wanted)
        if definition is None:
            # The name is imported from another module, or is a submodule.
            queue += _follow(_imports(_tree(current)).get(wanted), ())
            continue
        found[key] = definition
        queue += _used(current, wanted)
    return found


# Cached, because steps share most of the code that they reach.
@cache
def _used(module: str, name: str) -> list[tuple[str, str]]:
    """The names that a definition of a module uses directly, as `(module, name)`."""
    definitions = _definitions(module)
    found = [(module, IMPORT_TIME)] if IMPORT_TIME in definitions else []
    imports = _imports(_tree(module)) | _imports(definitions[name])
    for chain in _names(definitions[name]):
        if chain[0] in imports:
            found += _follow(imports[chain[0]], chain[1:])
        elif chain[0] in definitions:
            found.append((module, chain[0]))
    return list(dict.fromkeys(found))


@cache
def _dump(node: ast.AST) -> str:
    return ast.dump(node)


def _follow(target: tuple[str, str] | None, attributes: Sequence[str]) -> list[tuple[str, str]]:
    """The definition that an imported name refers to, as `(module, name)`.

    If the name is a module, `name` is the attribute that is read from it.
    """
    if target is None:
        return []
    module, name = target
    submodule = f"{module}.{name}" if name else module
    if module.partition(".")[0] in PROJECT_PACKAGES and (not name or _is_module(submodule)):
        return [(submodule, attributes[0])] if attributes else []
    return [(module, name)]


@cache
def _is_module(name: str) -> bool:
    return _source(name) is not None


@cache
def _source(module: str) -> Path | None:
    path = Path(__file__).parent.parent.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    source = _source(module)
    tree = ast.parse(source.read_text(encoding="utf-8") if source else "")
    # The list grows. `ast.walk` would visit expressions too, which have no docstring and take most of its time.
    statements: list[ast.AST] = [tree]
    for node in statements:
        inner = ast.stmt | ast.excepthandler | ast.match_case
        statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, inner)]
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            node.body[0] = ast.Pass()  # type: ignore[attr-defined]
    return tree


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """Functions, classes and constants of a module by name; a name that is assigned twice has both assignments."""
    found: dict[str, ast.AST] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Expr):
            # Code that runs when the module is imported may affect all its definitions.
            former = found.get(IMPORT_TIME)
            found[IMPORT_TIME] = node if former is None else ast.Tuple([former, node])  # type: ignore[list-item]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    former = found.get(target.id)
                    found[target.id] = node if former is None else ast.Tuple([former, node])  # type: ignore[list-item]
    return found


def _imports(scope: ast.AST) -> dict[str, tuple[str, str]]:
    """The names imported in a scope, and what each refers to: `(module, name)`, with an empty name for a whole module."""
    found: dict[str, tuple[str, str]] = {}
    nodes = scope.body if isinstance(scope, ast.Module) else ast.walk(scope)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, "") for alias in node.names if alias.asname}
    return found


def _names(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield every name used in a definition, with the attributes read from it: `a.b.c` gives ("a", "b", "c")."""
    for child in ast.walk(node):
        chain: list[str] = []
        part: ast.AST = child
        while isinstance(part, ast.Attribute):
            chain.append(part.attr)
            part = part.value
        if isinstance(part, ast.Name):
            yield (part.id, *reversed(chain))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value.isidentifier():
            # Annotations may be strings.
            yield (child.value,)
