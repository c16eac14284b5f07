"""What the planner decides for a head group: from tables and layouts, never from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from d2_headadapt.adapt.causes import Cause, Why
from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import AdaptPlan, TensorPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.report import plan_notices
from d2_headadapt.errors import ClassTableError

CLS = HeadLayout("h.cls.weight", "thing", "h", "box", extra=1)
BOX = HeadLayout("h.box.weight", "thing", "h", "box", rows_per_class=4, by_choice=True)
AGNOSTIC = HeadLayout("h.box.weight", "thing", "h", "box", axes=(), rows_per_class=4, by_choice=True)
MASK = HeadLayout("h.mask.weight", "thing", "h", "mask", by_choice=True)
AGNOSTIC_MASK = HeadLayout("h.mask.weight", "thing", "h", "mask", axes=(), by_choice=True)
NAMES = [f"c{i}" for i in range(80)]


def table(*names: str) -> ClassTable:
    return ClassTable(names, "a test")


def make(
    file: dict[str, tuple[int, ...]],
    model: dict[str, tuple[int, ...]],
    layouts: list[HeadLayout],
    source: ClassTable | None,
    target: ClassTable | None,
    **kwargs: Any,
) -> AdaptPlan:
    return plan_adaptation(
        file,
        model,
        layouts,
        source_tables={"thing": source} if source else {},
        target_tables={"thing": target} if target else {},
        **kwargs,
    )


def by_name(plan: AdaptPlan) -> dict[str, TensorPlan]:
    return {t.name: t for t in plan.tensors}


def causes(plan: AdaptPlan) -> dict[str, Cause]:
    return {t.name: t.cause for t in plan.tensors}


def actions(plan: AdaptPlan) -> dict[str, str]:
    return {t.name: t.action for t in plan.tensors}


def test_unknown_classes_and_equal_shapes_are_copied_unverified() -> None:
    plan = make({CLS.tensor: (4, 8)}, {CLS.tensor: (4, 8)}, [CLS], None, table("a", "b", "c"))
    (t,) = plan.tensors
    assert (t.action, t.verified, t.cause) == ("copied", False, Cause.SHAPES_AGREE)
    assert (t.why.side, t.why.key) == ("file", "MODEL.HEAD_ADAPT.SOURCE_CLASSES")
    assert "MODEL.HEAD_ADAPT.SOURCE_CLASSES verifies it" in t.reason


def test_unknown_classes_and_one_other_shape_initialise_the_whole_group() -> None:
    file = {CLS.tensor: (81, 8), AGNOSTIC.tensor: (4, 8), MASK.tensor: (3, 8, 1, 1)}
    model = {CLS.tensor: (4, 8), AGNOSTIC.tensor: (4, 8), MASK.tensor: (3, 8, 1, 1)}
    plan = make(file, model, [CLS, AGNOSTIC, MASK], None, table("a", "b", "c"))
    assert set(actions(plan).values()) == {"initialised"}
    assert causes(plan) == dict.fromkeys(model, Cause.UNKNOWN_CLASSES)
    assert {t.name: t.why.blame for t in plan.tensors} == {
        CLS.tensor: "",
        AGNOSTIC.tensor: CLS.tensor,
        MASK.tensor: CLS.tensor,
    }
    assert "set MODEL.HEAD_ADAPT.SOURCE_CLASSES" in by_name(plan)[CLS.tensor].reason
    assert "its head group changes whole or not at all" in by_name(plan)[MASK.tensor].reason
    assert by_name(plan)[CLS.tensor].new == (0, 1, 2)


def test_same_count_other_classes_is_remapped_by_name() -> None:
    plan = make({CLS.tensor: (4, 8)}, {CLS.tensor: (4, 8)}, [CLS], table("a", "b", "c"), table("c", "x", "a"))
    assert plan.tensors[0].carried == ((0, 2), (2, 0)) and plan.tensors[0].action == "carried"


def test_identity_is_copied_and_verified() -> None:
    same = table("a", "b", "c")
    (t,) = make({CLS.tensor: (4, 8)}, {CLS.tensor: (4, 8)}, [CLS], same, same).tensors
    assert (t.action, t.verified, t.background) == ("copied", True, True)


def test_none_initialises_whatever_the_file_holds() -> None:
    same = table("a", "b", "c")
    plan = make({CLS.tensor: (4, 8)}, {CLS.tensor: (4, 8)}, [CLS], same, same, initialise=["thing"])
    assert actions(plan) == {CLS.tensor: "initialised"} and plan.new_classes() == {"thing": ("a", "b", "c")}
    assert plan.tensors[0].cause is Cause.FORCED_NONE
    assert plan.tensors[0].reason == "MODEL.HEAD_ADAPT.SOURCE_CLASSES is 'none'"


def test_a_part_that_the_file_lacks_leaves_the_other_parts_alone() -> None:
    """A box detector's file in a mask model: boxes are carried, the mask predictor is new."""
    plan = make(
        {CLS.tensor: (4, 8), BOX.tensor: (12, 8)},
        {CLS.tensor: (3, 8), BOX.tensor: (8, 8), MASK.tensor: (2, 8, 1, 1)},
        [CLS, BOX, MASK],
        table("a", "b", "c"),
        table("c", "a"),
    )
    assert actions(plan) == {CLS.tensor: "carried", BOX.tensor: "carried", MASK.tensor: "initialised"}


