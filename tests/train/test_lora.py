import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import clpl_moe.encoder.load
from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.common.errors import UserError
from clpl_moe.encoder.adapter import adapter_weights, has_adapter
from clpl_moe.evaluate.evaluation import evaluate_retrieval
from clpl_moe.moe.inject import expert_parameters
from clpl_moe.moe.install import has_experts
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train.__main__ import main
from helpers.tiny import make_encoder
from helpers.tiny_training import (
    arguments,
    make_collection,
    make_runner,
    read_metrics,
    refused,
    train_until,
    write_triplets,
)
from helpers.training_model import assert_same, gradients, make_batch, train_only

TEXTS = ["abc def", "g h i j k a b c", "한국어 문장"]
SCALE = 2.0  # alpha 8, rank 4
LINEARS = {
    "attention": {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
    "ffn": {"intermediate.dense", "output.dense"},
}


def adapted(model, **options):
    """The model with adapters that are not zero."""
    train_only(model.model, "lora", **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapter_weights(model.model).items():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def factors(model):
    """Of each adapted weight its name in the model without adapters and (A, B): of Linear layers (r, in) and (out, r), of experts
    (N, r, in) and (N, out, r)."""
    weights = {name.removeprefix("base_model.model."): w for name, w in adapter_weights(model.model).items()}
    found = {}
    for name, a in weights.items():
        if "lora_A" in name:
            b, place = weights[name.replace("lora_A", "lora_B")], name.removesuffix(".lora_A.weight")
            if (count := len(a) // 4) > 1:
                a, b = a.view(count, 4, -1), b.view(len(b), 4, count).permute(2, 0, 1)
            found[f"{place}.weight"] = a.detach(), b.detach()
    return found


@pytest.mark.parametrize(
    ("num_experts", "packing", "options"),
    [(0, True, {}), (0, False, {}), (2, True, {}), (2, False, {}), (2, True, {"grad_cache_tokens": 20})],
)
def test_losses_and_gradients_are_those_of_the_weights_with_the_adapter_added(
    make_model, tiny_tokenizer, num_experts, packing, options
):
    batch = make_batch(tiny_tokenizer, packing=packing)
    model, plain = adapted(make_model(num_experts, **options)), make_model(num_experts)
    pairs, weights = factors(model), dict(plain.model.named_parameters())
    assert len(pairs) == 12  # six Linear layers or experts in each of two layers
    assert sum(a.ndim == 3 for a, _ in pairs.values()) == (2 if num_experts else 0)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weights[name] += SCALE * b @ a
    found, of_adapter = gradients(model, batch)
    expected, of_weights = gradients(plain, batch)
    torch.testing.assert_close(found.loss, expected.loss)
    wanted = {}
    for name, (a, b) in pairs.items():
        gradient, place = of_weights[f"model.{name}"], f"model.{name.removesuffix('.weight')}"
        of_a, of_b = SCALE * b.mT @ gradient, SCALE * gradient @ a.mT
        if a.ndim == 3:  # (N, r, in) to (N·r, in), (N, out, r) to (out, r·N)
            of_a, of_b = of_a.flatten(0, 1), of_b.permute(1, 2, 0).flatten(1)
            assert all(part.abs().max() > 0 for part in of_b.view(len(of_b), 4, -1).unbind(-1))
        wanted |= {f"{place}.lora_A.default.weight": of_a, f"{place}.lora_B.default.weight": of_b}
    for name, gradient in of_weights.items():
        if "router" in name:
            wanted[name.replace(".router.", ".router.modules_to_save.default.")] = gradient
    assert_same(of_adapter, wanted, rtol=1e-4, atol=1e-6)


def trained(model):
    return {name.removeprefix("model.") for name, p in model.named_parameters() if p.requires_grad}


def expected_names(layers, parts, routers=()):
    kinds = [f"{part}.lora_{kind}.default.weight" for part in parts for kind in "AB"]
    kinds += [f"{part}.router.modules_to_save.default.weight" for part in routers]
    return {f"encoder.layer.{layer}.{kind}" for layer in layers for kind in kinds}


def test_targets(make_model):
    dense = {"num_experts": 0}
    for targets, parts in (
        (["attention"], LINEARS["attention"]),
        (["ffn"], LINEARS["ffn"]),
        (["attention", "ffn"], LINEARS["attention"] | LINEARS["ffn"]),
    ):
        found = trained(adapted(make_model(**dense), lora_targets=targets))
        assert found == expected_names((0, 1), parts)
    model = adapted(make_model(**dense), frozen_layers=1)
    assert trained(model) == expected_names([1], LINEARS["attention"] | LINEARS["ffn"])
    found = trained(adapted(make_model(), lora_targets=["experts"]))
    assert found == expected_names((0, 1), ["intermediate.dense"], ["intermediate"])
    found = trained(adapted(make_model(), lora_targets=["attention", "ffn"]))
    assert found == expected_names((0, 1), LINEARS["attention"] | LINEARS["ffn"], ["intermediate"])
    with pytest.raises(UserError, match="lora_targets: found attention, which leaves out the experts"):
        adapted(make_model(), lora_targets=["attention"])
    with pytest.raises(UserError, match="found experts and a model without any"):
        adapted(make_model(**dense), lora_targets=["experts"])
    with pytest.raises(UserError, match=r"lora_dropout: found 0\.1, expected 0 with experts"):
        adapted(make_model(), lora_dropout=0.1)
    with pytest.raises(UserError, match="nothing would be trained"):
        adapted(make_model(**dense), frozen_layers=2)


@pytest.mark.parametrize("target", ["output", "ffn"])
@pytest.mark.parametrize("router", ["straight_through", "random"])
def test_every_expert_has_an_adapter_of_its_own(make_model, target, router):
    model = make_model(num_experts=0)
    inject_moe(model.model, MoEConfig(3, 1, target, router=router))
    adapted(model)
    pairs = {name: pair for name, pair in factors(model).items() if pair[0].ndim == 3}
    assert len(pairs) == (4 if target == "ffn" else 2)
    shapes = {name: p.shape for name, p in expert_parameters(model.model)}
    for name, (a, b) in pairs.items():
        assert (b @ a).shape == shapes[name.replace(".weight", ".base_layer.weight")]
        assert len({float(part.sum()) for part in b @ a}) == 3
    # A router without parameters is not trained, and saved with the base model only.
    assert any("router" in name for name in trained(model)) is (router != "random")


@pytest.fixture(scope="module")
def model(tiny_encoder, tmp_path_factory):
    """The tiny encoder with dropout, so that the random state shows in the weights."""
    folder = shutil.copytree(tiny_encoder, tmp_path_factory.mktemp("models") / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    return folder


CASES = {
    "dense": {"num_experts": 0, "lora_dropout": 0.2, "unified_finetuning": True, "dev_language": "ko"},
    "experts": {"num_experts": 2, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module", params=list(CASES))
def run(request, model, tmp_path_factory):
    """A run that was stopped and resumed; and the options that it had."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_triplets(folder / "train.jsonl", 9)
    options = CASES[request.param] | {"trainable": "lora", "save_strategy": "steps", "save_steps": 2}
    if "dev_language" in options:  # the best checkpoint is loaded at the end
        options |= {"dev_collection": make_collection(folder / "dev"), "learning_rate": 0.02, "eval_on_start": False}
    argv = arguments(model, data, folder / "run", **options, max_steps=5, merge_adapter=True, lora_rank=4, lora_alpha=8)
    train_until(argv, 4)
    main([*argv, "--resume_from_checkpoint", "true"])
    return folder / "run", argv, request.param


def embeddings(encoder):
    encoder.compute_dtype = torch.float32
    return torch.cat([encoder.eval().encode_queries(TEXTS, progress=False)])


def test_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    folder, argv, _ = run
    main([str(tmp_path / "whole") if word == str(folder) else word for word in argv])
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = load_file(folder / name), load_file(tmp_path / "whole" / name)
        assert found.keys() == expected.keys()
        assert not [key for key in found if not found[key].equal(expected[key])]
    # 9 examples in batches of 2: an epoch has five steps.
    steps = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(f) if "loss" in r]
        for f in (folder, tmp_path / "whole")
    ]
    assert [step for step, *_ in steps[0]] == [1, 2, 3, 4, 5]
    assert steps[0] == steps[1]


def test_checkpoints_are_small_and_checked(run, capsys):
    folder, argv, _ = run
    for place in (folder, folder / "checkpoint-4"):
        assert not (place / "model.safetensors").exists()
        assert not (place / "config.json").exists()  # transformers would take the folder for a whole model
    written = json.loads((folder / "checkpoint-4" / "checksums.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written.keys()
    copied = shutil.copytree(folder, folder.parent / "damaged")
    argv = [str(copied) if word == str(folder) else word for word in argv]
    argv += ["--resume_from_checkpoint", str(copied / "checkpoint-4")]
    err = refused([*argv, "--lora_alpha", "4"], capsys)
    assert "lora_alpha is 4, but the run to resume has 8" in err
    (copied / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors: damaged" in refused(argv, capsys)


def test_adapter_in_peft_and_merged_model_are_the_trained_one(run, model, capsys):
    folder, _, case = run
    base, trained = Encoder.load(model), Encoder.load(folder)
    expected = embeddings(trained)
    assert not has_adapter(trained.model)
    assert has_experts(trained.model) is (case == "experts")
    assert all(parameter.requires_grad for parameter in trained.model.parameters())
    merged = Encoder.load(folder / "merged")
    torch.testing.assert_close(embeddings(merged), expected)
    assert type(merged.model) is type(trained.model)
    assert (expected - embeddings(base)).abs().max() > 1e-3
    batch = trained.tokenizer(TEXTS, padding=True, return_tensors="pt")
    if case == "experts":
        inject_moe(base.model, MoEConfig(**json.loads((folder / "moe_config.json").read_text())))
    loaded = peft.PeftModel.from_pretrained(base.model, folder).eval()
    with torch.no_grad():
        states = [m(**batch).last_hidden_state[:, 0] for m in (loaded, trained.model)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    # What cannot know of the experts refuses, and does not leave them out.
    if case == "experts":
        with pytest.raises((RuntimeError, ValueError), match="mismatch"):
            AutoModel.from_pretrained(folder)
    else:
        with torch.no_grad():
            found = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state[:, 0]
        torch.testing.assert_close(found, states[1], rtol=1e-4, atol=1e-5)


def test_saved_model_is_the_evaluated_one(run):
    folder, argv, case = run
    if case == "experts":
        return
    evaluated = {r["step"]: r["eval_ndcg@10"] for r in read_metrics(folder) if "eval_ndcg@10" in r}
    assert list(evaluated) == [2, 4, 5]
    best = max(evaluated, key=lambda step: evaluated[step])
    assert len(set(evaluated.values())) > 1
    saved, checkpoint = (
        load_file(place / "adapter_model.safetensors") for place in (folder, folder / f"checkpoint-{best}")
    )
    assert not [name for name in saved if not saved[name].equal(checkpoint[name])]
    dev = argv[argv.index("--dev_collection") + 1]
    collection, lengths = Collection.load(dev, "ko", "dev"), EncodingArguments(24, 40)
    encoder = Encoder.load(folder, compute_dtype=torch.float32)
    found = evaluate_retrieval(encoder, collection, lengths, top_k=100, metrics=["nDCG@10"], progress=False)
    assert found.metrics["nDCG@10"] == pytest.approx(evaluated[best])


def test_heads_are_trained_and_saved_as_ever(run, model):
    folder, _, case = run
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        before = torch.load(model / name)["weight"]
        for place in (folder, folder / "checkpoint-4", folder / "merged"):
            assert torch.load(place / name)["weight"].equal(before) is (case == "experts"), place


def test_card_has_the_code_that_loads_the_adapter(run, model, monkeypatch):
    folder, _, _ = run
    card = (folder / "README.md").read_text()
    assert "LoRA of rank 4, alpha 8" in card
    # Neither in peft nor in sentence-transformers is there a way to put experts into a base model.
    assert ("SentenceTransformer(" in card) is (not (folder / "moe_config.json").exists())
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "PeftModel" in block]
    if not (folder.parent / model.name).exists():
        (folder.parent / model.name).symlink_to(model)  # the card names no folders of this machine
    monkeypatch.chdir(folder.parent)
    space = {}
    exec(code, space)
    trained = Encoder.load(folder)
    batch = trained.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = [m(**batch).last_hidden_state[:, 0] for m in (space["encoder"], trained.model)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_goes_on_from_a_run_with_an_adapter(run, tmp_path):
    folder, argv, case = run
    data = write_triplets(tmp_path / "t.jsonl", 4)
    argv = arguments(folder, data, tmp_path / "next", trainable="full", max_steps=1, learning_rate=0)
    main([*argv, "--num_experts", "0"])
    torch.testing.assert_close(embeddings(Encoder.load(tmp_path / "next")), embeddings(Encoder.load(folder)))
    argv = arguments(folder, data, tmp_path / "more", trainable="lora", num_experts=0, max_steps=1)
    main(argv)
    found = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == str(folder)
    assert has_experts(Encoder.load(tmp_path / "more").model) is (case == "experts")


@pytest.mark.slow
def test_experts_and_adapter_merged(model, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    options = {"merge_experts": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    argv = arguments(model, data, tmp_path / "run", trainable="lora", **options)
    main(argv)
    merged, trained = Encoder.load(tmp_path / "run"), Encoder.load(tmp_path / "run" / "experts")
    assert not has_experts(merged.model)
    assert not list((tmp_path / "run").glob("adapter*"))
    assert "PeftModel" not in (tmp_path / "run" / "README.md").read_text()
    name = "encoder.layer.0.intermediate.dense.weight"
    expected = trained.model.state_dict()[name]
    assert (expected[0] - expected[1]).abs().max() > 0
    torch.testing.assert_close(merged.model.state_dict()[name], expected.mean(0))
    main([*argv, "--resume_from_checkpoint", "true"])  # the folder holds a whole model now
    torch.testing.assert_close(embeddings(Encoder.load(tmp_path / "run")), embeddings(merged))
    torch.testing.assert_close(embeddings(Encoder.load(tmp_path / "run" / "experts")), embeddings(trained))


OWN_CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_at_the_end_the_base_model_is_loaded_as_at_the_beginning(tiny_tokenizer, tmp_path, monkeypatch):
    base, loaded = tmp_path / "own", []
    encoder = make_encoder("bert", vocab_size=len(tiny_tokenizer), max_position_embeddings=130)
    for saved in (encoder, tiny_tokenizer):
        saved.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "own.py").write_text(OWN_CODE)

    def load_encoder(path, **kwargs):
        loaded.append(kwargs)
        return load(path, **kwargs)

    load = clpl_moe.encoder.load.load_encoder
    monkeypatch.setattr("clpl_moe.encoder.load.load_encoder", load_encoder)  # of the adapter's base model
    options = {"num_experts": 0, "trainable": "lora", "merge_experts": None, "max_steps": 1, "trust_remote_code": True}
    data = write_triplets(tmp_path / "t.jsonl", 4)
    argv = arguments(base, data, tmp_path / "run", merge_adapter=True, merge_base_alpha=0.5, **options)
    main([*argv, "--cache_dir", str(tmp_path / "hub"), "--token", "t"])
    assert (
        loaded == [{"trust_remote_code": True, "cache_dir": str(tmp_path / "hub"), "token": "t", "revision": None}] * 2
    )
    assert (tmp_path / "run" / "merged" / "own.py").is_file()


def test_options_that_do_not_fit(model, tmp_path, capsys):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    for options, message in (
        ({"lora_rank": 8}, "lora_rank is for adapters: set trainable to lora"),
        ({"merge_adapter": True}, "merge_adapter is for adapters"),
        ({"trainable": "lora", "fix_encoder": True}, "fix_encoder does not work with trainable lora"),
        ({"trainable": "lora", "lora_targets": "all-linear"}, "invalid choice: 'all-linear'"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank: found 0, expected at least 1"),
        ({"trainable": "lora", "lora_targets": "attention"}, "leaves out the experts"),
    ):
        assert message in refused(arguments(model, data, tmp_path / "run", **options), capsys)
    assert not (tmp_path / "run").exists()


def test_plan(model, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    runner = make_runner(
        arguments(model, data, tmp_path / "run", trainable="lora", num_experts=0, lora_targets="attention")
    )
    lines = str(runner.plan).splitlines()
    # Four Linear layers of 32 × 32 in each of two layers, rank 16.
    assert "trained 8,192 (" in lines[2]
    assert "trainable: lora" in lines[2]
    assert lines[3] == "adapter         LoRA of rank 16, alpha 32, on attention"
