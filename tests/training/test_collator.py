"""Micro-batches, packed and padded, and the order of the data."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llm_adapters.ops.packing import make_packs
from llm_adapters.tasks.templates import Encoded
from llm_adapters.training.collator import Collator

SHORT, LONG = Encoded([5, 6], [5, 6], 0), Encoded([7, 8, 9], [-100, 8, 9], 1)


def test_padded_rows_are_padded_on_the_right_and_no_first_token_is_a_label() -> None:
    (micro,) = Collator(0, packed=False).make_micro_batches([SHORT, LONG])
    assert {name: rows.tolist() for name, rows in micro.inputs.items()} == {
        "input_ids": [[7, 8, 9], [5, 6, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert micro.label_positions.tolist() == [0, 1, 3]  # the place before each label
    assert micro.targets.tolist() == [8, 9, 6]
    assert (micro.tokens, micro.pack) == (5, None)


def test_a_pack_holds_the_common_beginning_once() -> None:
    one = Encoded([7, 7, 7, 1, 2], [-100, -100, -100, -100, 2], 4)
    other = Encoded([7, 7, 7, 3], [-100, -100, -100, 3], 3)
    (micro,) = Collator(0).make_micro_batches([other, one])
    assert micro.pack is not None
    # The last of the three predicts a label of the second example, so that it is not shared.
    assert micro.pack.prefix == 2
    assert micro.pack.end == 7
    assert micro.pack.input_ids.tolist() == [[7, 7, 7, 1, 2, 7, 3, 0]]  # a filler makes the size round
    assert micro.pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert (micro.label_positions.tolist(), micro.targets.tolist()) == ([3, 5], [2, 3])
    assert micro.tokens == 9


def test_where_the_prompt_is_labelled_nothing_is_shared() -> None:
    one, other = Encoded([7, 7, 1], [7, 7, 1], 2), Encoded([7, 7, 2], [7, 7, 2], 2)
    (micro,) = Collator(0).make_micro_batches([one, other])
    assert micro.pack is not None
    assert micro.pack.prefix == 0
    assert micro.targets.tolist() == [7, 1, 7, 2]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=25),
    st.integers(1, 120),
    st.integers(1, 30),
    st.booleans(),
)
def test_every_label_is_predicted_once_from_the_token_before_it(
    sizes: list[tuple[int, int]], tokens: int, most: int, packed: bool
) -> None:
    data = []
    for index, (prompt, answer) in enumerate(sizes):
        ids = [1, 1, *(100 * index + n for n in range(2, prompt + answer + 2))]
        data.append(Encoded(ids, [-100] * (prompt + 2) + ids[prompt + 2 :], prompt + 2))
    cut = Collator(0, packed, tokens, most)(data)
    pairs = []
    for micro in cut["micro_batches"]:
        row = micro.inputs["input_ids"].flatten()
        pairs += zip(row[micro.label_positions].tolist(), micro.targets.tolist(), strict=True)
        one = len(micro.pack.lengths) if micro.pack else len(micro.inputs["input_ids"])
        assert one <= most
        assert (micro.pack.end if micro.pack else row.numel()) <= tokens or one == 1
    expected = [(e.input_ids[i - 1], e.labels[i]) for e in data for i in range(1, len(e.labels)) if e.labels[i] != -100]
    assert Counter(pairs) == Counter(expected)
    assert len(cut["labels"]) == len(expected)
    assert sum(micro.tokens for micro in cut["micro_batches"]) == sum(len(e.input_ids) for e in data)


def test_packs_are_of_about_equal_size() -> None:
    packs = make_packs([100] * 13, prefix=20, max_tokens=420)
    assert sorted(len(pack) for pack in packs) == [4, 4, 5]


def test_a_process_without_a_part_in_a_step_has_nothing_to_compute() -> None:
    cut = Collator(pad_token_id=0)([])
    assert len(cut["labels"]) == len(cut["micro_batches"]) == 0
