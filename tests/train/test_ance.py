import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.mine.__main__ import main as mine
from clpl_moe.train.__main__ import main
from helpers.tiny_training import arguments, make_runner, make_triplets, read_metrics, refused, train_until

EXAMPLES = 12  # 6 steps an epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A collection of 30 passages, and triplets of its first 12 whose negatives are the last 4 of it."""
    folder = tmp_path_factory.mktemp("ance")
    lines = make_triplets(30, seed=3)
    passages = {f"p{i}": line["pos"][0] for i, line in enumerate(lines)}
    queries = {f"q{i}": line["query"] for i, line in enumerate(lines[:EXAMPLES])}
    language = folder / "ko"
    write_jsonl(language / "corpus.jsonl", ({"id": p, "text": text} for p, text in passages.items()))
    write_jsonl(language / "train_queries.jsonl", ({"id": q, "text": text} for q, text in queries.items()))
    qrels = ({"qid": q, "docid": f"p{q[1:]}", "relevance": 1} for q in queries)
    write_jsonl(language / "train_qrels.jsonl", qrels)
    stored = ({"docid": f"p{i}", "queries": [f"about {i}", f"more on {i}"]} for i in range(12, 20))
    write_jsonl(language / "positive_queries.jsonl", stored)
    negatives = [passages[f"p{i}"] for i in range(26, 30)]
    triplets = [{"query": q, "pos": [passages[f"p{i[1:]}"]], "neg": negatives} for i, q in queries.items()]
    write_jsonl(folder / "train.jsonl", triplets)
    return folder


def options(world, **more):
    return {
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 20,
        "learning_rate": 1e-2,
        "penalty_weight": 0.3,
        "ance_refresh": 3,
        "ance_collection": world,
        "ance_language": "ko",
        "ance_rank_from": 1,
        "ance_rank_to": 20,
        "ance_negatives": 4,
        "ance_max_positive_ratio": 0,
    } | more


def without_refreshes(world):
    return {name: None for name in options(world) if name.startswith("ance_")}


def argv(world, model, output, **more):
    return arguments(model, world / "train.jsonl", output, **options(world, **more))


def negatives_of(path):
    """Step, and example -> ids."""
    first, *records = [record for _, record in read_jsonl(path)]
    return first["step"], {record["example"]: record["neg_ids"] for record in records}


def assert_same_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


