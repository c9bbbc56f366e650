"""Answers of a merged model: printed and returned alike, greedy or sampled, within the model's context."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.models.device import choose_device
from llm_engineering.publish.conversation import ChatSampling, Conversation, check_system

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def folder(small_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(small_llama).save_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def user(text):
    return Message(role="user", content=text)


def test_the_printed_answer_is_the_greedy_answer(folder, cpu, settings, capsys):
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False)
    messages = [user("Hi"), Message(role="assistant", content="Yes."), user("And?")]
    reply = conversation.answer(messages)
    assert capsys.readouterr().out.strip() == reply.text
    # Computed without a cache: the most probable token, eight times or until the end token.
    model, tokenizer = conversation.model, conversation.tokenizer
    ids = tokenizer.encode("[user] Hi<|endoftext|>[assistant] Yes.<|endoftext|>[user] And?<|endoftext|>[assistant] ")
    new = []
    while len(new) < 8 and tokenizer.eos_token_id not in new:
        with torch.inference_mode():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert reply.stopped == (new[-1] == tokenizer.eos_token_id)


def test_a_model_that_ends_has_stopped(folder, cpu, settings):
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False)
    # With two opposite rows and zeros elsewhere, one of the two tokens is always the most probable. Both are end tokens.
    with torch.no_grad():
        weights = conversation.model.lm_head.weight
        weights.zero_()
        weights[5], weights[6] = 1.0, -1.0
    conversation.model.generation_config.eos_token_id = [5, 6]
    assert conversation.answer([user("Hi")]).stopped
    conversation.model.generation_config.eos_token_id = None
    assert not conversation.answer([user("Hi")]).stopped


def test_room_includes_the_answer(folder, cpu, settings):
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False)
    length = len(conversation.tokenizer.encode("[user] Hi<|endoftext|>[assistant] "))
    conversation.model.config.max_position_embeddings = length + 8
    assert conversation.has_room([user("Hi")])
    conversation.model.config.max_position_embeddings = length + 7
    assert not conversation.has_room([user("Hi")])


def sampled(folder, cpu, settings, **sampling):
    checked = ChatSampling.checked(sampling.get("temperature", 0.0), sampling.get("top_p", 1.0), sampling.get("seed"))
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False, sampling=checked)
    return [conversation.answer([user("Hi")]).text for _ in range(2)]


def test_the_same_seed_gives_the_same_answer(folder, cpu, settings):
    first, again = sampled(folder, cpu, settings, temperature=1.0, seed=1)
    assert first == again == sampled(folder, cpu, settings, temperature=1.0, seed=1)[0]
    assert len({sampled(folder, cpu, settings, temperature=1.0, seed=seed)[0] for seed in range(4)}) > 1
    # Without one, another is drawn for each conversation.
    assert len({ChatSampling.checked(1.0, 1.0, None).seed for _ in range(4)}) > 1


def test_greedy_is_the_default_and_the_limit_of_little_temperature_or_mass(folder, cpu, settings):
    (greedy, again) = sampled(folder, cpu, settings)
    assert greedy == again
    assert sampled(folder, cpu, settings, temperature=1e-8, seed=3) == [greedy, greedy]
    assert sampled(folder, cpu, settings, temperature=1.0, top_p=1e-6, seed=3) == [greedy, greedy]


def test_a_top_k_of_the_model_is_ignored(folder, cpu, settings):
    conversation = Conversation(
        folder, choose_device(cpu), settings, 8, trust_remote_code=False, sampling=ChatSampling(1.0, 1.0, 5)
    )
    free = conversation.answer([user("Hi")]).text
    conversation.model.generation_config.top_k = 1
    assert conversation.answer([user("Hi")]).text == free


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((-0.1, 1.0, None), "--temperature must be 0"),
        ((float("nan"), 1.0, None), "--temperature must be 0"),
        ((0.7, 0.0, None), "--top-p must be more than 0"),
        ((0.7, 1.1, None), "--top-p must be more than 0"),
        ((0.0, 0.9, None), "--top-p has no effect at temperature 0"),
    ],
)
def test_invalid_sampling_is_refused(given, words):
    with pytest.raises(RequestError, match=words):
        ChatSampling.checked(*given)


def test_a_template_without_a_place_for_a_system_message_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [Message(role="system", content="Be brief."), user("Hi")]
    check_system(messages, tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'")
    with pytest.raises(RequestError, match="does not include system messages"):
        check_system(messages, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    with pytest.raises(RequestError, match="does not include system messages"):
        check_system(messages, tokenizer)
