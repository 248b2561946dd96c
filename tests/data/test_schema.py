import json
from pathlib import Path

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.data.formats import data_files
from clpl_moe.data.schema import checked_lines, find_faults, normalise, read_examples
from helpers.tiny_training import arguments, make_triplets, refused

GOOD = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "neg_q": ["a", None]}

# FlagEmbedding answers these with a ZeroDivisionError, a KeyError, an IndexError, or not at all.
FAULTS = [
    ({"query": ...}, "field 'query': is missing, expected a string"),
    ({"query": None}, "field 'query': found null, expected a string"),
    ({"query": 3}, "field 'query': found a number, expected a string"),
    ({"query": " \t"}, "field 'query': found an empty string, expected text"),
    ({"pos": ...}, "field 'pos': is missing, expected a list of strings"),
    ({"pos": "p"}, "field 'pos': found a string, expected a list of strings"),
    ({"pos": []}, "field 'pos': found an empty list, expected at least one passage"),
    ({"pos": ["p", ""]}, "field 'pos[1]': found an empty string, expected text"),
    ({"pos": [["p"]]}, "field 'pos[0]': found a list, expected a string"),
    ({"neg": ...}, "field 'neg_q': found 2 entries, expected 0"),
    ({"neg": None}, "field 'neg_q': found 2 entries, expected 0"),
    ({"neg": "n", "neg_q": None}, "field 'neg': found a string, expected a list of strings"),
    ({"neg": ["n", {}]}, "field 'neg[1]': found an object, expected a string"),
    ({"neg_q": "a"}, "field 'neg_q': found a string, expected a list as long as 'neg'"),
    ({"neg_q": {"n": "a"}}, "field 'neg_q': found an object, expected a list as long as 'neg'"),
    ({"neg_q": []}, "field 'neg_q': found 0 entries, expected 2"),
    ({"neg_q": ["a"]}, "field 'neg_q': found 1 entries, expected 2"),
    ({"neg_q": ["a", "b", "c"]}, "field 'neg_q': found 3 entries, expected 2"),
    ({"neg_q": ["a", ""]}, "field 'neg_q[1]': found an empty string, expected text, or null"),
    ({"neg_q": ["a", 1]}, "field 'neg_q[1]': found a number, expected a string, a list of strings or null"),
    ({"neg_q": ["a", ["b", " "]]}, "field 'neg_q[1][1]': found an empty string, expected text"),
    ({"neg_q": ["a", [None]]}, "field 'neg_q[1][0]': found null, expected a string"),
    ({"pos_scores": 1}, "field 'pos_scores': found a number, expected a list of numbers"),
    ({"pos_scores": [1, 2]}, "field 'pos_scores': found 2 numbers, expected 1"),
    ({"neg_scores": [0.1]}, "field 'neg_scores': found 1 numbers, expected 2"),
    ({"neg_guide_scores": [0.1]}, "field 'neg_guide_scores': found 1 numbers, expected 2"),
    ({"pos_guide_scores": ["a"]}, "field 'pos_guide_scores[0]': found a string, expected a number"),
    ({"neg_scores": [0.1, "0.2"]}, "field 'neg_scores[1]': found a string, expected a number"),
    ({"neg_scores": [True, 0.2]}, "field 'neg_scores[0]': found a boolean, expected a number"),
    ({"neg_scores": [0.1, float("nan")]}, "field 'neg_scores[1]': found NaN, expected a finite number"),
    (
        {"neg_scores": [float("inf"), 0.1]},
        "field 'neg_scores[0]': found a number too large, expected a finite",
    ),
    ({"neg_scores": [10**400, 0.1]}, "field 'neg_scores[0]': found a number too large, expected a finite"),
    ({"prompt": 1}, "field 'prompt': found a number, expected a string"),
    ({"type": ["symmetric_sts"]}, "field 'type': found a list, expected a string"),
]


def changed(change):
    return {name: value for name, value in {**GOOD, **change}.items() if value is not ...}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refusal(argv, capsys):
    """The message of a command that refuses; the only one on stderr."""
    err = refused(argv, capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=lambda v: str(v)[:60] if isinstance(v, dict) else "")
def test_each_fault_has_one_message_with_file_and_line(tmp_path, change, message):
    path = write(tmp_path / "data.jsonl", GOOD, changed(change))
    with pytest.raises(UserError) as error:
        list(read_examples(path))
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


