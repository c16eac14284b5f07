"""Under which name of the model each tensor of a file stands, settled by names alone, before anything is planned.

Stock detectron2 settles names and drops tensors of another shape in one step, which leaves a head of another class
count under the file's own name, where a plan would miss it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names


@dataclass(frozen=True)
class SettledNames:
    """A file's tensors under the model's names.

    Args:
        tensors: name in the model (or in the file, where the model has none) -> tensor.
        dropped: names of the file that fit several places -> the reason.
        file_names: name in ``tensors`` -> name in the file, where the two differ.
        excluded: names in ``tensors`` that the user leaves out -> the reason.
    """

    tensors: dict[str, torch.Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    file_names: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)


def settle_names(
    tensors: Mapping[str, torch.Tensor],
    model_shapes: Mapping[str, tuple[int, ...]],
    *,
    caffe2: bool = False,
    heuristics: bool = False,
) -> SettledNames:
    """Find the model's name of every tensor of a file.

    Args:
        tensors: the file's tensors.
        model_shapes: name -> shape of the model's tensors.
        caffe2: convert Caffe2 names and background order first (``c2_model_loading.convert_c2_detectron_names``).
        heuristics: match each name of the model with the file's name that is its longest dotted suffix, as stock's
            ``align_and_update_state_dicts`` does.
    """
    named = strip_prefix(tensors, "module.")
    if caffe2:
        # It logs a line per head tensor that it reorders, which the plan says better.
        level = logging.getLogger("detectron2.checkpoint.c2_model_loading").level
        logging.getLogger("detectron2.checkpoint.c2_model_loading").setLevel(logging.WARNING)
        try:
            named = convert_c2_detectron_names(named)[0]
        finally:
            logging.getLogger("detectron2.checkpoint.c2_model_loading").setLevel(level)
    if not (heuristics or caffe2):
        return SettledNames(named)
    takers: dict[str, list[str]] = {}
    for name in model_shapes:
        suffix = longest_suffix(name, named)
        if suffix is not None:
            takers.setdefault(suffix, []).append(name)
    out: dict[str, torch.Tensor] = {}
    dropped: dict[str, str] = {}
    file_names: dict[str, str] = {}
    for file_name, tensor in named.items():
        names = takers.get(file_name, [file_name])
        if len(names) > 1:
            # Stock looks at shapes before it counts places; where that leaves one place, it is the same one here.
            fitting = [name for name in names if model_shapes[name] == tuple(tensor.shape)]
            if len(fitting) != 1:
                dropped[file_name] = f"fits {len(names)} places in the model: {', '.join(names[:3])}"
                continue
            names = fitting
        out[names[0]] = tensor
        if names[0] != file_name:
            file_names[names[0]] = file_name
    return SettledNames(out, dropped, file_names)


def strip_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Remove ``prefix`` where every name has it (a model saved inside DataParallel)."""
    if tensors and all(name.startswith(prefix) for name in tensors):
        return {name[len(prefix) :]: value for name, value in tensors.items()}
    return dict(tensors)


def longest_suffix(name: str, candidates: Mapping[str, object]) -> str | None:
    """The longest of ``candidates`` that ``name`` equals or ends with after a dot."""
    start = 0
    while True:
        if name[start:] in candidates:
            return name[start:]
        dot = name.find(".", start)
        if dot < 0:
            return None
        start = dot + 1
