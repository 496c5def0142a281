"""Other taxonomies lead to known names; names are found whatever their case."""

import pytest

from leanlight.contracts import HARM_CATEGORIES, UserError
from lit_modules.falcon_eye.taxonomy import (
    BEAVERTAILS_V,
    LLAMA_GUARD,
    LLAVA_GUARD,
    VLGUARD,
    category,
    mentioned,
    translated,
)


@pytest.mark.parametrize(
    ("taxonomy", "names"),
    [
        (LLAMA_GUARD, {f"S{k}" for k in range(1, 15)}),
        (LLAVA_GUARD, {f"O{k}" for k in range(1, 10)} | {"NA"}),
        (BEAVERTAILS_V, 20),
        (VLGUARD, 9),
    ],
)
def test_every_kind_of_another_taxonomy_has_known_names(taxonomy, names):
    assert taxonomy.keys() == names if isinstance(names, set) else len(taxonomy) == names
    for name, kinds in taxonomy.items():
        assert set(kinds) <= set(HARM_CATEGORIES), name
        assert len(set(kinds)) == len(kinds), name
        assert bool(kinds) == (name != "NA"), name


def test_a_category_is_found_whatever_its_case_and_spaces():
    assert category(" privacy   VIOLATION\n") == "Privacy Violation"
    assert [category(name.upper()) for name in HARM_CATEGORIES] == list(HARM_CATEGORIES)


def test_an_unknown_category_is_one_line_with_the_nearest():
    with pytest.raises(
        UserError, match=r"category: expected one of .*, got 'hate speach' \(did you mean 'Hate Speech'"
    ) as e:
        category("hate speach")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"got 'xyzzy'$"):
        category("xyzzy")


def test_translated_names_come_once_in_the_order_of_the_categories_without_unknown_ones():
    assert translated(["S10", "S9", "S11", "S99"], LLAMA_GUARD) == ("Violence and Physical Harm", "Hate Speech", "Bias")
    assert translated(["NA"], LLAVA_GUARD) == ()


def test_a_mention_counts_wherever_it_stands_and_no_name_holds_another():
    assert mentioned("no Fraud, but Hate Speech of a sort; abuse") == ("Hate Speech", "Fraud")
    assert [mentioned(name) for name in HARM_CATEGORIES] == [(name,) for name in HARM_CATEGORIES]
