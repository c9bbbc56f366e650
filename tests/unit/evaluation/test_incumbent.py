"""Whether the model in production can be measured beside the new ones."""

from llm_engineering.evaluation.incumbent import is_compatible
from tests.tiny_models import tiny_tokenizer, training_setup


def test_an_incumbent_with_another_end_token_is_measured_alone(tmp_path):
    """Templates write the end token by its name, so their text is the same."""
    tokens = ("<s>", "<e>", "<end>")
    ours, own = (tiny_tokenizer(tokens, "{{ eos_token }}") for _ in range(2))
    setup = training_setup(tmp_path, max_length=64)
    assert is_compatible(tmp_path, own, ours, setup)
    own.eos_token = "<e>"
    assert not is_compatible(tmp_path, own, ours, setup)
