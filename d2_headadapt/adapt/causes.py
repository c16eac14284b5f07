"""Causes of what a plan does to a tensor, as values to decide by, and the sentence that people read.

The planner decides with values of this module and everybody who acts on a decision reads them; :func:`sentence` is the
only place where they become English, and no code reads that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from ..errors import visible
from ..key import Key

Shape = tuple[int, ...]


class Cause(str, Enum):
    """The reason why a tensor is taken, left or refused; the value stands in a plan's JSON.

    Example:
        >>> from d2_headadapt import Cause
        >>> Cause("rebuilt").meant, Cause.EXCLUDED.by_user
        (True, True)
    """

    # The file's values are used.
    SAME_SHAPE = "same_shape"
    """No classes as far as anyone declared, and the same shape on both sides."""
    IDENTICAL = "identical"
    """The same classes in the same order."""
    MATCHED = "matched"
    """Classes were found by name (or position)."""
    MATCHED_AND_NEAREST = "matched_and_nearest"
    """As matched; new rows start from the nearest carried classes."""
    MATCHED_AND_TEXT = "matched_and_text"
    """As matched; new classes keep the embeddings of the text file."""
    AGNOSTIC = "agnostic"
    """Serves all classes alike."""
    SHAPES_AGREE = "shapes_agree"
    """Unverified: the classes of one side are unknown."""
    MAYBE_CLASSES = "maybe_classes"
    """Unverified: as many rows as there are classes, and no layout says what they are."""

    UNKNOWN_KEPT = "unknown_kept"
    """Unverified: class-sized, no layout moves it, and the user keeps the rows where they lie."""

    # The model's values stay because they are meant to.
    REBUILT = "rebuilt"
    """Computed from the dataset by the model's constructor."""
    GIVEN_BY_TEXT = "given_by_text"
    """The embeddings that the config names stay; of ours, where TEXT.PRECEDENCE says so."""
    NO_CLASS_BUT_TEXT = "no_class_but_text"
    """No class is in the file, and all have embeddings."""

    # The user left it out.
    EXCLUDED = "excluded"
    NOT_INCLUDED = "not_included"
    UNKNOWN_AFRESH = "unknown_afresh"
    """Class-sized, no layout moves it, and the user lets it start afresh."""
    FORCED_NONE = "forced_none"
    """The source classes of its label space are 'none'."""

    # The file has nothing that fits.
    NOT_IN_FILE = "not_in_file"
    PART_MISSING = "part_missing"
    """Not in the file, which has other tensors of the same head."""
    NO_CLASS_IN_FILE = "no_class_in_file"
    OTHER_KIND = "other_kind"
    """Other rows per class, anchors or background, as the file itself says."""
    OTHER_SHAPE = "other_shape"
    OTHER_ANCHORS = "other_anchors"
    AGNOSTIC_IN_MODEL = "agnostic_in_model"
    """One row per class in the file, one for all in the model."""
    AGNOSTIC_IN_FILE = "agnostic_in_file"
    UNKNOWN_CLASSES = "unknown_classes"
    """Another number of rows, and the classes of one side are unknown."""
    NO_LAYOUT = "no_layout"
    """Another shape, and no layout says that its rows are classes."""

    # Only the user can say what is meant.
    MODEL_MISFIT = "model_misfit"
    """The model was not built for its class table."""
    TABLE_MISFIT = "table_misfit"
    """The source table has another length than the file's rows."""
    UNKNOWN_HEAD = "unknown_head"
    """Its size follows the class count, the classes differ, and no layout moves it."""
    GROUP_REFUSED = "group_refused"
    """Another tensor of its head group is refused."""

    # Dropped.
    NOT_IN_MODEL = "not_in_model"
    SEVERAL_PLACES = "several_places"
    """Its name fits several tensors of the model."""

    UNSTATED = "unstated"
    """Nobody said: a plan made by hand, or the JSON of another version, whose words are kept."""

    @property
    def meant(self) -> bool:
        """Whether the values that the model's constructor made are the right ones: nothing of them is random."""
        return self in (Cause.REBUILT, Cause.GIVEN_BY_TEXT, Cause.NO_CLASS_BUT_TEXT)

    @property
    def by_user(self) -> bool:
        """Whether a config key asks to leave the tensor out."""
        return self in (Cause.EXCLUDED, Cause.NOT_INCLUDED, Cause.FORCED_NONE, Cause.UNKNOWN_AFRESH)

    @property
    def surprising(self) -> bool:
        """A head that the file has trained starts afresh, and neither the class lists nor a key of the user ask for it.

        Example:
            >>> from d2_headadapt import Cause
            >>> Cause.UNKNOWN_CLASSES.surprising, Cause.NO_CLASS_IN_FILE.surprising, Cause.NOT_IN_FILE.surprising
            (True, False, False)
        """
        expected = (Cause.NO_CLASS_IN_FILE, Cause.NOT_IN_FILE)
        return not self.meant and not self.by_user and self not in expected


