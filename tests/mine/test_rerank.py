import json
import shutil

import pytest

from clpl_moe.encoder.folder import refuse_own_code
from clpl_moe.mine.rerank import Reranker
from helpers.known_ranking import TEXTS, found, make_index
from helpers.mining import QUERIES, make_collection
from helpers.mining import mine_by_command as run


@pytest.fixture(scope="module")
def reranker(tiny_tokenizer, tmp_path_factory):
    """Folder of a cross encoder with random weights."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "reranker"
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config |= {"max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1, "initializer_range": 0.5}
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=len(tiny_tokenizer), num_labels=1, **config)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_reranker_scores_and_orders_the_window(tiny_encoder, reranker, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = make_collection(tmp_path)
    ranked = run(tiny_encoder, folder)
    options = {"reranker": reranker, "reranker_max_len": 100, "overwrite": "true"}
    records = run(tiny_encoder, folder, rank_to=6, **options)
    model = CrossEncoder(str(reranker), max_length=100)
    moved = 0
    for query_id, record in records.items():
        pairs = [(record["query"], text) for text in record["neg"] + record["pos"]]
        assert record["neg_scores"] + record["pos_scores"] == pytest.approx(model.predict(pairs).tolist(), abs=1e-4)
        assert record["neg_scores"] == sorted(record["neg_scores"], reverse=True)
        moved += record["neg_ids"] != ranked[query_id]["neg_ids"]
    assert moved


def test_reranker_stopped_midway_scores_no_pair_twice(tiny_encoder, reranker, tmp_path, monkeypatch):
    from sentence_transformers import CrossEncoder

    folder = make_collection(tmp_path)
    options = {"reranker": reranker, "reranker_max_len": 100, "overwrite": "true"}
    monkeypatch.setattr("clpl_moe.mine.select._QUERIES_AT_ONCE", 2)
    whole = run(tiny_encoder, folder, **options)
    asked, predict = [], CrossEncoder.predict

    def predict_one_block(self, pairs, **arguments):
        if asked and asked[-1] is None:
            raise KeyboardInterrupt
        asked.extend([*pairs, None])
        return predict(self, pairs, **arguments)

    def predict_all(self, pairs, **arguments):
        asked.extend(pairs)
        return predict(self, pairs, **arguments)

    monkeypatch.setattr(CrossEncoder, "predict", predict_one_block)
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder, **options)
    assert exit.value.code == 130
    monkeypatch.setattr(CrossEncoder, "predict", predict_all)
    assert run(tiny_encoder, folder, **options) == whole
    pairs = [pair for pair in asked if pair is not None]
    assert len(set(pairs)) == len(pairs) == 9 * len(QUERIES)  # eight candidates and the positive
    assert not list(folder.glob("*.embeddings"))
    # Another length gives other scores.
    kept = {"cache_dir": tmp_path / "cache"}
    assert run(tiny_encoder, folder, **options | kept) == whole
    shorter = run(tiny_encoder, folder, **options | kept | {"reranker_max_len": 8})
    assert shorter != whole
    asked.clear()
    assert run(tiny_encoder, folder, **options | kept) == whole
    assert asked == []


def test_very_long_passages_are_cut_before_the_reranker_reads_them(reranker, monkeypatch):
    from sentence_transformers import CrossEncoder

    model = Reranker(str(reranker), 30, 8, trust_remote_code=False)
    pairs = [("red house", "river stone " * 20_000), ("red house " * 20, "river " * 30_000), ("red", "stone")]
    whole = model._model.predict(pairs, show_progress_bar=False)
    seen, predict = [], CrossEncoder.predict

    def watched(self, pairs, **how):
        seen.extend(len(passage) for _, passage in pairs)
        return predict(self, pairs, **how)

    monkeypatch.setattr(CrossEncoder, "predict", watched)
    assert model.scores(pairs) == whole.tolist()
    assert seen[0] < 5_000
    assert seen[1:] == [180_000, 5]  # the query is long, too: which of the two loses tokens depends on both


def test_reranker_that_cannot_score_is_refused(tiny_encoder, reranker, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    names = ("cut", "broken", "unpadded", "wordless")
    cut, broken, unpadded, wordless = (shutil.copytree(reranker, tmp_path / name) for name in names)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (wordless / name).unlink()
    settings = json.loads((unpadded / "tokenizer_config.json").read_text())
    (unpadded / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "no token of the model"}))
    (cut / "model.safetensors").write_bytes((reranker / "model.safetensors").read_bytes()[:-9])
    weights = load_file(reranker / "model.safetensors")
    weights["classifier.out_proj.bias"] = torch.tensor([float("nan")])
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    folder = make_collection(tmp_path)
    for model, length, words in (
        (tiny_encoder, 100, "found an encoder (XLMRobertaModel), expected a cross encoder"),
        (reranker, 129, "--reranker_max_len: found 129"),
        (cut, 100, "cannot be loaded"),
        (unpadded, 100, "cannot be loaded: "),
        (wordless, 100, "cannot be loaded: found no vocabulary"),
        (broken, 100, "NaN or infinite scores"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(tiny_encoder, folder, reranker=model, reranker_max_len=length)
        assert exit.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert not (folder / "train.jsonl").exists()


_OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Own:
    pass
"""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "modules.json",
            [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}],
            "modules.json: the module 'own.Own'",
        ),
        ("modules.json", [{"type": "sentence_transformers.models.Router", "path": ""}], "Router' is none of"),
        ("modules.json", [1], "found a int among the modules"),
        ("modules.json", [{"type": ["own.Own"], "path": ""}], "field 'type'"),
        ("config.json", {"sentence_transformers": {"activation_fn": "own.Own"}}, "the activation 'own.Own'"),
        ("config.json", {"sbert_ce_default_activation_function": "own.Own"}, "the activation 'own.Own'"),
        (
            "config.json",
            {"sentence_transformers": {"activation_fn": "torch.hub.load"}},
            "the activation 'torch.hub.load'",
        ),
        # What sentence-transformers hands on to transformers, which would unpickle then.
        (
            "sentence_bert_config.json",
            {"model_kwargs": {"weights_only": False}},
            "field 'model_kwargs': found 'weights",
        ),
        ("sentence_bert_config.json", {"processor_kwargs": ["x"]}, "field 'processor_kwargs': found ['x']"),
        ("sentence_xlnet_config.json", {"model_args": {"config": {}}}, "field 'model_args': found 'config'"),
        (
            "0_Transformer/config.json",
            {"sentence_transformers": {"activation_fn": "torch.hub.list"}},
            "'torch.hub.list'",
        ),
        ("0_Transformer/sentence_bert_config.json", {"model_args": {"weights_only": False}}, "found 'weights_only'"),
    ],
)
def test_own_code_of_a_reranker_is_refused_before_a_library_sees_it(
    tiny_encoder, reranker, tmp_path, capsys, monkeypatch, name, content, words
):
    """Whether sentence-transformers runs it depends on its version."""
    own = shutil.copytree(reranker, tmp_path / "own")
    (own / "own.py").write_text(_OWN_CODE)
    if "/" in name:
        (own / name).parent.mkdir()
        transformer = {"type": "sentence_transformers.models.Transformer", "path": name.partition("/")[0]}
        (own / "modules.json").write_text(json.dumps([transformer]))
    before = json.loads((own / name).read_text()) if (own / name).exists() else {}
    (own / name).write_text(json.dumps(before | content if isinstance(content, dict) else content))

    def asked(*args, **kwargs):
        raise AssertionError("the library was asked to load the folder")

    monkeypatch.setattr("sentence_transformers.CrossEncoder", asked)
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, make_collection(tmp_path), reranker=own)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (own / "ran").exists()


