import re

import pytest

from clpl_moe.synthesize.__main__ import main
from clpl_moe.synthesize.job import PROMPTS, fill, load_prompt
from helpers.synthesis import arguments, refused, text, train_file

pytest.importorskip("openai")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ko: 질문을 쓰세요", "field 'ko': the prompt has no {passage}"),
        ("ko: '{passage} {title}'", "field 'ko': found {title}, expected {passage} or {queries}"),
        ("ko: [1]", "field 'ko': found a list"),
        ("no: '{passage}'", "found False, expected a name; put it into quotes"),
        ("1: '{passage}'", "found 1, expected the name of a language"),
        ("fa: '{passage}'", "no prompt for 'ko' and no 'generic' one; the file has fa"),
    ],
)
def test_faulty_prompt_files_are_named(tmp_path, capfd, content, words):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(content)
    argv = arguments(None, train_file(tmp_path, 2), tmp_path, base_url="http://127.0.0.1:9/v1", prompts=prompts)
    message = refused(capfd, argv)
    assert str(prompts) in message
    assert words in message


def test_prompts_of_the_user(llm, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("generic: '{queries} of <{passage}>'\nfa: '{passage}'\n")
    server = llm()
    main(arguments(server, train_file(tmp_path, 1), tmp_path, prompts=prompts))
    assert server.log()[0]["request"]["messages"][0]["content"] == f"1 of <{text(0)}>"


def test_a_language_of_several_parts_has_the_prompt_of_its_first(tmp_path):
    assert load_prompt("ko-no-titles") == load_prompt("ko-KR") == load_prompt("ko") != load_prompt("generic")
    (tmp_path / "prompts.yaml").write_text("ko: '{passage}'\nko-KR: '<{passage}>'\n")
    assert load_prompt("ko-KR", tmp_path / "prompts.yaml") == "<{passage}>"


@pytest.mark.parametrize(("language", "script"), [("ko", "[가-힣]"), ("fa", "[آ-ی]"), ("hi", "[अ-ह]"), ("th", "[a-z]")])
def test_the_package_has_a_prompt_for_each_language(language, script):
    prompt = fill(load_prompt(language), "{queries} {passage}", 4)
    assert "{queries} {passage}" in prompt  # braces of the passage are left alone
    assert "4" in prompt
    assert len(re.findall(script, prompt)) > 100
    assert PROMPTS.is_file()
