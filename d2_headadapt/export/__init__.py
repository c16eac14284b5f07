"""Export models as TorchScript or ONNX: verified against eager, with their class names in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..deferred import lazy_names as _lazy_names

ENDINGS: Mapping[str, tuple[str, ...]] = {"traced": (".ts", ".pt"), "scripted": (".ts", ".pt"), "onnx": (".onnx",)}
"""By format, the endings of its files. Here, because the command line's parser wants it without torch."""

if TYPE_CHECKING:
    from .entry import Export as Export
    from .entry import drawn_images as drawn_images
    from .entry import export_lines as export_lines
    from .entry import export_model as export_model
    from .entry import export_predictor as export_predictor
    from .flat import FlatModel as FlatModel
    from .formats import OPSET as OPSET
    from .formats import ExportedModel as ExportedModel
    from .parity import TOLERANCE as TOLERANCE
    from .parity import Parity as Parity
    from .tables import ENTRY as ENTRY
    from .tables import embed_tables as embed_tables
    from .tables import read_facts as read_facts
    from .tables import read_tables as read_tables
    from .tables import write_bytes as write_bytes

_HOMES = {
    "ENTRY": "tables",
    "OPSET": "formats",
    "TOLERANCE": "parity",
    "Export": "entry",
    "ExportedModel": "formats",
    "FlatModel": "flat",
    "Parity": "parity",
    "drawn_images": "entry",
    "embed_tables": "tables",
    "export_lines": "entry",
    "export_model": "entry",
    "export_predictor": "entry",
    "read_facts": "tables",
    "read_tables": "tables",
    "write_bytes": "tables",
}
__all__ = [*_HOMES, "ENDINGS"]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES)
