import json
from typing import get_args

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.evaluation.protocols import PROTOCOLS
from llm_adapters.evaluation.records import Journal, Record, read_records, score, write_records
from llm_adapters.tasks.answers import ProtocolName


def record(index=0, output="The answer is 5.", label="5.0", **fields):
    given = {"extracted": 5.0, "correct": True, "finished": True, "tokens": 7} | fields
    return Record(index, f"How many {index}?\n«é»\u2028", "prompt\n### Response:\n", output, label=label, **given)


RECORDS = [record(0), record(1, extracted=None, correct=False), record(2, "B", "B", extracted="B", seen=True)]


def test_records_come_back_as_they_were_written(tmp_path):
    write_records(tmp_path / "svamp.jsonl", RECORDS)
    assert read_records(tmp_path / "svamp.jsonl") == RECORDS


def test_a_line_is_what_the_design_promises(tmp_path):
    write_records(tmp_path / "svamp.jsonl", RECORDS)
    lines = (tmp_path / "svamp.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    assert len(lines) == 3
    promised = {"index", "question", "prompt", "output", "extracted", "label", "correct", "finished", "tokens"}
    for line in lines:
        assert promised <= json.loads(line).keys()


@pytest.mark.parametrize("line", ["{", "[]", '{"index": 1}', "5"])
def test_what_is_no_record_is_named_by_file_and_line(tmp_path, line):
    file = tmp_path / "svamp.jsonl"
    write_records(file, RECORDS)
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"line 4 of '.*svamp\.jsonl' is not a record"):
        read_records(file)
    with pytest.raises(RequestError, match="cannot be read"):
        read_records(tmp_path / "nothing.jsonl")


WRONG = {
    "index": ["<b>1</b>", None, 1.5, True],
    "question": [None, 3, ["q"]],
    "prompt": [7, {}],
    "output": [None, False],
    "extracted": [[], {"a": 1}, True],
    "label": [4],
    "correct": [1, "true"],
    "finished": [None],
    "tokens": ["7", -0.5],
    "skipped": [0],
    "seen": ["no"],
    "colour": ["red"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_record_of_other_types_is_refused_and_ends_a_journal(tmp_path, field, value):
    document = {**json.loads(json.dumps(record(1).__dict__)), field: value}
    (tmp_path / "records").write_text("\n" + json.dumps(document) + "\n")
    with pytest.raises(RequestError, match=rf"line 2 of '.*records' is not a record \(.*{field}"):
        read_records(tmp_path / "records")
    (tmp_path / "journal").write_text(
        json.dumps({"settings": "abc"}) + "\n" + json.dumps({**document, "seconds": 1.0}) + "\n"
    )
    assert Journal(tmp_path / "journal", "abc").resume() == []


@pytest.mark.parametrize("seconds", ["x", None, "NaN", "1e999"])
def test_seconds_that_are_no_number_end_a_journal(tmp_path, seconds):
    line = json.dumps(record(1).__dict__)[:-1] + f', "seconds": {seconds}}}'
    (tmp_path / "journal").write_text(json.dumps({"settings": "abc"}) + "\n" + line + "\n")
    assert Journal(tmp_path / "journal", "abc").resume() == []


@pytest.mark.parametrize(
    ("output", "kind", "template", "protocol", "expected"),
    [
        ("The answer is 5. There are 7 left.", "number", "alpaca", "default", 5.0),
        ("The answer is 5. There are 7 left.", "number", "alpaca", "paper", 7.0),  # the last number
        ("5 + 2 makes 7", "number", "alpaca", "strict", None),
        ("5\n\n### Instruction:\nWhat is 8?", "number", "alpaca", "default", 5.0),
        # The paper's code cuts at the next response only.
        ("5\n\n### Instruction:\nWhat is 8?", "number", "alpaca", "paper", 8.0),
        ("5\n### Response:\n9", "number", "paper", "paper", 5.0),
        ("Answer: B", "letter", "alpaca", "paper", "A"),
        ("Answer: B", "letter", "alpaca", "default", "B"),
    ],
)
def test_answers_are_read_by_the_rule_that_was_asked_for(output, kind, template, protocol, expected):
    answer, correct = score(output, str(expected), kind, template=template, protocol=PROTOCOLS[protocol])
    assert answer == expected
    assert correct == (expected is not None)


def test_rescoring_a_record():
    default, paper = ({"template": "alpaca", "protocol": PROTOCOLS[name]} for name in ("default", "paper"))
    again = record(0, "The answer is 5. There are 7 left.").rescored("number", **paper)
    assert (again.extracted, again.correct) == (7.0, False)
    assert again.rescored("number", **default) == record(0, "The answer is 5. There are 7 left.")
    skipped = record(0, "", skipped=True, extracted=None, correct=False)
    assert skipped.rescored("number", **default) == skipped


def fill(path, settings="abc", count=3):
    journal = Journal(path, settings)
    assert journal.resume() == []
    for kept in RECORDS[:count]:
        journal.add(kept, 0.5)
    return journal


def test_a_journal_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / ".svamp.partial.jsonl"
    fill(path, count=2)
    journal = Journal(path, "abc")
    assert journal.resume() == [(RECORDS[0], 0.5), (RECORDS[1], 0.5)]
    journal.add(RECORDS[2], 0.25)
    assert Journal(path, "abc").resume() == [(RECORDS[0], 0.5), (RECORDS[1], 0.5), (RECORDS[2], 0.25)]
    journal.remove()
    assert not path.exists()


def test_a_journal_of_other_settings_is_not_resumed(tmp_path):
    path = tmp_path / "journal"
    fill(path)
    assert Journal(path, "xyz").resume() == []
    assert Journal(path, "abc").resume() == []  # it has begun again


@pytest.mark.parametrize("lost", range(1, 400, 7))
def test_a_journal_that_breaks_off_anywhere_keeps_what_is_whole(tmp_path, lost):
    path = tmp_path / "journal"
    fill(path)
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    whole = data[:-lost].count(b"\n") - 1
    journal = Journal(path, "abc")
    # A line that lacks only its line end is whole.
    assert [kept for kept, _ in journal.resume()] in (RECORDS[:whole], RECORDS[: whole + 1])
    journal.add(RECORDS[2], 0.5)
    assert Journal(path, "abc").resume()[-1] == (RECORDS[2], 0.5)


@pytest.mark.parametrize(
    "content", ["", "\n", "nonsense\n", "[]\n", '{"settings": 1}\n', "\x00\x01", "[" * 100_000, '{"a":' * 9999]
)
def test_what_is_no_journal_is_begun_again(tmp_path, content):
    path = tmp_path / "journal"
    path.write_text(content)
    fill(path)


def test_without_a_path_nothing_is_kept(tmp_path):
    journal = fill(None)
    journal.remove()
    assert Journal(None, "abc").resume() == []


def test_the_typed_protocol_names_are_the_rows():
    assert set(get_args(ProtocolName)) == set(PROTOCOLS)
    assert all(name == row.name for name, row in PROTOCOLS.items())
