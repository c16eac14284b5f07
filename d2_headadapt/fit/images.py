"""Stream a few hundred training images through the frozen backbone.

A *view* is one image, as it is or mirrored. Views are numbered alike in every process; each process takes its share.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from tqdm import tqdm

from ..data.images import UNREADABLE, why_unreadable
from ..data.task_mapper import Mapper
from .reservoir import image_key
from .settings import FitSettings

logger = logging.getLogger(__name__)
BEFORE_ESTIMATE = 5.0
"""Seconds of a pass after which it is said how long it will take."""


@dataclass(frozen=True)
class View:
    """One image in the network's input resolution.

    Args:
        number: its place among all views; even where the image is as it is, odd where it is mirrored.
        key: random bits that belong to it.
        features: the backbone's, by name, each (1, C, H, W).
        size: (height, width) of the image in pixels.
        truth: ``gt_boxes`` and ``gt_classes``, and ``gt_masks`` where the image has them and is not mirrored.
        tasks: labels of the whole image by task: () int64, or (K,) for several labels.
    """

    number: int
    key: int
    features: Mapping[str, torch.Tensor]
    size: tuple[int, int]
    truth: Instances
    tasks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def image(self) -> int:
        """The image's place among all images."""
        return self.number // 2


def choose_images(
    dicts: Sequence[Mapping[str, Any]],
    classes: Sequence[int],
    settings: FitSettings,
    tasks: Mapping[str, Sequence[int]] | None = None,
) -> list[int]:
    """Choose images to look at: a weighted sample without replacement in which rare new classes come first.

    The weight of an image is that of its rarest new class, one over the square root of its count; the sample is the
    one of Efraimidis and Spirakis, 2006.

    Args:
        dicts: a detectron2 dataset.
        classes: the new ones.
        settings: ``images`` and ``seed`` are read.
        tasks: the new classes of each task.

    Returns:
        Positions in ``dicts``, ascending.
    """
    wanted = {("", k) for k in classes} | {(task, k) for task, new in (tasks or {}).items() for k in new}
    shown = [set(shown_classes(entry)) & wanted for entry in dicts]
    counts = Counter(value for values in shown for value in values)
    common = max(counts.values(), default=1)

    def turn(i: int) -> tuple[float, int]:
        weight = max((1 / math.sqrt(counts[value]) for value in shown[i]), default=0.25 / math.sqrt(common))
        uniform = (image_key(settings.seed, f"image {name_of(dicts[i], i)}") + 1) / 2.0**64
        return -math.log(min(uniform, 1 - 1e-12)) / weight, i

    chosen = sorted(range(len(dicts)), key=turn)[: settings.images]
    return sorted(chosen)


