"""Optimizer state and averages under another class list: moments stay with their class, new rows start at zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.checkpoint.optimizer import (
    adapt_averages,
    adapt_resume,
    adapt_state,
    find_state,
    group_origin,
    reorder_scheduler,
)
from d2_headadapt.checkpoint.provenance import Provenance, optimizer_names
from d2_headadapt.errors import ResumeError

OLD, NEW = ClassTable(["cat", "dog", "cow", "pig"], "old"), ClassTable(["pig", "owl", "cat"], "new")
LAYOUTS = tuple(
    HeadLayout(f"{name}.{leaf}", "thing", "head", "box", **kind)
    for name, kind in (("cls", {"extra": 1}), ("box", {"rows_per_class": 4}))
    for leaf in ("weight", "bias")
)


class Net(nn.Module):
    def __init__(self, k: int, extra_layer: bool = False) -> None:
        super().__init__()
        if extra_layer:
            self.norm = nn.Linear(6, 6)
        self.body = nn.Linear(6, 5)
        self.cls = nn.Linear(5, k + 1)
        self.box = nn.Linear(5, 4 * k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.cls(x).square().sum() + self.box(x).square().sum()


def optimizer_of(net: nn.Module, kind: str, groups: int = 1) -> torch.optim.Optimizer:
    parameters = [p for p in net.parameters() if p.requires_grad]
    split = [parameters] if groups == 1 else [parameters[1::2], parameters[::2]]
    entries = [{"params": group, "weight_decay": 0.1 * i} for i, group in enumerate(split)]
    return torch.optim.SGD(entries, lr=0.01, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(entries, lr=0.01)


def trained(net: Net, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        net(torch.full((2, 6), 0.3 * (i + 1))).backward()
        optimizer.step()


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def plan_of(old: nn.Module, new: nn.Module) -> AdaptPlan:
    return plan_adaptation(
        shapes(old), shapes(new), LAYOUTS, source_tables={"thing": OLD}, target_tables={"thing": NEW}
    )


def names_of(optimizer: torch.optim.Optimizer, net: nn.Module) -> tuple[tuple[str, ...], ...]:
    return optimizer_names(optimizer, dict(net.named_parameters()))


def check_moments(
    old: Net, old_optimizer: torch.optim.Optimizer, new: Net, new_optimizer: torch.optim.Optimizer
) -> int:
    """Every carried row's moments are the saved ones, every new row's zero; returns how many tensors were compared."""
    olds, count = dict(old.named_parameters()), 0
    for name, parameter in new.named_parameters():
        if name not in olds or not parameter.requires_grad:
            continue
        saved, now = old_optimizer.state[olds[name]], new_optimizer.state[parameter]
        assert saved.keys() == now.keys()
        for key, value in saved.items():
            if not torch.is_tensor(value) or value.dim() == 0:
                assert now[key] == value
                continue
            count += 1
            if name.startswith("body"):
                assert torch.equal(now[key], value)
                continue
            per = 4 if name.startswith("box") else 1
            for t, class_name in enumerate(NEW.names):
                row = now[key][t * per : (t + 1) * per]
                s = OLD.find(class_name)
                assert torch.equal(row, torch.zeros_like(row) if s is None else value[s * per : (s + 1) * per])
            if per == 1:
                assert torch.equal(now[key][-1], value[-1]), "background"
    return count


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stored", [True, False], ids=["names stored", "names by identity"])
def test_moments_of_carried_rows_are_the_saved_ones_and_the_next_step_works(
    kind: str, groups: int, stored: bool
) -> None:
    old, new = Net(4), Net(3)
    old_optimizer, new_optimizer = optimizer_of(old, kind, groups), optimizer_of(new, kind, groups)
    trained(old, old_optimizer)
    names = names_of(old_optimizer, old) if stored else ()
    saved = copy.deepcopy(old_optimizer.state_dict())
    state = adapt_state(saved, names, new_optimizer, names_of(new_optimizer, new), plan_of(old, new), "f.pth")
    new_optimizer.load_state_dict(state)
    assert check_moments(old, old_optimizer, new, new_optimizer) == 6 * (1 if kind == "sgd" else 2)
    trained(new, new_optimizer, 2)


def test_stock_state_would_have_died_at_the_first_step() -> None:
    """What the law is for: torch loads the old moments without a word."""
    old, new = Net(4), Net(3)
    old_optimizer, new_optimizer = optimizer_of(old, "sgd"), optimizer_of(new, "sgd")
    trained(old, old_optimizer)
    new_optimizer.load_state_dict(old_optimizer.state_dict())
    with pytest.raises(RuntimeError, match="must match the size"):
        trained(new, new_optimizer, 1)


def test_swapped_rows_break_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: the moments of two classes change places."""
    from d2_headadapt.checkpoint import optimizer as moments

    right = moments.move_rows
    monkeypatch.setattr(moments, "move_rows", lambda *args: right(*args).roll(1, 0))
    old, new = Net(4), Net(3)
    old_optimizer, new_optimizer = optimizer_of(old, "sgd"), optimizer_of(new, "sgd")
    trained(old, old_optimizer)
    state = adapt_state(
        copy.deepcopy(old_optimizer.state_dict()),
        (),
        new_optimizer,
        names_of(new_optimizer, new),
        plan_of(old, new),
        "",
    )
    new_optimizer.load_state_dict(state)
    with pytest.raises(AssertionError):
        check_moments(old, old_optimizer, new, new_optimizer)


