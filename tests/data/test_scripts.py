import pytest

from clpl_moe.data.scripts import script_of


@pytest.mark.parametrize(
    ("character", "script"),
    [("한", "Hangul"), ("ㄱ", "Hangul"), ("ﾡ", "Hangul"), ("ک", "Arabic"), ("ﷲ", "Arabic"), ("ह", "Devanagari"),
     ("Ａ", "Latin"), ("я", "Cyrillic"), ("々", "Han"), ("𝐀", "Other"), ("١", None), (" ", None), ("\ue000", None)],
)  # fmt: skip
def test_scripts(character, script):
    assert script_of(character) == script
