"""Write rows of a model: which rows of which tensor may be written, writing them, and taking everything back.

Carried rows stay untouched because nothing here can name them: a row is written only if a layout says that it belongs
to a new class, or to no class where no class was carried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapt.layouts import HeadLayout
from ..adapt.registry import layouts_of
from ..errors import LayoutError
from ..key import HEAD_ADAPT


@dataclass(frozen=True)
class Solution:
    """New values for whole rows of one tensor.

    Args:
        tensor: its name in the model.
        rows: (r,) positions on axis 0.
        values: (r, ...), on the CPU.
    """

    tensor: str
    rows: torch.Tensor
    values: torch.Tensor


class RowWriter:
    """A writer of solutions into a model, which can restore every bit.

    Args:
        model: whose rows are fitted.
        new: indices of the new classes by tensor name, or by label space for all tensors of the space.
    """

    def __init__(self, model: nn.Module, new: Mapping[str, Sequence[int]]) -> None:
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        self.layouts: dict[str, HeadLayout] = {layout.tensor: layout for layout in layouts_of(model)}
        self._new = {
            name: tuple(sorted(set(new.get(name, new.get(layout.space, ())))))
            for name, layout in self.layouts.items()
            if layout.axes
        }
        self._before: dict[str, torch.Tensor] = {}

    def value(self, tensor: str) -> torch.Tensor:
        """Copy a tensor, detached, as float32."""
        return self._tensors[tensor].detach().float().clone()

    def num_classes(self, tensor: str) -> int:
        """Read K from a tensor's shape; 0 where it holds no classes."""
        layout = self.layouts.get(tensor)
        return (layout.num_classes(tuple(self._tensors[tensor].shape)) or 0) if layout and layout.axes else 0

    def new(self, tensor: str) -> tuple[int, ...]:
        """List the classes whose rows in a tensor are new."""
        return self._new.get(tensor, ())

    def new_in(self, space: str) -> tuple[int, ...]:
        """List the classes of a space that are new in any tensor."""
        found = {k for name, classes in self._new.items() if self.layouts[name].space == space for k in classes}
        return tuple(sorted(found))

    def carried(self, tensor: str) -> tuple[int, ...]:
        """List the classes whose rows in a tensor are not new; of an agnostic one, those of the tensors beside it."""
        layout = self.layouts.get(tensor)
        if layout is not None and not layout.axes:
            beside = [n for n, o in self.layouts.items() if o.axes and (o.group, o.part) == (layout.group, layout.part)]
            beside = beside or [n for n, o in self.layouts.items() if o.axes and o.group == layout.group]
            # An agnostic tensor that stands alone serves whatever the heads of its space serve.
            beside = beside or [n for n, o in self.layouts.items() if o.axes and o.space == layout.space]
            return tuple(sorted({k for name in beside for k in self.carried(name)}))
        return tuple(sorted(set(range(self.num_classes(tensor))) - set(self.new(tensor))))

    def writable_rows(self, tensor: str) -> torch.Tensor:
        """List positions on axis 0 that may be written: new classes, and class-free rows where none is carried."""
        layout = self.layouts.get(tensor)
        if layout is None:
            return torch.arange(0)
        if not layout.axes:
            return torch.arange(0 if self.carried(tensor) else len(self._tensors[tensor]))
        k = self.num_classes(tensor)
        rows = layout.rows(self.new(tensor), k)
        if not self.carried(tensor):
            rows = torch.cat([rows, layout.fixed_rows(k)])
        return rows.sort().values

    def write(self, solutions: Iterable[Solution], *, shared: bool = False) -> None:
        """Write all of them, or none.

        Args:
            solutions: what to write.
            shared: the caller vouches that tensors without classes (the RPN's) may be written: the training set
                labels every carried class.

        Raises:
            LayoutError: a row that is not open, a wrong shape, or a value that is not finite.
        """
        solutions = list(solutions)
        for solution in solutions:
            target = self._tensors[solution.tensor]
            closed = ~torch.isin(solution.rows, self.writable_rows(solution.tensor))
            if shared and solution.tensor not in self.layouts:
                closed[:] = False
            good = tuple(solution.values.shape) == (len(solution.rows), *target.shape[1:])
            if bool(closed.any()) or not good or not bool(torch.isfinite(solution.values).all()):
                raise LayoutError(
                    f"fitted rows of {solution.tensor}",
                    expected=f"finite values of shape (rows, {', '.join(map(str, target.shape[1:]))}) for new rows",
                    found=f"{tuple(solution.values.shape)}, {int(closed.sum())} of them rows that are carried",
                    fix=f"Set {HEAD_ADAPT.FIT.ENABLED.set(False)} and report this.",
                )
        for solution in solutions:
            target = self._tensors[solution.tensor]
            self._before.setdefault(solution.tensor, target.detach().clone())
            with torch.no_grad():
                target[solution.rows.to(target.device)] = solution.values.to(target)

    def undo(self, tensors: Iterable[str] | None = None) -> None:
        """Give tensors (all that were written, by default) their old bits back."""
        for name in list(self._before if tensors is None else tensors):
            if name in self._before:
                with torch.no_grad():
                    self._tensors[name].copy_(self._before.pop(name))
