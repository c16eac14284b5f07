"""Build models of a config, and turn what their constructors raise into messages."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config.keep import KeepSettings
from ..errors import ConfigError, HeadAdaptError
from ..key import MODEL
from ..modeling.keep_model import attach_keep


@contextmanager
def building() -> Iterator[None]:
    """Turn what a model's constructor raises, and fvcore for a component that nobody registered, into a message.

    Raises:
        ConfigError: with the line of code that failed, because keys of somebody's component are known to it alone.
    """
    try:
        yield
    except (HeadAdaptError, torch.cuda.OutOfMemoryError):
        raise  # No key under MODEL is wrong where memory is short.
    except Exception as exc:  # A user's own component may raise anything; the line of code is named, the cause is kept.
        found = re.search(r"No object named '(.*)' found in '(.*)' registry", str(exc))
        if found is None:
            last = traceback.extract_tb(exc.__traceback__)[-1]
            text = " ".join(f"{type(exc).__name__}: {exc}".split())
            raise ConfigError(
                "config",
                expected="a model that can be built",
                found=f"{text[:300]} (line {last.lineno} of {last.filename})",
                fix=f"Correct the keys under {MODEL} that this line is about.",
            ) from exc
        raise ConfigError(
            f"config, {found[2]}",
            expected="the name of a registered component",
            found=repr(found[1]),
            fix=f"Correct the key under {MODEL} that names it, or register it in a module given with --import.",
        ) from exc


def build_on_meta(cfg: CfgNode, build: Callable[[CfgNode], nn.Module] = build_model) -> nn.Module:
    """Build a model's names and shapes without its memory; on the CPU where a module does not build on the meta device.

    Args:
        cfg: of any model; its device does not matter.
        build: the project's own builder, where it has one.

    Raises:
        ConfigError: it cannot be built.
    """
    on_meta = cfg.clone()
    on_meta.defrost()
    on_meta.MODEL.DEVICE = "meta"
    with building():
        try:
            with torch.device("meta"):
                model: nn.Module = build(on_meta)
        except (NotImplementedError, RuntimeError):
            on_meta.MODEL.DEVICE = "cpu"
            model = build(on_meta)
    return attach_keep(model, KeepSettings.from_config(cfg))
