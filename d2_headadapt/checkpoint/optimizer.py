"""Adapt optimizer state and averaged copies to another class list: the weights' row map, new rows zero.

A saved optimizer knows its parameters by number only, and the numbers move with FREEZE_AT, norm layers and tasks. So
names come from the file's provenance, else from the live optimizer where sizes and shapes leave no doubt.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapt.causes import Shape
from ..adapt.plan import AdaptPlan, TensorPlan, move_rows
from ..adapt.report import summary_line
from ..errors import ResumeError
from ..key import HEAD_ADAPT, MODEL, OUTPUT_DIR
from .keys import unwrapped
from .provenance import Provenance, optimizer_names

Names = Sequence[Sequence[str]]


def find_state(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Find every dict of ``checkpoint`` that holds an ``optimizer`` state: flat, or inside detectron2's trainers."""
    trainer = checkpoint.get("trainer")
    holders = [checkpoint, trainer, trainer.get("_trainer") if isinstance(trainer, Mapping) else None]
    return [h for h in holders if isinstance(h, dict) and isinstance(h.get("optimizer"), Mapping)
            and "param_groups" in h["optimizer"]]  # fmt: skip


def adapt_state(
    state: Mapping[str, Any], stored: Names, live: torch.optim.Optimizer, live_names: Names, plan: AdaptPlan, path: str
) -> dict[str, Any]:
    """Adapt the saved optimizer state to the live optimizer's parameters.

    Args:
        state: ``optimizer.state_dict()`` of the file.
        stored: parameter names of its groups, from provenance; empty where the file does not say.
        live: the optimizer that will load the result.
        live_names: names of its parameters, group by group.
        plan: what happened to the weights.
        path: the file, for messages.

    Returns:
        A new state dict in the live optimizer's numbering. State of carried rows has the saved bits, those of new
        rows are zero, and a parameter that was initialised has none.

    Raises:
        ResumeError: the parameters of the saved state cannot be told for certain.
    """
    names = stored if stored else _names_by_identity(state, live_names, plan, path)
    if [len(g) for g in names] != [len(g["params"]) for g in state["param_groups"]]:
        raise _unsure(path, "parameter names for every entry of the optimizer", "a list of another length")
    numbers = {
        name: number
        for group, entry in zip(names, state["param_groups"], strict=True)
        for name, number in zip(group, entry["params"], strict=True)
    }
    plans = {t.name: t for t in plan.tensors}
    groups: list[dict[str, Any]] = []
    moments: dict[int, Any] = {}
    count = 0
    for position, group in enumerate(live_names):
        origin = group_origin(group, names, position)
        settings = state["param_groups"][origin] if origin is not None else live.state_dict()["param_groups"][position]
        groups.append({**settings, "params": list(range(count, count + len(group)))})
        for name in group:
            entry = state["state"].get(numbers[name]) if name in numbers else None
            if entry is not None:
                moved = _adapt_entry(entry, plans.get(name), plan, name, path)
                if moved is not None:
                    moments[count] = moved
            count += 1
    return {**state, "state": moments, "param_groups": groups}


def group_origin(group: Sequence[str], stored: Names, position: int) -> int | None:
    """Find the saved group that most of a live group's parameters were in; ``None`` where none was saved."""
    known = [sum(name in set(names) for name in group) for names in stored]
    if not any(known):
        return None
    if position < len(known) and known[position] == max(known):
        return position
    return known.index(max(known))


def adapt_averages(
    checkpoint: dict[str, Any], plan: AdaptPlan, model: Mapping[str, torch.Tensor]
) -> tuple[list[str], list[str]]:
    """Send averaged copies of the model through the same plan, in place of the entries of ``checkpoint``.

    A copy is known by its content: a mapping at any depth with tensors of the model's names and of the shapes that the
    file has under ``model``, whatever it is called and however it is wrapped. A new row of an average starts where the
    model's row starts, as a new average would. Nothing is replaced where no tensor changes.

    Args:
        checkpoint: a file's content; entries that hold a copy are replaced by new ones.
        plan: what happened to the weights.
        model: the state dict that the model gets.

    Returns:
        The places that were replaced, and those that hold head tensors of the old classes under names or shapes that
        fit no tensor of the plan; keys are joined with ``/``.
    """
    changed = {t.name: t for t in plan.changed()}
    old_shapes = {t.source_shape for t in changed.values() if t.action == "carried"} - {
        t.target_shape for t in changed.values()
    }
    done: list[str] = []
    left: list[str] = []
    seen: set[int] = set()  # a pickle may hold a dict inside itself

    def visit(place: str, node: Any) -> Any:
        if isinstance(node, (list, tuple)):
            if _of_shapes(node, old_shapes):
                left.append(place)
            return node
        if not isinstance(node, Mapping) or "param_groups" in node or id(node) in seen:
            return node
        seen.add(id(node))
        tensors = {str(key): value for key, value in node.items() if torch.is_tensor(value)}
        names = unwrapped(tensors, model)
        copies = {names[key]: value for key, value in tensors.items() if names[key] in model}
        fits = all(t.name not in copies or tuple(copies[t.name].shape) == t.source_shape for t in plan.tensors)
        if copies and changed.keys() & copies.keys() and fits:
            done.append(place)
            usable = replace(plan, tensors=tuple(t for t in plan.tensors if t.name in copies))
            adapted = usable.apply(copies, {name: model[name] for name in copies})
            return {key: adapted.get(names.get(str(key), ""), value) for key, value in node.items()}
        if _of_shapes(tensors.values(), old_shapes):
            left.append(place)
            return node
        out = {key: visit(f"{place}/{key}", value) for key, value in node.items()}
        return out if any(out[key] is not node[key] for key in out) else node

    if changed:
        for key in list(checkpoint):
            checkpoint[key] = visit(key, checkpoint[key])
    return done, left