def test_other_names_of_the_fields_are_asked_for_once(tmp_path):
    path = write(tmp_path / "data.jsonl", {"input": "q", "output": "p"}, {"input": "r", "output": "s"})
    first, second = ([*line.faults] for line in checked_lines(data_files([str(path)])[0]))
    hint = f"; the line has input, output; if these are other names, write {path},query=NAME,pos=NAME"
    assert first == [f"field 'query': is missing, expected a string{hint}", *second[1:]]
    assert second[0] == "field 'query': is missing, expected a string"
    named = data_files([f"{path},query=input,pos=output"])[0]
    assert [(x["query"], x["pos"]) for x in read_examples(named)] == [("q", ["p"]), ("r", ["s"])]
    path = write(tmp_path / "data.jsonl", GOOD, changed({"pos": ...}))  # these are the names
    with pytest.raises(UserError, match=r":2: field 'pos': is missing, expected a list of strings$"):
        list(read_examples(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q", "pos": [', "not JSON"),
        (b'["q"]', "found list, expected a JSON object"),
        (b'"q"', "found str, expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"query": "\\ud800", "pos": ["p"], "neg": ["n"]}', "half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_objects(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        list(read_examples(path))
    assert str(error.value).startswith(f"{path}:3: ")


def test_scores_are_required_for_distillation_only(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD)
    assert next(read_examples(path))["pos_scores"] is None
    with pytest.raises(UserError, match=r":1: field 'pos_scores': is missing.*knowledge_distillation"):
        list(read_examples(path, with_scores=True))
    path = write(tmp_path / "data.jsonl", GOOD | {"pos_scores": [1], "neg_scores": [0.5, 0]})
    assert next(read_examples(path, with_scores=True))["neg_scores"] == [0.5, 0.0]


def test_scores_of_a_guide_are_those_of_mine_or_else_a_teachers(tmp_path):
    def read(**scores):
        example = next(read_examples(write(tmp_path / "data.jsonl", GOOD | scores)))
        return example["pos_guide_scores"], example["neg_guide_scores"]

    assert read() == (None, None)
    teacher = {"pos_scores": [1], "neg_scores": [0.5, 0]}
    assert read(**teacher) == ([1.0], [0.5, 0.0])
    assert read(**teacher, pos_guide_scores=[0.7], neg_guide_scores=[0.8, 0.9]) == ([0.7], [0.8, 0.9])
    assert read(**teacher, neg_guide_scores=[0.8, 0.9]) == ([1.0], [0.5, 0.0])
    assert read(neg_guide_scores=[0.8, 0.9]) == (None, None)


NO_NEGATIVES = [
    ({"neg": ...}, "is missing, expected a list of strings"),
    ({"neg": None}, "found null, expected a list of strings"),
    ({"neg": []}, "found an empty list, expected at least one passage"),
]


@pytest.mark.parametrize(("change", "fault"), NO_NEGATIVES)
@pytest.mark.parametrize("neg_q", [{"neg_q": ...}, {"neg_q": None}, {"neg_q": []}])
def test_pairs_need_no_negatives_but_for_distillation(tmp_path, change, neg_q, fault):
    path = write(tmp_path / "data.jsonl", changed(change | neg_q | {"pos_scores": [1], "neg_scores": []}))
    example = next(read_examples(path))
    assert (example["neg"], example["negative_queries"]) == ([], [])
    with pytest.raises(UserError, match=f":1: field 'neg': {fault}"):
        list(read_examples(path, with_scores=True))


def test_all_spellings_of_neg_q_become_lists_of_lists():
    record = GOOD | {"neg": list("abcd"), "neg_q": ["x", ["y", "z"], [], None]}
    assert not list(find_faults(record))
    assert normalise(record)["negative_queries"] == [["x"], ["y", "z"], [], []]
    for absent in ({**GOOD, "neg_q": None}, {k: v for k, v in GOOD.items() if k != "neg_q"}):
        assert not list(find_faults(absent))
        assert normalise(absent)["negative_queries"] == [[], []]


def test_unknown_fields_are_allowed():
    assert not list(find_faults(GOOD | {"query_id": 7, "neg_ids": [1]}))


def test_all_faults_of_a_line_are_found():
    fields = {
        fault.split("'")[1] for fault in find_faults({"query": "", "pos": [], "neg": ["n"], "neg_q": [None, None]})
    }
    assert fields == {"query", "pos", "neg_q"}


def test_files_and_folders(tmp_path):
    names = ["b.jsonl", "a.json"]
    for name in names:
        write(tmp_path / name, GOOD)
    (tmp_path / "empty").mkdir()
    without = write(tmp_path / "noextension", GOOD)
    with pytest.warns(UserWarning, match=r"left out of the training data: empty/, noextension$"):
        found = data_files([str(tmp_path)])
    assert [Path(file.path).name for file in found] == ["a.json", "b.jsonl"]
    assert [p.path for p in data_files([str(without)])] == [str(without)]
    with pytest.raises(UserError, match="empty: the folder holds no training data"):
        data_files([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="nowhere.jsonl: no such file or folder"):
        data_files([str(tmp_path / "nowhere.jsonl")])


def test_commands_end_with_the_message_and_write_nothing(tiny_encoder, tmp_path, capsys):
    """Through the command line, training and dry run: the same message, exit code 2, no run folder."""
    bad = write(tmp_path / "bad.jsonl", GOOD, changed({"pos": []}))
    empty = write(tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    for path, message in [
        (bad, f"{bad}:2: field 'pos': found an empty list"),
        (empty, f"{empty}: the file is empty"),
        (tmp_path / "folder", f"{tmp_path / 'folder'}: the folder holds no training data"),
        (tmp_path / "gone", f"{tmp_path / 'gone'}: no such file or folder"),
    ]:
        for dry_run in ("false", "true"):
            argv = arguments(tiny_encoder, path, tmp_path / "out", dry_run=dry_run)
            assert refusal(argv, capsys).startswith(message)
            assert not (tmp_path / "out").exists()


def test_good_lines_of_the_other_tests():
    assert not [fault for record in make_triplets(50) for fault in find_faults(record)]
