"""Chat templates of the recipe: a model is served with the tokens it was trained on, also without its own template."""

import json

import pytest
from transformers import AutoTokenizer

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.errors import RequestError
from llm_engineering.formatting.render import prompt_ids, render
from llm_engineering.formatting.template_check import check_chat_template
from llm_engineering.models.base_model import load_model
from llm_engineering.models.chat_template import TEMPLATES, pin_chat_template, template_text
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer, set_chat_template
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from tests.tiny_models import formatted, instruction, prepared, train, write_model

SYSTEM = [{"role": "system", "content": "Be brief."}]
ASKED = [{"role": "user", "content": "What is it?"}]
TURNS = [*SYSTEM, *ASKED, {"role": "assistant", "content": "This."}, {"role": "user", "content": "Really?"}]

WRITTEN = {
    "alpaca": "Be brief.\n\n### Instruction:\nWhat is it?\n\n### Response:\nThis.<|endoftext|>"
    "\n\n### Instruction:\nReally?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nThis.<|endoftext|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n",
    "human_assistant": "Be brief.\n\n### Human:\nWhat is it?\n\n### Assistant:\nThis.<|endoftext|>"
    "\n\n### Human:\nReally?\n\n### Assistant:\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThis.<|endoftext|>"
    "<|start_header_id|>user<|end_header_id|>\n\nReally?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}

STEPS = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "eval_steps": 2,
}


@pytest.fixture
def model(base_model):
    return ModelConfig(name_or_path=str(base_model))


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_writes_a_conversation(model, settings, name):
    tokenizer = load_tokenizer(model, settings, name)
    assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == WRITTEN[name]
    check_chat_template(tokenizer)


def test_alpaca_without_a_system_message_has_its_own_preamble(model, settings):
    tokenizer = load_tokenizer(model, settings, "alpaca")
    asked = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert asked.startswith("Below is an instruction that describes a task.")
    assert asked.endswith("\n\n### Instruction:\nWhat is it?\n\n### Response:\n")


def test_a_template_writes_the_token_that_every_text_begins_with(model, settings):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(model, settings, "chatml")
    assert tokenizer.apply_chat_template(ASKED, tokenize=False).startswith("<|im_start|>user")
    begin = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[begin])
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(ASKED, tokenize=False).startswith("<|endoftext|><|im_start|>user")
    check_chat_template(tokenizer)


def test_a_model_without_a_template_is_a_request_error_that_names_the_choices(model, settings):
    with pytest.raises(RequestError, match="no chat template.*alpaca, chatml, human_assistant, llama3, or the path"):
        load_tokenizer(model, settings)


def test_own_templates_are_used_and_wrong_ones_refused(model, settings, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '>') }}{% endfor %}")
    formatting = pin_chat_template(FormattingConfig(chat_template=str(own)))
    assert formatting.chat_template == own.read_text()
    # A pinned template is its own text, so pinning it again changes nothing.
    assert pin_chat_template(formatting) == formatting
    check_chat_template(load_tokenizer(model, settings, formatting.chat_template))
    with pytest.raises(RequestError, match=r"no chat template alpacca\. .*alpaca, chatml"):
        template_text("alpacca")
    own.write_text("no mark")
    with pytest.raises(RequestError, match="is not a chat template"):
        template_text(str(own))
    for text, words in (
        ("{{ messages[0].content }", "cannot be used"),
        ("{{ raise_exception('no') }}", "cannot be used"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "only appends"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "end-of-turn"),
    ):
        with pytest.raises(RequestError, match=words):
            check_chat_template(load_tokenizer(model, settings, text))


