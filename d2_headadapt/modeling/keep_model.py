"""Put ``KEEP: exact`` behind a model that is built."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config.keep import KeepSettings
from ..errors import ConfigError
from ..key import HEAD_ADAPT
from .keep import Keep, KeptModel, KeptROIHeads, build_packs, freeze_old, keep_of, put_before
from .keep_dense import KeptRetinaNet, build_dense_packs
from .keep_proposals import KeptRPN


def attach_keep(model: nn.Module, settings: KeepSettings | None) -> nn.Module:
    """Add classes behind the unmodified old path of a model, in place.

    Everything old is frozen and stays in evaluation mode, whatever ``train()`` is told. Load the base's weights with
    :class:`d2_headadapt.HeadAdaptCheckpointer` afterwards, as into any model.

    Args:
        model: a ``GeneralizedRCNN`` or ``RetinaNet`` of detectron2, or of a class derived from one, with the base's
            number of classes.
        settings: old and added classes; ``None`` leaves the model alone.

    Returns:
        The same model.

    Raises:
        ConfigError: a model whose old path is not known, whose class count is not that of ``settings.old``, or that
            was extended already.

    Example:
        >>> from d2_headadapt import ClassTable, KeepSettings, PackSpec, attach_keep
        >>> settings = KeepSettings(ClassTable(["cat", "dog"]), (PackSpec(("rhino",)),))
        >>> settings.table.names
        ('cat', 'dog', 'rhino')
    """
    if settings is None:
        return model
    any_model: Any = model
    roi_heads = getattr(any_model, "roi_heads", None)
    dense = roi_heads is None and hasattr(any_model, "anchor_matcher") and hasattr(any_model, "label_anchors")
    dense = dense and not hasattr(getattr(any_model, "head", None), "ctrness")
    if keep_of(model) is not None or not (dense or roi_heads is not None):
        raise ConfigError(
            HEAD_ADAPT.KEEP,
            expected="a GeneralizedRCNN or RetinaNet without added classes",
            found=f"{type(model).__name__}{', which has some' if keep_of(model) is not None else ''}",
            fix=f"Set {HEAD_ADAPT.KEEP} '' to train one head for all classes.",
        )
    owner: Any = any_model if dense else roi_heads
    if owner.num_classes != len(settings.old):
        raise ConfigError(
            HEAD_ADAPT.KEEP,
            expected=f"a model of the base's {len(settings.old)} classes ({settings.old.origin})",
            found=f"one of {owner.num_classes}",
            fix="Build it for the base's classes; the added ones stand behind them.",
        )
    rpn: Any = getattr(any_model, "proposal_generator", None)
    packs = build_dense_packs(settings, model) if dense else build_packs(settings, owner, rpn)
    device = next(model.parameters()).device
    owner.keep = Keep(settings, packs, rpn).to(device)
    if dense:
        put_before(model, KeptRetinaNet)
    else:
        put_before(model, KeptModel)
        put_before(owner, KeptROIHeads)
        if any(getattr(pack, "second", None) is not None for pack in owner.keep.packs):
            put_before(rpn, KeptRPN)
    freeze_old(model, owner.keep)
    model.train(model.training)
    return model
