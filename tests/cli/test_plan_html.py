"""The HTML page of a plan: whole, safe, the same every time, and with every class in it exactly once."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.vocabularies import vocabulary
from d2_headadapt.cli.class_picture import LEDGER_ROWS, PICTURE_LINES, ROW
from d2_headadapt.cli.plan_html import plan_html

BOX = "heads.box_predictor"
LAYOUTS = (
    HeadLayout(f"{BOX}.cls_score.weight", "thing", "heads", "box", extra=1),
    HeadLayout(f"{BOX}.bbox_pred.weight", "thing", "heads", "box", rows_per_class=4),
)
VOID = {"meta", "input", "wbr"}
EVIL = ["<script>alert(1)</script>", "a & b", "x\"y'z", "<img src=x onerror=alert(2)>", "شخص", "nul\x00", "&lt;b&gt;"]
COCO, LVIS = vocabulary("coco"), vocabulary("lvis_v1")


def shapes(k: int) -> dict[str, tuple[int, ...]]:
    return {
        "backbone.conv.weight": (3, 3),
        f"{BOX}.cls_score.weight": (k + 1, 5),
        f"{BOX}.bbox_pred.weight": (4 * k, 5),
    }


def make(source: ClassTable | list[str], target: ClassTable | list[str], *, named: int | None = None) -> AdaptPlan:
    """A plan between two tables; with ``named``, only so many of the file's classes are named."""
    source, target = (x if isinstance(x, ClassTable) else ClassTable(x, "a <b>list</b>") for x in (source, target))
    tables = {} if named == 0 else {"thing": ClassTable(source.names[:named], source.origin)}
    return plan_adaptation(
        {**shapes(len(source)), "old.thing": (2,)},
        {**shapes(len(target)), "backbone.new": (7,)},
        LAYOUTS,
        source_tables=tables,
        target_tables={"thing": target},
    )


def many(count: int, step: int) -> list[str]:
    """Of ``count`` names, every ``step``-th is new."""
    return [f"fresh {i}" if i % step == 0 else f"class number {i}" for i in range(count)]


WAREHOUSE = ["forklift", "person", "truck", "pallet", "car", "traffic-light", "stop sign", "bicycle", "hard hat", "dog"]
PLANS = {
    "three": make(["cat", "dog", "cow", "pig"], ["pig", "owl", "cat"]),
    "identity": make(COCO, COCO),
    "80 to 10": make(COCO, WAREHOUSE),
    "80 to 1203": make(COCO, LVIS),
    "1203 to 80": make(LVIS, COCO),
    "1203 turned round": make(LVIS, ClassTable(LVIS.names[::-1], "turned round")),
    "every other one": make(many(3000, 5000), many(3000, 2)),
    "nothing in common": make(["a", "b"], ["c", "d", "e"]),
    "evil": make(EVIL, [*EVIL[:2], "\u202eevil", "<b>", *EVIL[4:]]),
}
UNMAPPED = {
    "copied by shape alone": make(["a", "b", "c"], EVIL[:3], named=0),
    "classes unknown": make(COCO, EVIL, named=0),
    "refused": make(COCO, EVIL, named=79),
}


def several_spaces() -> AdaptPlan:
    """A model with a head in each of five label spaces."""
    spaces = ("thing", "stuff", "keypoint", "colour", "weather")
    layouts = [HeadLayout(f"{space}_head.weight", space, f"{space}_head") for space in spaces]
    tables = [{s: ClassTable([f"{s} {i}" for i in range(a, b)], f"{s}s") for s in spaces} for a, b in ((0, 6), (2, 9))]
    shapes = [{f"{s}_head.weight": (len(t), 4) for s, t in side.items()} for side in tables]
    return plan_adaptation(*shapes, layouts, source_tables=tables[0], target_tables=tables[1])


@dataclass
class Element:
    tag: str
    attrs: dict[str, str | None]
    parents: tuple[Element, ...]
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def css(self) -> list[str]:
        return (self.attrs.get("class") or "").split()


