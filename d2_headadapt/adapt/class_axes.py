"""Read class axes off the shapes of a model at several class counts: ``size(K) = slope * K + rest`` on each axis.

Slope, rest, the layer and what stands around it leave one meaning, a :class:`.layouts.HeadLayout`, or
several, which are refused. No weight's value is read.

    K   number of classes
    A   number of anchors
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import Any

import torch
from torch import nn

from .discovery import AxisSize, ClassSized, CountFamily, Evidence, Found, Refusal, RefusalCause, Shape
from .layouts import HeadLayout


@dataclass(frozen=True)
class TensorFacts:
    """Facts of one tensor of a built model, besides its values.

    Args:
        shape: as built.
        parameter: trained, else a buffer.
        kind: of the layer that holds it: ``linear``, ``conv``, ``transposed``, ``embedding``, ``norm`` or ``other``.
        owner: path of that layer.
        around: the modules on the way to it, outermost first: path and full class names, base classes included.
        anchors: ``(number, path)`` of every anchor count that a module around it states.
        padding: the row that an embedding keeps for padding.
        odd_row: of a vector that is no parameter, the one row whose value differs from all others.
    """

    shape: Shape
    parameter: bool = True
    kind: str = "other"
    owner: str = ""
    around: tuple[tuple[str, tuple[str, ...]], ...] = ()
    anchors: tuple[tuple[int, str], ...] = ()
    padding: int | None = None
    odd_row: int | None = None


_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("transposed", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    ("conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ("linear", (nn.Linear,)),
    ("embedding", (nn.Embedding,)),
    ("norm", (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)),
)
_OUTPUT = {"linear": 0, "conv": 0, "transposed": 1, "embedding": 0, "norm": 0}
_INPUT = {"linear": 1, "conv": 1, "transposed": 0}


def observe(model: nn.Module) -> dict[str, TensorFacts]:
    """Read what :class:`TensorFacts` holds off every tensor of a model, in ``state_dict`` order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    lineage = {path: tuple(_class_names(module)) for path, module in modules.items()}
    anchors = {path: number for path, module in modules.items() if (number := _stated_anchors(module))}
    facts: dict[str, TensorFacts] = {}
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value) or torch.nn.parameter.is_lazy(value):
            continue
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        paths = [".".join(owner.split(".")[:i]) for i in range(owner.count(".") + 2)] if owner else [""]
        inner = sorted({path for path in paths if path in modules}, key=len)
        near = inner[-3:]
        facts[name] = TensorFacts(
            shape=tuple(value.shape),
            parameter=module is None or leaf not in module._buffers,
            kind=next((kind for kind, classes in _KINDS if isinstance(module, classes)), "other"),
            owner=owner,
            around=tuple((path, lineage[path]) for path in inner),
            anchors=tuple(
                (number, path)
                for path, number in anchors.items()
                if path in near or path.rpartition(".")[0] in inner[:-2]
            ),
            padding=module.padding_idx if isinstance(module, nn.Embedding) else None,
            odd_row=_odd_row(value) if module is not None and leaf in module._buffers else None,
        )
    return facts


def _class_names(module: nn.Module) -> Iterator[str]:
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return
        yield f"{cls.__module__}.{cls.__qualname__}"


def _stated_anchors(module: nn.Module) -> int:
    """Read ``num_anchors`` of a head or an anchor generator, where it is one number for every feature map."""
    for name in ("num_anchors", "num_cell_anchors"):
        stated = getattr(module, name, None)
        numbers = set(stated) if isinstance(stated, (list, tuple)) else {stated}
        if len(numbers) == 1 and isinstance(number := numbers.pop(), int) and not isinstance(number, bool):
            return number
    return 0


def _odd_row(value: torch.Tensor) -> int | None:
    if value.dim() != 1 or len(value) < 3 or value.is_meta:
        return None
    first_apart = not bool((value[0] == value[1:]).any()) and bool((value[1:] == value[1]).all())
    last_apart = not bool((value[-1] == value[:-1]).any()) and bool((value[:-1] == value[0]).all())
    return 0 if first_apart else len(value) - 1 if last_apart else None


