import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.data.example import Example
from tell.data.overlap import _shingles, _words, find_duplicates, find_overlap

WORDS = [a + b for a, b in product("bdfgklmnprst", "aeiou")]


def prose(seed, n=40):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def make(texts):
    return [Example.pair(text, "answer") for text in texts]


def test_exact_near_and_different():
    one = prose(1)
    changed = one.replace(one.split()[20], "changed", 1)
    a = make([prose(5), one, one.upper().replace(" ", ", ") + "!", changed, prose(6)])
    found = find_overlap(a, make([prose(2), one]))
    assert (found.exact, found.near, found.indices) == (1, 2, {1, 2, 3})
    assert [(p.a_index, p.test_index) for p in found.pairs] == [(1, 1), (2, 1), (3, 1)]
    assert found.pairs[0].similarity == found.pairs[1].similarity == 1.0
    x, y = _shingles(_words(changed)), _shingles(_words(one))
    assert found.pairs[2].similarity == pytest.approx(len(x & y) / len(x | y))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.5, 0.95))
def test_near_agrees_with_all_pairs(seed, edits, threshold):
    rng = random.Random(seed)
    test = [prose(seed + i, 30) for i in range(6)]
    a = []
    for text in test * 2:
        words = text.split()
        for _ in range(rng.randint(0, edits)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        a.append(" ".join(words))
    found = find_overlap(make(a), make(test), threshold=threshold, ignore_template=False)
    shingles = [_shingles(_words(text)) for text in test]
    for i, text in enumerate(a):
        mine = _shingles(_words(text))
        best = max(len(mine & other) / len(mine | other) for other in shingles)
        assert (i in found.indices) == (best >= threshold)


def test_similarity_of_exactly_the_threshold():
    """0.55 * 100 is 55.00000000000001 in floating point: 55 of 100 shingles are enough all the same."""
    words = [f"word{i}" for i in range(102)]
    found = find_overlap(make([" ".join(words)]), make([" ".join(words[:57])]), threshold=0.55)
    assert [pair.similarity for pair in found.pairs] == [0.55]


def test_each_pair_names_the_most_similar_test_row():
    base = prose(3).split()
    test = [" ".join([*base[:-2], "x", "y"]), " ".join([*base[:-1], "y"])]
    found = find_overlap(make([" ".join(base)]), make(test), ignore_template=False)
    assert [(pair.a_index, pair.test_index) for pair in found.pairs] == [(0, 1)]


def test_a_shared_instruction_does_not_make_rows_alike():
    instruction = prose(0, 120)
    train = make(f"{instruction}\n\n{prose(i, 12)}" for i in range(10, 20))
    test = make(f"{instruction}\n\n{prose(i, 12)}" for i in range(20, 25))
    assert find_overlap(train, test).near == 0
    assert find_overlap(train, test, ignore_template=False).near > 0
    tail = [make(f"{prose(i, 12)}\n\n{instruction}" for i in part) for part in (range(10, 20), range(20, 25))]
    assert find_overlap(*tail).near == 0
    # ... and a true near-duplicate is still found, with the instruction and without it.
    same = prose(20, 12)
    assert find_overlap(make([f"{instruction}: {same.title()}", same.upper()]), test).indices == {0, 1}


def test_short_and_empty_texts():
    assert find_overlap(make(["Hi!", "Bye"]), make(["hi"])).indices == {0}
    assert find_overlap(make(["!!!", "?"]), make(["...", "?"])).indices == {1}
    assert find_overlap([], make(["a"])).indices == find_overlap(make(["a"]), []).indices == set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ÆTLI ÞAÐ SÉ EKKI ÖRUGGT að veðrið verði gott", "ætli það sé ekki öruggt, að veðrið verði gott?"),
        ("今天的天气非常好，我们一起去公园散步吧", "今天的天气非常好我们一起去公园散步吧！"),
        ("STRASSE und Haus", "straße und haus"),
    ],
)
def test_unicode(one, other):
    assert find_overlap(make([one]), make([other])).near == 1


def test_chinese_words_are_characters():
    one = "今天的天气非常好我们一起去公园散步然后回家吃晚饭看电视"
    assert find_overlap(make([one + "吧"]), make([one])).near == 1


def test_prompt_or_all():
    a, test = [Example.pair("same prompt here", "one answer")], [Example.pair("same prompt here", "another thing")]
    assert find_overlap(a, test).exact == 1
    assert find_overlap(a, test, on="all").indices == set()


def test_duplicates_within_a_list_are_pairs_of_an_earlier_and_a_later_row():
    texts = [
        "the parcel that I ordered three weeks ago has still not arrived in Bonn",
        "something else that has nothing to do with parcels or with any weeks",
        "The parcel, that I ordered three weeks ago, has still not arrived in Bonn!",
        "the parcel that I ordered three weeks ago has still not arrived in Kiel",
        "something else that has nothing to do with parcels or with any weeks",
    ]
    rows = [Example.pair(text, str(i)) for i, text in enumerate(texts)]
    pairs = find_duplicates(rows)
    assert [(pair.a_index, pair.test_index) for pair in pairs] == [(2, 0), (3, 0)]  # 4 equals 1, so it is not near it
    assert pairs[0].similarity == 1 > pairs[1].similarity >= 0.8
    assert find_duplicates([]) == find_duplicates(rows[:1]) == []


def test_duplicates_within_a_list_are_those_of_comparing_all_pairs():
    rng = random.Random(5)
    words = ["red", "blue", "green", "tent", "stove"]
    rows = [Example.pair(" ".join(rng.choices(words, k=6)), str(i)) for i in range(150)]
    found = {(pair.a_index, pair.similarity) for pair in find_duplicates(rows, threshold=0.5)}
    expected = set()
    for i, row in enumerate(rows):
        earlier = [other for other in rows[:i] if other.prompt != row.prompt]
        first = all(other.prompt != row.prompt for other in rows[:i])
        best = find_overlap([row], earlier, threshold=0.5, ignore_template=False).pairs if earlier and first else []
        expected |= {(i, pair.similarity) for pair in best}
    assert found == expected and len(found) > 10
