"""The figures are drawn, say what the loss does, and a run's curves survive what a run's file may hold."""

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.report.course import series
from clpl_moe.train.metrics_file import read_metrics

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_figures.py"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("make_figures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_missing_glyphs():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*")
        warnings.filterwarnings("error", message=".*[Ff]ont.*")
        yield


def assert_picture(path):
    assert path.stat().st_size < 200_000
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    assert pixels.shape[1] >= 500
    assert (pixels[0] == 255).all(), "white to the edge: nothing is cut off at the top"
    assert (pixels[:, -1] == 255).all(), "nothing is cut off at the right"
    assert 0.01 < (pixels < 250).any(-1).mean() < 0.5


def run_file(tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_figures_of_the_readme_are_drawn_and_are_reproducible(figures, tmp_path):
    figures.plot_formula(tmp_path / "formula.png")
    figures.plot_clpl(tmp_path / "a" / "clpl.png", steps=10)
    figures.plot_clpl(tmp_path / "b" / "clpl.png", steps=10)
    assert_picture(tmp_path / "formula.png")
    assert_picture(tmp_path / "a" / "clpl.png")
    assert (tmp_path / "a" / "clpl.png").read_bytes() == (tmp_path / "b" / "clpl.png").read_bytes()


def test_the_penalty_keeps_the_negative_near_its_own_query(figures):
    """What the figure claims; fewer, larger steps than it takes."""
    query, positive, negative, own_query = range(4)
    cosine = {}
    for weight in (0.0, figures.PENALTY_WEIGHT):
        path = figures.trajectories(weight, steps=400, learning_rate=0.005)
        np.testing.assert_allclose(np.linalg.norm(path, axis=-1), 1)
        cosine[weight] = path @ path.transpose(0, 2, 1)  # (steps + 1, 4, 4)
        assert cosine[weight][0, query, negative] > cosine[weight][0, query, positive], "the negative is hard"
        assert cosine[weight][-1, query, negative] < cosine[weight][-1, query, positive] - 0.1, "and learned"
        if weight == 0:
            np.testing.assert_array_equal(path[-1, own_query], path[0, own_query])
    pair = {weight: values[[0, -1], negative, own_query] for weight, values in cosine.items()}
    assert pair[0.0][1] < pair[0.0][0] - 0.02
    assert pair[figures.PENALTY_WEIGHT][1] > pair[figures.PENALTY_WEIGHT][0]


def test_map_keeps_angles_from_its_centre(figures):
    angle = np.radians(30)
    points = np.array([[0, 0, 1], [np.sin(angle), 0, np.cos(angle)], [0, -np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(figures.project(points), [[0, 0], [30, 0], [0, -30]], atol=1e-9)


def test_run_is_drawn_from_whatever_its_lines_hold(figures, tmp_path):
    path = run_file(
        tmp_path,
        {"step": 0, "eval_ndcg@10": 0.8, "eval_ndcg@5": 0.7},
        {"step": 1, "loss": 2.0, "contrastive": 2.1, "penalty": 0.4, "positive_similarity": 0.8},
        {"step": 2, "loss": 1.0, "contrastive": float("nan"), "penalty": None, "expert_load": [[0.5, 0.5]]},
        {"step": 2, "loss": 1.5},
        {"train_runtime": 3.0},
        "\n",
        '{"step": 3, "lo',
    )
    records = read_metrics(path)
    assert series(records, "loss") == [(1, 2.0), (2, 1.5)]
    assert series(records, "contrastive") == [(1, 2.1)]
    assert_picture(figures.plot_run(path, tmp_path / "run.png"))
    with Image.open(tmp_path / "run.png") as three_panels:
        width = three_panels.width
    figures.plot_run(run_file(tmp_path, *({"step": n, "loss": 1 / n} for n in range(1, 200))), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as one_panel:
        assert one_panel.width == pytest.approx(width / 3, abs=2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "no line has a step"),
        (({"step": 1, "grad_norm": 1.0},), "no line has a step"),
        (('{"step": 1, \n', {"step": 2, "loss": 1.0}), "metrics.jsonl:1: not JSON"),
    ],
)
def test_run_without_anything_to_draw(figures, tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        figures.plot_run(run_file(tmp_path, *lines), tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_command_line(figures, tmp_path, capsys):
    run_file(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5})
    output = tmp_path / "plots" / "quickstart.png"
    figures.main(["--run", str(tmp_path), "--output", str(output)])
    assert_picture(output)
    for wrong in (
        ["--run", str(tmp_path), "--output", str(output)],  # exists
        ["--run", str(tmp_path / "absent"), "--output", str(tmp_path / "x.png")],
        ["--run", str(tmp_path), "--output", str(tmp_path / "x.svg")],
    ):
        with pytest.raises(SystemExit) as exit_info:
            figures.main(wrong)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    figures.main(["--run", str(tmp_path), "--output", str(output), "--overwrite", "true"])