@dataclass(frozen=True)
class Why:
    """A cause and what belongs to it; fields that say nothing about a cause are as they are here.

    Args:
        cause: see :class:`Cause`.
        blame: the tensor of the same head group at which the cause shows, where that is another one.
        key: the config key that asks for it, or that would mend it.
        side: ``"file"`` or ``"model"``, whichever has unknown classes.
        source_shape, target_shape: in the file and in the model, of the tensor to blame.
        source_kind, target_kind: how classes lie in it there, see :meth:`HeadLayout.describe`.
        table: where the class table comes from.
        length: classes of that table, or new classes of the tensor.
        count: classes that a shape holds, places, or rows.
        names: one class, places in the model, or lines that declare a layout.
        text: of a plan that states no cause, or what is known of a head that nobody declared.

    Example:
        >>> from d2_headadapt import Cause, TensorPlan, Why
        >>> why = Why(Cause.OTHER_SHAPE, source_shape=(4, 16), target_shape=(3, 8))
        >>> TensorPlan("cls_score.weight", "initialised", why=why).reason
        '(4, 16) in the file, (3, 8) in the model'
    """

    cause: Cause = Cause.UNSTATED
    blame: str = ""
    key: str = ""
    side: str = ""
    source_shape: Shape | None = None
    target_shape: Shape | None = None
    source_kind: str = ""
    target_kind: str = ""
    table: str = ""
    length: int | None = None
    count: int | None = None
    names: tuple[str, ...] = ()
    text: str = ""

    def facts(self) -> dict[str, Any]:
        """Return everything but the cause, in plain types, as far as it says something."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cause"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, "", ())
        }

    @classmethod
    def from_facts(cls, cause: str | None, facts: Mapping[str, Any], text: str) -> Why:
        """Read what :meth:`facts` gives.

        Args:
            cause: value of a :class:`Cause`; where this version does not know it, ``text`` is all that is kept.
            facts: keys that this version does not know are ignored.
            text: the reason in words.

        Raises:
            TypeError, ValueError: a fact of another type.
        """
        if cause not in {known.value for known in Cause}:
            return cls(text=text)
        known = {field.name: facts[field.name] for field in fields(cls) if field.name in facts}
        for name in ("source_shape", "target_shape"):
            if known.get(name) is not None:
                known[name] = tuple(int(length) for length in known[name])
        if "names" in known:
            known["names"] = tuple(str(name) for name in known["names"])
        return cls(**{**known, "cause": Cause(cause)})


UNVERIFIED = (Cause.SHAPES_AGREE, Cause.MAYBE_CLASSES, Cause.UNKNOWN_KEPT)
"""Causes by which a tensor is copied although nobody knows that it is right."""

_SHAPES = "{source_shape} in the file, {target_shape} in the model"

SENTENCES: Mapping[Cause, str] = {
    Cause.SAME_SHAPE: "",
    Cause.IDENTICAL: "same classes, same order",
    Cause.MATCHED: "",
    Cause.MATCHED_AND_NEAREST: "{count} of {length} new rows start from the nearest carried classes",
    Cause.MATCHED_AND_TEXT: "{count} classes keep the embeddings of the text file",
    Cause.AGNOSTIC: "serves all classes alike",
    Cause.SHAPES_AGREE: "shapes agree, but the classes are unknown; {key} verifies it",
    Cause.MAYBE_CLASSES: "{count} rows may be classes, and no layout says so; see register_head_layout",
    Cause.REBUILT: "rebuilt from the dataset, never taken from a file",
    Cause.GIVEN_BY_TEXT: "the embeddings that the config names stay",
    Cause.NO_CLASS_BUT_TEXT: "no class is in the file; all keep their embeddings",
    Cause.EXCLUDED: "{key} names it",
    Cause.NOT_INCLUDED: "{key} does not name it",
    Cause.UNKNOWN_AFRESH: "{key} lets it start afresh",
    Cause.UNKNOWN_KEPT: "its rows stay where they lie, though the classes differ, as {key} says",
    Cause.FORCED_NONE: "{key} is 'none'",
    Cause.NOT_IN_FILE: "not in the file",
    Cause.PART_MISSING: "missing from the file, which has other tensors of this head",
    Cause.NO_CLASS_IN_FILE: "no class of the model is in the file",
    Cause.OTHER_KIND: "{source_kind} in the file, {target_kind} in the model",
    Cause.OTHER_SHAPE: _SHAPES,
    Cause.OTHER_ANCHORS: f"{_SHAPES}: another number of anchors",
    Cause.AGNOSTIC_IN_MODEL: f"{_SHAPES}: class-specific in the file, class-agnostic in the model",
    Cause.AGNOSTIC_IN_FILE: "class-agnostic in the file {source_shape}, {target_kind} in the model {target_shape}",
    Cause.UNKNOWN_CLASSES: f"{_SHAPES}; the classes of the {{side}} are unknown: set {{key}}",
    Cause.NO_LAYOUT: f"{_SHAPES}, and no layout says that its rows are classes",
    Cause.MODEL_MISFIT: "the model's {target_shape} does not hold the {length} classes of {table} ({target_kind}): "
    "set NUM_CLASSES to the table's length",
    Cause.TABLE_MISFIT: "{source_shape} in the file holds {holds} ({target_kind}), but {table} names {length}: "
    "correct {key}",
    Cause.UNKNOWN_HEAD: "its size follows the classes: {source_shape} in the file, {target_shape} in the model; "
    "the lists differ and no layout moves its rows ({text})",
    Cause.GROUP_REFUSED: "its head group is refused at {blame}",
    Cause.NOT_IN_MODEL: "the model has no tensor of this name",
    Cause.SEVERAL_PLACES: "fits {count} places in the model: {names}",
    Cause.UNSTATED: "{text}",
}


def sentence(why: Why, *, root: bool = False) -> str:
    """Render the cause in words, without a full stop; empty where there is nothing to say.

    Args:
        why: cause and facts.
        root: only the cause, without the tensor to blame and without ``unverified``.
    """
    values = {field.name: getattr(why, field.name) for field in fields(why)}
    holds = f"{why.count} classes" if why.count else "no whole number of classes"
    key = str(Key(why.key)) if why.key else ""
    words = SENTENCES[why.cause].format(**{**values, "key": key, "names": ", ".join(why.names), "holds": holds})
    if not root and why.cause in UNVERIFIED:
        words = f"unverified: {words}"
    elif not root and why.blame and why.cause is not Cause.GROUP_REFUSED:
        words = f"its head group changes whole or not at all; {why.blame}: {words}"
    return visible(words)