def test_a_template_writes_the_same_date_every_day(model, settings):
    text = "{% for m in messages %}{{ m.role + strftime_now('%d %b %Y') + m.content + eos_token }}{% endfor %}"
    tokenizer = load_tokenizer(model, settings, text)
    check_chat_template(tokenizer)
    assert "strftime_now" not in tokenizer.chat_template
    fixed = tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert fixed.startswith("user26 Jul 2024What is it?")
    # Also with a tokenizer that was loaded otherwise.
    tokenizer.chat_template = text
    assert tokenizer.apply_chat_template(ASKED, tokenize=False) != fixed
    assert tokenizer.decode(prompt_ids([Message(**ASKED[0])], tokenizer)) == fixed
    with pytest.raises(RequestError, match="today's date"):
        load_tokenizer(model, settings, text.replace("'%d %b %Y'", "m.role"))


def test_the_recipe_can_name_the_date_that_a_template_writes(base_model, settings, tmp_path):
    """As Llama 3.2's template: it asks for the date where it can, and writes its own where it cannot."""
    text = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = 'never' %}{% endif %}"
        "{% for m in messages %}{{ m.role + day + m.content + eos_token }}{% endfor %}"
    )
    own = AutoTokenizer.from_pretrained(base_model)
    own.chat_template = text
    own.save_pretrained(tmp_path / "model")
    model = ModelConfig(name_or_path=str(tmp_path / "model"))
    dated = FormattingConfig.model_validate({"template_date": "2026-01-31"})
    # A job on another machine pins the template of its model.
    assert pin_chat_template(dated) == dated
    for formatting in (dated, dated.model_copy(update={"chat_template": text})):
        pinned = pin_chat_template(formatting, model, settings)
        assert pin_chat_template(pinned, model, settings) == pinned
        tokenizer = load_tokenizer(model, settings, pinned.chat_template)
        assert tokenizer.decode(prompt_ids([Message(**ASKED[0])], tokenizer)).startswith("user31 Jan 2026What is it?")
        # Also where a server has no such function.
        assert "strftime_now" not in tokenizer.chat_template
        tokenizer.save_pretrained(tmp_path / "adapter")
        saved = load_tokenizer(ModelConfig(name_or_path=str(tmp_path / "adapter")), settings)
        assert saved.chat_template == tokenizer.chat_template
    with pytest.raises(RequestError, match="template_date 2026-01-31 has no effect"):
        pin_chat_template(dated.model_copy(update={"chat_template": "alpaca"}), model, settings)
    # One of several templates
    several = load_tokenizer(model, settings)
    several.chat_template = {"default": text, "tool_use": text}
    set_chat_template(several, None)
    assert "26 Jul 2024" in several.apply_chat_template(ASKED, tokenize=False)


def test_the_pad_token_is_one_that_the_model_has(base_model, settings, tmp_path):
    plain = load_tokenizer(ModelConfig(name_or_path=str(base_model)), settings, "alpaca")
    assert plain.pad_token == plain.eos_token
    assert len(plain) == len(AutoTokenizer.from_pretrained(base_model))
    plain.add_tokens(["<|reserved_7|>"], special_tokens=True)
    plain.pad_token = None
    plain.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name_or_path=str(tmp_path)), settings)
    assert loaded.pad_token == "<|reserved_7|>"
    assert len(loaded) == len(plain)


