"""Texts are compared without regard to the Unicode form in which they are written."""

import unicodedata

import pytest

from llm_engineering.data.examine import language_of
from llm_engineering.data.formats.conversations import BadRowError
from llm_engineering.data.formats.known_formats import PREFERENCE_FORMATS
from llm_engineering.data.rows import (
    SPLITS,
    InstructionRow,
    Message,
    folded,
    normalised,
    split_of,
    with_held_out_documents,
    words,
)
from llm_engineering.data.similarity import EvaluationIndex
from llm_engineering.data.wording import mention_of_passage, refusal, unfinished
from llm_engineering.recipe.data_blocks import SplitConfig

TEXTS = [
    "Où se trouve le théâtre de la forêt brûlée près de l’église Saint-André à Évreux?",
    "Đường phố Hà Nội có bao nhiêu cây cầu bắc qua sông Hồng và những cầu nào cũ?",
    "किताब में कौन-सी कहानी सबसे लंबी है और उसे किसने लिखा?",
    "서울에서 가장 오래된 다리의 이름은 무엇입니까?",
    "ห้องสมุดเปิดกี่โมงในวันเสาร์",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_all_unicode_forms_of_a_text_have_the_same_words(text, form):
    assert words(unicodedata.normalize(form, text)) == words(text)
    index = EvaluationIndex(13)
    index.add_text(text)
    question = Message(role="user", content=unicodedata.normalize(form, text))
    row = InstructionRow(prompt=[question], completion=[Message(role="assistant", content="?")], source="", origin="")
    assert index.match(row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
        ("الْكِتَابُ جَدِيدٌ", ["الْكِتَابُ", "جَدِيدٌ"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ｆｕｌｌ　ｗｉｄｔｈ ﬁle", ["full", "width", "file"]),
        ("می\u200cخواهم ab\u00adcd", ["میخواهم", "abcd"]),
        ("が か\u3099", ["が", "が"]),
        ("snake_case it's 3.5", ["snake_case", "it", "s", "3", "5"]),
    ],
)
def test_marks_belong_to_their_word(text, expected):
    assert words(text) == [unicodedata.normalize("NFKC", word) for word in expected]


def test_texts_of_punctuation_are_compared_in_one_form():
    # The Greek question mark is the semicolon, written otherwise.
    assert normalised(";") == ""
    assert folded([Message(role="user", content="\u037e")]) == folded([Message(role="user", content=";")])


def test_rules_recognise_decomposed_words():
    def decomposed(text: str) -> str:
        return unicodedata.normalize("NFD", text)

    assert refusal(decomposed("Désolé, je ne peux pas vous aider."))
    assert unfinished(decomposed("Le café est fermé. Il ouvre après la fête de la")) == "ends within a sentence"
    assert mention_of_passage(decomposed("Quelle est l'idée principale selon le texte précédent?"))
    assert language_of(decomposed("Où est le théâtre? Il était près de l'église brûlée, à côté de la forêt.")) == "fr"


def test_pairs_whose_prompt_is_repeated_in_another_form_are_read():
    def conversation(form: str, answer: str) -> list[dict[str, str]]:
        question = unicodedata.normalize(form, "Où est le café?")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    pair = {"chosen": conversation("NFC", "Là."), "rejected": conversation("NFD", "Je sais.")}
    read = PREFERENCE_FORMATS["chosen-rejected"].read(pair)
    assert [turn.content for turn in read["chosen"] + read["rejected"]] == ["Là.", "Je sais."]
    read = PREFERENCE_FORMATS["prompt-chosen-rejected"].read(
        {"prompt": unicodedata.normalize("NFD", "Où est le café?")} | pair
    )
    assert len(read["prompt"]) == 1
    with pytest.raises(BadRowError):
        PREFERENCE_FORMATS["prompt-chosen-rejected"].read({"prompt": "Où est le cafe?"} | pair)


@pytest.mark.parametrize(("count", "without", "still"), [(4, 91, 32), (8, 66, 6), (15, 41, 1), (50, 2, 0)])
def test_few_documents_have_one_in_each_held_out_split(count, without, still):
    config = SplitConfig(validation_fraction=0.1, test_fraction=0.1)
    folders = [[f"{folder}/{number}.md" for number in range(count)] for folder in range(100)]
    found = [with_held_out_documents(config, names) for names in folders]
    complete = [{split_of(name, config) for name in names} == set(SPLITS) for names in folders]
    assert complete.count(False) == without
    # A folder whose splits all have a document stays as it is, and one that would lose half of its documents.
    assert all(raised == config for raised, full in zip(found, complete, strict=True) if full)
    mended = [{split_of(name, raised) for name in names} for names, raised in zip(folders, found, strict=True)]
    assert [sides == set(SPLITS) for sides in mended].count(False) == still
    assert all(raised.test_fraction + raised.validation_fraction <= 0.5 for raised in found)
