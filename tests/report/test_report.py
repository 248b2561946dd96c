import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json, write_jsonl
from clpl_moe.report import charts, report
from clpl_moe.report.__main__ import main
from helpers.reports import TEXTS, make_data

pytest.importorskip("matplotlib")


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


@pytest.fixture
def no_drawing(monkeypatch):
    """Pictures are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(charts, "save", lambda figure, output: output)
    monkeypatch.setattr(charts, "svg", lambda figure, label: "<svg></svg>")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report with its pictures: its page, and the folder."""
    data = make_data(tmp_path_factory.mktemp("report"))
    return run_main(data, *results(data)), data / "report"


def run_main(data: Path, *argv: str, runs=("run",)) -> str:
    folders = [str(data / run) for run in runs]
    main([*folders, "--output", str(data / "report"), *argv])
    return (data / "report" / "report.html").read_text(encoding="utf-8")


def results(data: Path, runs: int = 1) -> list[str]:
    return ["--before", str(data / "before"), "--after", *[str(data / "after")] * runs]


class Page(HTMLParser):
    """Which language and direction each text of a page has, from the innermost element that says so."""

    EMPTY = ("meta", "path", "use", "rect", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str | None, str | None]] = []
        self.tags: set[str] = set()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop()[0] == tag

    def handle_data(self, text):
        def nearest(name):
            return next((a[name] for _, a in reversed(self.open) if name in a), None)

        if text.strip():
            self.texts.append((text.strip(), nearest("lang"), nearest("dir")))


def test_page_of_a_run_with_its_results(drawn):
    html, folder = drawn
    page = Page(html)
    # One file that needs nothing else, and no script.
    assert "script" not in page.tags
    assert not re.search(r'(?:src|href)="(?!#)', html)
    assert html.count("<svg") == 6 + 2 + 1 + 3 * 2 - 1  # no z-loss: it is 0 throughout; load; two of each language
    for title in ("Loss", "Contrastive term", "Penalty", "nDCG@5 on the dev queries", "Learning rate", "Gradient norm"):
        assert any(text == title for text, _, _ in page.texts), title
    assert not any("Z-loss" in text for text, _, _ in page.texts)
    assert {"layer 8", "layer 10"} <= {text for text, _, _ in page.texts}
    assert "base &lt;model&gt;" in html
    names = {path.name for path in folder.iterdir()}
    assert {"loss.png", "eval_ndcg_at_5.png", "learning_rate.png", "grad_norm.png", "expert_load_1.png"} <= names
    assert {"report.html", "per_query.csv", "before_after_fa_1.png", "changes_ko_3.png"} <= names
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_texts_keep_their_letters_language_and_direction(drawn):
    page = Page(drawn[0])
    for language, texts in TEXTS.items():
        for text in texts[:2]:  # of the queries that changed
            found = [(lang, direction) for shown, lang, direction in page.texts if shown == text]
            assert found, text  # whole, and not taken for HTML
            assert set(found) == {(language, "rtl" if language == "fa" else "ltr")}
    english = [lang for text, lang, _ in page.texts if text.startswith("rank ")]
    assert set(english) == {"en"}


def test_names_are_no_formulas_in_pictures(tmp_path):
    """A run that is called $\\frac$ is drawn, and one with an underscore in front is in the legend."""
    curves = [(name, [(1.0, 2.0), (2.0, 1.0)]) for name in (r"$\frac$", "_run", "cost $5")]
    drawn = charts.svg(charts.plot_curves(curves, "Loss", "loss"), "loss")
    for name, _ in curves:
        assert name in drawn.replace("\u200b", "")


def test_table_of_every_query(data, no_drawing):
    html = run_main(data, *results(data), "--languages", "ko")
    assert "0.8770" in html  # mean before
    assert "−0.2103" in html  # and how it changed
    with (data / "report" / "per_query.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["query_id"], r["nDCG@5 before"], r["nDCG@5 after"]) for r in rows] == [
        ("q0", "0.63093", "1"),
        ("q2", "1", "1"),
        ("q1", "1", "0"),
    ]


