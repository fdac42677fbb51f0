"""WaveNet sampling with queues: O(layers) work for each sample, the whole time loop inside one op.

    x_0     = input[sample_{t-1}]                      (R)      a row of a table, or weight * value, plus a bias
    a_l     = sum_j W_{l,j} x_l(t - j d_l) + b_l + c_l(t)       (2H)     j = 0 .. K-1; past inputs come from a queue
    z_l     = tanh(a_l[:H]) * sigmoid(a_l[H:])         (H)
    x_{l+1} = x_l + V_l z_l + v_l                      (R)
    s       = sum_l (U_l z_l) + u                      (S)
    out     = P relu(Q relu(s) + q) + p                (O)      parameters of p(sample_t | samples before t)

Sources: van den Oord et al., "WaveNet" (2016); Le Paine et al., "Fast Wavenet Generation Algorithm" (2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import NO_ROOM, instead, lib, resolve
from fastgen.checks import (
    check_classes,
    check_integer,
    check_temperature,
    check_tensor,
    check_truncation,
    check_unit_range,
    is_finite,
)
from fastgen.ops import distributions

DTYPES = (torch.float32, torch.bfloat16)
LARGEST = 1e38  # of any sum in the network; with the gate's bias and conditioning on top it is still a float32
Layout = dict[str, int | list[int]]


class WaveNetWeights(NamedTuple):
    """All weights of a WaveNet, float32. L layers, R residual, H gate, S skip, O output channels."""

    input: Tensor  # (classes, R): one row for each class; (1, R): factor of a real-valued sample
    input_bias: Tensor  # (R,)
    conv: Tensor  # (L, 2H, R, K): tanh half first; the last tap is the current sample
    residual: Tensor  # (L, R, H)
    residual_bias: Tensor  # (L, R)
    skip: Tensor  # (L, S, H)
    skip_bias: Tensor  # (S,): the sum over layers
    hidden: Tensor  # (S, S)
    hidden_bias: Tensor  # (S,)
    output: Tensor  # (O, S)
    output_bias: Tensor  # (O,)

    def rounded(self, dtype: torch.dtype) -> WaveNetWeights:
        """The products' weights rounded to `dtype`, as the loop uses them; biases and the input table stay."""
        products = ("conv", "residual", "skip", "hidden", "output")
        return self._replace(**{name: getattr(self, name).to(dtype).float() for name in products})


@dataclass
class GenerationState:
    """Everything that generation carries from step to step: save it, copy it, continue from it.

    history: (B, sum over layers of (K-1) * dilation, R rounded up to 32) float32, the queues, each a ring buffer;
    last: (B,) the last sample, int64 class or float32 value; layout: the sizes of the network that it belongs to;
    position: the number of samples generated.
    """

    history: Tensor
    last: Tensor
    layout: Layout
    position: int = 0

    def clone(self) -> GenerationState:
        return GenerationState(self.history.clone(), self.last.clone(), dict(self.layout), self.position)


