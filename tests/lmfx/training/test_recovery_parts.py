"""The parts of a recovery: what is shown, which values are compared, how a weight moves, and how a rate is found."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.calibration.shown_images import moved, shown
from lmfx.quality.outputs import Output
from lmfx.training.rate_search import FACTOR, Watch, find_rate
from lmfx.training.recovery_objective import RecoveryObjective, distance
from lmfx.training.relative_steps import Kind, RelativeSteps, orthogonal
from lmfx.training.shared_values import Tapped, shared_values
from tests.toys import compress, images, toy


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_moved_image_is_the_image_elsewhere() -> None:
    x = torch.arange(32 * 40.0).view(1, 1, 32, 40).repeat(16, 1, 1, 1)
    y = moved(x, random())
    assert y.shape == x.shape
    offsets = set()
    for row in y:
        # The value at a place in the middle says where it came from.
        place = int(row[0, 16, 20])
        down, right = place // 40 - 16, place % 40 - 20
        offsets.add((down, right))
        assert abs(down) <= 4 and abs(right) <= 5
        assert torch.equal(row[0, 8:24, 10:30], x[0, 0, 8 + down : 24 + down, 10 + right : 30 + right])
    assert len(offsets) > 8


def test_moves_are_multiples_of_a_step_and_of_other_dimensions_too() -> None:
    x = torch.arange(128.0).expand(32, 2, 128)
    distances = {int(row[0, 64]) - 64 for row in moved(x, random(), 8)}
    assert distances == {-16, -8, 0, 8, 16}
    assert moved(torch.rand(2, 1, 16, 17, 18), random()).shape == (2, 1, 16, 17, 18)


def test_small_maps_and_rows_are_not_moved() -> None:
    for x in (torch.rand(8, 3, 15, 40), torch.rand(8, 20)):
        assert shown((x,), random(), mix=0)[0] is x


def test_mixed_images_lie_between_two_images_or_have_a_box_of_another() -> None:
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 2, 20, 20)
    blended = boxed = 0
    for seed in range(12):
        (y,) = shown((x,), random(seed), move=0)
        assert y.min() >= 0 and y.max() <= 7
        sizes = [len(row.unique()) for row in y]
        if max(sizes) == 2:
            boxed += 1
            assert all(set(row.unique().tolist()) <= set(range(8)) for row in y)
        else:
            blended += 1
            assert any(float(row.mean()) % 1 for row in y)
    assert blended and boxed


def test_a_share_of_none_or_one_image_stays_whole() -> None:
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(shown((x,), random(), mix=0)[0], x)
    assert torch.equal(shown((x[:1],), random())[0], x[:1])


def test_all_inputs_of_an_image_are_mixed_alike() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 4)
    a, b = shown((x, 10 * x[:, :, 0, 0]), random())
    assert not torch.equal(a, x)
    assert torch.allclose(10 * a[:, 0, 0, 0], b[:, 0])


def test_images_beside_integers_stay_whole() -> None:
    x, t = torch.rand(6, 3, 8, 8), torch.arange(6)
    a, b = shown((x, t), random())
    assert torch.equal(a, x) and torch.equal(b, t)


# --- values that both graphs have -------------------------------------------------------------------------------------


def test_shared_values_are_those_of_the_original_where_nothing_is_lost() -> None:
    model, x = toy(), images(4)
    graph = lmfx.trace(model, x[:1])
    student = compress(model, x[:1], 1.0, merge=False, calibration=images(16))
    pairs = shared_values(student, graph)
    assert pairs
    own, theirs = Tapped(student, [a for a, _ in pairs]), Tapped(graph, [b for _, b in pairs])
    (output, seen), (wanted, expected) = own(((x,)), {}), theirs(((x,)), {})
    assert torch.allclose(output, student(x)) and torch.allclose(wanted, model(x), atol=1e-5)
    for a, b in zip(seen, expected, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def test_a_merged_conv_stands_for_the_output_of_its_span() -> None:
    model, x = toy(), images(4)
    graph = lmfx.trace(model, x[:1])
    student = compress(model, x[:1], 0.5, merge=False, calibration=images(32))
    spans = student.meta["lmfx_spans"]
    merged = {n.name for n in student.graph.nodes if n.op == "call_module" and str(n.target) in spans}
    pairs = dict(shared_values(student, graph))
    assert merged and merged & pairs.keys()
    shapes = {n.name: n.meta["shape"][1:] for n in graph.graph.nodes if n.meta.get("shape")}
    values = Tapped(student, list(pairs))((x,), {})[1]
    assert [tuple(v.shape[1:]) for v in values] == [shapes[b] for b in pairs.values()]
    assert (
        dict(shared_values(lmfx.merge(student), graph)).items() >= {k: pairs[k] for k in merged & pairs.keys()}.items()
    )


def test_a_value_that_is_written_into_is_kept_as_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x) + 1)

    graph = torch.fx.symbolic_trace(InPlace())
    x = images(2)
    name = next(n.name for n in graph.graph.nodes if n.op == "call_function")
    _, (value,) = Tapped(graph, [name])((x,), {})
    assert torch.equal(value, graph.conv(x) + 1)
    assert float(value.detach().min()) < 0


def test_graphs_with_nothing_in_common_share_nothing() -> None:
    one = lmfx.trace(toy(), images(1))
    other = lmfx.trace(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(200, 5)).eval(), images(1))
    assert shared_values(other, one) == []


# --- what is minimised ------------------------------------------------------------------------------------------------


def test_scores_are_compared_softened_and_values_by_their_error() -> None:
    a, b = torch.randn(6, 5, generator=random(1)), torch.randn(6, 5, generator=random(2))
    wanted = F.kl_div((a / 2).log_softmax(1), (b / 2).softmax(1), reduction="batchmean") * 4
    assert float(distance(Output("z", 0, "scores"), a, b, 2.0)) == pytest.approx(float(wanted), rel=1e-5)
    p, q = a.softmax(1), b.softmax(1)
    same = float(distance(Output("z", 0, "scores", probabilities=True), p, q, 2.0))
    assert same == pytest.approx(float(wanted), rel=1e-4)
    error = float((a - b).square().mean() / b.var())
    assert float(distance(Output("z", 0, "values"), a, b, 2.0)) == pytest.approx(error, rel=1e-4)
    steps = distance(Output("z", 1, "scores"), a.view(2, 3, 5), b.view(2, 3, 5), 2.0)  # (steps, images, classes)
    assert float(steps) == pytest.approx(float(wanted), rel=1e-5)


def test_outputs_of_other_shapes_are_refused_by_name() -> None:
    with pytest.raises(lmfx.InputError, match="output boxes of the student has the shape"):
        distance(Output("boxes", 0, "values"), torch.rand(2, 4), torch.rand(2, 5))


def test_features_weigh_in_and_can_be_left_out() -> None:
    model, x = toy(), images(8)
    graph = lmfx.trace(model, x[:1])
    student = compress(model, x[:1], 0.5, merge=False, calibration=images(32))
    kinds = [Output("output", 0, "scores")]

    def loss(weight: float) -> float:
        objective = RecoveryObjective(student, graph, kinds, 2.0, weight)
        assert bool(objective.pairs) is (weight > 0)
        assert len(list(objective.parameters())) == len(list(student.parameters()))
        return float(objective(((x,), {}), objective.wanted(((x,), {}))).detach())

    none, one, two = loss(0.0), loss(1.0), loss(2.0)
    assert none < one
    assert two - none == pytest.approx(2 * (one - none), rel=1e-3)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_the_singular_values_of_an_orthogonal_step_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=random()) * torch.logspace(0, -1, shape[1])
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert float(values.min()) > 0.4 and float(values.max()) < 1.4
    assert float((orthogonal(matrix) * matrix).sum()) > 0
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 1, 3, 3), (6,), (5, 7)])
def test_a_step_is_a_share_of_the_size_of_its_tensor(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=random())
    for scale in (1.0, 1000.0):
        weight = nn.Parameter(start * scale)
        optimizer = RelativeSteps([weight], lr=0.01)
        weight.grad = torch.randn(shape, generator=random(1)) * 1e-7
        optimizer.step()
        change = weight.detach() - start * scale
        size = start.abs().mean() if len(shape) == 1 else start.square().mean().sqrt()
        assert float(change.square().mean().sqrt()) == pytest.approx(0.01 * scale * float(size), rel=0.05)
        assert float((change * weight.grad).sum()) < 0


def test_weights_without_a_gradient_stay_and_a_restored_optimizer_goes_on_alike() -> None:
    def run(restore: bool) -> Tensor:
        weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
        optimizer = RelativeSteps(weights, lr=0.1)
        for step in range(4):
            if restore and step == 2:
                saved = optimizer.state_dict()
                optimizer = RelativeSteps(weights, lr=0.5)
                optimizer.load_state_dict(saved)
            for w in weights[:2]:
                w.grad = torch.randn(w.shape, generator=random(step))
            optimizer.step()
        assert torch.equal(weights[2].detach(), torch.ones(3))
        return torch.cat([w.detach().flatten() for w in weights])

    assert torch.equal(run(False), run(True))


# --- the rate ---------------------------------------------------------------------------------------------------------


def bowl(best: float, seen: list[float]) -> Callable[[float], float]:
    def trial(rate: float) -> float:
        seen.append(rate)
        return math.log(rate / best) ** 2 if rate < 30 * best else math.nan

    return trial


@pytest.mark.parametrize("best", [0.02, 0.02 / FACTOR, 0.02 / FACTOR**3, 0.02 * FACTOR**2])
def test_the_rate_of_the_smallest_loss_is_found_in_few_trials(best: float) -> None:
    seen: list[float] = []
    rate, value = find_rate(bowl(best, seen), 0.02, start=20.0)
    assert rate == pytest.approx(best) and value == pytest.approx(0, abs=1e-9)
    assert len(seen) == len(set(seen)) <= 5


def test_a_first_rate_that_does_harm_leads_downwards_past_others_as_bad() -> None:
    seen: list[float] = []
    rate, _ = find_rate(bowl(1e-4, seen), 0.02, start=0.5)
    assert 3e-5 < rate < 3e-4
    assert seen == sorted(seen, reverse=True)


def test_where_no_trial_helps_the_rate_is_lower_than_all_and_there_are_no_more_than_allowed() -> None:
    seen: list[float] = []
    rate, value = find_rate(bowl(1e-9, seen), 0.02, start=0.0, most=3)
    assert len(seen) == 3
    assert rate == pytest.approx(min(seen) / FACTOR) and value == math.inf


def test_adams_steps_do_not_turn_a_matrix_and_orthogonal_ones_do() -> None:
    moves = {}
    gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.001]])
    kinds: tuple[Kind, ...] = ("orthogonal", "adam")
    for kind in kinds:
        p = nn.Parameter(torch.ones(2, 4))
        p.grad = gradient.clone()
        RelativeSteps([p], lr=0.1, kind=kind).step()
        moves[kind] = 1 - p.detach()
    assert torch.allclose(moves["adam"], torch.full((2, 4), 0.1), rtol=1e-4)

    def apart(rows: Tensor) -> float:
        return float((rows[0] - rows[1]).norm() / rows.norm())

    # Two rows that are alike but for a thousandth: their difference has become a direction of its own.
    assert apart(moves["orthogonal"]) > 100 * apart(gradient)


def test_a_loss_that_runs_away_is_seen_and_a_noisy_one_is_none() -> None:
    calm, wild, broken = Watch(), Watch(), Watch()
    assert not any(calm.astray(value) for value in [1.0, 0.9, 1.1, 1.9, 3.0, 1.0, 0.9, 0.8, 3.0, 0.7])
    assert [wild.astray(value) for value in [1.0, 1.0, 1.0, 1.5, 2.5, 4.0, 5.0]] == [False] * 6 + [True]
    assert broken.astray(math.nan)
