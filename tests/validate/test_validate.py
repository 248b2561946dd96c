import json
import random
import re
import string
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.schema import read_examples
from clpl_moe.train.__main__ import main as train
from clpl_moe.train.arguments import CLPLDataArguments
from clpl_moe.validate import validate
from clpl_moe.validate.__main__ import main
from clpl_moe.validate.reading import Reading
from clpl_moe.validate.report import validate_file
from helpers.tiny_training import arguments, make_triplets, refused, write_triplets

GOOD = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "neg_q": ["a", None]}


def run(capsys, *argv):
    """Exit code, what went to stdout, and the lines of stderr."""
    code = 0
    try:
        main(list(map(str, argv)))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.splitlines()


def figures(out):
    """The table's upper part, as name -> value."""
    return dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", out, re.MULTILINE))


def test_every_fault_of_every_line(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    lines = [GOOD, {"query": "", "pos": [], "neg": ["n"], "neg_q": [None, ""]}, GOOD | {"neg": [1, 2]}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"query": "a", "query": "", "pos": ["p"], "neg": "\\ud800"}\n[\n'
    path.write_text(text)
    code, out, err = run(capsys, path)
    assert code == 2
    assert err == [
        f"{path}:2: field 'query': found an empty string, expected text",
        f"{path}:2: field 'pos': found an empty list, expected at least one passage",
        f"{path}:2: field 'neg_q': found 2 entries, expected 1, one for each entry of 'neg'",
        f"{path}:2: field 'neg_q[1]': found an empty string, expected text, or null where there is no query",
        f"{path}:3: field 'neg[0]': found a number, expected a string",
        f"{path}:3: field 'neg[1]': found a number, expected a string",
        f"{path}:4: not JSON ('query' stands twice), expected one object a line",
        f"{path}:4: holds half of a surrogate pair (an escape \\ud800 to \\udfff)",
        f"{path}:4: field 'query': found an empty string, expected text",
        f"{path}:4: field 'neg': found a string, expected a list of strings",
        f"{path}:5: not JSON (Expecting value), expected one object a line",
        "error: 11 faults: training would refuse these data",
    ]
    assert figures(out)["faults"].startswith("11 in 4 lines")
    assert figures(out)["examples"] == "1"
    code, _, err = run(capsys, path, "--max_faults", 1)
    assert (code, len(err)) == (2, 3)
    assert err[1].startswith(f"{path}: 10 more faults")


def test_all_files_are_looked_at(tmp_path, capsys):
    good, empty = write_triplets(tmp_path / "good.jsonl", 3), tmp_path / "empty.jsonl"
    empty.touch()
    code, out, err = run(capsys, tmp_path / "gone.jsonl", "--max_faults", 5, empty, good)
    assert code == 2
    assert err[0].startswith(f"{tmp_path / 'gone.jsonl'}: no such file")
    assert err[1].startswith(f"{empty}: the file is empty")
    assert figures(out)["examples"] == "3"
    assert run(capsys, good)[::2] == (0, [])
    assert run(capsys, "--train_data", good)[1] == run(capsys, good)[1]
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, good, "--max_fault", 1)
    assert code == 2
    assert "did you mean 'max_faults'?" in err[0]


def test_figures(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    lines = [
        {"query": "무엇", "pos": ["한국어 글", "Latin"], "neg": ["a", "b", "c"], "neg_q": ["x", ["y", "z"], None]},
        {"query": "other", "pos": ["p"], "neg": ["n"], "id": 1},
        {"query": "other", "pos": ["p"], "neg": ["n"], "id": 2},  # equal in what training reads
        {"query": " other ", "pos": ["p"], "neg": ["k"]},
        {"query": "other", "pos": ["o"], "neg": [" o\n", "o", "r"]},
    ]
    write_jsonl(path, lines)
    code, out, err = run(capsys, path, "--query_max_len", 8)
    assert (code, err) == (0, [])
    found = figures(out)
    assert found["positives per query"] == "1 to 2, mean 1.2"
    assert found["negatives per query"] == "1 to 3, mean 1.8"
    assert found["negatives with queries"] == "22.2% of 9"
    assert found["equal lines"] == "1, first in line 3"
    assert found["equal queries with other positives"] == "1 (Latin 1), first in line 5"
    assert found["negatives that equal a positive"] == "2 (Latin 2), first in line 5"
    assert found["of these in other bytes"] == "0"
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["query"][1:6] == ["5", "4.8", "5", "7", "7"]
    assert rows["query"][6:8] == ["8", "?"]  # the limit is in tokens
    assert rows["pos"][-4:] == ["Latin", "69.2%,", "Hangul", "30.8%"]


def test_of_a_tokenizer_that_is_nowhere_only_that_is_told(tmp_path, capsys, caplog):
    write_jsonl(tmp_path / "train.jsonl", [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    code, _, err = run(capsys, tmp_path / "train.jsonl", "--tokenizer", "no/where")
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("error: no/where: neither a folder here nor a model")
    assert not caplog.records


def test_lengths_in_tokens_are_those_that_training_cuts(tiny_encoder, tiny_tokenizer, tmp_path, capsys):
    """By another way than validation's: with the limit, each cut text is exactly as long as it."""
    path = write_triplets(tmp_path / "t.jsonl", 30)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"train_data: [{path}]\nmodel_name_or_path: {tiny_encoder}\noutput_dir: {tmp_path / 'run'}\nnum_experts: 3\n"
        "query_max_len: 14\npassage_max_len: 25\nquery_instruction_for_retrieval: 'ab '\n"
    )
    code, out, err = run(capsys, "--config", config)
    assert (code, err) == (0, [])
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("  ")}
    for kind, limit, prompt in (("query", 14, "ab "), ("neg", 25, "")):
        texts = [t for line in make_triplets(30) for t in ([line[kind]] if kind == "query" else line[kind])]
        lengths = [len(tiny_tokenizer(prompt + text)["input_ids"]) for text in texts]
        over = [length - limit for length in lengths if length > limit]
        assert 0 < len(over) < len(texts)
        assert rows[kind][1] == str(len(texts))
        assert rows[kind][2] == f"{sum(lengths) / len(lengths):.1f}"
        assert rows[kind][5:7] == [str(max(lengths)), str(limit)]
        assert rows[kind][7:9] == [f"{100 * len(over) / len(texts):.1f}%", f"{100 * sum(over) / sum(lengths):.1f}%"]
    out = run(capsys, "--config", config, "--passage_max_len", 127)[1]
    assert re.search(r"^  neg .* 127 +0% +0% ", out, re.MULTILINE)
    # Without a config the folder's own prompts count, of which this one has none.
    out = run(capsys, path, "--tokenizer", tiny_encoder, "--query_max_len", 14)[1]
    assert re.search(r"^  query .* 14 ", out, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_config_of_training_is_checked_as_training_does(tmp_path, capsys):
    path = write_triplets(tmp_path / "t.jsonl", 2)
    config = tmp_path / "c.yaml"
    for text, message in (
        ("pasage_max_len: 5", "unknown option 'pasage_max_len'; did you mean 'passage_max_len'?"),
        ("model_name_or_path: x\npassage_max_len: 1", "passage_max_len: found 1, expected"),
    ):
        config.write_text(text)
        code, _, err = run(capsys, path, "--config", config)
        assert code == 2
        assert message in err[-1]
    # The data are looked at, though the base model is not there.
    config.write_text(f"model_name_or_path: {tmp_path / 'none'}\nknowledge_distillation: true\n")
    code, _, err = run(capsys, path, "--config", config)
    assert code == 2
    assert "lengths are in characters" in err[0]
    assert f"{path}:1: field 'pos_scores': is missing" in err[1]
    assert run(capsys, path, "--tokenizer", tmp_path / "none")[0] == 2
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "none"}}')
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    code, _, err = run(capsys, path, "--tokenizer", broken)
    assert code == 2
    assert "the tokenizer cannot be loaded" in err[-1]
    assert "pos_scores" in run(capsys, path, "--knowledge_distillation", "true")[2][0]


def test_called_from_python(tiny_encoder, tmp_path, capsys):
    good, bad = write_triplets(tmp_path / "good.jsonl", 3), tmp_path / "bad.jsonl"
    write_jsonl(bad, [GOOD, GOOD | {"pos": [], "query": ""}])
    found = validate(train_data=[good, bad, tmp_path / "gone.jsonl"], max_faults=1)
    assert found.faults == 3
    assert [report.path for report in found.files] == [good, bad, tmp_path / "gone.jsonl"]
    assert [report.faults for report in found.files] == [0, 2, 1]
    assert found.files[0].figures.examples == 3
    assert found.files[1].messages == [f"{bad}:2: field 'query': found an empty string, expected text"]
    assert (found.files[1].faulty_lines, found.files[1].figures.examples) == (1, 1)
    assert found.files[2].figures is None
    config = tmp_path / "c.yaml"
    config.write_text(f"train_data: [{good}]\nmodel_name_or_path: {tiny_encoder}\npassage_max_len: 25\n")
    (report,) = validate(config=config).files
    assert report.figures.reading.limits["pos"] == 25
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="max_faults: found -1, expected at least 0"):
        validate(train_data=[good], max_faults=-1)


