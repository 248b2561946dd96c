from clpl_moe.machine import without_folders


def test_a_command_line_tells_nothing_of_absolute_folders():
    words = ["--run", "/home/me/runs/ko", "--output=/home/me/x.json", "runs/ko", "--max_steps", "4", "/x/", "/"]
    assert without_folders(words) == ["--run", "ko", "--output=x.json", "runs/ko", "--max_steps", "4", "x/", "/"]
