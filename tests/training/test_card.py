import yaml

from clpl_moe.train import main
from tiny_training import arguments, make_collection, write_triplets


def test_card_tells_what_was_trained_on_what_and_how_it_went(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "my data.jsonl", 6)
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "dev_collection": make_collection(tmp_path / "dev"),
        "dev_language": "ko",
        "eval_on_start": True,
        "query_instruction_for_retrieval": "query: ",
    }
    main(arguments(tiny_encoder, data, tmp_path / "run", **options))
    _, front, text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["language"] == ["ko"]
    assert header["base_model"] == str(tiny_encoder)
    assert header["library_name"] == "sentence-transformers"
    assert "moe" in header["tags"]
    for piece in (
        "# run\n",
        "6 from `my data.jsonl`",
        "temperature 0.1, penalty weight 0.1, in-batch negatives on",
        "before training | 0 |",
        "after training (best checkpoint) |",
        "`'query: '`",
        "trust_remote_code=True",
        "2412.17364",
    ):
        assert piece in text


def test_card_of_a_dense_run_without_evaluation(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 6)
    main(arguments(tiny_encoder, data, tmp_path / "run", max_steps=1, num_experts=0, trainable="full"))
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert "moe" not in header["tags"]
    assert "language" not in header
    assert "## Results" not in text
    assert "trust_remote_code=False" in text
