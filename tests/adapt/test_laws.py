"""The laws of row surgery, on random tables, permutations, subsets and head kinds; beside each, what must break it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.layouts import KINDS, axis_labels
from hypothesis import given
from hypothesis import strategies as st

from d2_headadapt.adapt import plan as surgery
from d2_headadapt.adapt.classes import ClassMap, ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.matching import match_classes
from d2_headadapt.adapt.plan import move_rows

NAMES = [f"class {i}" for i in range(12)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.tensor)


@st.composite
def tables(draw: st.DrawFn) -> tuple[ClassTable, ClassTable]:
    """Two tables that share some names, in any order."""
    source = draw(st.permutations(NAMES))[: draw(st.integers(1, 7))]
    target = draw(st.permutations(NAMES))[: draw(st.integers(1, 7))]
    return ClassTable(source, "source"), ClassTable(target, "target")


def tensor(kind: HeadLayout, num_classes: int, seed: int) -> torch.Tensor:
    shape = [kind.size(axis, num_classes) if axis in kind.class_axes else 3 for axis in range(2)]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def label_grid(kind: HeadLayout, table: ClassTable) -> list[list[object]]:
    """What each element is, with class names in place of indices, so that two tables can be compared."""

    def named(axis: int, length: int) -> list[object]:
        if axis not in kind.class_axes:
            return list(range(length))
        found: list[object] = []
        for label in axis_labels(kind, axis, len(table)):
            found.append((table.names[label[0]], *label[1:3], _block(label)) if isinstance(label, tuple) else label)
        return _number_fixed(found)

    shape = tensor(kind, len(table), 0).shape
    rows, columns = named(0, shape[0]), named(1, shape[1])
    return [[(r, c) for c in columns] for r in rows]


def _block(label: tuple[object, ...]) -> object:
    return len(label)


def _number_fixed(labels: list[object]) -> list[object]:
    """Rows of no class are told apart by their order, which does not depend on the number of classes."""
    count, out, seen = 0, [], {}
    for label in labels:
        if isinstance(label, tuple):
            # Two blocks of one class on one axis are told apart by how often the label was met.
            seen[label] = seen.get(label, 0) + 1
            out.append((*label, seen[label]))
        else:
            out.append(f"fixed {count}")
            count += 1
    return out


def check_carried_rows(kind: HeadLayout, source: ClassTable, target: ClassTable) -> None:
    """Every element of a carried class, and of no class, has the source's bits; every other one the base's."""
    old, base = tensor(kind, len(source), 1), tensor(kind, len(target), 2)
    out = move_rows(old, base, kind, match_classes(target, source))
    where = {label: old[i, j] for i, row in enumerate(label_grid(kind, source)) for j, label in enumerate(row)}
    for i, row in enumerate(label_grid(kind, target)):
        for j, label in enumerate(row):
            expected = where.get(label, base[i, j])
            assert torch.equal(out[i, j], expected), (label, i, j)


@kinds
@given(pair=tables())
def test_carried_rows_are_bit_equal_and_new_rows_are_the_models(
    kind: HeadLayout, pair: tuple[ClassTable, ClassTable]
) -> None:
    check_carried_rows(kind, *pair)


def wrong_rows(self: HeadLayout, classes: object, num_classes: int, axis: int | None = None) -> torch.Tensor:
    """One row further on the source's side only."""
    return right_rows(self, classes, num_classes, axis) + (num_classes == 5)  # type: ignore[arg-type]


def background_first(self: HeadLayout, num_classes: int, axis: int | None = None) -> torch.Tensor:
    return torch.arange(self.extra + sum(entry[1] for entry in self.axes if entry[0] == (axis or 0)))


right_rows = HeadLayout.rows


@pytest.mark.parametrize(
    ("name", "mutation", "kind"),
    [("rows", wrong_rows, KINDS[1]), ("rows", wrong_rows, KINDS[3]), ("fixed_rows", background_first, KINDS[0])],
)
def test_a_wrong_row_map_breaks_the_law(
    monkeypatch: pytest.MonkeyPatch, name: str, mutation: Callable[..., torch.Tensor], kind: HeadLayout
) -> None:
    source, target = ClassTable(NAMES[:5]), ClassTable([NAMES[3], NAMES[0]])
    check_carried_rows(kind, source, target)
    # The oracle spells its rows out by itself, so breaking the layout breaks only the surgery.
    monkeypatch.setattr(HeadLayout, name, mutation)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_carried_rows(kind, source, target)


