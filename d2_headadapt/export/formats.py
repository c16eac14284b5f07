"""Write and run the three exported forms of a model."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from ..checkpoint.provenance import Provenance
from ..errors import CheckpointFileError, ExportError, HeadAdaptError
from ..key import MODEL
from .flat import FlatModel
from .scripting import script
from .tables import facts_of, import_onnx, is_torchscript, onnx_bytes, torchscript_bytes

OPSET = 17
"""Of ONNX. From 16 on RoIAlign knows the half-pixel shift that detectron2 uses; with detectron2's own
``STABLE_ONNX_OPSET_VERSION``, 11, boxes come out wrong."""


def exported_bytes(flat: FlatModel, form: str, known: Provenance, *, any_size: bool = True) -> bytes:
    """Export a model to the bytes of a file.

    Args:
        flat: on the CPU, in evaluation mode.
        form: ``traced``, ``scripted`` or ``onnx``.
        known: what the file says of itself.
        any_size: images of other sizes than ``flat.image`` shall do.

    Raises:
        ExportError: the model has no such form.
    """
    # The exporters warn of every value that may be frozen; whether one is, comparing images of other sizes finds out.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _EXPORTERS[form](flat, known, any_size)


def _traced(flat: FlatModel, known: Provenance, any_size: bool) -> bytes:
    with refusing(
        f"format traced, {type(flat.model).__name__}",
        "a model that torch can export",
        "Only models of one image in and tensors out can be traced.",
    ):
        trace: Any = torch.jit.trace
        module = trace(flat.adapter, flat.adapter.flattened_inputs, check_trace=False)
    return torchscript_bytes(module, known)


def _scripted(flat: FlatModel, known: Provenance, any_size: bool) -> bytes:
    return torchscript_bytes(script(flat.model), known)


def _onnx(flat: FlatModel, known: Provenance, any_size: bool) -> bytes:
    onnx = import_onnx()
    if getattr(getattr(flat.model, "roi_heads", None), "keypoint_on", False):
        raise ExportError(
            f"format onnx, {type(flat.model).__name__}",
            expected="a model without a keypoint head",
            found="detectron2's keypoint head, whose loop over detections torch's exporter cannot write",
            fix=f"Type --format traced, or {MODEL.KEYPOINT_ON.set(False)}.",
        )
    buffer = io.BytesIO()
    with refusing(
        f"format onnx, {type(flat.model).__name__}", "a model that torch can export", "Type --format traced."
    ):
        torch.onnx.export(
            flat.adapter,
            flat.adapter.flattened_inputs,
            buffer,  # type: ignore[arg-type]
            # The other exporter, torch.export, stops in detectron2's padding of images.
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(flat.names),
            dynamic_axes={"image": {1: "height", 2: "width"}} if any_size else None,
        )
    return onnx_bytes(onnx.load_model_from_string(buffer.getvalue()), known)


_EXPORTERS: Mapping[str, Callable[[FlatModel, Provenance, bool], bytes]] = {
    "traced": _traced,
    "scripted": _scripted,
    "onnx": _onnx,
}


@contextmanager
def refusing(where: str, expected: str, fix: str) -> Iterator[None]:
    """Turn whatever an exporter or a model raises into a message.

    Raises:
        ExportError: with the first line of what was raised.
    """
    try:
        yield
    except HeadAdaptError:
        raise
    except Exception as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        raise ExportError(
            where,
            expected=expected,
            found=": ".join([type(exc).__name__, *(line[:300] for line in lines[:1])]),
            fix=fix,
        ) from exc


class ExportedModel:
    """A file that ``d2-headadapt export`` wrote, ready to run on the CPU.

    Args:
        content: of the file.
        path: for messages.

    Attributes:
        facts: what the file says of itself.
        names: of the outputs.

    Raises:
        CheckpointFileError: no file of that command.
        ExportError: an ONNX file, and ``onnx`` or ``onnxruntime`` is not installed.

    ::

        model = ExportedModel.open("model.onnx")
        model(image)["pred_boxes"], model.facts.tables["thing"].names
    """

    def __init__(self, content: bytes, path: str = "the exported file") -> None:
        self.facts = facts_of(content, path)
        about = self.facts.extra.get("export")
        if not isinstance(about, Mapping) or about.get("format") not in _EXPORTERS:
            raise CheckpointFileError(
                path,
                expected="a file that d2-headadapt export wrote",
                found="another one, with class tables only",
                fix="Run it with torch.jit.load or onnxruntime.",
            )
        self.names: tuple[str, ...] = tuple(map(str, about["outputs"]))
        self._scripted = about["format"] == "scripted"
        if is_torchscript(content):
            load: Any = torch.jit.load
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # torch.export, which it names, does not take these models
                self._module: Any = load(io.BytesIO(content), map_location="cpu")
            self._session: Any = None
        else:
            self._session = _session(content)

    @classmethod
    def open(cls, path: str) -> ExportedModel:
        """Open a file that ``d2-headadapt export`` wrote.

        Args:
            path: whatever detectron2's ``PathManager`` understands.

        Raises:
            CheckpointFileError: another file.
            ExportError: an ONNX file, and a package to run it is not installed.
        """
        try:
            with open(PathManager.get_local_path(path), "rb") as file:
                return cls(file.read(), path)
        except OSError as exc:
            raise CheckpointFileError(
                path, expected="a file that can be read", found=str(exc), fix="Correct the path."
            ) from exc

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the file on one image (3, H, W), float32, 0 to 255, in the file's channel order and size."""
        if self._session is not None:
            values = self._session.run(None, {"image": image.numpy()})
            return dict(zip(self.names, map(torch.from_numpy, values), strict=True))
        if self._scripted:
            found: dict[str, torch.Tensor] = self._module(({"image": image},))[0]
            return found
        return dict(zip(self.names, self._module(image), strict=True))


def _session(content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise ExportError(
            "format onnx", expected="the package onnxruntime", found=str(exc), fix="Type: pip install onnxruntime"
        ) from exc
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that wait by spinning take the core from the one they wait for.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
