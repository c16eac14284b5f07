"""Layout functions by module: detectron2's modules by class, third parties' by class or by tensor name."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import HeadAdaptError, LayoutError
from .layouts import HeadLayout


@dataclass(frozen=True)
class ModuleContext:
    """The questions that a layout function may ask about the module it describes.

    Args:
        name: the module's name in the model.
        owners: the modules around it, innermost last, each with its name.
    """

    name: str
    owners: tuple[tuple[str, nn.Module], ...]

    def owner(self, *class_names: str) -> tuple[str, nn.Module] | None:
        """Find the innermost enclosing module of one of these classes (or a subclass), by class name."""
        for name, module in reversed(self.owners):
            if _mro_names(module).intersection(class_names):
                return name, module
        return None


LayoutFunction = Callable[[nn.Module, ModuleContext], Iterable[HeadLayout]]
PROJECTS = "detectron2.projects."
"""Where detectron2 installs its projects; a checkout of it imports them without this prefix."""


@dataclass(frozen=True)
class ClassLayout:
    """A layout function, and what a module of its class needs for it.

    Args:
        function: describes the module.
        needs: attributes that it reads, dotted; a subclass that removed one is another head.
    """

    function: LayoutFunction
    needs: tuple[str, ...] = ()

    def suits(self, module: nn.Module) -> bool:
        """Tell whether a module has what the function reads."""
        return all(_has(module, path) for path in self.needs)


_BY_CLASS: dict[str, ClassLayout] = {}
"""By the class's full path: projects have classes of their own under detectron2's names."""
_BY_PATTERN: dict[str, HeadLayout] = {}


def register_head_layout(
    target: str | type[nn.Module],
    layout: LayoutFunction | None = None,
    *,
    space: str = "thing",
    group: str = "",
    axes: Sequence[tuple[int, ...]] = ((0, 0),),
    rows_per_class: int = 1,
    groups: int = 1,
    extra: int = 0,
) -> None:
    """Tell the planner where the classes of a head of your own are.

    Args:
        target: a module class with ``layout``, a function from (module, context) to its layouts; or a glob pattern
            on tensor names, for which the remaining arguments describe each tensor that matches.
        layout: for a module class only.
        space, group, axes, rows_per_class, groups, extra: as in :class:`HeadLayout`; ``group`` defaults to the
            pattern.

    Raises:
        LayoutError: a module class without a function or a pattern with one.

    Example:
        A DETR-style head, two decoder layers, K rows each and no background row::

            >>> from torch import nn
            >>> from d2_headadapt import layouts_of, register_head_layout
            >>> register_head_layout("class_embed.*.weight", group="class_embed")
            >>> register_head_layout("class_embed.*.bias", group="class_embed")
            >>> model = nn.ModuleDict({"class_embed": nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])})
            >>> [layout.tensor for layout in layouts_of(model)][:2]
            ['class_embed.0.weight', 'class_embed.0.bias']
    """
    if isinstance(target, str) == (layout is not None):
        raise LayoutError(
            f"register_head_layout({target!r})",
            expected="a module class with a function, or a pattern without one",
            found="a pattern with a function" if layout else "a module class without a function",
            fix="See the docstring of register_head_layout.",
        )
    if isinstance(target, str):
        _BY_PATTERN[target] = HeadLayout(target, space, group or target, "", tuple(axes), rows_per_class, groups, extra)
    elif layout is not None:
        _BY_CLASS[_path(target)] = ClassLayout(layout)


def unregister_head_layout(target: str | type[nn.Module]) -> None:
    """Forget a layout entered by :func:`register_head_layout`."""
    if isinstance(target, str):
        _BY_PATTERN.pop(target, None)
    else:
        _BY_CLASS.pop(_path(target), None)


def register_by_path(*paths: str, needs: Sequence[str] = ()) -> Callable[[LayoutFunction], LayoutFunction]:
    """Enter a layout function for module classes that need not be importable here (detectron2's projects).

    Args:
        paths: module and name of each class, ``detectron2.projects.`` left out.
        needs: attributes that the function reads, dotted.
    """

    def enter(function: LayoutFunction) -> LayoutFunction:
        for path in paths:
            _BY_CLASS[path] = ClassLayout(function, tuple(needs))
        return function

    return enter


def layouts_of(model: nn.Module) -> tuple[HeadLayout, ...]:
    """Find the layouts of every class-dependent tensor of ``model``, in ``state_dict`` order.

    A module is described by its own ``head_layouts(context)`` method, else by the function registered for the nearest
    class in its inheritance; a tensor that a pattern names is described by the pattern. A class is known by its module
    and its name. Works on the meta device: only shapes are read.

    Raises:
        LayoutError: a pattern that matches no tensor, a layout that does not describe its tensor, or a function that
            raises.

    Example:
        >>> from detectron2.layers import ShapeSpec
        >>> from detectron2.modeling.box_regression import Box2BoxTransform
        >>> from detectron2.modeling.roi_heads import FastRCNNOutputLayers
        >>> from torch import nn
        >>> from d2_headadapt import layouts_of
        >>> transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        >>> head = FastRCNNOutputLayers(ShapeSpec(channels=4), box2box_transform=transform, num_classes=3)
        >>> for layout in layouts_of(nn.ModuleDict({"box_predictor": head})):
        ...     print(layout.tensor, "-", layout.describe())
        box_predictor.cls_score.weight - 1 row per class, background last
        box_predictor.cls_score.bias - 1 row per class, background last
        box_predictor.bbox_pred.weight - 4 rows per class
        box_predictor.bbox_pred.bias - 4 rows per class
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    found: dict[str, HeadLayout] = {}
    for context, module in _walk(model):
        function = _function_for(module)
        if function is not None:
            found.update({x.tensor: x for x in _called(function, module, context) if x.tensor in shapes})
    for pattern, layout in _BY_PATTERN.items():
        matched = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matched:
            raise LayoutError(
                f"register_head_layout({pattern!r})",
                expected="a pattern that matches a tensor of the model",
                found=f"none of its {len(shapes)} tensors",
                fix=f"Tensor names look like {', '.join(list(shapes)[-3:])}.",
            )
        for name in matched:
            found[name] = replace(layout, tensor=name)
    for name, layout in found.items():
        if layout.axes and layout.num_classes(shapes[name]) is None:
            raise LayoutError(
                f"layout of {name}",
                expected=f"a shape that holds whole classes ({layout.describe()})",
                found=str(shapes[name]),
                fix="Correct the arguments of register_head_layout.",
            )
    return tuple(found[name] for name in shapes if name in found)


def has_layout(cls: object) -> bool:
    """Tell whether modules of a class describe themselves, or a function is registered for it or a base class."""
    return callable(getattr(cls, "head_layouts", None)) or any(
        _path(base) in _BY_CLASS for base in getattr(cls, "__mro__", ())
    )


def _called(function: LayoutFunction, module: nn.Module, context: ModuleContext) -> list[HeadLayout]:
    try:
        return list(function(module, context))
    except HeadAdaptError:
        raise
    except Exception as exc:  # A user's own function may raise anything; the line of code is named, the cause is kept.
        last = traceback.extract_tb(exc.__traceback__)[-1]
        found = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise LayoutError(
            f"layout of {context.name or 'the model'}, {_path(type(module))}",
            expected="a function that describes this module",
            found=f"{found} (line {last.lineno} of {last.filename})",
            fix="Correct head_layouts of the class, or the function that register_head_layout was given for it.",
        ) from exc


def _path(cls: type) -> str:
    return f"{cls.__module__.removeprefix(PROJECTS)}.{cls.__qualname__}"


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _walk(model: nn.Module) -> Iterator[tuple[ModuleContext, nn.Module]]:
    def visit(module: nn.Module, context: ModuleContext) -> Iterator[tuple[ModuleContext, nn.Module]]:
        yield context, module
        owners = (*context.owners, (context.name, module))
        for child_name, child in module.named_children():
            name = f"{context.name}.{child_name}" if context.name else child_name
            yield from visit(child, ModuleContext(name, owners))

    yield from visit(model, ModuleContext("", ()))


def _mro_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _function_for(module: nn.Module) -> LayoutFunction | None:
    if callable(getattr(module, "head_layouts", None)):
        return lambda described, context: described.head_layouts(context)  # type: ignore[operator]
    for cls in type(module).__mro__:
        known = _BY_CLASS.get(_path(cls))
        if known is not None:
            return known.function if known.suits(module) else None
    return None
