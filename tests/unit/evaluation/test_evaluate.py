"""A whole evaluation of small models: the report, its page, and the model in production."""

import html
import json
import math

import pytest
import torch
from peft import PeftModel

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import Message
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.evaluate import evaluate
from llm_engineering.evaluation.gate import decide
from llm_engineering.evaluation.heldout import HeldOut, draw_indices, held_out, render_for_both
from llm_engineering.evaluation.measures.exam import Exam, ExamRow
from llm_engineering.evaluation.measures.observation import heldout_loss
from llm_engineering.evaluation.models import Models
from llm_engineering.evaluation.row_values import OTHER_ROWS, OTHER_TOKENS, UNKNOWN_ROWS, paired
from llm_engineering.formatting.columns import pieces
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.formatting.render import render, text_tokens
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, PromotionConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.reports.evaluation_report import evaluation_page
from llm_engineering.training.policy import new_policy, save_policy
from tests.tiny_models import instruction, pair, text


def with_long_words(row):
    """The row with words in its answer that the small tokenizer splits into letters."""
    answer = row.completion[0].content + "Mutable sequences."
    return row.model_copy(update={"completion": [Message(role="assistant", content=answer)]})


ROWS = [with_long_words(instruction(number)) for number in range(12)]
PAIRS = [pair(number) for number in range(6)]
CONFIG = EvaluationConfig(
    batch_size=4, sample_answers=2, generated_rows=5, max_new_tokens=6, bootstrap_samples=200, confidence=0.9
)


@pytest.fixture
def setup(small_llama, cpu):
    return TrainingSetup(
        model=ModelConfig(name_or_path=str(small_llama), revision="test"),
        max_length=256,
        chat_template="chatml",
        compute=cpu,
        tracking=TrackingConfig(comet="off"),
        seed=3,
    )


@pytest.fixture
def rows(setup, settings, tmp_path):
    return formatted_rows(setup, settings, tmp_path, FormattingConfig(max_length=256))


def formatted_rows(setup, settings, folder, formatting):
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    made = {}
    rows = {"instruction": rows_dataset(ROWS, "instruction"), "preference": rows_dataset(PAIRS, "preference")}
    for kind, dataset in rows.items():
        ledger = Ledger()
        ledger.record(kind, len(dataset), len(dataset))
        (folder / kind).mkdir()
        made[kind] = format_splits({"test": dataset}, kind, tokenizer, formatting, folder / kind, ledger)[0]["test"]
    return held_out(made, rows)


TEXTS = [text(number) for number in range(8)]


def text_rows(setup, settings, folder, max_length=64):
    """Held-out documents that are longer than `max_length`, and nothing else."""
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    dataset = rows_dataset(TEXTS, "text")
    ledger = Ledger()
    ledger.record("text", len(dataset), len(dataset))
    formatting = FormattingConfig(max_length=max_length)
    made = format_splits({"test": dataset}, "text", tokenizer, formatting, folder, ledger)[0]["test"]
    assert len(made) > len(dataset)
    return held_out({"text": made}, {"text": dataset})


def adapter(folder, setup, settings, size, template="chatml", model=None):
    """Save an adapter with its tokenizer, as training does. `size` is the standard deviation of its weights."""
    model = model or setup.model
    torch.manual_seed(1)
    policy = new_policy(model, LoraConfig(r=2), settings, choose_device(setup.compute))
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=size)
    save_policy(policy, model, folder)
    load_tokenizer(model, settings, template).save_pretrained(folder)
    return folder


