"""Checkpoints of the `wavenet_vocoder` project: the PyPI release 0.1.1 and the layout of its later master.

Both scale by sqrt(1/2): the residual is (x + out) * sqrt(1/2), and the skips are either scaled one by one
(s <- (s + skip) * sqrt(1/2), the release) or together (sum * sqrt(1/layers), master). Here the scales are folded into
the weights: with x'_l = 2^(l/2) x_l the residual is a plain sum, the convolutions of layer l are divided by 2^(l/2) and
its residual 1x1 multiplied by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer, listed
from fastgen.models.wavenet import WaveNet

HPARAMS = {
    "layers", "stacks", "residual_channels", "gate_channels", "skip_out_channels", "out_channels",
    "kernel_size", "dropout", "cin_channels", "gin_channels", "n_speakers", "weight_normalization",
    "upsample_conditional_features", "upsample_scales", "upsample_net", "upsample_params",
    "freq_axis_kernel_size", "scalar_input", "use_speaker_embedding", "output_distribution", "cin_pad",
    "legacy", "layout", "quantize_channels", "log_scale_min",
}  # fmt: skip


def convert(source: nn.Module | dict[str, Tensor], **hparams: Any) -> WaveNet:
    """A `fastgen.models.WaveNet` with the weights of a wavenet_vocoder model: same logits, same samples.

    Parameters
    ----------
    source
        The module, or its state_dict (weight-normalised or not). With global conditioning it has a speaker embedding.
    **hparams
        What its constructor was called with; what can be read off the module or the weights need not be given. For a
        state_dict `stacks` is needed (default 2). `scalar_input` and `output_distribution` are read off the input layer
        where absent. `legacy` says how the release combines skips: scaled one by one (True, the default) or a plain
        sum. `layout`, "release" or "master", is read off the conditioning layers; without conditioning a state_dict
        counts as the release's. `upsample_params` and `cin_pad` for models of master with upsampling.

    Notes
    -----
    Samples of categorical models are drawn by the same inversion of the same uniforms. The mixtures of that project
    draw a uniform for each component, fastgen draws two in all: the distribution is the same, the draws are not.

    Raises
    ------
    TypeError
        If the source is neither a module nor a state_dict.
    ValueError
        For missing or surplus keys, or shapes that do not fit; the message lists them.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"from_wavenet_vocoder: source must be a module or its state_dict, got {type(source).__name__}")
    layers = 1 + max((int(m[1]) for k in state if (m := re.match(r"conv_layers\.(\d+)\.", k))), default=-1)
    if layers == 0:
        raise ValueError("from_wavenet_vocoder: the checkpoint has no keys 'conv_layers.*'")
    _check_keys(state, layers)
    state = _folded(state)
    if isinstance(source, nn.Module):
        hparams.setdefault("layout", "release" if hasattr(source, "legacy") else "master")
        hparams.setdefault("legacy", getattr(source, "legacy", True))
        convs = [m for k, m in source.named_modules() if re.fullmatch(r"conv_layers\.\d+\.conv", k)]
        hparams.setdefault("stacks", sum(m.dilation[0] == 1 for m in convs) or 2)
    unknown = sorted(set(hparams) - HPARAMS)
    if unknown:
        raise ValueError(f"from_wavenet_vocoder: unknown hparams {unknown}; known are {sorted(HPARAMS)}")

    def take(key: str, *shape: int | None) -> Tensor:
        got = tuple(state[key].shape)
        if shape and (len(got) != len(shape) or any(n not in (None, m) for n, m in zip(shape, got, strict=True))):
            wanted = tuple("any" if n is None else n for n in shape)
            raise ValueError(f"from_wavenet_vocoder: {key!r} must have shape {wanted}, got {got}")
        return state[key].float()

    stacks = hparams.get("stacks", 2)
    check_integer("from_wavenet_vocoder", "stacks", stacks)
    if layers % stacks:
        raise ValueError(f"from_wavenet_vocoder: stacks must divide {layers} layers, got {stacks}")
    first = take("first_conv.weight", None, None, 1)  # (R, classes or 1, 1)
    channels = first.shape[0]
    gates, _, kernel_size = take("conv_layers.0.conv.weight", None, channels, None).shape
    gate = gates // 2
    skip_channels = take("conv_layers.0.conv1x1_skip.weight", None, gate, 1).shape[0]
    outputs = take("last_conv_layers.3.weight", None, skip_channels, 1).shape[0]
    read = {
        "layers": layers, "residual_channels": channels, "gate_channels": gates, "kernel_size": kernel_size,
        "skip_out_channels": skip_channels, "out_channels": outputs,
    }  # fmt: skip
    for name, size in read.items():
        if hparams.get(name, size) != size:
            raise ValueError(f"from_wavenet_vocoder: {name}={hparams[name]}, but the checkpoint has {size}")
    scalar = bool(hparams.get("scalar_input", first.shape[1] == 1))
    layout = str(hparams.get("layout", "release"))
    for key in ("conv1x1c", "conv1x1g"):
        if f"conv_layers.0.{key}.weight" in state:
            layout = "release" if f"conv_layers.0.{key}.bias" in state else "master"
    if layout not in ("release", "master"):
        raise ValueError(f"from_wavenet_vocoder: layout must be release or master, got {layout!r}")
    legacy = bool(hparams.get("legacy", True))
    together = math.sqrt(1 / layers) if layout == "master" else 1.0  # the scale of skips that are not scaled one by one
    one_by_one = layout == "release" and legacy
    distribution = "categorical"
    if scalar:
        kind = str(hparams.get("output_distribution", "Normal" if outputs == 2 else "Logistic"))
        distribution = {"Logistic": "logistic", "Normal": "gaussian"}.get(kind, "")
        if not distribution:
            raise ValueError(f"from_wavenet_vocoder: output_distribution must be Logistic or Normal, got {kind!r}")
    conditions = {}  # channels of each conditioning that the layers have
    for key in ("conv1x1c", "conv1x1g"):
        if f"conv_layers.0.{key}.weight" in state:
            conditions[key] = take(f"conv_layers.0.{key}.weight", gates, None, 1).shape[1]
    local, speaker_channels = conditions.get("conv1x1c", 0), conditions.get("conv1x1g", 0)
    speakers = state["embed_speakers.weight"].shape[0] if "embed_speakers.weight" in state else 0
    upsample_scales, upsample_options = _upsampling(state, hparams, local)

    model = WaveNet(
        layers=layers,
        cycles=stacks,
        residual_channels=channels,
        gate_channels=gate,
        skip_channels=skip_channels,
        kernel_size=kernel_size,
        distribution=distribution,
        classes=outputs if not scalar else int(hparams.get("quantize_channels", 65536)),
        mixtures=1 if scalar and outputs == 2 else max(1, outputs // 3),
        local_channels=local,
        upsample_scales=upsample_scales,
        upsample_options=upsample_options,
        speakers=speakers,
        speaker_channels=speaker_channels or 1,
        start=0.0 if scalar else min(127, outputs - 1),
        log_scale_min=float(hparams.get("log_scale_min", -7.0)),
    )
    target: dict[str, Tensor] = {"input.weight": first, "input.bias": take("first_conv.bias")}
    for i in range(layers):
        p, q = f"conv_layers.{i}", f"layers.{i}"
        down, up = 2.0 ** (-i / 2), 2.0 ** (i / 2)
        skips = 0.5 ** ((layers - max(i, 1)) / 2) if one_by_one else together
        target[f"{q}.conv.weight"] = take(f"{p}.conv.weight", gates, channels, kernel_size) * down
        bias = take(f"{p}.conv.bias", gates)
        for name, key in (("local", "conv1x1c"), ("speaker", "conv1x1g")):
            if key in conditions:
                weight = take(f"{p}.{key}.weight", gates, conditions[key], 1)
                target[f"{q}.{name}.weight"] = weight if name == "local" else weight[:, :, 0]
                if f"{p}.{key}.bias" in state:
                    bias = bias + take(f"{p}.{key}.bias", gates)
        target[f"{q}.conv.bias"] = bias
        for part, rest in (("weight", (gate, 1)), ("bias", ())):
            residual = take(f"{p}.conv1x1_out.{part}", channels, *rest)
            skip = take(f"{p}.conv1x1_skip.{part}", skip_channels, *rest)
            target[f"{q}.out.{part}"] = torch.cat([residual * up, skip * skips])
    for name, index in (("hidden", 1), ("output", 3)):
        rows = skip_channels if name == "hidden" else outputs
        target[f"{name}.weight"] = take(f"last_conv_layers.{index}.weight", rows, skip_channels, 1)
        target[f"{name}.bias"] = take(f"last_conv_layers.{index}.bias", rows)
    if speakers:
        target["embedding.weight"] = take("embed_speakers.weight", None, speaker_channels)
    for key, renamed in _upsample_keys(state):
        target[f"upsample.{renamed}"] = take(key)
    try:
        model.load_state_dict(target, strict=True)
    except RuntimeError as error:
        raise ValueError(f"from_wavenet_vocoder: {error}") from error
    return model.eval()


def _check_keys(state: Mapping[str, Tensor], layers: int) -> None:
    """Raise ValueError unless the keys are those of such a model, weight-normalised (weight_g, weight_v) or not."""
    plain = {re.sub("_[gv]$", "", key) for key in state}
    parts = [f"{conv}.{part}" for conv in ("conv", "conv1x1_out", "conv1x1_skip") for part in ("weight", "bias")]
    for part in ("conv1x1c.weight", "conv1x1c.bias", "conv1x1g.weight", "conv1x1g.bias"):
        if any(f"conv_layers.{i}.{part}" in plain for i in range(layers)):
            parts.append(part)
    convs = [f"conv_layers.{i}.{part}" for i in range(layers) for part in parts]
    convs += [f"{conv}.{part}" for conv in ("first_conv", "last_conv_layers.1", "last_conv_layers.3")
              for part in ("weight", "bias")]  # fmt: skip
    expected = {*convs, *_upsample_expected(plain)}
    if "conv1x1g.weight" in parts:
        expected.add("embed_speakers.weight")
    missing = sorted(expected - plain)
    for key in sorted(expected & plain - set(state)):  # of a weight, only the one half or the other
        missing += [f"{key}{half}" for half in ("_g", "_v") if f"{key}{half}" not in state]
    surplus = sorted(key for key in state if re.sub("_[gv]$", "", key) not in expected)
    found = {"missing": missing, "surplus": surplus}
    if missing or surplus:
        lists = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in found.items() if keys)
        raise ValueError(f"from_wavenet_vocoder: the checkpoint's keys are not those of such a model: {lists}")


