"""The parts that all pages of reports share: head, contents, charts, and colours for light and dark screens."""

import re

import pytest
from markupsafe import Markup

from llm_engineering.reports.page import (
    Verdict,
    details,
    funnel,
    histogram,
    interval,
    interval_bars,
    line_chart,
    marked,
    page,
    paragraph,
    table,
)


def body(made):
    return made[made.index("<body>") :]


@pytest.mark.parametrize("state", ["good", "bad", "mixed"])
def test_a_page_opens_with_its_facts_and_a_verdict_in_its_colour(state):
    facts = {"Model": "handbook <3>", "Version": "", "Run": "sft-1"}
    made = body(
        page("Report", ["One.", "Two."], [], facts=facts, verdict=Verdict("Said", state), sample=paragraph("S"))
    )
    assert f'<header class="strip {state}">' in made
    places = [
        made.index(words) for words in ("Said", "handbook &lt;3&gt;", "sft-1", "One.", "Two.", '<div class="sample">')
    ]
    assert places == sorted(places)
    # A fact that is not known has no name without a value.
    assert "Version" not in made


def test_a_section_without_a_body_is_neither_shown_nor_listed():
    sections = [(name, paragraph(f"about {name}")) for name in ("Curves", "Rows", "Machine", "Recipe")]
    made = body(page("Report", "Lead.", [*sections[:2], ("Leaks", table(["Row"], [])), *sections[2:]]))
    assert "Leaks" not in made
    links = re.findall(r'<label for="(s\d)">(\w+)</label>', made)
    assert [name for _, name in links] == ["Curves", "Rows", "Machine", "Recipe"]
    assert all(re.search(f'<h2>{name}<input type="radio" name="shown" id="{place}"', made) for place, name in links)
    # Three sections need no contents.
    assert "<nav" not in page("Report", "Lead.", sections[:3])


def test_charts_name_their_colours_so_that_a_dark_page_can_change_them():
    charts = [
        line_chart({"training": [(1, 2.0), (2, 1.0)], "validation": [(2, 1.5)]}, "step", "loss"),
        interval_bars({"base": (1.0, 0.5, 1.5), "sft": (0.5, 0.4, 0.6), "dpo": (0.4, None, None)}, "nats"),
        histogram({3: 4, 9: 1}, "tokens", 9),
    ]
    for chart in charts:
        # Anything but white, which no chart paints.
        assert not re.findall(r"(?:fill|stroke): (#(?!fff)\w+)", chart)
        assert "currentColor" in chart
        used = set(re.findall(r"var\((--\w+)\)", chart))
        assert used
        css = page("Report", "Lead.", [])
        light, dark = css.split("prefers-color-scheme:dark")
        assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_a_chart_has_a_colour_for_each_of_many_lines():
    chart = line_chart({f"run {number}": [(1, number), (2, number)] for number in range(5)}, "step", "loss")
    assert all(f"run {number}" in chart for number in range(5))
    assert len(set(re.findall(r"stroke: (var\(--\w+\))", chart)) - {"var(--line)"}) == 5


def test_the_axis_of_a_histogram_ends_with_the_data():
    near, far = histogram({40: 3, 50: 2, 60: 4}, "tokens", 55), histogram({40: 3, 50: 2, 60: 4}, "tokens", 2048)
    assert "limit 55" in near
    assert "tokens (the limit is 2,048)" in far
    ticks = [int(text) for text in re.findall(r">(\d+)</text>", far)]
    assert max(ticks) <= 65
    # One value has one bar, and no ticks between whole numbers.
    assert not re.findall(r">\d+\.\d+</text>", histogram({2: 60}, "turns"))
    assert histogram({}, "tokens") == ""


def test_a_funnel_has_a_bar_for_each_number_in_proportion():
    shown = funnel({"read": 1431, "usable": 320, "for train": 112})
    assert re.findall(r"width:([\d.]+)%", shown) == ["100.0", "22.4", "7.8"]
    assert "1,431" in shown
    assert "0.0%" in funnel({"read": 0})


def test_text_of_data_is_escaped_everywhere():
    hostile = "<script>alert(1)</script>"
    parts = [
        table([hostile], [(hostile,)]),
        details(hostile, paragraph(hostile)),
        marked(hostile, right=True),
        line_chart({hostile: [(1, 1), (2, 2)], "other": [(1, 2)]}, hostile, hostile),
        funnel({hostile: 1}),
    ]
    made = page(
        hostile, hostile, [(hostile, Markup("").join(parts))], facts={hostile: hostile}, verdict=Verdict(hostile, "bad")
    )
    assert "<script" not in made


def test_an_interval_whose_ends_differ_by_rounding_has_few_digits():
    assert interval(0.4, 0.4 - 1e-16, 0.4 + 1e-16) == "0.40 [0.40, 0.40]"
    assert interval(2.8149, 2.7401, 2.8912) == "2.81 [2.74, 2.89]"


def test_a_chart_over_trials_has_whole_numbers_below_it():
    chart = str(line_chart({"trial": [(1.0, 2.5)], "stopped early": [(2.0, 3.0)]}, "trial", "validation loss"))
    assert ">2</text>" in chart
    assert ">1.2</text>" not in chart
