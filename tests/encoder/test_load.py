import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from clpl_moe import CLPLLoss, MoEConfig, UserError, inject_moe, load_encoder
from clpl_moe.encoder.load import is_2024_checkpoint
from clpl_moe.moe.install import has_experts
from clpl_moe.moe.modeling_clpl_moe import MoEXLMRobertaModel
from helpers.golden import GOLDEN, golden_case, golden_inputs, golden_state
from helpers.tiny import make_batch, make_encoder, make_moe


def config_2024(moe, num_experts=2, top_k=1, **values):
    """``config.json`` as the 2024 code writes it: a stock model type, and keys of its own."""
    return {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
        "moe": moe,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "only_train": moe,
        "torch_dtype": "float32",
        "transformers_version": "4.45.2",
        **values,
    }


def write_folder(folder, config, state, tokenizer, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return folder


@pytest.fixture(scope="module", params=[None, "intermediate", "output"])
def golden(request, tmp_path_factory, tiny_tokenizer):
    """A case of the golden numbers, and the encoder loaded from a folder in its format."""
    case = golden_case(request.param)
    state = golden_state(case["moe"], case["num_experts"])
    config = config_2024(case["moe"], case["num_experts"], case["top_k"], **GOLDEN["dims"])
    folder = write_folder(tmp_path_factory.mktemp("golden") / "model", config, state, tiny_tokenizer)
    encoder, _ = load_encoder(folder)
    yield case, encoder
    shutil.rmtree(folder)


def test_golden_embeddings_losses_and_gradients_of_the_2024_code(golden):
    case, encoder = golden
    assert has_experts(encoder) is (case["moe"] is not None)
    embeddings = {
        name: F.normalize(encoder(**batch).last_hidden_state[:, 0], dim=1) for name, batch in golden_inputs().items()
    }
    for name, stored in (("query", "query"), ("passages", "passage"), ("negative_queries", "negq")):
        expected = torch.tensor(case[f"{stored}_embedding" + ("" if stored == "query" else "s")])
        torch.testing.assert_close(embeddings[name][:, :16].detach(), expected, rtol=0, atol=1e-4)
    index = torch.tensor([1, 2, 3, 4])
    terms = CLPLLoss(case["temperature"], case["lambda_"])(**embeddings, negative_index=index)
    assert terms.contrastive.item() == pytest.approx(case["loss_contrastive"], rel=1e-4)
    assert terms.loss.item() == pytest.approx(case["loss_clpl"], rel=1e-4)
    terms.loss.backward()
    if case["moe"] is not None:
        module = getattr(encoder.encoder.layer[0], case["moe"])
        prefix = f"model.encoder.layer.0.{case['moe']}.dense."
        norms = case["grad_norms"]
        weight, bias = module.dense.weight.grad[0].norm(), module.dense.bias.grad[0].norm()
        assert weight.item() == pytest.approx(norms[prefix + "experts.0.weight"], rel=1e-3)
        assert bias.item() == pytest.approx(norms[prefix + "experts.0.bias"], rel=1e-3)
        assert module.router.weight.grad.norm().item() == norms[prefix + "gate.weight"] == 0.0


def state_2024(encoder, target, prefix=""):
    """The state dict of an encoder with experts under the names of the 2024 format."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name.endswith("router.weight"):
            state[prefix + name.replace("router.weight", "dense.gate.weight")] = value.clone()
        elif f".{target}.dense." in name and ".attention." not in name:
            for expert, part in enumerate(value):
                renamed = name.replace(".dense.", f".dense.experts.{expert}.")
                state[prefix + renamed] = part.clone()
        else:
            state[prefix + name] = value.clone()
    return state


def stock_config(encoder):
    skipped = ("model_type", "architectures", "moe", "auto_map", "transformers_version", "dtype")
    return {key: value for key, value in encoder.config.to_dict().items() if key not in skipped}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("target", "size"), [("intermediate", (3, 2)), ("output", (2, 2))])
def test_the_2024_format(tmp_path, tiny_tokenizer, target, size, file, prefix):
    encoder = make_moe(target, *size, router="topk_softmax", layers=[1])
    config = config_2024(target, *size, **stock_config(encoder))
    state = state_2024(encoder, target, prefix)
    state[prefix + "embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    folder = write_folder(tmp_path / "old", config, state, tiny_tokenizer, file)
    assert is_2024_checkpoint(config)
    loaded, tokenizer = load_encoder(folder)
    assert type(loaded) is MoEXLMRobertaModel
    assert loaded.config.moe == MoEConfig(*size, target, [1], "topk_softmax").to_dict()
    assert tokenizer("가")["input_ids"] == tiny_tokenizer("가")["input_ids"]
    batch = make_batch([9, 4])
    torch.testing.assert_close(loaded(**batch)[0], encoder(**batch)[0])
    loaded.save_pretrained(tmp_path / "new")  # converts
    tokenizer.save_pretrained(tmp_path / "new")
    torch.testing.assert_close(load_encoder(tmp_path / "new")[0](**batch)[0], encoder(**batch)[0])


@pytest.mark.parametrize("kind", ["xlm-roberta", "roberta", "bert"])
def test_a_folder_without_tokenizer_is_refused(tmp_path, kind):
    """transformers makes a tokenizer without words of it, for which every text is the same."""
    make_encoder(kind).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="the tokenizer cannot be loaded: .*found no vocabulary, expected tokenizer.json"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_git_did_not_fetch_is_told(tmp_path, tiny_encoder, name):
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: found Git LFS's pointer to the file"):
        load_encoder(folder)


def test_a_2024_configuration_without_experts(tmp_path, tiny_tokenizer):
    dense = make_encoder()
    config = config_2024(None, **stock_config(dense))
    folder = write_folder(tmp_path / "old", config, dense.state_dict(), tiny_tokenizer)
    loaded, _ = load_encoder(folder)
    assert type(loaded) is transformers.XLMRobertaModel
    batch = make_batch([9, 4])
    torch.testing.assert_close(loaded(**batch)[0], dense(**batch)[0])


def test_a_stock_folder(tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    assert type(encoder) is transformers.XLMRobertaModel
    assert encoder.dtype == torch.float32
    assert not encoder.training
    assert encoder.pooler is not None
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "<s> a b </s>"
    assert load_encoder(str(tiny_encoder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
@pytest.mark.parametrize("kind", ["xlm-roberta", "roberta", "bert"])
def test_a_folder_with_experts(tmp_path, tiny_tokenizer, kind, target):
    encoder, batch = make_moe(target, kind=kind), make_batch([9, 4])
    encoder.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_encoder(tmp_path)
    assert type(loaded) is type(encoder)
    torch.testing.assert_close(loaded(**batch)[0], encoder(**batch)[0])


@pytest.mark.parametrize("moe", [False, True])
def test_a_pooling_layer_is_there_only_if_its_weights_are(tmp_path, tiny_tokenizer, moe):
    torch.manual_seed(0)
    encoder = transformers.XLMRobertaModel(make_encoder().config, add_pooling_layer=False)
    if moe:
        inject_moe(encoder, MoEConfig())
    encoder.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_encoder(tmp_path)[0].pooler is None


def test_weights_in_several_files(tmp_path, tiny_tokenizer):
    encoder, batch = make_moe(), make_batch([9, 4])
    encoder.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(load_encoder(tmp_path)[0](**batch)[0], encoder(**batch)[0])


def test_weights_saved_before_torch_1_6(tmp_path, tiny_tokenizer):
    dense = make_encoder()
    config = {"model_type": "xlm-roberta", **stock_config(dense)}
    folder = write_folder(tmp_path / "old", config, {}, tiny_tokenizer, "pytorch_model.bin")
    torch.save(dense.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    batch = make_batch([9, 4])
    torch.testing.assert_close(load_encoder(folder)[0](**batch)[0], dense(**batch)[0])


@pytest.fixture
def moe_folder(tmp_path, tiny_tokenizer):
    make_moe().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder):
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.intermediate.router.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def damage_a_part(folder):
    (folder / "model.safetensors").unlink()
    make_moe().save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*.safetensors")).write_bytes(b"nothing")


def index_of_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "neither a folder here nor a model that could be fetched"),
        (lambda f: (f / "config.json").unlink(), "no config.json, expected a model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: found a list, expected a dict"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "the encoder cannot be loaded"),
        (
            lambda f: edit_config(f, model_type="unheard_of"),
            "needs code from its own folder.*set trust_remote_code to true",
        ),
        (lambda f: edit_config(f, hidden_size="wide"), "field 'hidden_size': found 'wide', expected a whole number"),
        (lambda f: edit_config(f, moe={"experts": 2}), "unexpected keyword argument 'experts'"),
        (lambda f: edit_config(f, moe=MoEConfig(4).to_dict()), "the encoder cannot be loaded"),
        (lambda f: edit_config(f, model_type="xlm-roberta"), "the encoder cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights, expected one of model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "the weights cannot be read"),
        (drop_a_weight, "lack 1 parameters of the model, first 'encoder.layer.1.intermediate.router.weight'"),
        (damage_a_part, "the encoder cannot be loaded"),
        (index_of_nothing, "no index of weights"),
        (lambda f: (f / "tokenizer.json").write_text("junk"), "the tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer cannot be loaded"),
    ],
)
def test_a_damaged_folder_gets_one_message(moe_folder, damage, message):
    damage(moe_folder)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(moe_folder)
    assert str(error.value).startswith(str(moe_folder))


def test_a_damaged_2024_folder_gets_one_message(tmp_path, tiny_tokenizer):
    encoder = make_moe(router="topk_softmax")
    config = config_2024("intermediate", 3, 1, **stock_config(encoder))
    state = state_2024(encoder, "intermediate")
    for changes, message in (
        ({"num_experts": 4}, "the weights do not fit config.json"),
        ({"num_experts_per_tok": 9}, "top_k is 9 but there are 3 experts"),
        ({"hidden_size": 64}, "the weights do not fit config.json"),
        ({"model_type": "t5"}, "model_type is 't5', expected 'xlm-roberta'"),
    ):
        folder = write_folder(tmp_path / "old", config | changes, state, tiny_tokenizer)
        with pytest.raises(UserError, match=message):
            load_encoder(folder)
    without_gates = {name: value for name, value in state.items() if "gate" not in name}
    folder = write_folder(tmp_path / "old", config, without_gates, tiny_tokenizer)
    with pytest.raises(UserError, match="found experts in no layer"):
        load_encoder(folder)


def test_a_file_is_no_model_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("")
    with pytest.raises(UserError, match="found a file, expected a model folder"):
        load_encoder(path)


def test_a_model_without_a_name_is_told_of():
    with pytest.raises(UserError, match="found an empty name of a model, expected a folder or a name on the hub"):
        load_encoder("")