def test_the_report_has_every_measure_of_every_model(setup, settings, rows, tmp_path):
    checks = tmp_path / "checks.jsonl"
    checks.write_text('{"prompt": "Why?", "must_contain": "because"}\n{"prompt": "What?", "regex": ".*"}\n')
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text('{"prefix": "The safe opens with", "secret": "48-29-13"}\n' * 2)
    config = CONFIG.model_copy(update={"checks": str(checks), "canaries": str(canaries)})
    adapters = {name: adapter(tmp_path / name, setup, settings, size) for name, size in (("sft", 0.1), ("dpo", 0.3))}
    adapters["incumbent"] = adapters["sft"]
    history = [{"step": step, "loss": 3.0 - step, "rewards/margins": 0.1 * step} for step in (1, 2)]
    training = {"stage": "dpo", "history": [*history, {"step": 2, "eval_loss": 1.5, "eval_rewards/margins": 0.1}]}
    report = evaluate(adapters, rows, config, setup, settings)
    # The step writes the report as JSON.
    assert json.loads(json.dumps(report)) == report
    assert report["models"] == ["base", "sft", "dpo", "incumbent"]
    assert (report["heldout_rows"], report["heldout_pairs"], report["left_out"]) == (12, 6, 0)
    expected = {
        "heldout_loss",
        "perplexity",
        "question_gain",
        "preference_accuracy",
        "preference_margin",
        "rouge_l",
        "stopped",
    }
    assert report["measures"].keys() == expected | {"repetition", "length_ratio", "empty", "checks", "canaries"}
    for key, measure in report["measures"].items():
        assert list(measure["models"]) == report["models"]
        assert list(measure["differences"]) == ["dpo-base", "dpo-sft", "dpo-incumbent"]
        for name, estimate in measure["models"].items():
            assert report["metrics"][f"{key}_{name}"] == estimate["value"]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        # The incumbent is the same adapter as the SFT model.
        assert measure["models"]["incumbent"] == measure["models"]["sft"]
        assert measure["differences"]["dpo-incumbent"] == measure["differences"]["dpo-sft"]
        difference = measure["differences"]["dpo-base"]
        assert difference["value"] == pytest.approx(
            measure["models"]["dpo"]["value"] - measure["models"]["base"]["value"], abs=1e-9
        )
    losses = report["measures"]["heldout_loss"]
    assert {estimate["n"] for estimate in losses["models"].values()} == {12}
    assert len({round(estimate["value"], 6) for estimate in losses["models"].values()}) == 3
    assert report["metrics"]["perplexity_dpo"] == pytest.approx(math.exp(report["metrics"]["heldout_loss_dpo"]))
    assert report["measures"]["rouge_l"]["models"]["base"]["n"] == 5
    # With random weights no answer ends: each has six tokens, and the references have known lengths.
    assert report["metrics"]["stopped_base"] == 0
    tokens = sum(
        sum(label != -100 for label in rows.rows[i].answers[0][1]) for i in draw_indices(rows.rows, 5, setup.seed)
    )
    assert report["metrics"]["length_ratio_base"] == pytest.approx(5 * 6 / tokens)
    assert report["metrics"]["checks_base"] == 0.5
    assert report["checks"]["passed"]["base"] == 1
    assert report["metrics"]["canaries_dpo"] == 0
    assert report["canaries"] == [{"prefix": "The safe opens with", "completed_by": []}] * 2
    assert len(report["samples"]) == 2
    assert report["samples"][0]["answers"].keys() == set(report["models"])

    page = evaluation_page(report, training)
    for words in (
        "What changed since the last promoted run",
        "dpo against base",
        "Training of dpo",
        "Own checks",
        "The safe opens with",
    ):
        assert words in page
    # One chart for each measure, one of the loss and one of the margin.
    assert page.count("<svg") == len(report["measures"]) + 2
    assert "<script" not in page
    assert 'src="' not in page
    # The answers are closed, and the reference of each is shown on demand. The first one is also the example of the page.
    assert page.count("<summary>Reference answer</summary>") == 3
    # This model never ends an answer.
    assert page.count("cut at 6 tokens") == 3 * len(report["models"])
    assert "2. " + html.escape(report["samples"][1]["prompt"]) + "</summary>" in page


def test_rows_of_one_document_are_resampled_together(setup, settings, tmp_path):
    made = [row.model_copy(update={"document": f"d{number // 3}"}) for number, row in enumerate(ROWS)]
    alone = formatted_rows(setup, settings, tmp_path, FormattingConfig(max_length=256))
    together = alone._replace(rows=[row._replace(row=own) for row, own in zip(alone.rows, made, strict=True)])
    first, second = (evaluate({}, rows, CONFIG, setup, settings)["measures"] for rows in (alone, together))
    assert (first["heldout_loss"]["clusters"], second["heldout_loss"]["clusters"]) == (12, 4)
    assert second["rouge_l"]["clusters"] <= 4
    for key in ("heldout_loss", "perplexity", "question_gain"):
        before, after = first[key]["models"]["base"], second[key]["models"]["base"]
        assert (before["value"], before["n"]) == (after["value"], after["n"])
        assert before["low"] != after["low"]
    # The pairs name no document.
    assert first["preference_margin"] == second["preference_margin"]
    assert first["preference_margin"]["clusters"] == 6


