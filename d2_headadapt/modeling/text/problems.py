"""Find everything that can be wrong with a matrix of class embeddings.

Codes, as the doctor prints them:

    HA401   the file cannot be read, or its rows cannot be given names
    HA402   its width is not the model's, or not the encoder's
    HA403   a class of the model has no row
    HA404   values that are not finite, or rows of zeros
    HA405   two classes with the same row
    HA406   normalised and unnormalised rows in one file
    HA407   a key under TEXT that cannot be used, or that has no effect
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...adapt.classes import ClassTable, shorten
from ...errors import Finding, HeadAdaptError, Severity, TextError
from ...key import HEAD_ADAPT, MODEL
from .bundle import FILE_KEY, UNIT, TextBundle

PROJECTION_KEY = HEAD_ADAPT.TEXT.PROJECTION
WIDTHS = {
    "RN50": 1024,
    "RN101": 512,
    "RN50x4": 640,
    "RN50x16": 768,
    "RN50x64": 1024,
    "ViT-B/32": 512,
    "ViT-B/16": 512,
    "ViT-L/14": 768,
}
"""CLIP's text encoders and the width of what they write."""

SAME = 1 - 1e-6
"""From this cosine on two rows are one; distinct names of the LVIS file reach 0.965."""


def check_bundle(
    bundle: TextBundle,
    target: ClassTable | None = None,
    *,
    aliases: Sequence[str] = (),
    region_width: int | None = None,
) -> list[Finding]:
    """Find everything that is wrong with some embeddings.

    Args:
        bundle: the embeddings.
        target: classes that need a row each, and rows that differ; ``None`` where none is needed.
        aliases: see :meth:`TextBundle.rows_for`.
        region_width: C of the region features, where no projection leads from C to D.
    """
    return [
        *_width(bundle, region_width),
        *_values(bundle),
        *(
            _classes(bundle, target, aliases)
            if target is not None
            else _twins(bundle.matrix, bundle.names.names, bundle.path, "warning")
        ),
        *_norms(bundle),
    ]


def encoders_of(width: int) -> list[str]:
    """List the encoders of :data:`WIDTHS` that write rows of a width."""
    return [name for name, known in WIDTHS.items() if known == width]


def width_of(encoder: str) -> int | None:
    """Look up the width that an encoder writes; ``None`` for one that nobody knows here.

    Spelling does not matter, nor a patch size that is left out: ``vit_b_32`` and ``ViT-B`` are ``ViT-B/32``.
    """
    wanted = _letters(encoder)
    known = {_letters(name): width for name, width in WIDTHS.items()}
    found = known.get(wanted)
    if found is None and wanted.startswith("vit"):
        found = next((width for name, width in known.items() if wanted and name.startswith(wanted)), None)
    return found


def as_text_error(error: HeadAdaptError) -> TextError:
    """Make the same message an error of the text embeddings."""
    return TextError(error.where, expected=error.expected, found=error.found, fix=error.fix)


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _width(bundle: TextBundle, region: int | None) -> Iterator[Finding]:
    width, like = bundle.width, encoders_of(bundle.width)
    shape = tuple(bundle.matrix.shape)
    looks = f"which looks like {' or '.join(like)}" if like else "which no CLIP encoder writes"
    if region is not None and region != width:
        fitting = encoders_of(region)
        yield Finding(
            "HA402",
            "error",
            TextError(
                f"{FILE_KEY}, {bundle.path}",
                expected=f"rows of width {region}, as the model's region features, since {PROJECTION_KEY} is never",
                found=f"{shape}, of width {width}, {looks}",
                fix="Either use a file of an encoder of that width"
                + (f" ({' or '.join(fitting)})" if fitting else "")
                + f", or keep this file and set {PROJECTION_KEY.set('auto')} (a trained linear layer {region} -> "
                f"{width}), "
                f"or give the model the backbone and box head of this encoder, {width} wide "
                f"({MODEL.ROI_BOX_HEAD.FC_DIM}, or "
                f"{MODEL.RESNETS.RES2_OUT_CHANNELS}). The number of classes has nothing to do with it.",
            ),
        )
    expected = width_of(bundle.encoder) if bundle.encoder else None
    if expected is not None and expected != width:
        yield Finding(
            "HA402",
            "error",
            TextError(
                f"{FILE_KEY}, {bundle.path}",
                expected=f"rows of width {expected}, as {bundle.encoder} writes them",
                found=f"width {width}, {looks}",
                fix=f"Use the file of that encoder, or correct {HEAD_ADAPT.TEXT.ENCODER}"
                + (
                    f": {HEAD_ADAPT.TEXT.ENCODER.set(like[0])}."
                    if like
                    else " (in the json beside the file where it stands there)."
                ),
            ),
        )


