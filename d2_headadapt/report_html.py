"""A plan as one self-contained HTML page: what to look at, counts, the class map as a picture, every tensor.

The page asks the network for nothing, is the same bytes for the same plan, and can be read without its script. A class
map of few lines is one picture, with the classes of the file on the left in their own order. A larger one is an
overview (the file's classes sorted into the model's order, so that no line crosses another) and a ledger of rows.

    t, s    indices of a target class (the model's) and of a source class (the file's)
    run     neighbouring class indices that are drawn together
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import groupby

from .classes import ClassMap, ClassTable
from .plan import ACTIONS, AdaptPlan, TensorPlan
from .report import is_head, plan_notices, plan_spaces, shape_text, split_renamed, summary_line

ROW = 26
"""Height of a row of the picture, in pixels."""

PICTURE_LINES, PICTURE_ROWS = 48, 64
"""The largest picture; beyond them comes the ledger."""

LEDGER_ROWS, OPEN_MOST = 320, 40
"""The most rows that a ledger shows unfolded, and the most new classes that it does not fold into runs."""

_OVERVIEW_HEIGHT = 300
_WORDS = {"c": "carried", "n": "new", "d": "dropped"}
_BAD_CHARACTERS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
Run = Sequence[int]


def plan_html(plan: AdaptPlan, *, title: str = "Checkpoint plan", notes: Sequence[str] = ()) -> str:
    """The plan as the text of one HTML page.

    Args:
        plan: any plan, a refused one too.
        title: heading and title of the page.
        notes: sentences to show under the summary (which file, which config).

    Returns:
        HTML without references to anything outside it; about 200 bytes per class beside the names.
    """
    script = _data("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # A second lock behind the escaping: the browser itself runs no script but this one and opens no connection.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    body = [
        _header(plan, title, notes),
        _notices(plan),
        _tiles(plan),
        *(_space(plan, space) for space in plan_spaces(plan)),
        _head_table(plan),
        _other_tensors(plan),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_data('report.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )
    # A lone surrogate, which JSON can smuggle into a name, cannot be written to a file.
    return page.encode("utf-8", "replace").decode("utf-8")


def _data(name: str) -> str:
    return resources.files("d2_headadapt").joinpath("data", name).read_text(encoding="utf-8")


def _text(text: object) -> str:
    return escape(str(text).translate(_BAD_CHARACTERS))


def _breakable(name: str) -> str:
    """A dotted tensor name that may wrap at its dots."""
    return _text(name).replace(".", "<wbr>.")


def _number(count: int) -> str:
    return f"{count:,}"


def _header(plan: AdaptPlan, title: str, notes: Sequence[str]) -> str:
    levels = {notice.level for notice in plan_notices(plan)}
    if "refused" in levels:
        verdict = ("refused", "Refused: nothing would be loaded")
    elif "unverified" in levels:
        verdict = ("unverified", "Loads, but not everything is verified")
    elif "initialised" in levels:
        verdict = ("initialised", "Loads; a head starts from initial values")
    else:
        verdict = ("fine", "Loads")
    notes_list = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return (
        f'<header>\n<p class="verdict {verdict[0]}">{verdict[1]}</p>\n<h1>{_text(title)}</h1>\n'
        f'<p class="summary">{_text(summary_line(plan))}</p>\n'
        + (f'<ul class="notes">{notes_list}</ul>\n' if notes else "")
        + "</header>"
    )


def _notices(plan: AdaptPlan) -> str:
    boxes = []
    for number, notice in enumerate(plan_notices(plan), 1):
        names = "".join(f"<li><code>{_breakable(name)}</code></li>" for name in notice.tensors)
        hint = f" <span>{_text(notice.hint)}</span>" if notice.hint else ""
        boxes.append(
            f'<li class="{notice.level}"><strong>{number}. {notice.level}</strong><div><p>{_breakable(notice.what)}</p>'
            f'<p class="why">{_text(notice.why)}</p>'
            + (f'<p class="type">Type <code>{_text(notice.type_this)}</code>{hint}</p>' if notice.type_this else "")
            + (f"<details><summary>tensors</summary><ul>{names}</ul></details>" if len(notice.tensors) > 1 else "")
            + "</div></li>"
        )
    return f'<section aria-label="Look at these first"><ul class="alerts">{"".join(boxes)}</ul></section>' * bool(boxes)


def _tiles(plan: AdaptPlan) -> str:
    summary = plan.summary()
    tiles = []
    for space, count in summary["classes"].items():
        total = count["carried"] + count["new"]
        parts = [(letter, count[word], word) for letter, word in _WORDS.items()]
        if total:
            tiles.append(_tile(f"{space} classes", _number(count["carried"]), f"of {_number(total)} carried", parts))
    parts = [(action, summary["actions"][action], action) for action in ACTIONS if summary["actions"][action]]
    tiles.append(_tile("tensors", _number(len(plan.tensors)), "in file and model", parts))
    in_file = sum(t.source_shape is not None for t in plan.tensors)
    submodules = [f"{name} {found}/{count}" for name, (found, count) in plan.coverage_by_submodule().items()]
    where = ", ".join(submodules[:6]) + (f", {len(submodules) - 6} more" if len(submodules) > 6 else "")
    share = math.floor(100 * plan.coverage)
    tiles.append(
        f'<div class="tile"><h2>coverage</h2><p class="big">{share}% <small>of {_number(in_file)} tensors in the file '
        f"find a place</small></p><p>{_breakable(where)}</p></div>"
    )
    return f'<section class="tiles" aria-label="Counts">{"".join(tiles)}</section>'


def _tile(title: str, big: str, small: str, parts: Sequence[tuple[str, int, str]]) -> str:
    bar = "".join(f'<span class="{css}" style="flex-grow:{count}"></span>' for css, count, _ in parts if count)
    legend = "".join(f'<li class="{css}">{_number(count)} {word}</li>' for css, count, word in parts)
    return (
        f'<div class="tile"><h2>{_text(title)}</h2><p class="big">{big} <small>{small}</small></p>'
        f'<div class="bar" aria-hidden="true">{bar}</div><ul class="key">{legend}</ul></div>'
    )


def _space(plan: AdaptPlan, space: str) -> str:
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
        f"{_number(counts[x])} {word}</label></li>"
        for x, word in _WORDS.items()
    )
    key += f'<li class="alias">{_number(renamed)} of the carried under another name</li>' * bool(renamed)
    stay = sum(t == s for t, s in found.carried)
    order = f"{_number(stay)} of {_number(counts['c'])} carried classes keep their number."
    if found.is_identity:
        order = "Same classes, same order: every row keeps its place."
    return (
        f'<section class="card space"><h2>{_text(space)} classes</h2><p>{order}</p>'
        f'<div class="tools"><ul class="key">{key}</ul><label class="find" hidden><output></output> Find a class '
        f'<input type="search" autocomplete="off"></label></div>\n{drawn}</section>'
    )


def _unmapped_space(plan: AdaptPlan, space: str) -> str:
    """Both lists by themselves, where no class of one is known to be a class of the other."""
    new = set(plan.new_classes().get(space, ()))
    known = [("file", plan.source.get(space)), ("model", plan.target.get(space))]
    why = "No class of this space is moved" if all(table for _, table in known) else "The classes are not all known"
    why += "; see the notes above." if plan_notices(plan) else "."
    lists = []
    for side, table in known:
        if table is not None:
            css, what = ("n", "new") if side == "model" and new.issuperset(table.names) else ("", "classes")
            label, opened = f"{_number(len(table))} {what}", len(table) <= OPEN_MOST
            lists.append(f"<h3>in the {side}: {_table_title(table)}</h3>")
            lists.append(_folded(css, label, range(len(table)), table, opened=opened))
    return f'<section class="card space"><h2>{_text(space)} classes</h2><p>{why}</p>{"".join(lists)}</section>'


def _table_title(table: ClassTable) -> str:
    return f"{_text(table.origin)} <small>{_number(len(table))} classes</small>"


def _sides(found: ClassMap) -> str:
    return (
        f'<p class="sides"><span>in the file: {_table_title(found.source)}</span>'
        f"<span>in the model: {_table_title(found.target)}</span></p>"
    )


def _runs(count: int, foldable: set[int], least: int) -> list[Run]:
    """0 .. count-1 in order; at least ``least`` foldable neighbours together, every other index alone."""
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
    """Index and name; the title helps where a long name is cut."""
    name = _text(table.names[i])
    title = f' title="{name}"' if len(table.names[i]) > 28 else ""
    return f"<i>{i}</i><b{title}>{name}</b>"


def _folded(
    css: str, label: str, run: Run, table: ClassTable, rows: str = "", *, only: str = "", opened: bool = False
) -> str:
    """A run of classes that opens to its rows; of those with the same ``only``, one is open at a time."""
    first, last = run[0], run[-1]
    ends = f"{_text(table.names[first])} … {_text(table.names[last])}" if len(run) > 1 else ""
    if ends and last - first == len(run) - 1 and not only:
        ends = f"{first}–{last}: {ends}"
    rows = rows or f"<ul>{''.join(f'<li>{_name(table, i)}</li>' for i in run)}</ul>"
    group = f' name="{_text(only)}"' if only else ""
    return (
        f'<details class="fold {css}"{group}{" open" * opened}><summary><strong>{label}</strong> '
        f"<span>{ends}</span></summary>{rows}</details>"
    )


def _picture(found: ClassMap, left: list[Run], right: list[Run], space: str, background: bool) -> str:
    """Both tables in their own order and a line for every carried pair."""
    rows = max(len(left), len(right)) + background
    tops = [(rows - background - len(side)) * ROW // 2 for side in (left, right)]
    height = rows * ROW
    y_source = {s: tops[0] + ROW * row + ROW // 2 for row, run in enumerate(left) for s in run}
    y_target = {t: tops[1] + ROW * row + ROW // 2 for row, run in enumerate(right) for t in run}
    renamed = set(split_renamed(found)[1])
    wires = [
        f'<path class="link{" alias" * ((t, s) in renamed)}" data-s="{s}" data-t="{t}" '
        f'd="M0 {y_source[s]}C50 {y_source[s]} 50 {y_target[t]} 100 {y_target[t]}">'
        f"<title>{_text(found.source.names[s])} → {_text(found.target.names[t])}</title></path>"
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
            folded = _folded(css, f"{len(run)} {_WORDS[css]}", run, table, only=f"{space} {side}")
            rows.append(f'<li class="{css}">{folded}</li>')
        else:
            tag = f"<em>{_WORDS[css]}</em>" * (css != "c")
            rows.append(f'<li class="{css}" data-{side}="{run[0]}">{_name(table, run[0])}{tag}</li>')
    return "".join(rows)


def _overview(found: ClassMap) -> str:
    """Both tables as bars to scale, the file's sorted into the model's order: ribbons that never cross."""
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
        drawn.append(f'<path d="M16 {a}C500 {a} 500 {c} 984 {c}V{d}C500 {d} 500 {b} 16 {b}Z"{share}/>')
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
        f'<li class="{css}" style="flex-grow:{count}">{_number(count)} {word}</li>'
        for css, count, word in parts
        if count
    )
    return f'<ul class="labels{css_more}">{labels}</ul>'


def _ledger(found: ClassMap, background: bool) -> str:
    """The model's classes in their order, each carried one beside its source; then the dropped ones."""
    count, new, renamed = len(found.target), set(found.new), set(split_renamed(found)[1])
    runs = _runs(count, new, 3 if len(new) > OPEN_MOST else count + 1)
    parts: list[str] = []
    if len(runs) <= LEDGER_ROWS:
        for folded, group in groupby(runs, key=lambda run: len(run) > 1):
            if folded:
                parts += [_folded("n", f"{_number(len(run))} new", run, found.target) for run in group]
            else:
                parts.append(_ledger_rows(found, [run[0] for run in group], renamed))
    else:
        step = max(40, math.ceil(count / 120))
        for start in range(0, count, step):
            run = range(start, min(start + step, count))
            fresh = sum(t in new for t in run)
            numbers = [(len(run) - fresh, "carried"), (fresh, "new")]
            label = ", ".join(f"{_number(number)} {word}" for number, word in numbers if number)
            css = "c" if not fresh else "n" if fresh == len(run) else "m"
            parts.append(_folded(css, label, run, found.target, _ledger_rows(found, run, renamed)))
    tail = '<p class="background">Background is carried too.</p>' * background
    if found.dropped:
        tail += _folded("d", f"{_number(len(found.dropped))} dropped", found.dropped, found.source)
    return f'<div class="ledger">{"".join(parts)}</div>{tail}'


