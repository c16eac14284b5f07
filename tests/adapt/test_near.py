"""New classes beside dropped ones: typing errors, plurals and other words are suggested; words of their own are not."""

from __future__ import annotations

import shlex

import pytest
from detectron2.config import get_cfg

from d2_headadapt.adapt.classes import ClassMap, ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.near import MOST_PAIRS, Likeness, is_typing_error, near_names
from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.report import plan_notices
from d2_headadapt.adapt.vocabularies import vocabulary
from d2_headadapt.config.keys import add_headadapt_config


def near(target: list[str], source: list[str] | ClassTable) -> list[tuple[str, str, str]]:
    table = source if isinstance(source, ClassTable) else ClassTable(source)
    found = ClassMap(table, ClassTable(target), (None,) * len(target))
    return [(one.target, one.source, one.likeness.value) for one in near_names(found)]


@pytest.mark.parametrize(
    ("new", "dropped", "likeness"),
    [
        ("persn", "person", Likeness.SPELLING),
        ("perzon", "person", Likeness.SPELLING),
        ("chiar", "chair", Likeness.SPELLING),
        ("bycicle", "bicycle", Likeness.SPELLING),
        ("refridgerator", "refrigerator", Likeness.SPELLING),
        ("Trafficlight", "traffic light", Likeness.SPELLING),
        ("traffic lihgt", "traffic light", Likeness.SPELLING),
        ("chairs", "chair", Likeness.PLURAL),
        ("buses", "bus", Likeness.PLURAL),
        ("knives", "knife", Likeness.PLURAL),
        ("ski", "skis", Likeness.PLURAL),
        ("hound", "dog", Likeness.MEANING),
        ("puppies", "dog", Likeness.MEANING),
        ("people", "person", Likeness.MEANING),
        ("doughnut", "donut", Likeness.MEANING),
        ("Monitor/TV", "tv", Likeness.MEANING),
    ],
)
def test_what_probably_means_a_class_of_coco_is_suggested(new: str, dropped: str, likeness: Likeness) -> None:
    assert near([new, "gnu"], vocabulary("coco")) == [(new, dropped, likeness.value)]


@pytest.mark.parametrize(
    "new", ["goat", "house", "cab bage", "gnu", "raccoon", "pear", "beard", "shooter", "sneeze", "card", "7", "class 3"]
)
def test_a_word_of_its_own_is_no_suggestion(new: str) -> None:
    assert near([new], vocabulary("coco")) == []


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("type a", "type b"),
        ("model 1", "model 2"),
        ("a3000", "a3001"),
        ("x", "y"),
        ("cat", "car"),
        ("grade-i", "grade-ii"),
    ],
)
def test_numbers_letters_and_short_words_are_never_typing_errors(a: str, b: str) -> None:
    assert not is_typing_error(a, b) and near([a], [b]) == []


def test_words_of_one_class_are_not_each_others() -> None:
    """People call both a bus."""
    assert near(["coach"], ["minibus"]) == [] and near(["coach"], ["bus"]) == [("coach", "bus", "meaning")]


def plan_of(target: list[str], source: list[str], rows: str = "name") -> AdaptPlan:
    return plan_adaptation(
        {"head.weight": (len(source) + 1, 4)},
        {"head.weight": (len(target) + 1, 4)},
        [HeadLayout("head.weight", "thing", "head", extra=1)],
        source_tables={"thing": ClassTable(source)},
        target_tables={"thing": ClassTable(target)},
        match=rows,
    )


def test_the_notice_is_a_line_that_works_when_typed() -> None:
    """Whatever the names hold: the line goes through a shell and into a config, and then nothing is left to say."""
    source, target = (
        ["person", "chair", "dog", "driver's cab"],
        ["persn", "chairs", "hound", "drivers cab", "driver's cabs"],
    )
    (notice,) = plan_notices(plan_of(target, source))
    assert notice.code == "near"
    assert notice.where == "4 new thing classes have names near to dropped ones"
    assert notice.found.startswith(
        "'persn' and 'person' (spelling), 'chairs' and 'chair' (plural), 'hound' and 'dog' (mean"
    )
    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.merge_from_list(shlex.split(notice.type_this))
    aliases = list(cfg.MODEL.HEAD_ADAPT.ALIASES)
    assert aliases[:3] == ["persn=person", "chairs=chair", "hound=dog"]
    made = plan_adaptation(
        {"head.weight": (5, 4)},
        {"head.weight": (len(target) + 1, 4)},
        [HeadLayout("head.weight", "thing", "head", extra=1)],
        source_tables={"thing": ClassTable(source)},
        target_tables={"thing": ClassTable(target)},
        aliases=aliases,
    )
    assert plan_notices(made) == () and len(made.class_map("thing").carried) == 4


def test_by_position_and_for_carried_classes_nothing_is_suggested() -> None:
    assert plan_notices(plan_of(["persn"], ["person"], rows="position")) == ()
    assert plan_notices(plan_of(["person", "persons"], ["person"])) == ()


def test_only_names_that_can_be_typing_errors_of_each_other_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of a thousand classes is not held up by a million comparisons."""
    compared: list[tuple[str, str]] = []
    monkeypatch.setattr("d2_headadapt.adapt.near.is_typing_error", lambda *pair: bool(compared.append(pair)))
    letters = "abcdefghijklmnopqrstuvwxyz"
    old = [f"{a}{b}xyzzy {b}{c}" for a in letters for b in letters for c in "qv"]
    new = [f"{a}{b}plugh {b}{c}" for a in letters for b in letters for c in "wz"]
    assert near(new, old) == [] and len(old) * len(new) > 1_000_000
    assert compared == []
    assert near([f"{old[7]}x"], old) == [] and 0 < len(compared) < 10


def test_of_millions_of_pairs_none_is_suggested() -> None:
    names = [f"thing number {i}" for i in range(MOST_PAIRS // 1000 + 1)]
    assert near([f"{name}s" for name in names[:1000]], names) == []
    assert len(near([f"{name}s" for name in names[:1000]], names[:1000])) == 1000