def test_a_part_that_the_file_has_half_of_initialises_the_whole_group() -> None:
    """Half of a cascade is worse than none of it."""
    stages = [replace(CLS, tensor=f"h.{i}.cls.weight") for i in range(3)]
    model = {x.tensor: (3, 8) for x in stages}
    file = {x.tensor: (4, 8) for x in stages[:2]}
    plan = make(file, model, stages, table("a", "b", "c"), table("c", "a"))
    assert set(actions(plan).values()) == {"initialised"}
    assert set(causes(plan).values()) == {Cause.PART_MISSING}
    assert by_name(plan)["h.2.cls.weight"].reason == "missing from the file, which has other tensors of this head"


def test_another_input_width_initialises_the_whole_group() -> None:
    plan = make(
        {CLS.tensor: (4, 16), BOX.tensor: (12, 8)}, {CLS.tensor: (3, 8), BOX.tensor: (8, 8)}, [CLS, BOX],
        table("a", "b", "c"), table("c", "a"),
    )  # fmt: skip
    assert set(actions(plan).values()) == {"initialised"}
    why = by_name(plan)[CLS.tensor].why
    assert (why.cause, why.source_shape, why.target_shape) == (Cause.OTHER_SHAPE, (4, 16), (3, 8))
    assert "(4, 16) in the file, (3, 8) in the model" in by_name(plan)[CLS.tensor].reason


def test_an_agnostic_regressor_is_copied_for_any_classes() -> None:
    plan = make(
        {CLS.tensor: (4, 8), AGNOSTIC.tensor: (4, 8)}, {CLS.tensor: (3, 8), AGNOSTIC.tensor: (4, 8)}, [CLS, AGNOSTIC],
        table("a", "b", "c"), table("c", "a"),
    )  # fmt: skip
    assert actions(plan) == {CLS.tensor: "carried", AGNOSTIC.tensor: "copied"}


def test_class_specific_in_the_file_and_agnostic_in_the_model_are_told_apart() -> None:
    plan = make(
        {CLS.tensor: (4, 8), AGNOSTIC.tensor: (12, 8)}, {CLS.tensor: (3, 8), AGNOSTIC.tensor: (4, 8)}, [CLS, AGNOSTIC],
        table("a", "b", "c"), table("c", "a"),
    )  # fmt: skip
    assert set(actions(plan).values()) == {"initialised"}
    assert set(causes(plan).values()) == {Cause.AGNOSTIC_IN_MODEL}
    assert "class-specific in the file, class-agnostic in the model" in by_name(plan)[AGNOSTIC.tensor].reason


ONE, TWO, OTHER, MANY = table("a"), table("c", "a"), table("b"), table("x", "a", "y")
SPECIFIC, SHARED = [(BOX, AGNOSTIC), (MASK, AGNOSTIC_MASK)], "copied"


