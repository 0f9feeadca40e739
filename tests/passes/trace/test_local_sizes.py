"""An exported program reads a free size once; lmfx reads it where it is used, so that parts stay parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx

AUTO = torch.export.Dim.AUTO


class Tokens(nn.Module):
    """Convs, then attention over pixels with a token of its own, then convs again; sizes are those of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.b(self.a(x).relu())
        tokens = torch.cat((self.token.expand(n, -1, -1), y.flatten(2).transpose(1, 2)), 1)
        q, k, v = self.qkv(tokens).reshape(n, 1 + (h // 2) * (w // 2), 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        seen = (q @ k.transpose(2, 3)).softmax(-1) @ v
        out = self.proj(seen.transpose(1, 2).reshape(n, -1, 8))[:, 1:]
        return self.d(self.c(y + out.transpose(1, 2).reshape(n, 8, h // 2, w // 2)).relu())


class Folded(nn.Module):
    """Windows become images of a batch, as many times the batch, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = self.a(x).relu().reshape(n, 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, 4, 4, 4)
        y = self.b(y).reshape(n, 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(n, 4, 8, 8)
        return self.c(y.relu())


class Rows(nn.Module):
    """Two parts that lay the pixels of each channel in a row, with the image's sizes from the top: the second one could
    read how long a row is off the first."""

    def __init__(self, from_the_top: bool = True) -> None:
        super().__init__()
        self.from_the_top = from_the_top
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.first, self.second = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        n, _, h, w = x.shape if self.from_the_top else y.shape
        y = y + self.first(y.reshape(n, 4, h * w)).reshape(n, 4, h, w)
        y = self.c(y.relu())
        n, _, h, w = x.shape if self.from_the_top else y.shape
        return y + self.second(y.reshape(n, 4, h * w)).reshape(n, 4, h, w)


class Patches(nn.Module):
    """The block of a MobileViT, whose program has the image's sizes as numbers and the batch free."""

    def __init__(self) -> None:
        super().__init__()
        block: Any = pytest.importorskip("timm.models.mobilevit").MobileVitBlock
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.block, self.c = block(8, transformer_dim=8, transformer_depth=1, num_heads=2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.block(self.b(self.a(x).relu())).relu())


def program(model: nn.Module, dims: dict[int, Any]) -> Any:
    return torch.export.export(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),), dynamic_shapes=(dims,))


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        *((Tokens, {0: AUTO}), (Tokens, {0: AUTO, 2: AUTO, 3: AUTO}), (Rows, {0: AUTO, 2: AUTO, 3: AUTO})),
        *((Folded, {0: AUTO}), (Patches, {0: AUTO})),
    ],
)
def test_a_program_is_taken_apart_as_its_model_is(make: Any, dims: dict[int, Any]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exported = program(model, dims)
    graph = lmfx.trace(exported, x)
    ours = [(c.realization, c.conv) for c in lmfx.spans(graph) if c.realization != "keep"]
    wanted = [(c.realization, c.conv) for c in lmfx.spans(lmfx.trace(model, x)) if c.realization != "keep"]
    assert wanted and ours == wanted
    sizes = [(2, 8, 8), (5, 8, 8), (3, 12, 10)] if 2 in dims else [(2, 8, 8), (5, 8, 8)]
    for n, h, w in sizes:
        other = torch.randn(n, 3, h, w, dtype=torch.float64)
        torch.testing.assert_close(graph(other), model(other), rtol=1e-12, atol=1e-12)


def test_sizes_from_the_top_are_as_good_as_those_of_each_part() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = [lmfx.spans(lmfx.trace(Rows(top).double().eval(), x)) for top in (True, False)]
    top, local = ([(c.realization, c.conv) for c in spans] for spans in found)
    assert len(top) > 20 and top == local


def test_only_the_first_op_reads_sizes_off_the_input() -> None:
    graph = lmfx.trace(program(Folded().double().eval(), {0: AUTO}), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    (x,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    assert [n.op for n in x.users] == ["call_module"]


class Twice(nn.Module):
    """A token of every image that is read in two places, and one beside it that nothing meets but the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.token, self.c = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token = self.token.expand(x.shape[0], -1, -1, -1)
        early = token.flatten(1)
        y = self.b(self.a(x).relu())
        return self.c(y + token), early * 2, self.token.expand(x.shape[0], 8, 1, 1).flatten(1)


@pytest.mark.parametrize("as_program", [True, False])
def test_what_is_read_twice_stays_before_both(as_program: bool) -> None:
    torch.manual_seed(0)
    model = Twice().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = lmfx.trace(program(model, {0: AUTO}) if as_program else model, x)
    graph.graph.lint()
    for n in (2, 5):
        other = torch.randn(n, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(graph(other), model(other), rtol=1e-12, atol=1e-12)


class Heads(nn.Module):
    """Two parts that work on windows of each head by itself. At images 32 pixels larger those of the second part do not
    fit, and -1 is another number, so nobody can tell there that the heads are as many times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.a, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.b = nn.Conv2d(8, 8, 3, padding=1, stride=2)

    def windows(self, y: Tensor, k: int) -> Tensor:
        n, _, h, w = y.shape
        z = y.reshape(-1, 2, h // k, k, w // k, k).permute(0, 1, 3, 5, 2, 4).reshape(n * 4, 2, k * k, -1)
        z = z.softmax(2).reshape(n * 4, 2, k, k, h // k, w // k).permute(0, 1, 4, 2, 5, 3)
        return z.reshape(n, 8, h, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.windows(self.a(self.stem(x)).relu(), 4)
        return self.c(self.windows(self.b(y).relu(), 8))


def test_a_number_is_not_read_off_an_earlier_part_where_it_follows_from_a_size_nearby() -> None:
    model, x = Heads().double().eval(), torch.randn(1, 3, 128, 128, dtype=torch.float64)
    graph = lmfx.trace(model, x)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    (b,) = (node for node in order if node.target == "b")
    assert all(order[a] >= order[b] for node in order if order[node] > order[b] for a in node.all_input_nodes)
    for shape in ((3, 3, 128, 128), (1, 3, 256, 128)):
        y = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(graph(y), model(y))
