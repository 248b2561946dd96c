import json
from types import SimpleNamespace

import pytest
import torch

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import expert_parameters, inject_moe
from clpl_moe.train.base_model import cached_layers, make_frozen_cache, read_heads
from helpers.tiny import make_encoder
from helpers.tiny_training import arguments, make_runner, read_metrics, refused, write_triplets
from helpers.training_model import assert_same, gradients, make_batch, train_only


def test_heads_of_another_shape_are_refused(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    with pytest.raises(UserError, match=r"colbert_linear\.pt does not fit a head of 32 to 16"):
        make_runner(arguments(tiny_encoder, data, tmp_path / "a", unified_finetuning=True, colbert_dim=16))


class Hub:
    """Stands in for the hub: gives the files of one folder, or no answer."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.asked, self.error = folder, [], None
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def download(self, repository, name, **hub):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((name, hub))
        if self.error is not None:
            raise self.error.__new__(self.error)
        if not (self.folder / name).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(self.folder / name)


def test_heads_of_a_hub_model(tiny_encoder, tmp_path, monkeypatch, caplog):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = Hub(monkeypatch, tiny_encoder)
    heads = read_heads("someone/m3", required=False, cache_dir="cache", token="secret")
    assert heads["sparse_linear.pt"]["weight"].equal(torch.load(tiny_encoder / "sparse_linear.pt")["weight"])
    assert list(heads) == ["sparse_linear.pt", "colbert_linear.pt"]
    assert hub.asked[0] == ("sparse_linear.pt", {"cache_dir": "cache", "token": "secret"})
    # A model that has none, and is known to have none.
    hub.folder = tmp_path
    assert read_heads("someone/e5", required=True) == {}
    assert not caplog.records
    # It cannot be told: warned of where they are only kept, an error where they are trained.
    hub.error = LocalEntryNotFoundError
    assert read_heads("someone/m3", required=False) == {}
    assert "cannot be told whether there are sparse and multi-vector heads" in caplog.text
    with pytest.raises(UserError, match="someone/m3: neither a folder here nor a model that the hub gives"):
        read_heads("someone/m3", required=True)


def test_heads_that_cannot_be_read(tiny_encoder, tmp_path):
    (tmp_path / "sparse_linear.pt").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"sparse_linear\.pt: the head cannot be read"):
        read_heads(str(tmp_path), required=False)


def test_prompts_and_pooling_come_from_the_base_folder_unless_given(tiny_encoder, tmp_path):
    import shutil

    from clpl_moe.encoder.settings import EmbeddingSettings, read_settings, write_settings

    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    write_settings(model, EmbeddingSettings("mean", True, "query: ", "passage: "), max_length=64, hidden_size=32)
    data = write_triplets(tmp_path / "t.jsonl", 4)
    runner = make_runner(arguments(model, data, tmp_path / "a"))
    assert runner.settings == EmbeddingSettings("mean", True, "query: ", "passage: ")
    example = runner.data.dataset[(0, 0)]
    assert example.query.startswith("query: ")
    assert all(text.startswith("passage: ") for text in example.passages)
    none = {"query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": "", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "none", **none))
    assert not runner.data.dataset[(0, 0)].query.startswith("query: ")
    runner.run()
    assert read_settings(tmp_path / "none").query_prompt == ""
    # What the run was stands in its configuration.
    again = ["--config", str(tmp_path / "none" / "train_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert make_runner(again).settings == runner.settings
    options = {"query_instruction_for_retrieval": "find: ", "sentence_pooling_method": "cls", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "b", **options))
    assert runner.settings == EmbeddingSettings("cls", True, "find: ", "passage: ")
    runner.run()
    assert read_settings(tmp_path / "b") == runner.settings
    options = {
        "query_instruction_format": "Task: {}Query: {}",
        "query_max_len": 30,
        "passage_max_len": 20,
        "max_steps": 1,
    }
    runner = make_runner(arguments(model, data, tmp_path / "c", **options))
    example = runner.data.dataset[(0, 0)]
    assert example.query.startswith("Task: query: Query: ")
    runner.run()
    assert read_settings(tmp_path / "c").query_prompt == "Task: query: Query: "
    # Training on shorter texts makes no encoder of shorter ones.
    assert json.loads((tmp_path / "c" / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_dimensions_are_checked_before_anything_is_written(tiny_encoder, tmp_path, capsys):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    argv = arguments(tiny_encoder, data, tmp_path / "run", matryoshka_dims=[64, 8])
    for more in ([], ["--dry_run", "true"]):
        assert "matryoshka_dims: found 64, expected at most 32, the embeddings' dimensions" in refused(
            [*argv, *more], capsys
        )
    assert not (tmp_path / "run").exists()


def test_a_truncation_of_the_base_model_is_left_behind(tiny_encoder, tmp_path, caplog):
    import shutil

    from clpl_moe.encoder.settings import EmbeddingSettings, read_settings, write_settings

    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    write_settings(model, EmbeddingSettings(truncate_dim=8), max_length=64, hidden_size=32)
    data = write_triplets(tmp_path / "t.jsonl", 4)
    runner = make_runner(arguments(model, data, tmp_path / "run", max_steps=1, matryoshka_dims=[32, 8]))
    assert "truncates embeddings to 8 dimensions; the folders of this run do not" in caplog.text
    assert "matryoshka dims 32 8" in str(runner.plan)
    runner.run()
    assert read_settings(tmp_path / "run") == EmbeddingSettings()
    assert {"loss_32", "loss_8"} <= read_metrics(tmp_path / "run")[0].keys()


def trained(model, trainable, **options):
    train_only(model.model, trainable, **options)
    return {name.removeprefix("model.") for name, p in model.named_parameters() if p.requires_grad}


def test_moe_is_experts_and_routers(make_model):
    model = make_model()
    found = trained(model, "moe")
    assert found == {name for name, _ in expert_parameters(model.model)}
    assert all(".intermediate." in name for name in found)
    assert len([name for name in found if "router" in name]) == 2


def test_ffn_is_all_linear_layers_of_the_ffn(make_model):
    found = trained(make_model(num_experts=0), "ffn")
    layers = [f"encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert found == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert trained(make_model(), "moe") < trained(make_model(), "ffn")


def test_full_is_all_but_the_pooler(make_model):
    model = make_model()
    every = {name.removeprefix("model.") for name, _ in model.named_parameters()}
    assert trained(model, "full") == {name for name in every if not name.startswith("pooler.")}
    left = every - trained(make_model(), "full", fix_position_embedding=True)
    assert {name for name in left if not name.startswith("pooler.")} == {"embeddings.position_embeddings.weight"}


@pytest.mark.parametrize("trainable", ["moe", "ffn", "full"])
def test_frozen_layers_and_what_is_below_are_left_out(make_model, trainable):
    model = make_model()
    without = trained(make_model(), trainable)
    found = trained(model, trainable, frozen_layers=1)
    assert found == {name for name in without if name.startswith("encoder.layer.1.")}
    assert found


def test_below_the_layers_nothing_is_trained_in_an_encoder_that_projects_its_embeddings():
    encoder = make_encoder("electra", embedding_size=16)
    assert encoder.embeddings_project.weight.shape == (32, 16)
    train_only(encoder, "full", frozen_layers=1)
    names = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in encoder.named_parameters() if name.startswith("encoder.layer.1.")}


def test_frozen_layers_leave_the_gradients_of_the_others_as_they_are(make_model, tiny_tokenizer):
    batch = make_batch(tiny_tokenizer, packing=True)
    whole, upper = make_model(), make_model()
    trained(whole, "full")
    names = trained(upper, "full", frozen_layers=1)
    expected, found = gradients(whole, batch)[1], gradients(upper, batch)[1]
    assert {name.removeprefix("model.") for name in found} == names
    assert_same(found, {name: expected[name] for name in found}, rtol=1e-5, atol=1e-7)


def test_fixed_encoder_leaves_the_heads(make_model):
    found = trained(make_model(unified_finetuning=True), "moe", fix_encoder=True, unified_finetuning=True)
    assert found == {f"{head}.{kind}" for head in ("colbert_linear", "sparse_linear") for kind in ("weight", "bias")}


def test_mistakes_in_what_is_trained(make_model):
    with pytest.raises(UserError, match="trainable is moe but the model has no experts"):
        trained(make_model(num_experts=0), "moe")
    with pytest.raises(UserError, match="nothing would be trained"):
        trained(make_model(), "full", fix_encoder=True)
    with pytest.raises(UserError, match="nothing would be trained"):
        trained(make_model(), "full", frozen_layers=2)
    with pytest.raises(UserError, match="frozen_layers is 3: found 2 layers"):
        trained(make_model(), "full", frozen_layers=3)


def frozen_cache_options(**options):
    stock = {"frozen_cache_gb": 0.001, "bf16": False, "fp16_asked": False}
    return SimpleNamespace(**stock | options)


@pytest.mark.parametrize(
    ("trainable", "options", "experts", "layers"),
    [
        ("full", {"frozen_layers": 8}, None, 8),
        ("lora", {"frozen_layers": 8}, None, 8),
        ("ffn", {"frozen_layers": 3}, "6,7,8,9,10,11", 3),
        ("moe", {}, "6,7,8,9,10,11", 6),
        ("full", {"frozen_layers": 8}, "every:4", 3),
        ("full", {}, None, None),
        ("moe", {"frozen_layers": 8}, "all", None),
    ],
)
def test_which_layers_a_cache_spares(trainable, options, experts, layers):
    encoder = make_encoder(num_hidden_layers=12)
    if experts is not None:
        inject_moe(encoder, MoEConfig(2, 1, layers=experts))
    train_only(encoder, trainable, **options)
    assert cached_layers(encoder, frozen_cache_options(frozen_cache_gb=0.0)) == 0
    assert make_frozen_cache(encoder, frozen_cache_options(frozen_cache_gb=0.0)) is None
    if layers is None:
        with pytest.raises(OptionError, match="frozen_cache_gb: found no frozen layer without experts at the bottom"):
            cached_layers(encoder, frozen_cache_options())
        return
    assert cached_layers(encoder, frozen_cache_options()) == layers
    for more, dtype in (({}, torch.float32), ({"bf16": True}, torch.float16), ({"fp16_asked": True}, torch.float16)):
        cache = make_frozen_cache(encoder, frozen_cache_options(**more))
        assert (cache.layers, cache.dtype) == (layers, dtype)


def test_a_cache_needs_an_encoder_that_is_packed():
    with pytest.raises(OptionError, match="frozen_cache_gb: found a Linear, expected 0: only XLM-R"):
        cached_layers(torch.nn.Linear(1, 1), frozen_cache_options())
