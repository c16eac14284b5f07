from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2_headadapt.adapt.classes import ClassTable, did_you_mean, nearest, normalise, shorten
from d2_headadapt.adapt.matching import match_classes, parse_aliases
from d2_headadapt.errors import ClassTableError, HeadAdaptError

NAMES = ("person", "car", "traffic light", "dog", "cat")
WORDS = st.lists(st.text(alphabet="abcdefghij", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@pytest.mark.parametrize(
    "written",
    ["traffic light", "Traffic Light", "traffic-light", "TRAFFIC_LIGHT", " traffic   light ", "traffic_-light"],
)
def test_normalise_folds_case_and_separators(written: str) -> None:
    assert normalise(written) == "traffic light"


def test_normalise_folds_case_beyond_ascii() -> None:
    assert normalise("STRASSE") == normalise("straße")


def test_normalise_keeps_what_distinguishes_classes() -> None:
    names = ["car", "cars", "car_(automobile)", "trafficlight", "traffic light", "Monitor/TV", "Monitor TV"]
    assert len({normalise(name) for name in names}) == len(names)


# --- tables


def test_table_keeps_names_in_order() -> None:
    table = ClassTable(NAMES, origin="my_train")
    assert table.names == NAMES
    assert len(table) == 5
    assert [table.index[name] for name in NAMES] == [0, 1, 2, 3, 4]
    assert repr(table) == "ClassTable(5 classes of my_train: person, car, traffic light, dog, cat)"


def test_table_takes_an_iterator_once() -> None:
    assert ClassTable(iter(NAMES)).names == NAMES


def test_tables_are_equal_by_names_in_order_whatever_their_origin() -> None:
    assert ClassTable(NAMES, origin="a") == ClassTable(list(NAMES), origin="b")
    assert hash(ClassTable(NAMES, origin="a")) == hash(ClassTable(NAMES, origin="b"))
    assert ClassTable(NAMES) != ClassTable(NAMES[::-1])


def test_table_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ClassTable(NAMES).names = ("other",)  # type: ignore[misc]


def test_table_survives_pickling() -> None:
    table = pickle.loads(pickle.dumps(ClassTable(NAMES, origin="my_train")))
    assert table == ClassTable(NAMES)
    assert table.origin == "my_train"


def test_find_is_exact_then_normalised() -> None:
    table = ClassTable(NAMES)
    assert table.find("dog") == 3
    assert table.find("Traffic_Light") == 2
    assert table.find("trafficlight") is None
    assert table.find("lorry") is None


def test_table_of_no_names_is_refused() -> None:
    with pytest.raises(ClassTableError, match=r"my_train: expected at least one class name, found none\."):
        ClassTable([], origin="my_train")


def test_table_of_one_string_is_refused_because_its_letters_are_not_classes() -> None:
    with pytest.raises(ClassTableError, match=r"expected a list of names, found 'cat'.*write \['cat'\]"):
        ClassTable("cat")


@pytest.mark.parametrize(
    ("bad", "kind"), [(None, "NoneType"), (1.5, "float"), (b"dog", "bytes"), (True, "bool"), (["dog"], "list")]
)
def test_name_that_is_no_string_is_refused_with_the_quotes_to_type(bad: object, kind: str) -> None:
    with pytest.raises(
        ClassTableError, match=rf"my_train, class 1: expected a string, found .*\({kind}\)\. Put it in quotes: '"
    ):
        ClassTable(["cat", bad], origin="my_train")  # type: ignore[list-item]


def test_whole_numbers_are_names() -> None:
    table = ClassTable([0, 7, np.int64(10)])  # type: ignore[list-item]
    assert table.names == ("0", "7", "10")
    with pytest.raises(ClassTableError, match="a list: expected different names, found '7' twice"):
        ClassTable([7, "7"])  # type: ignore[list-item]


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_blank_name_is_refused(blank: str) -> None:
    with pytest.raises(ClassTableError, match=r"class 1: expected a name"):
        ClassTable(["cat", blank])


DISTINCT = [["A", "a"], ["-", "--", "x-", "x"], ["+", "-", "*", "/", "=", "0", "1"], ["Tv", "tv", "t-v", "TV"],
            ["caf\u00e9", "cafe\u0301"], ["cat", "ca\u200bt"], ["\ufb01sh", "fish"], ["_", " -"]]  # fmt: skip


@pytest.mark.parametrize("names", DISTINCT)
def test_names_need_only_differ(names: list[str]) -> None:
    table = ClassTable(names)
    assert [table.find(name) for name in names] == list(range(len(names)))
    assert match_classes(table, table).is_same
    shuffled = ClassTable(names[::-1])
    assert match_classes(shuffled, table).rows == tuple(range(len(names)))[::-1]


@pytest.mark.parametrize("names", [n for n in DISTINCT if "0" not in n and "-" not in n])
def test_what_one_table_tells_apart_is_matched_by_exact_name_only(names: list[str]) -> None:
    two, one = ClassTable([*names, "dog"]), ClassTable([names[0], "Dog"])
    assert match_classes(two, one).rows[:2] == (0, None) and match_classes(two, one).rows[-1] == 1
    other = ClassTable([f" {names[0]}", "DOG"])
    assert match_classes(other, two).rows == (None, len(names)), "nobody knows which of the two"
    assert match_classes(two, other).rows == (*[None] * len(names), 1)
    assert match_classes(two, ClassTable(["tv", "x"]), reviewed=[(name, "x") for name in names]).rows[-1] is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01sh", "fish"),
        ("\uff34\uff36", "tv"),
        ("cat\u200b", "cat"),
        ("\u202ecat", "cat"),
        ("\ufeffcat", "CAT"),
        ("ice\u00a0cream", "ice cream"),
        ("\u1e9e", "ss"),
    ],
)
def test_compatible_spellings_match_as_case_does(one: str, other: str) -> None:
    assert match_classes(ClassTable([one, "x"]), ClassTable(["y", other])).rows == (1, None)
    assert match_classes(ClassTable([other, "x"]), ClassTable(["y", one])).rows == (1, None)


