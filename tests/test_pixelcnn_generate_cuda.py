"""The CUDA kernel of image sampling without a GPU: its own source, compiled by g++, in the thread-block emulator."""

import pytest
import torch
from cuda_helpers import ORDERS, built, run

from fastgen.models import GatedPixelCNN, GPTPrior, PixelCNN, PixelRNN, PixelSNAIL
from fastgen.ops.pixel_layout import layout_of, not_on_cuda

NAMES = (
    "packed", "shapes", "planes", "instructions", "bf16", "biases", "context", "context_plane", "table", "distribution",
    "outputs", "log_scale_min", "temperature", "top_k", "top_p", "uniforms", "given", "known", "first_row", "last_row",
    "memory", "values", "parameters",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_cpu_kernels(need):
    need("pixelcnn_generate", "cpu")


def recorded(monkeypatch, model, batch, size, first_row=0, **options):
    """What the op gets when the model samples, from a row on, its results, and the matrices that were packed."""
    op, pack = torch.ops.fastgen.pixelcnn_generate, torch.ops.fastgen.pixelcnn_pack
    seen = {}

    def packing(matrices, shapes, bf16):
        seen["matrices"] = matrices
        return pack(matrices, shapes, bf16)

    def generating(*args):
        given = dict(zip(NAMES, args, strict=True))
        given["parameters"] = torch.empty(*given["values"].shape, given["outputs"])
        if first_row:
            op(*(given | {"last_row": first_row}).values())
            given["first_row"] = first_row
        seen.update(given, memory=given["memory"].clone())
        return op(*given.values())

    def layout(program, height, width, ahead, halved=False):
        assert not not_on_cuda(program)
        return layout_of(program, height, width, ahead)  # the GPU keeps keys and values in float32

    with monkeypatch.context() as patch:
        patch.setattr("fastgen.ops.pixelcnn_generate.layout_of", layout)
        patch.setattr(torch.ops.fastgen, "pixelcnn_pack", packing)
        patch.setattr(torch.ops.fastgen, "pixelcnn_generate", generating)
        colors = model.image_channels
        uniforms = torch.rand(batch, colors, *size, generator=torch.Generator().manual_seed(0))
        model.sample(batch, image_size=size, uniforms=uniforms, backend="cpu", **options)
    return seen


def check(folder, seen, mode="plain", cluster=1, images_each=1, row_cluster=1, row_images=1, columns=16, threads=64,
          resident=True, spilled=False, meets=False, order="forward", fill=0xFF):  # fmt: skip
    """The emulated kernel draws what the CPU's kernel draws, from the same parameters."""
    arrays = {f"matrix.{i}": m for i, m in enumerate(seen["matrices"])}
    for name in ("shapes", "planes", "instructions"):
        arrays[name] = torch.tensor(seen[name])
    for name in ("biases", "context", "table", "uniforms", "given", "known", "memory"):
        if seen[name] is not None:
            arrays[name] = seen[name]
    for name, array in arrays.items():
        (folder / name).write_bytes(array.contiguous().numpy().tobytes())
    images, colors, height, width = seen["values"].shape
    context = seen["context"]
    options = {
        "images": images, "colors": colors, "height": height, "width": width, "first_row": seen["first_row"],
        "last_row": seen["last_row"], "memory_size": seen["memory"].shape[1], "bias_size": seen["biases"].shape[1],
        "logistic": int(seen["distribution"] == 1), "own_biases": int(len(seen["biases"]) > 1),
        "own_context": int(context is not None and len(context) > 1), "outputs": seen["outputs"],
        "levels": seen["table"].shape[0], "features": seen["table"].shape[1], "context_plane": seen["context_plane"],
        "context_channels": 0 if context is None else context.shape[3], "temperature": seen["temperature"],
        "top_k": seen["top_k"], "top_p": seen["top_p"], "log_scale_min": seen["log_scale_min"],
        "bf16": int(seen["bf16"]), "threads": threads, "cluster": cluster,
        "images_each": images_each, "row_cluster": row_cluster, "row_images": row_images, "columns": columns,
        "resident": int(resident), "spilled": int(spilled), "meets": int(meets), "order": ORDERS[order][0],
        "seed": ORDERS[order][1], "fill": fill,
    }  # fmt: skip
    done = run(built("pixelcnn.cpp", mode), folder, *(f"{k}={v}" for k, v in options.items()))
    assert done.returncode == 0, done.stderr[-3000:]
    values, parameters = (
        torch.frombuffer(bytearray((folder / f"out.{name}").read_bytes()), dtype=seen[name].dtype).view(
            seen[name].shape
        )[:, :, seen["first_row"] :]
        for name in ("values", "parameters")
    )
    assert torch.equal(values, seen["values"][:, :, seen["first_row"] :])
    expected = seen["parameters"][:, :, seen["first_row"] :]
    tolerance = 2e-3 if seen["bf16"] else 2e-5  # vectors are rounded to 16 bits there
    torch.testing.assert_close(parameters, expected, rtol=tolerance, atol=tolerance)


def gated(**options):
    torch.manual_seed(0)
    return GatedPixelCNN(channels=8, layers=2, **options)


def gpt(**options):
    torch.manual_seed(0)
    model = GPTPrior(5, (3, 4), channels=24, layers=2, heads=3, code_channels=10, **options)
    with torch.no_grad():
        model.place.normal_()
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.normal_(0.5, 0.3)
    return model


def rnn(kind, **options):
    torch.manual_seed(0)
    return PixelRNN(channels=40, layers=2, kind=kind, levels=4, first_kernel_size=3, **options)


MODELS = {
    "gated": lambda: (gated(), {}),
    "gated, classes": lambda: (gated(classes=3), {"labels": torch.tensor([0, 2, 1])}),
    "gated, colors": lambda: (gated(image_channels=3, levels=5), {"temperature": 0.8}),
    "gated, bfloat16": lambda: (gated(levels=4), {"dtype": torch.bfloat16}),
    "plain": lambda: (PixelCNN(channels=8, layers=2), {}),
    "attention": lambda: (PixelSNAIL(channels=8, layers=2, levels=4), {}),
    "transformer": lambda: (gpt(), {}),
    "many codes, top_k and top_p": lambda: (gated(codes=70), {"top_k": 9, "top_p": 0.8, "temperature": 0.5}),
    "transformer, bfloat16, classes": lambda: (
        gpt(classes=3),
        {"labels": torch.tensor([0, 2, 1]), "dtype": torch.bfloat16},
    ),
    "row LSTM": lambda: (rnn("row"), {}),
    "diagonal LSTM": lambda: (rnn("diagonal"), {}),
    "diagonal LSTM, bfloat16, classes": lambda: (
        rnn("diagonal", classes=3),
        {"labels": torch.tensor([0, 2, 1]), "dtype": torch.bfloat16},
    ),
    "logistic": lambda: (gated(levels=16, distribution="logistic", mixtures=3), {"temperature": 0.7}),
    "logistic, colors": lambda: (gated(image_channels=3, levels=8, distribution="logistic", mixtures=2), {}),
}
HOW = {
    "one block": {}, "a cluster": {"cluster": 3, "images_each": 2, "row_cluster": 3},
    "more images": {"cluster": 2, "images_each": 3, "row_images": 3, "columns": 64},
    "scores in memory": {"cluster": 2, "spilled": True},
    "weights in memory": {"cluster": 4, "images_each": 3, "row_cluster": 4, "row_images": 2, "resident": False},
    "many blocks, pixel by pixel": {"cluster": 8, "images_each": 3, "meets": True},
}  # fmt: skip


# what differs from others is not how blocks share the work
LIKE = ("logistic", "logistic, colors", "diagonal LSTM", "many codes, top_k and top_p")


@pytest.mark.parametrize(("name", "how"), [(n, h) for n in MODELS for h in HOW if n not in LIKE or h == "a cluster"])
def test_draws_what_the_cpu_draws(name, how, monkeypatch, tmp_path):
    model, options = MODELS[name]()
    seen = recorded(monkeypatch, model, 3, (3, 4), **options)
    check(tmp_path, seen, "address", **HOW[how])


@pytest.mark.parametrize("name", ["gated, colors", "attention", "transformer", "row LSTM", "diagonal LSTM"])
def test_from_a_row_on(name, monkeypatch, tmp_path):
    model, options = MODELS[name]()
    check(
        tmp_path,
        recorded(monkeypatch, model, 2, getattr(model, "image_size", (4, 3)), first_row=2, **options),
        "address",
        cluster=2,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_in_any_order_of_threads(order, monkeypatch, tmp_path):
    seen = recorded(monkeypatch, gated(), 3, (3, 4))
    check(tmp_path, seen, order=order, cluster=2, images_each=2, fill=0x41)


@pytest.mark.parametrize("name", ["gated, colors", "attention", "transformer", "row LSTM", "diagonal LSTM", "logistic"])
@pytest.mark.parametrize("spilled", [False, True])
def test_no_races(name, spilled, monkeypatch, tmp_path):
    model, options = MODELS[name]()
    seen = recorded(monkeypatch, model, 2, getattr(model, "image_size", (2, 2)), **options)
    check(tmp_path, seen, "thread", cluster=2, images_each=2, row_cluster=2, spilled=spilled, order="random 1")


def test_completion(monkeypatch, tmp_path):
    given = torch.randint(0, 2, (3, 1, 3, 4))
    seen = recorded(monkeypatch, gated(), 3, (3, 4), given=given, known=torch.rand(3, 1, 3, 4) < 0.5)
    check(tmp_path, seen, "address")
