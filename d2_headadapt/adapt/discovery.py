"""What building a model at several class counts says about its class axes, as data.

A model that is built with K, K + 1 and K + 10 classes says by itself which of its tensors are sized by the count and
how. Where that leaves one meaning it is :class:`Found`, with the evidence; where it leaves two it is a :class:`Refusal`
that holds both and the lines that declare one. Declared layouts are held against it (:func:`check_declared`) and joined
with it (:func:`settle_layouts`). :mod:`d2_headadapt.adapt.class_axes` reads it off shapes.

    K   number of classes that a count key holds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from ..errors import LayoutError
from .layouts import HeadLayout

Shape = tuple[int, ...]


class Evidence(str, Enum):
    """The evidence that left one meaning for a class-sized tensor."""

    ONE_MEANING = "one_meaning"
    """One row per class and nothing else."""
    FRAMEWORK_CLASS = "framework_class"
    """A class of detectron2 around the tensor, or a subclass, fixes the order of its rows."""
    KNOWN_HEAD = "known_head"
    """A head of a public project, recognised by its name, its layer and its neighbours."""
    LOSS_WEIGHTS = "loss_weights"
    """A vector of loss weights beside it differs in the one row that is no class."""
    PADDING_INDEX = "padding_index"
    """The embedding says which of its rows is padding."""
    ANCHORS = "anchors"
    """The model has that many anchors."""
    BOXES_BESIDE_CLASSIFIER = "boxes_beside_classifier"
    """Four or five numbers per class, beside the classifier of the same module."""
    SAME_LAYER = "same_layer"
    """The weight of the same layer, or the same layer of another stage, is known."""
    BUFFER = "buffer"
    """A vector that is no parameter: the constructor computes it."""


class RefusalCause(str, Enum):
    """The reason why a class-sized tensor got no layout."""

    TWO_MEANINGS = "two_meanings"
    FEATURES_OR_CLASSES_FIRST = "features_or_classes_first"
    CARRIED_OR_REBUILT = "carried_or_rebuilt"
    HIDDEN_WIDTH = "hidden_width"
    NOT_AFFINE = "not_affine"
    TWO_COUNTS = "two_counts"
    ONE_TENSOR_PER_CLASS = "one_tensor_per_class"
    NO_LAYOUT_SAYS_IT = "no_layout_says_it"
    OTHER_COUNT = "other_count"
    SHAPES_ONLY = "shapes_only"


_CAUSES = {
    RefusalCause.TWO_MEANINGS: "the shape has more than one meaning",
    RefusalCause.FEATURES_OR_CLASSES_FIRST: "the input is features and classes, in either order",
    RefusalCause.CARRIED_OR_REBUILT: "a buffer that a file may fill or the constructor may compute",
    RefusalCause.HIDDEN_WIDTH: "a hidden width follows the class count there, so the rows need not be classes",
    RefusalCause.NOT_AFFINE: "the size is no multiple of the class count plus a rest",
    RefusalCause.TWO_COUNTS: "two class counts decide the size",
    RefusalCause.ONE_TENSOR_PER_CLASS: "there is one such tensor per class",
    RefusalCause.NO_LAYOUT_SAYS_IT: "the axes differ in their extra rows, which no layout can say",
    RefusalCause.OTHER_COUNT: "it follows a count that is not the class table's",
    RefusalCause.SHAPES_ONLY: "its sizes are those of the class counts, and the model cannot be built with others",
}


@dataclass(frozen=True)
class AxisSize:
    """``size(K) = slope * K + rest`` of one axis."""

    axis: int
    slope: int
    rest: int


@dataclass(frozen=True)
class ClassSized:
    """One tensor whose shape follows a class count.

    Args:
        tensor: its name in the ``state_dict``.
        key: the count key that it follows (the first, where several move together).
        space: label space of that key.
        shape: as built with the config's own counts.
        axes: the axes that follow; empty where no straight line fits, or where there is one tensor per class.
        parameter: trained, else a buffer.
        one_per_class: more classes do not make it larger, but make more tensors like it.
    """

    tensor: str
    key: str
    space: str
    shape: Shape
    axes: tuple[AxisSize, ...]
    parameter: bool = True
    one_per_class: bool = False

    @property
    def sizes(self) -> str:
        """The sizes as a formula, such as ``axis 0 = 1 K + 1``."""
        return ", ".join(f"axis {a.axis} = {a.slope} K" + (f" + {a.rest}" if a.rest else "") for a in self.axes)


@dataclass(frozen=True)
class Found:
    """A class-sized tensor with one meaning.

    Args:
        sized: the tensor.
        layout: its meaning.
        evidence: what decided.
        witness: the tensor, module or attribute that decided; empty where the shape did.
    """

    sized: ClassSized
    layout: HeadLayout
    evidence: Evidence
    witness: str = ""


@dataclass(frozen=True)
class Refusal:
    """A class-sized tensor that is not taken by position and of which nothing is assumed.

    Args:
        sized: the tensor.
        cause: why.
        meanings: the layouts that are possible, as far as they can be told.
        pattern: a tensor name pattern for ``register_head_layout`` that matches this tensor and its like alone.
    """

    sized: ClassSized
    cause: RefusalCause
    meanings: tuple[HeadLayout, ...] = ()
    pattern: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """One ``register_head_layout(...)`` per meaning, to be typed."""
        return tuple(_line(self.pattern or self.sized.tensor, meaning) for meaning in self.meanings)

    @property
    def reason(self) -> str:
        """The cause in words."""
        return _CAUSES[self.cause]

    def error(self) -> LayoutError:
        """Make an exception that names both meanings and the lines that declare one."""
        spelt = " or ".join(f"{line}  # {_spelt(m)}" for line, m in zip(self.lines, self.meanings, strict=True))
        return LayoutError(
            self.sized.tensor,
            expected="a layout that says where its classes are",
            found=f"a tensor of shape {self.sized.shape} that follows {self.sized.key} ({self.sized.sizes or 'no line'}"
            f"): {self.reason}",
            fix=f"Declare one: {spelt}." if spelt else "Give its module a head_layouts method that describes it.",
        )


@dataclass(frozen=True)
class Stuck:
    """A count key that could not be changed, so that nothing is known of what follows it.

    Args:
        key, value: of the config.
        error: type and text of what the constructor raised when this key alone was changed.
        line: ``file:line: code`` that raised.
        tried: what else was tried, such as keys moved along with it.
    """

    key: str
    value: int
    error: str
    line: str
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class CountFamily:
    """Count keys that move together, and with what they were built.

    Args:
        keys: one, or several where a constructor asserts that they are equal.
        value: K.
        space: label space of the classes that they count.
        built: the counts of the builds, K first.
        lowered: what held the count and was taken away or grown for the builds, such as ``USE_FED_LOSS off``.
    """

    keys: tuple[str, ...]
    value: int
    space: str
    built: tuple[int, ...]
    lowered: str = ""


@dataclass(frozen=True)
class Discovery:
    """The result of building a model at several class counts: where its class axes are.

    Args:
        families: the count keys that size tensors.
        found: tensors with one meaning, in ``state_dict`` order.
        refused: class-sized tensors without one.
        idle: count keys that change no shape.
        stuck: count keys that could not be changed.
        unprobed: tensors that were missing from the builds because what holds the count was taken away.
        seconds: what it took.
    """

    families: tuple[CountFamily, ...] = ()
    found: tuple[Found, ...] = ()
    refused: tuple[Refusal, ...] = ()
    idle: tuple[str, ...] = ()
    stuck: tuple[Stuck, ...] = ()
    unprobed: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def layouts(self) -> tuple[HeadLayout, ...]:
        """The layouts that were found."""
        return tuple(found.layout for found in self.found)

    @property
    def sized(self) -> dict[str, ClassSized]:
        """Every class-sized tensor by name, with a meaning or without."""
        return {
            **{x.sized.tensor: x.sized for x in self.found},
            **{x.sized.tensor: x.sized for x in self.refused},
        }

    @property
    def complete(self) -> bool:
        """Whether no key was stuck and no tensor unseen: then a tensor that is not named here serves all classes."""
        return not self.stuck and not self.unprobed

    def saw(self, tensor: str) -> bool:
        """Tell whether this search would have noticed that a tensor follows a class count."""
        return not self.stuck and tensor not in self.unprobed

    def describe(self) -> list[str]:
        """Put the result into lines: one per family of keys, then the refused, the stuck and the idle."""
        lines = []
        for family in self.families:
            mine = [x.layout for x in self.found if x.sized.key == family.keys[0]]
            counts = f"{', '.join(map(str, family.built[:-1]))} and {family.built[-1]} classes"
            held = f" with {family.lowered}" if family.lowered else ""
            tensors = _folded((x.tensor, "rebuilt" if x.rebuilt else _spelt(x)) for x in mine) or "no layout"
            lines.append(f"found by building with {counts} ({' and '.join(family.keys)}){held}: {tensors}")
        causes = dict.fromkeys((refusal.sized.key, refusal.reason) for refusal in self.refused)
        for key, reason in causes:
            names = [(x.sized.tensor, "") for x in self.refused if (x.sized.key, x.reason) == (key, reason)]
            lines.append(f"refused, following {key}: {_folded(names)}: {reason}")
        for stuck in self.stuck:
            lines.append(f"not found out: what follows {stuck.key}, which cannot be changed: {stuck.error}")
        if self.idle:
            lines.append(f"no shape of this model follows {', '.join(self.idle)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Write the plain form; :meth:`from_json` reads it."""
        plain: dict[str, Any] = asdict(self)
        for entry in plain["found"]:
            entry["evidence"] = entry["evidence"].value
        for entry in plain["refused"]:
            entry["cause"] = entry["cause"].value
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Discovery:
        """Read :meth:`to_json`'s form, also after it went through a JSON file."""
        try:
            return cls(
                families=tuple(CountFamily(**_tuples(entry)) for entry in data["families"]),
                found=tuple(
                    Found(_sized(x["sized"]), _layout(x["layout"]), Evidence(x["evidence"]), str(x["witness"]))
                    for x in data["found"]
                ),
                refused=tuple(
                    Refusal(
                        _sized(x["sized"]), RefusalCause(x["cause"]), tuple(map(_layout, x["meanings"])), x["pattern"]
                    )
                    for x in data["refused"]
                ),
                idle=tuple(data["idle"]),
                stuck=tuple(Stuck(**_tuples(entry)) for entry in data["stuck"]),
                unprobed=tuple(data["unprobed"]),
                seconds=float(data["seconds"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise LayoutError(
                "a stored discovery",
                expected="what Discovery.to_json writes",
                found=f"{type(exc).__name__}: {exc}",
                fix="Run the discovery again.",
            ) from exc


def _folded(tensors: Iterable[tuple[str, str]]) -> str:
    """Join tensors that differ in numbers and last word only, each with what is said of it."""
    stems: dict[tuple[str, str], dict[str, None]] = {}
    for name, said in tensors:
        stem, _, leaf = ".".join("*" if part.isdigit() else part for part in name.split(".")).rpartition(".")
        stems.setdefault((stem, said), {})[leaf] = None
    words = []
    for (stem, said), leaves in stems.items():
        words.append(f"{stem}{'.' if stem else ''}{'/'.join(leaves)}" + (f" ({said})" if said else ""))
    return ", ".join(words)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _sized(entry: Mapping[str, Any]) -> ClassSized:
    return ClassSized(**{**_tuples(entry), "axes": tuple(AxisSize(**axis) for axis in entry["axes"])})


def _layout(entry: Mapping[str, Any]) -> HeadLayout:
    return HeadLayout(**{**entry, "axes": tuple(tuple(axis) for axis in entry["axes"])})


def _spelt(layout: HeadLayout) -> str:
    """Describe a layout, with what stands before the classes, which ``HeadLayout.describe`` does not tell."""
    before = [entry[1] for entry in layout.axes if entry[1]]
    return layout.describe() + (f", {before[0]} before the classes" if before else "")


def _line(pattern: str, layout: HeadLayout) -> str:
    default = HeadLayout("", "thing", "")
    words = [repr(pattern)]
    for name in ("space", "group", "axes", "rows_per_class", "groups", "extra"):
        if getattr(layout, name) != getattr(default, name):
            words.append(f"{name}={getattr(layout, name)!r}")
    return f"register_head_layout({', '.join(words)})"


class Conflict(str, Enum):
    """A way in which a declared layout and the shapes disagree."""

    NOT_CLASS_SIZED = "not_class_sized"
    AGNOSTIC_BUT_CLASS_SIZED = "agnostic_but_class_sized"
    OTHER_SIZE = "other_size"
    OTHER_PLACE = "other_place"


@dataclass(frozen=True)
class Disagreement:
    """A declared layout that the shapes contradict.

    Args:
        declared: the layout.
        conflict: how.
        sized: what was seen; ``None`` where the tensor's shape follows no count.
        read: the layout that was found, where there is one.
    """

    declared: HeadLayout
    conflict: Conflict
    sized: ClassSized | None = None
    read: HeadLayout | None = None

    def error(self) -> LayoutError:
        """Make an exception of this disagreement."""
        seen = "a shape that follows no class count"
        if self.read is not None:
            seen = f"{_spelt(self.read)} ({self.sized.sizes if self.sized else ''})"
        elif self.sized is not None:
            seen = f"{self.sized.sizes or 'sizes on no line'}, following {self.sized.key}"
        axes = [entry[0] for entry in self.declared.axes]
        return LayoutError(
            f"layout of {self.declared.tensor}",
            expected=f"what was declared: {_spelt(self.declared)}" + (f" on axis {axes[0]}" if axes else ""),
            found=seen,
            fix="Correct the arguments of register_head_layout, or the head_layouts method of its module.",
        )


def check_declared(found: Discovery, declared: Iterable[HeadLayout]) -> tuple[Disagreement, ...]:
    """Hold declared layouts against what building the model at several counts showed.

    A declared layout decides where the shapes leave several meanings, and it alone can say that a tensor is agnostic
    by choice; what it says must agree with the sizes. What follows a stuck key cannot be checked.
    """
    disagreements: list[Disagreement] = []
    known = {x.sized.tensor: x.layout for x in found.found}
    sized = found.sized
    values = {family.keys[0]: family.value for family in found.families}
    for layout in declared:
        seen = sized.get(layout.tensor)
        own = known.get(layout.tensor)
        if seen is None:
            # An open key may size it, and a rebuilt tensor is never read from a file.
            if layout.axes and not layout.rebuilt and found.saw(layout.tensor):
                disagreements.append(Disagreement(layout, Conflict.NOT_CLASS_SIZED))
        elif layout.agnostic:
            disagreements.append(Disagreement(layout, Conflict.AGNOSTIC_BUT_CLASS_SIZED, seen, own))
        elif not _same_sizes(layout, seen, values.get(seen.key, 1)):
            disagreements.append(Disagreement(layout, Conflict.OTHER_SIZE, seen, own))
        elif own is not None and not own.rebuilt and not layout.rebuilt and not own.same_kind(layout):
            disagreements.append(Disagreement(layout, Conflict.OTHER_PLACE, seen, own))
    return tuple(disagreements)


def _same_sizes(layout: HeadLayout, seen: ClassSized, k: int) -> bool:
    axes = {a.axis: a for a in seen.axes}
    if not axes:
        return True  # No line fits, so only the declaration can tell.
    return set(axes) == set(layout.class_axes) and all(
        layout.size(axis, n) == a.slope * n + a.rest for axis, a in axes.items() for n in (k, k + 1, k + 10)
    )


def settle_layouts(declared: Iterable[HeadLayout], found: Discovery) -> tuple[HeadLayout, ...]:
    """Join declared layouts and found ones: declared first, found for the rest.

    One class and class-agnostic have the same shape, so a layout that was read off the shape of a one-class model may
    have taken one for the other: there the builds with more classes decide. A declared space wins over a key's name.
    """
    settled: dict[str, HeadLayout] = {}
    spaces: dict[str, str] = {}
    sized, known = found.sized, {x.sized.tensor: x.layout for x in found.found}
    ones = {family.keys[0]: family.space for family in found.families if family.value == 1}
    for layout in declared:
        seen = sized.get(layout.tensor)
        if seen is not None:
            spaces.setdefault(seen.key, layout.space)
        one_class = layout.space in ones.values() if seen is None else seen.key in ones
        if one_class and layout.axes and not layout.rebuilt and (seen is not None or found.saw(layout.tensor)):
            grows = {a.axis for a in seen.axes} if seen is not None else set()
            axes = tuple(entry for entry in layout.axes if entry[0] in grows)
            if axes != layout.axes and (seen is None or seen.axes):
                layout = replace(layout, axes=axes, by_choice=True)
        elif one_class and layout.by_choice and not layout.axes and layout.tensor in known:
            layout = replace(layout, axes=known[layout.tensor].axes, by_choice=False)
        settled[layout.tensor] = layout
    for entry in found.found:
        if entry.layout.tensor not in settled:
            space = spaces.get(entry.sized.key, entry.layout.space)
            settled[entry.layout.tensor] = replace(entry.layout, space=space)
    return tuple(settled.values())


def undeclared(declared: Iterable[HeadLayout], found: Discovery) -> tuple[Refusal, ...]:
    """List the refused tensors that no declared layout decides: what a load must not take by position."""
    claimed = {layout.tensor for layout in declared}
    return tuple(refusal for refusal in found.refused if refusal.sized.tensor not in claimed)
