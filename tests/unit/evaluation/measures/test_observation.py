"""ROUGE-L and repetition against hand-computed values."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from llm_engineering.evaluation.measures.observation import repetition, rouge_l


def test_rouge_l_by_hand():
    # The longest common subsequence is "the sat on mat", 4 words of 5 and of 6: F1 = 2 * 4 / (5 + 6).
    assert rouge_l("The dog sat on mat.", "the cat sat on the mat") == pytest.approx(8 / 11)
    assert rouge_l("", "the cat") == 0
    assert rouge_l("?!", "the cat") == 0
    assert rouge_l("The cat", "the cat") == 1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("A list is a mutable sequence.", "Lists are mutable sequences, typically used to store items."),
        ("x = 3\ny = x + 4", "The value of y is 7, as x is 3."),
    ],
)
def test_english_scores_equal_those_of_the_library_tokenizer(answer, reference):
    plain = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Список изменяем", "Список это последовательность", 2 / 5),
        ("列表是可变的", "列表是序列", 2 * 3 / 11),
        ("Die größte Zahl", "die größte", 4 / 5),
        ("Gro\u0308ßte Zahl", "größte Zahl", 1.0),
        # These words share letters, and differ in their vowel signs. Without the signs they would be equal.
        ("कल", "काल", 0.0),
        ("किताब नई है", "कागज़ नई है", 2 / 3),
        ("ที่", "ทู่", 0.0),
    ],
)
def test_other_scripts_are_split_into_words(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0),
        ([1, 1, 1], 0),
        ([1, 2, 3, 4, 5, 6], 0),
        ([7] * 10, 6 / 7),  # seven equal 4-grams
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # five 4-grams, the last repeats the first
    ],
)
def test_repetition_by_hand(ids, share):
    assert repetition(ids) == pytest.approx(share)