def _ledger_rows(found: ClassMap, run: Run, renamed: set[tuple[int, int]]) -> str:
    return f'<ul class="pairs">{"".join(_ledger_row(found, t, renamed) for t in run)}</ul>'


def _ledger_row(found: ClassMap, t: int, renamed: set[tuple[int, int]]) -> str:
    s = found.rows[t]
    if s is None:
        return f'<li class="n"><em>new</em>{_name(found.target, t)}</li>'
    line = f'<svg viewBox="0 0 48 8"><path class="link{" alias" * ((t, s) in renamed)}" d="M0 4H48"/></svg>'
    return f'<li class="c">{_name(found.source, s)}{line}{_name(found.target, t)}</li>'


def _head_table(plan: AdaptPlan) -> str:
    layouts = {layout.tensor: layout for layout in plan.layouts}
    notes = {name: number for number, notice in enumerate(plan_notices(plan), 1) for name in notice.tensors}
    groups: dict[str, list[TensorPlan]] = {}
    for t in plan.tensors:
        if is_head(t):
            groups.setdefault(t.group or "", []).append(t)
    if not groups:
        return ""
    columns = ["tensor", "action", "in the file", "in the model", "carried", "new", "dropped", "background"]
    columns += ["why"] * any(t.reason for tensors in groups.values() for t in tensors)
    bodies = []
    for group, tensors in groups.items():
        rows = []
        for t in tensors:
            layout = layouts.get(t.name)
            kind = f"<small>{_text(layout.describe())}</small>" if layout is not None else ""
            has_fixed = layout is not None and layout.extra and t.action in ("carried", "copied", "initialised")
            fixed = ("from the file" if t.background else "initial") if has_fixed else "-"
            by_shape = t.action == "copied" and not t.verified
            state = "copied, unverified" if by_shape else t.action
            why = f"see note {notes[t.name]}" if t.name in notes else t.reason
            numbers = "".join(f"<td>{_number(len(x)) if x else '-'}</td>" for x in (t.carried, t.new, t.dropped))
            rows.append(
                f'<tr><th scope="row"><code>{_breakable(t.name)}</code>{kind}</th>'
                f'<td><span class="pill {"unverified" if by_shape else t.action}">{state}</span></td>'
                f"<td>{shape_text(t.source_shape)}</td><td>{shape_text(t.target_shape)}</td>{numbers}<td>{fixed}</td>"
                + (f'<td class="why">{_text(why)}</td></tr>' if columns[-1] == "why" else "</tr>")
            )
        head = f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{_breakable(group or "-")}</th></tr>'
        bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        '<section class="card"><h2>Head tensors</h2><p>A head group changes whole or not at all.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Head tensors"><table class="heads">'
        f"<thead><tr>{heads}</tr></thead>{''.join(bodies)}"
        "</table></div></section>"
    )