def test_an_equal_incumbent_on_its_own_base_measures_the_same(setup, settings, rows, tmp_path):
    """The incumbent's base model has the same weights in another folder, so it is loaded separately."""
    copy = setup.model.model_copy(update={"name_or_path": str(tmp_path / "copy"), "revision": "other"})
    load_model(setup.model, settings, choose_device(setup.compute)).save_pretrained(copy.name_or_path)
    load_tokenizer(setup.model, settings, "chatml").save_pretrained(copy.name_or_path)
    adapters = {
        "sft": adapter(tmp_path / "sft", setup, settings, 0.2),
        "incumbent": adapter(tmp_path / "incumbent", setup, settings, 0.2, model=copy),
    }
    report = evaluate(adapters, rows, CONFIG, setup, settings)
    assert report["left_out"] == 0
    # A measure of 0 in every row is a share, too.
    shares = {"preference_accuracy", "stopped", "empty", "repetition", "rouge_l"}
    for key, measure in report["measures"].items():
        difference = measure["differences"]["sft-incumbent"]
        assert difference["value"] == pytest.approx(0, abs=1e-5)
        # Equal shares have an interval around 0, which depends on the number of rows.
        assert difference["high"] == pytest.approx(-difference["low"], abs=1e-5)
        assert key in shares or difference["high"] == pytest.approx(0, abs=1e-5)


def test_the_incumbent_answers_with_its_own_template(setup, settings, rows, tmp_path):
    adapters = {
        "sft": adapter(tmp_path / "sft", setup, settings, 0.2),
        "incumbent": adapter(tmp_path / "incumbent", setup, settings, 0.2, template="human_assistant"),
    }
    report = evaluate(adapters, rows, CONFIG, setup, settings)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(adapters["incumbent"])), settings)
    base = load_model(setup.model, settings, choose_device(setup.compute))
    models = Models(base, {"it": adapters["incumbent"]}, tokenizer, batch_size=3)
    own = heldout_loss(
        models.scores("it", [(tokens.input_ids, tokens.labels) for tokens in render(ROWS, tokenizer)], "loss")
    ).value
    assert report["metrics"]["heldout_loss_incumbent"] == pytest.approx(own, abs=1e-5)
    assert report["metrics"]["heldout_loss_sft"] != pytest.approx(own, abs=1e-4)


