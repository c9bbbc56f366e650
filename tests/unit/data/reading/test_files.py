"""Each record of a file has its place, each broken record a reason, and a damaged file is an error with a remedy."""

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.reading.files import BrokenRecord, Record, read_records
from llm_engineering.data.reading.json_stream import JsonError, JsonStream, Unreadable, list_key, rows_of_list
from llm_engineering.data.reading.sources import dataset_hash, open_records
from llm_engineering.errors import RequestError
from tests.unit.data.written import ROWS, write


def values(path):
    return [record.value for record in read_records(path)]


def problems(path):
    return [(r.place, r.reason) for r in read_records(path) if isinstance(r, BrokenRecord)]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet", "arrow", "json.gz", "jsonl.gz", "csv.gz"])
def test_every_container_gives_the_same_records(tmp_path, ending):
    file = write(tmp_path / f"rows.{ending}")
    assert values(file) == ROWS
    assert all(isinstance(record, Record) and record.file == str(file) for record in read_records(file))


@pytest.mark.parametrize(
    ("ending", "places"),
    [
        ("jsonl", ["line 1", "line 2"]),
        ("json", ["[0]", "[1]"]),
        ("csv", ["line 2", "line 4"]),  # the first row has a line break in a cell
        ("parquet", ["row 1", "row 2"]),
        ("arrow", ["row 1", "row 2"]),
    ],
)
def test_every_record_has_its_place_in_the_file(tmp_path, ending, places):
    assert [record.place for record in read_records(write(tmp_path / f"rows.{ending}"))] == places


def test_both_arrow_formats_are_read(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "rows.arrow") == ROWS


def test_rows_are_counted_across_batches(tmp_path):
    rows = [{"instruction": str(number)} for number in range(2500)]
    records = list(read_records(write(tmp_path / "rows.parquet", rows)))
    assert [record.value for record in records] == rows
    assert records[-1].place == "row 2500"


