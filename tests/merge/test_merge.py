"""From the command to a dense folder that loads everywhere."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModel, XLMRobertaModel

from clpl_moe import Encoder, MoEConfig, inject_moe, merge_experts
from clpl_moe.common.errors import UserError
from clpl_moe.evaluate import evaluate
from clpl_moe.merge import merge
from clpl_moe.merge.__main__ import main
from clpl_moe.moe.inject import choose_expert
from helpers.evaluating import changed_copy
from helpers.tiny import perturb_experts

LENGTHS = {"query_max_len": 60, "passage_max_len": 100, "dtype": "float32"}


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def test_experts_become_a_stock_model(tuned, tmp_path, capsys):
    main([str(tuned), str(tmp_path / "dense")])
    expected = merge_experts(Encoder.load(tuned, device="cpu"))
    model = AutoModel.from_pretrained(tmp_path / "dense")
    assert type(model) is XLMRobertaModel
    assert not list((tmp_path / "dense").glob("*.py"))
    texts = ["red house", "a"]
    found = Encoder.load(tmp_path / "dense", device="cpu")
    torch.testing.assert_close(found.encode_queries(texts), expected.encode_queries(texts))
    assert found.settings == expected.settings
    assert capsys.readouterr().out == f"saved to {tmp_path / 'dense'}: the dense model\n"


def test_before_and_after_are_what_evaluate_finds(tuned, collections, tmp_path):
    output = tmp_path / "dense"
    merged = merge(input=tuned, output=output, collection=collections, languages=["ko", "fa"], **LENGTHS)
    evaluation = evaluate(
        model=[tuned, output], collection=collections, languages=["ko", "fa"], output=tmp_path / "results", **LENGTHS
    )
    found = {(r.label, r.language): r.metrics["nDCG@10"] for r in evaluation.results}
    assert merged.before == {language: found["tuned", language] for language in ("ko", "fa")}
    assert merged.candidates == {1.0: {language: found["dense", language] for language in ("ko", "fa")}}
    assert [path.name for path in tmp_path.iterdir() if "embeddings" in path.name] == []
    record = json.loads((output / "merge.json").read_text())
    assert (record["input"], record["before"]) == (str(tuned), merged.before)
    assert str(merged).splitlines()[2].split()[0] == "merged"


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_with_the_base_model(tuned, tiny_encoder, tmp_path, alpha):
    merged = merge(input=tuned, output=tmp_path / "dense", base=tiny_encoder, alpha=[alpha])
    assert str(merged).endswith(f"the dense model, of alpha {alpha:g}")
    dense, base = merge_experts(Encoder.load(tuned, device="cpu")).model.state_dict(), weights(tiny_encoder)
    for name, found in weights(tmp_path / "dense").items():
        if "pooler" not in name:
            torch.testing.assert_close(found, (1 - alpha) * base[name] + alpha * dense[name])
    head = torch.load(tmp_path / "dense/sparse_linear.pt")["weight"]
    expected = (1 - alpha) * torch.load(tiny_encoder / "sparse_linear.pt")["weight"] + alpha
    torch.testing.assert_close(head, expected)


@pytest.mark.parametrize("spoiled", ["tuned", "base"])
def test_the_best_alpha_is_kept_and_may_be_the_base(tiny_encoder, collections, tmp_path, capsys, spoiled):
    other = changed_copy(tiny_encoder, tmp_path / "other")
    tuned, base = (other, tiny_encoder) if spoiled == "tuned" else (tiny_encoder, other)
    words = [str(tuned), str(tmp_path / "dense"), "--with", str(base), "--alpha", "0.3", "1"]
    words += ["--collection", str(collections), "--languages", "ko", "fa"]
    main(words + [f"--{name}={value}" for name, value in LENGTHS.items()])
    record = json.loads((tmp_path / "dense/merge.json").read_text())
    means = {c["alpha"]: sum(c["metrics"].values()) for c in record["candidates"]}
    assert list(means) == [0.0, 0.3, 1.0]
    assert len(set(means.values())) > 1
    assert record["alpha"] == max(means, key=means.get) == (0 if spoiled == "tuned" else 1)
    kept = weights(tiny_encoder)
    assert all(
        torch.equal(found, kept[name]) for name, found in weights(tmp_path / "dense").items() if "pool" not in name
    )
    printed = capsys.readouterr().out
    assert f"of alpha {record['alpha']:g}" in printed
    assert ("which it is" in printed) == (spoiled == "tuned")


def test_experts_weighted_by_load(tuned, collections, tmp_path):
    options = {"collection": collections, "languages": ["ko"], **LENGTHS}
    merge(input=tuned, output=tmp_path / "load", weights="load", **options)
    merge(input=tuned, output=tmp_path / "mean", **options)
    load, mean = weights(tmp_path / "load"), weights(tmp_path / "mean")
    experts = Encoder.load(tuned, device="cpu").model.state_dict()
    for layer in (0, 1):
        ends = [f"encoder.layer.{layer}.{half}.dense.weight" for half in ("intermediate", "output")]
        # The shares that solve for the merged weights are the same in both halves, and sum to 1.
        solved = [torch.linalg.lstsq(experts[n].flatten(1).T, load[n].flatten()[:, None]).solution for n in ends]
        torch.testing.assert_close(*solved, rtol=1e-3, atol=1e-4)
        assert solved[0].sum().item() == pytest.approx(1, abs=1e-3)
        assert not torch.allclose(load[ends[0]], mean[ends[0]], atol=1e-3)


def test_one_of_the_experts_that_are_given(tiny_encoder, tmp_path):
    encoder = inject_moe(Encoder.load(tiny_encoder, device="cpu"), MoEConfig(3, router="given"))
    perturb_experts(encoder.model)
    encoder.save(tmp_path / "given")
    merge(input=tmp_path / "given", output=tmp_path / "one", expert=2)
    choose_expert(encoder, 2)
    found, expected = (e.encode_queries(["red house"]) for e in (Encoder.load(tmp_path / "one", device="cpu"), encoder))
    torch.testing.assert_close(found, expected)
    # Mixed with the dense base model, and with one that has experts, too.
    inject_moe(other := Encoder.load(tiny_encoder, device="cpu"), MoEConfig(3, router="given"))
    other.save(tmp_path / "other")
    one, base = weights(tmp_path / "one"), weights(tiny_encoder)
    for name in (tiny_encoder, tmp_path / "other"):
        output = tmp_path / f"with-{name.name}"
        merge(input=tmp_path / "given", output=output, expert=2, base=name, alpha=[0.25])
        for key, value in weights(output).items():
            torch.testing.assert_close(value, torch.lerp(base[key], one[key], 0.25))


def test_an_adapter_is_merged(tiny_encoder, tmp_path):
    encoder = Encoder.load(tiny_encoder, device="cpu")
    inject_adapter_in_model(LoraConfig(target_modules=["query"], init_lora_weights=False), encoder.model)
    encoder.save(tmp_path / "adapter")
    merge(input=tmp_path / "adapter", output=tmp_path / "merged")
    found = weights(tmp_path / "merged")
    for name, value in Encoder.load(tmp_path / "adapter", device="cpu").model.state_dict().items():
        assert value.equal(found[name])
    name = "encoder.layer.0.attention.self.query.weight"
    assert (found[name] - weights(tiny_encoder)[name]).abs().max() > 0.01


def test_what_is_for_the_evaluation_needs_a_collection(tuned, tmp_path):
    for name, value in {"truncate_dim": 8, "query_max_len": 20, "quantize": "int8", "metric": "R@5"}.items():
        with pytest.raises(UserError, match=f"{name}: goes with collection, which is not set"):
            merge(input=tuned, output=tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_one_expert_has_no_load(tiny_encoder, collections, tmp_path):
    inject_moe(encoder := Encoder.load(tiny_encoder, device="cpu"), MoEConfig(3, router="given"))
    encoder.save(tmp_path / "given")
    options = {"weights": "load", "expert": 1, "collection": collections, "languages": ["ko"]}
    with pytest.raises(UserError, match="weights: found load, and expert, which alone is kept"):
        merge(input=tmp_path / "given", output=tmp_path / "one", **options)
    assert not (tmp_path / "one").exists()


def test_dense_models_need_a_base(tiny_encoder, tmp_path):
    with pytest.raises(
        UserError, match=r"input: found a dense model in .*, nothing to merge; expected experts, or base"
    ):
        merge(input=tiny_encoder, output=tmp_path / "out")
    merge(input=tiny_encoder, output=tmp_path / "out", base=tiny_encoder)
    with pytest.raises(UserError, match="the output folder is not empty"):
        merge(input=tiny_encoder, output=tmp_path / "out", base=tiny_encoder)


def test_a_base_with_other_words_is_refused(tiny_encoder, tuned, tmp_path):
    encoder = Encoder.load(tiny_encoder, device="cpu")
    encoder.tokenizer.add_tokens(["house"])
    encoder.save(tmp_path / "other")
    with pytest.raises(UserError, match="base has another vocabulary than input"):
        merge(input=tuned, output=tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_both_folders_are_named_as_words_or_as_options(tuned, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tuned)])
    assert "found 1 word without an option, expected INPUT OUTPUT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tuned), "out", "--output", str(tmp_path / "out")])
    assert "--output: given as an option and as words without one" in capsys.readouterr().err
    main(["--input", str(tuned), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out/config.json").is_file()


def test_a_merged_model_is_replaced_when_asked_and_nothing_else(tuned, tmp_path):
    output = tmp_path / "dense"
    merge(input=tuned, output=output)
    merge(input=tuned, output=output, overwrite=True)
    (output / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md"):
        merge(input=tuned, output=output, overwrite=True)
    other = tmp_path / "other"
    merge_experts(Encoder.load(tuned, device="cpu")).save(other)
    with pytest.raises(UserError, match=r"merge\.json"):
        merge(input=tuned, output=other, overwrite=True)
    assert (other / "config.json").is_file()
