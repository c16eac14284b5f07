"""Settings and report of a fit. Plain data: no tensor lives here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from detectron2.config import CfgNode

from ..errors import ConfigError, visible
from ..key import HEAD_ADAPT

PARTS = ("rpn", "box", "mask", "dense", "task")
RPN_CHOICES = ("auto", "always", "never")


@dataclass(frozen=True)
class FitSettings:
    """The settings of a fit of new rows.

    Args:
        images: at most so many training images are looked at, those with rare classes first.
        mirror: look at every image a second time, mirrored left to right.
        regions: at most so many regions (anchor cells, pixels) are kept in memory for one solve. Half of them may
            belong to no class; the classes share the other half, rare ones whole.
            60,000 regions of 1,024 features are 250 MB; no sample takes more than 1 GB.
        proposals: so many of the best proposals of an image become regions, beside its own boxes.
        parts: which heads may be solved, of ``rpn``, ``box``, ``mask``, ``dense`` (RetinaNet) and ``task``.
        rpn: re-solve the RPN's last layer ``always``, ``never``, or where held-out recall rises by it (``auto``). With
            carried classes it is only ever done where the training set labels every one of them.
        penalties: of classifiers, strongest first; the held-out images choose. Relative to the mean loss of a region,
            in units of features centred and divided by one global deviation.
        box_penalties: the same for box regressors, relative to the mean squared error.
        held_out: share of the images that choose penalties and judge the RPN.
        soft_iou: a region counts as background up to the first overlap with its object, as the object from the
            second on, and as a mixture in between. Scores then rank boxes by how well they lie.
        confident: a region that no label explains is left out where a carried class has at least this probability.
        cache_mb: memory for backbone features between passes; images beyond it are computed again.
        seed: chooses images, regions and held-out images. No global random stream is touched.

    Example:
        >>> from d2_headadapt.fit import FitSettings
        >>> FitSettings(images=50, mirror=False).images
        50
        >>> FitSettings(rpn="sometimes")
        Traceback (most recent call last):
        d2_headadapt.errors.ConfigError: MODEL.HEAD_ADAPT.FIT.RPN: expected one of auto, always, never, found ...
    """

    images: int = 300
    mirror: bool = True
    regions: int = 60000
    proposals: int = 100
    parts: tuple[str, ...] = PARTS
    rpn: str = "auto"
    penalties: tuple[float, ...] = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    box_penalties: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
    held_out: float = 0.2
    soft_iou: tuple[float, float] = (0.4, 0.8)
    confident: float = 0.5
    cache_mb: int = 1024
    seed: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> FitSettings:
        """Read the keys under ``MODEL.HEAD_ADAPT.FIT`` of ``cfg``; they are named as the fields, in capitals."""
        node = cfg.MODEL.HEAD_ADAPT.FIT
        values: dict[str, Any] = {f.name: node[f.name.upper()] for f in fields(cls) if f.name.upper() in node}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        # Who does not mirror in training may have classes that a mirror changes (digits, left and right).
        return cls(**{**values, "mirror": bool(node.MIRROR) and cfg.INPUT.RANDOM_FLIP == "horizontal"})

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the key.
        """
        low, high = self.soft_iou if len(self.soft_iou) == 2 else (1.0, 0.0)
        checks: tuple[tuple[str, bool, str, object], ...] = (
            ("IMAGES", self.images >= 1, "at least 1", self.images),
            ("REGIONS", self.regions >= 2, "at least 2", self.regions),
            ("PROPOSALS", self.proposals >= 1, "at least 1", self.proposals),
            ("RPN", self.rpn in RPN_CHOICES, f"one of {', '.join(RPN_CHOICES)}", self.rpn),
            ("PARTS", set(self.parts) <= set(PARTS), f"some of {', '.join(PARTS)}", self.parts),
            ("PENALTIES", _descending(self.penalties), "positive numbers, strongest first", self.penalties),
            ("BOX_PENALTIES", _descending(self.box_penalties), "positive numbers, strongest first", self.box_penalties),
            ("HELD_OUT", 0 <= self.held_out < 1, "a share from 0 to below 1", self.held_out),
            ("SOFT_IOU", 0 < low <= high <= 1, "two overlaps, the lower first", self.soft_iou),
            ("CONFIDENT", 0 < self.confident <= 1, "a probability", self.confident),
            ("CACHE_MB", self.cache_mb >= 0, "a size in megabytes", self.cache_mb),
        )
        for key, good, expected, found in checks:
            if not good:
                raise ConfigError(HEAD_ADAPT.FIT[key], expected=expected, found=repr(found), fix="Correct the key.")


def _descending(values: tuple[float, ...]) -> bool:
    return bool(values) and values[-1] > 0 and all(a > b for a, b in itertools.pairwise(values))


@dataclass(frozen=True)
class PartReport:
    """The report on one head.

    Args:
        part: its name in the model, such as ``roi_heads.box_predictor``.
        action: ``solved`` or ``kept`` (the values it had).
        reason: why, in words.
        regions: how many regions its solution rests on.
        left_out: how many regions were left out because a carried class was confident on them.
        penalties: what the held-out images chose, by tensor.
        score: held-out numbers before and after, by name (``loss``, ``recall``).
    """

    part: str
    action: str
    reason: str
    regions: int = 0
    left_out: int = 0
    penalties: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def line(self) -> str:
        """Put what happened into one line, for the log."""
        words = [f"{self.part}: {self.action} ({self.reason})"]
        if self.regions:
            words.append(f"{self.regions} regions")
        if self.left_out:
            words.append(f"{self.left_out} left out, where a carried class is confident")
        words += [f"{name} {before:.3g} -> {after:.3g}" for name, (before, after) in self.score.items()]
        return ", ".join(words)


@dataclass(frozen=True)
class FitReport:
    """The result of a fit.

    Args:
        parts: one entry per head that has new rows, and for the RPN.
        new: new classes by label space.
        without_examples: those of them that no image shows, whose rows keep their recipe, by label space.
        images: how many images were looked at.
        skipped: images that were passed over, because they cannot be read or give NaN, each with the reason.
        seconds: duration.
        chosen: positions in the training set of the images that were looked at.
    """

    parts: tuple[PartReport, ...] = ()
    new: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    without_examples: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    images: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    chosen: tuple[int, ...] = ()

    @property
    def solved(self) -> tuple[str, ...]:
        """Names of the parts that were solved."""
        return tuple(part.part for part in self.parts if part.action == "solved")

    def line(self) -> str:
        """Put the result into one line."""
        new = sum(len(classes) for classes in self.new.values())
        empty = sum(len(classes) for classes in self.without_examples.values())
        words = f"fitted {new - empty} of {new} new classes on {self.images} images in {self.seconds:.1f} s"
        if not self.solved:
            words = f"fitted nothing ({new} new classes, {self.images} images)"
        if empty:
            words += f"; {empty} have no example there and keep their recipe"
        if self.skipped:
            first = self.skipped[0]
            words += f"; {len(self.skipped)} images passed over (the first: {visible(f'{first[0]}, {first[1]}')})"
        return words

    def to_json(self) -> dict[str, Any]:
        """Write plain types."""
        return {
            "parts": [
                {
                    **vars(part),
                    "penalties": dict(part.penalties),
                    "score": {name: list(pair) for name, pair in part.score.items()},
                }
                for part in self.parts
            ],
            "new": {space: list(classes) for space, classes in self.new.items()},
            "without_examples": {space: list(classes) for space, classes in self.without_examples.items()},
            "images": self.images,
            "skipped": [list(entry) for entry in self.skipped],
            "seconds": self.seconds,
        }
