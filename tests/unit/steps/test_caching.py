"""A step's version changes if the code that it calls changes, and only then."""

import textwrap
from pathlib import Path

import pytest

from llm_engineering.recipe.stages import STAGES

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A separate project: four steps in `steps`, and their functions in `llm_engineering`."""
    from steps import caching

    (tmp_path / "llm_engineering").mkdir()
    (tmp_path / "steps").mkdir()
    files = {
        "llm_engineering/sub.py": """
            LIMIT = 3
            def helper(x):
                return x + LIMIT
            def unrelated(x):
                return x
            class Rule:
                def judge(self, x):
                    return helper(x)
            """,
        "llm_engineering/work.py": """
            from llm_engineering import sub
            from llm_engineering.sub import Rule as Judge
            def a(x):
                '''What it does.'''
                return sub.helper(x)
            def b(x):
                from llm_engineering.sub import unrelated
                return unrelated(x)  # a remark
            def c(x):
                return Judge().judge(x)
            def d(x: "Judge"):
                return x
            """,
        "steps/s.py": """
            from llm_engineering.work import a, b, c, d
            def step_a(x):
                return a(x)
            def step_b(x):
                return b(x)
            def step_c(x):
                return c(x)
            def step_d(x):
                return d(x)
            """,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(caching, "__file__", str(tmp_path / "steps" / "caching.py"))

    def forget():
        for cached in (
            caching._source,
            caching._tree,
            caching._definitions,
            caching._is_module,
            caching._used,
            caching._version,
        ):
            cached.cache_clear()

    def versions():
        forget()
        return {name: caching.code_version("steps.s", f"step_{name}") for name in "abcd"}

    def edit(name, old, new):
        path = tmp_path / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    yield versions, edit
    forget()


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("llm_engineering/sub.py", "x + LIMIT", "x - LIMIT", "acd"),
        ("llm_engineering/sub.py", "LIMIT = 3", "LIMIT = 4", "acd"),
        ("llm_engineering/sub.py", "return helper(x)", "return helper(x + 1)", "cd"),
        ("llm_engineering/sub.py", "def unrelated(x):\n    return x", "def unrelated(x):\n    return -x", "b"),
        ("llm_engineering/work.py", "return sub.helper(x)", "return -sub.helper(x)", "a"),
        ("llm_engineering/work.py", "# a remark", "# another", ""),
        ("llm_engineering/work.py", "What it does", "What it does now", ""),
    ],
)
def test_a_change_affects_only_the_steps_that_use_it(project, file, old, new, changed):
    versions, edit = project
    before = versions()
    edit(file, old, new)
    after = versions()
    assert "".join(name for name in "abcd" if before[name] != after[name]) == changed


def test_steps_reach_the_code_that_decides_their_result():
    from steps.caching import reachable

    training = reachable("steps.training", "train") | reachable(*STAGES["sft"].train)
    assert "llm_engineering.training.arguments.training_arguments" in training
    assert "llm_engineering.training.telemetry.work.TelemetryCallback" in training
    # The step imports this one inside its function.
    assert "llm_engineering.training.processes.launch.launch_training" in training
    assert "llm_engineering.recipe.stage_blocks.SFTConfig" in training
    assert "llm_engineering.recipe.stage_blocks.DPOConfig" not in training
    assert not any("recipe.stages" in name for name in training)
    assert not any(".documents." in name or ".generation." in name for name in training)
    assert "llm_engineering.generation.instructions.instruction_problem" in reachable(
        "steps.data", "generate_instructions"
    )


def test_every_import_can_be_followed_by_the_hash():
    """With `import llm_engineering.x` without `as`, the hash could not see the names that are used from it."""
    for folder in ("llm_engineering", "steps"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = file.read_text().splitlines()
            bad = [line for line in lines if line.strip().startswith(("import llm_engineering", "import steps"))]
            assert not any(" as " not in line for line in bad), file


@pytest.mark.parametrize(
    "library", ["accelerate", "bitsandbytes", "jinja2", "lm-eval", "pypdf", "tokenizers", "transformers", "unsloth"]
)
def test_another_version_of_a_library_is_another_step(library, project, monkeypatch):
    from steps import caching

    versions, _ = project
    before = versions()
    real = caching.importlib.metadata.version
    monkeypatch.setattr(caching.importlib.metadata, "version", lambda name: "0.0.1" if name == library else real(name))
    after = versions()
    assert all(before[name] != after[name] for name in before)
