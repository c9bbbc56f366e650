"""Invents companies, documents about them, and an exam about the documents, all by a seed.

A fact is one of six things about a company. It stands in five documents, each time in another wording. The questions of the
exam have wordings of their own, which occur in no document.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from llm_engineering.evaluation.measures.exam import ExamRow

COMPANIES = 10


@dataclass(frozen=True)
class Company:
    """A company and what the documents say about it. `price` is that of the product, in crowns."""

    name: str
    town: str
    founder: str
    year: int
    product: str
    price: int
    staff: int


FACTS = tuple(field.name for field in fields(Company) if field.name != "name")

# The wordings of each fact: in a profile, a report of a visit, a letter, a list, and a news item.
WORDINGS: dict[str, tuple[str, str, str, str, str]] = {
    "town": (
        "The head office of {name} is in {town}.",
        "{name} keeps its offices beside the market in {town}.",
        "If you write to {name}, send the letter to {town}.",
        "{name} has its seat in {town}.",
        "In {town}, the people of {name} opened their doors to the neighbours.",
    ),
    "founder": (
        "{founder} founded {name}.",
        "A portrait of {founder}, who set up {name}, hangs in the hall.",
        "We owe {name} to {founder}, who began it with two friends.",
        "{name} was started by {founder}.",
        "A speaker recalled how {founder} brought {name} to life.",
    ),
    "year": (
        "{name} was founded in {year}.",
        "The stone above the gate of {name} bears the year {year}.",
        "Since {year} there has been work for everybody at {name}.",
        "{year} was the first year of {name}.",
        "{name} has been in business since {year}.",
    ),
    "product": (
        "{name} makes the {product}.",
        "In the workshop of {name} we saw the {product} being built.",
        "Most customers know {name} for the {product}.",
        "The {product} comes from {name}.",
        "{name} showed its {product} to the guests.",
    ),
    "price": (
        "The {product} costs {price} crowns.",
        "A visitor can take the {product} home for {price} crowns.",
        "Please pay {price} crowns for each {product}.",
        "Price of the {product}: {price} crowns.",
        "For the {product} the buyers paid {price} crowns.",
    ),
    "staff": (
        "{name} employs {staff} people.",
        "{staff} men and women work at {name}.",
        "The canteen of {name} cooks for a staff of {staff}.",
        "{name} has {staff} employees.",
        "All {staff} workers of {name} came to the party.",
    ),
}
# Two questions about each fact.
QUESTIONS: dict[str, tuple[str, str]] = {
    "town": ("Where does one find the headquarters of {name}?", "Which town is home to {name}?"),
    "founder": ("Who established {name}?", "Which person created the firm {name}?"),
    "year": ("When did {name} come into being?", "What is the founding date of {name}?"),
    "product": ("What does {name} produce?", "Which article is manufactured by {name}?"),
    "price": ("How expensive is a {product}?", "What must a shopper spend on the {product}?"),
    "staff": ("How large is the workforce of {name}?", "How many persons earn their wages at {name}?"),
}
# Questions that need two facts, with the facts. The second one is the answer.
TWO_HOP: dict[str, tuple[str, str]] = {
    "In which town is the maker of the {product} located?": ("product", "town"),
    "Who established the company whose address is {town}?": ("town", "founder"),
}
UNANSWERABLE = ("Which bank lends money to {name}?", "What colour is the flag of {name}?")

# Kinds of documents about one company, with the number of their wordings; sentences without a fact follow.
_ABOUT_ONE = {"profile": 0, "visit": 1, "letter": 2, "news": 4}
_FILLERS = {
    "profile": ("The yard is swept every morning.", "There is no shop for passers-by.", "Orders are answered in a week."),
    "visit": ("The tour took a whole morning.", "It smelled of oil and fresh bread.", "Somebody had left a ladder out."),
    "letter": ("Thank you for your kind words.", "The parcel left us yesterday.", "Write again if anything is missing."),
    "news": ("The weather held until the evening.", "A band played old songs.", "Nobody wanted to go home."),
}  # fmt: skip
# Kinds of documents about several companies, with the facts that they list in the wordings for lists.
_LISTS = {"directory": ("town", "staff"), "catalogue": ("product", "price"), "almanac": ("year", "founder")}
_LIST_WORDING = 3
_LISTED = 5

_STEMS = (
    "Bram", "Corv", "Del", "Esk", "Fenn", "Gor", "Hask", "Iv", "Jun", "Kel", "Lor", "Marr", "Nim", "Orr", "Pell", "Quor",
    "Rusk", "Sorn", "Thul", "Ulv", "Vash", "Wend", "Yar", "Zeb",
)  # fmt: skip
_ENDS = ("ane", "ick", "ell", "ova", "und", "ister", "aby", "olt", "emar", "ude")
_TOWN_ENDS = ("by", "mouth", "ford", "wick", "holm", "stead")
_FIRST_NAMES = (
    "Ada", "Bruno", "Clara", "Dora", "Emil", "Flora", "Greta", "Hugo", "Irma", "Jonas", "Karl", "Lena", "Moritz", "Nora",
    "Oskar", "Paula",
)  # fmt: skip
_TRADES = ("Foundry", "Mill", "Press", "Pottery", "Dairy", "Brewery", "Tannery", "Weavers", "Glassworks", "Bakery")
_THINGS = ("lamp", "kettle", "saddle", "loom", "clock", "plough", "ladder", "barrow", "flute", "stove")
# How many places each kind of fact moves when facts are swapped. Facts that a question connects move differently: a product
# that kept its price or its town would still be answered right.
_MOVES = {"town": 1, "founder": 2, "year": 1, "product": -1, "price": 1, "staff": 2}


@dataclass(frozen=True)
class World:
    """The companies of a seed."""

    seed: int
    companies: Sequence[Company]

    def swapped(self) -> World:
        """The same world with each fact about another company. No company keeps a fact, and no product its price."""
        count = len(self.companies)
        moved = []
        for place, company in enumerate(self.companies):
            sources = {fact: self.companies[(place + distance) % count] for fact, distance in _MOVES.items()}
            moved.append(replace(company, **{fact: getattr(source, fact) for fact, source in sources.items()}))
        return World(self.seed, moved)

    def documents(self) -> dict[str, str]:
        """The text of each document by the name of its file."""
        draw = random.Random(f"documents {self.seed}")
        found = {}
        for kind, wording in _ABOUT_ONE.items():
            for number, company in enumerate(self.companies, start=1):
                said = [_said(company, fact, wording) for fact in FACTS]
                texts = [*said, *draw.sample(_FILLERS[kind], 2)]
                draw.shuffle(texts)
                half = len(texts) // 2
                paragraphs = (" ".join(texts[:half]), " ".join(texts[half:]))
                found[f"{kind}-{number}.md"] = f"# {kind.capitalize()} {number}\n\n" + "\n\n".join(paragraphs) + "\n"
        for kind, facts in _LISTS.items():
            companies = draw.sample(self.companies, len(self.companies))
            for start in range(0, len(companies), _LISTED):
                texts = [
                    _said(one, fact, _LIST_WORDING) for one in companies[start : start + _LISTED] for fact in facts
                ]
                number = start // _LISTED + 1
                found[f"{kind}-{number}.md"] = f"# {kind.capitalize()} {number}\n\n" + " ".join(texts) + "\n"
        return found

    def exam(self) -> list[ExamRow]:
        """Two questions about each fact, two about two facts of each company, and two that no document answers."""
        rows = []
        for company in self.companies:
            values = vars(company)
            for fact, wordings in QUESTIONS.items():
                for wording in wordings:
                    question = wording.format(**values)
                    rows.append(
                        _row(question, "single", answers=_accepted(company, fact), facts=[_named(company, fact)])
                    )
            for wording, (first, last) in TWO_HOP.items():
                facts = [_named(company, first), _named(company, last)]
                rows.append(_row(wording.format(**values), "multi_hop", answers=_accepted(company, last), facts=facts))
            rows += [_row(wording.format(**values), "unanswerable") for wording in UNANSWERABLE]
        return rows

    def write(self, folder: Path) -> None:
        """Write the documents to `folder/documents`, and the exam to `folder/exam.jsonl`."""
        (folder / "documents").mkdir(parents=True, exist_ok=True)
        for name, text in self.documents().items():
            (folder / "documents" / name).write_text(text, encoding="utf-8")
        lines = "".join(json.dumps(row.model_dump(exclude_defaults=True)) + "\n" for row in self.exam())
        (folder / "exam.jsonl").write_text(lines, encoding="utf-8")


def make_world(seed: int, companies: int = COMPANIES) -> World:
    """Invent companies. The same seed gives the same ones; all names and numbers of a world differ.

    Args:
        companies: 3 to 10.
    """
    draw = random.Random(f"world {seed}")
    stems = draw.sample([stem + end for stem in _STEMS for end in _ENDS], 2 * companies)
    towns = draw.sample([stem + end for stem in _STEMS for end in _TOWN_ENDS], companies)
    last_names = draw.sample([f"{stem}{end}" for stem in _STEMS for end in ("low", "ock", "man", "sen")], companies)
    first_names = draw.sample(_FIRST_NAMES, companies)
    trades, things = draw.sample(_TRADES, companies), draw.sample(_THINGS, companies)
    years, prices, staff = (draw.sample(range(*ends), companies) for ends in ((1880, 1990), (12, 400), (15, 900)))
    return World(
        seed,
        [
            Company(
                name=f"{stems[n]} {trades[n]}",
                town=towns[n],
                founder=f"{first_names[n]} {last_names[n]}",
                year=years[n],
                product=f"{stems[companies + n]} {things[n]}",
                price=prices[n],
                staff=staff[n],
            )
            for n in range(companies)
        ],
    )


def _said(company: Company, fact: str, wording: int) -> str:
    return WORDINGS[fact][wording].format(**vars(company))


def _named(company: Company, fact: str) -> str:
    """The name of a fact, in whose cluster all questions about it are."""
    return f"{company.product if fact == 'price' else company.name}: {fact}"


def _accepted(company: Company, fact: str) -> list[str]:
    value = getattr(company, fact)
    if fact == "price":
        return [f"{value} crowns", str(value)]
    if fact == "founder":
        return [value, value.split()[1]]
    if fact == "product":
        return [value, value.split()[0]]
    return [str(value)]


def _row(question: str, kind: str, answers: Sequence[str] = (), facts: Sequence[str] = ()) -> ExamRow:
    # The question is its own id, so that questions of a world and of its swapped world have the same ids.
    return ExamRow.model_validate(
        {"id": question, "question": question, "kind": kind, "answers": list(answers), "facts": list(facts)}
    )