def test_stored_names_survive_another_order_and_number_of_parameters() -> None:
    """A frozen layer and a new one move every number; names do not move."""
    old, new = Net(4), Net(3, extra_layer=True)
    new.body.bias.requires_grad_(False)
    old_optimizer, new_optimizer = optimizer_of(old, "sgd", 2), optimizer_of(new, "sgd", 1)
    trained(old, old_optimizer)
    state = adapt_state(
        copy.deepcopy(old_optimizer.state_dict()), names_of(old_optimizer, old), new_optimizer,
        names_of(new_optimizer, new), plan_of(old, new), "f.pth",
    )  # fmt: skip
    new_optimizer.load_state_dict(state)
    assert check_moments(old, old_optimizer, new, new_optimizer) == 5
    assert not new_optimizer.state[new.norm.weight]


def test_without_names_other_group_sizes_are_refused() -> None:
    old, new = Net(4), Net(3, extra_layer=True)
    old_optimizer, new_optimizer = optimizer_of(old, "sgd"), optimizer_of(new, "sgd")
    trained(old, old_optimizer)
    with pytest.raises(ResumeError, match=r"optimizer state of f\.pth: expected the optimizer groups of this run"):
        adapt_state(
            old_optimizer.state_dict(), (), new_optimizer, names_of(new_optimizer, new), plan_of(old, new), "f.pth"
        )


def test_without_names_a_moment_of_another_shape_is_refused() -> None:
    """Equal sizes, other order: only the shapes give it away."""
    old, new = Net(4), Net(3)
    old_optimizer = torch.optim.SGD(list(old.parameters())[::-1], lr=0.01, momentum=0.9)
    new_optimizer = optimizer_of(new, "sgd")
    trained(old, old_optimizer)
    with pytest.raises(ResumeError, match=r"expected a moment of shape \(5, 6\) for body.weight"):
        adapt_state(
            old_optimizer.state_dict(), (), new_optimizer, names_of(new_optimizer, new), plan_of(old, new), "f.pth"
        )


def test_the_saved_state_is_not_written_to() -> None:
    old, new = Net(4), Net(3)
    old_optimizer, new_optimizer = optimizer_of(old, "adam"), optimizer_of(new, "adam")
    trained(old, old_optimizer)
    saved = old_optimizer.state_dict()
    before = copy.deepcopy(saved)
    adapt_state(saved, (), new_optimizer, names_of(new_optimizer, new), plan_of(old, new), "f.pth")
    assert saved["param_groups"] == before["param_groups"]
    for number, entry in before["state"].items():
        assert all(torch.equal(saved["state"][number][key], value) for key, value in entry.items())


def test_both_of_detectron2s_nestings_are_found() -> None:
    state: dict[str, Any] = {"state": {}, "param_groups": []}
    flat = {"optimizer": state}
    nested = {"trainer": {"iteration": 3, "_trainer": {"optimizer": state}}}
    assert find_state(flat) == [flat] and find_state(nested) == [nested["trainer"]["_trainer"]]
    assert find_state({"trainer": {"iteration": 3}, "optimizer": 3}) == []


@given(st.permutations(range(4)))
def test_a_schedulers_rates_follow_the_groups(order: list[int]) -> None:
    saved = {
        "trainer": {"hooks": {"LRScheduler": {"base_lrs": [0.1, 0.2, 0.3, 0.4], "_last_lr": [1, 2, 3, 4], "n": 7}}}
    }
    out = reorder_scheduler(saved, [*order, None], [9.0] * 5)["trainer"]["hooks"]["LRScheduler"]
    assert out == {
        "base_lrs": [*([0.1, 0.2, 0.3, 0.4][i] for i in order), 9.0],
        "_last_lr": [*([1, 2, 3, 4][i] for i in order), 9.0],
        "n": 7,
    }