def _other_tensors(plan: AdaptPlan) -> str:
    found: dict[tuple[str, str], list[TensorPlan]] = {}
    for t in plan.tensors:
        if not is_head(t):
            found.setdefault((t.action, t.name.partition(".")[0]), []).append(t)
    blocks = []
    for (action, part), tensors in sorted(found.items(), key=lambda item: (-ACTIONS.index(item[0][0]), item[0][1])):
        rows = "".join(
            f'<tr><th scope="row"><code>{_breakable(t.name)}</code></th><td>{shape_text(t.source_shape)}</td>'
            f'<td>{shape_text(t.target_shape)}</td><td class="why">{_text(t.reason)}</td></tr>'
            for t in tensors
        )
        amount = sum(math.prod(t.target_shape or t.source_shape or (0,)) for t in tensors)
        blocks.append(
            f'<details class="rest"><summary><span class="pill {action}">{action}</span> <code>{_text(part)}</code> '
            f"<span>{_number(len(tensors))} tensor{'s' * (len(tensors) != 1)}, {_number(amount)} numbers</span>"
            '</summary><div class="scroll"><table><thead><tr><th scope="col">tensor</th>'
            '<th scope="col">in the file</th><th scope="col">in the model</th><th scope="col">why</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    return f'<section class="card"><h2>Other tensors</h2>{"".join(blocks)}</section>' * bool(blocks)
