import importlib.util
import json
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.encoder import settings as settings_module
from clpl_moe.encoder.settings import (
    EmbeddingSettings,
    check_length,
    check_lengths,
    longest_input,
    max_positions,
    pool,
    read_settings,
    write_settings,
)
from helpers.tiny import make_encoder

E5 = EmbeddingSettings(pooling="mean", normalize=True, query_prompt="query: ", passage_prompt="passage: ")


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_modules(folder, *kinds, prefix="sentence_transformers.models."):
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": prefix + kind}
        for i, kind in enumerate(kinds)
    ]
    write(folder, "modules.json", modules)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("normalize", [True, False])
def test_read_gives_back_what_write_wrote(tmp_path, pooling, normalize):
    settings = EmbeddingSettings(pooling, normalize, "query: ", "")
    write_settings(tmp_path, settings, max_length=512, hidden_size=384)
    assert read_settings(tmp_path) == settings
    assert read_settings(str(tmp_path)) == settings


def test_bare_encoder_has_the_defaults(tmp_path):
    write(tmp_path, "config.json", {"model_type": "xlm-roberta"})
    assert read_settings(tmp_path) == EmbeddingSettings() == EmbeddingSettings("cls", True, "", "")


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (
            {
                "word_embedding_dimension": 8,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": False,
            },
            "cls",
        ),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last_token"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": ["mean"], "include_prompt": True}, "mean"),
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken"}, "last_token"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_both_formats_of_the_pooling_file(tmp_path, config, pooling):
    write_modules(tmp_path, "Transformer", "Pooling")
    write(tmp_path, "1_Pooling/config.json", config)
    assert read_settings(tmp_path) == EmbeddingSettings(pooling=pooling, normalize=False)


def test_newest_names_of_the_modules(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", prefix="sentence_transformers.base.modules.x.")
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    assert read_settings(tmp_path) == EmbeddingSettings(pooling="mean", normalize=True)


def test_truncation_is_read_and_written(tmp_path):
    write_settings(tmp_path, EmbeddingSettings(truncate_dim=4), max_length=8, hidden_size=8)
    assert read_settings(tmp_path).truncate_dim == 4
    file = tmp_path / "config_sentence_transformers.json"
    assert json.loads(file.read_text())["truncate_dim"] == 4
    write_settings(tmp_path, EmbeddingSettings(), max_length=8, hidden_size=8)
    assert "truncate_dim" not in json.loads(file.read_text())
    write(tmp_path, file.name, {"prompts": {}, "truncate_dim": "4"})
    with pytest.raises(UserError, match="field 'truncate_dim': found '4', expected a number of dimensions"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "passage"),
    [
        ({"query": "q ", "document": "d "}, "d "),
        ({"query": "q ", "passage": "p "}, "p "),
        ({"query": "q ", "document": "", "corpus": "c "}, "c "),
        ({"query": "q "}, ""),
    ],
)
def test_names_of_the_passage_prompt(tmp_path, prompts, passage):
    write_settings(tmp_path, EmbeddingSettings(), max_length=8, hidden_size=8)
    write(tmp_path, "config_sentence_transformers.json", {"prompts": prompts})
    settings = read_settings(tmp_path)
    assert (settings.query_prompt, settings.passage_prompt) == ("q ", passage)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "max"}, r"config.json: found pooling 'max', expected one of cls, mean, last_token"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls_token and pooling_mode_mean",
        ),
        ({"pooling_mode": ["cls", "mean"]}, "found pooling 'cls and mean'"),
        ({"pooling_mode": "mean", "include_prompt": False}, "field 'include_prompt'"),
        ("{", "not JSON"),
        ([], "found a list, expected a dict"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, config, message):
    write_modules(tmp_path, "Transformer", "Pooling")
    write(tmp_path, "1_Pooling/config.json", config)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path)


def test_projection_is_refused(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", "Normalize")
    with pytest.raises(UserError, match=r"modules.json: found a module 'Dense'"):
        read_settings(tmp_path)


def test_unknown_pooling_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown pooling 'max', expected one of cls, mean, last_token"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "max")
    with pytest.raises(ValueError, match="unknown pooling 'lasttoken'"):
        write_settings(tmp_path, EmbeddingSettings(pooling="lasttoken"), max_length=8, hidden_size=8)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_hub_model(tmp_path, monkeypatch):
    write_settings(tmp_path, E5, max_length=512, hidden_size=384)
    asked = []

    def download(repository, name, cache_dir, token):
        asked.append((repository, name, cache_dir, token))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_settings("someone/some-model", cache_dir="cache", token="secret") == E5
    assert asked[0] == ("someone/some-model", "modules.json", "cache", "secret")
    # A private model would otherwise get the defaults in silence.
    assert {call[2:] for call in asked} == {("cache", "secret")}
    assert len(asked) == 3


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, RepositoryNotFoundError])
def test_hub_that_gives_nothing_means_defaults(monkeypatch, caplog, error):
    def download(repository, name, **hub):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_settings("someone/some-model") == EmbeddingSettings()
    assert ("cannot be reached" in caplog.text) is (error is LocalEntryNotFoundError)