def test_harmless_settings_of_a_reranker_are_handed_on(reranker, tmp_path):
    own = shutil.copytree(reranker, tmp_path / "own")
    (own / "sentence_bert_config.json").write_text(
        json.dumps({"model_kwargs": {"dtype": "float32"}, "max_seq_length": 9})
    )
    (own / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer", "path": ""}]))
    refuse_own_code(own, {})


def test_modules_that_give_no_score_are_refused(tiny_encoder, reranker, tmp_path, capsys):
    own = shutil.copytree(reranker, tmp_path / "own")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (own / "modules.json").write_text(json.dumps([module]))
    (own / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, make_collection(tmp_path), reranker=own, reranker_max_len=100)
    assert exit.value.code == 2
    assert "cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_reranker_orders_the_window_and_the_limits_go_by_its_scores(tmp_path):
    index = make_index(tmp_path)

    class Backwards:
        """Likes later passages better; the positive gets 0.5."""

        def scores(self, pairs, cache):
            assert all(query == "?" for query, _ in pairs)
            places = [TEXTS.index(text) for _, text in pairs]
            return [0.5 if p == 2 else p / 10 for p in places]

    options = {"reranker": Backwards(), "rank_to": 6, "negatives": 2}
    (mined,) = found(index, **options)
    assert mined.places == [6, 5]  # ranked 2 to 7 by the encoder, since the positive has no rank
    assert mined.scores == [0.6, 0.5]
    assert mined.positive_scores == [0.5]
    (mined,) = found(index, rank_from=2, **options)
    assert mined.places == [5, 4]
    (mined,) = found(index, max_positive_ratio=0.95, **options)
    assert mined.places == [4, 3]