def test_the_token_that_the_template_writes_after_an_answer_is_the_end_token(settings, tmp_path):
    """Gemma's tokenizer names `<eos>`, and its template writes `<end_of_turn>`."""
    gemma = ModelConfig(name_or_path=str(write_model(tmp_path, "gemma3")))
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<eos>"
    tokenizer = load_tokenizer(gemma, settings)
    check_chat_template(tokenizer)
    assert tokenizer.eos_token == "<end_of_turn>"
    assert tokenizer.pad_token != tokenizer.eos_token
    # The project's templates write the token that the tokenizer names. One without an end token is refused.
    assert load_tokenizer(gemma, settings, "alpaca").eos_token == "<eos>"
    without = load_tokenizer(gemma, settings, "{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    assert without.eos_token == "<eos>"
    with pytest.raises(RequestError, match="end-of-turn"):
        check_chat_template(without)


def test_preflight_names_what_is_missing(base_model):
    from llm_engineering.recipe.loading import load_recipe
    from tests.conftest import ROOT
    from tools.readiness import check_and_pin

    sets = [f"model.name_or_path={base_model}", "formatting.max_length=256"]
    with pytest.raises(RequestError, match="has no chat template.*alpaca"):
        check_and_pin(load_recipe(ROOT / "configs" / "python_reference.yaml", sets))
    recipe, _ = check_and_pin(
        load_recipe(ROOT / "configs" / "python_reference.yaml", [*sets, "formatting.chat_template=alpaca"])
    )
    assert recipe.setup.chat_template == template_text("alpaca")
    with pytest.raises(RequestError, match=r"sft\.method is qlora, which needs CUDA"):
        check_and_pin(
            load_recipe(ROOT / "configs" / "python_reference.yaml", ["sft.method=qlora", "compute.device=cpu"])
        )


def test_answers_end_with_the_model_s_tokens_and_with_the_trained_one(model, settings, cpu):
    from llm_engineering.models.device import choose_device

    loaded = load_model(model, settings, choose_device(cpu))
    tokenizer = load_tokenizer(model, settings, "alpaca")
    loaded.generation_config.eos_token_id = [5, 7]
    assert end_token_ids(loaded, tokenizer) == sorted({5, 7, tokenizer.eos_token_id})
    loaded.generation_config.eos_token_id = 5
    assert end_token_ids(loaded, tokenizer) == sorted({5, tokenizer.eos_token_id})


def test_a_model_with_no_template_and_no_pad_token_trains_and_is_served_as_it_was_trained(
    model, settings, cpu, tmp_path
):
    tokenizer = load_tokenizer(model, settings, "human_assistant")
    setup = TrainingSetup(
        model=model,
        max_length=256,
        chat_template="human_assistant",
        compute=cpu,
        tracking=TrackingConfig(comet="off"),
        seed=7,
    )
    data = formatted("instruction", 8, tokenizer, tmp_path)
    result = train(data, SFTConfig(**STEPS, packing=False), setup, settings)

    served = AutoTokenizer.from_pretrained(result.adapter)
    for row in map(instruction, range(8)):
        (trained,) = render([row], tokenizer)
        turns = [turn.model_dump() for turn in row.prompt]
        asked = served.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        answered = served.apply_chat_template(
            [*turns, *(turn.model_dump() for turn in row.completion)], return_dict=False
        )
        assert trained.input_ids[: len(asked)] == asked
        assert trained.labels == [-100] * len(asked) + trained.input_ids[len(asked) :]
        # What the template writes after the last end of turn is not trained.
        assert answered[: len(trained.input_ids)] == trained.input_ids
        assert served.decode(answered[len(trained.input_ids) :]).strip() == ""

    pairs = formatted("preference", 8, tokenizer, tmp_path)
    aligned = train(pairs, DPOConfig(**STEPS), setup, settings, start=result.adapter)
    assert AutoTokenizer.from_pretrained(aligned.adapter).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("apart", [True, False])
def test_padding_with_the_end_token_does_not_hide_the_end_of_answers(
    apart, model, settings, cpu, tmp_path, monkeypatch
):
    """The batches that the trainers make: the end of each answer is trained, the padding after it is not. Batches of SFT
    have none where the model keeps rows `apart`."""
    from llm_engineering.models.device import choose_device
    from llm_engineering.training import sft, training_run
    from llm_engineering.training.dpo import dpo_trainer
    from llm_engineering.training.policy import new_policy

    monkeypatch.setattr(training_run, "keeps_rows_apart", lambda policy, by_row: apart)
    tokenizer = load_tokenizer(model, settings, "alpaca")
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    device = choose_device(cpu)
    setup = TrainingSetup(
        model=model, max_length=256, chat_template="alpaca", compute=cpu, tracking=TrackingConfig(comet="off"), seed=7
    )
    data = formatted("instruction", 8, tokenizer, tmp_path)
    config = SFTConfig(**STEPS, packing=False)
    policy = new_policy(model, LoraConfig(), settings, device)
    trainer = sft.sft_trainer(prepared(data, config, setup, settings), policy, config)
    first = list(data["train"].select([0, 1]))
    assert all(row["labels"][-1] == end for row in first)
    longest = max(len(row["labels"]) for row in first)
    padding = [[] if apart else [-100] * (longest - len(row["labels"])) for row in first]
    expected = [label for row, after in zip(first, padding, strict=True) for label in row["labels"] + after]
    assert trainer.data_collator(first)["labels"].flatten().tolist() == expected

    pairs = formatted("preference", 8, tokenizer, tmp_path)
    config = DPOConfig(**STEPS)
    trainer = dpo_trainer(prepared(pairs, config, setup, settings), policy, config)
    batch = trainer.data_collator(list(pairs["train"].select([0, 1])))
    trained = [
        [token for token, mask in zip(ids, masks, strict=True) if mask]
        for ids, masks in zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True)
    ]
    expected = [pairs["train"][i][name] for name in ("chosen_ids", "rejected_ids") for i in (0, 1)]
    assert trained == expected
    assert all(ids[-1] == end for ids in trained)


