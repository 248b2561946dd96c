import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clpl_moe.common.text_key import text_id, text_key

ARABIC_KAF, ARABIC_YE, MAKSURA = "\u0643", "\u064a", "\u0649"
NON_JOINER, JOINER = "\u200c", "\u200d"
# Characters that the rules speak of, often, and any others now and then.
CHARACTERS = st.one_of(
    st.sampled_from(
        f"{ARABIC_KAF}{ARABIC_YE}{MAKSURA}{NON_JOINER}{JOINER}یکهةئأآ\u06c0\u06d5\u0653\u0654\u0655\u0301\u0640\u064e\u0651\u0670 \n\u00a0\ufe0f!?.#+"
        "가각ㄱㅏ\u1100\u1161\u11a8\u115f\u1160कक़\u0958ऩिंँ्1१۱١ﷺﹱİßẞǅ²½Ａ"
    ),
    st.characters(codec="utf-8"),
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Tower, built 1889.", "the tower  built 1889"),
        ("what is it?", "What is it"),
        ("하나 둘", unicodedata.normalize("NFD", "하나 둘")),
        ("하나 둘", "하나\u00a0\n둘\t"),
        ("Ａ４ 용지", "A4 용지"),
        (f"می{NON_JOINER}شود؛ خوب", "میشود خوب"),
        (f"می{NON_JOINER}شود", "می شود"),
        ("کتاب یک", f"{ARABIC_KAF}تاب {ARABIC_YE}{ARABIC_KAF}"),
        ("سال ۱۳۹۵", "سال 1395"),
        ("سال ۱۳۹۵", "سال١٣٩٥"),
        ("ســلام", "سلام"),
        ("مُحَمَّد", "محمد"),
        ("خانۀ ما", "خانه\u0654 ما"),
        ("خانۀ ما", "خانه \u0654 ما"),
        ("خانۀ ما", "خان\u06d5\u200c\u0654 ما"),
        ("رئیس", "ری \u0654یس"),
        ("۵٪", "5%"),
        ("क़लम", "\u0915\u093cलम"),
        ("\u0958लम", "\u0915\u093cलम"),
        ("हिन्दी।", "हिन्दी"),
        (f"राष्{JOINER}ट्र", "राष्ट्र"),
        ("वर्ष १९४७", "वर्ष 1947"),
        ("\ufeffone\u200b text", "one text"),
        ("?!", "..."),
    ],
)
def test_copies_have_one_key(one, other):
    assert text_key(one) == text_key(other)
    assert text_id(one) == text_id(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("हिन्दी", "हिनदी"),  # signs are letters' parts, no punctuation
        ("की", "का"),
        ("में", "मे"),
        ("कलम", "क़लम"),
        ("갈", "각"),
        ("가 나", "가나"),
        ("آب", "اب"),
        ("رأس", "راس"),
        ("C++ 17", "C 17"),
        ("C#", "C"),
        ("5%", "5"),
        ("1 2", "12"),
        ("1.5", "15"),
        ("سال ۱ ۲", "سال ۱۲"),
        ("built 1889", "built 1898"),
        ("résumé", "resume"),
        ("therapist", "the rapist"),
        ("🙂", "🙁"),
    ],
)
def test_what_distinguishes_words_stays(one, other):
    assert text_key(one) != text_key(other)
    assert text_id(one) != text_id(other)


@given(st.text(CHARACTERS))
def test_a_key_is_its_own_key_in_every_unicode_form(text):
    key = text_key(text)
    assert text_key(key) == key
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert text_key(unicodedata.normalize(form, text)) == key


@given(
    st.lists(st.text(CHARACTERS.filter(str.isalpha), min_size=1), min_size=1), st.sampled_from([" ", "\n", "\u00a0\t"])
)
def test_white_space_of_any_kind_is_one(words, space):
    assert text_key(space.join(words) + space) == text_key(" ".join(words))


def test_ids():
    """The same in every process and run, unlike Python's own hash, and the same as before for texts that no rule changes."""
    assert text_id("한국어") == 5647945873834442492
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(100))
    assert text_id("\ud800") != text_id("\ud801")  # halves of a pair, as a file's escapes may have them