def test_a_json_object_with_one_list_holds_the_rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": {"list": [1]}, "none": [], "data": ROWS, "license": "x"}))
    assert values(file) == ROWS
    assert [record.place for record in read_records(file)] == ["data[0]", "data[1]"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_byte_order_marks_are_not_part_of_the_text(tmp_path, encoding, ending):
    file = write(tmp_path / f"rows.{ending}")
    text = ("\ufeff" if encoding == "utf-16-be" else "") + file.read_text()
    file.write_text(text, encoding=encoding, newline="")
    # `read_text` uses universal newlines, so the csv module's "\r\n" is "\n" here.
    assert values(file) == ROWS


def test_broken_lines_are_reported_with_their_numbers(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [b'{"a": "x \xe2\x80\xa8 y"}', b'{"a": ', b"", b"[1, 2]", b"  ", b'{"a": "\xff"}', b'{"a": "\\ud800"}']
    lines += [
        b'{"a": "\\ud83d\\ude00"}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"nonsense\r",
        b'{"b": NaN}\r',
    ]
    file.write_bytes(b"\n".join(lines))
    assert [r.place for r in read_records(file) if isinstance(r, Record)] == ["line 1", "line 8", "line 12"]
    assert problems(file) == [
        ("line 2", "malformed"),
        ("line 4", "malformed"),
        ("line 6", "not_utf8"),
        ("line 7", "not_utf8"),
        ("line 9", "malformed"),
        ("line 10", "malformed"),
        ("line 11", "malformed"),
    ]
    quarantined = [r.quarantined("x") for r in read_records(file) if isinstance(r, BrokenRecord)]
    assert all(q.model_dump_json().encode() and len(q.text) <= 200 for q in quarantined)


def test_the_rows_around_a_bad_row_of_a_json_file_are_read(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(
        b'[{"a": "\xff"}, {"a": "\\udc00"}, 7, {"a": NaN}, {"a": 123456789012345678901234567890}, {"a": 1.5}]'
    )
    assert problems(file) == [("[0]", "not_utf8"), ("[1]", "not_utf8"), ("[2]", "malformed")]
    numbers = [record.value["a"] for record in read_records(file) if isinstance(record, Record)]
    assert numbers[1:] == [123456789012345678901234567890, 1.5]
    assert [type(number) for number in numbers] == [type(None), int, float]


def test_csv_rows_with_a_wrong_number_of_cells_are_set_aside(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'instruction,output\nAdd,3\nAdd\nAdd,3,4\n\n"a"b,3\nAdd,\xff\n"Add ""x""","1,\n2"\nlast,row\n')
    assert problems(file) == [
        ("line 3", "malformed"),
        ("line 4", "malformed"),
        ("line 6", "malformed"),
        ("line 7", "not_utf8"),
    ]
    good = [record for record in read_records(file) if isinstance(record, Record)]
    assert [record.value["instruction"] for record in good] == ["Add", 'Add "x"', "last"]
    assert [record.place for record in good] == ["line 2", "line 8", "line 10"]


def test_a_cell_may_be_as_long_as_a_conversation(tmp_path):
    long = [{"instruction": "x" * 300_000, "output": "y"}]
    assert values(write(tmp_path / "rows.csv", long)) == long


def test_parquet_text_that_is_not_utf8_is_set_aside(tmp_path):
    raw = pa.array([b"good", b"\xff", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"a": text}), tmp_path / "rows.parquet")
    assert problems(tmp_path / "rows.parquet") == [("row 2", "not_utf8")]
    assert [r.value["a"] for r in read_records(tmp_path / "rows.parquet") if isinstance(r, Record)] == ["good", "fine"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "rows.txt",
            b"x",
            r"in no known format \(.txt\)\. Convert it to one of .json, .jsonl, .csv, .tsv, .parquet, .arrow;",
        ),
        ("rows", b"x", r"in no known format \(no ending\)"),
        (
            "rows.parquet.gz",
            b"x",
            r"in no known format \(.parquet.gz\)\. .* .json, .jsonl, .csv, .tsv files can also be compressed as .gz",
        ),
        ("rows.json", b"{", "expected a key in double quotes|the file ends"),
        ("rows.json", b'[{"a": 1}, {"a": 2}, {"a" 3}]', r"Expecting ':' delimiter \(line 1\), after \[1\]"),
        ("rows.json", b'[{"a": 1},\n\n {"a": "x', r"the file ends in the middle of a value \(line 3\), after \[0\]"),
        ("rows.json", b'[{"a": 1}', r"expected `,` or `\]`, found the end of the file"),
        ("rows.json", b'[{"a": 1}] x', "extra data"),
        ("rows.json", b'{\n"a": 1\n}\n{\n"a": 2\n}', "If it holds one object after the other, name the file .jsonl"),
        ("rows.jsonl", b'{\n"a": 1\n}\n{\n"a"', "the file ends|expected `:`"),
        ("rows.json", b'{"a": [1], "b": [2]}', r"2 lists \(`a`, `b`\)"),
        ("rows.json", b'{"a": []}', r"no list under its keys \(`a`\)"),
        (
            "rows.json",
            b'{"q1": {"a": "b"}, "q2": {"a": "c"}}',
            "If each of its values is a row, write the values as a list",
        ),
        ("rows.json", b'"text"', "holds a single str"),
        ("rows.csv", b'a,b\n1,2\n"x,y\n', "line 3 opens a quoted cell that is never closed"),
        ("rows.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("rows.parquet", b"nonsense, and enough of it", "rows.parquet cannot be read"),
        ("rows.arrow", b"nonsense, and enough of it", "rows.arrow cannot be read"),
        ("rows.jsonl.gz", b"nonsense", r"is damaged \(Not a gzipped file"),
        ("rows.jsonl", b"\xff\xfe{\x00}", "contains bytes that are not utf-16-le text"),
    ],
)
def test_unreadable_files_are_explained(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_truncated_gz_file_is_refused(tmp_path, ending):
    file = write(tmp_path / f"rows.{ending}.gz", [{"a": str(hash(str(n)))} for n in range(5000)])
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(RequestError, match="is damaged"):
        list(read_records(file))


def test_a_parquet_file_damaged_in_the_middle_is_refused(tmp_path):
    file = write(tmp_path / "rows.parquet", [{"a": str(n) * 50} for n in range(300)])
    content = bytearray(file.read_bytes())
    content[1000:9000] = b"\xff" * 8000
    file.write_bytes(content)
    with pytest.raises(RequestError, match="rows.parquet cannot be read"):
        list(read_records(file))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="There is no file"):
        list(read_records(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64])
def test_values_are_read_whole_across_window_borders(window):
    rows = [{"a": 'x\\"\u00e9\\', "b": [1.5e10, -12, True, None, {"c": "😀"}]}, [], 123456, -0.5, "s", float("-inf")]
    text = json.dumps({"first": {"x": [1, 2]}, "rows": rows, "n": 12}, indent=1)
    assert list_key(io.StringIO(text), window) == "rows"
    found = list(rows_of_list(io.StringIO(text), "rows", window))
    assert [value for _, value, _ in found] == rows
    assert [json.loads(raw) for _, _, raw in found] == rows


def test_a_fault_is_found_without_reading_the_rest():
    stream = io.StringIO('[{"a" 1},' + '{"a": 1},' * 10_000)
    with pytest.raises(JsonError, match="line 1"):
        list(rows_of_list(stream, None, window=100))
    assert stream.tell() < 1000


def test_lines_are_counted_across_windows():
    stream = JsonStream(io.StringIO("[1,\n" + "2,\n" * 400 + "x]"), window=10)
    with pytest.raises(JsonError, match=r"\(line 402\)"):
        list(stream.items())


def read(reference):
    return [record.value["instruction"] for record in open_records(str(reference))]


def test_folders_saved_by_datasets_are_read(tmp_path):
    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    one.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    DatasetDict(train=two).save_to_disk(tmp_path / "single")
    expected = [row["instruction"] for row in ROWS]
    assert read(tmp_path / "one") == expected
    assert read(tmp_path / "single") == read(f"{tmp_path / 'both'}#test") == expected[:1]
    assert read(f"{tmp_path / 'both'}#train") == expected
    with pytest.raises(RequestError, match="has 2 splits: write .*both#train or .*both#test"):
        open_records(str(tmp_path / "both"))
    with pytest.raises(RequestError, match="has no split dev: write .*#train or"):
        open_records(f"{tmp_path / 'both'}#dev")
    with pytest.raises(RequestError, match="dataset without splits: write it without #train"):
        open_records(f"{tmp_path / 'one'}#train")
    with pytest.raises(RequestError, match="is a file and has no splits"):
        open_records(f"{tmp_path / 'one' / 'state.json'}#train")


def test_folders_of_dataset_files_are_read(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[1:])
    assert read(tmp_path) == [row["instruction"] for row in ROWS]
    write(tmp_path / "test.parquet", ROWS[:1])
    (tmp_path / "README.md").write_text("# About")
    with pytest.raises(RequestError, match="has 2 splits: write .*#train or .*#test"):
        open_records(str(tmp_path))
    assert read(f"{tmp_path}#test") == [ROWS[0]["instruction"]]
    write(tmp_path / "more.csv")
    with pytest.raises(RequestError, match="also holds more.csv, which `datasets` leaves out"):
        open_records(f"{tmp_path}#test")


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    (tmp_path / "notes.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match="in which `datasets` finds no dataset"):
        open_records(str(tmp_path))


def test_a_file_name_may_contain_a_number_sign(tmp_path):
    assert read(write(tmp_path / "rows#1.jsonl")) == [row["instruction"] for row in ROWS]


@pytest.mark.parametrize("reference", ["owner/name", "owner/name#train"])
def test_an_unreachable_hub_is_refused_with_the_remedy(reference, settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="owner/name is no file or folder here.*without a network, download"):
        list(open_records(reference))
    with pytest.raises(RequestError, match="Check the name and, for a private dataset, HF_TOKEN"):
        dataset_hash(reference)


def test_a_dataset_of_the_hub_is_read(tmp_path, settings, monkeypatch):
    """Only the two calls to the hub are replaced."""
    write(tmp_path / "train.jsonl")
    calls = []
    read = datasets.load_dataset

    def load(name, configuration, **options):
        calls.append((name, configuration, options))
        return read("json", data_files={"train": str(tmp_path / "train.jsonl")}, streaming=True)

    class Info:
        sha = "0123abcd"

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: Info)
    assert dataset_hash("owner/name") == "0123abcd"
    assert list(open_records("owner/name#train"))[1] == Record(ROWS[1], "owner/name", "row 2")
    options = {"streaming": True, "revision": "0123abcd", "token": "secret"}
    assert calls == [("owner/name", None, options)]
    with pytest.raises(RequestError, match="owner/name has no split test: write owner/name#train"):
        list(open_records("owner/name#test"))
    assert dataset_hash("owner/name:main") == "0123abcd"
    assert list(open_records("owner/name:main#train"))[1] == Record(ROWS[1], "owner/name:main", "row 2")
    assert calls[-1] == ("owner/name", "main", options)


def test_a_dataset_of_several_configurations_names_them(settings, monkeypatch):
    def load(*_, **__):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nMore"
        )

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("llm_engineering.data.reading.sources._commit", lambda name: "0123abcd")
    with pytest.raises(RequestError, match=r"\['main', 'socratic'\] Check .* is named as owner/name:configuration"):
        list(open_records("owner/name"))


