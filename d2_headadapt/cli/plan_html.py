"""Render a plan as one self-contained HTML page: notices, counts, the class map as a picture, every tensor.

The page asks the network for nothing, is the same bytes for the same plan, and can be read without its script.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources

from ..adapt.plan import ACTIONS, AdaptPlan, TensorPlan
from ..adapt.report import is_head, plan_notices, plan_spaces, shape_text, summary_line
from .class_picture import WORDS, breakable, commas, safe, space_section


def plan_html(plan: AdaptPlan, *, title: str = "Checkpoint plan", notes: Sequence[str] = ()) -> str:
    """Render the plan as the text of one HTML page.

    Args:
        plan: any plan, a refused one too.
        title: heading and title of the page.
        notes: sentences to show under the summary (which file, which config).

    Returns:
        HTML without references to anything outside it; about 200 bytes per class beside the names.
    """
    script = _data("plan.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # A second lock behind the escaping: the browser itself runs no script but this one and opens no connection.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    body = [
        _header(plan, title, notes),
        _notices(plan),
        _tiles(plan),
        *(space_section(plan, space) for space in plan_spaces(plan)),
        _head_table(plan),
        _other_tensors(plan),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{safe(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>\n{_data('plan.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )
    # A lone surrogate, which JSON can smuggle into a name, cannot be written to a file.
    return page.encode("utf-8", "replace").decode("utf-8")


def _data(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _header(plan: AdaptPlan, title: str, notes: Sequence[str]) -> str:
    levels = {notice.code for notice in plan_notices(plan)}
    if "refused" in levels:
        verdict = ("refused", "Refused: nothing would be loaded")
    elif "discarded" in levels:
        verdict = ("discarded", "Loads, but a trained head of the file is not used")
    elif "unverified" in levels:
        verdict = ("unverified", "Loads, but not everything is verified")
    elif "near" in levels:
        verdict = ("near", "Loads; new classes look like dropped ones")
    elif "initialised" in levels:
        verdict = ("initialised", "Loads; a head starts from initial values")
    else:
        verdict = ("fine", "Loads")
    notes_list = "".join(f"<li>{safe(note)}</li>" for note in notes)
    return (
        f'<header>\n<p class="verdict {verdict[0]}">{verdict[1]}</p>\n<h1>{safe(title)}</h1>\n'
        f'<p class="summary">{safe(summary_line(plan))}</p>\n'
        + (f'<ul class="notes">{notes_list}</ul>\n' if notes else "")
        + "</header>"
    )


def _notices(plan: AdaptPlan) -> str:
    boxes = []
    for number, notice in enumerate(plan_notices(plan), 1):
        names = "".join(f"<li><code>{breakable(name)}</code></li>" for name in notice.tensors)
        hint = f" <span>{safe(notice.hint)}</span>" if notice.hint else ""
        boxes.append(
            f'<li class="{notice.code}"><strong>{number}. {notice.code}</strong><div><p>{breakable(notice.where)}</p>'
            f'<p class="why">{safe(notice.found)}</p>'
            + (f'<p class="type">Type <code>{safe(notice.type_this)}</code>{hint}</p>' if notice.type_this else "")
            + (f"<details><summary>tensors</summary><ul>{names}</ul></details>" if len(notice.tensors) > 1 else "")
            + "</div></li>"
        )
    return f'<section aria-label="Look at these first"><ul class="alerts">{"".join(boxes)}</ul></section>' * bool(boxes)


def _tiles(plan: AdaptPlan) -> str:
    summary = plan.summary()
    tiles = []
    for space, count in summary["classes"].items():
        total = count["carried"] + count["new"]
        parts = [(letter, count[word], word) for letter, word in WORDS.items()]
        if total:
            tiles.append(_tile(f"{space} classes", commas(count["carried"]), f"of {commas(total)} carried", parts))
    parts = [(action, summary["actions"][action], action) for action in ACTIONS if summary["actions"][action]]
    tiles.append(_tile("tensors", commas(len(plan.tensors)), "in file and model", parts))
    in_file = sum(t.source_shape is not None for t in plan.tensors)
    submodules = [f"{name} {found}/{count}" for name, (found, count) in plan.coverage_by_submodule().items()]
    where = ", ".join(submodules[:6]) + (f", {len(submodules) - 6} more" if len(submodules) > 6 else "")
    share = math.floor(100 * plan.coverage)
    carried, total = plan.class_coverage
    classes = f", and {commas(carried)} of {commas(total)} classes are carried" if total else ""
    tiles.append(
        f'<div class="tile"><h2>coverage</h2><p class="big">{share}% <small>of {commas(in_file)} tensors in the file '
        f"find a place{classes}</small></p><p>{breakable(where)}</p></div>"
    )
    return f'<section class="tiles" aria-label="Counts">{"".join(tiles)}</section>'


def _tile(title: str, big: str, small: str, parts: Sequence[tuple[str, int, str]]) -> str:
    bar = "".join(f'<span class="{css}" style="flex-grow:{count}"></span>' for css, count, _ in parts if count)
    legend = "".join(f'<li class="{css}">{commas(count)} {word}</li>' for css, count, word in parts)
    return (
        f'<div class="tile"><h2>{safe(title)}</h2><p class="big">{big} <small>{small}</small></p>'
        f'<div class="bar" aria-hidden="true">{bar}</div><ul class="key">{legend}</ul></div>'
    )


def _head_table(plan: AdaptPlan) -> str:
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
            layout = plan.layout(t.name)
            kind = f"<small>{safe(layout.describe())}</small>" if layout is not None else ""
            has_fixed = layout is not None and layout.extra and t.action in ("carried", "copied", "initialised")
            fixed = ("from the file" if t.background else "initial") if has_fixed else "-"
            by_shape = t.action == "copied" and not t.verified
            state = "copied, unverified" if by_shape else t.action
            why = f"see note {notes[t.name]}" if t.name in notes else t.reason
            numbers = "".join(f"<td>{commas(len(x)) if x else '-'}</td>" for x in (t.carried, t.new, t.dropped))
            rows.append(
                f'<tr><th scope="row"><code>{breakable(t.name)}</code>{kind}</th>'
                f'<td><span class="pill {"unverified" if by_shape else t.action}">{state}</span></td>'
                f"<td>{shape_text(t.source_shape)}</td><td>{shape_text(t.target_shape)}</td>{numbers}<td>{fixed}</td>"
                + (f'<td class="why">{safe(why)}</td></tr>' if columns[-1] == "why" else "</tr>")
            )
        head = f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{breakable(group or "-")}</th></tr>'
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
            f'<tr><th scope="row"><code>{breakable(t.name)}</code></th><td>{shape_text(t.source_shape)}</td>'
            f'<td>{shape_text(t.target_shape)}</td><td class="why">{safe(t.reason)}</td></tr>'
            for t in tensors
        )
        amount = sum(math.prod(t.target_shape or t.source_shape or (0,)) for t in tensors)
        blocks.append(
            f'<details class="rest"><summary><span class="pill {action}">{action}</span> <code>{safe(part)}</code> '
            f"<span>{commas(len(tensors))} tensor{'s' * (len(tensors) != 1)}, {commas(amount)} numbers</span>"
            '</summary><div class="scroll"><table><thead><tr><th scope="col">tensor</th>'
            '<th scope="col">in the file</th><th scope="col">in the model</th><th scope="col">why</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    return f'<section class="card"><h2>Other tensors</h2>{"".join(blocks)}</section>' * bool(blocks)