def initial_state(weights: WaveNetWeights, dilations: list[int], start: Tensor) -> GenerationState:
    """Empty queues for the streams whose first input is `start` (B,)."""
    _, _, residual, kernel_size = weights.conv.shape
    rows = (kernel_size - 1) * sum(dilations)
    history = weights.conv.new_zeros(start.shape[0], rows, -(-residual // 32) * 32)
    return GenerationState(history, start.clone(), _layout(weights, dilations))


def _layout(w: WaveNetWeights, dilations: list[int]) -> Layout:
    """Plain data, so that a state can be saved; networks that differ in any of it cannot share states."""
    _, gates, residual, kernel_size = w.conv.shape
    return {
        "residual channels": residual, "gate channels": gates // 2, "skip channels": w.hidden.shape[0],
        "output channels": w.output.shape[0], "kernel size": kernel_size, "dilations": list(dilations),
    }  # fmt: skip


lib.define("wavenet_few(int[] shape, bool bf16, int streams) -> bool")
lib.define("wavenet_pack(Tensor[] weights, bool bf16, bool few) -> Tensor")
lib.define("wavenet_pack_cuda(Tensor[] weights, int[] shape, int[] dilations, bool bf16) -> Tensor")
lib.define("wavenet_plan(int[] shape, int streams, bool bf16, int[] device) -> int[]")
lib.define("wavenet_fits(Tensor packed, int[] shape, bool bf16) -> bool")
lib.define(
    "wavenet_generate(Tensor packed, int[] shape, int[] dilations, bool bf16, int distribution, float log_scale_min, "
    "float temperature, int top_k, float top_p, Tensor gate_bias, Tensor? cond, Tensor uniforms, Tensor? given, "
    "int position, Tensor(a!) history, Tensor(b!) last, Tensor(c!) samples, Tensor(d!)? parameters) -> ()"
)


@torch.library.register_fake("fastgen::wavenet_generate", lib=lib)
def _(*args: object) -> None:
    return None


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of (B, T, C) with the same bits for any T: PyTorch sums a few rows in another order than many."""
    rows = x.flatten(0, 1)
    spare = max(0, 16 - rows.shape[0])
    return F.linear(F.pad(rows, (0, 0, 0, spare)), weight)[: rows.shape[0]]


class Generator:
    """A WaveNet's weights, laid out once for a backend; `run` advances a state by some steps.

    Parameters
    ----------
    weights, dilations
        The network, which is copied; one dilation for each layer.
    distribution
        "categorical", "logistic" or "gaussian": what the outputs parametrise.
    log_scale_min
        Lower limit of a mixture's log scales.
    local_weight
        (L, 2H, C) float32: the 1x1 convolutions of conditioning features, for `run`'s `local`; or None.
    dtype
        Of the weights inside the loop: float32, or bfloat16 (sums stay float32).
    backend
        See `fastgen.backend`; "reference" is a queue in plain PyTorch.

    Raises
    ------
    TypeError, ValueError
        For weights that do not fit together, or another argument outside its range; the message names it.
    FloatingPointError
        If the weights, though finite, are so large that a sum in the network could overflow float32.
    """

    def __init__(
        self,
        weights: WaveNetWeights,
        dilations: list[int],
        *,
        distribution: str = "categorical",
        log_scale_min: float = -7.0,
        local_weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"wavenet_generate: dtype must be float32 or bfloat16, got {dtype}")
        if not is_finite(log_scale_min):
            raise ValueError(f"wavenet_generate: log_scale_min must be finite, got {log_scale_min!r}")
        named = {f"weights.{name}": tensor for name, tensor in weights._asdict().items()}
        if local_weight is not None:
            named["local_weight"] = local_weight
        for name, tensor in named.items():
            check_tensor("wavenet_generate", name, tensor)
            if tensor.dtype != torch.float32:
                raise ValueError(f"wavenet_generate: {name} must be float32, got {tensor.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"wavenet_generate: {name} holds NaN or infinity")
        self.backend = resolve("wavenet_generate", backend, weights.conv.device)
        self.weights = WaveNetWeights(*(t.detach().clone(memory_format=torch.contiguous_format) for t in weights))
        self.dilations = list(dilations)
        _check_network(self.weights, self.dilations, distribution)
        layers, gates, _, _ = weights.conv.shape
        if local_weight is not None and (local_weight.dim() != 3 or tuple(local_weight.shape[:2]) != (layers, gates)):
            raise ValueError(
                f"wavenet_generate: local_weight must be ({layers}, {gates}, C), got {tuple(local_weight.shape)}"
            )
        self.local_weight = None if local_weight is None else local_weight.to(dtype).float().contiguous()
        self._layout = _layout(self.weights, self.dilations)
        self._largest_output = _check_magnitude(self.weights)
        self.distribution = distribution
        self._sample_dtype = torch.int64 if distribution == "categorical" else torch.float32
        self.log_scale_min = log_scale_min
        self.dtype = dtype
        if self.backend == "cuda":
            network = [*self.weights] if self.local_weight is None else [*self.weights, self.local_weight]
            packed = torch.ops.fastgen.wavenet_pack_cuda(
                [w.detach().cpu() for w in network], self._shape(), self.dilations, dtype == torch.bfloat16
            )
            self._packed = packed.to(weights.conv.device)
            if not torch.ops.fastgen.wavenet_fits(self._packed, self._shape(), dtype == torch.bfloat16):
                self.backend = instead("wavenet_generate", backend, "cuda", self._packed.device, NO_ROOM)
        self._packed_for: dict[bool, Tensor] = {}  # on the CPU: for few streams, or for more
        if self.backend == "reference":
            self._rounded = self.weights.rounded(dtype)

    def _shape(self) -> list[int]:
        w = self.weights
        layers, gates, residual, kernel_size = w.conv.shape
        shape = [w.input.shape[0], residual, gates // 2, w.hidden.shape[0], w.output.shape[0], layers, kernel_size]
        if self.backend == "cuda":
            shape.append(0 if self.local_weight is None else self.local_weight.shape[2])
        return shape

    def run(
        self,
        state: GenerationState,
        uniforms: Tensor,
        gate_bias: Tensor,
        cond: Tensor | None = None,
        *,
        local: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        given: Tensor | None = None,
        parameters: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Generate as many samples as there are uniforms, and advance `state` in place.

        Parameters
        ----------
        state
            See `initial_state`.
        uniforms
            (B, T) float32 in [0, 1); (B, T, 2) for mixtures: component, then value within it.
        gate_bias
            (B or 1, L, 2H) float32: the convolutions' biases plus whatever conditioning is constant in time.
        cond
            (B, T, L, 2H) float32: conditioning of every layer at every step.
        local
            (B, T, C) float32, in place of `cond`: features, from which a layer's conditioning is `local_weight[l]`
            times the vector of the step. On CUDA it is computed in the loop; elsewhere before it, and takes
            B T L 2H floats of memory.
        top_k, top_p
            Of classes: draw from the `top_k` most probable ones, and of these from the fewest whose probabilities reach
            `top_p` of theirs, once the temperature is applied; ties with the last one kept are kept. None keeps all.
        given
            (B, n <= T): samples that are known; the network reads them in place of its own.
        parameters
            Also return the distributions' parameters.

        Returns
        -------
        samples (B, T), int64 classes or float32 values; parameters (B, T, O) float32 or None.

        Raises
        ------
        TypeError, ValueError
            Shapes, dtypes or values that do not fit: the message names the argument, what was expected and what came.
        FloatingPointError
            If the outputs, divided by `temperature`, could overflow float32.
        """
        self._check_call(state, uniforms, gate_bias, cond, local, given)
        if local is not None and self.backend != "cuda":
            weight = self.local_weight.flatten(0, 1)  # type: ignore[union-attr]
            cond = _linear(local, weight).view(*local.shape[:2], *gate_bias.shape[1:])
        elif local is not None:
            cond = local
        check_temperature("wavenet_generate", temperature)
        check_truncation("wavenet_generate", top_k, top_p, self.distribution)
        if not self._largest_output / temperature <= LARGEST:
            raise FloatingPointError(
                f"wavenet_generate: outputs of up to {self._largest_output:.1e}, divided by a temperature of "
                f"{temperature:g}, can overflow float32"
            )
        batch, steps = uniforms.shape[:2]
        w = self.weights
        outputs = w.output.shape[0]
        if self.backend == "reference":
            return wavenet_generate_reference(
                self._rounded, self.dilations, state, uniforms, gate_bias, cond, distribution=self.distribution,
                log_scale_min=self.log_scale_min, temperature=temperature, top_k=top_k, top_p=top_p, given=given,
                parameters=parameters,
            )  # fmt: skip
        samples = state.last.new_empty(batch, steps)
        kept = uniforms.new_empty(batch, steps, outputs) if parameters else None
        packed = self._packed if self.backend == "cuda" else self._packed_on_cpu(batch)
        torch.ops.fastgen.wavenet_generate(
            packed, self._shape(), self.dilations, self.dtype == torch.bfloat16,
            distributions.KINDS.index(self.distribution), self.log_scale_min, temperature,
            *distributions.truncation(top_k, top_p, outputs), gate_bias.contiguous(),
            None if cond is None else cond.contiguous(), uniforms.contiguous(),
            None if given is None else given.contiguous(), state.position, state.history, state.last, samples, kept,
        )  # fmt: skip
        state.position += steps
        return samples, kept

    def _packed_on_cpu(self, streams: int) -> Tensor:
        bf16 = self.dtype == torch.bfloat16
        few = torch.ops.fastgen.wavenet_few(self._shape(), bf16, streams)
        if few not in self._packed_for:
            self._packed_for[few] = torch.ops.fastgen.wavenet_pack(list(self.weights), bf16, few)
        return self._packed_for[few]

    def check_state(self, state: GenerationState, batch: int) -> None:
        """Raise TypeError or ValueError unless `state` is one of `batch` streams of this network."""
        if not isinstance(state, GenerationState):
            raise TypeError(f"wavenet_generate: state must be a GenerationState, got {type(state).__name__}")
        _, _, residual, kernel_size = self.weights.conv.shape
        history = (batch, (kernel_size - 1) * sum(self.dilations), -(-residual // 32) * 32)
        self._check_tensor("state.history", state.history, torch.float32, history)
        self._check_tensor("state.last", state.last, self._sample_dtype, (batch,))
        for name, tensor in (("history", state.history), ("last", state.last)):
            if not tensor.is_contiguous():
                raise ValueError(f"wavenet_generate: state.{name} must be contiguous, got strides {tensor.stride()}")
        self._check_samples("state.last", state.last)
        check_integer("wavenet_generate", "state.position", state.position, 0)
        if state.position >= 2**62:
            raise ValueError(f"wavenet_generate: state.position must be < 2**62, got {state.position}")
        if state.layout != self._layout:
            here, there = self._layout, state.layout
            different = [
                f"{name} {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]
            ]
            raise ValueError(f"wavenet_generate: state belongs to another network: {'; '.join(different)}")

    def _check_call(
        self, state: GenerationState, uniforms: Tensor, gate_bias: Tensor, cond: Tensor | None, local: Tensor | None,
        given: Tensor | None,
    ) -> None:  # fmt: skip
        """The kernels read these tensors as they lie in memory: nothing that does not fit may reach them."""
        layers, gates, _, _ = self.weights.conv.shape
        pair = () if self.distribution == "categorical" else (2,)
        wanted = "(B, T, 2)" if pair else "(B, T)"
        check_tensor("wavenet_generate", "uniforms", uniforms, wanted)
        if uniforms.dim() != 2 + len(pair) or tuple(uniforms.shape[2:]) != pair:
            raise ValueError(f"wavenet_generate: uniforms must be {wanted}, got {tuple(uniforms.shape)}")
        batch, steps = uniforms.shape[:2]
        self._check_tensor("uniforms", uniforms, torch.float32, uniforms.shape)
        check_tensor("wavenet_generate", "gate_bias", gate_bias)
        streams = 1 if gate_bias.shape[:1] == (1,) else batch
        self._check_tensor("gate_bias", gate_bias, torch.float32, (streams, layers, gates))
        if cond is not None:
            self._check_tensor("cond", cond, torch.float32, (batch, steps, layers, gates))
        if cond is not None and self.local_weight is not None:
            raise ValueError("wavenet_generate: cond was given to a network with local_weight, which takes local")
        if local is not None:
            if self.local_weight is None:
                raise ValueError("wavenet_generate: local was given to a network without local_weight")
            self._check_tensor("local", local, torch.float32, (batch, steps, self.local_weight.shape[2]))
        if given is not None:
            check_tensor("wavenet_generate", "given", given)
            known = given.shape[1] if given.dim() == 2 else 0
            self._check_tensor("given", given, self._sample_dtype, (batch, min(known, steps)))
            self._check_samples("given", given)
        self.check_state(state, batch)
        tensors = {"gate_bias": gate_bias, "cond": cond, "local": local}
        # cond is large: a sum reads it once, and is not finite if an element is not; a GPU is waited for once
        sums = {name: tensor.sum() for name, tensor in tensors.items() if tensor is not None}
        finite = torch.isfinite(torch.stack(list(sums.values()))).tolist()
        for name, fine in zip(sums, finite, strict=True):
            if not fine:
                raise ValueError(f"wavenet_generate: {name} holds NaN, infinity or values near float32's largest")

    def _check_tensor(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_tensor("wavenet_generate", name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"wavenet_generate: {name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"wavenet_generate: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != self.weights.conv.device:
            raise ValueError(f"wavenet_generate: {name} is on {tensor.device}, weights on {self.weights.conv.device}")

    def _check_samples(self, name: str, samples: Tensor) -> None:
        if self.distribution == "categorical":
            check_classes("wavenet_generate", name, samples, self.weights.input.shape[0])
        else:
            check_unit_range("wavenet_generate", name, samples)


def _check_network(w: WaveNetWeights, dilations: list[int], distribution: str) -> None:
    if distribution not in distributions.KINDS:
        raise ValueError(f"wavenet_generate: distribution must be one of {distributions.KINDS}, got {distribution!r}")
    if w.conv.dim() != 4 or w.conv.shape[1] % 2:
        raise ValueError(f"wavenet_generate: weights.conv must be (L, 2H, R, K), got {tuple(w.conv.shape)}")
    if not (min(w.conv.shape[1:]) and w.hidden.numel() and w.output.numel()):
        raise ValueError(
            "wavenet_generate: weights must have channels, taps and outputs, got "
            f"conv {tuple(w.conv.shape)}, hidden {tuple(w.hidden.shape)}, output {tuple(w.output.shape)}"
        )
    layers, gates, residual, _ = w.conv.shape
    skip, outputs = w.hidden.shape[0], w.output.shape[0]
    shapes = {
        "input": (outputs if distribution == "categorical" else 1, residual), "input_bias": (residual,),
        "residual": (layers, residual, gates // 2), "residual_bias": (layers, residual),
        "skip": (layers, skip, gates // 2), "skip_bias": (skip,), "hidden": (skip, skip), "hidden_bias": (skip,),
        "output": (outputs, skip), "output_bias": (outputs,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(getattr(w, name).shape) != shape:
            raise ValueError(f"wavenet_generate: weights.{name} must be {shape}, got {tuple(getattr(w, name).shape)}")
    if distribution != "categorical" and outputs % 3 and not (distribution == "gaussian" and outputs == 2):
        raise ValueError(f"wavenet_generate: weights.output must have 3 rows for each component, got {outputs}")
    if len(dilations) != layers or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in dilations):
        raise ValueError(f"wavenet_generate: dilations must be {layers} integers >= 1, got {dilations}")


def _check_magnitude(w: WaveNetWeights) -> float:
    """The largest output there can be, or FloatingPointError if some sum of the network could overflow float32.

    Gates and real-valued samples lie in [-1, 1], so sums of absolute weights bound every sum, for any samples: there is
    nothing to look for in the loop.
    """
    w = WaveNetWeights(*(t.double().abs() for t in w))
    steps = w.residual.sum(2) + w.residual_bias  # (L, R): the most that each layer adds
    x = (w.input.amax(0) + w.input_bias) + F.pad(steps.cumsum(0), (0, 0, 1, 0))  # (L + 1, R)
    a = torch.einsum("lhrk,lr->lh", w.conv, x[:-1])
    skips = w.skip.sum((0, 2)) + w.skip_bias
    hidden = w.hidden @ skips + w.hidden_bias
    out = w.output @ hidden + w.output_bias
    # what a product reads may be summed before it is scaled
    sums_of = {"conv": a, "residual": x.sum(1), "skip": skips.sum(0), "hidden": hidden.sum(0), "output": out}
    for name, sums in sums_of.items():
        largest = float(sums.max()) if sums.numel() else 0.0
        if not largest <= LARGEST:
            raise FloatingPointError(
                f"wavenet_generate: weights.{name} is so large that float32 can overflow: sums of up to {largest:.1e}, "
                f"at most {LARGEST:g} is safe"
            )
    return largest


@torch.no_grad()
def wavenet_generate_reference(
    weights: WaveNetWeights,
    dilations: list[int],
    state: GenerationState,
    uniforms: Tensor,
    gate_bias: Tensor,
    cond: Tensor | None = None,
    *,
    distribution: str = "categorical",
    log_scale_min: float = -7.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    given: Tensor | None = None,
    parameters: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The queue in plain PyTorch; see `Generator.run`."""
    layers, gates, residual, kernel_size = weights.conv.shape
    lengths = [(kernel_size - 1) * d for d in dilations]
    queues = state.history[..., :residual].split(lengths, dim=1) if layers else []
    taps = [weights.conv[i].permute(0, 2, 1).reshape(gates, -1) for i in range(layers)]  # (2H, K * R), oldest first
    draw = partial(
        distributions.sample, distribution, temperature=temperature, log_scale_min=log_scale_min, top_k=top_k,
        top_p=top_p,
    )  # fmt: skip
    samples, kept = [], []
    for t in range(uniforms.shape[1]):
        if distribution == "categorical":
            x = weights.input[state.last] + weights.input_bias  # (B, R)
        else:
            x = state.last[:, None] * weights.input + weights.input_bias
        skips = weights.skip_bias.expand(state.last.shape[0], -1)  # (B, S)
        for i in range(layers):
            now = state.position
            past = [queues[i][:, (now - j * dilations[i]) % lengths[i]] for j in range(kernel_size - 1, 0, -1)]
            a = F.linear(torch.cat([*past, x], 1), taps[i]) + gate_bias[:, i]  # (B, 2H)
            if cond is not None:
                a = a + cond[:, t, i]
            z = torch.tanh(a[:, : gates // 2]) * torch.sigmoid(a[:, gates // 2 :])  # (B, H)
            if lengths[i]:
                queues[i][:, now % lengths[i]] = x
            skips = skips + F.linear(z, weights.skip[i])  # (B, S)
            x = x + F.linear(z, weights.residual[i], weights.residual_bias[i])
        hidden = F.linear(F.relu(skips), weights.hidden, weights.hidden_bias)
        out = F.linear(F.relu(hidden), weights.output, weights.output_bias)  # (B, O)
        sample = given[:, t] if given is not None and t < given.shape[1] else draw(out, uniforms[:, t])
        state.last.copy_(sample)
        state.position += 1
        samples.append(sample)
        if parameters:
            kept.append(out)
    if not samples:
        batch = state.last.shape[0]
        nothing = weights.output.new_empty(batch, 0, weights.output.shape[0])
        return state.last.new_empty(batch, 0), nothing if parameters else None
    return torch.stack(samples, 1), torch.stack(kept, 1) if parameters else None
