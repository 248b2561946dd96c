import gzip

import pytest

from clpl_moe.common.compressed import open_bytes, plain_name
from clpl_moe.common.errors import UserError


def test_names_without_compression():
    assert [plain_name(name) for name in ("a/T.JSONL.gz", "t.tsv.ZST", "t.csv", "gz")] == [
        "t.jsonl",
        "t.tsv",
        "t.csv",
        "gz",
    ]


def test_content_and_the_place_in_the_file(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000))
    with open_bytes(path) as (content, file):
        assert content.read() == b"x" * 10_000
        assert file.tell() == path.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-9], "cut short"),
        (lambda raw: raw[:20] + b"??" + raw[22:], "broken gzip"),
        (lambda raw: b"x", "broken"),
    ],
)
def test_damage_is_told(tmp_path, change, message):
    path = tmp_path / "a.gz"
    path.write_bytes(change(gzip.compress(bytes(range(256)) * 40)))
    with pytest.raises(UserError, match=rf"a\.gz: .*{message}"), open_bytes(path) as (content, _):
        content.read()
