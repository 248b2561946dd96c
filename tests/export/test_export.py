"""The command and its folder: what is written, replaced and refused."""

import json

import pytest
import torch
from transformers import AutoModel

from clpl_moe import Encoder, UserError
from clpl_moe.export import export
from clpl_moe.export.__main__ import main


def test_a_folder_in_another_precision(tiny_encoder, tmp_path, capsys):
    main([str(tiny_encoder), str(tmp_path / "half"), "--dtype", "bfloat16"])
    model = AutoModel.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    expected = AutoModel.from_pretrained(tiny_encoder).state_dict()
    for name, tensor in model.state_dict().items():
        if "pooler" not in name:
            assert torch.equal(tensor, expected[name].bfloat16())
    printed = capsys.readouterr().out
    assert "(50.0%)" in printed
    assert f"saved to {tmp_path / 'half'}" in printed
    record = json.loads((tmp_path / "half/export.json").read_text())
    assert record["size"] * 2 == record["size_before"]
    # Without the option the precision stays; the heads go along.
    export(input=tmp_path / "half", output=tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == torch.bfloat16
    assert (tmp_path / "again/sparse_linear.pt").is_file()


def test_the_card_of_the_model_goes_along(tiny_encoder, tmp_path):
    export(input=tiny_encoder, output=tmp_path / "first")
    assert (tmp_path / "first/README.md").read_text().startswith("---\nlibrary_name: sentence-transformers\n")
    (tmp_path / "first/README.md").write_text("---\nlanguage: ko\n---\n\n# Mine\n")
    export(input=tmp_path / "first", output=tmp_path / "second")
    assert (tmp_path / "second/README.md").read_text().startswith("---\nlanguage: ko\n---\n\n# Mine\n\n## Export\n")


def test_a_card_that_is_no_text_is_told_of(tiny_encoder, tmp_path):
    export(input=tiny_encoder, output=tmp_path / "first")
    (tmp_path / "first/README.md").write_bytes(b"# \xff")
    with pytest.raises(UserError, match=r"first/README\.md: not UTF-8 text"):
        export(input=tmp_path / "first", output=tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_texts_that_are_none_are_told_of(tiny_encoder, tmp_path):
    """An empty name would be the current folder."""
    (tmp_path / "qrels.jsonl").write_text('{"qid": "q1", "docid": "p1", "relevance": 1}\n')
    names = {"input": tiny_encoder, "output": tmp_path / "out"}
    with pytest.raises(UserError, match="check_texts: found no text"):
        export(**names, to="onnx", check_texts=tmp_path / "qrels.jsonl")
    for options in ({"to": "onnx", "check_texts": ""}, {"trim_vocab": [""]}):
        with pytest.raises(UserError, match="found an empty name"):
            export(**names, **options)


def test_a_file_of_text_without_any_is_told_of_as_one(tiny_encoder, tmp_path):
    (tmp_path / "blank.txt").write_text("\n\r\n")
    with pytest.raises(UserError, match=r"blank\.txt: the file is empty, expected a text a line"):
        export(input=tiny_encoder, output=tmp_path / "out", to="onnx", check_texts=tmp_path / "blank.txt")


def test_an_exported_model_is_replaced_when_asked_and_nothing_else(tiny_encoder, tmp_path):
    output = tmp_path / "out"
    export(input=tiny_encoder, output=output)
    with pytest.raises(UserError, match="the output folder is not empty"):
        export(input=tiny_encoder, output=output)
    export(input=tiny_encoder, output=output, overwrite=True)
    (output / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md"):
        export(input=tiny_encoder, output=output, overwrite=True)
    other = tmp_path / "other"
    Encoder.load(tiny_encoder, device="cpu").save(other)
    with pytest.raises(UserError, match=r"export\.json"):
        export(input=tiny_encoder, output=other, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": None}, "output: found nothing, expected a folder"),
        ({"output": "{model}"}, "output: found the folder of input, expected another one"),
        ({"input": "{model}/none"}, "none: neither a folder here nor a model"),
        ({"dtype": "int4"}, "dtype"),
        ({"to": "openvino", "int8": True}, "int8: goes with to onnx"),
        ({"to": "openvino", "dtype": "float16"}, "dtype: found float16, expected float32 with to openvino$"),
    ],
)
def test_wrong_options(tiny_encoder, tmp_path, options, message):
    options = {k: v.format(model=tiny_encoder) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        export(**{"input": tiny_encoder, "output": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()
