"""The linear models, against what they must equal, and the sample, which must not depend on who collected it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2_headadapt.fit.reservoir import Reservoir, image_key, region_keys, sample_view
from d2_headadapt.fit.solvers import Frame, choose_penalty, logistic_rows, ridge_rows, softmax_rows


def data(n: int = 400, d: int = 5, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator) + 2 * F.one_hot(label, d).float()
    return x, label


def one_hot_targets(label: torch.Tensor, classes: int):
    target, ones = F.one_hot(label, classes).float(), torch.ones(len(label), 1)
    return lambda part: (target[part], ones[part])


def test_frame_there_and_back_is_the_identity() -> None:
    x, _ = data()
    frame = Frame.of(3 * x + 100)
    weight, bias = torch.randn(4, 5), torch.randn(4)
    rows, intercepts = frame.rows(frame.solution(weight, bias))
    assert torch.allclose(rows, weight, atol=1e-5) and torch.allclose(intercepts, bias, atol=1e-3)
    z = frame.apply(3 * x + 100)
    logits = (3 * x + 100) @ weight.t() + bias
    assert torch.allclose(z @ frame.solution(weight, bias), logits, atol=2e-3)


def test_dead_dimensions_do_not_make_weights_explode() -> None:
    """Real box features: deviations of 1e-7 beside 2.7. Dividing each by its own gives weights of 1e5."""
    x, label = data()
    dead = torch.cat([x, 1e-7 * torch.randn(len(x), 3, generator=torch.Generator().manual_seed(1))], dim=1)
    frame = Frame.of(dead)
    solution = softmax_rows(frame.apply(dead), one_hot_targets(label, 3), 1e-3, columns=3)
    weight, _ = frame.rows(solution)
    assert float(weight.norm(dim=1).max()) < 10
    own = (dead - dead.mean(0)) / dead.std(0)
    mutated = softmax_rows(torch.cat([own, torch.ones(len(x), 1)], 1), one_hot_targets(label, 3), 1e-3, columns=3)
    assert float((mutated[:-1].t() / dead.std(0)).norm(dim=1).max()) > 1e4


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_softmax_is_at_its_optimum(penalty: float) -> None:
    x, label = data()
    z = Frame.of(x).apply(x)
    theta = softmax_rows(z, one_hot_targets(label, 3), penalty, columns=3, steps=60).requires_grad_(True)
    strength = torch.full((z.shape[1], 1), penalty)
    strength[-1] = penalty * 1e-3
    loss = F.cross_entropy(z @ theta, label) + 0.5 * (strength * theta**2).sum()
    (slope,) = torch.autograd.grad(loss, theta)
    assert float(slope.abs().max()) < 1e-4


def test_constants_stay_constants() -> None:
    """With background's logits fixed at what a full solution gave them, the other rows come out as they were."""
    x, label = data()
    z = Frame.of(x).apply(x)
    full = softmax_rows(z, one_hot_targets(label, 3), 1e-3, columns=3, steps=80)
    rest = softmax_rows(
        z, one_hot_targets(label, 3), 1e-3, columns=3, fixed=z @ full[:, 2], start=torch.zeros(z.shape[1], 2), steps=80
    )
    assert rest.shape == (z.shape[1], 2)
    assert torch.allclose(rest, full[:, :2], atol=2e-2)


def test_logistic_with_a_heavy_penalty_keeps_its_prior() -> None:
    x, label = data()
    z = Frame.of(x).apply(x)
    prior = torch.randn(z.shape[1], 3)
    near = logistic_rows(z, one_hot_targets(label, 3), 1e6, prior=prior)
    assert torch.allclose(near[:-1], prior[:-1], atol=1e-3)
    free = logistic_rows(z, one_hot_targets(label, 3), 1e-3, prior=prior)
    assert ((z @ free > 0) == F.one_hot(label, 3).bool()).float().mean() > 0.85