def test_a_group_continues_the_one_that_most_of_it_was_in() -> None:
    stored = (("a", "b", "c"), ("d", "e"))
    assert group_origin(["d", "e", "a"], stored, 0) == 1
    assert group_origin(["new"], stored, 0) is None


WRAPS: dict[str, Any] = {
    "ema_state": lambda s: {"ema_state": s},
    "model_ema": lambda s: {"model_ema": {"module": s, "decay": 0.9}},
    "ema": lambda s: {"ema": {"state_dict": s, "updates": 3}},
    "ema_model": lambda s: {"ema_model": s},
    "teacher": lambda s: {"teacher": s},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "averaged_model": lambda s: {"averaged_model": {"n_averaged": torch.tensor(4), **s}},
    "inner model": lambda s: {"ema": {"model": {"model": s}}},
    "in the trainer": lambda s: {"trainer": {"iteration": 3, "hooks": {"EMA": {"state": s}}}},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_averages_go_through_the_same_row_map(wrap: Any, prefix: str) -> None:
    old, new = Net(4), Net(3)
    average = {prefix + name: value + 1 for name, value in old.state_dict().items()}
    checkpoint = wrap(average)
    untouched = copy.deepcopy(checkpoint)
    (place,), left = adapt_averages(checkpoint, plan_of(old, new), new.state_dict())
    assert left == []
    out: Any = checkpoint
    for key in place.split("/"):
        out, untouched = out[key], untouched[key]
    assert list(out) == list(untouched), "names stay as whoever reads them expects them"
    weight = out[f"{prefix}cls.weight"]
    assert torch.equal(weight[0], average[f"{prefix}cls.weight"][3]) and torch.equal(
        weight[3], average[f"{prefix}cls.weight"][4]
    )
    assert torch.equal(weight[1], new.cls.weight[1]), "a new row starts where the model's does"
    assert torch.equal(out[f"{prefix}body.weight"], average[f"{prefix}body.weight"])
    assert "n_averaged" not in untouched or out["n_averaged"] == untouched["n_averaged"]


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        (lambda s: {"shadow_params": list(s.values())}, "x/shadow_params"),
        (lambda s: {name.replace(".", "_"): value for name, value in s.items()}, "x"),
        (lambda s: {**s, "body.weight": torch.zeros(1, 1)}, "x"),
    ],
    ids=["without names", "other names", "other shapes"],
)
def test_an_average_that_cannot_be_told_is_named_and_left(entry: Any, place: str) -> None:
    old, new = Net(4), Net(3)
    checkpoint = {"x": entry(old.state_dict())}
    kept = copy.deepcopy(checkpoint)
    assert adapt_averages(checkpoint, plan_of(old, new), new.state_dict()) == ([], [place])
    assert str(checkpoint) == str(kept)


def test_nothing_is_touched_where_no_class_changed() -> None:
    old = Net(4)
    checkpoint = {"ema": old.state_dict(), "list": [torch.zeros(5, 5)]}
    entries = dict(checkpoint)
    same = plan_adaptation(
        shapes(old), shapes(old), LAYOUTS, source_tables={"thing": OLD}, target_tables={"thing": OLD}
    )
    assert adapt_averages(checkpoint, same, old.state_dict()) == ([], [])
    assert all(checkpoint[key] is entries[key] for key in entries)


def test_the_mixed_precision_scaler_and_the_iteration_are_kept() -> None:
    old, new = Net(4), Net(3)
    old_optimizer, new_optimizer = optimizer_of(old, "sgd"), optimizer_of(new, "sgd")
    trained(old, old_optimizer)
    inner = {"iteration": 7, "optimizer": old_optimizer.state_dict(), "grad_scaler": {"scale": 512.0}}
    checkpoint = {"trainer": {"iteration": 7, "_trainer": inner}}
    adapt_resume(checkpoint, plan_of(old, new), Provenance(), new, {"optimizer": new_optimizer}, "adapt", "f.pth")
    kept = checkpoint["trainer"]["_trainer"]
    assert kept["grad_scaler"] == {"scale": 512.0} and kept["iteration"] == checkpoint["trainer"]["iteration"] == 7
    new_optimizer.load_state_dict(kept["optimizer"])
    assert check_moments(old, old_optimizer, new, new_optimizer) == 6