@given(st.text(max_size=8))
def test_normalising_twice_is_normalising_once(name: str) -> None:
    assert normalise(normalise(name)) == normalise(name)


def test_name_given_twice_is_refused_saying_twice() -> None:
    with pytest.raises(ClassTableError, match=r"expected different names, found 'dog' twice\. Rename or remove"):
        ClassTable(["dog", "cat", "dog"])


# --- hints


def test_nearest_forgives_case_and_spelling() -> None:
    assert nearest("Trafic_Light", NAMES)[0] == "traffic light"
    assert nearest("zzz", NAMES) == []
    assert did_you_mean("dgo", NAMES) == " Nearest: 'dog'."
    assert did_you_mean("zzz", NAMES) == ""


def test_shorten_says_how_many_more() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(i) for i in range(9)]) == "0, 1, 2, 3, 4, 5, ... (3 more)"


# --- maps


def test_map_of_a_table_onto_itself_is_the_identity() -> None:
    mapping = match_classes(ClassTable(NAMES), ClassTable(NAMES))
    assert mapping.is_identity
    assert mapping.rows == (0, 1, 2, 3, 4)
    assert mapping.new == mapping.dropped == mapping.shared == ()


def test_target_rows_point_into_the_source_and_not_the_other_way() -> None:
    # No permutation of order two, so that the inverse map is another one.
    mapping = match_classes(ClassTable(["dog", "person", "unicorn"]), ClassTable(["person", "car", "dog", "cat"]))
    assert mapping.rows == (2, 0, None)
    assert mapping.carried == ((0, 2), (1, 0))
    assert mapping.new == (2,)
    assert mapping.dropped == (1, 3)
    assert not mapping.is_identity


