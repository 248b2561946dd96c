from clpl_moe.judge.__main__ import main
from clpl_moe.llm.backends import Answer
from helpers.judging import line, results, train_file
from helpers.synthesis import arguments, json_lines, refused


def test_a_local_model_is_asked_without_drawing(writer, tmp_path, capfd):
    """Random weights give no verdict, which is told; every answer is in the journal, twice the same."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("ko: '{query} {passages}'\n")
    path = train_file(tmp_path, [line(1, "no"), line(2, "no")])
    options = {"backend": "transformers", "model": writer, "max_answer_tokens": 4, "prompts": prompts}
    message = refused(capfd, arguments(None, path, tmp_path, **options), main)
    assert "not one passage was judged, mostly: " in message
    answers = [(record["question"], record["text"]) for record in json_lines(tmp_path / "out.journal.jsonl")[1:]]
    assert len(answers) == 4
    assert answers[:2] == answers[2:]


def test_verdicts_of_a_local_model(writer, tmp_path, monkeypatch):
    from clpl_moe.llm.local import LocalModel

    def generate(self, tokens, **other):
        return [Answer("1: yes", False, len(t), 3) for t in tokens]

    monkeypatch.setattr(LocalModel, "_generate", generate)
    path = train_file(tmp_path, [line(1, "yes"), line(2, "yes")])
    (tmp_path / "prompts.yaml").write_text("ko: '{query} {passages}'\n")
    options = {"backend": "transformers", "model": writer, "prompts": tmp_path / "prompts.yaml"}
    main(arguments(None, path, tmp_path, **options | {"max_answer_tokens": 4}))
    found, verdicts = results(tmp_path)
    assert set(verdicts.values()) == {"yes"}
    assert all(len(record["pos"]) == 2 for record in found)
