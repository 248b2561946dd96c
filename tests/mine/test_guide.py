import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from clpl_moe.common.files import read_jsonl
from clpl_moe.data.schema import find_faults
from clpl_moe.encoder import Encoder
from clpl_moe.retrieval import store
from helpers.known_ranking import found, make_index
from helpers.mining import QUERIES, make_collection
from helpers.mining import mine_by_command as run
from helpers.tiny import make_encoder


@pytest.fixture(scope="module")
def guide(tiny_tokenizer, tmp_path_factory):
    """Folder of an encoder with other weights, and fewer positions."""
    folder = tmp_path_factory.mktemp("models") / "guide"
    torch.manual_seed(5)
    sizes = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 66}
    make_encoder(**sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def cosines(folder, query, passages, query_prompt="", passage_prompt=""):
    encoder = Encoder.load(folder, compute_dtype=torch.float32)
    embeddings = encoder.encode_passages([passage_prompt + text for text in passages])
    return (embeddings @ encoder.encode_passages([query_prompt + query])[0]).tolist()


def test_no_negative_is_more_similar_by_the_guide_than_the_positive(tiny_encoder, guide, tmp_path, capsys):
    folder = make_collection(tmp_path)
    whole = {"rank_to": 15, "negatives": 15, "overwrite": "true"}
    everything = run(tiny_encoder, folder, **whole)
    assert "the guide" not in capsys.readouterr().out
    judged = run(tiny_encoder, folder, guide=guide, **whole)
    output = capsys.readouterr().out
    left_out = 0
    for query_id, record in everything.items():
        assert not {"pos_guide_scores", "neg_guide_scores"} & set(record)
        (positive,) = cosines(guide, record["query"], record["pos"])
        scores = dict(zip(record["neg_ids"], cosines(guide, record["query"], record["neg"])))
        expected = [p for p, score in scores.items() if score <= positive]
        left_out += len(scores) - len(expected)
        if query_id not in judged:
            assert not expected
            continue
        line = judged[query_id]
        assert not list(find_faults(line))
        assert line["neg_ids"] == expected
        assert line["neg_guide_scores"] == pytest.approx([scores[p] for p in expected], abs=2e-3)
        assert line["pos_guide_scores"] == pytest.approx([positive], abs=2e-3)
        assert line["neg_scores"] == [s for p, s in zip(record["neg_ids"], record["neg_scores"]) if p in expected]
    assert 0 < left_out < 15 * len(QUERIES)
    assert re.search(rf"left out: too similar by the guide +{left_out}\n", output)
    # A margin below every cosine: scores only. The guide's prompts are its own.
    stored = run(tiny_encoder, folder, guide=guide, guide_margin=-2, query_prompt="qq ", **whole)
    asked = run(tiny_encoder, folder, guide=guide, guide_margin=-2, guide_query_prompt="qq ", **whole)
    prompted = run(tiny_encoder, folder, guide=guide, guide_margin=-2, guide_passage_prompt="zz ", **whole)
    for query_id, record in everything.items():
        assert asked[query_id]["neg_ids"] == record["neg_ids"]
        for lines, prompts in ((stored, ("", "")), (asked, ("qq ", "")), (prompted, ("", "zz "))):
            line = lines[query_id]
            expected = cosines(guide, line["query"], line["neg"] + line["pos"], *prompts)
            assert line["neg_guide_scores"] + line["pos_guide_scores"] == pytest.approx(expected, abs=2e-3)


class KnownGuide:
    """Scores by place."""

    def __init__(self, scores):
        self._scores = scores

    def read(self, queries, index, places):
        self.read_places = sorted(set(places))

    def scores(self, row, places):
        return [self._scores[place] for place in places]


def test_the_guide_judges_the_window_by_the_rule_for_several_positives(tmp_path):
    index = make_index(tmp_path)
    guide = KnownGuide([0.9, 0.1, 0.5, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    options = {"guide": guide, "rank_to": 6}
    counts = Counter()
    (mined,) = found(index, counts=counts, negatives=6, **options)
    assert guide.read_places == [0, 1, 3, 4, 5, 6]
    assert (mined.places, mined.guide_scores) == ([1, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert mined.positive_guide_scores == [0.5]
    assert counts["passages left out: too similar by the guide"] == 1
    (mined,) = found(index, negatives=2, guide_margin=0.25, rank_from=2, **options)
    assert mined.places == [1, 3]
    for rule, expected in (("lowest", [1]), ("mean", [1, 4]), ("highest", [1, 4, 5, 6])):
        (mined,) = found(index, negatives=6, positives=(2, 3), positive_score=rule, **options)
        assert mined.places == expected


def test_only_ranked_passages_are_embedded_and_none_twice(tiny_encoder, guide, tmp_path, monkeypatch, capsys):
    """A run that is interrupted goes on from the shards of the guide, too."""
    folder = make_collection(tmp_path)
    monkeypatch.setattr(store, "SHARD_TEXTS", 3)
    options = {"guide": guide, "rank_to": 4, "negatives": 2, "overwrite": "true"}
    whole = run(tiny_encoder, folder, **options)
    written, write = [], store.EmbeddingShards.write

    def stopped_at_the_second(self, number, embeddings):
        if len(embeddings) and written.count(self.folder) == 1 and len(set(written)) == 2:
            raise KeyboardInterrupt
        written.append(self.folder)
        write(self, number, embeddings)

    monkeypatch.setattr(store.EmbeddingShards, "write", stopped_at_the_second)
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder, **options)
    assert exit.value.code == 130
    monkeypatch.setattr(store.EmbeddingShards, "write", lambda *a: (written.append(a[0].folder), write(*a)))
    capsys.readouterr()
    assert run(tiny_encoder, folder, **options) == whole
    own, guides = (written.count(folder) for folder in dict.fromkeys(written))
    assert own == 6  # of three passages each
    assert 1 < guides < 6
    assert f"1 of {guides} shards found" in capsys.readouterr().out
    assert not list(folder.glob(".*"))


SMALL_SHARDS = """
import sys
from clpl_moe.retrieval import store

store.SHARD_TEXTS, written = 3, store.EmbeddingShards.write

def write(self, number, embeddings):
    written(self, number, embeddings)
    print(f"wrote {store.process()[0]}\\n", end="", flush=True)  # in one piece: two processes share the pipe

store.EmbeddingShards.write = write
from clpl_moe.mine.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_processes_share_the_encoding_of_the_guide(tiny_encoder, guide, tmp_path):
    folder = make_collection(tmp_path)
    one = run(tiny_encoder, folder, guide=guide, rank_to=4, negatives=2)
    script = tmp_path / "script.py"
    script.write_text(SMALL_SHARDS)
    output = tmp_path / "two.jsonl"
    argv = ["--model", tiny_encoder, "--collection", folder, "--language", "ko", "--output", output, "--guide", guide]
    argv += ["--rank_from=1", "--rank_to=4", "--negatives=2", "--max_positive_ratio=0", "--max_overlap=1"]
    argv += ["--passage_max_len=100", "--dtype=float32"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, script, *map(str, argv)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {record["query_id"]: record for _, record in read_jsonl(output)} == one
    # Six shards by the model, and the guide's; who comes first takes one.
    assert len(re.findall(r"wrote [01]\n", done.stdout)) > 6


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
            "set trust_remote_code",
        ),
        # It has a class of the library, too, which is taken.
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}, None),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}], "found a module 'Own'"),
    ],
)
def test_own_code_of_a_guide_is_not_run(tiny_encoder, guide, tmp_path, capsys, name, content, refused):
    own = shutil.copytree(guide, tmp_path / "own")
    (own / "own.py").write_text(
        'from pathlib import Path\nPath(__file__).with_name("ran").touch()\nclass Own:\n    pass\n'
    )
    (own / name).write_text(
        json.dumps(json.loads((own / name).read_text()) | content if isinstance(content, dict) else content)
    )
    folder = make_collection(tmp_path)
    with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
        run(tiny_encoder, folder, guide=own)
    assert not (own / "ran").exists()
    assert (folder / "train.jsonl").exists() == (refused is None)
    assert (refused or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": "/nowhere/guide"}, "/nowhere/guide"),
        ({"guide": "the guide", "sampling": "corpus"}, "--guide: sampling 'corpus' ranks nothing"),
        ({"guide": "the model"}, "is the model itself"),
        ({"guide": "the guide", "guide_margin": 3}, "--guide_margin: found 3"),
        ({"guide": "the guide", "guide_revision": "v1"}, "--guide_revision: "),
    ],
)
def test_mistakes_end_in_a_message(tiny_encoder, guide, tmp_path, capsys, options, words):
    folder = make_collection(tmp_path)
    names = {"the guide": guide, "the model": tiny_encoder}
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder, **{name: names.get(value, value) for name, value in options.items()})
    assert exit.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "train.jsonl").exists()
