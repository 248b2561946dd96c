from clpl_moe.report.text import cut, is_right_to_left, percent, signed


def test_texts_are_cut_between_characters_as_readers_see_them():
    assert cut("short", 10) == ("short", False)
    assert cut("one two three four", 12) == ("one two …", True)
    assert cut("क्षत्रिय", 1) == ("क्षत्रिय"[:3] + " …", True)  # a conjunct stays whole
    assert cut("می‌خواهم", 1) == ("م …", True)
    assert cut("آبِ رود", 2) == ("آبِ …", True)  # a vowel stays with its letter
    assert cut("가나다라", 2) == ("가나 …", True)


def test_direction_is_that_of_most_letters():
    assert is_right_to_left("NATO و اعضای آن")
    assert not is_right_to_left("Tehran (تهران) is a city")
    assert not is_right_to_left("서울")
    assert not is_right_to_left("12")


def test_signs():
    assert [signed(value, 2) for value in (0.123, -0.5, -0.001)] == ["+0.12", "−0.50", "0.00"]
    assert [percent(value) for value in (0.25, -0.1, None)] == ["+25.0%", "−10.0%", "–"]
