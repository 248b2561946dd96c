import re

import pytest

from clpl_moe.judge.__main__ import main
from clpl_moe.judge.job import PROMPTS, PROMPTS_WITH_QUERIES
from clpl_moe.llm.prompts import fill_prompt, load_prompt
from helpers.judging import line, query, train_file
from helpers.synthesis import arguments, refused

pytest.importorskip("openai")


@pytest.mark.parametrize("path", [PROMPTS, PROMPTS_WITH_QUERIES], ids=lambda path: path.stem)
@pytest.mark.parametrize(("language", "script"), [("ko", "[가-힣]"), ("fa", "[آ-ی]"), ("hi", "[अ-ह]"), ("th", "[a-z]")])
def test_the_package_has_a_prompt_for_each_language(path, language, script):
    prompt = load_prompt(path, language, ["query", "passages"])
    assert len(re.findall(script, prompt)) > 100
    assert all(f'"{word}"' in prompt for word in ("verdicts", "passage", "answers", "yes", "partly", "no"))
    assert ('"query"' in prompt) == (path == PROMPTS_WITH_QUERIES)
    filled = fill_prompt(prompt, query="{passages}", passages="{query}")
    assert filled.count("{passages}") == filled.count("{query}") == 1  # braces of texts are left alone


def test_a_prompt_file_without_a_place_for_the_query_is_named(tmp_path, capfd):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("ko: '{passages}'")
    path = train_file(tmp_path, [line(1, "no")])
    options = {"base_url": "http://127.0.0.1:9/v1", "prompts": prompts}
    message = refused(capfd, arguments(None, path, tmp_path, **options), main)
    assert f"{prompts}: field 'ko': the prompt has no {{query}}" in message


def test_prompts_of_the_user(llm, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("generic: '<{query}> {passages}'\n")
    server = llm()
    record = line(1, "no")
    main(arguments(server, train_file(tmp_path, [record]), tmp_path, prompts=prompts))
    (entry,) = server.log()
    shown = f"<passage 1>\n{record['neg'][0]}\n</passage 1>"
    assert entry["request"]["messages"][0]["content"] == f"<{query(1)}> {shown}"