def shown_classes(entry: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """List the classes that an image's labels name, each with its task; detection has the empty one."""
    annotations = [a for a in entry.get("annotations", ()) if not a.get("iscrowd", 0)]
    yield from (("", int(a["category_id"])) for a in annotations)
    for holder in (entry, *annotations):
        for task, label in holder.get("tasks", {}).items():
            labels = label if isinstance(label, (list, tuple)) else () if label is None else (label,)
            yield from ((task, int(k)) for k in labels)


def name_of(entry: Mapping[str, Any], position: int) -> str:
    """Name an image for messages and hashes."""
    return str(entry.get("image_id", entry.get("file_name", position)))


def is_held_out(entry: Mapping[str, Any], position: int, settings: FitSettings) -> bool:
    """Tell whether an image chooses penalties rather than being fitted."""
    return image_key(settings.seed, f"held out {name_of(entry, position)}") < settings.held_out * 2.0**64


class FeatureCache:
    """Views that fit into a stated memory; what comes later is computed again.

    Valid as long as the backbone and the chosen images stay the same.

    Args:
        megabytes: of features.
    """

    def __init__(self, megabytes: int) -> None:
        self._room = megabytes * 2**20
        self._views: dict[int, View] = {}

    def get(self, number: int) -> View | None:
        """Look up a kept view."""
        return self._views.get(number)

    def keep(self, view: View) -> None:
        """Keep a view where there is room."""
        taken = sum(value.numel() * value.element_size() for value in view.features.values())
        if taken <= self._room:
            self._room -= taken
            self._views[view.number] = view


def estimate_line(title: str, done: int, total: int, seconds: float) -> str:
    """Say how long a pass over the images will take, from how far it is.

    Example:
        >>> estimate_line("box head", 12, 300, 6.0)
        'fit: box head, 12 of 300 images in 6 s: about 144 s more; further passes are shorter where features are kept'
    """
    left = seconds / done * (total - done)
    kept = "further passes are shorter where features are kept"
    return f"fit: {title}, {done} of {total} images in {seconds:.0f} s: about {left:.0f} s more; {kept}"


class ImageStream:
    """Views of the chosen images, with their backbone features.

    Args:
        model: a detectron2 model with ``preprocess_image`` and ``backbone``.
        dicts: a detectron2 dataset.
        mapper: see :data:`Mapper`.
        chosen: of :func:`choose_images`.
        settings: ``mirror``, ``cache_mb`` and ``seed`` are read.
        rank, world: this process takes every ``world``-th image, from ``rank`` on.
        cache: of an earlier stream of the same images through the same backbone.

    Attributes:
        skipped: images that could not be read, with the reason.
        estimates: the next pass that takes long logs how long it will take.
    """

    def __init__(
        self,
        model: nn.Module,
        dicts: Sequence[dict[str, Any]],
        mapper: Mapper,
        chosen: Sequence[int],
        settings: FitSettings,
        rank: int = 0,
        world: int = 1,
        cache: FeatureCache | None = None,
    ) -> None:
        self._model: Any = model
        self._dicts = dicts
        self._mapper = mapper
        self._chosen = list(chosen)
        self._settings = settings
        self._rank, self._world = rank, world
        self._cache = FeatureCache(settings.cache_mb) if cache is None else cache
        self.skipped: dict[str, str] = {}
        self.estimates = False
        held = [i for i, position in enumerate(chosen) if is_held_out(dicts[position], position, settings)]
        # With everything on one side there is nothing to compare.
        self.held_out = frozenset(held if 0 < len(held) < len(self._chosen) else ())

    def __len__(self) -> int:
        return len(self._chosen)

    def views(self, title: str, *, mirror: bool = True, held_out_only: bool = False) -> Iterator[View]:
        """Yield this process's views, in order; images that cannot be read are noted in ``skipped``.

        Args:
            title: of the progress bar, which only the first process draws, and only on a terminal.
            mirror: also the mirrored ones, where the settings ask for them.
            held_out_only: only images of the held-out share.
        """
        mine = range(self._rank, len(self._chosen), self._world)
        numbers = [i for i in mine if not held_out_only or i in self.held_out]
        quiet = self._rank > 0 or not sys.stderr.isatty()
        started, told = time.perf_counter(), not self.estimates
        for done, i in enumerate(tqdm(numbers, desc=title, unit="image", disable=quiet, leave=False)):
            seconds = time.perf_counter() - started
            if not told and done and seconds > BEFORE_ESTIMATE and self._rank == 0:
                told, self.estimates = True, False
                logger.info("%s", estimate_line(title, done, len(numbers), seconds))
            yield from self._views(i, (False, True) if mirror and self._settings.mirror else (False,))

    def _views(self, i: int, flips: Sequence[bool]) -> list[View]:
        kept = [self._cache.get(2 * i + int(mirrored)) for mirrored in flips]
        found = [view for view in kept if view is not None]
        if len(found) == len(flips):
            return found
        position = self._chosen[i]
        name = name_of(self._dicts[position], position)
        if name in self.skipped:
            return []
        try:
            mapped = self._mapper(dict(self._dicts[position]))
        except UNREADABLE as exc:
            self.skipped[name] = why_unreadable(exc)
            logger.warning("Image %s cannot be read and is passed over: %s", name, self.skipped[name])
            return []
        image, truth = mapped["image"], mapped.get("instances")
        size = (int(image.shape[-2]), int(image.shape[-1]))
        truth = empty_truth(size) if truth is None else truth
        # Both at once: they have one size, and small convolutions gain from the larger batch.
        both = [{"image": image.flip(-1) if mirrored else image} for mirrored in flips]
        images = self._model.preprocess_image(both)
        features = self._model.backbone(images.tensor)
        broken = _not_finite(features)
        if broken:
            self.skipped[name] = f"the backbone gives {broken}"
            logger.warning("Image %s is passed over: the backbone gives %s.", name, broken)
            return []
        views = []
        for k, mirrored in enumerate(flips):
            own = {layer: value[k : k + 1].clone() for layer, value in features.items()}
            key = image_key(self._settings.seed, f"{name}/{int(mirrored)}")
            labels = (mirror(truth) if mirrored else truth).to(images.tensor.device)
            tasks = {task: label.to(images.tensor.device) for task, label in mapped.get("tasks", {}).items()}
            views.append(View(2 * i + int(mirrored), key, own, size, labels, tasks))
            self._cache.keep(views[-1])
        return views


def _not_finite(features: Mapping[str, torch.Tensor]) -> str:
    """Say what stands in features beside finite numbers, and where; empty where nothing does."""
    for layer, value in features.items():
        if not bool(torch.isfinite(value).all()):
            return f"{'NaN' if bool(torch.isnan(value).any()) else 'infinite values'} in {layer}"
    return ""


def empty_truth(size: tuple[int, int]) -> Instances:
    """Make the ground truth of an image without objects."""
    return Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))


def mirror(truth: Instances) -> Instances:
    """Mirror boxes, classes and labels of tasks with their image."""
    width = truth.image_size[1]
    boxes = truth.gt_boxes.tensor.clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    # What is a tensor has no geometry: masks and keypoints are structures of detectron2, and are left out.
    labels = {name: value for name, value in truth.get_fields().items() if isinstance(value, torch.Tensor)}
    return Instances(truth.image_size, gt_boxes=Boxes(boxes), **labels)
