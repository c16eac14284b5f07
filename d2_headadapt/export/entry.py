"""Export a model: export, run both on images, compare, and only then write."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from ..adapt.classes import ClassTable
from ..checkpoint.provenance import Provenance
from ..data.images import UNREADABLE, why_unreadable
from ..engine.predict import Predictor
from ..errors import ConfigError, DatasetError, ExportError
from ..modeling.classifier import MultiTaskClassifier
from .flat import FlatModel
from .formats import ExportedModel, exported_bytes, refusing
from .parity import TOLERANCE, Parity, score_cuts


@dataclass(frozen=True)
class Export:
    """A verified file that is not written yet.

    Args:
        content: of the file.
        parity: what the comparison found; nothing that is refused.
        size: (height, width) of the only images that it takes; ``None`` where any will do.
    """

    content: bytes
    parity: Parity
    size: tuple[int, int] | None


def export_model(
    model: nn.Module,
    form: str,
    tables: Mapping[str, ClassTable],
    images: Sequence[torch.Tensor] = (),
    *,
    facts: Mapping[str, Any] | None = None,
    side: int = 224,
) -> Export:
    """Export a model and compare the result with it.

    Args:
        model: left as it is; a copy goes to the CPU and into evaluation mode.
        form: ``"traced"``, ``"scripted"`` or ``"onnx"``.
        tables: class tables by label space and task.
        images: (3, H, W) each, as the model sees them; drawn ones of other sizes are always compared too.
        facts: plain values for ``extra["export"]`` of the file, beside those put there.
        side: short side of the drawn images.

    Raises:
        ExportError: the model has no such form or fails by itself, its outputs differ by more than
            :data:`~.parity.TOLERANCE`, or no detection was there to be compared.
        ConfigError: a given image is of a size that the model does not take.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    given = list(images)
    drawn = drawn_images(_drawn_sizes(model, side))
    with _running(model):
        flat = FlatModel(model, given[0] if given else drawn[0])
    named = {f"image {i + 1}": image for i, image in enumerate(given)}
    refused = False
    for image in drawn:
        try:
            with _running(model):
                flat(image)
        except ConfigError:
            # Flattened features have a fixed width; the given images were taken, or the first drawn one.
            refused = True
            continue
        named[f"a drawn image of {image.shape[1]} x {image.shape[2]}"] = image
    size = (int(flat.image.shape[1]), int(flat.image.shape[2])) if refused else None
    outputs = [name for name in flat.names if form != "scripted" or name != "image_size"]
    about = {**(facts or {}), "format": form, "outputs": outputs, "size": size and list(size)}
    content = exported_bytes(flat, form, Provenance(tables, extra={"export": about}), any_size=size is None)
    return Export(content, _compare(flat, ExportedModel(content), form, named), size)


def export_predictor(predictor: Predictor, form: str, files: Sequence[Path]) -> Export:
    """Call :func:`export_model` on a model with its checkpoint; the file also says how images are prepared for it.

    Args:
        predictor: the model.
        form: see there.
        files: images to compare on.

    Raises:
        DatasetError: an image that cannot be read.
    """
    cfg = predictor.cfg
    images = [predictor.seen(_read(path, cfg.INPUT.FORMAT)) for path in files]
    side = min(images[0].shape[1:]) if images else int(cfg.INPUT.MIN_SIZE_TEST) or 224
    facts = {
        "channels": cfg.INPUT.FORMAT,
        "resize": [str(step) for step in predictor.resize.augs],
        "tasks": {spec.name: spec.kind for spec in predictor.specs},
    }
    return export_model(predictor.model, form, predictor.tables, images, facts=facts, side=side)


def _read(path: Path, channels: str) -> NDArray[np.uint8]:
    try:
        image: NDArray[np.uint8] = read_image(str(path), format=channels)
    except UNREADABLE as exc:
        raise DatasetError(
            str(path), expected="an image that can be read", found=why_unreadable(exc), fix="Leave it out, or mend it."
        ) from exc
    return image


