"""Where classes live in the tensors of a model.

A *class axis* of a tensor is laid out as::

    [ offset rows | group 0: class 0 ... class K-1 | group 1: ... | extra rows ]

Every class has ``rows_per_class`` consecutive rows in each group. ``extra`` rows follow the last group (background, in
a softmax box classifier), and ``offset`` rows stand before the first (the feature channels of a point head's input).
So RetinaNet's ``cls_score`` has one group per anchor, ``bbox_pred`` four rows per class, and a keypoint head has its
classes on axis 1 of the weight and on axis 0 of the bias.

    K   number of classes of a table
    A   number of anchors (groups)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import LayoutError


@dataclass(frozen=True)
class HeadLayout:
    """Where the classes of one tensor are.

    Args:
        tensor: its name in the model's ``state_dict``.
        space: the label space whose table names its classes.
        group: tensors of one group change together or not at all.
        part: a group's tensors that stand or fall together with being in a file (box predictor, mask head).
        axes: ``(axis, offset)`` of every block of classes; a third number, where present, is that block's own rows
            per class. Several blocks on one axis follow each other, each ``offset`` rows after the one before. Empty
            where the tensor serves all classes alike (agnostic).
        rows_per_class: consecutive rows of one class.
        groups: how often the block of all classes is repeated (anchors).
        extra: rows after the last group.
        rebuilt: computed from the dataset by the model's constructor, so never taken from a file.
        given: the model's constructor knows every row (a text embedding), so that no row is new: ``"file"`` where its
            rows stay, ``"checkpoint"`` where those of a checkpoint replace them; empty for a layer that is trained.
        by_choice: a config key decides whether the tensor is class-specific or agnostic; at one class the two are the
            same values.

    Example:
        Boxes, four rows for each class, and scores, background last, for three classes::

            >>> from d2_headadapt import HeadLayout
            >>> boxes = HeadLayout("bbox_pred.weight", "thing", "head", rows_per_class=4)
            >>> scores = HeadLayout("cls_score.weight", "thing", "head", extra=1)
            >>> boxes.num_classes((12, 64)), scores.num_classes((4, 64)), scores.num_classes((1, 64))
            (3, 3, None)
            >>> boxes.rows([2], num_classes=3).tolist(), scores.fixed_rows(3).tolist()
            ([8, 9, 10, 11], [3])
    """

    tensor: str
    space: str
    group: str
    part: str = ""
    axes: tuple[tuple[int, ...], ...] = ((0, 0),)
    rows_per_class: int = 1
    groups: int = 1
    extra: int = 0
    rebuilt: bool = False
    by_choice: bool = False
    given: str = ""

    @property
    def agnostic(self) -> bool:
        """The tensor is no larger for more classes."""
        return not self.axes

    @property
    def serves_all(self) -> bool:
        """No class has rows of its own on the first axis; inputs may still be class by class."""
        return all(entry[0] != 0 for entry in self.axes)

    def read_as(self, *, serves_all: bool) -> HeadLayout:
        """Read this layout of a tensor of one class as class-agnostic or as the rows of that class.

        Args:
            serves_all: as class-agnostic.
        """
        inputs = tuple(entry for entry in self.axes if entry[0] != 0)
        return replace(self, axes=inputs if serves_all else ((0, 0), *inputs))

    @property
    def class_axes(self) -> tuple[int, ...]:
        """The axes that hold classes, each once."""
        return tuple(dict.fromkeys(entry[0] for entry in self.axes))

    def _blocks(self, axis: int) -> list[tuple[int, int]]:
        """``(rows before the block, rows per class)`` of each class block on ``axis``."""
        return [
            (entry[1], entry[2] if len(entry) > 2 else self.rows_per_class) for entry in self.axes if entry[0] == axis
        ]

    def size(self, axis: int, num_classes: int) -> int:
        """Compute the length of a class ``axis`` for ``num_classes`` classes."""
        return self.extra + sum(
            offset + self.groups * num_classes * per_class for offset, per_class in self._blocks(axis)
        )

    def num_classes(self, shape: Sequence[int]) -> int | None:
        """Compute K of a tensor of this layout and ``shape``; ``None`` where no whole K fits every class axis."""
        found: set[int] = set()
        for axis in self.class_axes:
            if axis >= len(shape):
                return None
            k, rest = divmod(shape[axis] - self.size(axis, 0), self.size(axis, 1) - self.size(axis, 0))
            if rest or k < 1:
                return None
            found.add(k)
        return found.pop() if len(found) == 1 else None

    def fits(self, shape: Sequence[int], num_classes: int) -> bool:
        """Tell whether every class axis of ``shape`` has the length that ``num_classes`` classes need."""
        return all(axis < len(shape) and shape[axis] == self.size(axis, num_classes) for axis in self.class_axes)

    def rows(self, classes: Sequence[int], num_classes: int, axis: int | None = None) -> torch.Tensor:
        """List the positions on a class axis that belong to ``classes``.

        Args:
            classes: class indices, from 0 to ``num_classes`` - 1.
            num_classes: K of the tensor.
            axis: of the tensor; the first class axis by default.

        Returns:
            int64 tensor of positions in the order block, group, class, row; so the same call with another list of as
            many classes gives the matching positions of another table.
        """
        axis = self.class_axes[0] if axis is None else axis
        parts, start = [], 0
        for offset, per_class in self._blocks(axis):
            start += offset
            group = start + torch.arange(self.groups).view(-1, 1, 1) * (num_classes * per_class)
            first = torch.as_tensor(list(classes), dtype=torch.int64).view(1, -1, 1) * per_class
            parts.append((group + first + torch.arange(per_class).view(1, 1, -1)).reshape(-1))
            start += self.groups * num_classes * per_class
        return torch.cat(parts)

    def fixed_rows(self, num_classes: int, axis: int | None = None) -> torch.Tensor:
        """List the positions on a class axis that belong to no class: rows before the blocks, and extra rows.

        Args:
            num_classes: K of the tensor.
            axis: of the tensor; the first class axis by default.
        """
        axis = self.class_axes[0] if axis is None else axis
        every = torch.ones(self.size(axis, num_classes), dtype=torch.bool)
        every[self.rows(range(num_classes), num_classes, axis)] = False
        return every.nonzero().reshape(-1)

    def same_kind(self, other: HeadLayout) -> bool:
        """Tell whether a class's rows mean the same in the ``other`` layout, whatever the number of classes."""
        return (
            self.axes == other.axes
            and self.rows_per_class == other.rows_per_class
            and self.groups == other.groups
            and self.extra == other.extra
        )

    def describe(self) -> str:
        """Put the kind of this layout into words, for reasons and errors."""
        if self.agnostic:
            return "class-agnostic"
        words = [f"{self.rows_per_class} row{'s' if self.rows_per_class > 1 else ''} per class"]
        if self.groups > 1:
            words.append(f"{self.groups} anchors")
        if self.extra:
            words.append("background last")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Write the plain form that plans and checkpoints store."""
        return {
            "tensor": self.tensor,
            "space": self.space,
            "group": self.group,
            "part": self.part,
            "axes": [list(axis) for axis in self.axes],
            "rows_per_class": self.rows_per_class,
            "groups": self.groups,
            "extra": self.extra,
            "rebuilt": self.rebuilt,
            "by_choice": self.by_choice,
            "given": self.given,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadLayout:
        """Read a layout back.

        Args:
            data: what :meth:`to_json` wrote; keys that this version does not know are ignored.

        Raises:
            LayoutError: ``data`` is no layout.
        """
        try:
            return cls(
                tensor=str(data["tensor"]),
                space=str(data["space"]),
                group=str(data.get("group", "")),
                part=str(data.get("part", "")),
                axes=tuple(tuple(int(number) for number in entry) for entry in data["axes"]),
                rows_per_class=int(data["rows_per_class"]),
                groups=int(data["groups"]),
                extra=int(data["extra"]),
                rebuilt=bool(data.get("rebuilt", False)),
                by_choice=bool(data.get("by_choice", False)),
                given=str(data.get("given", "")),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise LayoutError(
                "a stored layout",
                expected="tensor, space, axes, rows_per_class, groups and extra",
                found=repr(dict(data)),
                fix="The file's `d2_headadapt` entry is damaged or was written by another program.",
            ) from exc
