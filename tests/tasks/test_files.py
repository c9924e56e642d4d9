import json

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.tasks.columns import load_file
from llm_adapters.tasks.examples import Example
from llm_adapters.tasks.files import check_file, column_names, read_rows


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": -Infinity}', r"line 2: not JSON \(-Infinity is no JSON number"),
        ("a.json", '[{"q": "NaN"},\n\n{"id": NaN}]', r"line 3: not JSON \(NaN is no JSON number"),
        ("a.json", '[\n{"q": ' + "7" * 5001 + "}]", r"line 2: a number of 5001 digits"),
        ("a.jsonl", '{"q": ' + "[" * 90000, r"line 1: not JSON that can be read .*nested too deeply"),
        ("a.jsonl", '{"q": 1, "q": 2}', r"line 1: not JSON \(an object has the name 'q' twice"),
        ("a.csv", "q,a,q\n1,2,3", "two columns have the same name 'q'"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        ("a.json", "/annex/objects/SHA256E-s1--a", "git-annex pointer"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"compressed \(gzip\)"),
        ("a.csv", "<!DOCTYPE html>\n<html>", "is a web page"),
    ],
)
def test_what_is_no_data_is_told_with_its_place(tmp_path, name, content, message):
    with pytest.raises(RequestError, match=message) as caught:
        list(read_rows(check_file(write(tmp_path, name, content))))
    assert len(str(caught.value)) < 400


def test_half_of_a_character_and_infinite_numbers_are_told_with_their_line(tmp_path):
    good = '{"question": "q", "response": "r"}\n'
    with pytest.raises(RequestError, match=r"line 2: a text holds half of a character \('.udfff'\)"):
        load_file(write(tmp_path, "a.jsonl", good + r'{"question": "q", "response": "\udfff"}'))
    with pytest.raises(RequestError, match="line 2: column 'response' holds inf"):
        load_file(write(tmp_path, "a.jsonl", good + '{"question": "q", "response": 1e400}'))


@pytest.mark.parametrize(("name", "between"), [("a.tsv", "\t"), ("a.csv", "\t"), ("a.csv", ";"), ("a.csv", ",")])
def test_cells_are_parted_by_what_parts_the_heading(tmp_path, name, between):
    text = f'question{between}answer\r\n"one{between}\ntwo"{between}r\r\n'
    assert load_file(write(tmp_path, name, text)) == [Example(f"one{between}\ntwo", response="r", answer="r")]


def test_one_column_stays_one(tmp_path):
    assert column_names(write(tmp_path, "a.csv", "question\na;b|c\n")) == ["question"]


def test_rows_come_one_at_a_time(tmp_path):
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps({"q": n}) for n in range(3)) + "\nno JSON")
    rows = read_rows(path)
    assert [next(rows) for _ in range(3)] == [(f"line {n + 1}", {"q": n}) for n in range(3)]
    with pytest.raises(RequestError, match="line 4"):
        next(rows)


def test_names_that_no_file_can_have(tmp_path):
    for name in ("~nobody-of-this-name/a.jsonl", "x" * 400 + ".jsonl"):
        with pytest.raises(RequestError, match="cannot be found"):
            check_file(tmp_path / name if not name.startswith("~") else type(tmp_path)(name))


def test_a_parquet_text_that_is_not_utf8_is_told_with_its_row(tmp_path):
    import struct

    import pyarrow
    import pyarrow.parquet

    offsets, text = struct.pack("<iii", 0, 1, 3), b"a\xc3("
    column = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(offsets), pyarrow.py_buffer(text))
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q", "q"], "response": column}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"a\.parquet, row 2: column 'response' is not UTF-8"):
        load_file(tmp_path / "a.parquet")