def test_prefix_of_the_source_is_not_the_identity() -> None:
    mapping = match_classes(ClassTable(NAMES[:3]), ClassTable(NAMES))
    assert mapping.rows == (0, 1, 2)
    assert not mapping.is_identity


def test_same_count_of_other_names_carries_nothing() -> None:
    mapping = match_classes(ClassTable(["a", "b"]), ClassTable(["c", "d"]))
    assert mapping.rows == (None, None)
    assert mapping.dropped == (0, 1)


@given(WORDS.flatmap(lambda names: st.tuples(st.just(names), st.permutations(names))))
def test_permutation_there_and_back_is_the_identity(names_and_permutation: tuple[list[str], list[str]]) -> None:
    names, permuted = names_and_permutation
    there = match_classes(ClassTable(permuted), ClassTable(names))
    back = match_classes(ClassTable(names), ClassTable(permuted))
    assert None not in there.rows
    assert [there.rows[s] for s in back.rows if s is not None] == list(range(len(names)))
    assert [names[s] for s in there.rows if s is not None] == permuted


@given(WORDS, WORDS)
def test_every_class_is_carried_or_new_and_every_source_used_or_dropped(target: list[str], source: list[str]) -> None:
    mapping = match_classes(ClassTable(target), ClassTable(source))
    assert sorted([t for t, _ in mapping.carried] + list(mapping.new)) == list(range(len(target)))
    assert sorted({s for _, s in mapping.carried} | set(mapping.dropped)) == list(range(len(source)))
    assert all(target[t] == source[s] for t, s in mapping.carried)
    assert {target[t] for t in mapping.new}.isdisjoint(source)


def test_exact_name_wins_over_a_reviewed_pair_and_a_synonym() -> None:
    source = ClassTable(["sofa", "couch"])
    mapping = match_classes(
        ClassTable(["couch", "sofa"]),
        source,
        reviewed=[("sofa", "couch")],
        source_synonyms={"sofa": ["couch"]},
        target_synonyms={"sofa": ["couch"]},
    )
    assert mapping.rows == (1, 0)


def test_reviewed_pair_works_in_both_directions_and_in_any_spelling() -> None:
    pairs = [("tv", "Monitor/TV"), ("aeroplane", "airplane")]
    assert match_classes(ClassTable(["TV"]), ClassTable(["cat", "monitor/tv"]), reviewed=pairs).rows == (1,)
    assert match_classes(ClassTable(["Monitor/TV"]), ClassTable(["cat", "tv"]), reviewed=pairs).rows == (1,)
    assert match_classes(ClassTable(["Airplane"]), ClassTable(["cat", "aeroplane"]), reviewed=pairs).rows == (1,)


def test_reviewed_pair_wins_over_a_synonym() -> None:
    mapping = match_classes(
        ClassTable(["mouse"]),
        ClassTable(["rodent", "computer_mouse"]),
        reviewed=[("mouse", "computer_mouse")],
        source_synonyms={"rodent": ["mouse"]},
    )
    assert mapping.rows == (1,)


def test_pairs_are_not_chained() -> None:
    pairs = [("a", "b"), ("b", "c")]
    assert match_classes(ClassTable(["a"]), ClassTable(["c"]), reviewed=pairs).rows == (None,)


def test_two_source_classes_paired_with_one_target_are_refused_naming_both() -> None:
    with pytest.raises(ClassTableError, match=r"'tv' and 'monitor' in old") as error:
        match_classes(
            ClassTable(["tvmonitor"], origin="new"),
            ClassTable(["tv", "cat", "monitor"], origin="old"),
            reviewed=[("tvmonitor", "monitor"), ("tvmonitor", "tv")],
        )
    assert error.value.where == "class 'tvmonitor' of new"
    assert "MODEL.HEAD_ADAPT.ALIASES \"['tvmonitor=tv']\"" in error.value.fix


