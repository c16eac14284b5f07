"""Find, write and check class counts in a tree of LazyCall nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...adapt.classes import ClassTable
from ...adapt.detectron2_heads import SEMANTIC_HEADS
from ...adapt.registry import has_layout, layouts_of
from ...errors import ConfigError
from .tree import calls, target_of

KEYS = {"num_classes": "", "num_keypoints": "keypoint"}
"""Arguments that count classes, with the label space that their name tells."""


@dataclass(frozen=True)
class Count:
    """One class count of a model's tree.

    Args:
        path: dotted path below ``model``; empty for the model itself.
        node: the LazyCall that has it.
        key: of :data:`KEYS`.
        space: label space of the classes.
    """

    path: str
    node: DictConfig
    key: str
    space: str

    @property
    def value(self) -> Any:
        """The number, interpolations resolved."""
        return self.node[self.key]

    @property
    def literal(self) -> bool:
        """A number of its own, no interpolation."""
        return not OmegaConf.is_interpolation(self.node, self.key)

    @property
    def where(self) -> str:
        """The key as a user overrides it."""
        return ".".join(filter(None, ("model", self.path, self.key)))


def find_counts(model: DictConfig) -> list[Count]:
    """List the counts that decide the size of a head whose layout is known.

    A ``num_classes`` of anything else, such as a backbone that was a classifier once, is left alone: it counts only at
    a node whose class has a layout, or around one.
    """
    found = list(calls(model))
    heads = [path for path, node in found if has_layout(target_of(node))]
    counts: list[Count] = []
    for path, node in found:
        holds = any(head == path or not path or head.startswith((f"{path}.", f"{path}[")) for head in heads)
        for key, space in KEYS.items():
            if key in node and holds and _is_number(node, key):
                counts.append(Count(path, node, key, space or _space(path, found)))
    return counts


def _is_number(node: DictConfig, key: str) -> bool:
    return not OmegaConf.is_missing(node, key) and isinstance(node[key], int)


def _space(path: str, found: Sequence[tuple[str, DictConfig]]) -> str:
    """Return ``stuff`` at and inside a semantic segmentation head, else ``thing``."""
    for other, node in found:
        around = not other or path == other or path.startswith((f"{other}.", f"{other}["))
        if around and _is_any(node, SEMANTIC_HEADS):
            return "stuff"
    return "thing"


def _is_any(node: DictConfig, names: Sequence[str]) -> bool:
    return any(cls.__name__ in names for cls in getattr(target_of(node), "__mro__", ()))


def agnostic_masks(counts: Sequence[Count]) -> list[Count]:
    """List counts of class-agnostic mask heads: 1 of its own, where the heads around it have more classes."""
    most = {count.space: max(c.value for c in counts if c.space == count.space) for count in counts}
    return [
        count
        for count in counts
        if isinstance(target_of(count.node), type)
        and issubclass(target_of(count.node), BaseMaskRCNNHead)
        and count.literal
        and count.value == 1 < most[count.space]
    ]


def write_counts(model: DictConfig, target: Mapping[str, ClassTable]) -> list[str]:
    """Write the length of each target table over every class count of its label space, in place.

    A mask head of one class in a detector of more is class-agnostic and stays.

    Returns:
        One line per count that changed, such as ``model.roi_heads.num_classes was 80, is 2, the classes of my_train``.
    """
    counts = find_counts(model)
    kept = {id(count.node) for count in agnostic_masks(counts)}
    lines: list[str] = []
    # Numbers first: what is interpolated follows them, unless it points out of the model.
    for count in sorted(counts, key=lambda count: not count.literal):
        table = target.get(count.space)
        if table is None or id(count.node) in kept or count.value == len(table):
            continue
        lines.append(f"{count.where} was {count.value}, is {len(table)}, the classes of {table.origin}")
        count.node[count.key] = len(table)
    return lines


def check_counts(model: nn.Module, target: Mapping[str, ClassTable], paths: Sequence[str] = ()) -> None:
    """Raise where a class-sized tensor of the model has another number of classes than its table.

    Args:
        model: as built, on any device.
        target: class tables by label space.
        paths: of its LazyCall nodes, for the message.

    Raises:
        ConfigError: names the tensor and the node that it was built from.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for layout in layouts_of(model):
        table = target.get(layout.space)
        if table is None or layout.agnostic or layout.fits(shapes[layout.tensor], len(table)):
            continue
        count = layout.num_classes(shapes[layout.tensor])
        raise ConfigError(
            _node_of(layout.tensor, paths),
            expected=f"{len(table)} classes, those of {table.origin}",
            found=f"{layout.tensor} of shape {shapes[layout.tensor]}, for {count}",
            fix=f"Set the argument of that node that counts classes to {len(table)}.",
        )


def _node_of(tensor: str, paths: Sequence[str]) -> str:
    """Find the innermost node on the way to a tensor: modules are named as the arguments that they were given as."""
    around = [path for path in paths if path and tensor.startswith(f"{path}.")]
    return ".".join(["model", *sorted(around, key=len)[-1:]])