def _compare(flat: FlatModel, exported: ExportedModel, form: str, named: Mapping[str, torch.Tensor]) -> Parity:
    where = f"format {form}, {type(flat.model).__name__}"
    cuts, limit = score_cuts(flat.model)
    parity = Parity()
    for name, image in tqdm(named.items(), desc="compare", unit="image", disable=len(named) < 5):
        with _running(flat.model):
            eager = flat(image)
        try:
            found = exported(image)
        except Exception as exc:
            first = next(iter(str(exc).splitlines()), "")
            parity.problems.append(f"{name}: the exported file fails: {type(exc).__name__}: {first[:200]}")
            continue
        nearly = partial(_nearly, flat, image)
        parity.add(name, eager, _finished(flat.model, form, found, image), cuts, limit, nearly)
    if parity.problems:
        more = len(parity.problems) - 3
        raise ExportError(
            where,
            expected=f"the numbers of eager, to {TOLERANCE:g} of each field's largest value",
            found="; ".join(parity.problems[:3]) + (f"; and {more} more" if more > 0 else ""),
            fix="Nothing was written. Try another --format, or other images with --image.",
        )
    if "pred_boxes" in flat.names and not parity.detections:
        raise ExportError(
            where,
            expected="images in which the model detects something, to compare its outputs on",
            found=f"no detection in {parity.images} images",
            fix="Nothing was written. Name photographs that have its classes: --image FILE ...",
        )
    return parity


def _running(model: nn.Module) -> AbstractContextManager[None]:
    """Turn what the model itself raises into a message: such a model is nothing to compare with."""
    expected = "a model of tensors that runs on the images given, and on drawn ones"
    return refusing(type(model).__name__, expected, "Nothing was written. Mend the model: it fails before any export.")


def _nearly(flat: FlatModel, image: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Run eager on eight images up to 0.0002 of a grey level away from this one: about what rounding does."""
    generator = torch.Generator().manual_seed(0)
    noises = (torch.rand(image.shape, generator=generator) - 0.5 for _ in range(8))
    return [flat(image + 4e-4 * noise) for noise in noises]


def _finished(
    model: nn.Module, form: str, found: dict[str, torch.Tensor], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Clip boxes and drop empty ones, which a scripted dense detector leaves to its caller and eager does."""
    if form != "scripted" or not isinstance(model, DenseDetector):
        return found
    size = (int(image.shape[1]), int(image.shape[2]))
    instances = Instances(size, **{**found, "pred_boxes": Boxes(found["pred_boxes"])})
    fields = detector_postprocess(instances, *size).get_fields()
    return {name: getattr(value, "tensor", value) for name, value in fields.items()}


def _drawn_sizes(model: nn.Module, side: int) -> list[tuple[int, int]]:
    # The first is the one that a model of a fixed size is made for, and none is a multiple of 32 but the last.
    first = model.input_size if isinstance(model, MultiTaskClassifier) else (side, side * 4 // 3 + 1)
    return [first, (side * 4 // 3 + 3, side + 1), (max(64, side // 2 // 32 * 32),) * 2]


def drawn_images(sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Draw images of soft colour and noise, always the same; the last one is grey: nothing to detect.

    Args:
        sizes: (height, width) of each, in pixels.

    Returns:
        Tensors (3, height, width).
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for height, width in sizes[:-1]:
        soft = interpolate(torch.rand(1, 3, 5, 7, generator=generator), (height, width), mode="bicubic")[0]
        made.append((255 * soft + 20 * torch.randn(3, height, width, generator=generator)).clamp(0, 255))
    return [*made, torch.full((3, *sizes[-1]), 127.0)]


def export_lines(export: Export, checkpoint_bytes: int) -> str:
    """Put what was compared into text.

    Args:
        export: verified.
        checkpoint_bytes: size of the checkpoint, to compare the file's with.
    """
    parity = export.parity
    # Scores that are equal but for rounding may change places.
    places = f" with {parity.detections} detections" if parity.detections else ""
    places += f", {parity.swapped} in another place" if parity.swapped else ""
    places += f", {parity.ties} more on one side by rounding" if parity.ties else ""
    rows = [
        (name, f"{largest:.3g}", f"{parity.shares[name]:.2g}", f"{TOLERANCE:g}")
        for name, largest in parity.largest.items()
    ]
    table = tabulate(rows, headers=["output", "largest difference", "as a share", "allowed"], disable_numparse=True)
    ratio = f", {len(export.content) / checkpoint_bytes:.2f} of the checkpoint" if checkpoint_bytes else ""
    size = "images of any size" if export.size is None else f"images of {export.size[0]} x {export.size[1]} only"
    return (
        f"compared with eager on {parity.images} image{'s' if parity.images > 1 else ''}{places}:\n{table}\n"
        f"{len(export.content) / 1e6:.2f} MB{ratio}; takes {size}"
    )