def _of_shapes(values: Iterable[Any], shapes: Collection[Shape | None]) -> bool:
    return any(torch.is_tensor(value) and tuple(value.shape) in shapes for value in values)


def reorder_scheduler(node: Any, origins: Sequence[int | None], base_lrs: Sequence[float]) -> Any:
    """Copy a saved scheduler (or a trainer's state that holds one), its lists in the order of the live groups.

    Args:
        node: any plain tree.
        origins: for each live group, the saved group it continues, or ``None``.
        base_lrs: learning rates of the live groups, for those that continue none.
    """
    if isinstance(node, Mapping):
        out = {key: reorder_scheduler(value, origins, base_lrs) for key, value in node.items()}
        for key in ("base_lrs", "_last_lr"):
            if isinstance(node.get(key), list):
                saved = node[key]
                out[key] = [
                    saved[o] if o is not None and o < len(saved) else lr
                    for o, lr in zip(origins, base_lrs, strict=True)
                ]
        return out
    return node


def _names_by_identity(state: Mapping[str, Any], live_names: Names, plan: AdaptPlan, path: str) -> Names:
    groups = state["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g) for g in live_names]:
        raise _unsure(path, "the optimizer groups of this run", "groups of other sizes")
    shapes = {t.name: t.source_shape for t in plan.tensors}
    for group, entry in zip(live_names, groups, strict=True):
        for name, number in zip(group, entry["params"], strict=True):
            for value in (state["state"].get(number) or {}).values():
                if torch.is_tensor(value) and value.dim() > 0 and tuple(value.shape) != shapes.get(name):
                    raise _unsure(path, f"a moment of shape {shapes.get(name)} for {name}", str(tuple(value.shape)))
    return live_names


def _adapt_entry(
    entry: Mapping[str, Any], planned: TensorPlan | None, plan: AdaptPlan, name: str, path: str
) -> dict[str, Any] | None:
    if planned is None or planned.action not in ("copied", "carried"):
        return None
    out: dict[str, Any] = {}
    layout = plan.layout(name)
    for key, value in entry.items():
        if not torch.is_tensor(value) or value.dim() == 0 or planned.action == "copied":
            if torch.is_tensor(value) and value.dim() > 0 and tuple(value.shape) != planned.source_shape:
                raise _unsure(path, f"{key} of shape {planned.source_shape} for {name}", str(tuple(value.shape)))
            out[key] = value
            continue
        if tuple(value.shape) != planned.source_shape or planned.target_shape is None or layout is None:
            raise _unsure(path, f"{key} of shape {planned.source_shape} for {name}", str(tuple(value.shape)))
        zeros = torch.zeros(planned.target_shape, dtype=value.dtype, device=value.device)
        out[key] = move_rows(value, zeros, layout, plan.maps[layout.space])
    return out


def _unsure(path: str, expected: str, found: str) -> ResumeError:
    return ResumeError(
        f"optimizer state of {path}",
        expected=expected,
        found=found,
        fix="Its optimizer state cannot be told apart: start a new run from this file without --resume.",
    )


logger = logging.getLogger(__name__)


def adapt_resume(
    checkpoint: dict[str, Any],
    plan: AdaptPlan,
    known: Provenance,
    model: nn.Module,
    checkpointables: Mapping[str, Any],
    mode: str,
    path: str,
) -> None:
    """Replace the optimizer and scheduler state of ``checkpoint`` by one that fits the live run.

    Where neither the classes nor the order of the parameters changed, nothing is replaced.

    Args:
        checkpoint: a file's content without its model.
        plan: of the weights.
        known: the file's provenance.
        model: the live model.
        checkpointables: what the checkpointer will load the rest into.
        mode: ``"refuse"`` or ``"adapt"``, what to do when the classes changed.
        path: the file, for messages.

    Raises:
        ResumeError: the classes changed and ``mode`` is ``"refuse"``, or the optimizer state cannot be told apart.
    """
    changed = plan.changed()
    if changed and mode == "refuse":
        raise ResumeError(
            path,
            expected="the tensors of the run that is resumed",
            found=f"{len(changed)} that changed, {changed[0].name} first ({summary_line(plan)})",
            fix=f"Set {HEAD_ADAPT.RESUME.set('adapt')} to go on: carried rows keep their optimizer state, new rows "
            f"start at zero. Or start a new run without --resume in another {OUTPUT_DIR}.",
        )
    live = find_optimizer(checkpointables)
    holders = find_state(checkpoint)
    if live is None or not holders:
        return
    for holder in holders:
        _refuse_other_kind(holder["optimizer"], live, path)
    names = optimizer_names(live, dict(model.named_parameters()))
    if not changed and known.optimizer in ((), names):
        return
    for holder in holders:
        holder["optimizer"] = adapt_state(holder["optimizer"], known.optimizer, live, names, plan, path)
    stored = known.optimizer or names
    origins = [group_origin(group, stored, position) for position, group in enumerate(names)]
    if origins != list(range(len(stored))):
        rates = [float(group.get("initial_lr", group["lr"])) for group in live.param_groups]
        for key in ("trainer", "scheduler"):
            if key in checkpoint:
                checkpoint[key] = reorder_scheduler(checkpoint[key], origins, rates)
    logger.info("Optimizer state of %s went through the same plan as the weights; new rows start at zero.", path)


def refuse_other_types(entries: Mapping[str, Any], checkpointables: Mapping[str, Any], path: str) -> None:
    """Raise where an entry of a file cannot be the state of the object that would load it.

    Args:
        entries: key of ``checkpointables`` -> what the file has.
        checkpointables: what the checkpointer will load them into.
        path: the file, for messages.

    Raises:
        ResumeError: names the place, and the two types.
    """
    misfits = [m for key, value in entries.items() for m in _misfits(checkpointables[key].state_dict(), value, key)]
    live = find_optimizer(checkpointables)
    # Other optimizers may keep anything; LBFGS of torch keeps lists.
    if live is not None and type(live).__module__.startswith("torch.optim") and type(live).__name__ != "LBFGS":
        misfits += [m for holder in find_state(entries) for m in _moment_misfits(holder["optimizer"]["state"])]
    for place, expected, value in misfits:
        raise ResumeError(
            f"{path}, entry {place}",
            expected=expected,
            found=f"{type(value).__name__} {str(value)[:40]!r}" if isinstance(value, _PLAIN) else type(value).__name__,
            fix="Use another checkpoint of this run, or start a new run from this file without --resume.",
        )


_NUMBERS = (int, float, complex, np.generic, torch.Tensor)
_PLAIN = (int, float, str)


def _misfits(own: Any, given: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Yield place, expected and found value wherever ``given`` is no state of an object whose state is ``own``."""
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            yield place, "a mapping", given
        else:
            # A trainer has no entry "hooks" of its own before its first iteration.
            for key, value in {"hooks": {}, **own}.items():
                if key in given:
                    yield from _misfits(value, given[key], f"{place}/{key}")
    elif isinstance(own, (list, tuple)):
        if not isinstance(given, (list, tuple)):
            yield place, "a list", given
        for i, (one, other) in enumerate(zip(own, given, strict=False) if isinstance(given, (list, tuple)) else ()):
            yield from _misfits(one, other, f"{place}/{i}")
    elif isinstance(own, _NUMBERS) and given is not None and not isinstance(given, _NUMBERS):
        yield place, "a number", given


def _moment_misfits(state: Any) -> Iterator[tuple[str, str, Any]]:
    for number, moments in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(moments, Mapping):
            yield f"optimizer/state/{number}", "a mapping", moments
            continue
        for key, value in moments.items():
            if value is not None and not isinstance(value, _NUMBERS):
                yield f"optimizer/state/{number}/{key}", "a tensor or number", value


ANY_OPTIMIZER = {
    *("params", "lr", "initial_lr", "weight_decay", "maximize", "foreach", "differentiable", "fused", "capturable"),
    "decoupled_weight_decay",
}
"""Keys of a parameter group that optimizers of several kinds have, or that a later version of torch added."""


def _refuse_other_kind(state: Mapping[str, Any], live: torch.optim.Optimizer, path: str) -> None:
    """Raise where a saved state lacks what the live optimizer reads in its ``step()``: it is of another kind."""
    needed = live.defaults.keys() - ANY_OPTIMIZER
    for group in state["param_groups"]:
        if needed - group.keys():
            saved = ", ".join(sorted(group.keys() - ANY_OPTIMIZER - needed)) or "none of its own"
            raise ResumeError(
                f"optimizer state of {path}",
                expected=f"that of {type(live).__name__} ({', '.join(sorted(needed))})",
                found=f"that of another optimizer ({saved})",
                fix="Go on with the optimizer that the run was trained with, or start a new run from this file: "
                f"without --resume, with it as {MODEL.WEIGHTS} and another {OUTPUT_DIR}.",
            )


def find_optimizer(checkpointables: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """Find the optimizer among what a checkpointer saves: its own entry, or a trainer's."""
    for value in checkpointables.values():
        for candidate in (value, getattr(value, "optimizer", None)):
            if isinstance(candidate, torch.optim.Optimizer):
                return candidate
    return None
