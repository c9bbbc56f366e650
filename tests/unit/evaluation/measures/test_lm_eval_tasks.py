"""lm-eval on a local task file, without a network."""

import functools
import importlib.util
import json

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.lm_eval_tasks import TaskResults, run_tasks, tasks_hash
from llm_engineering.evaluation.requirements import check_requirements
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, LmEvalConfig
from llm_engineering.recipe.model_blocks import ModelConfig

TASK = """
task: lamps
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one task. lm-eval knows no other, because it needs seconds to read the files of its own tasks."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Is lamp {number} lit?", "label": int(number < 5)} for number in range(8)]
    (folder / "lamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lamps.yaml").write_text(TASK.format(data=folder / "lamps.jsonl"))
    return folder


def test_a_local_task_is_measured_row_by_row(tasks, small_llama, cpu, settings):
    config = LmEvalConfig(tasks=["lamps"], include_path=str(tasks), limit=6)
    check_requirements(EvaluationConfig(lm_eval=config), settings)
    model = ModelConfig(name_or_path=str(small_llama), revision="test")
    tokenizer = load_tokenizer(model, settings, "chatml")
    found = run_tasks(load_model(model, settings, choose_device(cpu)), tokenizer, config, 4, 0)
    rows = found.rows["lamps"]
    assert len(rows.totals) == 6
    assert set(rows.totals) <= {0.0, 1.0}
    # The model gives every row the same answer. Five of the six rows have one label, the sixth has the other.
    assert rows.value in (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert rows.value == pytest.approx(found.scores["lamps"]["acc,none"])
    assert found.metrics == {"lamps": "acc"}
    assert found.better == {"lamps": "higher"}


def results(metric, samples, reported, direction):
    """The results of lm-eval for one task, with `samples` and `reported` scores by filter."""
    return {
        "results": {"t": {"alias": "t", **{f"{metric},{name}": value for name, value in reported.items()}}},
        "samples": {"t": [{"filter": name, metric: value} for name, values in samples.items() for value in values]},
        "configs": {"t": {"metric_list": [{"metric": metric}]}},
        "higher_is_better": {"t": {metric: direction}},
    }


def test_only_the_first_filter_gives_rows():
    found = TaskResults(
        results("m", {"strict": [1, 0, 0], "loose": [1, 1, 0]}, {"strict": 1 / 3, "loose": 2 / 3}, True)
    )
    assert list(found.rows["t"].totals) == [1, 0, 0]
    assert found.better == {"t": "higher"}


@pytest.mark.parametrize(("direction", "better"), [(True, "higher"), (False, "lower"), (None, None)])
def test_the_direction_is_that_of_the_metric(direction, better):
    assert TaskResults(results("m", {"none": [1.0]}, {"none": 1.0}, direction)).better == {"t": better}


def test_a_metric_that_is_not_a_mean_over_rows_has_no_rows():
    assert TaskResults(results("m", {"none": [1.0, 0.0]}, {"none": 0.7}, True)).rows == {}


def test_a_changed_task_file_changes_the_hash(tasks):
    config = LmEvalConfig(tasks=["lamps"], include_path=str(tasks))
    before = tasks_hash(config)
    (tasks / "lamps.jsonl").write_text("")
    assert tasks_hash(config) != before
    assert tasks_hash(config.model_copy(update={"include_path": None})) is None


def test_a_task_of_lm_eval_itself_is_known(settings):
    check_requirements(EvaluationConfig(lm_eval=LmEvalConfig(tasks=["hellaswag"])), settings)


def test_missing_folders_tasks_and_packages_are_refused(tasks, settings, monkeypatch):
    def refused(words, **keys):
        config = EvaluationConfig(lm_eval=LmEvalConfig(**{"tasks": ["lamps"], **keys}))
        with pytest.raises(RequestError, match=words):
            check_requirements(config, settings)

    refused("no such folder", include_path=str(tasks / "nowhere"))
    refused("knows no task lumps", include_path=str(tasks), tasks=["lamps", "lumps"])
    refused(r"knows no task lam\*", include_path=str(tasks), tasks=["lam*"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'llm-engineering\[eval\]'", include_path=str(tasks))