def class_sized(
    base: Mapping[str, TensorFacts], more: Mapping[int, Mapping[str, TensorFacts]], family: CountFamily
) -> list[ClassSized]:
    """Solve ``size(K) = slope * K + rest`` for every tensor whose shape differs between builds.

    Args:
        base: facts at K classes.
        more: facts by how many classes were added, two builds or more.
        family: the count keys that were changed.
    """
    grown = {name for facts in more.values() for name in facts if name not in base}
    stems = {stem for name in grown for stem in _stems(name)}
    sized: list[ClassSized] = []
    for name, fact in base.items():
        others = {step: facts[name].shape if name in facts else None for step, facts in more.items()}
        counted = bool(stems.intersection(_stems(name)))
        if counted or any(shape != fact.shape for shape in others.values()):
            axes = () if counted else _solve(fact.shape, others, family.value) or ()
            sized.append(ClassSized(name, family.keys[0], family.space, fact.shape, axes, fact.parameter, counted))
    return sized


def _stems(name: str) -> list[str]:
    """Return the name with one of its numbers left out, once for each number."""
    parts = name.split(".")
    return [".".join([*parts[:i], "*", *parts[i + 1 :]]) for i, part in enumerate(parts) if part.isdigit()]


def _solve(shape: Shape, others: Mapping[int, Shape | None], k: int) -> tuple[AxisSize, ...] | None:
    axes: list[AxisSize] = []
    for axis, size in enumerate(shape):
        slopes: set[tuple[int, int]] = set()
        for step, other in others.items():
            if other is None or len(other) != len(shape):
                return None
            slopes.add(divmod(other[axis] - size, step))
        if len(slopes) != 1:
            return None
        slope, uneven = slopes.pop()
        if uneven or slope < 0 or size < slope * k:
            return None
        if slope:
            axes.append(AxisSize(axis, slope, size - slope * k))
    return tuple(axes)


@dataclass(frozen=True)
class KnownHead:
    """A head of a public project whose extra row is not told by its shape.

    Args:
        module: name of the layer, or of the tensor where it is a parameter of its own.
        kinds: of the layer.
        beside: attribute names, one of which its parent must have; none where empty.
        parents: class names, one of which its parent must have; any where empty.
        source: where that is written.
        given: the constructor knows the rows of a buffer of this name, so the file's never replace them.
    """

    module: str
    kinds: tuple[str, ...]
    beside: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    source: str = ""
    given: bool = False


KNOWN_HEADS = (
    KnownHead("class_embed", ("linear",), ("bbox_embed", "mask_embed"), (), "DETR: no object is the last class"),
    KnownHead(
        "class_logits", ("linear",), ("bboxes_delta",), ("RCNNHead",), "SparseR-CNN: no object is the last class"
    ),
    KnownHead("label_enc", ("embedding",), (), (), "DN-DETR: the row after the classes is padding"),
    KnownHead("label_encoder", ("embedding",), (), (), "DN-DETR: the row after the classes is padding"),
    KnownHead("denoising_class_embed", ("embedding",), (), (), "RT-DETR: the row after the classes is padding"),
    KnownHead(
        "cls_score",
        ("linear",),
        ("bbox_pred",),
        ("CosineSimOutputLayers", "FastRCNNOutputLayers"),
        "few-shot-object-detection: background is the last class",
    ),
    KnownHead(
        "prop_score",
        ("linear",),
        ("freq_weight", "cls_score"),
        ("DeticFastRCNNOutputLayers",),
        "Detic: background is the last class",
    ),
    KnownHead("zs_weight", ("other",), (), ("ZeroShotClassifier",), "Detic: background is the last column", given=True),
)
"""Heads whose one extra row is last. An entry needs more than a name: the layer, its neighbours or its class."""


_BOX_WORDS = re.compile(r"box|delta|reg|loc(?!k)")


