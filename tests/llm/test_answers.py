import time

import pytest

from clpl_moe.llm.answers import clean, find_fault, read_queries

PASSAGE = "우리 도시의 다리는 1932년에 강 위에 놓였다. 처음에는 나무로 만들었다."


@pytest.mark.parametrize(
    ("answer", "queries"),
    [
        ("다리는 언제 놓였나요?", ["다리는 언제 놓였나요?"]),
        ("1. 다리는 언제?\n2) 누가 만들었나?\n", ["다리는 언제?", "누가 만들었나?"]),
        ("- **질문 1:** “다리는 언제?”", ["다리는 언제?"]),
        ('Query: "when was the bridge built?"', ["when was the bridge built?"]),
        ("다음은 질문입니다:\n\n* `다리는 언제?`", ["다리는 언제?"]),
        ('```json\n["다리는 언제?", "누가?"]\n```', ["다리는 언제?", "누가?"]),
        ('{"queries": ["다리는 언제?"]}', ["다리는 언제?"]),
        ('[{"query": "다리는 언제?", "type": "when"}, {}, 3]', ["다리는 언제?"]),
        ("«پل» و «رود»", ["«پل» و «رود»"]),
        ("'다리'와 '강'", ["'다리'와 '강'"]),
        ("'What's a bridge?'", ["What's a bridge?"]),
        ("<think>음, 다리에 대해\n물어보자</think>\n다리는 언제?", ["다리는 언제?"]),
        ("<think>끝나지 않는", []),
        # The chat template has written the opening tag into the prompt.
        ("다리에 대해\n물어보자\n</think>\n\n다리는 언제?", ["다리는 언제?"]),
        ("음</thinking>\n다리는?\n</think>누가?\n<think>또", ["누가?"]),
        ('[{"id": 1, "query": "다리는 언제?"}, {"id": 2, "query": "누가?"}]', ["다리는 언제?", "누가?"]),
        ('{"queries": [{"type": "fact", "query": "누가?"}], "language": "ko"}', ["누가?"]),
        ('[{"유형": "사실", "질문": "다리는 언제 놓였나?"}]', ["다리는 언제 놓였나?"]),
        ('{"query1": "다리는 언제?", "query2": "누가?"}', ["다리는 언제?", "누가?"]),
        ('{"query": "다리는 언제?", "language": "ko", "keywords": ["다리"]}', ["다리는 언제?"]),
        ('{"text": "우리 도시의 다리", "questions": ["누가?"]}', ["누가?"]),
        ('{"query": "다리는 언제?"}\n{"query": "누가?"}', ["다리는 언제?", "누가?"]),
        ('네, 여기 있습니다.\n```json\n{"queries": ["다리는 언제?"]}\n```\n도움이 되길 바랍니다!', ["다리는 언제?"]),
        ('```json {"query": "누가?"}```', ["누가?"]),
        ("```\n다리는 언제?\n```", ["다리는 언제?"]),
        ('네.\n{\n  "queries": [\n    "다리는 언제?,\n  ]\n}', ['{ "queries": [ "다리는 언제?, ] }']),
        ("3.1 운동은 언제 일어났나?", ["3.1 운동은 언제 일어났나?"]),
        ("1945년에 무슨 일이?", ["1945년에 무슨 일이?"]),
        ("पुल कब बना?\n۱. پل کی ساخته شد؟\n«پل کجاست؟»", ["पुल कब बना?", "پل کی ساخته شد؟", "پل کجاست؟"]),
        ("C# 언어는 무엇인가?", ["C# 언어는 무엇인가?"]),
        ("", []),
    ],
)
def test_answers_are_cleaned(answer, queries):
    assert clean(answer) == queries