def test_an_incumbent_with_another_tokenizer_is_measured_per_token_of_this_recipe(
    setup, settings, rows, tiny_model, tmp_path
):
    adapters = {"sft": adapter(tmp_path / "sft", setup, settings, 0.2), "incumbent": tiny_model}
    report = evaluate(adapters, rows, CONFIG, setup, settings)
    config = ModelConfig(name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(config, settings)
    models = Models(load_model(config, settings, choose_device(setup.compute)), {}, tokenizer, batch_size=3)
    scores = models.scores("base", [(tokens.input_ids, tokens.labels) for tokens in render(ROWS, tokenizer)], "loss")
    ours = sum(label != -100 for row in rows.rows for label in row.answers[0][1])
    assert sum(score.tokens for score in scores) < ours
    expected = -sum(score.log_prob for score in scores) / ours
    assert report["metrics"]["heldout_loss_incumbent"] == pytest.approx(expected, rel=1e-4)


def test_truncated_rows_are_compared_only_if_both_tokenizers_render_them_alike(setup, settings, tmp_path):
    # The third kind of answer is the longest, and is truncated.
    lengths = sorted(
        {len(row.answers[0][0]) for row in formatted_rows(setup, settings, tmp_path, FormattingConfig()).rows}
    )
    (tmp_path / "cut").mkdir()
    formatting = FormattingConfig(max_length=lengths[-1] - 3, over_long="truncate")
    rows = formatted_rows(setup, settings, tmp_path / "cut", formatting)
    cut = sum(row.cut for row in rows.rows) + sum(pair.cut for pair in rows.pairs)
    assert 0 < sum(row.cut for row in rows.rows) < len(rows.rows)
    same, _ = render_for_both(rows, load_tokenizer(setup.model, settings, "chatml"), 256)
    assert same == rows
    ours, theirs = render_for_both(rows, load_tokenizer(setup.model, settings, "human_assistant"), 256)
    assert ours.left_out == theirs.left_out == cut
    assert [row.row for row in ours.rows] == [row.row for row in theirs.rows]
    assert not any(row.cut for row in ours.rows)
    # Both have the same answers, after different prompts.
    answers = [
        [[label for label in row.answers[0][1] if label != -100] for row in side.rows] for side in (ours, theirs)
    ]
    assert answers[0] == answers[1]


def test_an_incumbent_without_its_base_model_is_an_error(setup, settings, rows, tmp_path):
    gone = ModelConfig(name_or_path=str(tmp_path / "gone"), revision="folder-1")
    load_model(setup.model, settings, choose_device(setup.compute)).save_pretrained(gone.name_or_path)
    load_tokenizer(setup.model, settings, "chatml").save_pretrained(gone.name_or_path)
    adapters = {
        "sft": adapter(tmp_path / "sft", setup, settings, 0.2),
        "incumbent": adapter(tmp_path / "incumbent", setup, settings, 0.2, model=gone),
    }
    with pytest.raises(WorkError, match="production cannot be measured .* has changed since the training"):
        evaluate(adapters, rows, CONFIG, setup, settings)
    (tmp_path / "gone").rename(tmp_path / "away")
    with pytest.raises(WorkError, match="gone of the trained model is missing"):
        evaluate(adapters, rows, CONFIG, setup, settings)


def test_rows_are_drawn_with_the_seed(rows):
    assert draw_indices(rows.rows, 5, 1) == draw_indices(rows.rows, 5, 1) != draw_indices(rows.rows, 5, 2)
    assert draw_indices(rows.rows, 99, 1) == list(range(12))


def test_a_run_that_ends_with_cpt_measures_documents(setup, settings, tmp_path):
    """There are no questions, so nothing is answered, and the page has one measure."""
    rows = text_rows(setup, settings, tmp_path)
    setup = setup.model_copy(update={"max_length": 64})
    adapters = {"cpt": adapter(tmp_path / "cpt", setup, settings, 0.3)}
    report = evaluate(adapters, rows, CONFIG, setup, settings)
    assert json.loads(json.dumps(report)) == report
    assert (report["models"], report["newest"]) == (["base", "cpt"], "cpt")
    assert (report["heldout_rows"], report["heldout_documents"], report["generated_rows"]) == (0, 8, 0)
    assert list(report["measures"]) == ["document_loss"]
    measure = report["measures"]["document_loss"]
    assert measure["better"] == "lower"
    assert {estimate["n"] for estimate in measure["models"].values()} == {len(TEXTS)}
    assert list(measure["differences"]) == ["cpt-base"]
    for name, folder in (("base", None), ("cpt", adapters["cpt"])):
        assert report["metrics"][f"document_loss_{name}"] == pytest.approx(
            document_loss(setup, settings, folder, 64), abs=1e-5
        )
    gate = PromotionConfig.model_validate(
        {"cpt": {"better_than": {"base": {"document_loss": 0.0}, "incumbent": {"document_loss": 0.0}}}}
    )
    decision = decide(report, gate, None)
    assert decision.candidate == "cpt"
    (base, incumbent) = decision.rules
    assert (base.measure, base.than, incumbent.verdict) == ("document_loss", "base", "skipped")
    assert base.value == pytest.approx(
        report["metrics"]["document_loss_base"] - report["metrics"]["document_loss_cpt"], abs=1e-9
    )
    assert base.low <= base.value <= base.high

    training = {"stage": "cpt", "history": [{"step": step, "loss": 3.0 - step} for step in (1, 2)]}
    page = evaluation_page(report, training)
    for words in ("Loss on held-out documents", "cpt against base", "Training of cpt", "8 held-out documents"):
        assert words in page
    assert page.count("<svg") == 2
    assert "NaN" not in page


def document_loss(setup, settings, folder, max_length, model=None, per=None):
    """The loss on the documents by the definition: of every piece alone, and of every token but the first of a piece.

    Args:
        folder: an adapter; None for the model itself.
        per: the number of tokens to divide by; by default those that are scored.
    """
    model = model or setup.model
    base = load_model(model, settings, choose_device(setup.compute))
    scored = base if folder is None else PeftModel.from_pretrained(base, folder)
    tokenizer = load_tokenizer(model, settings, setup.chat_template)
    total, count = 0.0, 0
    for tokens in text_tokens(TEXTS, tokenizer):
        for piece in pieces(tokens.input_ids, max_length):
            with torch.no_grad():
                logits = scored(torch.tensor([piece])).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
            count += len(piece) - 1
    return total / (per or count)


def test_an_incumbent_with_another_tokenizer_is_measured_on_the_same_documents(setup, settings, tiny_model, tmp_path):
    """Its loss is that of its own pieces, per token of this recipe's tokenizer."""
    rows = text_rows(setup, settings, tmp_path)
    setup = setup.model_copy(update={"max_length": 64})
    adapters = {"cpt": adapter(tmp_path / "cpt", setup, settings, 0.3), "incumbent": tiny_model}
    report = evaluate(adapters, rows, CONFIG, setup, settings)
    assert report["models"] == ["base", "cpt", "incumbent"]
    assert report["left_out"] == 0
    measure = report["measures"]["document_loss"]
    assert {estimate["n"] for estimate in measure["models"].values()} == {len(TEXTS)}
    ours = sum(len(piece) - 1 for row in rows.texts for piece, _ in row.answers)
    own = ModelConfig(name_or_path=str(tiny_model))
    expected = document_loss(setup, settings, None, 64, own, per=ours)
    assert report["metrics"]["document_loss_incumbent"] == pytest.approx(expected, rel=1e-4)
    assert expected < document_loss(setup, settings, None, 64, own)


def test_a_model_that_only_read_the_documents_takes_no_exam_beside_a_later_one(setup, settings, tmp_path):
    folder = adapter(tmp_path / "cpt", setup, settings, 0.1)
    exam = Exam([ExamRow(id=f"q{i}", question=f"Who is {i}?", answers=["Kell"]) for i in range(3)], [[]] * 3, 4)
    rows = HeldOut([], [])
    both = evaluate({"cpt": folder, "sft": folder}, rows, CONFIG, setup, settings, exam)
    assert both["exam"]["models"] == ["base", "sft"]
    assert evaluate({"cpt": folder}, rows, CONFIG, setup, settings, exam)["exam"]["models"] == ["base", "cpt"]


def test_the_page_begins_with_the_exam(setup, settings, rows, tmp_path):
    exam = Exam([ExamRow(id=f"q{i}", question=f"Who is {i}?", answers=["Kell"]) for i in range(3)], [[]] * 3, 4)
    folder = adapter(tmp_path / "sft", setup, settings, 0.1)
    report = evaluate({"sft": folder}, rows, CONFIG, setup, settings, exam)
    assert "Of 3 exam questions about one fact, the base model answers 0% right, and the SFT model 0%." in str(
        evaluation_page(report, None)
    )


def test_two_reports_differ_as_their_models_in_one_evaluation(setup, settings, rows, tmp_path):
    exam = Exam(
        [ExamRow(id=str(n), question=f"Where is {n}?", answers=["there"], facts=[f"f{n // 2}"]) for n in range(4)],
        [[]] * 4,
        4,
    )
    folders = {name: adapter(tmp_path / name, setup, settings, size) for name, size in (("sft", 0.1), ("dpo", 0.3))}
    both = evaluate(folders, rows, CONFIG, setup, settings, exam)
    reports = [evaluate({name: folder}, rows, CONFIG, setup, settings, exam) for name, folder in folders.items()]
    # Rows may come in another order.
    stored = reports[0]["row_values"]
    for values in (*stored["ids"].values(), *(found["totals"] for found in stored["measures"].values())):
        values.reverse()
    for found in stored["measures"].values():
        for name in ("weights", "clusters"):
            found.get(name, []).reverse()
    compared = paired(*reports)
    assert compared.keys() == both["measures"].keys()
    for key, measure in compared.items():
        assert measure["reason"] == ""
        assert measure["difference"] == pytest.approx(
            both["measures"][key]["differences"]["dpo-sft"], rel=1e-3, abs=1e-4
        )
    assert compared["heldout_loss"]["difference"]["low"] < compared["heldout_loss"]["difference"]["high"]

    fewer = evaluate({"dpo": folders["dpo"]}, rows._replace(rows=rows.rows[1:]), CONFIG, setup, settings)
    compared = paired(reports[0], fewer)
    assert (compared["heldout_loss"]["difference"], compared["heldout_loss"]["reason"]) == (None, OTHER_ROWS)
    assert compared["preference_margin"]["reason"] == ""
    reports[1]["row_values"]["measures"]["heldout_loss"]["weights"][0] += 1
    assert paired(*reports)["perplexity"]["reason"] == OTHER_TOKENS
    del reports[1]["row_values"]
    compared = paired(*reports)
    assert compared["heldout_loss"]["reason"] == UNKNOWN_ROWS
    # The exam has always been stored with each answer's mark.
    assert compared["exam_accuracy"]["difference"] is not None
