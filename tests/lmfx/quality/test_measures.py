"""The figures by which networks are compared: what is equal, what is known by hand, and what cannot be told."""

import math

import pytest
import torch
from torch import nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.passes.errors import InputError
from lmfx.planning.plan_file import decode, encode
from lmfx.quality import Judge, OutputQuality, Quality, compare
from lmfx.quality.measures import measure_output
from lmfx.quality.outputs import Output

SCORES = Output("logits", 0, "scores")


def test_a_network_equals_itself() -> None:
    y = torch.randn(6, 5, dtype=torch.float64)
    found = measure_output(SCORES, y, y.clone())
    assert (found.divergence, found.agreement, found.kl) == (0.0, 1.0, pytest.approx(0, abs=1e-15))
    assert Quality((found,), 6).loss() == pytest.approx(0, abs=1e-15)


def test_agreement_counts_the_rows_and_kl_is_that_of_the_softmax() -> None:
    y = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    z = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    found = measure_output(SCORES, y, z)
    p = 1 / (1 + math.exp(-2))
    one = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    assert found.agreement == 0.75
    assert found.kl == pytest.approx(one / 4, rel=1e-12)


def test_being_too_sure_is_not_as_bad_as_saying_nothing() -> None:
    torch.manual_seed(0)
    y = 4 * torch.randn(64, 10, dtype=torch.float64)
    sure = 5 * (y + 2 * torch.randn_like(y))
    nothing = torch.zeros_like(y)
    found = [Quality((measure_output(SCORES, y, z),), 64) for z in (sure, nothing)]
    assert found[0].kl is not None and found[1].kl is not None and found[0].kl > found[1].kl
    assert found[0].loss() < found[1].loss()


def test_probabilities_have_the_kl_of_their_logits() -> None:
    y, z = torch.randn(8, 7, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)
    logits = measure_output(SCORES, y, z)
    given = measure_output(Output("p", 0, "scores", probabilities=True), y.softmax(1), z.softmax(1))
    assert given.kl == pytest.approx(logits.kl, rel=1e-9)
    assert given.agreement == logits.agreement


def test_a_network_that_gives_the_mean_of_the_images_has_divergence_one() -> None:
    y = torch.randn(50, 9, dtype=torch.float64)
    found = measure_output(Output("v", 0, "values"), y, y.mean(0, keepdim=True).expand_as(y))
    assert found.divergence == pytest.approx(1, rel=1e-12)
    assert (found.agreement, found.kl, found.psnr) == (None, None, None)


def test_steps_of_blank_do_not_count_as_agreement() -> None:
    y, z = torch.zeros(1, 10, 3), torch.zeros(1, 10, 3)
    y[:, :, 0] = z[:, :, 0] = 1.0
    y[0, 4, 2] = z[0, 4, 1] = 5.0  # the one letter is read wrongly
    y[0, 7, 2] = z[0, 7, 2] = 5.0
    assert measure_output(SCORES, y, z).agreement == 0.5


def test_the_standard_error_of_an_agreement_is_over_the_images() -> None:
    y = torch.eye(4)[torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))]
    z = y.clone()
    z[:20] = y[:20].roll(1, 1)
    one = measure_output(SCORES, y, z)
    assert one.agreement == 0.9 and one.agreement_error == pytest.approx((0.9 * 0.1 / 200) ** 0.5)
    # As steps of ten images: where two of each differ, the agreement is sure, and where all of one image do, it is not.
    alike = [torch.cat([v[:20].view(10, 2, 4), v[20:].view(10, 18, 4)], 1) for v in (y, z)]
    steps = [measure_output(SCORES, *pair) for pair in (alike, (y.view(10, 20, 4), z.view(10, 20, 4)))]
    sure, unsure = (float(s.agreement_error or 0) for s in steps)
    assert 3 * sure < float(one.agreement_error or 0) < unsure
    assert Quality((one,), 200).surely_kept == pytest.approx(0.9 - float(one.agreement_error or 0))
    assert Quality((OutputQuality("a", "map", 0.1, psnr=20.0),), 10).surely_kept == 0.9


