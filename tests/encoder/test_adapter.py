import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from clpl_moe import Encoder, MoEConfig, UserError, inject_moe
from clpl_moe.encoder.adapter import adapter_weights, find_adapter, has_adapter, merge_adapter
from clpl_moe.encoder.load import read_config
from clpl_moe.encoder.settings import EmbeddingSettings, read_settings
from clpl_moe.encoder.weights import HEAD_FILES
from helpers.tiny import make_encoder, perturb_experts

TEXTS = ["abc def", "g h i j"]


@pytest.fixture(scope="module")
def adapter(tiny_encoder, tmp_path_factory):
    """The folder of an adapter that a user put into an encoder by peft, and the embeddings."""
    encoder = Encoder.load(tiny_encoder, compute_dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), encoder.model)
    with torch.no_grad():
        for name, tensor in adapter_weights(encoder.model).items():
            tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    encoder.save(folder)
    return folder, encoder.encode_queries(TEXTS, progress=False)


def test_saved_and_loaded_again(adapter, tiny_encoder):
    folder, expected = adapter
    assert not (folder / "config.json").exists()
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_encoder)
    assert described["target_modules"] == ["query", "value"]  # in the same order each time
    encoder = Encoder.load(folder, compute_dtype=torch.float32)
    assert not has_adapter(encoder.model)
    assert encoder.model.name_or_path == str(folder)
    torch.testing.assert_close(encoder.encode_queries(TEXTS, progress=False), expected, rtol=1e-4, atol=1e-5)
    base = Encoder.load(tiny_encoder, compute_dtype=torch.float32).encode_queries(TEXTS, progress=False)
    assert (expected - base).abs().max() > 0.01
    assert read_config(folder) == read_config(tiny_encoder)


def test_a_folder_holds_an_adapter_or_a_whole_model(adapter, tiny_encoder, tmp_path):
    folder, expected = shutil.copytree(adapter[0], tmp_path / "model"), adapter[1]

    def check(files):
        encoder = Encoder.load(folder, compute_dtype=torch.float32)
        torch.testing.assert_close(encoder.encode_queries(TEXTS, progress=False), expected, rtol=1e-4, atol=1e-5)
        found = {path.name for path in folder.iterdir()} & {"config.json", "adapter_config.json", "moe_config.json"}
        assert found == files
        return encoder

    check({"adapter_config.json"}).save(folder)
    whole = check({"config.json"})  # transformers would add the adapter a second time
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["key"], init_lora_weights=False), whole.model)
    with pytest.raises(ValueError, match="holds the base model, which the adapter needs"):
        whole.save(folder)
    check({"config.json"})
    again = Encoder.load(tiny_encoder)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), again.model)
    for name, tensor in adapter_weights(again.model).items():
        tensor.data.copy_(load_file(adapter[0] / "adapter_model.safetensors")[name])
    (folder / "moe_config.json").write_text("{}")
    again.save(folder)
    check({"adapter_config.json"})


def test_loading_draws_no_random_numbers(adapter):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Encoder.load(adapter[0])
    assert torch.get_rng_state().equal(before)


def test_adapter_of_the_hub(adapter, tiny_encoder, tmp_path, monkeypatch):
    (tmp_path / "snapshot").mkdir()

    def download(path, name, revision=None, **kwargs):
        assert (path, revision) == ("someone/lora", "v1")
        if not (adapter[0] / name).exists():
            return None
        return str(shutil.copy(adapter[0] / name, tmp_path / "snapshot"))

    monkeypatch.setattr("clpl_moe.encoder.weights.cached_file", download)
    found = find_adapter("someone/lora", revision="v1")
    assert (found.base, found.revision, found.moe) == (str(tiny_encoder), None, None)
    encoder = Encoder.load(tiny_encoder, compute_dtype=torch.float32)
    merge_adapter(encoder.model, found)
    torch.testing.assert_close(encoder.encode_queries(TEXTS, progress=False), adapter[1], rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_an_adapter_as_peft_writes_it_has_all_else_of_its_base_model(tiny_encoder, tmp_path):
    settings = EmbeddingSettings("mean", True, "query: ", "passage: ")
    base = Encoder.load(tiny_encoder, settings=settings, compute_dtype=torch.float32)
    base.max_length = 20
    base.save(tmp_path / "base")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["key"]))
    model.save_pretrained(tmp_path / "bare")
    for _ in range(2):
        found = Encoder.load(tmp_path / "bare", compute_dtype=torch.float32)
        assert (found.settings, found.max_length) == (settings, 20)
        assert read_settings(tmp_path / "bare") == settings
        assert found.head_files == {name: str(tmp_path / "base" / name) for name in HEAD_FILES}
        embeddings = (e.encode_queries(TEXTS, progress=False) for e in (base, found))  # the adapter adds nothing yet
        torch.testing.assert_close(*embeddings)
        base.tokenizer.save_pretrained(tmp_path / "bare")  # as trainers leave it there


def damaged(adapter, tmp_path, change):
    folder = shutil.copytree(adapter[0], tmp_path / "damaged", dirs_exist_ok=True)
    change(folder)
    with pytest.raises(UserError) as error:
        Encoder.load(folder)
    assert str(error.value).startswith(str(folder))
    return str(error.value)


def change_weights(change):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return damage


def change_config(**fields):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def test_damaged_adapters_are_refused(adapter, tmp_path):
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    for change, message in (
        (change_weights(lambda w: w.pop(name)), f"found nothing for '{name}', expected (2, 32)"),
        (change_weights(lambda w: w.update(more=w[name].clone())), "found (2, 32) for 'more', expected nothing"),
        (change_weights(lambda w: w.update({name: w[name][:1]})), "found (1, 32) for"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
        (
            change_config(base_model_name_or_path="no/such"),
            "an adapter, whose base model cannot be loaded: no/such: neither",
        ),
        (change_config(base_model_name_or_path=None), "base_model_name_or_path': found None, expected the base model"),
        (change_config(base_model_name_or_path=str(tmp_path / "damaged")), "expected the base model of the adapter"),
        (change_config(revision=1), "field 'revision': found int"),
        (change_config(peft_type="NONE"), "the adapter cannot be loaded"),
        (lambda folder: (folder / "moe_config.json").write_text('{"experts": 2}'), "cannot be put into the base model"),
    ):
        found = damaged(adapter, tmp_path, change)
        assert message in found, found
        shutil.rmtree(tmp_path / "damaged")


def test_adapter_on_a_model_with_experts_of_its_own(tiny_tokenizer, tmp_path):
    """The base model's folder has them, trained: they are loaded from there."""
    sizes = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 130}
    model = inject_moe(make_encoder(**sizes), MoEConfig(3, 1))
    perturb_experts(model)
    Encoder(model, tiny_tokenizer).save(tmp_path / "base")
    encoder = Encoder.load(tmp_path / "base", compute_dtype=torch.float32)
    names = [f"encoder.layer.{i}.intermediate.dense.weight" for i in (0, 1)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[], target_parameters=names), encoder.model)
    with torch.no_grad():
        for tensor in adapter_weights(encoder.model).values():
            tensor.normal_(std=0.1)
    encoder.save(tmp_path / "adapter")
    loaded = Encoder.load(tmp_path / "adapter", compute_dtype=torch.float32)
    assert loaded.model.config.moe["num_experts"] == 3
    found, expected = (e.encode_queries(TEXTS, progress=False) for e in (loaded, encoder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