def _values(bundle: TextBundle) -> Iterator[Finding]:
    finite = bundle.matrix.isfinite().all(dim=1)
    zero = (bundle.matrix == 0).all(dim=1)
    if bundle.background is not None and not bool(bundle.background.isfinite().all()):
        yield _bad_rows(bundle, ["background"], "finite numbers", "NaN or infinity")
    if not bool(finite.all()):
        yield _bad_rows(bundle, _names_of(bundle, ~finite), "finite numbers", "NaN or infinity")
    if bool(zero.any()):
        yield _bad_rows(bundle, _names_of(bundle, zero), "a direction for each class", "zeros")


def _bad_rows(bundle: TextBundle, names: Sequence[str], expected: str, found: str) -> Finding:
    return Finding(
        "HA404",
        "error",
        TextError(
            f"{FILE_KEY}, {bundle.path}",
            expected=expected,
            found=f"{found} in the rows of {shorten(list(names))}",
            fix="Write the file anew; in float16, numbers above 65504 become infinite.",
        ),
    )


def _names_of(bundle: TextBundle, rows: torch.Tensor) -> list[str]:
    return [bundle.names.names[i] for i in rows.nonzero()[:, 0].tolist()]


def _classes(bundle: TextBundle, target: ClassTable, aliases: Sequence[str]) -> Iterator[Finding]:
    try:
        rows, missing = bundle.rows_for(target, aliases)
    except HeadAdaptError as exc:
        yield Finding("HA403", "error", as_text_error(exc))
        return
    if missing:
        yield Finding("HA403", "error", bundle.lacks(target, missing))
    yield from _twins(rows, [n for n in target.names if n not in missing], bundle.path, "error")


def _twins(matrix: torch.Tensor, names: Sequence[str], path: str, severity: Severity) -> Iterator[Finding]:
    unit = nn.functional.normalize(matrix.double(), dim=1)
    alike = ((unit @ unit.t()).triu(diagonal=1) >= SAME).nonzero().tolist()
    if alike:
        pairs = [f"{names[a]} = {names[b]}" for a, b in alike]
        yield Finding(
            "HA405",
            severity,
            TextError(
                f"{FILE_KEY}, {path}",
                expected="rows that differ: classes with the same row have the same score",
                found=f"{len(alike)} pairs of equal rows: {shorten(pairs, 4)}",
                fix="Write the file anew with a prompt of its own for each class, or drop one class of each pair.",
            ),
        )


def _norms(bundle: TextBundle) -> Iterator[Finding]:
    norms = bundle.matrix.norm(dim=1)
    unit = (norms - 1).abs() <= UNIT
    others = norms[~unit & norms.isfinite()]
    if not len(others) or not (bundle.normalised or bool(unit.any())):
        return
    spread = f"{int((~unit).sum())} of {len(unit)} rows with norms from {others.min():.3g} to {others.max():.3g}"
    expected = "norms of 1, as the file is said to be normalised" if bundle.normalised else "rows of one kind"
    yield Finding(
        "HA406",
        "warning",
        TextError(
            f"{FILE_KEY}, {bundle.path}",
            expected=expected,
            found=f"{spread}: {shorten(_names_of(bundle, ~unit), 3)}",
            fix="The classifier normalises every row; look whether the rows are of one encoder and one set of prompts.",
        ),
    )