def test_the_psnr_of_a_map_is_relative_to_its_range() -> None:
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    y.view(-1)[:2] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = measure_output(Output("map", 0, "map"), y, y + 0.01)
    assert found.psnr == pytest.approx(40, rel=1e-9)
    assert measure_output(Output("map", 0, "map"), y, y).psnr == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_the_worst_and_no_error(bad: float) -> None:
    y = torch.randn(4, 5)
    z = y.clone()
    z[0, 0] = bad
    found = measure_output(SCORES, y, z)
    assert found.divergence > 1 and found.kl is not None and math.isfinite(found.kl)
    assert found.agreement is not None and found.agreement < 1.01


def test_images_along_another_dimension_are_found() -> None:
    y, z = torch.randn(9, 4, 6, dtype=torch.float64), torch.randn(9, 4, 6, dtype=torch.float64)
    swapped = measure_output(Output("t", 1, "scores"), y, z)
    plain = measure_output(SCORES, y.transpose(0, 1), z.transpose(0, 1))
    assert swapped == OutputQuality("t", *list(vars(plain).values())[1:])


def test_a_name_chooses_what_counts() -> None:
    worse = Quality((OutputQuality("a", "scores", 0.4, 0.7, 0.1, None, 0.1),), 10)
    better = Quality((OutputQuality("a", "scores", 0.3, 0.6, 0.2, None, 0.2),), 10)
    assert worse.loss("agreement") < better.loss("agreement")
    assert worse.loss("kl") < better.loss("kl")
    assert worse.loss("auto") < better.loss("auto")
    assert worse.loss("divergence") > better.loss("divergence")


def test_a_name_that_fits_no_output_stands_for_all_of_them() -> None:
    quality = Quality((OutputQuality("a", "values", 0.4),), 10)
    assert quality.loss("kl") == quality.loss("agreement") == quality.loss("psnr") == 0.4


@pytest.mark.parametrize(
    "output, collapsed",
    [
        (OutputQuality("a", "scores", 0.9, 0.95, 0.1), False),
        (OutputQuality("a", "scores", 0.1, 0.2, 2.0), True),
        (OutputQuality("a", "scores", 1.2, 1.0, 2e-5), False),  # scores that hardly vary: an untrained toy
        (OutputQuality("a", "scores", 1.2, 0.9, 0.1), True),
        (OutputQuality("a", "values", 0.2), False),
        (OutputQuality("a", "map", 0.9, psnr=12.0), True),
        (OutputQuality("a", "map", math.inf, psnr=-math.inf), True),
    ],
)
def test_what_has_collapsed_is_told(output: OutputQuality, collapsed: bool) -> None:
    assert Quality((OutputQuality("fine", "values", 0.0), output), 4).collapsed is collapsed


def test_a_quality_comes_back_from_a_file() -> None:
    quality = Quality((OutputQuality("a", "scores", 0.4, 0.7, 0.1), OutputQuality("b", "map", 0.1, psnr=math.inf)), 10)
    assert decode(Quality, encode(quality), "quality") == quality