@pytest.mark.parametrize(("specific", "agnostic"), SPECIFIC)
@pytest.mark.parametrize(
    ("file", "source", "model", "target", "expected"),
    [
        # One class in the model: the agnostic rows of any file are that class's, and that class's rows are agnostic.
        (SHARED, MANY, "class", ONE, "copied"),
        (SHARED, MANY, "class", OTHER, "copied"),
        (SHARED, MANY, SHARED, OTHER, "copied"),
        ("class", MANY, SHARED, ONE, "carried"),
        ("class", MANY, SHARED, OTHER, "initialised"),
        ("class", MANY, "class", ONE, "carried"),
        # One class in the file: its rows serve it alone or all alike.
        ("class", ONE, SHARED, TWO, "copied"),
        (SHARED, ONE, SHARED, TWO, "copied"),
        (SHARED, ONE, "class", TWO, "carried"),
        ("class", ONE, "class", TWO, "carried"),
        # One class on both sides.
        (SHARED, ONE, "class", ONE, "copied"),
        ("class", ONE, SHARED, ONE, "copied"),
        ("class", ONE, "class", OTHER, "initialised"),
        ("class", ONE, SHARED, OTHER, "copied"),
        (SHARED, ONE, SHARED, OTHER, "copied"),
        # Several on both sides mean two things.
        (SHARED, MANY, "class", TWO, Cause.AGNOSTIC_IN_FILE),
        ("class", MANY, SHARED, TWO, Cause.AGNOSTIC_IN_MODEL),
    ],
)
@pytest.mark.parametrize("says", [True, False], ids=["with layouts", "without layouts"])
def test_one_class_and_agnostic_mean_the_same_values(
    specific: HeadLayout,
    agnostic: HeadLayout,
    file: str,
    source: ClassTable,
    model: str,
    target: ClassTable,
    expected: str | Cause,
    says: bool,
) -> None:
    name, rows = specific.tensor, specific.rows_per_class
    in_file = (rows if file == SHARED else rows * len(source), 8)
    in_model = (rows if model == SHARED else rows * len(target), 8)
    of_file, of_model = (agnostic if side == SHARED else specific for side in (file, model))
    plan = make(
        {CLS.tensor: (len(source) + 1, 8), name: in_file},
        {CLS.tensor: (len(target) + 1, 8), name: in_model},
        [CLS, of_model],
        source,
        target,
        source_layouts=[CLS, of_file] if says else [],
    )
    if isinstance(expected, Cause):
        assert set(actions(plan).values()) == {"initialised"}
        assert causes(plan)[name] is (Cause.OTHER_KIND if says else expected)
        (lost,) = [notice for notice in plan_notices(plan) if notice.code == "discarded"]
        assert set(lost.tensors) == {CLS.tensor, name}
        return
    assert actions(plan)[name] == expected and actions(plan)[CLS.tensor] in ("copied", "carried")
    assert "discarded" not in {notice.code for notice in plan_notices(plan)}
    old, new = torch.arange(float(in_file[0] * 8)).view(in_file), -torch.ones(in_model)
    out = plan.apply(
        {CLS.tensor: torch.zeros(len(source) + 1, 8), name: old},
        {CLS.tensor: torch.zeros(len(target) + 1, 8), name: new},
    )[name]
    # By hand: which block of the file each block of the model has.
    for k, block in enumerate(out.view(-1, rows, 8)):
        mine = target.names[k]
        theirs = 0 if expected == "copied" else None
        if expected == "carried" and mine in source.names:
            theirs = source.names.index(mine)
        assert torch.equal(block, new.view(-1, rows, 8)[k] if theirs is None else old.view(-1, rows, 8)[theirs])


def test_other_heads_of_one_row_are_not_taken_for_agnostic() -> None:
    """No config key makes a segmentation head class-agnostic: one row under 54 names is a wrong list."""
    layout = HeadLayout("s.predictor.weight", "thing", "s")
    shapes = {layout.tensor: (1, 8)}
    plan = make(shapes, shapes, [layout], ClassTable(NAMES), table("c3"))
    assert actions(plan) == {layout.tensor: "initialised"}


def test_nine_anchors_of_one_class_and_three_of_three_are_told_apart() -> None:
    scores = HeadLayout("r.cls_score.weight", "thing", "r", "head", groups=3)
    boxes = HeadLayout("r.bbox_pred.weight", "thing", "r", "head", axes=(), rows_per_class=4, groups=3)
    file = {scores.tensor: (9, 8, 3, 3), boxes.tensor: (36, 8, 3, 3)}
    model = {scores.tensor: (9, 8, 3, 3), boxes.tensor: (12, 8, 3, 3)}
    for source in (table("a"), None):
        plan = make(file, model, [scores, boxes], source, table("a", "b", "c"))
        assert set(actions(plan).values()) == {"initialised"}
        assert set(causes(plan).values()) == {Cause.OTHER_ANCHORS}
    assert (
        "another number of anchors"
        in by_name(make(file, model, [scores, boxes], table("a"), table("a", "b", "c")))[boxes.tensor].reason
    )
    # Provenance says so even where no box tensor stands beside the scores.
    stored = [replace(scores, groups=9)]
    alone = make({scores.tensor: (9, 8, 3, 3)}, {scores.tensor: (9, 8, 3, 3)}, [scores], table("a"),
                 table("a", "b", "c"), source_layouts=stored)  # fmt: skip
    assert actions(alone) == {scores.tensor: "initialised"}


def test_a_source_list_of_the_wrong_length_is_refused_with_the_key() -> None:
    plan = make({CLS.tensor: (366, 8)}, {CLS.tensor: (3, 8)}, [CLS], ClassTable(NAMES, "coco"), table("c1", "c2"))
    assert [t.action for t in plan.tensors] == ["refused"]
    assert (plan.tensors[0].cause, plan.tensors[0].why.count) == (Cause.TABLE_MISFIT, 365)
    assert "holds 365 classes" in plan.tensors[0].reason and "but coco names 80" in plan.tensors[0].reason