@pytest.fixture(scope="module")
def whole(world, tiny_encoder, tmp_path_factory):
    """The folder of a run with three refreshes: after steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(argv(world, tiny_encoder, folder, ance_sampling="score", ance_sampling_temperature=0.2))
    return folder


def test_refreshes_are_logged_and_their_negatives_saved(world, whole):
    records = [record for record in read_metrics(whole) if "ance_refresh" in record]
    assert [(r["step"], r["ance_refresh"]) for r in records] == [(3, 1), (6, 2), (9, 3)]
    assert all(r["ance_negatives"] == 4 * EXAMPLES and r["ance_kept_examples"] == 0 for r in records)
    assert all(r["ance_seconds"] > 0 for r in records)
    found = {int(p.parent.name.split("-")[1]): negatives_of(p) for p in whole.glob("checkpoint-*/negatives.jsonl")}
    # The refresh that a checkpoint's step is due for comes after it.
    assert {step: refreshed for step, (refreshed, _) in found.items()} == {4: 3, 6: 3, 8: 6, 10: 9}
    assert negatives_of(whole / "negatives.jsonl") == found[10]
    before = {number: ["p26", "p27", "p28", "p29"] for number in range(EXAMPLES)}
    for record, step in zip(records, (4, 8, 10)):
        now = found[step][1]
        assert sorted(now) == list(range(EXAMPLES))
        for number, ids in now.items():
            assert len(set(ids) - {f"p{number}"}) == 4
        assert record["ance_changed"] == sum(len(set(now[n]) - set(before[n])) for n in now) > 0
        before = now
    assert not (whole / "embeddings").exists()


@pytest.mark.parametrize("every", ["epoch", 4])
def test_negatives_are_what_mine_takes_with_the_weights_of_that_step(world, tiny_encoder, tmp_path, every, monkeypatch):
    # A run in float32 mines in float32, whatever the machine is fast at.
    monkeypatch.setattr("clpl_moe.encoder.precision.fast_bfloat16", lambda _: True)
    step = 6 if every == "epoch" else 4
    more = {"ance_refresh": every, "max_steps": step + 1, "save_steps": step, "ance_max_positive_ratio": 0.99}
    main(argv(world, tiny_encoder, tmp_path / "run", **more))
    output = tmp_path / "mined.jsonl"
    command = {"model": tmp_path / "run" / f"checkpoint-{step}", "collection": world, "language": "ko"}
    command |= {"output": output, "rank_from": 1, "rank_to": 20, "negatives": 4, "max_positive_ratio": 0.99}
    command |= {"query_max_len": 24, "passage_max_len": 40, "dtype": "float32"}
    mine([f"--{name}={value}" for name, value in command.items()])
    expected = {int(r["query_id"][1:]): r["neg_ids"] for _, r in read_jsonl(output)}
    refreshed, found = negatives_of(tmp_path / "run" / "negatives.jsonl")
    assert refreshed == step
    assert found == expected
    assert found


@pytest.mark.parametrize(
    "more",
    [
        {},
        # They make batches ahead, and persistent ones hold the training set for good.
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ],
    ids=["plain", "workers", "accumulated"],
)
def test_training_goes_on_with_the_new_negatives(world, tiny_encoder, tmp_path, more):
    """As one does that resumes with a file of them; in the middle of an epoch and into the next."""
    more = {"ance_refresh": 4, "max_steps": 8, "save_steps": 4, **more}
    main(argv(world, tiny_encoder, tmp_path / "run", **more))
    corpus = {r["id"]: r["text"] for _, r in read_jsonl(world / "ko" / "corpus.jsonl")}
    queries = {f"p{i}": [line["query"]] for i, (_, line) in enumerate(read_jsonl(world / "train.jsonl"))}
    queries |= {r["docid"]: r["queries"] for _, r in read_jsonl(world / "ko" / "positive_queries.jsonl")}
    step, negatives = negatives_of(tmp_path / "run" / "negatives.jsonl")
    assert step == 4
    lines = [line for _, line in read_jsonl(world / "train.jsonl")]
    for number, ids in negatives.items():
        lines[number] |= {"neg": [corpus[p] for p in ids], "neg_q": [queries.get(p) for p in ids]}
    assert {q is None for line in lines for q in line["neg_q"]} == {True, False}
    write_jsonl(tmp_path / "by_hand.jsonl", lines)
    off = without_refreshes(world)
    by_hand = arguments(tiny_encoder, tmp_path / "by_hand.jsonl", tmp_path / "by_hand", **options(world, **more) | off)
    (tmp_path / "run" / "train_data.json").unlink()  # by which other data are refused
    main([*by_hand, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")])
    assert_same_weights(tmp_path / "run", tmp_path / "by_hand")
    losses = [
        [r["penalty"] for r in read_metrics(f) if "loss" in r and r["step"] > 4]
        for f in (tmp_path / "run", tmp_path / "by_hand")
    ]
    assert losses[0] == losses[1]
    assert any(losses[0])


def test_examples_without_a_passage_left_keep_their_negatives(world, tiny_encoder, tmp_path):
    more = {"max_steps": 5, "save_strategy": "no"}
    main(argv(world, tiny_encoder, tmp_path / "kept", ance_margin=3, **more))
    (record,) = [record for record in read_metrics(tmp_path / "kept") if "ance_refresh" in record]
    assert (record["ance_kept_examples"], record["ance_negatives"], record["ance_changed"]) == (EXAMPLES, 0, 0)
    main(argv(world, tiny_encoder, tmp_path / "off", **without_refreshes(world), **more))
    assert_same_weights(tmp_path / "kept", tmp_path / "off")


def test_positives_outside_the_corpus_and_known_answers_are_minded(world, tiny_encoder, tmp_path):
    lines = [line for _, line in read_jsonl(world / "train.jsonl")]
    lines[0]["query"] = "about 13"  # p13 is known to answer it
    lines[1]["pos"] = ["a text of its own"]
    lines[2]["type"] = "symmetric_sts"
    write_jsonl(tmp_path / "train.jsonl", lines)
    more = {"ance_rank_to": 29, "ance_negatives": 29, "max_steps": 4, "ance_max_overlap": 1}
    main(arguments(tiny_encoder, tmp_path / "train.jsonl", tmp_path / "run", **options(world, **more)))
    _, found = negatives_of(tmp_path / "run" / "negatives.jsonl")
    everything = {f"p{i}" for i in range(30)}
    assert set(found[0]) == everything - {"p0", "p13"}
    assert len(found[1]) == 29  # p1 answers its query by the judgements
    assert 2 not in found


def test_a_query_that_is_a_passage_itself_is_no_negative_of_its_own(world, tiny_encoder, tmp_path):
    """As in ArguAna and Quora: by its id in the collection, within a longer text, or by its text."""
    collection = shutil.copytree(world, tmp_path / "world")
    corpus = {r["id"]: r["text"] for _, r in read_jsonl(collection / "ko" / "corpus.jsonl")}
    lines = [line for _, line in read_jsonl(world / "train.jsonl")]
    corpus["q0"] = f"Title. {lines[0]['query']} and more"
    corpus["x"] = f"  {lines[1]['query'].upper()}."
    write_jsonl(collection / "ko" / "corpus.jsonl", ({"id": p, "text": text} for p, text in corpus.items()))
    more = {"ance_rank_to": 31, "ance_negatives": 31, "max_steps": 4, "ance_max_overlap": 1}
    main(arguments(tiny_encoder, world / "train.jsonl", tmp_path / "run", **options(collection, **more)))
    _, found = negatives_of(tmp_path / "run" / "negatives.jsonl")
    assert set(found[0]) == set(corpus) - {"p0", "q0"}
    assert set(found[1]) == set(corpus) - {"p1", "x"}
    assert set(found[2]) == set(corpus) - {"p2"}


def test_a_training_set_without_passages_is_refused(world, tiny_encoder, tmp_path, capsys):
    lines = [line | {"type": "symmetric_sts"} for _, line in read_jsonl(world / "train.jsonl")]
    write_jsonl(tmp_path / "train.jsonl", lines)
    command = arguments(tiny_encoder, tmp_path / "train.jsonl", tmp_path / "run", **options(world))
    assert "ance_refresh: all examples are of a symmetric type" in refused(command, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [4, 8, *(pytest.param(call, marks=pytest.mark.slow) for call in (5, 7, 10))])
def test_resumed_run_is_the_uninterrupted_one(world, tiny_encoder, whole, tmp_path, call):
    """Stopped before, right after and between refreshes and checkpoints."""
    command = argv(world, tiny_encoder, tmp_path / "run", ance_sampling="score", ance_sampling_temperature=0.2)
    train_until(command, call)
    main([*command, "--resume_from_checkpoint", "true"])
    assert_same_run(tmp_path / "run", whole)


def assert_same_run(run, whole):
    assert_same_weights(run, whole)
    assert negatives_of(run / "negatives.jsonl") == negatives_of(whole / "negatives.jsonl")
    keys = ("step", "loss", "penalty", "grad_norm", "ance_refresh", "ance_changed")
    runs = [[{key: r.get(key) for key in keys} for r in read_metrics(f)] for f in (run, whole)]
    assert runs[0] == runs[1]


KILLED = """
import os, signal, sys
from clpl_moe.train import ance

