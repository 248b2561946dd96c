import json

from helpers.tiny_training import arguments, make_runner, write_triplets


def test_prompts_and_pooling_come_from_the_base_folder_unless_given(tiny_encoder, tmp_path):
    import shutil

    from clpl_moe.encoder.settings import EmbeddingSettings, read_settings, write_settings

    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    write_settings(model, EmbeddingSettings("mean", True, "query: ", "passage: "), max_length=64, hidden_size=32)
    data = write_triplets(tmp_path / "t.jsonl", 4)
    runner = make_runner(arguments(model, data, tmp_path / "a"))
    assert runner.settings == EmbeddingSettings("mean", True, "query: ", "passage: ")
    example = runner.train_dataset[(0, 0)]
    assert example.query.startswith("query: ")
    assert all(text.startswith("passage: ") for text in example.passages)
    none = {"query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": "", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "none", **none))
    assert not runner.train_dataset[(0, 0)].query.startswith("query: ")
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
    example = runner.train_dataset[(0, 0)]
    assert example.query.startswith("Task: query: Query: ")
    runner.run()
    assert read_settings(tmp_path / "c").query_prompt == "Task: query: Query: "
    # Training on shorter texts makes no encoder of shorter ones.
    assert json.loads((tmp_path / "c" / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
