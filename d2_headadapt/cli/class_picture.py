"""The class map of one label space as a picture in HTML: classes of the file on the left, of the model on the right.

A map of few lines is drawn whole, with the file's classes in their own order. A larger one is an overview, with the
file's classes sorted into the model's order so that no line crosses another, and a ledger of rows.

    t, s    indices of a target class (the model's) and of a source class (the file's)
    run     neighbouring class indices that are drawn together
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from ..adapt.classes import ClassMap, ClassTable
from ..adapt.plan import AdaptPlan
from ..adapt.report import added_tasks, plan_notices, removed_tasks, split_renamed

ROW = 26
"""Height of a row of the picture, in pixels."""

PICTURE_LINES, PICTURE_ROWS = 48, 64
"""The largest picture; beyond them comes the ledger."""

LEDGER_ROWS, OPEN_MOST = 320, 40
"""The most rows that a ledger shows unfolded, and the most new classes that it does not fold into runs."""

_OVERVIEW_HEIGHT = 300
WORDS = {"c": "carried", "n": "new", "d": "dropped"}
_BAD_CHARACTERS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
Run = Sequence[int]


def safe(text: object) -> str:
    """Escape text for use inside an element or a quoted attribute."""
    return escape(str(text).translate(_BAD_CHARACTERS))


def breakable(name: str) -> str:
    """Let a dotted tensor name wrap at its dots."""
    return safe(name).replace(".", "<wbr>.")


def commas(count: int) -> str:
    """Write ``1203`` as ``1,203``."""
    return f"{count:,}"


def space_section(plan: AdaptPlan, space: str) -> str:
    found = plan.class_map(space)
    if found is None:
        return _unmapped_space(plan, space)
    background = any(t.background and t.action in ("carried", "copied") for t in plan.tensors if t.space == space)
    left = _runs(len(found.source), set(found.dropped), 3 if len(found.source) > 24 else len(found.source))
    right = _runs(len(found.target), set(found.new), 4 if len(found.target) > 48 else len(found.target))
    small = len(found.carried) <= PICTURE_LINES and max(len(left), len(right)) <= PICTURE_ROWS
    drawn = _picture(found, left, right, space, background) if small else _overview(found) + _ledger(found, background)
    counts = {"c": len(found.carried), "n": len(found.new), "d": len(found.dropped)}
    renamed = len(split_renamed(found)[1])
    key = "".join(
        f'<li class="{x}"><label><input type="checkbox" class="show-{x}" checked> '
        f"{commas(counts[x])} {word}</label></li>"
        for x, word in WORDS.items()
    )
    key += f'<li class="alias">{commas(renamed)} of the carried under another name</li>' * bool(renamed)
    stay = sum(t == s for t, s in found.carried)
    order = f"{commas(stay)} of {commas(counts['c'])} carried classes keep their number."
    if found.is_identity:
        order = "Same classes, same order: every row keeps its place."
    return (
        f'<section class="card space"><h2>{safe(space)} classes</h2><p>{order}</p>'
        f'<div class="tools"><ul class="key">{key}</ul><label class="find" hidden><output></output> Find a class '
        f'<input type="search" autocomplete="off"></label></div>\n{drawn}</section>'
    )


def _unmapped_space(plan: AdaptPlan, space: str) -> str:
    """Draw both lists by themselves, where no class of one is known to be a class of the other."""
    new = set(plan.new_classes().get(space, ()))
    known = [("file", plan.source.get(space)), ("model", plan.target.get(space))]
    why = "No class of this space is moved" if all(table for _, table in known) else "The classes are not all known"
    why += "; see the notes above." if plan_notices(plan) else "."
    if space in removed_tasks(plan):
        why = "The model has no such task, and its classes are dropped."
    elif space in added_tasks(plan):
        why = "The file has no such task."
    lists = []
    for side, table in known:
        if table is not None:
            css, what = ("n", "new") if side == "model" and new.issuperset(table.names) else ("", "classes")
            label, opened = f"{commas(len(table))} {what}", len(table) <= OPEN_MOST
            lists.append(f"<h3>in the {side}: {_table_title(table)}</h3>")
            lists.append(_folded(css, label, range(len(table)), table, opened=opened))
    return f'<section class="card space"><h2>{safe(space)} classes</h2><p>{why}</p>{"".join(lists)}</section>'


def _table_title(table: ClassTable) -> str:
    return f"{safe(table.origin)} <small>{commas(len(table))} classes</small>"


def _sides(found: ClassMap) -> str:
    return (
        f'<p class="sides"><span>in the file: {_table_title(found.source)}</span>'
        f"<span>in the model: {_table_title(found.target)}</span></p>"
    )


def _runs(count: int, foldable: set[int], least: int) -> list[Run]:
    """Split 0 .. count-1 in order: at least ``least`` foldable neighbours together, every other index alone."""
    runs: list[Run] = []
    start = 0
    while start < count:
        end = start
        while end < count and end in foldable:
            end += 1
        if end - start >= max(least, 2):
            runs.append(range(start, end))
        else:
            end = max(end, start + 1)
            runs.extend(range(i, i + 1) for i in range(start, end))
        start = end
    return runs


def _name(table: ClassTable, i: int) -> str:
    """Write index and name; the title helps where a long name is cut."""
    name = safe(table.names[i])
    title = f' title="{name}"' if len(table.names[i]) > 28 else ""
    return f"<i>{i}</i><b{title}>{name}</b>"


def _folded(
    css: str, label: str, run: Run, table: ClassTable, rows: str = "", *, only: str = "", opened: bool = False
) -> str:
    """Fold a run of classes that opens to its rows; of those with the same ``only``, one is open at a time."""
    first, last = run[0], run[-1]
    ends = f"{safe(table.names[first])} … {safe(table.names[last])}" if len(run) > 1 else ""
    if ends and last - first == len(run) - 1 and not only:
        ends = f"{first}–{last}: {ends}"
    rows = rows or f"<ul>{''.join(f'<li>{_name(table, i)}</li>' for i in run)}</ul>"
    group = f' name="{safe(only)}"' if only else ""
    return (
        f'<details class="fold {css}"{group}{" open" * opened}><summary><strong>{label}</strong> '
        f"<span>{ends}</span></summary>{rows}</details>"
    )


def _picture(found: ClassMap, left: list[Run], right: list[Run], space: str, background: bool) -> str:
    """Draw both tables in their own order and a line for every carried pair."""
    rows = max(len(left), len(right)) + background
    tops = [(rows - background - len(side)) * ROW // 2 for side in (left, right)]
    height = rows * ROW
    y_source = {s: tops[0] + ROW * row + ROW // 2 for row, run in enumerate(left) for s in run}
    y_target = {t: tops[1] + ROW * row + ROW // 2 for row, run in enumerate(right) for t in run}
    renamed = set(split_renamed(found)[1])
    wires = [
        f'<path class="link{" alias" * ((t, s) in renamed)}" data-s="{s}" data-t="{t}" '
        f'd="M0 {y_source[s]}C50 {y_source[s]} 50 {y_target[t]} 100 {y_target[t]}">'
        f"<title>{safe(found.source.names[s])} → {safe(found.target.names[t])}</title></path>"
        for t, s in found.carried
    ]
    if background:
        wires.append(f'<path class="background" d="M0 {height - ROW // 2}H100"/>')
    dropped, new = dict.fromkeys(found.dropped, "d"), dict.fromkeys(found.new, "n")
    boxes = [f'style="padding-top:{top}px;height:{height}px"' for top in tops]
    tail = f'<li class="background" style="top:{height - ROW}px"><i></i>background</li>' * background
    sides = [
        f'<ul class="side s" {boxes[0]}>{_side(left, found.source, "s", dropped, space)}{tail}</ul>',
        f'<ul class="side t" {boxes[1]}>{_side(right, found.target, "t", new, space)}{tail}</ul>',
    ]
    return (
        f'{_sides(found)}<div class="picture">{sides[0]}<svg class="wires" height="{height}" '
        f'viewBox="0 0 100 {height}" preserveAspectRatio="none">{"".join(wires)}</svg>{sides[1]}</div>'
    )


def _side(runs: list[Run], table: ClassTable, side: str, states: Mapping[int, str], space: str) -> str:
    rows = []
    for run in runs:
        css = states.get(run[0], "c")
        if len(run) > 1:
            folded = _folded(css, f"{len(run)} {WORDS[css]}", run, table, only=f"{space} {side}")
            rows.append(f'<li class="{css}">{folded}</li>')
        else:
            tag = f"<em>{WORDS[css]}</em>" * (css != "c")
            rows.append(f'<li class="{css}" data-{side}="{run[0]}">{_name(table, run[0])}{tag}</li>')
    return "".join(rows)


def _overview(found: ClassMap) -> str:
    """Draw both tables as bars to scale, the file's in the model's order, so that ribbons never cross."""
    h = _OVERVIEW_HEIGHT
    y_t, y_s = h / len(found.target), h / len(found.source)
    place: dict[int, int] = {}
    ribbons: list[list[int]] = []
    for t, s in found.carried:
        if s in place:
            continue
        p = place[s] = len(place)
        # A gap of less than half a pixel cannot be seen, and the number of ribbons stays bounded.
        if ribbons and (t - ribbons[-1][1]) * y_t < 0.5:
            ribbons[-1][1], ribbons[-1][3] = t + 1, p + 1
        else:
            ribbons.append([t, t + 1, p, p + 1])
    drawn = []
    for t0, t1, p0, p1 in ribbons:
        a, b, c, d = (f"{y:.1f}" for y in (p0 * y_s, p1 * y_s, t0 * y_t, max(t1 * y_t, t0 * y_t + 0.6)))
        share = f' fill-opacity="{(p1 - p0) / (t1 - t0):.2f}"' if p1 - p0 < t1 - t0 else ""
        drawn.append(f'<path d="M16 {a}C500 {a} 500 {c} 984 {c}V{d}C500 {d} 500 {b} 16 {b}Z"/>')
        drawn.append(f'<path class="bar" d="M986 {c}H1000V{d}H986Z"{share}/>')
    carried, dropped, new = len(place), len(found.source) - len(place), len(found.new)
    labels = [
        _bar_labels("", [("c", carried, "carried"), ("d", dropped, "dropped")]),
        _bar_labels(" mixed", [("c", len(found.target) - new, "carried"), ("n", new, "new")]),
    ]
    return (
        f'{_sides(found)}<div class="overview" style="height:{h}px">{labels[0]}<svg aria-hidden="true" '
        f'viewBox="0 0 1000 {h}" preserveAspectRatio="none"><rect class="c" width="14" height="{carried * y_s:.1f}"/>'
        f'<rect class="d" width="14" y="{carried * y_s:.1f}" height="{dropped * y_s:.1f}"/>'
        f'<rect class="n" x="986" width="14" height="{h}"/>{"".join(drawn)}</svg>{labels[1]}</div>'
        '<p class="caption">To scale; the classes of the file are sorted into the order of the model.</p>'
    )


def _bar_labels(css_more: str, parts: Iterable[tuple[str, int, str]]) -> str:
    labels = "".join(
        f'<li class="{css}" style="flex-grow:{count}">{commas(count)} {word}</li>'
        for css, count, word in parts
        if count
    )
    return f'<ul class="labels{css_more}">{labels}</ul>'


def _ledger(found: ClassMap, background: bool) -> str:
    """List the model's classes in their order, each carried one beside its source; then the dropped ones."""
    count, new, renamed = len(found.target), set(found.new), set(split_renamed(found)[1])
    runs = _runs(count, new, 3 if len(new) > OPEN_MOST else count + 1)
    parts: list[str] = []
    if len(runs) <= LEDGER_ROWS:
        for folded, group in groupby(runs, key=lambda run: len(run) > 1):
            if folded:
                parts += [_folded("n", f"{commas(len(run))} new", run, found.target) for run in group]
            else:
                parts.append(_ledger_rows(found, [run[0] for run in group], renamed))
    else:
        step = max(40, math.ceil(count / 120))
        for start in range(0, count, step):
            run = range(start, min(start + step, count))
            fresh = sum(t in new for t in run)
            numbers = [(len(run) - fresh, "carried"), (fresh, "new")]
            label = ", ".join(f"{commas(number)} {word}" for number, word in numbers if number)
            css = "c" if not fresh else "n" if fresh == len(run) else "m"
            parts.append(_folded(css, label, run, found.target, _ledger_rows(found, run, renamed)))
    tail = '<p class="background">Background is carried too.</p>' * background
    if found.dropped:
        tail += _folded("d", f"{commas(len(found.dropped))} dropped", found.dropped, found.source)
    return f'<div class="ledger">{"".join(parts)}</div>{tail}'


def _ledger_rows(found: ClassMap, run: Run, renamed: set[tuple[int, int]]) -> str:
    return f'<ul class="pairs">{"".join(_ledger_row(found, t, renamed) for t in run)}</ul>'


def _ledger_row(found: ClassMap, t: int, renamed: set[tuple[int, int]]) -> str:
    s = found.rows[t]
    if s is None:
        return f'<li class="n"><em>new</em>{_name(found.target, t)}</li>'
    line = f'<svg viewBox="0 0 48 8"><path class="link{" alias" * ((t, s) in renamed)}" d="M0 4H48"/></svg>'
    return f'<li class="c">{_name(found.source, s)}{line}{_name(found.target, t)}</li>'
