import json

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.tasks.examples import Example, load_file


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [
    {"question": "1 + 1?", "response": "It is 2.", "answer": 2},
    {"question": "Größer als\u2028zwei?", "response": "ja", "answer": "3, or more"},
]
EXPECTED = [
    Example("1 + 1?", response="It is 2.", answer="2"),
    Example("Größer als\u2028zwei?", response="ja", answer="3, or more"),
]


def written(folder, suffix):
    if suffix == ".json":
        return write(folder, "data.json", json.dumps(ROWS, ensure_ascii=False))
    if suffix == ".jsonl":
        return write(folder, "data.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    if suffix == ".csv":
        return write(
            folder,
            "data.csv",
            'question,response,answer\r\n1 + 1?,It is 2.,2\r\nGrößer als\u2028zwei?,ja,"3, or more"\r\n',
        )
    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.PARQUET")
    return folder / "data.PARQUET"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_all_formats_give_the_same_examples(tmp_path, suffix):
    assert load_file(written(tmp_path, suffix)) == EXPECTED


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "i", "output": "r", "answer": "a"}, Example("q", "i", "r", "a")),
        ({"prompt": "q", "completion": "r"}, Example("q", response="r")),
        ({"question": "q", "answer": "a"}, Example("q", response="a", answer="a")),
        (
            {"question": "q", "instruction": "no", "response": "r", "output": "no", "label": 1.5},
            Example("q", "", "r", "1.5"),
        ),
        ({"question": "q", "input": None, "response": True}, Example("q", response="true")),
    ],
)
def test_usual_names_of_columns(tmp_path, row, expected):
    assert load_file(write(tmp_path, "a.json", json.dumps([row]))) == [expected]


def test_the_column_map_wins_and_none_leaves_a_field_out(tmp_path):
    row = {"instruction": "q", "Frage": "F", "output": "wrong", "Lösung": "right", "answer": "a"}
    path = write(tmp_path, "a.json", json.dumps([row]))
    columns = {"question": "Frage", "response": "Lösung", "answer": None}
    assert load_file(path, columns) == [Example("F", response="right")]


def test_byte_order_mark_of_other_systems_is_no_part_of_a_name(tmp_path):
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbfquestion,answer\n1?,2\n")
    assert load_file(path)[0].question == "1?"


def test_a_response_is_asked_for_only_where_it_is_required(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"question": "q"}')
    assert load_file(path, required=()) == [Example("q")]
    with pytest.raises(RequestError, match="no column for the response"):
        load_file(path)


def test_gsm8k_format_takes_the_marks_out_and_the_answer_apart(tmp_path):
    worked = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 1,072"
    path = write(tmp_path, "a.jsonl", json.dumps({"question": "How many?", "answer": worked}))
    expected = "He sold 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 1,072"
    assert load_file(path, format="gsm8k") == [Example("How many?", response=expected, answer="1,072")]


def test_gsm8k_format_without_its_mark(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"question": "q", "answer": "72"}')
    with pytest.raises(RequestError, match=r"a\.jsonl, line 1: .*#### NUMBER"):
        load_file(path, format="gsm8k")


GOOD = '{"question": "q", "response": "r"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"a\.txt: unknown suffix '\.txt'.*\.csv, \.json, \.jsonl, \.parquet"),
        ("a.json", '[\n{"question": "q",\n}]', r"a\.json, line 3: not JSON"),
        ("a.json", GOOD + "\n" + GOOD, r"a\.json, line 2: not JSON .*name it \.jsonl"),
        ("a.json", '{"data": []}', r"a\.json holds one object; a list of objects"),
        ("a.json", "", r"a\.json is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.json", f"[{GOOD}, 3]", r"a\.json, item 2: a number where an object"),
        ("a.json", f"[{GOOD}, null]", r"a\.json, item 2: a null where an object"),
        ("a.jsonl", GOOD + "\n\n{oops\n", r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", GOOD + '\n["q"]\n', r"a\.jsonl, line 2: a list where an object"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", '{"question": "q", "text": "r"}', r"no column for the response.*'question', 'text'.*column map"),
        (
            "a.jsonl",
            GOOD + '\n{"question": null, "response": "r"}',
            r"line 2: the question \(column 'question'\) is empty",
        ),
        ("a.jsonl", GOOD + '\n{"question": "q", "response": " \\n"}', r"line 2: the response .* is empty"),
        ("a.jsonl", GOOD + '\n{"response": "r"}', r"line 2: the question .* is empty"),
        ("a.jsonl", '{"question": ["q"], "response": "r"}', r"line 1: column 'question' holds a list"),
        ("a.jsonl", b'{"question": "q", "response": "r"}\n{"question": "Gr\xf6\xdfe"}', r"line 2: not UTF-8"),
        ("a.csv", "question,response\nq,r\nq,r,s\n", r"a\.csv, line 3: 3 cells under a header of 2 columns"),
        ("a.csv", "question,response\nq\n", r"a\.csv, line 2: 1 cells"),
        ("a.csv", 'question,response\nq,"r\n', r"a\.csv, line 2: not CSV"),
        ("a.csv", "question,question\nq,r\n", r"a\.csv: two columns have the same name"),
        ("a.csv", "question,response\n", r"a\.csv is empty"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.parquet", "PAR1 no", r"a\.parquet is not a Parquet file"),
    ],
)
def test_what_can_be_wrong_with_a_file_is_told_with_its_place(tmp_path, name, content, message):
    with pytest.raises(RequestError, match=message) as caught:
        load_file(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_named_columns(tmp_path):
    with pytest.raises(RequestError, match=r"nowhere\.json' does not exist"):
        load_file(tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match="is not a file"):
        load_file(tmp_path)
    path = write(tmp_path, "a.jsonl", '{"question": "q", "text": "r"}')
    with pytest.raises(
        RequestError, match=r"no column 'txt' \(named for the response\). Its columns: 'question', 'text'"
    ):
        load_file(path, {"response": "txt"})
    with pytest.raises(RequestError, match=r"unknown field 'reply'.*question, input, response, answer"):
        load_file(path, {"reply": "text"})
    with pytest.raises(RequestError, match="'gsm' is not a format"):
        load_file(path, format="gsm")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", GOOD)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(RequestError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        load_file(path)
