"""Writes a tokenizer to a GGUF file in such a way that llama.cpp finds the same tokens as transformers.

llama.cpp has tokenizers of its own, which a file selects by name: byte-level BPE with one of many pre-tokenizers, and the
BPE of SentencePiece, with bytes for unknown characters. A tokenizer that none of them reproduces is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gguf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llm_engineering.errors import RequestError

logger = logging.getLogger(__name__)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
_NFC = {"type": "NFC"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer that only looks like SentencePiece's would change: spaces, digits, compatible forms, unknown characters.
_PROBE = "Two  spaces,\ttabs\n\n and 1234 words: naïve café e\u0301 ﬁ ① Ａ 漢字 🦙 it's. "


class Kind(NamedTuple):
    """How llama.cpp tokenizes a text.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece.
        has_space_prefix: whether a space is put before each part of a text that begins after a special token.
    """

    model: str
    pre: str
    has_space_prefix: bool


def _split(words: str) -> list[dict[str, Any]]:
    """The pre-tokenizer of Llama 3, Qwen and Mistral's tekken: a regular expression that finds words, then bytes."""
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return [split, _BYTE_LEVEL | {"use_regex": False}]


# Steps, normalizers, and whether a whole word that is a token is used without merging. llama.cpp's qwen2 does not normalize,
# so a text in NFC has the same tokens, and another one may not. Its tekken splits words of scripts with combining marks, such
# as Devanagari and Thai, at other places.
_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...], bool]] = {
    "gpt-2": ([_BYTE_LEVEL], _NO_NORMALIZER, False),
    "smollm": ([_DIGITS, _BYTE_LEVEL], _NO_NORMALIZER, False),
    "llama-bpe": (_split(_WORDS % "{1,3}"), _NO_NORMALIZER, True),
    "smaug-bpe": (_split(_WORDS % "{1,3}"), _NO_NORMALIZER, False),
    "qwen2": (_split(_WORDS % ""), (*_NO_NORMALIZER, _NFC), False),
    "tekken": (_split(_CASED_WORDS), _NO_NORMALIZER, True),
}


def tokenizer_kind(
    tokenizer: PreTrainedTokenizerBase, name_of: Callable[[PreTrainedTokenizerBase], str] | None = None
) -> Kind:
    """Find the tokenizer of llama.cpp that gives the same tokens.

    Args:
        name_of: names the pre-tokenizer of any other byte-level BPE, as llama.cpp's converter does by the tokens of a text.

    Raises:
        RequestError: there is none.
    """
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    trimming = [token["content"] for token in parts["added_tokens"] if _is_trimming(token)]
    if trimming:
        raise refusal(f"its tokens {', '.join(trimming[:5])} take the spaces around them, and llama.cpp's do not")
    model = parts["model"]
    # GGUF files of byte-level tokenizers are loaded with `byte_fallback`, too, but without its tokens.
    if model["type"] == "BPE" and model["byte_fallback"] and "<0x00>" in model["vocab"]:
        _check_merges(parts)
        return Kind("llama", "default", _has_space_prefix(tokenizer, parts))
    before = parts["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, (known, normalizers, skips_merges) in _PRE_TOKENIZERS.items():
        same = steps == known and parts["normalizer"] in normalizers and model.get("ignore_merges") == skips_merges
        if model["type"] == "BPE" and same:
            return Kind("gpt2", name, False)
    if name_of is not None and model["type"] == "BPE" and any(step.get("type") == "ByteLevel" for step in steps):
        return Kind("gpt2", name_of(tokenizer), False)
    raise refusal(
        f"its tokenizer has the model {model['type']} (ignore_merges: {model.get('ignore_merges')}), the normalizer {json.dumps(parts['normalizer'])[:200]} and the "
        f"pre-tokenizer {json.dumps(steps)[:200]}, but only those of {', '.join(_PRE_TOKENIZERS)} and SentencePiece's BPE "
        "are supported"
    )


def refusal(
    reason: str, remedy: str = "Export it as safetensors and convert it with llama.cpp's convert_hf_to_gguf.py."
) -> RequestError:
    """The error for a model that is not written, with the reason."""
    return RequestError(f"This model cannot be written as GGUF here: {reason}. {remedy}")


def _is_trimming(token: dict[str, Any]) -> bool:
    return bool(token["lstrip"] or token["rstrip"] or token["single_word"])


def _check_merges(parts: dict[str, Any]) -> None:
    """Check that any two tokens that make up a third one can be merged, as in SentencePiece, whose files list no merges.

    Raises:
        RequestError: some cannot, as in a tokenizer that another library trained.
    """
    added = {token["content"] for token in parts["added_tokens"]}
    vocabulary = parts["model"]["vocab"].keys() - added
    merges = {tuple(pair) for pair in parts["model"]["merges"]}
    for token in vocabulary & {left + right for left, right in merges}:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in merges:
                raise refusal(
                    f"its tokenizer has bytes for unknown characters like SentencePiece's, but no merge of {pair[0]} and "
                    f"{pair[1]}, and llama.cpp would merge them",
                    "llama.cpp has no tokenizer of this kind. Export it as safetensors.",
                )


def _has_space_prefix(tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any]) -> bool:
    """Whether llama.cpp has to put spaces before the parts of a conversation to find the tokens of transformers.

    transformers has further rules, such as a space only at the start of a text. A conversation mostly starts with a special
    token, so that this rule adds no space to it.
    """
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else _PROBE
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    for prefixes in ([], [{"type": "Prepend", "prepend": "▁"}]):
        rule = {"type": "Sequence", "normalizers": [*prefixes, replace]}
        same = Tokenizer.from_str(json.dumps(parts | {"normalizer": rule, "pre_tokenizer": None}))
        if same.encode(text, add_special_tokens=False).ids == tokens:
            return bool(prefixes)
    raise refusal(
        "its tokenizer is like SentencePiece's, but gives a conversation other tokens than llama.cpp's, because of the "
        f"normalizer {json.dumps(parts['normalizer'])[:200]} or the pre-tokenizer {json.dumps(parts['pre_tokenizer'])[:200]}",
        "If it puts a space only before the first word of a text, train with a chat template that begins with the token "
        "that begins a text, e.g. formatting.chat_template: alpaca. Otherwise, export it as safetensors.",
    )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, kind: Kind, size: int) -> None:
    """Write the tokens, the special tokens and the chat template. `size` is the number of rows of the embedding."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    merges = parts["model"]["merges"]
    writer.add_tokenizer_model(kind.model)
    writer.add_tokenizer_pre(kind.pre)
    if kind.model == "llama":
        for index, token in tokens.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[index] = gguf.TokenType.BYTE
        # SentencePiece merges the pair whose token has the highest score.
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(tokens.get(index, ""), len(merges))) for index in range(size)])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for token in parts["added_tokens"]:
        index = token["id"]
        types[index] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        if kind.model == "llama" and not token["special"]:
            # llama.cpp looks for these tokens in the text before it replaces the spaces.
            tokens[index] = token["content"].replace("▁", " ")
    # The embedding may have more rows than there are tokens.
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    # llama.cpp does not add it to a conversation whose template writes it.
    has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    writer.add_add_bos_token(has_bos)
    writer.add_add_space_prefix(kind.has_space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_further_ends(writer: gguf.GGUFWriter, ends: Sequence[int], end: int) -> None:
    """Write the end tokens beside the tokenizer's own. The format has a field for the end of a turn and of a message."""
    further = [token for token in ends if token != end]
    for token, add in zip(further, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    if len(further) > 2:
        logger.warning("GGUF has fields for three end tokens, and the model has more. Left out: %s", further[2:])
