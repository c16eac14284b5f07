"""Checkpointers of a script's own: which get this package's below them, and what is said of the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import TrainerBase
from fvcore.common.checkpoint import Checkpointer
from helpers.files import save_stock
from helpers.models import model_of, names, stock_model

from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer
from d2_headadapt.cli.run import checkpointers
from d2_headadapt.cli.run.checkpointers import adopt_checkpointer
from d2_headadapt.config.settings import attach_settings
from d2_headadapt.errors import UsageError

CLS = "roi_heads.box_predictor.cls_score.weight"


class Converts(DetectionCheckpointer):
    """As AdelaiDet's: another way to read a file."""

    def _load_file(self, filename: str) -> Any:
        loaded = torch.load(filename, weights_only=True)
        return {"model": {name.removeprefix("theirs."): value for name, value in loaded["model"].items()}}


class Skips(DetectionCheckpointer):
    """Its constructor names that of stock."""

    def __init__(self, model: Any, folder: str = "") -> None:
        DetectionCheckpointer.__init__(self, model, folder)


class Loads(DetectionCheckpointer):
    def _load_model(self, checkpoint: Any) -> Any:
        return super()._load_model(checkpoint)


class Mixin:
    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


class Inherits(Mixin, DetectionCheckpointer):
    pass


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is said, with everything that is changed put back afterwards."""
    loads = {cls: vars(cls)["load"] for cls in (Checkpointer, DetectionCheckpointer, HeadAdaptCheckpointer)}
    train, said = TrainerBase.train, list[str]()
    for level in ("info", "warning"):
        monkeypatch.setattr(checkpointers.logger, level, lambda text, *values: said.append(text % values))
    checkpointers._told.clear()
    checkpointers._mixed.cache_clear()
    yield said
    # Python does not forget that a class once had a constructor of its own.
    Checkpointer.__new__ = lambda cls, *_, **__: object.__new__(cls)  # type: ignore[assignment, method-assign]
    for cls, load in loads.items():
        cls.load = load
    TrainerBase.train = train
    logging.getLogger("d2_headadapt").handlers.clear()


def saved(folder: Path, prefix: str = "") -> tuple[str, torch.Tensor]:
    model = stock_model(5, seed=3)
    path = save_stock(model, folder / "old.pth")
    if prefix:
        torch.save({"model": {f"{prefix}{n}": v for n, v in model.state_dict().items()}}, path)
    return str(path), model.state_dict()[CLS].clone()


def target() -> torch.nn.Module:
    model = model_of(["class 3", "zebra", "class 0"], num_classes=3)
    attach_settings(model, AdaptSettings.of(["class 3", "zebra", "class 0"], names(5)))
    return model


@pytest.mark.parametrize(("cls", "prefix"), [(Converts, "theirs."), (Skips, "")])
def test_a_subclass_with_stock_s_load_carries_rows_and_keeps_its_methods(
    adopted: list[str], tmp_path: Path, cls: Any, prefix: str
) -> None:
    path, old = saved(tmp_path, prefix)
    adopt_checkpointer()
    model = target()
    made = cls(model, str(tmp_path / "out"))
    assert isinstance(made, cls) and isinstance(made, HeadAdaptCheckpointer) and type(made).__name__ == cls.__name__
    made.load(path)
    rows = model.state_dict()[CLS]
    assert torch.equal(rows[[0, 2, 3]], old[[3, 0, 5]])
    assert any(f"{cls.__name__} is a checkpointer of the script's own and keeps" in line for line in adopted)
    assert type(cls(model)) is type(made) and sum(cls.__name__ in line for line in adopted) == 1


@pytest.mark.parametrize(
    ("cls", "why", "line"),
    [
        (Loads, "has a _load_model of its own", "class Loads(HeadAdaptCheckpointer):, without that method"),
        (Inherits, "has a load of its own", "class Inherits(HeadAdaptCheckpointer):"),
        (Checkpointer, "is fvcore's", "HeadAdaptCheckpointer(...) where Checkpointer(...) is called"),
    ],
)
def test_any_other_is_kept_and_named_once(adopted: list[str], cls: Any, why: str, line: str) -> None:
    adopt_checkpointer()
    assert [type(cls(torch.nn.Linear(1, 1))) for _ in range(2)] == [cls, cls]
    (said,) = adopted
    assert said.startswith(f"{cls.__name__} {why} and is kept") and line in said
    assert "change two lines: from d2_headadapt import HeadAdaptCheckpointer; " in said


@pytest.mark.parametrize("cls", [DetectionCheckpointer, Converts, Inherits, Checkpointer])
def test_with_plan_the_first_load_ends_the_script(
    adopted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], cls: Any
) -> None:
    path, _ = saved(tmp_path)
    adopt_checkpointer(plan=True)
    model = target()
    before = model.state_dict()[CLS].clone()
    with pytest.raises(SystemExit) as ended:
        cls(model).load(path)
    assert ended.value.code == 0 and torch.equal(model.state_dict()[CLS], before)
    printed = capsys.readouterr().out
    assert "GeneralizedRCNN that the script built" in printed and "2 of 3 thing classes carried" in printed
    if cls is Inherits:
        del cls.load


def test_with_plan_a_script_without_a_load_is_refused(adopted: list[str]) -> None:
    adopt_checkpointer(plan=True)
    with pytest.raises(UsageError, match="expected a checkpoint that the script loads, found an empty path"):
        DetectionCheckpointer(torch.nn.Linear(1, 1)).load("")
    with pytest.raises(UsageError, match="before the training, found none: the script starts a new model"):
        TrainerBase().train(0, 1)
