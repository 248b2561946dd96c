import re

import pytest
import torch

from clpl_moe.common.files import write_jsonl
from clpl_moe.retrieval import store as embeddings
from clpl_moe.synthesize.__main__ import main
from helpers.synthesis import arguments, good, refused, results, text, train_file

pytest.importorskip("openai")


def test_queries_that_do_not_find_their_passage_are_dropped(llm, tmp_path, tiny_encoder, capfd):
    from clpl_moe.encoder import Encoder

    path = train_file(tmp_path, 16)
    options = {"round_trip_model": tiny_encoder, "round_trip_top": 6, "passage_max_len": 100, "dtype": "float32"}
    main(arguments(llm(), path, tmp_path, **options))
    lines, store, failures = results(tmp_path)
    how = {"max_length": 100, "progress": False}
    texts = [text(n) for n in range(16)] + [f"답 {n}" for n in range(0, 16, 4)]
    encoder = Encoder.load(tiny_encoder, compute_dtype=torch.float32)
    queries = encoder.encode_queries([good(n)[0] for n in range(16)], **how)
    ranks = (queries @ encoder.encode_passages(texts, **how).T).argsort(dim=1, descending=True)
    found = {f"p{n}" for n in range(16) if n in ranks[n, :6]}
    assert 0 < len(found) < 16
    assert store.keys() == found
    assert set(failures.values()) == {"round trip: passage not among the first 6"}
    assert failures.keys() == {f"p{n}" for n in range(16)} - found
    filled = {i for line in lines for i, queries in zip(line["neg_ids"], line["neg_q"]) if queries}
    assert filled == found
    assert re.search(rf"dropped by the round trip +{16 - len(found)}\n", capfd.readouterr().out)


def test_the_round_trip_searches_a_collection_too(llm, tmp_path, tiny_encoder):
    folder = tmp_path / "collection" / "ko"
    # Passages that say just what the queries say take the first places. It needs no queries of its own.
    write_jsonl(folder / "corpus.jsonl", ({"id": f"c{n}", "text": good(n)[0]} for n in range(4)))
    options = {"round_trip_model": tiny_encoder, "round_trip_top": 1, "passage_max_len": 100}
    main(arguments(llm(), train_file(tmp_path, 4), tmp_path, round_trip_collection=folder.parent, **options))
    assert not results(tmp_path)[1]


def test_the_round_trip_keeps_its_embeddings_on_disk_and_goes_on_from_them(
    llm, tmp_path, tiny_encoder, capfd, monkeypatch
):
    server = llm()
    options = {"round_trip_model": tiny_encoder, "passage_max_len": 100, "overwrite": "true"}
    argv = arguments(server, train_file(tmp_path, 16), tmp_path, **options)
    monkeypatch.setattr(embeddings, "SHARD_TEXTS", 8)  # 20 texts
    embed, calls = embeddings.encode_tokenized, []

    def embed_once(*args, **how):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return embed(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "encode_tokenized", embed_once)
        with pytest.raises(SystemExit) as exit:
            main(argv)
    assert exit.value.code == 130
    beside = tmp_path / ".out.journal.jsonl.clpl_moe" / "embeddings"
    assert len(list(beside.rglob("*.npy"))) == 1
    assert not (tmp_path / "out.jsonl").exists()
    capfd.readouterr()
    main(argv)
    assert "1 of 3 shards found" in capfd.readouterr().out
    assert not beside.exists()
    first = results(tmp_path)
    # A folder that the user names stays.
    for found in (0, 3):
        main([*argv, f"--cache_dir={tmp_path / 'cache'}"])
        assert f"{found} of 3 shards found" in capfd.readouterr().out
        assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3
        assert results(tmp_path) == first
    assert not beside.exists()
    assert len(server.log()) == 16


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_an_encoder_that_cannot_take_the_lengths_is_refused_before_anything_is_asked(
    llm, tmp_path, tiny_encoder, capfd, kind
):
    server = llm()
    lengths = {"query_max_len": 20, "passage_max_len": 100} | {f"{kind}_max_len": 129}
    argv = arguments(server, train_file(tmp_path, 4), tmp_path, round_trip_model=tiny_encoder, **lengths)
    assert f"--{kind}_max_len: found 129 tokens, the encoder takes 128 at most" in refused(capfd, argv)
    assert not server.log()
    main([*argv, f"--{kind}_max_len=128"])
    assert len(server.log()) == 4