def test_source_synonym_finds_its_class() -> None:
    mapping = match_classes(
        ClassTable(["Doughnut", "cat"]), ClassTable(["cat", "donut"]), source_synonyms={"donut": ["donut", "doughnut"]}
    )
    assert mapping.rows == (1, 0)


def test_target_synonym_finds_the_source_class() -> None:
    mapping = match_classes(
        ClassTable(["television_set"]), ClassTable(["cat", "tv"]), target_synonyms={"television_set": ["tv", "tv_set"]}
    )
    assert mapping.rows == (1,)


def test_synonym_of_two_source_classes_is_refused_naming_both() -> None:
    synonyms = {"bracelet": ["bangle", "wristband"], "sweatband": ["wristband"]}
    source = ClassTable(["bracelet", "cat", "sweatband"], origin="old")
    with pytest.raises(ClassTableError, match=r"synonym of 'bracelet' and of 'sweatband' in old") as error:
        match_classes(ClassTable(["Wristband"], origin="new"), source, source_synonyms=synonyms)
    assert error.value.where == "class 'Wristband' of new"
    assert "['Wristband=bracelet']" in error.value.fix
    assert error.value.exit_code == 1


def test_ambiguous_synonym_that_nobody_needs_is_no_error() -> None:
    synonyms = {"bracelet": ["wristband"], "sweatband": ["wristband"]}
    mapping = match_classes(ClassTable(["bracelet"]), ClassTable(["bracelet", "sweatband"]), source_synonyms=synonyms)
    assert mapping.rows == (0,)


def test_alias_settles_an_ambiguous_synonym() -> None:
    mapping = match_classes(
        ClassTable(["wristband"]),
        ClassTable(["bracelet", "sweatband"]),
        aliases=["wristband=sweatband"],
        source_synonyms={"bracelet": ["wristband"], "sweatband": ["wristband"]},
    )
    assert mapping.rows == (1,)


def test_target_whose_synonyms_are_two_source_classes_is_refused_naming_both() -> None:
    with pytest.raises(
        ClassTableError, match=r"expected one source class with another name of it, found 'man' and 'woman'"
    ):
        match_classes(
            ClassTable(["person"]), ClassTable(["man", "woman"]), target_synonyms={"person": ["woman", "man", "child"]}
        )


def test_synonym_written_twice_for_one_class_is_not_ambiguous() -> None:
    mapping = match_classes(
        ClassTable(["smart phone"]), ClassTable(["phone"]), source_synonyms={"phone": ["smart_phone", "Smart-Phone"]}
    )
    assert mapping.rows == (0,)


def test_one_source_may_feed_several_targets() -> None:
    mapping = match_classes(
        ClassTable(["truck", "lorry", "van", "cat"]), ClassTable(["cat", "truck"]), aliases=["lorry=truck", "van=truck"]
    )
    assert mapping.rows == (1, 1, 1, 0)
    assert mapping.shared == (1,)
    assert mapping.dropped == ()


# --- aliases


def test_alias_wins_over_the_same_name() -> None:
    mapping = match_classes(ClassTable(["cat", "dog"]), ClassTable(["cat", "dog"]), aliases=["cat=dog"])
    assert mapping.rows == (1, 1)


def test_alias_is_target_on_the_left() -> None:
    target, source = ClassTable(["a", "b"]), ClassTable(["b", "c", "a"])
    assert parse_aliases(["a=b"], target, source) == {0: 0}
    assert parse_aliases([" B = C "], target, source) == {1: 1}


@pytest.mark.parametrize("alias", ["lorry", "=truck", "lorry=", "", " = "])
def test_alias_without_two_sides_is_refused(alias: str) -> None:
    with pytest.raises(ClassTableError, match=r"expected 'target=source'.*Write it like 'lorry=truck'"):
        match_classes(ClassTable(["lorry"]), ClassTable(["truck"]), aliases=[alias])