@dataclass(frozen=True)
class _Meaning:
    """One reading of one axis."""

    offset: int = 0
    rows: int = 1
    groups: int = 1
    extra: int = 0


@dataclass(frozen=True)
class _Verdict:
    meaning: _Meaning
    evidence: Evidence
    witness: str = ""


def _readings(axis: AxisSize) -> list[_Meaning]:
    """List every meaning that an axis may have by its size alone, the commonest first."""
    before_or_after = [_Meaning(extra=axis.rest), _Meaning(offset=axis.rest)] if axis.rest else [_Meaning()]
    if axis.slope == 1:
        return before_or_after
    by_class = [replace(meaning, rows=axis.slope) for meaning in before_or_after]
    return by_class + [replace(meaning, groups=axis.slope) for meaning in before_or_after]


class _Reader:
    """The reader of what the class-sized tensors of one model mean."""

    def __init__(
        self, facts: Mapping[str, TensorFacts], sized: Mapping[str, ClassSized], odd: Mapping[str, int]
    ) -> None:
        self.facts, self.sized, self.odd = facts, sized, odd
        self.children: dict[str, set[str]] = {}
        for name in facts:
            parts = name.split(".")
            for i in range(len(parts)):
                self.children.setdefault(".".join(parts[:i]), set()).add(parts[i])
        self.hidden = self._hidden_places()

    # The place of a tensor.

    def _layer(self, name: str) -> tuple[str, str]:
        """Split off ``(path of its parent, name of the layer)``; numbers of lists are passed over."""
        path = self.facts[name].owner.split(".") if self.facts[name].owner else []
        while path and path[-1].isdigit():
            path.pop()
        return ".".join(path[:-1]), path[-1] if path else ""

    def _parent_classes(self, path: str, name: str) -> set[str]:
        return {full.rpartition(".")[2] for p, names in self.facts[name].around if p == path for full in names}

    def _inside(self, name: str, module: str, cls: str) -> str | None:
        """Return the path below the innermost module of a framework class or a subclass; ``None`` without one."""
        for path, names in reversed(self.facts[name].around):
            if any(full.rpartition(".")[2] == cls and module in full.rpartition(".")[0] for full in names):
                return name[len(path) + 1 :] if path else name
        return None

    def output(self, sized: ClassSized) -> AxisSize | None:
        """Find the axis that makes predictions, where the layer tells which it is."""
        axis = _OUTPUT.get(self.facts[sized.tensor].kind, sized.axes[0].axis) if len(sized.shape) > 1 else 0
        return next((a for a in sized.axes if a.axis == axis), None)

    # What leaves one meaning.

    def read(self, sized: ClassSized, axis: AxisSize) -> list[_Verdict] | list[_Meaning]:
        """Give one verdict on an axis, or every meaning that is left."""
        meanings = _readings(axis)
        if len(meanings) == 1:
            return [_Verdict(meanings[0], Evidence.ONE_MEANING)]
        fact = self.facts[sized.tensor]
        if len(sized.shape) > 1 and _INPUT.get(fact.kind) == axis.axis:
            below = self._inside(sized.tensor, "point_rend", "StandardPointHead")
            if below is not None and axis.slope == 1:
                return [_Verdict(_Meaning(offset=axis.rest), Evidence.FRAMEWORK_CLASS, "StandardPointHead")]
            return meanings
        if (axis.slope > 1 and axis.rest > 0) or axis.rest > 1:
            return meanings
        verdicts = list(self._several_rows(sized, axis) if axis.slope > 1 else self._one_extra(sized))
        agreed = {verdict.meaning for verdict in verdicts}
        return verdicts[:1] if len(agreed) == 1 else meanings

    def _one_extra(self, sized: ClassSized) -> Iterator[_Verdict]:
        name, fact = sized.tensor, self.facts[sized.tensor]
        last, first = _Meaning(extra=1), _Meaning(offset=1)
        parent, layer = self._layer(name)
        below = self._inside(name, "detectron2.modeling", "FastRCNNOutputLayers")
        if below is not None and below.startswith("cls_score."):
            yield _Verdict(last, Evidence.FRAMEWORK_CLASS, "FastRCNNOutputLayers")
        below = self._inside(name, "detectron2.modeling", "ROIHeads")
        if below is not None and re.match(r"box_predictor\.(\d+\.)?cls_score\.", below) and fact.kind != "embedding":
            yield _Verdict(last, Evidence.FRAMEWORK_CLASS, "ROIHeads")
        if fact.kind == "embedding" and fact.padding is not None and fact.padding in (0, fact.shape[0] - 1):
            yield _Verdict(first if fact.padding == 0 else last, Evidence.PADDING_INDEX, f"{fact.owner}.padding_idx")
        for witness, row in self.odd.items():
            if self._weighs(witness, sized):
                yield _Verdict(first if row == 0 else last, Evidence.LOSS_WEIGHTS, witness)
        leaf = name.rpartition(".")[2]
        for head in KNOWN_HEADS:
            own = fact.kind == "other" and leaf == head.module
            at = fact.owner if own else parent
            if not (own or layer == head.module) or fact.kind not in head.kinds:
                continue
            if head.beside and not self.children.get(at, set()).intersection(head.beside):
                continue
            if head.parents and not self._parent_classes(at, name).intersection(head.parents):
                continue
            yield _Verdict(last, Evidence.KNOWN_HEAD, head.source)

    def _weighs(self, witness: str, sized: ClassSized) -> bool:
        """Tell whether a vector holds loss weights of a classifier: the only one of its name with an extra row."""
        weights = self.sized[witness]
        if weights.space != sized.space or self.facts[sized.tensor].kind not in ("linear", "conv"):
            return False
        names = {
            self._layer(other.tensor)[1]
            for other in self.sized.values()
            if other.space == sized.space
            and other.parameter
            and self.facts[other.tensor].kind != "embedding"
            and any((a.slope, a.rest) == (1, 1) for a in other.axes)
        }
        return len(names) == 1 and [(a.slope, a.rest) for a in weights.axes] == [(1, 1)]

    def _several_rows(self, sized: ClassSized, axis: AxisSize) -> Iterator[_Verdict]:
        name, fact, slope = sized.tensor, self.facts[sized.tensor], axis.slope
        parent, layer = self._layer(name)
        below = self._inside(name, "detectron2.modeling", "FastRCNNOutputLayers")
        if slope in (4, 5) and below is not None and below.startswith("bbox_pred."):
            yield _Verdict(_Meaning(rows=slope), Evidence.FRAMEWORK_CLASS, "FastRCNNOutputLayers")
        beside = self._classifier_in(parent, sized)
        if slope in (4, 5) and beside and _BOX_WORDS.search(layer):
            yield _Verdict(_Meaning(rows=slope), Evidence.BOXES_BESIDE_CLASSIFIER, beside)
        for number, path in fact.anchors:
            if number == slope:
                yield _Verdict(_Meaning(groups=slope), Evidence.ANCHORS, path)
        regressor = self._regressor_in(parent, slope)
        if regressor:
            yield _Verdict(_Meaning(groups=slope), Evidence.ANCHORS, regressor)

    def _classifier_in(self, parent: str, sized: ClassSized) -> str:
        for other in self.sized.values():
            if other.key == sized.key and self._layer(other.tensor)[0] == parent and other.parameter:
                out = self.output(other)
                if out is not None and out.slope == 1 and out.rest <= 1 and other.tensor != sized.tensor:
                    return other.tensor
        return ""

    def _regressor_in(self, parent: str, anchors: int) -> str:
        """Find a class-agnostic box regressor of the same module, with four or five numbers per anchor."""
        for name, fact in self.facts.items():
            if name in self.sized or fact.kind not in ("conv", "linear") or len(fact.shape) < 2:
                continue
            at, layer = self._layer(name)
            if at == parent and _BOX_WORDS.search(layer) and fact.shape[0] in (4 * anchors, 5 * anchors):
                return name
        return ""

    # One tensor.

    def decide(self, sized: ClassSized) -> Found | Refusal:
        """Decide the tensor's layout by its own evidence, or say why it has none."""
        fact = self.facts[sized.tensor]
        if not sized.axes:
            return Refusal(sized, RefusalCause.ONE_TENSOR_PER_CLASS if sized.one_per_class else RefusalCause.NOT_AFFINE)
        vector = not sized.parameter and fact.shape[sized.axes[0].axis] == _numel(fact.shape)
        if vector and fact.kind != "norm":
            axis = sized.axes[0]
            return Found(sized, self._one_axis(sized, axis, _readings(axis)[0], rebuilt=True), Evidence.BUFFER)
        if sized.tensor.startswith(self.hidden):
            return Refusal(sized, RefusalCause.HIDDEN_WIDTH)
        read = {axis: self.read(sized, axis) for axis in sized.axes}
        verdicts = {axis: found[0] for axis, found in read.items() if isinstance(found[0], _Verdict)}
        if len(verdicts) < len(read):
            open_axis = next(axis for axis in read if axis not in verdicts)
            is_input = len(sized.shape) > 1 and _INPUT.get(fact.kind) == open_axis.axis
            cause = RefusalCause.FEATURES_OR_CLASSES_FIRST if is_input else RefusalCause.TWO_MEANINGS
            return Refusal(sized, cause, self._meanings(sized, read))
        layout = self.layout(sized, {axis: verdict.meaning for axis, verdict in verdicts.items()})
        if layout is None:
            return Refusal(sized, RefusalCause.NO_LAYOUT_SAYS_IT)
        told = max(verdicts.values(), key=lambda verdict: verdict.evidence is not Evidence.ONE_MEANING)
        if not sized.parameter and fact.kind != "norm":
            if not any(head.given and sized.tensor.endswith(head.module) for head in KNOWN_HEADS):
                return Refusal(sized, RefusalCause.CARRIED_OR_REBUILT, (layout,))
            layout = replace(layout, given="file")
        return Found(sized, layout, told.evidence, told.witness)

    def _hidden_places(self) -> tuple[str, ...]:
        """List where an input or a norm is as wide as the class count: what feeds it need not predict classes."""
        places = []
        for name, sized in self.sized.items():
            fact = self.facts[name]
            inputs = [a for a in sized.axes if len(sized.shape) > 1 and _INPUT.get(fact.kind) == a.axis]
            if any(not a.rest for a in inputs) or (fact.kind == "norm" and sized.axes):
                parent = fact.owner.rpartition(".")[0]
                places.append(f"{parent or fact.owner}.")
        return tuple(places)

    def _meanings(self, sized: ClassSized, read: Mapping[AxisSize, Any]) -> tuple[HeadLayout, ...]:
        combined: list[dict[AxisSize, _Meaning]] = [{}]
        for axis, found in read.items():
            options = [x.meaning if isinstance(x, _Verdict) else x for x in found]
            combined = [{**chosen, axis: option} for chosen in combined for option in options]
        layouts = (self.layout(sized, chosen) for chosen in combined)
        return tuple(layout for layout in layouts if layout is not None)

    def layout(self, sized: ClassSized, meanings: Mapping[AxisSize, _Meaning]) -> HeadLayout | None:
        """Join the axes to one layout; ``None`` where they do not go together."""
        one, *others = meanings.items()
        if any((m.groups, m.extra) != (one[1].groups, one[1].extra) for _, m in others):
            return None
        first = self._one_axis(sized, *one)
        axes = [
            (axis.axis, m.offset) if m.rows == first.rows_per_class else (axis.axis, m.offset, m.rows)
            for axis, m in meanings.items()
        ]
        return replace(first, axes=tuple(axes))

    def _one_axis(self, sized: ClassSized, axis: AxisSize, m: _Meaning, *, rebuilt: bool = False) -> HeadLayout:
        parent, layer = self._layer(sized.tensor)
        return HeadLayout(
            sized.tensor,
            sized.space,
            self._group(sized),
            parent or layer or sized.tensor,
            ((axis.axis, m.offset),),
            m.rows,
            m.groups,
            m.extra,
            rebuilt,
        )

    def _group(self, sized: ClassSized) -> str:
        """Name what all tensors of one count key have in common; that key where it is nothing."""
        owners = [
            self.facts[x.tensor].owner.split(".")
            for x in self.sized.values()
            if x.key == sized.key and (x.parameter or not sized.parameter)
        ]
        # Of lists, not of strings: whole names.
        return ".".join(commonprefix(owners)) or sized.key  # noqa: RUF071


