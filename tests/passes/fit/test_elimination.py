"""Which units go, and what the rest make up for them."""

import itertools

import pytest
import torch
from torch import Tensor

from lmfx.passes.errors import InputError
from lmfx.passes.fit import elimination
from lmfx.passes.fit.elimination import compensated, eliminate


def system(rows: int, out: int = 4, samples: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Centred samples of correlated features, their Gram, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, rows, dtype=torch.float64, generator=generator)
    x = mixed @ torch.randn(rows, rows, dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    return x, x.T @ x, torch.randn(rows, out, dtype=torch.float64, generator=generator)


def loss_of(gram: Tensor, columns: Tensor, rows: Tensor) -> float:
    """What least squares on some rows loses."""
    best = torch.linalg.solve(gram[rows][:, rows], gram[rows] @ columns)
    whole = torch.zeros_like(columns)
    whole[rows] = best
    return float(((columns - whole) * (gram @ (columns - whole))).sum())


def greedy(gram: Tensor, columns: Tensor, labels: Tensor, count: int) -> tuple[int, ...]:
    """The units that are left if the one goes whose loss is the least, each time by solving anew."""
    left = list(range(int(labels.max()) + 1))
    while len(left) > count:
        rows = {u: torch.isin(labels, torch.tensor([v for v in left if v != u])) for u in left}
        left.remove(min(left, key=lambda u: loss_of(gram, columns, rows[u])))
    return tuple(left)


@pytest.mark.parametrize(("taps", "units"), [(1, 11), (3, 6)])
def test_each_unit_that_goes_is_the_cheapest_by_brute_force(taps: int, units: int) -> None:
    _, gram, columns = system(taps * units)
    labels = torch.arange(units).repeat(taps)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    for left in eliminate(gram, columns, labels, [units - 1, units // 2, 2], 0.01):
        assert left.units == greedy(damped, columns, labels, len(left.units))
        rows = torch.isin(labels, torch.tensor(left.units))
        assert left.cost == pytest.approx(loss_of(damped, columns, rows), rel=1e-9)


def test_what_is_left_is_least_squares_with_the_weight_as_its_prior() -> None:
    _, gram, columns = system(10)
    labels = torch.arange(10)
    for left in eliminate(gram, columns, labels, [7, 4], 0.05):
        rows = torch.isin(labels, torch.tensor(left.units))
        torch.testing.assert_close(left.columns, compensated(gram, columns, rows, 0.05), rtol=1e-9, atol=1e-10)


def test_all_units_are_the_weight_bit_for_bit() -> None:
    _, gram, columns = system(9)
    (left,) = eliminate(gram, columns, torch.arange(9), [9])
    assert left.cost == 0 and torch.equal(left.columns, columns)
    assert torch.equal(compensated(gram, columns, torch.ones(9, dtype=torch.bool), 0.1), columns)


def test_sets_of_units_are_nested_and_cost_more_the_fewer_they_are() -> None:
    _, gram, columns = system(24)
    left = eliminate(gram, columns, torch.arange(24), [20, 15, 9, 3], 0.01)
    for more, fewer in itertools.pairwise(left):
        assert set(fewer.units) < set(more.units) and fewer.cost > more.cost > 0


def test_zero_constant_and_dependent_units_go_first_and_lose_nothing() -> None:
    x, _, columns = system(8)
    dependent = x[:, :3] @ torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
    x = torch.cat([x, dependent, torch.zeros(len(x), 1, dtype=torch.float64)], 1)
    columns = torch.cat([columns, columns[:3] + 1.0])
    (left,) = eliminate(x.T @ x, columns, torch.arange(11), [8])
    assert 10 not in left.units
    y, kept = x @ columns, x[:, list(left.units)] @ left.columns
    assert float((y - kept).norm() / y.norm()) < 1e-10


def test_several_at_a_time_are_as_exact_and_no_worse_than_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = system(96, samples=2000)
    copies = torch.cat([x[:, :80], x[:, :16] + 1e-3 * x[:, 80:]], 1)  # pairs of which only one is cheap
    gram, columns = (
        copies.T @ copies,
        torch.randn(96, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    one = eliminate(gram, columns, torch.arange(96), [80, 40], 1e-6)
    monkeypatch.setattr(elimination, "LARGE", 2)
    for slow, fast in zip(one, eliminate(gram, columns, torch.arange(96), [80, 40], 1e-6), strict=True):
        rows = torch.isin(torch.arange(96), torch.tensor(fast.units))
        damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(96, dtype=torch.float64)
        assert fast.cost == pytest.approx(loss_of(damped, columns, rows), rel=1e-6)
        assert fast.cost < 1.1 * slow.cost


@pytest.mark.parametrize("large", [8, 600])
def test_units_that_must_stay_do_however_cheap_they_are(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LARGE", large)
    _, gram, columns = system(40)
    columns[[3, 17]] = 0  # would go first
    labels = torch.arange(40)
    counts = [39, 20, 5, 2]
    assert all({3, 17} & set(left.units) == set() for left in eliminate(gram, columns, labels, counts[1:], 0.01))
    for left in eliminate(gram, columns, labels, counts, 0.01, (3, 17)):
        assert {3, 17} <= set(left.units)
        rows = torch.isin(labels, torch.tensor(left.units))
        assert left.cost == pytest.approx(loss_of(damped_by(gram, 0.01), columns, rows), rel=1e-8)


def test_units_that_must_stay_do_where_several_go_at_a_time_and_few_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LARGE", 8)
    _, gram, columns = system(96, samples=500)
    columns[:90] = 0  # cheaper than all that may go
    for left in eliminate(gram, columns, torch.arange(96), [93, 90], 0.01, range(90)):
        assert set(range(90)) <= set(left.units)


def damped_by(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_sums_that_are_nothing_but_rounding_are_taken_as_they_are() -> None:
    noise = 1e-13 * torch.tensor([[-1.0, 2.0, 0.0], [2.0, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    columns = torch.randn(3, 2, dtype=torch.float64)
    for gram in (noise, torch.zeros_like(noise)):
        (left,) = eliminate(gram, columns, torch.arange(3), [2], 1e-9)
        assert len(left.units) == 2 and bool(left.columns.isfinite().all())


def test_units_of_different_sizes_and_sums_that_are_not_finite_are_refused() -> None:
    _, gram, columns = system(5)
    with pytest.raises(InputError, match="cannot be compared"):
        eliminate(gram, columns, torch.tensor([0, 0, 1, 2, 3]), [2])
    with pytest.raises(InputError, match="not finite"):
        eliminate(gram * torch.nan, columns, torch.arange(5), [2])
