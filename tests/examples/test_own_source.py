import csv
import os
import subprocess
import sys
from pathlib import Path

from clpl_moe.retrieval.collection import Collection

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_source.py"


def test_questions_of_a_csv_file_become_a_collection(tmp_path):
    pairs = [
        ("다리는 언제 놓였나?", "다리는 1932년에 놓였다."),
        ("누가 지었나?", "도시가 지었다."),
        ("언제?", "도시가 지었다."),
    ]
    with (tmp_path / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "paragraph"), *pairs])
    command = [sys.executable, EXAMPLE, "questions.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'passages': 2, 'train queries': 3" in done.stdout
    collection = Collection.load(tmp_path / "collections", "ko", "train")
    assert list(collection.passages) == ["다리는 1932년에 놓였다.", "도시가 지었다."]
    assert collection.qrels == {"q0": {"p0": 1}, "q1": {"p1": 1}, "q2": {"p1": 1}}