@pytest.mark.parametrize(
    ("query", "language", "fault"),
    [
        ("이 도시에는 언제 다리가 생겼나요?", "ko", None),
        ("DNA 구조는 누가 밝혔나?", "ko", None),
        ("when was the bridge built?", "ko", "wrong script"),
        ("다리는 언제 놓였나요?", "fa", "wrong script"),
        ("پل کی ساخته شد؟", "fa", None),
        ("पुल कब बना था?", "hi", None),
        ("什么时候建的桥？", "ko", "wrong script"),
        ("언제 놓였나요?", "xx", None),  # the passage's own script
        ("when was it built?", "xx", "wrong script"),
        ("ﾊｼﾊ ｲﾂ ﾃﾞｷﾀ?", "ja", None),  # half width
        ("1932?", "ko", "empty"),
        ("우리 도시의 다리는 1932년에 강 위에 놓였다?", "ko", "copied from the passage"),
        ("처음에는, 나무로 만들었다", "ko", "copied from the passage"),
        ("왜 " * 101, "ko", "too long"),
        ('{"query": "다리는 언제?', "ko", "unreadable JSON"),
        ("[{ '질문': '다리는 언제?' }]", "ko", "unreadable JSON"),
        ("[속보] 다리는 언제?", "ko", None),
    ],
)
def test_queries_are_checked(query, language, fault):
    assert find_fault(query, PASSAGE, language, 200) == fault


@pytest.mark.parametrize(
    ("query", "passage", "language", "copied"),
    [
        # With other vowel signs it is another query.
        ("नदी का पुल?", "यह नदी के पुल की बात है।", "hi", False),
        ("नदी के पुल?", "यह नदी के पुल की बात है।", "hi", True),
        ("art", "a party at night", "en", False),
        ("the art", "See «The Art» of it.", "en", True),
        ("도시의 다리", "우리 도시의 다리는 1932년에 놓였다.", "ko", True),  # with a particle
        ("橋はいつ", "あの橋はいつ架けられたか。", "ja", True),
        ("สะพาน", "ที่นี่มีสะพานไม้", "th", True),
    ],
)
def test_a_query_is_copied_where_its_words_stand_in_the_passage(query, passage, language, copied):
    assert find_fault(query, passage, language, 200) == ("copied from the passage" if copied else None)


def test_queries_of_an_answer():
    how = {"language": "ko", "wanted": 2, "max_chars": 200}
    three = "Sure!\n다리는 언제 생겼나요?\n다리는 언제 생겼나요?\n누가 지었나요?\n무엇으로 지었나요?"
    assert read_queries(three, PASSAGE, **how) == (["다리는 언제 생겼나요?", "누가 지었나요?"], None)
    assert read_queries("Sure!\n처음에는 나무로 만들었다", PASSAGE, **how) == ([], "copied from the passage")
    assert read_queries("누가 지었나요?\n무엇으로", PASSAGE, **how, cut=True) == (["누가 지었나요?"], None)
    assert read_queries("무엇으로", PASSAGE, **how, cut=True) == ([], "cut off")
    assert read_queries(None, PASSAGE, **how) == ([], "empty")
    assert read_queries("1. {'query': '누가 지었나요?'}", PASSAGE, **how) == ([], "unreadable JSON")


@pytest.mark.parametrize(
    ("answer", "language", "queries"),
    [
        ("네, 알겠습니다.\n프랑스의 수도는?", "ko", ["프랑스의 수도는?"]),
        ("البته!\nپل کی ساخته شد؟", "fa", ["پل کی ساخته شد؟"]),
        ("はい。\n橋はいつできましたか？", "ja", ["橋はいつできましたか？"]),
        ("Sure!\nWhich river?\nWhose house?", "en", ["Which river?"]),
        ("Sure!\nwhich river", "en", ["Sure!"]),  # which of them is none is not known
    ],
)
def test_of_more_queries_than_wanted_questions_come_first(answer, language, queries):
    assert read_queries(answer, "...", language=language, wanted=1, max_chars=200) == (queries, None)
    both = read_queries(answer, "...", language=language, wanted=3, max_chars=200)
    assert both == (answer.split("\n"), None)


@pytest.mark.parametrize("sign", ["[\n", "- ", "Query: "])
def test_signs_without_end_take_no_time(sign):
    """As a model writes them that has gone astray."""
    started = time.process_time()
    assert read_queries(sign * 30_000, "p", language="ko", wanted=1, max_chars=100)[0] == []
    assert time.process_time() - started < 5
