"""What a model version comes from, on artifacts and steps made by hand."""

from types import SimpleNamespace

from tools.model_versions import versions


def test_the_model_in_production_is_no_origin_of_the_one_that_is_compared_with_it(monkeypatch):
    made_from = {
        "evaluation_report": {"sft_adapter": ["adapter 2"], "incumbent": ["adapter 1"]},
        "adapter 2": {"formatted_sft": ["documents 2"]},
        "adapter 1": {"formatted_sft": ["documents 1"]},
    }

    def artifact(name):
        return SimpleNamespace(id=name)

    def producer(made):
        given = made_from.get(made.id)
        return given and SimpleNamespace(inputs={key: list(map(artifact, names)) for key, names in given.items()})

    monkeypatch.setattr(versions, "producer", producer)
    found = versions.with_origins([artifact("evaluation_report"), artifact("adapter 2")])
    assert [made.id for made in found] == ["evaluation_report", "adapter 2", "documents 2"]
