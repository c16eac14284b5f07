"""Plans and results in words: one line, a table, JSON. Pure functions from a plan to text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tabulate import tabulate

from .classes import ClassTable, shorten
from .plan import ACTIONS, AdaptPlan, TensorPlan


def summary_line(plan: AdaptPlan) -> str:
    """What was carried and what is new, by label space, and what happened to the tensors, in one line."""
    parts: list[str] = []
    for space, count in plan.summary()["classes"].items():
        source, target = plan.source.get(space), plan.target.get(space)
        if target is None:
            continue
        words = [f"{count['carried']} of {len(target)} {space} classes carried"]
        if source is not None:
            words[0] += f" from {source.origin} ({len(source)})"
        if count["new"]:
            words.append(f"{count['new']} new ({shorten(plan.new_classes().get(space, ()))})")
        if count["dropped"]:
            words.append(f"{count['dropped']} dropped")
        parts.append(", ".join(words))
    unverified = sum(not t.verified and t.action == "copied" for t in plan.tensors)
    tensors = plan.summary()["actions"]
    parts.append("tensors: " + ", ".join(f"{tensors[action]} {action}" for action in ACTIONS if tensors[action]))
    if unverified:
        parts.append(f"{unverified} of them unverified")
    return "; ".join(parts)


def plan_table(plan: AdaptPlan, *, every_tensor: bool = False) -> str:
    """The plan as a table: head tensors one by one, the rest as counts.

    Args:
        plan: any plan.
        every_tensor: also list the tensors that have no classes.
    """
    rows = [_row(t, plan) for t in plan.tensors if every_tensor or _is_head(t) or t.action == "refused"]
    text = (
        [tabulate(rows, headers=["tensor", "action", "file", "model", "classes"], disable_numparse=True)]
        if rows
        else []
    )
    for (action, reason), names in _rest(plan).items():
        if not every_tensor:
            text.append(f"{len(names)} other tensor{'s' * (len(names) != 1)} {action}{reason}: {shorten(names, 3)}")
    text += [line for space in sorted({*plan.source, *plan.target}) for line in _class_lines(plan, space)]
    text.append(summary_line(plan))
    return "\n".join(text)


def plan_json(plan: AdaptPlan) -> str:
    """The stable JSON of a plan."""
    return json.dumps(plan.to_json(), indent=1, ensure_ascii=False) + "\n"


def _is_head(t: TensorPlan) -> bool:
    return t.space is not None


def _row(t: TensorPlan, plan: AdaptPlan) -> list[str]:
    words: list[str] = []
    if t.carried and t.action == "carried":
        words.append(f"{len(t.carried)} carried")
    if t.new:
        words.append(f"{len(t.new)} new")
    if t.dropped:
        words.append(f"{len(t.dropped)} dropped")
    if t.background and t.action != "copied":
        words.append("background carried")
    if t.reason:
        words.append(t.reason)
    return [t.name, t.action, _shape(t.source_shape), _shape(t.target_shape), ", ".join(words)]


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "(" + ", ".join(map(str, shape)) + ")"


def _rest(plan: AdaptPlan) -> dict[tuple[str, str], list[str]]:
    rest: dict[tuple[str, str], list[str]] = {}
    for t in plan.tensors:
        if not _is_head(t) and t.action != "refused":
            reason = f" ({t.reason})" if t.reason and t.action != "copied" else ""
            rest.setdefault((t.action, reason), []).append(t.name)
    return rest


def _class_lines(plan: AdaptPlan, space: str) -> list[str]:
    found = plan.class_map(space)
    if found is None:
        return []
    lines: list[str] = []
    renamed = [f"{_name(found.target, t)}={_name(found.source, s)}" for t, s in found.carried]
    renamed = [pair for pair in renamed if pair.split("=")[0] != pair.split("=")[1]]
    if renamed:
        lines.append(f"{space} classes carried under another name: {shorten(renamed, 12)}")
    if found.new:
        lines.append(f"{space} classes that are new: {shorten([_name(found.target, t) for t in found.new], 12)}")
    if found.shared:
        shared = [_name(found.source, s) for s in found.shared]
        lines.append(f"{space} classes of the file that feed several: {shorten(shared, 12)}")
    return lines


def _name(table: ClassTable, i: int) -> str:
    return table.names[i]