@pytest.mark.parametrize(
    ("alias", "expected"),
    [("a=b=cat", {0: 0}), ("dog=x=y", {1: 1}), ("a=b=x=y", {0: 1}), ("dog=cat", {1: 0}), ("A=B = cat", {0: 0})],
)
def test_names_with_an_equals_sign_can_be_aliased(alias: str, expected: dict[int, int]) -> None:
    assert parse_aliases([alias], ClassTable(["a=b", "dog"]), ClassTable(["cat", "x=y"])) == expected


def test_an_alias_that_can_be_parted_in_two_ways_is_refused_with_both() -> None:
    with pytest.raises(ClassTableError) as caught:
        parse_aliases(["a=b=c"], ClassTable(["a", "a=b"]), ClassTable(["c", "b=c"]))
    assert str(caught.value) == (
        "MODEL.HEAD_ADAPT.ALIASES, 'a=b=c': expected one way to part it at '=', found 'a' from 'b=c' and 'a=b' from "
        "'c'. Rename one of these classes."
    )


def test_alias_to_an_unknown_class_names_its_side_and_the_nearest() -> None:
    target, source = ClassTable(["lorry"], origin="new"), ClassTable(["truck", "car"], origin="old")
    with pytest.raises(
        ClassTableError,
        match=r"'lorry=truk': expected a class of the source table \(2 classes of old\).*Nearest: 'truck'",
    ):
        match_classes(target, source, aliases=["lorry=truk"])
    with pytest.raises(ClassTableError, match=r"'lory=truck': expected a class of the target table.*Nearest: 'lorry'"):
        match_classes(target, source, aliases=["lory=truck"])


def test_two_aliases_for_one_target_are_refused_naming_both_sources() -> None:
    target, source = ClassTable(["lorry"]), ClassTable(["truck", "bus"])
    with pytest.raises(ClassTableError, match=r"expected one source class for 'lorry', found 'truck' and 'bus'"):
        match_classes(target, source, aliases=["lorry=truck", "lorry=bus"])
    assert match_classes(target, source, aliases=["lorry=bus", "Lorry=bus"]).rows == (1,)


# --- position


def test_position_ignores_names() -> None:
    two, three = ClassTable(["a", "b"]), ClassTable(["x", "b", "a"])
    assert match_classes(two, three, match="position").rows == (0, 1)
    assert match_classes(three, two, match="position").rows == (0, 1, None)


def test_position_with_aliases_is_refused() -> None:
    with pytest.raises(ClassTableError, match=r"ALIASES: expected no aliases, because MATCH is 'position'"):
        match_classes(ClassTable(["a"]), ClassTable(["a"]), match="position", aliases=["a=a"])


def test_unknown_match_rule_is_refused() -> None:
    with pytest.raises(ClassTableError, match=r"MODEL.HEAD_ADAPT.MATCH: expected 'name' or 'position', found 'index'"):
        match_classes(ClassTable(["a"]), ClassTable(["a"]), match="index")


def test_twenty_thousand_names_are_mapped() -> None:
    # A rule that compares every name with every other needs hours here, so this ends only with look-ups.
    names = [f"class {i}" for i in range(20_000)]
    reverse = [f"Class_{i}" for i in reversed(range(20_000))]
    synonyms = {name: [f"{name} too", f"{name} as well"] for name in names}
    mapping = match_classes(ClassTable(reverse), ClassTable(names), source_synonyms=synonyms)
    assert mapping.rows == tuple(reversed(range(20_000)))
    renamed = ClassTable([f"{name} too" for name in names])
    assert match_classes(renamed, ClassTable(names), source_synonyms=synonyms).rows == tuple(range(20_000))


def test_errors_of_this_module_are_of_the_one_family() -> None:
    assert issubclass(ClassTableError, HeadAdaptError)
    assert issubclass(ClassTableError, ValueError)