def test_runs_side_by_side(data, monkeypatch):
    monkeypatch.setattr(charts, "save", lambda figure, output: output)
    (data / "run").rename(data / "first")
    write_jsonl(data / "second" / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    html = run_main(data, *results(data, 2), "--languages", "hi", runs=("first", "second"))
    page = Page(html)
    legend = [text for text, _, _ in page.texts if text in ("first", "second")]
    assert legend.count("second") >= 3  # results, training, and in the one picture that has both
    assert "<h2>first, hi: before and after</h2>" in html
    assert "<h2>second, hi: before and after</h2>" in html


def test_a_run_of_a_comparison_brings_its_own_results(data, no_drawing):
    (data / "ablation").mkdir()
    (data / "run").rename(data / "ablation" / "model")
    (data / "after").rename(data / "ablation" / "results")
    (data / "base").mkdir()
    (data / "before").rename(data / "base" / "results")
    html = run_main(data, "--before", str(data / "base"), runs=("ablation",))
    assert "<h2>ablation, ko: before and after</h2>" in html
    assert "Of all trained parameters" in html


def test_what_a_run_trained_and_on_which_loss(data, no_drawing):
    options = {
        "trainable": "full",
        "frozen_layers": 8,
        "penalty": "contrastive",
        "penalty_weight": 0.8,
        "temperature": 0.01,
    }
    with (data / "run" / "train_config.yaml").open("a") as file:
        file.writelines(f"{name}: {value}\n" for name, value in options.items())
    html = re.sub(r"\s*<[^>]+>\s*", "|", run_main(data))
    for fact in ("trained||full", "frozen layers||8", "penalty||contrastive", "temperature, λ||0.01, 0.8"):
        assert fact in html, fact


def test_page_without_results(data, no_drawing):
    html = run_main(data, "--title", "A & B", str(data / "run"), runs=())  # words may stand anywhere
    assert "<h1>A &amp; B</h1>" in html
    assert "<h2>Results</h2>" not in html
    assert not (data / "report" / "per_query.csv").exists()


@pytest.mark.filterwarnings("ignore:.*queries have no line here")
def test_mistakes_are_told_and_nothing_is_written(data, capsys):
    def refused(*argv, runs=("run",)):
        with pytest.raises(SystemExit) as stop:
            run_main(data, *argv, runs=runs)
        assert stop.value.code == 2
        assert not (data / "report").exists()
        return capsys.readouterr().err

    assert "no run to report on" in refused(runs=())
    assert "nowhere: no such folder" in refused(runs=("nowhere",))
    assert "metrics.jsonl: no such file; expected the folder of a training run" in refused(runs=("data",))
    assert "metric 'x' is unknown" in refused("--metric", "x")
    assert "--after: found 1, expected one for each of the 2 runs" in refused(*results(data), runs=("run", "after"))
    assert "--before: found 2, expected one" in refused("--before", "a", "b")
    assert "a folder stands there twice" in refused(runs=("run", "run"))
    assert "expected before, too" in refused("--after", str(data / "after"))
    assert "holds no results of a language" in refused("--before", str(data / "before"), "--after", str(data / "run"))
    with (data / "data" / "ko" / "dev_queries.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "x"}\n')
    assert "not the collection that" in refused(*results(data))
    about = json.loads((data / "after" / "fa" / "metrics.json").read_text())
    write_json(data / "after" / "fa" / "metrics.json", about | {"collection_hash": "other"})
    assert "are of another collection" in refused(*results(data), "--languages", "fa")


def test_a_report_is_replaced_when_asked_and_other_folders_never(data, no_drawing, capsys):
    run_main(data)
    with pytest.raises(SystemExit):
        run_main(data)
    assert "set overwrite" in capsys.readouterr().err
    run_main(data, "--overwrite", "true")
    (data / "report" / "report.html").rename(data / "report" / "other.html")
    with pytest.raises(SystemExit):
        main([str(data / "run"), "--output", str(data / "report"), "--overwrite", "true"])
    assert "found a folder with other things" in capsys.readouterr().err


def test_an_unfinished_last_line_is_left_out(data, no_drawing):
    with (data / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert "Of all trained parameters" in run_main(data)


def test_called_from_python(data, no_drawing, capsys):
    before, after = data / "before", data / "after"
    page = report(runs=[data / "run"], before=before, after=after, languages=["ko"], output=data / "report")
    assert page == data / "report" / "report.html"
    assert "ko: before and after" in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""
    for options, message in (
        ({"languges": ["ko"]}, r"report\(\): unknown argument 'languges'; did you mean 'languages'"),
        ({"examples": 0}, "examples: found 0, expected at least 1"),
        ({"runs": []}, "field 'runs': an empty list was found"),
        ({}, "set overwrite to replace it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            report(**{"runs": [data / "run"], "output": data / "report"} | options)
        assert "--" not in str(error.value)
