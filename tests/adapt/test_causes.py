"""A plan's decisions are values: each cause has one sentence, each plan survives its JSON, no code reads sentences."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_layouts import KINDS

import d2_headadapt
from d2_headadapt import AdaptPlan, Cause, ClassTable, HeadLayout, TensorPlan, Why, plan_adaptation
from d2_headadapt.adapt.causes import SENTENCES, sentence
from d2_headadapt.adapt.report import plan_notices, plan_table, summary_line
from d2_headadapt.errors import PlanRefused

SHAPES: dict[str, Any] = {"source_shape": (4, 8), "target_shape": (3, 8)}
SOURCE = "MODEL.HEAD_ADAPT.SOURCE_CLASSES"
RENDERED = [
    (Why(Cause.SAME_SHAPE), ""),
    (Why(Cause.IDENTICAL), "same classes, same order"),
    (Why(Cause.MATCHED), ""),
    (Why(Cause.MATCHED_AND_NEAREST, count=1, length=2), "1 of 2 new rows start from the nearest carried classes"),
    (Why(Cause.MATCHED_AND_TEXT, count=2), "2 classes keep the embeddings of the text file"),
    (Why(Cause.AGNOSTIC), "serves all classes alike"),
    (
        Why(Cause.SHAPES_AGREE, key=SOURCE, side="file"),
        f"unverified: shapes agree, but the classes are unknown; {SOURCE} verifies it",
    ),
    (
        Why(Cause.MAYBE_CLASSES, count=3),
        "unverified: 3 rows may be classes, and no layout says so; see register_head_layout",
    ),
    (Why(Cause.REBUILT), "rebuilt from the dataset, never taken from a file"),
    (Why(Cause.GIVEN_BY_TEXT), "the embeddings that the config names stay"),
    (Why(Cause.NO_CLASS_BUT_TEXT), "no class is in the file; all keep their embeddings"),
    (Why(Cause.EXCLUDED, key="MODEL.HEAD_ADAPT.EXCLUDE"), "MODEL.HEAD_ADAPT.EXCLUDE names it"),
    (Why(Cause.NOT_INCLUDED, key="MODEL.HEAD_ADAPT.INCLUDE"), "MODEL.HEAD_ADAPT.INCLUDE does not name it"),
    (Why(Cause.FORCED_NONE, key=SOURCE), f"{SOURCE} is 'none'"),
    (Why(Cause.UNKNOWN_AFRESH, key=SOURCE), f"{SOURCE} lets it start afresh"),
    (
        Why(Cause.UNKNOWN_KEPT, key=SOURCE),
        f"unverified: its rows stay where they lie, though the classes differ, as {SOURCE} says",
    ),
    (
        Why(Cause.UNKNOWN_HEAD, text="two meanings", **SHAPES),
        "its size follows the classes: (4, 8) in the file, (3, 8) in the model; the lists differ and no layout moves "
        "its rows (two meanings)",
    ),
    (Why(Cause.NOT_IN_FILE), "not in the file"),
    (Why(Cause.PART_MISSING), "missing from the file, which has other tensors of this head"),
    (Why(Cause.NO_CLASS_IN_FILE), "no class of the model is in the file"),
    (
        Why(Cause.OTHER_KIND, source_kind="class-agnostic", target_kind="4 rows per class"),
        "class-agnostic in the file, 4 rows per class in the model",
    ),
    (Why(Cause.OTHER_SHAPE, **SHAPES), "(4, 8) in the file, (3, 8) in the model"),
    (Why(Cause.OTHER_ANCHORS, **SHAPES), "(4, 8) in the file, (3, 8) in the model: another number of anchors"),
    (
        Why(Cause.AGNOSTIC_IN_MODEL, **SHAPES),
        "(4, 8) in the file, (3, 8) in the model: class-specific in the file, class-agnostic in the model",
    ),
    (
        Why(Cause.AGNOSTIC_IN_FILE, target_kind="4 rows per class", **SHAPES),
        "class-agnostic in the file (4, 8), 4 rows per class in the model (3, 8)",
    ),
    (
        Why(Cause.UNKNOWN_CLASSES, key=SOURCE, side="file", **SHAPES),
        f"(4, 8) in the file, (3, 8) in the model; the classes of the file are unknown: set {SOURCE}",
    ),
    (
        Why(Cause.NO_LAYOUT, **SHAPES),
        "(4, 8) in the file, (3, 8) in the model, and no layout says that its rows are classes",
    ),
    (
        Why(Cause.MODEL_MISFIT, target_kind="1 row per class", table="a.txt", length=9, **SHAPES),
        "the model's (3, 8) does not hold the 9 classes of a.txt (1 row per class): set NUM_CLASSES to the table's "
        "length",
    ),
    (
        Why(Cause.TABLE_MISFIT, key=SOURCE, target_kind="1 row per class", table="a.txt", length=9, count=4, **SHAPES),
        f"(4, 8) in the file holds 4 classes (1 row per class), but a.txt names 9: correct {SOURCE}",
    ),
    (
        Why(Cause.TABLE_MISFIT, key=SOURCE, target_kind="4 rows per class", table="a.txt", length=9, **SHAPES),
        f"(4, 8) in the file holds no whole number of classes (4 rows per class), but a.txt names 9: correct {SOURCE}",
    ),
    (Why(Cause.GROUP_REFUSED, blame="h.box"), "its head group is refused at h.box"),
    (Why(Cause.NOT_IN_MODEL), "the model has no tensor of this name"),
    (Why(Cause.SEVERAL_PLACES, count=4, names=("a", "b", "c")), "fits 4 places in the model: a, b, c"),
    (Why(Cause.UNSTATED, text="{as it was} written"), "{as it was} written"),
]
CAUSES = [why for why, _ in RENDERED]


@pytest.mark.parametrize(("why", "words"), RENDERED, ids=lambda value: getattr(value, "cause", ""))
def test_a_cause_is_one_sentence(why: Why, words: str) -> None:
    assert sentence(why) == words == TensorPlan("t", "kept", why=why).reason
    if why.cause is not Cause.GROUP_REFUSED:
        blamed = sentence(replace(why, blame="h.cls"))
        assert blamed in (words, f"its head group changes whole or not at all; h.cls: {words}")


def test_every_cause_is_in_the_table() -> None:
    assert {why.cause for why in CAUSES} == set(Cause) == set(SENTENCES)


@pytest.mark.parametrize("why", [*CAUSES, *(replace(why, blame="h.cls") for why in CAUSES)], ids=lambda w: w.cause)
def test_cause_and_facts_come_back_from_json(why: Why) -> None:
    one = TensorPlan("t", "kept", why=why)
    data = json.loads(json.dumps(one.to_json()))
    assert TensorPlan.from_json(data) == one and data["reason"] == one.reason and data["cause"] == why.cause.value
    # What says nothing is not written.
    assert set(data["facts"]) == {
        f.name for f in fields(Why) if f.name != "cause" and getattr(why, f.name) != f.default
    }


def test_a_plan_without_causes_keeps_its_words() -> None:
    """As written before plans had causes; and a cause of a version to come is one that nobody here can act on."""
    old = {"name": "t", "action": "kept", "reason": "rebuilt from the dataset, never taken from a file"}
    for data in (old, {**old, "cause": "moved_by_magic", "facts": {"spell": 3}}):
        found = TensorPlan.from_json(data)
        assert (found.cause, found.reason) == (Cause.UNSTATED, old["reason"])
        assert TensorPlan.from_json(found.to_json()) == found


def box_plan(**more: Any) -> AdaptPlan:
    layouts = [HeadLayout("h.cls", "thing", "h", "box", extra=1), HeadLayout("h.mask", "thing", "h", "mask")]
    tables = {
        "source_tables": {"thing": ClassTable(["cat", "dog", "cow"], "old.txt")},
        "target_tables": {"thing": ClassTable(["cow", "owl"], "new.txt")},
    }
    file = {"h.cls": (4, 8), "h.mask": (3, 8), "stem": (2,)}
    model = {"h.cls": (3, 8), "h.mask": (2, 8), "stem": (2,)}
    return plan_adaptation(file, model, layouts, **{**tables, **more})


def test_the_json_of_before_is_still_read() -> None:
    """Without causes, facts, maps and origins, and layouts of six keys."""
    plan = box_plan()
    old = json.loads(json.dumps(plan.to_json()))
    for key in ("maps", "origins"):
        del old[key]
    for t in old["tensors"]:
        del t["cause"], t["facts"]
    for layout in old["layouts"]:
        for key in ("rebuilt", "by_choice", "given"):
            del layout[key]
    found = AdaptPlan.from_json(old)
    assert found.maps == plan.maps and found.layouts == plan.layouts
    assert [t.reason for t in found.tensors] == [t.reason for t in plan.tensors]
    assert found.summary() == plan.summary()


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": [{"name": "t", "action": "kept", "cause": "other_shape", "facts": {"source_shape": "x"}}]},
        {"tensors": [{"name": "t", "action": "kept", "cause": "other_shape", "facts": {"source_shape": 3}}]},
        {"tensors": [{"name": "t", "action": "kept", "cause": "other_shape", "facts": 3}]},
        {"maps": {"thing": 3}},
        {"maps": {"thing": [0]}},
        {"maps": {"thing": [0, 3]}},
        {"maps": {"thing": [0, -1]}},
        {"maps": {"nothing": [0]}},
        {"maps": [0]},
        {"origins": [0]},
        {"tensors": [3]},
    ],
)
def test_a_damaged_plan_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(PlanRefused, match="expected the JSON that `d2-headadapt plan --json` writes") as caught:
        AdaptPlan.from_json({**box_plan().to_json(), **damage})
    assert caught.value.exit_code == 1


@st.composite
def plans(draw: st.DrawFn) -> AdaptPlan:
    """Random tables, kinds of heads, files that lack some of it, and what a user may ask for."""
    names = [f"class {i}" for i in range(6)]
    sizes = st.integers(1, 4)
    source = ClassTable(draw(st.permutations(names))[: draw(sizes)], "the old list")
    target = ClassTable(draw(st.permutations(names))[: draw(sizes)], "the new list")
    layouts, in_file, in_model = [], {"stem": (2, 3)}, {"stem": draw(st.sampled_from([(2, 3), (2, 4)]))}
    for i, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))):
        options = [{}, {"rebuilt": True}, {"given": "file"}, {"given": "checkpoint"}, {"axes": (), "by_choice": True}]
        made = replace(
            kind,
            tensor=f"h{i}",
            space="thing",
            group=draw(st.sampled_from("gh")),
            part=draw(st.sampled_from(["", "mask"])),
            **draw(st.sampled_from(options)),
        )
        layouts.append(made)
        for shapes, table in ((in_file, source), (in_model, target)):
            shapes[made.tensor] = tuple(
                made.size(axis, len(table)) if axis in made.class_axes else draw(st.sampled_from([3, 3, 3, 5]))
                for axis in range(2)
            )
    for name in draw(st.sets(st.sampled_from(sorted(in_file)), max_size=2)):
        del in_file[name]
    return plan_adaptation(
        in_file,
        in_model,
        layouts,
        source_tables=draw(st.sampled_from([{"thing": source}, {"thing": source}, {}])),
        target_tables=draw(st.sampled_from([{"thing": target}, {"thing": target}, {}])),
        match=draw(st.sampled_from(["name", "position"])),
        initialise=draw(st.sampled_from([(), (), ("thing",)])),
        dropped={"odd": Why(Cause.SEVERAL_PLACES, count=2, names=("a", "b"))} if draw(st.booleans()) else {},
        excluded={"h0": Why(Cause.EXCLUDED, key="MODEL.HEAD_ADAPT.EXCLUDE")} if draw(st.booleans()) else {},
    )


@given(plan=plans())
def test_a_plan_survives_its_json_whole(plan: AdaptPlan) -> None:
    again = AdaptPlan.from_json(json.dumps(plan.to_json()))
    assert again == plan and again.to_json() == plan.to_json()
    # Origins are no part of a table's equality, and people read them.
    for say in (summary_line, plan_table, plan_notices):
        assert say(again) == say(plan)


@given(plan=plans())
def test_every_tensor_has_a_cause_and_follows_its_spaces_map(plan: AdaptPlan) -> None:
    assert all(t.cause is not Cause.UNSTATED for t in plan.tensors)
    for t in plan.tensors:
        assert plan.tensor(t.name) is not None and plan.space_of(t.name) == (t.space or "")
        if t.action == "carried" and t.space is not None:
            assert t.carried == plan.maps[t.space].carried
    assert all(plan.layout(layout.tensor) == layout for layout in plan.layouts)
    assert plan.tensor("none") is None and plan.layout("none") is None


def test_where_every_head_of_a_space_starts_afresh_every_class_is_new() -> None:
    plan = box_plan(excluded=dict.fromkeys(["h.cls", "h.mask"], Why(Cause.EXCLUDED, key="MODEL.HEAD_ADAPT.EXCLUDE")))
    assert plan.maps["thing"].new == (0, 1) and plan.summary()["classes"]["thing"]["carried"] == 0
    assert box_plan().maps["thing"].carried == ((0, 2),)


@pytest.mark.parametrize(("target", "changes"), [(["cat", "dog"], False), (["dog", "cat"], True), (["cat"], True)])
def test_embeddings_of_the_same_classes_are_no_change(target: list[str], changes: bool) -> None:
    """A resume asks; with other classes the embeddings are others, though nothing of them is taken from the file."""
    layouts = [HeadLayout("e", "thing", "e", given="file"), HeadLayout("f", "thing", "f", rebuilt=True)]
    plan = plan_adaptation(
        {"e": (2, 5), "f": (3,)},
        {"e": (len(target), 5), "f": (3,)},
        layouts,
        source_tables={"thing": ClassTable(["cat", "dog"])},
        target_tables={"thing": ClassTable(target)},
    )
    assert {t.name: t.cause for t in plan.tensors} == {"e": Cause.GIVEN_BY_TEXT, "f": Cause.REBUILT}
    assert [t.name for t in plan.changed()] == ["e"] * changes and all(t.cause.meant for t in plan.tensors)


SPOKEN = ("reason", "expected", "found", "fix")
READS = ("startswith", "endswith", "removeprefix", "removesuffix", "partition", "split", "replace", "find", "index")


def reads_of_sentences(source: str) -> Iterator[int]:
    """Lines that compare, search or take apart what is rendered for people."""

    def spoken(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in SPOKEN

    for node in ast.walk(ast.parse(source)):
        compares = isinstance(node, ast.Compare) and any(map(spoken, (node.left, *node.comparators)))
        calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        takes = calls and node.func.attr in READS and spoken(node.func.value)
        searches = calls and getattr(node.func.value, "id", "") == "re" and any(map(spoken, node.args))
        if compares or takes or searches:
            yield node.lineno


def test_no_code_reads_sentences() -> None:
    package = Path(d2_headadapt.__file__).parent
    found = {path: list(reads_of_sentences(path.read_text(encoding="utf-8"))) for path in package.rglob("*.py")}
    assert {path.name: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "'rebuilt' not in t.reason",
        "t.reason == 'x'",
        "'fetched' in error.expected",
        "t.reason.startswith('MODEL.')",
        "re.search('x', t.reason)",
    ],
)
def test_a_line_that_reads_a_sentence_is_found(line: str) -> None:
    assert list(reads_of_sentences(line)) == [1]
