"""Rules about generated questions, on questions as models write them."""

import pytest

from llm_engineering.generation.instructions import instruction_problem
from llm_engineering.generation.question_rules import is_contentless, points_at_text

# The first group was written by the embedded model about the embedded documents.
POINTING = [
    "What is the output of the following code snippet?",
    "What is the output of this code?",
    "What is the result of the following expression?",
    'What is the meaning of "nonlocal" in the context of the topic "nonlocal"?',
    "What is the sequence pattern of the given text?",
    "What is the result of the following special method lookup?",
    'What is the purpose of the "if" statement in the context of the given text?',
    'What is the purpose of the "len(s)" in the above code?',
    'What is the meaning of "this" in this context?',
    "What is the operator precedence of the following operators?",
    'What is the purpose of the "x in y" expression in the context of the given code?',
    "What is the output of this assignment?",
    "What is the pattern of this?",
    "What is the passage about?",
    "According to the passage, who founded the mill?",
    "What does the text say about the warranty of the pump?",
    "In the given text, how long does delivery take?",
    "How is the boiler described in the paragraph?",
    "What is the main idea of the text?",
    "Based on the context, when does the office open?",
    "Based on the information provided, what is the price of a licence?",
    "Which of the following is part of the service contract?",
    "What does the author recommend for cleaning the filter?",
    "According to the author, what causes most faults?",
    "What is the purpose of this section?",
    "What is mentioned in the excerpt as the cause of the fault?",
    "Which tool is used in the example above?",
    "What steps are listed below for resetting the router?",
    "How does this function return its value?",
    "What does the document say about holidays?",
    "What is the subject of the sentence?",
    "What is the price of the heater, as stated above?",
    "Explain what this paragraph says about refunds.",
    "What does the article state about the merger of the two firms?",
]
CONTENTLESS = [
    "What is the answer to this question?",
    'What is the answer to this question: "What is the answer to this question?"',
    "What is the correct answer to the question?",
    "What is your next question about this?",
    "What would you like to know about this topic?",
    "Can you please answer this question?",
    "What is the main idea of it?",
]
GOOD = [
    'What is the purpose of the "nonlocal" statement in the context of the "nonlocal" statement?',
    'What is the purpose of the "quote" in the context of a literal?',
    "What is the format of the text that is being edited?",
    'What is the type of the object "True" in the context of Boolean logic?',
    "What is the purpose of the specialname in the context of a class?",
    "What is the purpose of the `continue` statement?",
    "What is a bootloader in the context of firmware?",
    "How is a rollback done in the context of firmware updates?",
    "What does the text field of the order form hold?",
    "What is a passage of arms?",
    "How wide is the passage between the two halls?",
    "What does section 4 of the contract require?",
    "Which article of the statutes names the board?",
    "How long must an invoice document be kept?",
    "Who signs the document before delivery?",
    "What happens above 70 degrees in the boiler?",
    "Which valves are below the water line?",
    "What happened on the following day of the strike?",
    "What is the given name of the founder of Ondrel?",
    "What does the method return if the given key is missing?",
    "What does the author of the handbook recommend?",
    "Who is the author of the safety handbook?",
    "How many people attended the example lesson in Oskby?",
    "What is the code of conduct for drivers?",
    "What should I do if I forget the code of the alarm?",
    "How long is the sentence for tax fraud?",
    "Which questions does the support team answer first?",
    "What is the topic of the yearly meeting?",
    "How much vanilla extract goes into the dough?",
    "When was the previous version of the pump sold?",
    "How are text messages billed abroad?",
    "Who answers questions about holidays?",
    "What is the content of the first aid box?",
    "What is the meaning of the red lamp?",
]


def test_no_verdict_about_a_real_question_is_wrong():
    missed = [question for question in POINTING if not points_at_text(question)]
    missed += [question for question in CONTENTLESS if not is_contentless(question)]
    wrongly_found = [question for question in GOOD if points_at_text(question) or is_contentless(question)]
    assert len(POINTING) + len(CONTENTLESS) + len(GOOD) == 75
    assert (missed, wrongly_found) == ([], [])


@pytest.mark.parametrize(
    ("questions", "reason"), [(POINTING, "mentions_passage"), (CONTENTLESS, "contentless"), (GOOD, "")]
)
def test_such_a_question_is_set_aside_by_name(questions, reason):
    # Each passage holds the words of its question, so that no question is set aside as `not_grounded`.
    for question in questions:
        style = "question" if question.endswith("?") else "task"
        # "According to the passage, who ...?" does not even begin like a question.
        expected = reason if style == "task" or question.split()[0] not in ("According", "Based") else "not_a_question"
        assert instruction_problem(question, question, style) == expected, question