def test_a_model_whose_shape_is_not_its_tables_is_refused() -> None:
    plan = make({CLS.tensor: (4, 8)}, {CLS.tensor: (81, 8)}, [CLS], table("a", "b", "c"), table("a", "b"))
    assert plan.tensors[0].cause is Cause.MODEL_MISFIT
    assert plan.refused and "set NUM_CLASSES to the table's length" in plan.tensors[0].reason


def test_a_tensor_without_a_layout_is_copied_or_kept_never_half_loaded() -> None:
    layouts = [CLS]
    file = {CLS.tensor: (4, 8), "h.centres": (3, 8), "h.extra": (3, 5), "backbone.w": (2, 8)}
    model = {CLS.tensor: (3, 8), "h.centres": (2, 8), "h.extra": (3, 5), "backbone.w": (2, 8)}
    plan = by_name(make(file, model, layouts, table("a", "b", "c"), table("c", "a")))
    assert [plan[name].cause for name in ("h.centres", "h.extra", "backbone.w")] == [
        Cause.NO_LAYOUT,
        Cause.MAYBE_CLASSES,
        Cause.SAME_SHAPE,
    ]
    assert plan["h.centres"].action == "kept" and "no layout says" in plan["h.centres"].reason
    # Three rows are as many as two classes and background.
    assert plan["h.extra"].action == "copied" and not plan["h.extra"].verified
    assert plan["h.extra"].reason.startswith("unverified: 3 rows may be classes")
    assert plan["backbone.w"].action == "copied" and plan["backbone.w"].verified


def test_rebuilt_tensors_are_never_taken_from_a_file() -> None:
    fed = HeadLayout("h.fed_loss_cls_weights", "thing", "h", "fed", rebuilt=True)
    same = table("a", "b", "c")
    plan = by_name(make({CLS.tensor: (4, 8), fed.tensor: (3,)}, {CLS.tensor: (4, 8), fed.tensor: (3,)}, [CLS, fed],
                        same, same))  # fmt: skip
    assert plan[fed.tensor].cause is Cause.REBUILT and plan[fed.tensor].cause.meant
    assert plan[fed.tensor].action == "kept" and "rebuilt from the dataset" in plan[fed.tensor].reason
    assert plan[CLS.tensor].action == "copied"


def test_no_class_in_common_keeps_background_and_initialises_the_rest() -> None:
    plan = by_name(make({CLS.tensor: (4, 8), BOX.tensor: (12, 8)}, {CLS.tensor: (3, 8), BOX.tensor: (8, 8)}, [CLS, BOX],
                        table("a", "b", "c"), table("x", "y")))  # fmt: skip
    assert (plan[CLS.tensor].action, plan[CLS.tensor].background) == ("carried", True)
    assert plan[BOX.tensor].action == "initialised"


def test_position_is_used_only_when_asked_for() -> None:
    file, model = {CLS.tensor: (4, 8)}, {CLS.tensor: (3, 8)}
    plan = make(file, model, [CLS], None, table("x", "y"), match="position")
    assert plan.tensors[0].carried == ((0, 0), (1, 1))
    assert make(file, model, [CLS], None, table("x", "y")).tensors[0].action == "initialised"


def test_an_alias_goes_to_the_space_that_knows_it_and_to_no_space_is_an_error() -> None:
    stuff = HeadLayout("s.predictor.weight", "stuff", "s")
    tables = {"thing": table("car", "owl"), "stuff": table("road", "sky")}
    new = {"thing": table("auto", "owl"), "stuff": table("street", "sky")}
    shapes = {CLS.tensor: (3, 8), stuff.tensor: (2, 8)}
    plan = plan_adaptation(shapes, shapes, [CLS, stuff], source_tables=tables, target_tables=new,
                           aliases=["auto=car", "street=road"])  # fmt: skip
    assert plan.new_classes() == {}
    with pytest.raises(ClassTableError, match="'lorry=car'"):
        plan_adaptation(shapes, shapes, [CLS, stuff], source_tables=tables, target_tables=new, aliases=["lorry=car"])


def test_dropped_names_keep_their_reason() -> None:
    why = Why(Cause.SEVERAL_PLACES, count=3, names=("a", "b", "c"))
    plan = make({}, {"w": (2,)}, [], None, None, dropped={"cls_score.weight": why})
    assert by_name(plan)["cls_score.weight"].why == why
    assert by_name(plan)["cls_score.weight"].reason == "fits 3 places in the model: a, b, c"
    assert plan.loads_nothing