# --- What validation accepts, training takes; what it refuses, training refuses with the same words ------------------

SCORED = GOOD | {"pos_scores": [0.5], "neg_scores": [0.1, 2], "prompt": "p: ", "type": "only_1neg", "query_id": "7"}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**39), 3e38, 3.5e38, 2**63, float("nan"), -0.0])
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", " ", "\u200b", "\x00", "\u2028", "{}", "\ud800", "\ude00a"])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*SCORED, "id"])


@st.composite
def mutated_lines(draw):
    """The bytes of a line that was right before up to three changes of its fields and one of its bytes."""
    record = dict(draw(st.sampled_from([GOOD, SCORED])))
    pairs = []
    for _ in range(draw(st.integers(0, 3))):
        name, how = (
            draw(FIELDS),
            draw(st.sampled_from(["drop", "set", "item", "item", "grow", "shrink", "twice", "deep"])),
        )
        value = record.get(name)
        if how == "drop":
            record.pop(name, None)
        elif how == "set":
            record[name] = draw(VALUES)
        elif how == "twice":
            pairs.append((name, draw(VALUES)))
        elif how == "deep":
            depth = draw(st.sampled_from([50, 90, 99, 101, 400, 990, 5000]))
            record[name] = f"<{depth}>"
        elif isinstance(value, list):
            value = list(value)
            if how == "grow":
                value.insert(draw(st.integers(0, len(value))), draw(VALUES))
            elif value:
                place = draw(st.integers(0, len(value) - 1))
                value[place : place + 1] = [draw(VALUES)] if how == "item" else []
            record[name] = value
    escaped = draw(st.booleans())
    written = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=escaped)}" for k, v in [*record.items(), *pairs]]
    line = "{" + ", ".join(written) + "}"
    line = re.sub('"<([0-9]+)>"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), line)
    raw = bytearray(line.encode("utf-8", "surrogatepass"))
    change = draw(st.sampled_from(["", "", "", "cut", "byte", "insert", "bom"]))
    place = draw(st.integers(0, len(raw) - 1))
    if change == "cut":
        raw = raw[:place]
    elif change == "byte":
        raw[place] = draw(st.integers(0, 255))
    elif change == "insert":
        raw[place:place] = draw(st.sampled_from([b"\xff", b"\x00", b"\xed\xa0\x80", b"\\", b'"', b"{", b",", b"\xc3"]))
    elif change == "bom":
        raw[:0] = b"\xef\xbb\xbf"
    return bytes(raw).replace(b"\n", b" ").replace(b"\r", b" ")


LINES_A_FILE = 50


def load(path, cache, **options):
    args = CLPLDataArguments(train_data=[str(path)], cache_path=str(cache), train_group_size=3, **options)
    return CLPLTrainDataset(args)


@pytest.fixture(scope="module")
def collator(tiny_tokenizer):
    return CLPLCollator(tokenizer=tiny_tokenizer, query_max_len=24, passage_max_len=40, packing=True)


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None,
    phases=[Phase.generate], suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(lines=st.lists(mutated_lines(), min_size=LINES_A_FILE, max_size=LINES_A_FILE), scores=st.booleans())
def refuse_the_same(tmp_path_factory, collator, seen, lines, scores):
    folder = tmp_path_factory.mktemp("mutated")
    path, one = folder / "all.jsonl", folder / "one.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    report = validate_file(path, Reading(scores_required=scores))
    messages = report.messages
    assert len(messages) == report.faults
    assert all(re.match(rf"{re.escape(str(path))}:\d+: \S.+", m) and m.isprintable() for m in messages)
    refused_lines = {int(message.split(":")[1]) for message in messages}
    assert len(refused_lines) == report.faulty_lines
    # The loader, on each line alone: behind a good one, so that the number of the first line changes nothing else.
    good = json.dumps(SCORED).encode() + b"\n"
    for number, line in enumerate(lines, 1):
        one.write_bytes(good + line + b"\n")
        if number not in refused_lines:
            assert list(read_examples(one, with_scores=scores)), line
            continue
        same = next(m for m in messages if int(m.split(":")[1]) == number)
        same = same.partition("; the line has")[0]  # of the first line
        with pytest.raises(UserError) as stop:
            list(read_examples(one, with_scores=scores))
        assert str(stop.value).startswith(same.replace(f"{path}:{number}:", f"{one}:2:"))
    # The loader of training, on all lines, and on those that are accepted.
    if messages:
        with pytest.raises(UserError) as stop:
            load(path, folder / "cache", knowledge_distillation=scores)
        assert str(stop.value).startswith(messages[0])
    seen.update(lines=len(lines), refused=len(refused_lines))
    accepted = [line for number, line in enumerate(lines, 1) if number not in refused_lines]
    path.write_bytes(good + b"".join(line + b"\n" for line in accepted))
    dataset = load(path, folder / "cache", knowledge_distillation=scores)
    assert len(dataset) == 1 + report.figures.examples
    batch = collator([dataset[(0, index)] for index in range(len(dataset))])
    assert len(batch["query_rows"]) == len(dataset)
    seen.update(trained=report.figures.examples)


@pytest.mark.slow
def test_validation_and_training_refuse_the_same_mutated_lines(tmp_path_factory, collator):
    seen = Counter()
    refuse_the_same(tmp_path_factory, collator, seen)
    # Enough of each kind.
    assert seen["lines"] >= 1900
    assert seen["refused"] > 500
    assert seen["trained"] > 100


@pytest.mark.slow
@settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(lines=st.lists(mutated_lines(), min_size=LINES_A_FILE, max_size=LINES_A_FILE))
def test_accepted_lines_train(tiny_encoder, tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "t.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    messages = validate_file(path, Reading(scores_required=True)).messages
    bad = {int(message.split(":")[1]) for message in messages}
    rest = [line for number, line in enumerate(lines, 1) if number not in bad]
    path.write_bytes(b"".join(line + b"\n" for line in [json.dumps(SCORED).encode(), *rest]))
    train(
        arguments(
            tiny_encoder, path, folder / "run", max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4,
            knowledge_distillation=True, query_instruction_for_retrieval="q: ", query_instruction_format="{}{}",
        )
    )  # fmt: skip
    assert (folder / "run" / "model.safetensors").is_file()


def test_training_names_the_first_fault_and_counts_all(tiny_encoder, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [GOOD, GOOD | {"pos": []}, GOOD | {"query": "", "neg": 3}])
    err = refused(arguments(tiny_encoder, path, tmp_path / "run"), capsys)
    assert f"error: {path}:2: field 'pos': found an empty list" in err
    assert f"(the first of 3 faults; python -m clpl_moe.validate {path} lists them)" in err
    assert run(capsys, path)[2][-1] == "error: 3 faults: training would refuse these data"
    write_jsonl(path, [GOOD, GOOD])  # without scores
    err = refused(arguments(tiny_encoder, path, tmp_path / "run", knowledge_distillation=True), capsys)
    assert f"{path} --knowledge_distillation true lists them" in err


@pytest.mark.slow
def test_speed_of_the_checks(tmp_path):
    """100,000 lines in seconds; a tenth of it here, with a wide margin for busy machines."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.ascii_lowercase + "가나다라마바 ", k=400)) for _ in range(500)]
    path = tmp_path / "t.jsonl"
    write_jsonl(
        path,
        (
            {"query": str(i), "pos": [rng.choice(texts)], "neg": rng.sample(texts, 8), "neg_q": [["q"]] * 8}
            for i in range(10_000)
        ),
    )
    start = time.process_time()
    assert sum(1 for _ in read_examples(path)) == 10_000
    assert time.process_time() - start < 5
