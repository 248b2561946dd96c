import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clpl_moe.card import main as card
from clpl_moe.report.__main__ import main as report
from helpers.damage import contents, damaged, ends_well
from helpers.reports import make_data

FILES = ("after/ko/metrics.json", "run/metrics.jsonl", "run/config.json", "run/train_config.yaml", "after/ko/run.trec")


def damage(data, folder, names):
    path = folder / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(json.loads(content)).encode() + b"\n"
    if path.suffix in (".json", ".jsonl"):
        content = data.draw(damaged(content))
    else:
        start = data.draw(st.integers(0, len(content)))
        content = content[:start] + data.draw(st.binary(min_size=1, max_size=5)) + content[start:]
    path.write_bytes(content)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_results_are_reported_or_told_of(data):
    pytest.importorskip("matplotlib")
    with tempfile.TemporaryDirectory() as name:
        folder = make_data(Path(name))
        damage(data, folder, FILES)
        before = contents(folder)
        options = ["--before", folder / "before", "--after", folder / "after", "--languages", "ko"]
        code = ends_well(report, [folder / "run", "--output", folder / "report", *options])
        after = contents(folder)
        assert {path: after[path] for path in before} == before
        assert ("report/report.html" in after) == (code == 0)
        assert all(path.split("/")[0] == "report" for path in after.keys() - before.keys())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_results_go_into_the_card_or_are_told_of(data):
    with tempfile.TemporaryDirectory() as name:
        folder = make_data(Path(name))
        text = "---\ntags: []\n---\n<!-- results -->\n<!-- end of results -->\n"
        (folder / "run" / "README.md").write_text(text)
        metrics = folder / "after" / "ko" / "metrics.json"
        metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"metrics": {"nDCG@5": 0.5, "AP": 1.0}}))
        damage(data, folder, ("after/ko/metrics.json", "before/ko/metrics.json"))
        before = contents(folder)
        code = ends_well(card, ["--run", folder / "run", "--after", folder / "after", "--before", folder / "before"])
        after = contents(folder)
        assert after.keys() == before.keys()
        changed = {path for path in before if after[path] != before[path]}
        assert changed <= ({"run/README.md"} if code == 0 else set())
