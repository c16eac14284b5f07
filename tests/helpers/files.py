"""Checkpoint files as users have them: stock's, Caffe2's, wrapped, damaged."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

HEAD = "roi_heads.box_predictor"


def save_stock(model: nn.Module, path: Path) -> str:
    """What stock ``DetectionCheckpointer`` writes."""
    DetectionCheckpointer(model, str(path.parent), save_to_disk=True).save(path.stem)
    return str(path)


def stock_warnings(model: nn.Module, path: str) -> list[str]:
    """Load with stock ``DetectionCheckpointer``; the texts of all warnings and errors that it logs."""
    with logged("fvcore", "detectron2") as records:
        DetectionCheckpointer(model).load(path, checkpointables=[])
    return [r.getMessage() for r in records if r.levelno >= logging.WARNING]


@contextmanager
def logged(*loggers: str) -> Iterator[list[logging.LogRecord]]:
    """Everything that these loggers and those below them say, whatever handlers they have."""
    records: list[logging.LogRecord] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Collect()
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in loggers}
    for name in loggers:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = False
    try:
        yield records
    finally:
        for name, (level, propagate) in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).propagate = propagate


def texts(records: list[logging.LogRecord]) -> str:
    """All messages, one below the other."""
    return "\n".join(r.getMessage() for r in records)


def to_caffe2(state: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write a tiny C4 or FPN model's box head as Detectron 1 did: its names, background first, numpy values.

    Only tensors whose Caffe2 names are simple are written: the box head and the two box predictor layers.
    """
    blobs: dict[str, np.ndarray] = {}
    for leaf, short in (("weight", "w"), ("bias", "b")):
        score = state[f"{HEAD}.cls_score.{leaf}"].numpy()
        boxes = state[f"{HEAD}.bbox_pred.{leaf}"].numpy()
        blobs[f"cls_score_{short}"] = np.concatenate([score[-1:], score[:-1]])
        blobs[f"bbox_pred_{short}"] = np.concatenate([np.zeros_like(boxes[:4]), boxes])
        blobs[f"fc6_{short}"] = state[f"roi_heads.box_head.fc1.{leaf}"].numpy()
        blobs[f"fc6_{short}_momentum"] = np.zeros(3, dtype=np.float32)
    with path.open("wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)
    return str(path)


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
