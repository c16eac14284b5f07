"""A plan in words: one table by head group, classes by name, what to look at with what to type, Markdown."""

from __future__ import annotations

import re

import pytest

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import AdaptPlan, TensorPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.report import plan_markdown, plan_notices, plan_table, summary_line
from d2_headadapt.errors import ClassTableError

BOX, MASK = "heads.cls_score.weight", "heads.mask.weight"
LAYOUTS = (
    HeadLayout(BOX, "thing", "heads", "box", extra=1),
    HeadLayout(MASK, "thing", "heads", "mask"),
)
SOURCE = ClassTable(["cat", "dog", "truck", "wine glass"], "the old list")
TARGET = ClassTable(["lorry", "owl", "cat", "wine_glass", "truck"], "the new list")


def shapes(k: int) -> dict[str, tuple[int, ...]]:
    return {"backbone.conv": (3, 3), BOX: (k + 1, 5), MASK: (k, 8, 1, 1)}


def make(
    source: ClassTable | None = SOURCE, target: ClassTable | None = TARGET, *, k: int = 4, without: str = ""
) -> AdaptPlan:
    in_file = {name: shape for name, shape in {**shapes(k), "old.thing": (2,)}.items() if name != without}
    in_model = {**shapes(5 if target is None else len(target)), "backbone.new": (7,)}
    return plan_adaptation(
        in_file,
        in_model,
        LAYOUTS,
        source_tables={} if source is None else {"thing": source},
        target_tables={} if target is None else {"thing": target},
        aliases=["lorry=truck"] if source is SOURCE and target is TARGET else [],
    )


NASTY = [
    "\x1b[2J\x1b]0;title\x07",
    "one\ntwo",
    "car\rriage",
    "ca\u200bt",
    "\u202etac",
    "\x85line",
    "\u2028sep",
    "nul\0",
]


def test_nothing_of_a_name_reaches_a_terminal_or_a_log_raw() -> None:
    """Beside it, a raw name would: the law must be able to fail."""

    def raw(text: str) -> set[str]:
        return {c for c in text if not c.isprintable() and c != "\n"}

    names = [*NASTY, "cat"]
    head = "heads.\x1b[31m.weight"
    layouts = [HeadLayout(head, "thing", "heads\x07", "box", extra=1), HeadLayout("m\r", "thing", "heads\x07", "mask")]
    for source, wrong in ((ClassTable(names, "file\x1b"), 0), (ClassTable(names, "file\x1b"), 1), (None, 0)):
        target = ClassTable([*NASTY[::-1], "owl\x1b"], "model\x1b")
        file = {head: (len(names) + 1 + wrong, 4), "m\r": (len(names), 4), "other\n\x1b": (3,), "average\x9b": (2, 2)}
        model = {head: (len(target) + 1, 4), "m\r": (len(target), 4), "other\n\x1b": (2,)}
        plan = plan_adaptation(
            file,
            model,
            layouts,
            source_tables={} if source is None else {"thing": source},
            target_tables={"thing": target},
        )
        told = [summary_line(plan), plan_table(plan), plan_table(plan, every_tensor=True), plan_markdown(plan)]
        told += [text for n in plan_notices(plan) for text in (n.code, n.where, n.found, n.type_this, n.hint)]
        told += [t.reason for t in plan.tensors]
        assert [raw(text) for text in told] == [set()] * len(told)
        assert "\n" not in summary_line(plan) and not any("\n" in t.reason for t in plan.tensors)
        assert not any(line.startswith("two") for text in told for line in text.splitlines())
    assert raw(f"heads of {NASTY[0]}")


def test_an_error_is_one_line_whatever_it_names() -> None:
    for name in NASTY:
        error = ClassTableError(name, expected=name, found=name, fix=name)
        assert str(error).isprintable() and error.where == name, "a program reads what it is"


def test_one_table_by_head_group_with_exact_shapes() -> None:
    lines = plan_table(make()).splitlines()
    assert re.split(r"  +", lines[0]) == ["head group", "tensor", "action", "in the file", "in the model", "classes"]
    words = "4 carried, 1 new, 1 dropped"
    assert re.split(r"  +", lines[2]) == ["heads", BOX, "carried", "(5, 5)", "(6, 5)", f"{words}, background carried"]
    assert re.split(r"  +", lines[3])[1:] == [MASK, "carried", "(4, 8, 1, 1)", "(5, 8, 1, 1)", words]
    assert sum("head group" in line for line in lines) == 1


def test_classes_are_named_not_numbered() -> None:
    text = plan_table(make())
    for line in (
        "thing classes carried: cat, wine_glass, truck",
        "thing classes carried under another name: lorry=truck",
        "thing classes that are new: owl",
        "thing classes of the file that are dropped: dog",
        "thing classes of the file that feed several: truck",
        "1 other tensor copied: backbone.conv",
        "1 other tensor kept (not in the file): backbone.new",
        "1 other tensor dropped (the model has no tensor of this name): old.thing",
    ):
        assert line in text.splitlines()
    assert text.splitlines()[-1] == summary_line(make())


def test_every_tensor_can_be_listed() -> None:
    lines = plan_table(make(), every_tensor=True).splitlines()
    assert sum(bool(re.search(r"backbone\.conv +copied +\(3, 3\) +\(3, 3\)", line)) for line in lines) == 1
    assert not any("other tensor" in line for line in lines)
    assert lines[2].startswith("heads")


def test_a_plan_without_trouble_has_no_notices() -> None:
    assert plan_notices(make()) == ()


