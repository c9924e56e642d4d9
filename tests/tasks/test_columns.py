import json

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.tasks.columns import load_file
from llm_adapters.tasks.examples import Example


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
        ({"question": "q", "response": "r", "output": "no", "label": 1.5}, Example("q", "", "r", "1.5")),
        ({"Question ": "q", "OUTPUT": "r", "Context": "i"}, Example("q", "i", "r")),
        ({"problem": "q", "solution": "1 + 1 = 2", "answer": 2}, Example("q", response="1 + 1 = 2", answer="2")),
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
        ("a.txt", "x", r"a\.txt: unknown suffix '\.txt'.*\.csv, \.json, \.jsonl, \.parquet or \.tsv"),
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
    with pytest.raises(RequestError, match=r"unknown field 'reply'.*question, input, response, answer, system"):
        load_file(path, {"reply": "text"})
    with pytest.raises(RequestError, match="'gsm' is not a format"):
        load_file(path, format="gsm")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", GOOD)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(RequestError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        load_file(path)


# --- columns that mean something


@pytest.mark.parametrize("name", ["instruction", "Passage", "table", "options ", "system_prompt"])
def test_a_column_that_the_question_may_need_is_refused_until_the_map_says_what_it_is(tmp_path, name):
    rows = [{"question": "Which?", "response": "r", name: ""}, {"question": "Which?", "response": "r", name: "words"}]
    usual = name.strip() in ("options", "system_prompt")
    path = write(tmp_path, "a.json", json.dumps(rows))
    columns = {"choices": None, "system": None} if usual else None
    if usual:
        assert load_file(path, columns)[1] == Example("Which?", response="r")
        return
    with pytest.raises(
        RequestError, match=rf"item 2: the column '{name}' is not used.*--data.columns '{{input: {name}}}'"
    ):
        load_file(path)
    assert load_file(path, {"input": name})[1].input == "words"
    assert load_file(path, {name: None})[1] == Example("Which?", response="r")
    assert load_file(write(tmp_path, "empty.json", json.dumps(rows[:1])))[0] == Example("Which?", response="r")


def test_texts_that_a_response_might_be_are_told_and_other_columns_are_recorded(tmp_path, caplog):
    row = {"question": "q", "answer": "7", "rationale": "3 and 4 make 7.", "id": "a b", "score": 1.5}
    examples = load_file(write(tmp_path, "a.json", json.dumps([row])))
    assert examples == [Example("q", response="7", answer="7")]
    assert examples.unused == ["rationale", "id", "score"]
    assert examples.columns == {"question": "question", "response": "answer", "answer": "answer"}
    assert "'rationale'" in caplog.text
    assert "--data.columns" in caplog.text
    assert "'id'" not in caplog.text
    caplog.clear()
    load_file(write(tmp_path, "a.json", json.dumps([row])), {"rationale": None})
    load_file(write(tmp_path, "a.json", json.dumps([row])), required={"answer"})
    assert not caplog.text


def test_a_mapped_column_is_not_taken_again_by_its_usual_name(tmp_path):
    path = write(tmp_path, "a.json", json.dumps([{"context": "Say it.", "output": "r"}]))
    assert load_file(path, {"question": "context"}) == [Example("Say it.", response="r")]


def test_the_map_gives_a_column_to_one_field(tmp_path):
    path = write(tmp_path, "a.json", json.dumps([{"q": "1?", "r": "2", "x": "3"}]))
    assert load_file(path, {"question": "q", "response": "r", "answer": "r"}) == [
        Example("1?", response="2", answer="2")
    ]
    with pytest.raises(RequestError, match="gives 'q' to question and to input"):
        load_file(path, {"question": "q", "input": "q", "response": "r"})


def test_what_to_type_is_shown_where_no_usual_name_fits(tmp_path):
    path = write(tmp_path, "a.tsv", "Frage\tgute Antwort\n1?\t2\n")
    shown = r"question and the response.*--data\.columns '\{question: Frage, response: \"gute Antwort\"\}'"
    with pytest.raises(RequestError, match=shown):
        load_file(path)


# --- answers as GSM8K writes them


