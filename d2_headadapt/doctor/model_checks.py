"""Check the model: it builds, its parts fit, the batch survives, and every module is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..key import MODEL
from ..modeling.task_dry_run import evaluating
from .component_checks import components
from .finding import DoctorContext, Finding, PartMissing, check, finding_of
from .walking import Trouble, tensors_of, walk

BATCHES = (2, 3)
"""A batch size that somebody wrote into a layer cannot be both."""
FORWARD_PARAMETERS = 80_000_000
"""A model with more is not run on the CPU: that would take more than seconds."""
FORWARD_SIDE = 96
"""Height and width (pixels) of the one image."""


@check("HA501", "the model can be built")
def builds(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("model")
    # Where a component is not registered, HA128 has said it, and of pixels HA126; a LazyConfig names no component.
    model = context.cfg.MODEL if error is not None else None
    said = model is not None and not context.is_lazy and len(model.PIXEL_MEAN) != len(model.PIXEL_STD)
    if error is not None and not said and (context.is_lazy or not list(components(context))):
        where = f"{MODEL.META_ARCHITECTURE.set(context.cfg.MODEL.META_ARCHITECTURE)}"
        yield finding_of("HA501", error, where=where)


@check("HA502", "the modules of the model fit each other", needs=("model",))
def shapes_fit(context: DoctorContext) -> Iterator[Finding]:
    trouble = _trouble(context)
    if trouble is not None and not trouble.batch_lost:
        yield Finding(
            "HA502",
            "error",
            ConfigError(
                f"{trouble.module} ({trouble.kind})",
                found=f"{trouble.message} (input {trouble.inputs}, while running {trouble.part})",
                expected="modules whose shapes fit each other",
                fix=f"Correct the keys under {MODEL} that {trouble.module or 'it'} is built from, or its "
                "from_config: sizes of "
                "layers come from input_shape, and what is flattened from x.flatten(1).shape[1].",
            ),
        )


@check("HA503", "every head gives one row for each of its inputs", needs=("model",))
def batch_survives(context: DoctorContext) -> Iterator[Finding]:
    trouble = _trouble(context)
    if trouble is not None and trouble.batch_lost:
        given = trouble.inputs.removeprefix("(").split(",")[0]
        yield Finding(
            "HA503",
            "error",
            ConfigError(
                f"{trouble.module} ({trouble.kind})",
                found=f"an output {trouble.message} from an input {trouble.inputs}",
                expected=f"{given} rows in the output, one for each region or image",
                fix="Flatten with x.flatten(1), which keeps the batch, never with x.view(-1, width).",
            ),
        )


_TROUBLE: WeakKeyDictionary[DoctorContext, Trouble | None] = WeakKeyDictionary()
_ON_CPU: WeakKeyDictionary[DoctorContext, nn.Module] = WeakKeyDictionary()


def _trouble(context: DoctorContext) -> Trouble | None:
    """Find the first trouble of the model's parts, once for a context."""
    if context not in _TROUBLE:
        _TROUBLE[context] = _find_trouble(context)
    return _TROUBLE[context]


def _find_trouble(context: DoctorContext) -> Trouble | None:
    """Walk the parts on the meta device, then on the CPU where that fails; some of torch's checks exist only there."""
    channels = len(context.resolved.MODEL.PIXEL_MEAN)
    for batch in BATCHES:
        if walk(context.model, channels, batch) is not None:
            found = walk(_on_cpu(context), channels, batch)
            if found is not None:
                return found
    return walk(_on_cpu(context), channels, BATCHES[0]) if _parameters(context) <= FORWARD_PARAMETERS else None


def _parameters(context: DoctorContext) -> int:
    return sum(p.numel() for p in context.model.parameters())


def _on_cpu(context: DoctorContext) -> nn.Module:
    """Build a model with values on the CPU, once for a context; no random stream moves."""
    if context not in _ON_CPU:
        _ON_CPU[context] = context.recipe.build_small()
    return _ON_CPU[context]


@check("HA504", "every module with parameters is used", needs=("model",), severity="warning")
def everything_is_used(context: DoctorContext) -> Iterator[Finding]:
    """Find modules that are never called: they train nothing, and stop training on several GPUs."""
    count = _parameters(context)
    if count > FORWARD_PARAMETERS:
        reason = f"{count / 1e6:.0f} million parameters: a forward pass on the CPU would take long"
        raise PartMissing("a forward pass", None, reason)
    cfg = context.resolved
    try:
        idle = unused(_on_cpu(context), _one_image(cfg))
    except Exception as error:
        # An image as small as this one may be too small for an architecture: that is no mistake of its user.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise PartMissing("a forward pass", error, f"one image of {FORWARD_SIDE} pixels failed with {text}") from error
    for name, kind in idle:
        yield Finding(
            "HA504",
            "warning",
            ConfigError(
                f"{name} ({kind})",
                found="parameters that one forward pass in evaluation mode never touched",
                expected="a module that forward calls",
                fix=f"Call {name} in the forward of the module that holds it, or remove it. If only training calls "
                "it, all is well.",
            ),
        )


class _Touched(TorchFunctionMode):
    """A record of the parameters that any operation of torch gets, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(t) for t in tensors_of([*args, *(kwargs or {}).values()]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def unused(model: nn.Module, inputs: Any) -> list[tuple[str, str]]:
    """List modules that an evaluation never called and whose parameters no operation got: name and class.

    Of modules inside each other only the outermost is named.

    Args:
        model: on the CPU.
        inputs: of its forward.
    """
    called: set[int] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in model.modules()]
    touched = _Touched()
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]), touched:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        below = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        if below and not any(_is_used(m, called, touched.seen) for m in below) and id(module) not in called:
            found.append((name, type(module).__name__))
    return found


def _is_used(module: nn.Module, called: set[int], touched: set[int]) -> bool:
    return id(module) in called or any(id(p) in touched for p in module.parameters(recurse=False))


def _one_image(cfg: CfgNode) -> list[dict[str, Any]]:
    side = FORWARD_SIDE
    image = torch.zeros(len(cfg.MODEL.PIXEL_MEAN), side, side, dtype=torch.uint8)
    entry: dict[str, Any] = {"image": image, "height": side, "width": side}
    if cfg.MODEL.LOAD_PROPOSALS:
        boxes = Boxes(torch.tensor([[8.0, 8.0, 48.0, 56.0]]))
        entry["proposals"] = Instances((side, side), proposal_boxes=boxes, objectness_logits=torch.zeros(1))
    return [entry]
