"""Any content of a file: every row is kept or quarantined, and both can be stored."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.formats.known_formats import INSTRUCTION_FORMATS, PREFERENCE_FORMATS
from llm_engineering.data.rows import Quarantined
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.formats.records import opened, texts_of
from tests.unit.data.written import write

# Any text that JSON can hold, lone surrogates included.
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "content": TEXT | JSON,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | JSON,
        "value": TEXT | JSON,
        "tool_calls": JSON,
    },
)
MARKS = ["### Instruction:", "### Input:", "### Response:", "### Human:", "### Assistant:", "[INST]", "[/INST]", "\n"]
TEMPLATE = st.lists(st.sampled_from(MARKS) | TEXT, max_size=8).map("".join)
CONTENT = TEXT | st.lists(TURN, max_size=4) | TURN | JSON
NAMES = sorted(set().union(*(f.columns for f in [*INSTRUCTION_FORMATS.values(), *PREFERENCE_FORMATS.values()])))
RECORD = st.dictionaries(
    st.sampled_from([*NAMES, "input", "system", "history", "document", "model"]), CONTENT, max_size=5
)
RECORD = RECORD | st.builds(lambda text: {"text": text}, TEMPLATE) | JSON
ALPACA = {"instruction": "Add", "output": "3"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def check_all_accounted_for(file, kind, read):
    """Every row is kept or quarantined, and both can be stored."""
    try:
        rows = list(open_dataset(str(file), kind, DataConfig()).rows)
    except RequestError as error:
        str(error).encode()
        return
    assert len(rows) == read
    kept = [row for row in rows if not isinstance(row, Quarantined)]
    assert len(rows_dataset(kept, kind)) == len(kept)
    for row in rows:
        row.model_dump_json().encode()


@quick
@given(records=st.lists(RECORD, min_size=1, max_size=4), kind=st.sampled_from(["instruction", "preference"]))
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_any_json_rows(tmp_path, records, kind, ending):
    rows = [ALPACA if kind == "instruction" else PAIR, *records]
    file = tmp_path / f"rows.{ending}"
    file.write_text("\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows))
    check_all_accounted_for(file, kind, len(rows))


@quick
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_any_bytes(tmp_path, content, ending):
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(content)
    with pytest.raises(RequestError):
        list(open_dataset(str(file), None, DataConfig()).rows)


@quick
@given(lines=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=4))
def test_any_lines_between_good_ones(tmp_path, lines):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ALPACA).encode()
    file.write_bytes(b"\n".join([good, *lines, good]))
    blank = sum(not line.decode("utf-8", "replace").strip() for line in lines)
    check_all_accounted_for(file, "instruction", len(lines) - blank + 2)


@quick
@given(cells=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_any_csv_rows(tmp_path, cells):
    clean = [tuple(cell.encode("utf-8", "replace").decode() for cell in row) for row in cells]
    file = write(tmp_path / "rows.csv", [dict(zip(("instruction", "output"), row, strict=True)) for row in clean])
    check_all_accounted_for(file, "instruction", len(clean))


@quick
@given(
    instructions=st.lists(TEXT.filter(lambda t: t.isascii()) | st.none(), min_size=2, max_size=4),
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=4, max_size=4),
    floats=st.lists(st.floats() | st.none(), min_size=4, max_size=4),
)
def test_any_parquet_rows(tmp_path, instructions, numbers, floats):
    count = len(instructions)
    table = pa.table(
        {
            "instruction": pa.array(instructions, pa.string()),
            "output": pa.array(instructions[::-1], pa.string()),
            "score": pa.array(floats[:count], pa.float64()),
            "document": pa.array(numbers[:count], pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    check_all_accounted_for(tmp_path / "rows.parquet", "instruction", count)


def test_odd_numbers_in_unread_columns_are_harmless(tmp_path):
    extra = {"score": math.nan, "big": 10**400, "nested": {"a": [1, {"b": None}]}}
    _, rows = opened(tmp_path, [{**ALPACA, **extra}], name="rows.json")
    assert texts_of(rows[0].completion) == ["a:3"]