# --- what outputs are -------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A small network with the tail that is asked for."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.line, self.other = nn.Linear(6, 4), nn.Linear(6, 2)
        self.depth, self.anchors = nn.Conv2d(6, 1, 1), nn.Conv2d(6, 6, 1)
        self.tail = tail
        with torch.no_grad():  # features that differ from image to image
            seen = self.body(torch.randn(64, 3, 9, 7)).mean((2, 3))
        self.register_buffer("middle", seen.mean(0))
        self.register_buffer("width", seen.std(0).clamp_min(1e-2))

    def forward(self, x: torch.Tensor) -> object:
        y = self.body(x)
        v = (y.mean((2, 3)) - self.middle) / self.width
        return {
            "logits": lambda: self.line(v),
            "softmax": lambda: self.line(v).softmax(1),
            "sigmoid": lambda: self.line(v).sigmoid(),
            "boxes": lambda: (self.line(v), self.other(v).softmax(1)),
            "map": lambda: y,
            "embedding": lambda: nn.functional.normalize(self.line(v)),
            "named": lambda: {"aux": self.other(v), "main": self.line(v)},
            "sequence": lambda: self.line(((y.mean(2) - self.middle[:, None]) / self.width[:, None]).transpose(1, 2)),
            "one": lambda: self.line(v)[:, :1],
            "depth": lambda: self.depth(y).squeeze(1),
            "anchors": lambda: self.anchors(y).permute(0, 2, 3, 1).reshape(len(x), -1, 3),
        }[self.tail]()


@pytest.mark.parametrize(
    "tail, kinds",
    [
        ("logits", ["scores"]),
        ("softmax", ["scores"]),
        ("sigmoid", ["values"]),
        ("boxes", ["values", "scores"]),
        ("map", ["map"]),
        ("embedding", ["values"]),
        ("named", ["scores", "scores"]),
        ("sequence", ["scores"]),
        ("one", ["values"]),
        ("depth", ["map"]),
        ("anchors", ["scores"]),
    ],
)
def test_outputs_are_told_apart(tail: str, kinds: list[str]) -> None:
    torch.manual_seed(0)
    graph = lmfx.trace(Heads(tail).eval(), torch.randn(1, 3, 9, 7))
    judge = Judge(graph, Calibration((torch.randn(24, 3, 9, 7),)))
    assert [k.kind for k in judge.kinds] == kinds
    assert judge(graph).loss() == pytest.approx(0, abs=1e-12)
    assert judge(graph).images == 24


def test_rows_that_always_say_the_same_are_no_scores() -> None:
    model = Heads("logits").eval()
    with torch.no_grad():
        model.line.bias += torch.tensor([100.0, 0.0, 0.0, 0.0])
    judge = Judge(lmfx.trace(model, torch.randn(1, 3, 9, 7)), Calibration((torch.randn(24, 3, 9, 7),)))
    assert [k.kind for k in judge.kinds] == ["values"]


def test_named_outputs_keep_their_names() -> None:
    graph = lmfx.trace(Heads("named").eval(), torch.randn(1, 3, 9, 7))
    assert [k.name for k in Judge(graph, Calibration((torch.randn(24, 3, 9, 7),))).kinds] == ["aux", "main"]


def test_compare_says_what_a_changed_network_kept() -> None:
    model = Heads("logits").eval()
    graph = lmfx.trace(model, torch.randn(1, 3, 9, 7))
    with torch.no_grad():
        model.line.bias += torch.tensor([100.0, 0.0, 0.0, 0.0])
    changed = lmfx.trace(model, torch.randn(1, 3, 9, 7))
    images = torch.randn(40, 3, 9, 7)
    found = compare(changed, graph, images)
    with torch.no_grad():
        same = float((graph(images).argmax(1) == 0).double().mean())
    assert found.agreement == pytest.approx(same)


def test_compare_refuses_what_is_no_graph() -> None:
    model = Heads("logits").eval()
    graph = lmfx.trace(model, torch.randn(1, 3, 9, 7))
    with pytest.raises(InputError, match=r"lmfx\.trace"):
        compare(model, graph, torch.randn(4, 3, 9, 7))


def test_the_images_that_judge_are_seen_by_nobody_else() -> None:
    images = Calibration((torch.arange(64.0).reshape(64, 1),))
    roles = images.roles()
    parts = [set(p.tensors[0].flatten().tolist()) for p in (roles.fit, roles.choose, roles.judge)]
    assert [len(p) for p in parts] == [48, 8, 8]
    assert not (parts[0] & parts[1] or parts[1] & parts[2] or parts[0] & parts[2])
    assert not roles.seen
    assert Calibration((torch.zeros(3, 1),)).roles().seen