def _upsample_expected(plain: Collection[str]) -> set[str]:
    """The keys of upsampling, of either layout, as far as the layers go that there are."""
    expected = set()
    for pattern, first, parts in (
        (r"(upsample_conv\.)(\d+)\.", 0, ("weight", "bias")),
        (r"(upsample_net\.(?:upsample\.)?up_layers\.)(\d+)\.", 1, ("weight",)),
    ):
        found = [m for key in plain if (m := re.match(pattern, key))]
        last = max((int(m[2]) for m in found), default=-1)
        expected |= {f"{m[1]}{i}.{part}" for m in found for i in range(first, last + 1, 2) for part in parts}
    if any(key.startswith(("upsample_net.conv_in.", "upsample_net.upsample.")) for key in plain):
        expected.add("upsample_net.conv_in.weight")
    return expected


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight normalisation (g, v) multiplied out."""
    folded = {k: v for k, v in state.items() if not k.endswith(("_g", "_v"))}
    for key, v in state.items():
        if key.endswith("_v"):
            g = state[key[:-2] + "_g"]
            if g.shape != (v.shape[0], *[1] * (v.dim() - 1)):
                raise ValueError(
                    f"from_wavenet_vocoder: {key[:-2] + '_g'!r} must have one element for each row of {key!r} "
                    f"{tuple(v.shape)}, got {tuple(g.shape)}"
                )
            folded[key[:-2]] = torch._weight_norm(v, g, 0)
    return folded


def _upsampling(
    state: dict[str, Tensor], hparams: dict[str, Any], channels: int
) -> tuple[list[int], dict[str, Any] | None]:
    """The model's upsample_scales and upsample_options."""
    if any(k.startswith("upsample_conv.") for k in state):
        weights = [v for _, v in sorted(_layers(state, "upsample_conv.").items())]
        if any(w.dim() != 4 for w in weights):
            raise ValueError("from_wavenet_vocoder: 'upsample_conv.*.weight' must be (1, 1, rows, scale)")
        options = {"kind": "transposed", "freq_kernel_size": weights[0].shape[2], "relu": True}
        return [w.shape[3] for w in weights], options
    if any(k.startswith("upsample_net.") for k in state):
        params = dict(hparams.get("upsample_params", {}))
        if params.get("upsample_activation", "none") != "none" or params.get("mode", "nearest") != "nearest":
            raise ValueError("from_wavenet_vocoder: only nearest upsampling without activations is supported")
        conv_in = state.get("upsample_net.conv_in.weight")
        prefix = "upsample_net." if conv_in is None else "upsample_net.upsample."
        weights = [v for _, v in sorted(_layers(state, prefix + "up_layers.").items())]
        if not weights or any(w.dim() != 4 for w in weights):
            raise ValueError(f"from_wavenet_vocoder: upsampling needs '{prefix}up_layers.*.weight' of 4 dimensions")
        pad = int(hparams.get("cin_pad", 0)) if conv_in is None else (conv_in.shape[2] - 1) // 2
        options = {
            "kind": "stretch", "freq_kernel_size": weights[0].shape[2], "pad": pad,
            "channels": 0 if conv_in is None else channels,
        }  # fmt: skip
        return [(w.shape[3] - 1) // 2 for w in weights], options
    return [], None


def _layers(state: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    return {int(m[1]): v for k, v in state.items() if (m := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", k))}


def _upsample_keys(state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """(key in the checkpoint, key in fastgen's upsampling module)."""
    keys = []
    for key in state:
        if m := re.fullmatch(r"upsample_conv\.(\d+)\.(weight|bias)", key):
            keys.append((key, f"convs.{int(m[1]) // 2}.{m[2]}"))
        elif m := re.fullmatch(r"upsample_net\.(?:upsample\.)?up_layers\.(\d+)\.weight", key):
            keys.append((key, f"convs.{int(m[1]) // 2}.weight"))
        elif key == "upsample_net.conv_in.weight":
            keys.append((key, "conv_in.weight"))
    return keys
