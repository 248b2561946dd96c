import json
import shutil

import pytest

from clpl_moe.common.files import write_jsonl
from clpl_moe.synthesize.__main__ import main
from helpers.synthesis import arguments, json_lines, refused, results, train_file


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}</s>"])
def test_a_local_model_answers_in_batches_as_one_by_one(writer, tmp_path, template, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(writer)
    if template:
        writer_with_template = tmp_path / "writer"
        AutoModelForCausalLM.from_pretrained(writer).save_pretrained(writer_with_template)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(writer_with_template)
        writer = writer_with_template
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("ko: '{passage} ?'\n")
    texts = {f"p{n}": "a b " * n + f"글 {n}" for n in range(1, 6)} | {"long": "x " * 700}
    line = {"query": "물음", "pos": ["답"], "neg": list(texts.values()), "pos_ids": ["p0"], "neg_ids": list(texts)}
    write_jsonl(tmp_path / "train.jsonl", [line])
    options = {"backend": "transformers", "model": writer, "temperature": 0, "max_answer_tokens": 6, "prompts": prompts}
    argv = arguments(None, tmp_path / "train.jsonl", tmp_path, concurrency=3, max_query_chars=5, **options)
    main(argv)
    model = AutoModelForCausalLM.from_pretrained(writer)
    journal = json_lines(tmp_path / "out.journal.jsonl")[1:]
    expected = []
    for passage in list(texts.values())[:5]:
        prompt = f"<user> {passage} ?</s>" if template else f"{passage} ?"
        ids = tokenizer(prompt, add_special_tokens=not template, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append((tokenizer.decode(output, skip_special_tokens=True), ids.shape[1], len(output)))
    found = [(r["text"], r["prompt_tokens"], r["answer_tokens"]) for r in journal[:5]]
    assert found == expected
    assert len({text for text, *_ in expected}) > 1
    _, _, failures = results(tmp_path)
    assert "tokens, the model takes 694" in failures["long"]
    # Asked again where no answer was of use, and no more than that.
    assert len(journal) <= 10
    main([*argv, "--overwrite=true"])
    assert len(json_lines(tmp_path / "out.journal.jsonl")) == len(journal) + 1


def test_answers_longer_than_the_model_are_refused_before_anything_is_asked(tmp_path, capfd, writer):
    options = {"backend": "transformers", "model": writer, "max_answer_tokens": 1000}
    message = refused(capfd, arguments(None, train_file(tmp_path, 2), tmp_path, **options))
    assert "--max_answer_tokens: found 1000" in message
    assert not (tmp_path / "out.journal.jsonl").exists()


def test_a_local_model_that_is_none_is_a_message(tmp_path, capfd, writer):
    argv = arguments(None, train_file(tmp_path, 2), tmp_path, backend="transformers", model=tmp_path)
    assert "cannot be loaded as a language model" in refused(capfd, argv)
    broken = shutil.copytree(writer, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    assert "cannot be loaded as a language model" in refused(capfd, [*argv, f"--model={broken}"])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", 10**20),
        ("generation_config.json", "output_hidden_states", [[]]),
        ("tokenizer_config.json", "model_max_length", [[]]),
        ("tokenizer_config.json", "pad_token", None),
    ],
)
def test_a_damaged_local_model_is_told_before_anything_is_asked(writer, tmp_path, capfd, name, field, value):
    damaged = shutil.copytree(writer, tmp_path / "damaged")
    content = json.loads((damaged / name).read_text()) | {field: value}
    if field == "pad_token":
        content |= {"eos_token": None}
    (damaged / name).write_text(json.dumps(content))
    options = {"backend": "transformers", "model": damaged}
    message = refused(capfd, arguments(None, train_file(tmp_path, 2), tmp_path, **options))
    assert f"{damaged}: cannot be " in message
    assert not (tmp_path / "out.jsonl").exists()
