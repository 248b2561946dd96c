import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clpl_moe.judge.answers import Verdict, answer_schema, read_verdicts

THREE = {1: "yes", 2: "partly", 3: "no"}
ENTRIES = [{"passage": number, "answers": answers} for number, answers in THREE.items()]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"verdicts": ENTRIES}),
        json.dumps(ENTRIES),
        "\n".join(map(json.dumps, ENTRIES)),
        f"```json\n{json.dumps({'verdicts': ENTRIES}, indent=2)}\n```\nThat is all.",
        f'<think>Is it {{"passage": 1, "answers": "no"}}?</think>{json.dumps(ENTRIES)}',
        'Here: {"1": "yes", "2": "Partly", "3": "No."}',
        '{"verdicts": {"passage 1": "yes", "passage 2": "in part", "passage 3": false}}',
        '{"result": [{"number": "1", "label": "Yes"}, {"id": "[2]", "verdict": "partial"}, {"passage": 3, "answer": "no"}]}',
        json.dumps([{**entry, "answers": w} for entry, w in zip(ENTRIES, ("예", "부분적으로", "아니요"))]),
        "1: yes\n2: partly\n3: no",
        "[1] yes\n[2] partially, since the year is missing\n[3] no (it is about another bridge)",
        "**Passage 1:** Yes\n\n**Passage 2:** Partly\n\n**Passage 3:** No",
        "| passage | answers |\n|---|---|\n| 1 | yes |\n| 2 | partly |\n| 3 | no |",
        "1) answers: yes\n2) answers: partly\n3) answers: no",
        "문단 1: 예\n문단 2: 일부만 있습니다\n문단 3: 아니오",
        "متن ۱: بله\nمتن ۲: تا حدی\nمتن ۳: خیر",
        "अनुच्छेद १: हाँ\nअनुच्छेद २: आंशिक रूप से\nअनुच्छेद ३: नहीं",
    ],
)
def test_verdicts_are_found_in_every_form_that_models_write(text):
    assert {number: verdict.answers for number, verdict in read_verdicts(text, 3).items()} == THREE


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        (None, 3, {}),
        ("", 3, {}),
        ("I cannot say.", 1, {}),
        ("No.", 1, {1: "no"}),
        ("Nothing of that", 1, {}),
        ("yes", 2, {}),
        ("3 passages were given.\n1: yes", 3, {1: "yes"}),
        ("1: not sure\n2: nobody knows\n3: yesterday", 3, {}),
        ("0: yes\n4: yes", 3, {}),
        ("1: yes\n1: no\n2: no\n2: no", 2, {2: "no"}),
        ('{"passage": 1, "answers": "yes"} {"passage": 1, "answers": "no"}', 1, {}),
        ('{"passage": 1, "answers": "maybe"}', 1, {}),
        ('{"passage": true, "answers": "yes"}', 1, {}),
        ('{"verdicts": [{"passage": 1, "answers": "yes"}, {"passage": 2, "answ', 2, {1: "yes"}),
        ("{" * 5000, 1, {}),
        ('{"a":' * 5000, 1, {}),
    ],
)
def test_what_is_no_verdict_is_left_out(text, count, expected):
    assert {number: verdict.answers for number, verdict in read_verdicts(text, count).items()} == expected


@pytest.mark.parametrize("text", ["-" * 100_000, "[" * 100_000, "1: " + "-" * 100_000, ("-" * 1000 + "\n") * 100])
def test_signs_without_end_take_no_time(text):
    """As a model writes them that has gone astray."""
    started = time.process_time()
    assert read_verdicts(text, 3) == {}
    assert time.process_time() - started < 5


def test_the_last_line_of_an_answer_that_was_cut_is_not_whole():
    assert read_verdicts("1: yes\n2: no", 2, cut=True).keys() == {1}
    assert read_verdicts("no", 1, cut=True) == {}


def test_queries_come_with_the_verdicts():
    answer = json.dumps(
        {"verdicts": [{"passage": 1, "answers": "no", "query": "왜?"}, {"passage": 2, "answers": "yes"}]}
    )
    assert read_verdicts(answer, 2) == {1: Verdict("no", "왜?"), 2: Verdict("yes")}


def test_the_schema_allows_nothing_else():
    entry = answer_schema(True)["properties"]["verdicts"]["items"]
    assert entry["required"] == ["passage", "answers", "query"]
    assert entry["additionalProperties"] is False
    assert "query" not in answer_schema(False)["properties"]["verdicts"]["items"]["properties"]


@given(st.text(st.sampled_from('{}[]":,0123 \nyesnopartly예')), st.integers(1, 5), st.booleans())
def test_any_answer_is_read_without_an_error(text, count, cut):
    for number, verdict in read_verdicts(text, count, cut).items():
        assert 1 <= number <= count
        assert verdict.answers in ("yes", "partly", "no")
