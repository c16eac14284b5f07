"""Render plans as text: one line, a table, GitHub-style tables, JSON. Pure functions from a plan to text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from ..errors import Finding, PlanRefused, Severity, visible
from ..key import HEAD_ADAPT, Key
from .causes import Cause, Why, sentence
from .classes import SPACES, ClassMap, ClassTable, is_unnamed, normalise, shorten
from .near import near_names
from .plan import ACTIONS, AdaptPlan, TensorPlan
from .planner import source_key
from .vocabularies import vocabularies_of

_HEADERS = ("head group", "tensor", "action", "in the file", "in the model", "classes")
_ALIAS_MOST = 12
LEAST_TO_GUESS = 17
"""Classes (COCO's keypoints) from which on a count alone points to a vocabulary."""


LEVELS = ("refused", "discarded", "unverified", "near", "initialised")
"""Of notices, worst first: nothing is loaded; a head that the file has trained is not used; a head is loaded by shape
alone; a new class may be a dropped one under another spelling; a head starts afresh, as it must."""


@dataclass(frozen=True, eq=False)
class Notice(Finding):
    """A fact of a plan that a user should look at before anything runs.

    Its code is one of :data:`LEVELS`; ``where`` says what happens, in one sentence without a full stop, and ``found``
    is the plan's reason.

    Args:
        type_this: what to type about it, by itself; empty where there is nothing to type.
        hint: what to put into it.
        tensors: the tensors that it is about.
    """

    type_this: str
    hint: str
    tensors: tuple[str, ...]

    def line(self) -> str:
        """Say all of it in one line."""
        typed = f"; type: {self.type_this}" if self.type_this else ""
        return f"{self.code}: {self.where}: {self.found}{typed}{f' ({self.hint})' if typed and self.hint else ''}"


_KINDS: Mapping[str, tuple[Severity, str]] = {
    "refused": ("error", "tensors that fit the model, class by class"),
    "discarded": ("warning", "the head that the file has trained"),
    "unverified": ("warning", "a head whose classes are known on both sides"),
    "near": ("warning", "one name for what is the same class"),
    "initialised": ("note", "the head in the file, with classes that are known on both sides"),
}
"""Code of a notice -> its severity, and what would have been carried."""


def _notice(code: str, what: str, why: str, type_this: str, hint: str, tensors: tuple[str, ...]) -> Notice:
    severity, expected = _KINDS[code]
    what, why, type_this, hint = map(visible, (what, why, type_this, hint))
    fix = f"Type: {type_this}{f' ({hint})' if hint else ''}." if type_this else "There is nothing to type."
    if code == "discarded" and not type_this:
        fix = f"Build the head as the file has it, or name it in {HEAD_ADAPT.EXCLUDE} if it is to be trained anew."
    error = PlanRefused(what, expected=expected, found=why, fix=fix)
    return Notice(code, severity, error, type_this, hint, tensors)


def summary_line(plan: AdaptPlan) -> str:
    """Say in one line what was carried and what is new, by label space, and what happened to the tensors."""
    parts: list[str] = []
    summary = plan.summary()
    for space, count in summary["classes"].items():
        source, target = plan.source.get(space), plan.target.get(space)
        if target is None:
            continue
        found, new = plan.class_map(space), _new_names(plan, space)
        carried = len(_names(target, (t for t, _ in found.carried))) if found is not None else count["carried"]
        words = [f"{carried} of {len(target.named)} {space} classes carried"]
        if source is not None:
            words[0] += f" from {source.origin} ({len(source)})"
        if new:
            words.append(f"{len(new)} new ({shorten(new)})")
        if count["dropped"]:
            words.append(f"{count['dropped']} dropped")
        if len(target.named) < len(target):
            words.append(f"{_count(len(target) - len(target.named), 'row')} without a name")
        parts.append(", ".join(words))
    parts += [f"task {space} is not in the model" for space in removed_tasks(plan)]
    unverified = sum(not t.verified and t.action == "copied" for t in plan.tensors)
    tensors = summary["actions"]
    parts.append("tensors: " + ", ".join(f"{tensors[action]} {action}" for action in ACTIONS if tensors[action]))
    if unverified:
        parts.append(f"{unverified} of them unverified")
    return visible("; ".join(parts))


def plan_table(plan: AdaptPlan, *, every_tensor: bool = False, summary: bool = True) -> str:
    """Put a plan into one table: head tensors one by one under their group, the rest as counts, then classes by name.

    Args:
        plan: any plan.
        every_tensor: also list the tensors that have no classes.
        summary: end with :func:`summary_line`.

    Example:
        >>> from d2_headadapt import AdaptPlan, TensorPlan, plan_table
        >>> plan = AdaptPlan((TensorPlan("backbone.weight", "copied", None, None, (8, 8), (8, 8)),))
        >>> print(plan_table(plan, every_tensor=True, summary=False))
        head group    tensor           action    in the file    in the model    classes
        ------------  ---------------  --------  -------------  --------------  ---------
                      backbone.weight  copied    (8, 8)         (8, 8)
    """
    notices = plan_notices(plan)
    rows = _rows(plan, notices, every_tensor)
    text = [tabulate(rows, headers=_HEADERS, disable_numparse=True)] if rows else []
    if not every_tensor:
        text += [f"{counted} {action}{reason}: {names}" for action, reason, counted, names in _rest(plan)]
    text += plan.found
    text += [f"{title}: {names}" for space in plan_spaces(plan) for title, names in _class_lines(plan, space)]
    for number, notice in enumerate(notices, 1):
        text.append(f"note {number}, {notice.code}: {notice.where}: {notice.found}.")
        if notice.type_this:
            text.append(f"    type: {notice.type_this}" + (f"    ({notice.hint})" if notice.hint else ""))
    if summary:
        text.append(summary_line(plan))
    return "\n".join(text)


def plan_markdown(plan: AdaptPlan) -> str:
    """Put a plan into GitHub-style tables, for TensorBoard's text tab and for pull requests."""
    notices = plan_notices(plan)
    parts = [f"**{_markdown(summary_line(plan))}**"]
    for number, notice in enumerate(notices, 1):
        line = f"> **note {number}, {notice.code}:** {_markdown(notice.where)}: {_markdown(notice.found)}."
        parts.append(line + (f" Type {_code(notice.type_this)}" if notice.type_this else ""))
    classes = [line for space in plan_spaces(plan) for line in _class_lines(plan, space)]
    if classes:
        parts.append(_pipes(("classes", "names"), classes))
    rows = _rows(plan, notices, every_tensor=False)
    if rows:
        parts.append(_pipes(_HEADERS, rows))
    rest = [(counted, action + reason, names) for action, reason, counted, names in _rest(plan)]
    parts += [_markdown(line) for line in plan.found]
    if rest:
        parts.append(_pipes(("other tensors", "action", "names"), rest))
    return "\n\n".join(parts) + "\n"


def plan_json(plan: AdaptPlan) -> str:
    """Write the stable JSON of a plan."""
    return json.dumps(plan.to_json(), indent=1, ensure_ascii=False) + "\n"


def plan_notices(plan: AdaptPlan) -> tuple[Notice, ...]:
    """List what a user should look at, worst first, each with what to type."""
    notices = []
    for t in plan.refused:
        refused_here = Why(Cause.GROUP_REFUSED, blame=t.name)
        stopped = tuple(other.name for other in plan.tensors if other.why == refused_here)
        what = f"{t.name} is refused, so nothing is loaded"
        notices.append(_notice("refused", what, t.reason, *_command(t, plan), (t.name, *stopped)))
    if plan.loads_nothing and not notices:
        why = "the model finds none of its tensors in it"
        notices.append(_notice("refused", "the file gives this model nothing", why, "", "", ()))
    for space in plan.assumed:
        table, key = plan.source[space], source_key(space)
        what = f"the {len(table)} {space} classes of the file are assumed ({shorten(table.names)})"
        why = "it was made from weights whose classes nobody named"
        names = tuple(t.name for t in plan.by_action("copied", "carried") if t.space == space)
        notices.append(_notice("unverified", what, why, str(key.set("names.txt")), "where they are others", names))
    by_shape = [t for t in plan.by_action("copied") if not t.verified]
    for (group, root), tensors in _grouped(by_shape).items():
        what = f"{_count(len(tensors), 'tensor')} {f'of {group} ' if group else ''}copied by shape alone"
        names = tuple(t.name for t in tensors)
        notices.append(_notice("unverified", what, sentence(root, root=True), *_command(tensors[0], plan), names))
    for (group, root), tensors in _grouped(plan.by_action("initialised")).items():
        what = f"{_count(len(tensors), 'tensor')} of {group} keep{'s' * (len(tensors) == 1)} the model's initial values"
        trained = root.cause.surprising and any(t.source_shape for t in tensors)
        level = "discarded" if trained else "initialised"
        names = tuple(t.name for t in tensors)
        notices.append(_notice(level, what, sentence(root, root=True), *_command(tensors[0], plan), names))
    notices += [notice for space in sorted(plan.maps) for notice in _near_notice(plan, space)]
    return tuple(sorted(notices, key=lambda notice: LEVELS.index(notice.code)))


def _near_notice(plan: AdaptPlan, space: str) -> Iterator[Notice]:
    """Return what to type where new classes have near names among those of the file that nobody takes."""
    found = near_names(plan.maps[space])
    # Where nothing of the space is taken from the file, an alias changes nothing.
    if not found or not any(t.space == space for t in plan.by_action("copied", "carried")):
        return
    one = len(found) == 1
    what = f"{len(found)} new {space} class{' has a name' if one else 'es have names'} near to dropped ones"
    pairs = [f"{_quoted(near.target)} and {_quoted(near.source)} ({near.likeness.value})" for near in found]
    aliases = [f"{near.target}={near.source}" for near in found]
    hint = "if they mean the same; else leave it"
    yield _notice("near", what, shorten(pairs), str(HEAD_ADAPT.ALIASES.set(shlex.quote(str(aliases)))), hint, ())


def _quoted(name: str) -> str:
    return repr(" ".join(name.split()))


def plan_spaces(plan: AdaptPlan) -> list[str]:
    """List the label spaces that the plan's tensors or tables name, and the tasks that only the file has, sorted."""
    used = {t.space for t in plan.tensors if t.space is not None}
    return sorted(used | {space for space in plan.target if space in plan.source} | set(removed_tasks(plan)))


def removed_tasks(plan: AdaptPlan) -> list[str]:
    """List the tasks of the file that the model does not have."""
    return sorted(plan.source.keys() - {layout.space for layout in plan.layouts} - set(SPACES))


def added_tasks(plan: AdaptPlan) -> list[str]:
    """List the tasks of the model that the file does not have."""
    found = {layout.space for layout in plan.layouts} & plan.target.keys()
    return sorted(found - plan.source.keys() - set(SPACES) - {t.space for t in plan.tensors if t.source_shape})


def shape_text(shape: Sequence[int] | None) -> str:
    """Write a shape as ``(81, 1024)``; a dash where there is no tensor."""
    return "-" if shape is None else "(" + ", ".join(map(str, shape)) + ")"


def is_head(t: TensorPlan) -> bool:
    """Tell whether the tensor belongs to a label space."""
    return t.space is not None


def _grouped(tensors: Iterable[TensorPlan]) -> dict[tuple[str, Why], list[TensorPlan]]:
    """Collect tensors by head group and by the root cause of what happens to the group."""
    found: dict[tuple[str, Why], list[TensorPlan]] = {}
    without_group: Why | None = None
    for t in tensors:
        why = replace(t.why, blame="")
        if not t.group:
            # Each of them has facts of its own; one notice, with those of the first, is enough for them.
            why = without_group = without_group or why
        found.setdefault((t.group or "", why), []).append(t)
    return found


def _command(t: TensorPlan, plan: AdaptPlan) -> tuple[str, str]:
    """Name what to type about a tensor, and what to put into it."""
    if t.cause is Cause.UNKNOWN_HEAD:
        more = f"or {HEAD_ADAPT.UNKNOWN_HEADS.set('reinitialise')!s}"
        where = "in a module that --import names"
        if t.why.names:
            return t.why.names[0], ", ".join([where, *(f"or {line}" for line in t.why.names[1:]), more])
        return str(HEAD_ADAPT.UNKNOWN_HEADS.set("reinitialise")), "or give its module a head_layouts method"
    if t.cause is Cause.UNKNOWN_KEPT:
        return str(HEAD_ADAPT.UNKNOWN_HEADS.set("refuse")), "to see the line that declares its layout"
    if t.space is None:
        return "register_head_layout(...)", "in your own code, if its rows are classes"
    if t.cause in (Cause.SHAPES_AGREE, Cause.UNKNOWN_CLASSES, Cause.TABLE_MISFIT):
        of_model = t.why.side == "model"
        side, table = ("the model", plan.target) if of_model else ("the file", plan.source)
        shape = t.target_shape if of_model else t.source_shape
        layout = plan.layout(t.name)
        count = layout.num_classes(shape) if layout is not None and layout.axes and shape is not None else None
        holds = f"; the shapes of {side} hold {count}" if count else ""
        verb = "corrected " if t.space in table else ""
        named = Key(t.why.key)
        guess = "" if of_model else probable_vocabulary(count or 0, t.space)
        if guess:
            hint = f"{count} rows: probably {guess}; else a dataset, a file or a list of names"
            return str(named.set(guess)), hint
        return str(named.set("names.txt")), f"or a {verb}dataset, vocabulary, .json file or list of names{holds}"
    return "", ""


def probable_vocabulary(count: int, space: str) -> str:
    """Guess the vocabulary that a file with so many unnamed classes was trained on; empty where none is likely.

    Small numbers fit everybody's list.
    """
    return next(iter(vocabularies_of(count, space)), "") if count >= LEAST_TO_GUESS else ""


def _rows(plan: AdaptPlan, notices: Sequence[Notice], every_tensor: bool) -> list[list[str]]:
    notes = {name: number for number, notice in enumerate(notices, 1) for name in notice.tensors}
    by_group: dict[str, list[TensorPlan]] = {}
    for t in plan.tensors:
        if every_tensor or is_head(t) or t.action == "refused":
            by_group.setdefault(t.group or "", []).append(t)
    rows: list[list[str]] = []
    for group in sorted(by_group, key=lambda group: not group):
        for i, t in enumerate(by_group[group]):
            words = [*counts_in_words(t), f"see note {notes[t.name]}" if t.name in notes else t.reason]
            cells = [t.name, t.action, shape_text(t.source_shape), shape_text(t.target_shape)]
            rows.append([visible(c) for c in (group * (i == 0), *cells, ", ".join(filter(None, words)))])
    return rows


def counts_in_words(t: TensorPlan) -> list[str]:
    """Count in words, ``10 carried``, ``4 new``, ``70 dropped``, ``background carried``, leaving out zeros."""
    counts = ((t.carried if t.action == "carried" else (), "carried"), (t.new, "new"), (t.dropped, "dropped"))
    words = [f"{len(classes)} {what}" for classes, what in counts if classes]
    return words + ["background carried"] * (t.background and t.action != "copied")


def _rest(plan: AdaptPlan) -> list[tuple[str, str, str, str]]:
    """Sum up tensors without classes: action, reason in brackets, count, first names."""
    rest: dict[tuple[str, str], list[str]] = {}
    for t in plan.tensors:
        if not is_head(t) and t.action != "refused":
            reason = f" ({t.reason})" if t.reason and t.action != "copied" else ""
            rest.setdefault((t.action, reason), []).append(t.name)
    return [
        (action, reason, _count(len(names), "other tensor"), shorten(names, 3))
        for (action, reason), names in rest.items()
    ]


def _class_lines(plan: AdaptPlan, space: str) -> list[tuple[str, str]]:
    found = plan.class_map(space)
    if found is None and space in removed_tasks(plan):
        return [(f"{space} classes of the file that are dropped", shorten(plan.source[space].names, _ALIAS_MOST))]
    if found is None and space in added_tasks(plan):
        return [(f"{space} classes that are new", shorten(plan.target[space].names, _ALIAS_MOST))]
    if found is None:
        return []
    same, renamed = split_renamed(found)
    other_names = [f"{found.target.names[t]}={found.source.names[s]}" for t, s in renamed]
    lines = [
        ("carried", _names(found.target, (t for t, _ in same))),
        ("carried under another name", other_names),
        ("that are new", _names(found.target, found.new)),
        ("of the file that are dropped", _names(found.source, found.dropped)),
        ("of the file that feed several", _names(found.source, found.shared)),
    ]
    return [(visible(f"{space} classes {title}"), shorten(names, _ALIAS_MOST)) for title, names in lines if names]


def split_renamed(found: ClassMap) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split the carried pairs of a map: those of one name, up to case and separators, and those of two."""
    same: list[tuple[int, int]] = []
    renamed: list[tuple[int, int]] = []
    for t, s in found.carried:
        (same if normalise(found.target.names[t]) == normalise(found.source.names[s]) else renamed).append((t, s))
    return same, renamed


def _new_names(plan: AdaptPlan, space: str) -> list[str]:
    """List the classes that no head of the space finds in the file; a head missing from the file has its own notice."""
    found = plan.class_map(space)
    if found is None:
        return [name for name in plan.new_classes().get(space, ()) if not is_unnamed(name)]
    return _names(found.target, found.new)


def _names(table: ClassTable, indices: Iterable[int]) -> list[str]:
    return [visible(table.names[i]) for i in indices if not is_unnamed(table.names[i])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _pipes(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(headers), " | ".join("---" for _ in headers)]
    lines += [" | ".join(_markdown(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _markdown(text: str) -> str:
    """Escape ``text`` for Markdown; class names may hold anything."""
    return re.sub(r"([\\`*_|\[\]~])", r"\\\1", visible(text)).replace("&", "&amp;").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`"
