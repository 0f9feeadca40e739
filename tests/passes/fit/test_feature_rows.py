"""What a layer reads at each output pixel, and its weight as columns: their product is what the layer gives."""

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.fit import feature_rows

LAYERS = {
    "dense": (nn.Conv2d(3, 5, 3, padding=1), (3, 6, 7)),
    "strides, uneven kernel, dilation": (nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 2)), (4, 9, 8)),
    "same": (nn.Conv2d(3, 4, (5, 3), padding="same", dilation=(1, 2)), (3, 7, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 6, 5)),
    "depthwise with a multiplier": (nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 5, 5)),
    "groups": (nn.Conv2d(6, 4, 3, 2, 1, groups=2), (6, 7, 7)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 6)),
    "replicate, 1d": (nn.Conv1d(3, 4, 5, padding=2, padding_mode="replicate"), (3, 11)),
    "circular, 3d": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1), padding_mode="circular"), (2, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), (3, 4, 5)),
    "transposed, groups, dilation": (
        nn.ConvTranspose2d(4, 6, (3, 2), (1, 3), (1, 0), (0, 1), 2, dilation=2),
        (4, 6, 5),
    ),
    "transposed with a large padding": (nn.ConvTranspose1d(2, 3, 3, 2, 4), (2, 9)),
    "vectors": (nn.Linear(4, 3), (4,)),
    "sequences": (nn.Linear(4, 3, bias=False), (5, 2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_columns_are_what_the_layer_gives(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    y = layer(x).detach()
    pixels = feature_rows.pixels_of(layer, y.shape)
    positions = torch.stack([torch.randperm(pixels, generator=generator)[: min(pixels, 7)] for _ in x])
    rows, columns = feature_rows.features(layer, x, positions), feature_rows.columns_of(layer)
    assert rows.shape[0] == feature_rows.blocks_of(layer)
    assert rows.shape[2] == feature_rows.unknowns_of(layer) == columns.shape[1]
    found = (rows @ columns).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        found = found + layer.bias.detach()
    assert torch.allclose(found, feature_rows.values_at(layer, y, positions), atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_columns_make_the_weight_that_they_were_made_of(name: str) -> None:
    layer = LAYERS[name][0]
    assert torch.equal(feature_rows.weight_of(layer, feature_rows.columns_of(layer)), layer.weight.double())


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(3, 4, 3), (3, 5, 5)), (nn.Linear(4, 2), (4,))])
def test_a_value_without_images_is_not_taken(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x: Tensor = torch.zeros(shape)
    assert not feature_rows.takes(layer, x)
    assert feature_rows.takes(layer, x[None])