@kinds
@given(pair=tables())
def test_there_and_back_is_the_identity_on_carried_rows(kind: HeadLayout, pair: tuple[ClassTable, ClassTable]) -> None:
    source, target = pair
    old = tensor(kind, len(source), 1)
    there = move_rows(old, tensor(kind, len(target), 2), kind, match_classes(target, source))
    back = move_rows(there, old, kind, match_classes(source, target))
    assert torch.equal(back, old)


@kinds
@given(order=st.permutations(NAMES[:6]))
def test_a_permutation_and_its_inverse_is_the_identity(kind: HeadLayout, order: list[str]) -> None:
    table, shuffled = ClassTable(NAMES[:6]), ClassTable(order)
    old = tensor(kind, 6, 1)
    zeros = torch.zeros_like(old)
    there = move_rows(old, zeros, kind, match_classes(shuffled, table))
    assert torch.equal(move_rows(there, zeros, kind, match_classes(table, shuffled)), old)


@kinds
@given(pair=tables())
def test_adapting_twice_is_adapting_once(kind: HeadLayout, pair: tuple[ClassTable, ClassTable]) -> None:
    source, target = pair
    once = move_rows(tensor(kind, len(source), 1), tensor(kind, len(target), 2), kind, match_classes(target, source))
    identity = ClassMap(target, target, tuple(range(len(target))))
    assert torch.equal(move_rows(once, tensor(kind, len(target), 3), kind, identity), once)


@given(pair=tables(), seed=st.integers(0, 1000))
def test_logits_of_carried_classes_differ_by_rounding_at_most(pair: tuple[ClassTable, ClassTable], seed: int) -> None:
    """A product of another width rounds differently; scattered back to the old width it does not."""
    kind = KINDS[0]
    source, target = pair
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((9, 33), (len(source) + 1, 33), (len(source) + 1,)))
    classes = match_classes(target, source)
    base = torch.randn(len(target) + 1, 33, generator=g)
    new_weight = move_rows(weight, base, kind, classes)
    new_bias = move_rows(bias[:, None], base[:, :1], kind, classes)[:, 0]
    old, new = torch.nn.functional.linear(x, weight, bias), torch.nn.functional.linear(x, new_weight, new_bias)
    pairs = [*classes.carried, (len(target), len(source))]
    for t, s in pairs:
        bound = 2e-6 * (x.abs() @ weight[s].abs() + bias[s].abs())
        assert ((new[:, t] - old[:, s]).abs() <= bound).all()
    scattered_weight, scattered_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for t, s in pairs:
        scattered_weight[s], scattered_bias[s] = new_weight[t], new_bias[t]
    again = torch.nn.functional.linear(x, scattered_weight, scattered_bias)
    for _, s in pairs:
        assert torch.equal(again[:, s], old[:, s])


@kinds
def test_inputs_of_the_surgery_are_not_written_to(kind: HeadLayout) -> None:
    source, target = ClassTable(NAMES[:5]), ClassTable([NAMES[3], "new", NAMES[0]])
    old, base = tensor(kind, 5, 1), tensor(kind, 3, 2)
    kept = old.clone(), base.clone()
    move_rows(old, base, kind, match_classes(target, source))
    assert torch.equal(old, kept[0]) and torch.equal(base, kept[1])


@kinds
def test_the_mask_of_new_rows_is_what_surgery_left_alone(kind: HeadLayout) -> None:
    source, target = ClassTable(NAMES[:5]), ClassTable([NAMES[3], "new", NAMES[0]])
    classes = match_classes(target, source)
    old, base = tensor(kind, 5, 1), tensor(kind, 3, 2)
    out = move_rows(old, base, kind, classes)
    mask = surgery.new_rows_mask(kind, classes, tuple(base.shape))
    assert torch.equal(out == base, mask)


def test_dtype_and_device_are_the_models() -> None:
    kind = KINDS[0]
    identity = ClassMap(ClassTable(NAMES[:5]), ClassTable(NAMES[:5]), tuple(range(5)))
    out = move_rows(tensor(kind, 5, 1).half(), tensor(kind, 5, 2), kind, identity)
    assert out.dtype == torch.float32