stock, calls = ance.NegativeMiner.mine, 0

def mine(*args):
    global calls
    calls += 1
    for number, mined in enumerate(stock(*args)):
        if (calls, number) == (int(sys.argv[1]), 5):
            os.kill(os.getpid(), signal.SIGKILL)
        yield mined

ance.NegativeMiner.mine = mine
from clpl_moe.train.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_while_mining(world, tiny_encoder, whole, tmp_path):
    command = argv(world, tiny_encoder, tmp_path / "run", ance_sampling="score", ance_sampling_temperature=0.2)
    killed = subprocess.run([sys.executable, "-c", KILLED, "2", *command], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / "_clpl_moe" / "embeddings").is_dir()
    resume = [sys.executable, "-m", "clpl_moe.train", *command, "--resume_from_checkpoint", "true"]
    resumed = subprocess.run(resume, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "_clpl_moe").exists()


@pytest.mark.slow
def test_two_processes_mine_and_use_the_same(world, tiny_encoder, tmp_path):
    common = {"max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.1, "max_steps": 7, "negatives_cross_device": True}
    command = argv(world, tiny_encoder, tmp_path / "two", **common)
    (tmp_path / "argv.json").write_text(json.dumps(command))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", __file__, str(tmp_path)]
    # So that this file can be run as what each process does.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *launcher], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    main(argv(world, tiny_encoder, tmp_path / "one", per_device_train_batch_size=4, **common))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    encoded = [rank.pop("encoded") for rank in ranks]
    assert ranks[0] == ranks[1]
    assert negatives_of(tmp_path / "two" / "negatives.jsonl") == negatives_of(tmp_path / "one" / "negatives.jsonl")
    assert list(map(sum, zip(*encoded, strict=True))) == [30, 30]  # both together each passage once, at every refresh
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-4, name
    steps = [
        [(r["step"], r["ance_changed"]) for r in read_metrics(tmp_path / n) if "ance_refresh" in r]
        for n in ("one", "two")
    ]
    assert [step for step, _ in steps[0]] == [3, 6]
    assert steps[0] == steps[1]


def test_weights_and_random_state_are_left_alone(world, tiny_encoder, tmp_path):
    """A refresh that takes nothing changes nothing, though the model has dropout: see also the test of kept negatives."""
    import torch

    runner = make_runner(argv(world, tiny_encoder, tmp_path / "run"))
    runner.trainer.refresher.folder = tmp_path / "embeddings"
    runner.model.train()
    before = {name: p.clone() for name, p in runner.model.named_parameters()}
    state = torch.get_rng_state()
    runner.trainer.state.global_step = 3
    runner.trainer.refresh_negatives(runner.trainer.refresher, 6)
    assert torch.get_rng_state().equal(state)
    assert all(module.training for module in runner.model.modules())
    assert all(p.equal(before[name]) for name, p in runner.model.named_parameters())
    assert runner.data.dataset.mined is not None


def test_negatives_of_another_collection_are_refused(world, tiny_encoder, whole, tmp_path, capsys):
    other = tmp_path / "other"
    records = [record for _, record in read_jsonl(world / "ko" / "corpus.jsonl")]
    for name in ("train_queries", "train_qrels"):
        (other / "ko").mkdir(parents=True, exist_ok=True)
        (other / "ko" / f"{name}.jsonl").write_text((world / "ko" / f"{name}.jsonl").read_text())
    write_jsonl(other / "ko" / "corpus.jsonl", ({**r, "id": f"x{r['id']}"} for r in records))
    command = argv(world, tiny_encoder, tmp_path / "run", ance_collection=other)
    command += ["--resume_from_checkpoint", str(whole / "checkpoint-8")]
    with pytest.warns(UserWarning, match="not in the corpus"):
        err = refused(command, capsys)
    assert "negatives.jsonl: passage 'p" in err
    assert "resume with the ance_collection that the run began with" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ance_refresh": "often"}, "ance_refresh is 'often': choose epoch, or a number of steps"),
        ({"ance_refresh": 0}, "ance_refresh is '0'"),
        ({"ance_refresh": None}, "ance_collection: goes with ance_refresh, which is not set"),
        ({"ance_collection": None}, "ance_refresh needs ance_collection"),
        ({"ance_language": None}, "ance_refresh needs ance_language"),
        ({"ance_language": "fa"}, "holds ko"),
        ({"ance_split": "dev"}, "the splits here are train"),
        ({"ance_negatives": 30}, "--ance_negatives: found 30, the window from rank 1 to 20 holds 20"),
        ({"ance_sampling": "best"}, "invalid choice: 'best'"),
        ({"ance_positive_queries": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False], ids=["plan", "run"])
def test_mistakes_end_in_a_message(world, tiny_encoder, tmp_path, capsys, more, message, dry_run):
    assert message in refused(argv(world, tiny_encoder, tmp_path / "run", dry_run=dry_run, **more), capsys)
    assert not (tmp_path / "run").exists()


def test_plan_tells_of_it(world, tiny_encoder, tmp_path, capsys):
    main(argv(world, tiny_encoder, tmp_path / "run", dry_run=True))
    assert f"negatives       mined again each 3 steps, from 30 passages of {world}" in capsys.readouterr().out


if __name__ == "__main__":
    # One of the two processes: what it trained on, and how many passages it encoded at each refresh.
    import torch

    from clpl_moe.retrieval import store

    torch.set_num_threads(1)
    folder, store.SHARD_TEXTS = Path(sys.argv[1]), 15
    encoded, stock = [], store.encode_passages

    def encode_passages(*args, **kwargs):
        shards = stock(*args, **kwargs)
        encoded.append(shards.encoded)
        return shards

    store.encode_passages = encode_passages
    runner = make_runner(json.loads((folder / "argv.json").read_text()))
    runner.run()
    rank = torch.distributed.get_rank()
    found = {
        "places": runner.data.dataset.mined.places,
        "encoded": encoded,
        "processes": runner.training_args.world_size,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