def test_a_file_that_may_not_be_read_is_refused_with_the_remedy(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "rows.jsonl")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(RequestError, match=r"rows\.jsonl cannot be read: Permission denied\. Check its permissions\."):
        read(file)


@pytest.mark.parametrize("reference", ["nowhere.jsonl", "some/rows.jsonl", "./nowhere", "a/b/c"])
def test_missing_datasets_are_refused(reference):
    with pytest.raises(RequestError, match="There is no file"):
        open_records(reference)


def test_the_hash_changes_with_the_content(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write(folder / "train.jsonl")
    before = dataset_hash(str(file)), dataset_hash(str(folder))
    assert all(len(text) == 16 for text in before)
    (folder / ".hidden").write_text("x")
    assert (dataset_hash(str(file)), dataset_hash(str(folder))) == before
    assert dataset_hash(str(write(tmp_path / "copy.jsonl"))) == before[0]
    write(file, ROWS[:1])
    assert dataset_hash(str(file)) != before[0]
    assert dataset_hash(str(folder)) != before[1]


@pytest.mark.parametrize("broken", ["9" * 5000, '{"n": [' + "9" * 5000 + ', "]}"]}', "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("window", [8, 1 << 20])
def test_an_item_that_python_cannot_read_costs_no_other_item(broken, window):
    text = f'{{"meta": {{"x": {broken}}}, "rows": [{{"a": 1}}, {broken}, {{"a": "x]"}}]}}'
    assert list_key(io.StringIO(text), window) == "rows"
    items = list(rows_of_list(io.StringIO(text), "rows", window))
    assert [(items[0][1], items[2][1])] == [({"a": 1}, {"a": "x]"})]
    assert isinstance(items[1][1], Unreadable)
    assert items[1][2] == broken


def test_items_that_python_cannot_read_are_set_aside_with_their_place(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(f'[{{"a": 1}}, {{"a": {"9" * 5000}}}, {{"a": {"[" * 9000}{"]" * 9000}}}, {{"a": 2}}]')
    assert [record.value for record in read_records(file) if isinstance(record, Record)] == [{"a": 1}, {"a": 2}]
    broken = [record for record in read_records(file) if isinstance(record, BrokenRecord)]
    assert [(r.place, r.reason) for r in broken] == [("[1]", "malformed"), ("[2]", "malformed")]
    assert "more than 4300 digits" in broken[0].detail
    assert "nested too deeply" in broken[1].detail


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '[\n  {"a": "1"},\n  {"a": "2"}\n]\n'),
        ("rows.jsonl", '[{"a": "1"},\n {"a": "2"}]'),
        ("rows.jsonl", '\n[{"a": "1"}, {"a": "2"}]\n\n'),
        ("rows.jsonl", '{\n  "a": "1"\n}\n{\n  "a": "2"\n}\n'),
        ("rows.json", '{"a": "1"}\n{"a": "2"}\n'),
        ("rows.csv", '"a";"b, c, d"\n1;\n2;\n'),
        ("rows.csv", "a|b\n1|\n2|\n"),
        ("rows.csv", "sep=;\na;b\n1;\n2;\n"),
        ("rows.tsv", "a\tb\n1\t\n2\t\n"),
        ("rows.csv", "a,b,,\n1,,,\n2,\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_content_decides_how_a_file_is_read(tmp_path, name, text, encoding):
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    assert [record.value["a"] for record in read_records(file)] == ["1", "2"]
    assert all(isinstance(record, Record) for record in read_records(file))


def test_lines_that_are_lists_are_conversations_or_malformed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('[{"role": "user", "content": "x"}]\n[1, 2]\n[]\n')
    first, *others = read_records(file)
    assert first.value == {"messages": [{"role": "user", "content": "x"}]}
    assert [(r.place, r.reason) for r in others] == [("line 2", "malformed"), ("line 3", "malformed")]


def test_a_cell_under_no_column_name_is_kept_if_it_holds_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",a,\n0,x,\n1,y,note\n2,z,,more\n")
    *good, bad = read_records(file)
    assert [record.value for record in good] == [
        {"(column 1)": "0", "a": "x"},
        {"(column 1)": "1", "a": "y", "(column 3)": "note"},
    ]
    assert (bad.place, bad.reason) == ("line 4", "malformed")


def test_nan_is_null_in_every_container(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": NaN, "b": [{"c": NaN}]}')
    assert values(tmp_path / "rows.jsonl") == [{"a": None, "b": [{"c": None}]}]
    pq.write_table(pa.table({"a": [float("nan"), 1.5]}), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [{"a": None}, {"a": 1.5}]


def test_half_a_character_is_no_encoding_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "\\ud83d"}\n{"a": "\xff"}\n')
    half, bytes_ = read_records(file)
    assert half.reason == bytes_.reason == "not_utf8"
    assert "half of a character" in half.detail
    assert "iconv" in bytes_.detail