def test_ridge_equals_the_normal_equations_and_leans_on_its_prior() -> None:
    x, _ = data()
    z = Frame.of(x).apply(x)
    truth = torch.randn(z.shape[1], 4)
    ones = torch.ones(len(z))
    assert torch.allclose(ridge_rows(z, z @ truth, ones, 1e-6, torch.zeros_like(truth)), truth, atol=1e-3)
    prior = torch.randn_like(truth)
    assert torch.allclose(ridge_rows(z, z @ truth, ones, 1e12, prior), prior, atol=1e-3)
    # Weights count as copies.
    twice = torch.cat([z, z[:50]])
    weights = torch.cat([torch.full((50,), 2.0), torch.ones(len(z) - 50)])
    left = ridge_rows(twice, twice @ truth + 1, torch.ones(len(twice)), 5.0, prior)
    right = ridge_rows(z, z @ truth + 1, weights, 5.0, prior)
    assert torch.allclose(left, right, atol=1e-5)


def test_the_strongest_penalty_that_keeps_the_gain_is_chosen() -> None:
    losses = {1.0: 0.60, 0.1: 0.505, 0.01: 0.50, 0.001: 0.52}
    solve = lambda penalty, start: torch.tensor(penalty)  # noqa: E731
    chosen = lambda share: choose_penalty([1.0, 0.1, 0.01, 0.001], solve, lambda s: losses[_key(s)], 1.0, share)[0]  # noqa: E731
    assert (chosen(0.7), chosen(0.98), chosen(1.0)) == (1.0, 0.1, 0.01)
    assert choose_penalty([1.0, 0.1], solve, lambda s: 2.0, 1.0, 0.9)[0] == 1.0


def _key(solution: torch.Tensor) -> float:
    return min((1.0, 0.1, 0.01, 0.001), key=lambda value: abs(value - float(solution)))


def offer(reservoir: Reservoir, image: int, count: int = 50) -> None:
    generator = torch.Generator().manual_seed(image)
    stratum = torch.randint(4, (count,), generator=generator).clamp(max=2)
    x = torch.randn(count, 3, generator=generator)
    reservoir.add(image_key(0, f"image {image}"), 2 * image, stratum, {"x": x})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_sample_is_the_same_for_any_number_of_processes(world: int) -> None:
    def collected(parts: list[list[int]]) -> dict[str, torch.Tensor]:
        whole = Reservoir({2: 100}, 60)
        for part in parts:
            one = whole.like()
            for image in part:
                offer(one, image)
            whole.absorb(one)
        return whole.result()

    alone = collected([list(range(40))])
    shared = collected([list(range(rank, 40, world))[::-1] for rank in range(world)])
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert len(alone["x"]) == 160 and float(alone["weight"].sum()) == pytest.approx(40 * 50)


def test_memory_is_bounded_and_rare_strata_are_kept_whole() -> None:
    reservoir = Reservoir({0: 10}, 20)
    for image in range(200):
        n = 40
        stratum = torch.zeros(n, dtype=torch.int64)
        stratum[:20] = 1
        stratum[0] = 2 if image % 40 == 0 else 1
        reservoir.add(image_key(0, str(image)), image, stratum, {"x": torch.zeros(n, 1)})
        assert sum(len(chunk["x"]) for chunk in reservoir._chunks) <= 2 * 30 + 4 * n + n
    kept = reservoir.result()["stratum"].tolist()
    assert (kept.count(0), kept.count(1), kept.count(2)) == (10, 15, 5)


def test_keys_are_even_and_belong_to_the_image() -> None:
    keys = region_keys(image_key(3, "a"), torch.arange(4000)).double() / 2**63
    assert float(keys.min()) >= 0 and abs(float(keys.mean()) - 0.5) < 0.02
    assert not torch.equal(keys, region_keys(image_key(4, "a"), torch.arange(4000)).double() / 2**63)
    numbers, stands_for = sample_view(image_key(0, "a"), 1000, 10)
    assert len(numbers.unique()) == 10 and stands_for == 100