def test_the_recipe_can_name_an_end_token_that_is_not_special(base_model, settings, tmp_path):
    plain = load_tokenizer(ModelConfig(name_or_path=str(base_model)), settings, "alpaca")
    plain.add_tokens(["[END]"], special_tokens=False)
    plain.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '[END]\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    plain.save_pretrained(tmp_path / "model")
    model = ModelConfig(name_or_path=str(tmp_path / "model"))
    with pytest.raises(RequestError, match="end"):
        check_chat_template(load_tokenizer(model, settings))
    named = load_tokenizer(model.model_copy(update={"eos_token": "[END]"}), settings)
    check_chat_template(named)
    (row,) = render([instruction(1)], named)
    trained = [token for token in row.labels if token != -100]
    assert trained[-1] == named.convert_tokens_to_ids("[END]") == named.eos_token_id
    # The tokenizer that is saved beside the adapter has it too.
    named.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(ModelConfig(name_or_path=str(tmp_path / "adapter")), settings).eos_token == "[END]"
    with pytest.raises(RequestError, match=r"model.eos_token <eot> is no token of .*special tokens are "):
        load_tokenizer(model.model_copy(update={"eos_token": "<eot>"}), settings)


# GLM's layout: nothing ends an answer, and the next turn begins with a mark at which the model stops.
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_an_answer_that_nothing_ends_gets_the_mark_of_the_next_turn_as_its_end(tmp_path, settings):
    folder = write_model(tmp_path, "phi3")
    (folder / "chat_template.jinja").write_text(OPEN_ENDED)
    model = ModelConfig(name_or_path=str(folder))
    with pytest.raises(RequestError, match="does not end its answer with the end-of-turn token"):
        check_chat_template(load_tokenizer(model, settings))
    ends = load_tokenizer(model, settings).convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    tokenizer = load_tokenizer(model, settings)
    assert tokenizer.eos_token == "<|user|>"
    check_chat_template(tokenizer)
    talk = (("user", "Hello"), ("assistant", "Hi"), ("user", "And?"), ("assistant", "Bye"))
    turns = [Message(role=role, content=content) for role, content in talk]
    row = InstructionRow(prompt=turns[:1], completion=turns[1:], source="s", origin="o")
    (rendered,) = render([row], tokenizer)
    trained = [label for label in rendered.labels if label != -100]
    assert tokenizer.decode(trained) == "Hi<|user|>Bye<|user|>"
    asked = prompt_ids(turns[:3], tokenizer)
    assert rendered.input_ids[: len(asked)] == asked

    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(ModelConfig(name_or_path=str(tmp_path / "saved")), settings)
    assert (saved.eos_token, saved.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)

    # Each of several named templates gets it.
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(OPEN_ENDED)
    named = load_tokenizer(model, settings)
    assert named.chat_template == dict.fromkeys(("default", "tool_use"), tokenizer.chat_template)
    check_chat_template(named)