class Page(HTMLParser):
    """The elements of a page, in order; an element that is not closed in its turn is a failure."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        self.close()
        if self.open:
            raise ValueError(f"not closed: {[x.tag for x in self.open]}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) != len(attrs):
            raise ValueError(f"<{tag}> has an attribute twice: {attrs}")
        self.elements.append(Element(tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1].tag != tag:
            raise ValueError(f"</{tag}> closes {[x.tag for x in self.open]}")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    def find(self, tag: str, css: str = "") -> list[Element]:
        return [x for x in self.elements if x.tag == tag and (not css or css in x.css)]


def classes_on(page: Page) -> Counter[tuple[int, str]]:
    """Index and name of every class that the page shows."""
    labels = [x for x in page.elements if x.tag in ("i", "b") and x.parents[-1].tag == "li" and x.text != ""]
    pairs = zip(labels[::2], labels[1::2], strict=True)
    return Counter((int(index.text), name.text) for index, name in pairs)


def shown(name: str) -> str:
    return name.replace("\x00", "\ufffd")


@pytest.mark.parametrize("name", [*PLANS, *UNMAPPED])
def test_a_page_is_well_formed_and_asks_the_network_for_nothing(name: str) -> None:
    html = plan_html({**PLANS, **UNMAPPED}[name], title="<title> & more", notes=["a note with <b>"])
    page = Page(html)
    assert page.find("title")[0].text == "<title> & more" == page.find("h1")[0].text
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"<script>.*?</script>", "", html, flags=re.S))
    assert not {"link", "iframe", "img", "object", "base", "form"} & {x.tag for x in page.elements}
    assert not any(key in ("src", "href") or key.startswith("on") for x in page.elements for key in x.attrs)


@pytest.mark.parametrize("name", PLANS)
def test_every_class_of_both_sides_is_named_exactly_once(name: str) -> None:
    plan = PLANS[name]
    expected: Counter[tuple[int, str]] = Counter()
    found = plan.class_map("thing")
    assert found is not None
    small = len(Page(plan_html(plan)).find("div", "picture"))
    for t, s in enumerate(found.rows):
        expected[t, shown(found.target.names[t])] += 1
        # A ledger row names its source each time; a picture has one row for a source of several targets.
        if s is not None and not small:
            expected[s, shown(found.source.names[s])] += 1
    sources = range(len(found.source)) if small else found.dropped
    expected.update((s, shown(found.source.names[s])) for s in sources)
    assert classes_on(Page(plan_html(plan))) == expected


@pytest.mark.parametrize("name", UNMAPPED)
def test_where_no_class_is_matched_both_lists_are_there_and_no_line(name: str) -> None:
    plan = UNMAPPED[name]
    page = Page(plan_html(plan))
    tables = [side["thing"] for side in (plan.source, plan.target) if "thing" in side]
    assert classes_on(page) == Counter((i, shown(x)) for table in tables for i, x in enumerate(table.names))
    assert not page.find("path", "link")


@pytest.mark.parametrize("name", PLANS)
def test_there_is_one_line_for_every_carried_pair(name: str) -> None:
    found = PLANS[name].class_map("thing")
    assert found is not None
    page = Page(plan_html(PLANS[name]))
    assert len(page.find("path", "link")) == len(found.carried)
    assert bool(page.find("div", "picture")) != bool(page.find("div", "ledger"))


@pytest.mark.parametrize("name", [name for name in PLANS if Page(plan_html(PLANS[name])).find("div", "picture")])
def test_every_line_of_a_picture_joins_the_rows_of_its_classes(name: str) -> None:
    found = PLANS[name].class_map("thing")
    assert found is not None
    page = Page(plan_html(PLANS[name]))
    heights: dict[tuple[str, str], float] = {}
    for side in "st":
        (box,) = page.find("ul", side)
        top = int(re.findall(r"padding-top:(\d+)px", box.attrs["style"] or "")[0])
        rows = [x for x in page.find("li") if x.parents[-1] is box and "background" not in x.css]
        for i, row in enumerate(rows):
            heights[side, row.attrs.get(f"data-{side}") or ""] = top + (i + 0.5) * ROW
    ends = {}
    for path in page.find("path", "link"):
        s, t = path.attrs["data-s"] or "", path.attrs["data-t"] or ""
        numbers = [float(x) for x in re.findall(r"[\d.]+", path.attrs["d"] or "")]
        assert (numbers[0], numbers[-2]) == (0, 100)
        assert (numbers[1], numbers[-1]) == (heights["s", s], heights["t", t])
        ends[int(t)] = int(s)
    assert tuple(ends.items()) == found.carried and len(ends) <= PICTURE_LINES


@pytest.mark.parametrize("name", ["80 to 10", "80 to 1203", "1203 to 80", "1203 turned round", "every other one"])
def test_what_is_not_folded_stays_readable(name: str) -> None:
    page = Page(plan_html(PLANS[name]))
    in_view = [
        x
        for x in page.find("li") + page.find("summary")
        if not any(
            p.tag == "details" and "open" not in p.attrs for p in x.parents[: -1 if x.tag == "summary" else None]
        )
    ]
    assert len(in_view) < LEDGER_ROWS + 60


def test_a_long_run_of_dropped_classes_is_one_band_that_opens() -> None:
    page = Page(plan_html(PLANS["1203 to 80"]))
    (band,) = page.find("details", "d")
    assert "1,125 dropped" in band.text and "aerosol_can" in band.text and "open" not in band.attrs


def test_no_name_becomes_a_tag_and_only_our_script_may_run() -> None:
    html = plan_html(PLANS["evil"], title=EVIL[0], notes=EVIL)
    page = Page(html)
    (script,) = page.find("script")
    assert "alert" not in script.text and EVIL[0] not in html
    assert len(page.find("b")) == len(EVIL) * 2 and not page.find("img")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = [x.attrs["content"] or "" for x in page.find("meta") if "http-equiv" in x.attrs]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_lone_surrogate_in_a_name_can_be_written() -> None:
    html = plan_html(make(["cat", "\ud800dog"], ["cat", "\udfff"]))
    assert Page(html) and html.encode("utf-8")


def test_the_same_plan_gives_the_same_bytes_whatever_the_hash_seed() -> None:
    code = (
        "import sys; from d2_headadapt.adapt.plan import AdaptPlan; from d2_headadapt.cli.plan_html import plan_html; "
        "sys.stdout.buffer.write(plan_html(AdaptPlan.from_json(sys.stdin.read())).encode())"
    )
    plan = json.dumps(several_spaces().to_json())
    seed = "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.encode(),
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert run.stdout == plan_html(AdaptPlan.from_json(plan)).encode()


def test_every_label_space_has_its_own_map() -> None:
    page = Page(plan_html(several_spaces()))
    titles = [x.text for x in page.find("h2") if "space" in x.parents[-1].css]
    assert titles == [f"{space} classes" for space in ("colour", "keypoint", "stuff", "thing", "weather")]
    assert len(page.find("div", "picture")) == 5 and len(page.find("path", "link")) == 5 * 4


def test_a_plan_read_back_from_json_draws_the_same_map() -> None:
    plan = PLANS["80 to 10"]
    again = AdaptPlan.from_json(plan.to_json())
    assert classes_on(Page(plan_html(again))) == classes_on(Page(plan_html(plan)))


def test_what_needs_attention_stands_on_top_with_what_to_type() -> None:
    for name, level, words in (
        ("refused", "refused", "MODEL.HEAD_ADAPT.SOURCE_CLASSES coco"),
        ("copied by shape alone", "unverified", "MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt"),
        ("classes unknown", "discarded", "80 rows: probably coco"),
    ):
        html = plan_html(UNMAPPED[name])
        page = Page(html)
        (alert,) = page.find("li", level)[:1]
        assert words in alert.text and level in page.find("p", "verdict")[0].css
        assert html.index('class="alerts"') < html.index('class="tiles"') < html.index("Head tensors")
    assert not Page(plan_html(PLANS["three"])).find("ul", "alerts")


def test_the_head_table_has_exact_shapes_counts_and_background() -> None:
    page = Page(plan_html(PLANS["three"]))
    rows = [
        [x.text for x in page.elements if x.tag in ("th", "td") and x.parents[-1] is row]
        for row in page.find("tr")
        if any("heads" in x.css for x in row.parents)
    ]
    assert rows[0][:4] == ["tensor", "action", "in the file", "in the model"] and rows[1] == ["heads"]
    assert rows[2] == [
        f"{BOX}.cls_score.weight1 row per class, background last",
        *("carried", "(5, 5)", "(4, 5)", "2", "1", "2", "from the file"),
    ]
    assert rows[3][1:] == ["carried", "(16, 5)", "(12, 5)", "2", "1", "2", "-"]


def test_names_that_differ_by_more_than_spelling_are_marked() -> None:
    page = Page(plan_html(PLANS["80 to 1203"]))
    marked = [x.parents[-2].text for x in page.find("path", "alias")]
    assert "2car206car_(automobile)" in marked and not any("traffic" in text for text in marked)


@pytest.mark.parametrize("target", [many(20_000, 4), many(20_000, 2), many(20_000, 20_000)[::-1]])
def test_twenty_thousand_classes_make_a_bounded_page(target: list[str]) -> None:
    plan = make(many(20_000, 40_000), target)
    html = plan_html(plan)
    names = sum(len(x) for x in (*plan.source["thing"].names, *plan.target["thing"].names))
    assert len(html.encode()) < 200_000 + 100 * 40_000 + 2 * names


def test_a_discarded_head_is_the_verdict_with_the_guess_and_a_coverage_that_counts_classes() -> None:
    """80 unnamed classes and six wanted ones: nothing of the trained head is used."""
    page = plan_html(make(COCO, many(6, 1), named=0))
    assert '<p class="verdict discarded">Loads, but a trained head of the file is not used</p>' in page
    assert "<code>MODEL.HEAD_ADAPT.SOURCE_CLASSES coco</code> <span>80 rows: probably coco; else a dataset" in page
    assert "25% <small>of 4 tensors in the file find a place, and 0 of 6 classes are carried</small>" in page