def test_worked_answers_are_known_by_their_mark(tmp_path, caplog):
    rows = [
        {"question": "q", "answer": "6*7=<<6*7=42>>42\n#### 42"},
        {"question": "q", "answer": "plain, with a << b"},
    ]
    examples = load_file(write(tmp_path, "a.json", json.dumps(rows)))
    assert examples[0] == Example("q", response="6*7=42\n#### 42", answer="42")
    assert examples[1].response == examples[1].answer == "plain, with a << b"
    assert "1 answers are as GSM8K's" in caplog.text
    as_it_stands = load_file(write(tmp_path, "a.json", json.dumps(rows)), format="plain")
    assert as_it_stands[0].response == rows[0]["answer"]


# --- options


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"choices": {"text": ["shed", "river"], "label": ["A", "B"]}, "answerKey": "B"}, "B"),
        ({"choices": {"text": ["shed", "river"], "label": ["1", "2"]}, "answerKey": "2"}, "B"),
        ({"options": ["shed", "river"], "answer": 1}, "B"),
        ({"options": ["A)shed", "B)river"], "answer": "B"}, "B"),
        ({"options": {"A": "shed", "B": "river"}, "answer": "river"}, "B"),
        ({"A": "shed", "B": "river", "answer": "B"}, "B"),
        ({"option_a": "shed", "option_b": "river", "label": "B"}, "B"),
        ({"options": "(A) shed (B) river", "answer": "B"}, "B"),
    ],
)
def test_options_reach_the_question(tmp_path, columns, label):
    row = {"question": "Where is a boat kept?", **columns}
    expected = "Where is a boat kept?\nAnswer Choices: (A) shed (B) river"
    example = load_file(write(tmp_path, "a.json", json.dumps([row])), required={"answer"})[0]
    assert (example.question, example.answer) == (expected, label)


def test_a_position_among_the_options_is_no_response(tmp_path):
    row = {"question": "Where is a boat kept?", "choices": ["shed", "river"], "answer": 1}
    assert load_file(write(tmp_path, "a.json", json.dumps([row])))[0].response == "B"
    row["answer"] = "river"
    assert load_file(write(tmp_path, "a.json", json.dumps([row])))[0].response == "river"


def test_options_that_the_question_shows_are_not_shown_twice(tmp_path):
    row = {"question": "In a shed or a river?", "choices": ["shed", "river"], "answer": "A"}
    assert load_file(write(tmp_path, "a.json", json.dumps([row])))[0].question == row["question"]
    with pytest.raises(RequestError, match="item 1: column 'choices' holds no options"):
        load_file(write(tmp_path, "a.json", json.dumps([{**row, "choices": {"label": [], "text": []}}])))


# --- conversations


def test_system_and_history_come_before_the_question(tmp_path):
    row = {"system_prompt": "Be brief.", "history": [["1 + 1?", "2"]], "instruction": "And 2 + 2?", "output": "4"}
    history = (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))
    assert load_file(write(tmp_path, "a.json", json.dumps([row]))) == [
        Example("And 2 + 2?", response="4", history=history)
    ]


@pytest.mark.parametrize("keys", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
def test_messages_are_an_example_with_what_came_before(tmp_path, keys):
    role, content, user, assistant = keys
    said = [(user, "1 + 1?"), (assistant, "2"), (user, "2 + 2?"), (assistant, "4")]
    name = "messages" if role == "role" else "conversations"
    path = write(tmp_path, "a.jsonl", json.dumps({name: [{role: who, content: what} for who, what in said], "id": 3}))
    assert load_file(path) == [Example("2 + 2?", response="4", history=(("user", "1 + 1?"), ("assistant", "2")))]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "must hold a list of messages"),
        ([], "must hold a list of messages"),
        (["Hello"], "must hold messages"),
        ([{"role": "tool", "content": "3"}], "the role 'tool'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content is no text"),
        ([{"role": "assistant", "content": "Hello"}], "must end in a question"),
        ([{"role": "user", "content": "Hello"}], r"the response \(column 'messages'\) is empty"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_line(tmp_path, messages, message):
    path = write(tmp_path, "a.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(RequestError, match=rf"line 1.*{message}"):
        load_file(path)