def test_path_that_is_no_name_of_a_model_means_defaults():
    assert read_settings("no/such/folder/here") == EmbeddingSettings()


HIDDEN = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], [[4.0, 40.0], [6.0, 60.0], [9.0, 90.0]]])
RIGHT, LEFT = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "mask", "second"),
    [
        ("cls", RIGHT, 4.0),
        ("cls", LEFT, 6.0),
        ("mean", RIGHT, 5.0),
        ("mean", LEFT, 7.5),
        ("last_token", RIGHT, 6.0),
        ("last_token", LEFT, 9.0),
    ],
)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pool_leaves_padding_out_on_either_side(pooling, mask, second, mask_dtype, dtype):
    first = {"cls": 1.0, "mean": 2.0, "last_token": 3.0}[pooling]
    pooled = pool(HIDDEN.to(dtype), mask.to(mask_dtype), pooling)
    assert pooled.dtype == dtype
    assert pooled.tolist() == [[first, 10 * first], [second, 10 * second]]


def test_mean_of_half_precision_is_summed_in_float32():
    hidden = torch.full((1, 4096, 2), 32.0, dtype=torch.float16)  # the sum, 131,072, is infinite in float16
    assert pool(hidden, torch.ones(1, 4096), "mean").tolist() == [[32.0, 32.0]]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_pool_is_differentiable_and_padding_gets_no_gradient(pooling):
    hidden = HIDDEN.clone().requires_grad_()
    pool(hidden, RIGHT, pooling).sum().backward()
    assert hidden.grad.sum() == pytest.approx(4.0)
    assert hidden.grad[1, 2].tolist() == [0.0, 0.0]


def test_text_without_tokens_gets_finite_numbers():
    for pooling in ("cls", "mean", "last_token"):
        assert pool(HIDDEN, torch.zeros(2, 3), pooling).isfinite().all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_sentence_transformers_reads_what_is_written_and_pools_alike(tmp_path, pooling):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "query:", "passage:", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[CLS]"
    )
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    settings = EmbeddingSettings(pooling, pooling != "mean", "query: ", "passage: ")
    write_settings(tmp_path, settings, max_length=6, hidden_size=8)

    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == 6
    texts = ["a", "b c d a b c d", "c d"]
    for encode, prompt in ((theirs.encode_query, "query: "), (theirs.encode_document, "passage: ")):
        batch = [prompt + text for text in texts]
        batch = tokenizer(batch, padding=True, truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            ours = pool(model(**batch).last_hidden_state, batch["attention_mask"], pooling)
        if settings.normalize:
            ours = torch.nn.functional.normalize(ours, dim=-1)
        torch.testing.assert_close(encode(texts, convert_to_tensor=True), ours, atol=1e-6, rtol=1e-5)

    # What the library saves itself, in its own format, is read as well.
    theirs.save(str(tmp_path / "again"))
    assert read_settings(tmp_path / "again") == settings


def test_settings_work_without_sentence_transformers(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sentence_transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("settings_again", settings_module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "settings_again", again)
    spec.loader.exec_module(again)
    again.write_settings(tmp_path, again.EmbeddingSettings("mean"), max_length=8, hidden_size=4)
    assert again.read_settings(tmp_path).pooling == "mean"


def test_positions():
    assert max_positions(make_encoder(max_position_embeddings=130)) == 128  # two rows before the first position
    assert max_positions(make_encoder("bert")) == 40
    assert max_positions(make_encoder().encoder) is None


def test_lengths_beyond_the_positions_are_refused():
    model = make_encoder("bert")
    check_length(model, 40)
    with pytest.raises(OptionError, match="^max_length: found 41 tokens, the encoder takes 40 at most"):
        check_length(model, 41)
    check_lengths(model, 40, 40)
    with pytest.raises(OptionError, match="^query_max_len: found 41 tokens, some/model takes 40 at most"):
        check_lengths(model, 41, 40, "some/model")
    with pytest.raises(OptionError, match="^passage_max_len: "):
        check_lengths(model, 40, 41)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        check_length(model, 0)


@pytest.mark.parametrize(
    ("limit", "stated", "expected"), [(30, None, 30), (30, 35, 35), (30, 50, 40), (10**30, None, 40), (10**30, 20, 20)]
)
def test_longest_input(tiny_tokenizer, monkeypatch, limit, stated, expected):
    monkeypatch.setattr(tiny_tokenizer, "model_max_length", limit)
    assert longest_input(make_encoder("bert"), tiny_tokenizer, stated) == expected