def test_a_head_that_is_not_in_the_file_gets_a_notice_and_its_classes_stay_carried() -> None:
    plan = make(without=MASK)
    (notice,) = plan_notices(plan)
    assert (notice.code, notice.tensors, notice.found) == ("initialised", (MASK,), "not in the file")
    assert notice.where == "1 tensor of heads keeps the model's initial values"
    assert notice.type_this == ""
    assert "1 new (owl)" in summary_line(plan)


def test_a_copy_by_shape_alone_says_which_key_verifies_it() -> None:
    plan = make(None, k=5)
    (notice,) = plan_notices(plan)
    assert notice.code == "unverified" and notice.tensors == (BOX, MASK)
    assert notice.type_this == "MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt"
    assert notice.hint.endswith("the shapes of the file hold 5")
    assert (notice.severity, notice.fix) == ("warning", f"Type: {notice.type_this} ({notice.hint}).")
    text = plan_table(plan)
    assert text.count("see note 1") == 2 and "type: MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt" in text


@pytest.mark.parametrize(
    ("rows", "typed", "hint"),
    [
        (80, "coco", "80 rows: probably coco; else a dataset, a file or a list of names"),
        (20, "voc", "20 rows: probably voc; else a dataset, a file or a list of names"),
        (365, "objects365", "365 rows: probably objects365; else a dataset, a file or a list of names"),
        (8, "names.txt", "or a dataset, vocabulary, .json file or list of names; the shapes of the file hold 8"),
    ],
)
def test_a_trained_head_without_names_is_discarded_with_the_guess_that_fits(rows: int, typed: str, hint: str) -> None:
    """Never taken by a guess, and never left out without a word."""
    plan = make(None, k=rows)
    (notice,) = plan_notices(plan)
    assert (notice.code, notice.hint) == ("discarded", hint)
    assert notice.type_this == f"MODEL.HEAD_ADAPT.SOURCE_CLASSES {typed}"
    assert notice.tensors == (BOX, MASK) and notice.where == "2 tensors of heads keep the model's initial values"
    assert notice.found.endswith("the classes of the file are unknown: set MODEL.HEAD_ADAPT.SOURCE_CLASSES")
    assert notice.line().startswith("discarded: 2 tensors of heads keep the model's initial values: (")
    assert plan.class_coverage == (0, 5), "the share of tensors alone says little"
    assert plan.coverage == 1 / 4, "the trunk's one tensor of four"


def test_a_head_that_starts_afresh_as_the_class_lists_say_is_no_surprise() -> None:
    plan = make(ClassTable(["a", "b", "c", "d"]), ClassTable(["w", "x", "y", "z"]))
    assert [notice.code for notice in plan_notices(plan)] == ["initialised"]
    assert plan.class_coverage == (0, 4) and make().class_coverage == (4, 5)


def test_unknown_classes_of_the_model_name_the_key_of_that_side() -> None:
    (notice,) = plan_notices(make(SOURCE, None))
    assert notice.type_this == "MODEL.HEAD_ADAPT.TARGET_CLASSES names.txt"
    assert notice.hint.endswith("the shapes of the model hold 5")


def test_a_refused_group_is_one_notice_with_what_to_correct() -> None:
    plan = make(ClassTable(["a", "b", "c"], "short.txt"))
    (notice,) = plan_notices(plan)
    assert notice.code == "refused" and notice.tensors == (BOX, MASK)
    assert notice.where == f"{BOX} is refused, so nothing is loaded"
    assert "short.txt names 3" in notice.found and "a corrected dataset" in notice.hint
    assert notice.type_this == "MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt"


def test_a_head_that_the_user_switched_off_is_told_nothing_to_type() -> None:
    plan = plan_adaptation(
        shapes(4), shapes(5), LAYOUTS, source_tables={}, target_tables={"thing": TARGET}, initialise=["thing"]
    )
    (notice,) = plan_notices(plan)
    assert notice.code == "initialised" and notice.found.endswith("is 'none'") and notice.type_this == ""


def test_rows_that_may_be_classes_without_a_layout_are_one_notice() -> None:
    extra = {f"other.{i}": (5, 2) for i in range(3)}
    plan = plan_adaptation(
        {**shapes(4), **extra},
        {**shapes(5), **extra},
        LAYOUTS,
        source_tables={"thing": SOURCE},
        target_tables={"thing": TARGET},
    )
    (notice,) = plan_notices(plan)
    assert notice.tensors == tuple(extra) and notice.type_this == "register_head_layout(...)"


def test_a_file_that_gives_nothing_is_said() -> None:
    plan = AdaptPlan((TensorPlan("a", "dropped", source_shape=(2,)), TensorPlan("b", "kept", target_shape=(2,))))
    (notice,) = plan_notices(plan)
    assert notice.code == "refused" and "gives this model nothing" in plan_table(plan)


def test_markdown_tables_are_whole_whatever_the_names() -> None:
    evil = ClassTable(["a|b", "<script>alert(1)</script>", "`tick`", "new\nline", "*star*"], "list|of|[x](y)")
    text = plan_markdown(make(evil, ClassTable([*evil.names[::-1], "|"], "t"), k=5))
    blocks = [block.splitlines() for block in text.strip().split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(columns) == 1 and re.fullmatch(r"\|( --- \|)+", block[1])
    assert "<script>" not in text and r"a\|b" in text and r"\`tick\`" in text and r"new\\nline" in text
    assert text.startswith("**") and summary_line(make()).replace("_", r"\_") in plan_markdown(make())


def test_markdown_says_what_to_look_at_and_what_to_type() -> None:
    text = plan_markdown(make(None, k=5))
    assert "> **note 1, unverified:**" in text and "Type `MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt`" in text