def _numel(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def read_layouts(
    facts: Mapping[str, TensorFacts], sized: Sequence[ClassSized], odd: Mapping[str, int] | None = None
) -> tuple[tuple[Found, ...], tuple[Refusal, ...]]:
    """Give every class-sized tensor its layout, or refuse it with the meanings that are left.

    Args:
        facts: of the model as configured.
        sized: class-sized tensors of all its count keys.
        odd: vectors that are no parameter -> the one row that differs from all others, first or last (0 or -1).
    """
    own = {x.tensor: x for x in sized}
    reader = _Reader(facts, own, {name: row for name, row in (odd or {}).items() if name in own})
    decided = {x.tensor: reader.decide(x) for x in own.values()}
    twice = {x.tensor for x in sized if x is not own[x.tensor]}
    for name in twice:
        decided[name] = Refusal(own[name], RefusalCause.TWO_COUNTS)
    for _ in range(2):  # A bias from its weight, then the same layer of other stages from it.
        for name, refusal in list(decided.items()):
            if isinstance(refusal, Refusal) and refusal.cause is RefusalCause.TWO_MEANINGS:
                decided[name] = _inherit(refusal, reader, decided)
    ordered = [decided[name] for name in facts if name in decided]
    refused = [x for x in ordered if isinstance(x, Refusal)]
    return (
        tuple(x for x in ordered if isinstance(x, Found)),
        tuple(replace(x, pattern=_pattern(x, refused, facts)) for x in refused),
    )


def _inherit(refusal: Refusal, reader: _Reader, decided: Mapping[str, Found | Refusal]) -> Found | Refusal:
    """Take the predicting axis from another tensor of the same layer, or from the same layer of another stage."""
    name, mine = refusal.sized.tensor, reader.output(refusal.sized)
    fact = reader.facts[name]
    places = {reader._layer(name)} if any(part.isdigit() for part in fact.owner.split(".")) else set()
    for other in decided.values():
        if not isinstance(other, Found) or other.layout.rebuilt or mine is None or len(refusal.sized.axes) > 1:
            continue
        their = reader.output(other.sized)
        there = reader.facts[other.sized.tensor]
        near = there.owner == fact.owner or (there.kind == fact.kind and reader._layer(other.sized.tensor) in places)
        same = their is not None and (their.slope, their.rest) == (mine.slope, mine.rest)
        if near and same and other.sized.key == refusal.sized.key and len(other.sized.axes) == 1:
            (entry,) = other.layout.axes
            for meaning in refusal.meanings:
                if meaning.same_kind(replace(other.layout, axes=((meaning.axes[0][0], *entry[1:]),))):
                    return Found(refusal.sized, meaning, Evidence.SAME_LAYER, other.sized.tensor)
    return refusal


def _pattern(refusal: Refusal, refused: Sequence[Refusal], facts: Iterable[str]) -> str:
    """Replace numbers in the tensor's name by ``*``, where that matches only tensors of the same meanings."""
    name = refusal.sized.tensor
    wide = ".".join("*" if part.isdigit() else part for part in name.split("."))
    kinds = {x.sized.tensor: [(m.axes, m.rows_per_class, m.groups, m.extra) for m in x.meanings] for x in refused}
    matched = [other for other in facts if fnmatchcase(other, wide)]
    return wide if all(kinds.get(other) == kinds[name] for other in matched) else name
