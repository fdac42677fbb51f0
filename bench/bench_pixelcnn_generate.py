"""Sampling whole images beside one forward pass of the same batch; the naive loop needs one for each pixel."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import peak_extra_bytes

import fastgen
from fastgen.models import GatedPixelCNN, GPTPrior, PixelCNN, PixelRNN, PixelSNAIL
from fastgen.ops.masked_conv2d import weight_mask

SIDE = 28
MODELS = {
    "Gated PixelCNN, 10 layers x 128": GatedPixelCNN, "PixelCNN, 12 layers x 128": PixelCNN,
    "PixelSNAIL, 4 blocks x 64": PixelSNAIL, "PixelRNN, 7 row LSTMs x 64": functools.partial(PixelRNN, kind="row"),
    "PixelRNN, 7 diagonal BiLSTMs x 64": PixelRNN,
    "GPT, 4 blocks x 128, 512 codes": functools.partial(GPTPrior, image_size=(SIDE, SIDE)),
}  # fmt: skip


def cropped_reference(x, weight, bias=None, *, mask, colors=1, halves=1, relu=False):
    """The reference on the smallest kernel that holds all live taps: the best that plain convolutions do."""
    live = weight_mask(weight, mask, colors, halves)
    weight = torch.where(live, weight, 0)
    above, left, height = weight.shape[2] // 2, weight.shape[3] // 2, x.shape[2]
    here = int(live[0, 0, above].sum())
    columns = weight.shape[3] if above else here
    rows = above + (here > 0)
    padded = F.pad(x, (left, columns - 1 - left, above, 0))
    y = F.conv2d(padded, weight[:, :, :rows, :columns], bias)[:, :, :height]
    return F.relu(y) if relu else y


@pytest.mark.parametrize("batch", [16, 1])
@pytest.mark.parametrize("name", MODELS)
def test_sample(name, batch, contest, benchmark, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    u = torch.rand(batch, 1, SIDE, SIDE)
    size = (SIDE, SIDE)

    def sample(dtype):
        return lambda: model.sample(batch, size, uniforms=u, dtype=dtype, backend="cpu")

    images = sample(torch.float32)()

    @torch.no_grad()
    def forward():
        with fastgen.use_backend("reference"):
            return model(images)

    def cropped():
        with monkeypatch.context() as patch:
            for module in ("masked_conv2d", "gated_masked_conv2d"):
                patch.setattr(sys.modules[f"fastgen.ops.{module}"], "masked_conv2d_reference", cropped_reference)
            return forward()

    torch.testing.assert_close(cropped(), forward(), atol=1e-4, rtol=1e-4)
    # each sample must be what the forward pass of the image itself calls for
    wanted = model.distribution.sample(forward().movedim(2, -1).double(), u.double(), 1.0)
    assert float((images.view(wanted.shape) == wanted).double().mean()) > 0.999
    contestants = {
        "float32": sample(torch.float32), "bfloat16": sample(torch.bfloat16), "forward": forward,
        "cropped forward": cropped,
    }  # fmt: skip
    contest(contestants, rounds=7)
    benchmark.extra_info.update(
        case=f"{name}, batch {batch}", images=batch, pixels=SIDE * SIDE,
        peak_extra_bytes={"float32": peak_extra_bytes(contestants["float32"])},
    )  # fmt: skip
