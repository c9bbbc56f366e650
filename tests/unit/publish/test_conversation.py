"""Streamed answers: what is printed is what is returned, and a conversation knows its limit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_engineering.data.rows import Message
from llm_engineering.models.device import choose_device
from llm_engineering.publish.conversation import Conversation

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


def test_what_is_printed_is_the_greedy_answer(folder, cpu, settings, capsys):
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False)
    messages = [user("Hi"), Message(role="assistant", content="Yes."), user("And?")]
    reply = conversation.answer(messages)
    assert capsys.readouterr().out.strip() == reply.text
    # By hand, without a cache: the most probable token, eight times or up to the end.
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
    # Of two opposite rows and zeros, one of the two wins, whatever the hidden state: both are end tokens.
    with torch.no_grad():
        weights = conversation.model.lm_head.weight
        weights.zero_()
        weights[5], weights[6] = 1.0, -1.0
    conversation.model.generation_config.eos_token_id = [5, 6]
    assert conversation.answer([user("Hi")]).stopped
    conversation.model.generation_config.eos_token_id = None
    assert not conversation.answer([user("Hi")]).stopped


def test_room_is_counted_with_the_answer(folder, cpu, settings):
    conversation = Conversation(folder, choose_device(cpu), settings, 8, trust_remote_code=False)
    length = len(conversation.tokenizer.encode("[user] Hi<|endoftext|>[assistant] "))
    conversation.model.config.max_position_embeddings = length + 8
    assert conversation.has_room([user("Hi")])
    conversation.model.config.max_position_embeddings = length + 7
    assert not conversation.has_room([user("Hi")])
