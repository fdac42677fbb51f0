"""The sampling of a WaveNet: checks of what was asked for, then chunk after chunk from the generation op."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastgen.backend import resolve
from fastgen.checks import (
    check_generator,
    check_integer,
    check_progress,
    check_temperature,
    check_tensor,
    check_truncation,
)
from fastgen.models.progress import Progress, reporter
from fastgen.ops import GenerationState, Generator, initial_state

if TYPE_CHECKING:
    from fastgen.models.wavenet import WaveNet

CHUNK_WORK = 4_000_000_000  # multiply-adds in one call of the generation op: some tenths of a second on a slow core
LONGEST = 16384  # steps in one call; on a GPU a launch, which loads all weights
LAYER_WORK = 4000  # what a layer costs besides, and a narrow one's padding, in multiply-adds
CHUNK_CONDITIONING = 16_000_000  # floats of per-layer conditioning in one call, where the loop does not compute it


_loops: WeakKeyDictionary[WaveNet, dict[object, tuple[Generator, list[Tensor]]]] = WeakKeyDictionary()


@torch.no_grad()
def stream(
    model: WaveNet,
    steps: int,
    chunk: int = 1024,
    *,
    batch_size: int = 1,
    local: Tensor | Iterable[Tensor] | None = None,
    speaker: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    given: Tensor | None = None,
    state: GenerationState | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    progress: Progress = False,
) -> Iterator[Tensor]:
    """`generate`, a chunk at a time: an iterator of (B, chunk), the last one perhaps shorter.

    `local` may also be an iterable of blocks (B, local_channels, frames): a block is asked for when the samples before
    it are out, so that generation starts while features still arrive; a block of 0 frames is skipped. The weights are
    those at the start. Whatever is wrong is said at the call, not at the first chunk.
    """
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        check_integer("generate", name, count)
    check_generator("generate", generator)
    check_integer("stream", "chunk", chunk)
    check_temperature("generate", temperature)
    check_truncation("generate", top_k, top_p, model.distribution)
    check_progress("generate", progress)
    if uniforms is not None:
        _check_uniforms(model, uniforms, batch_size, steps)
    if given is not None:
        given = model._check_samples("given", given)
        given = given if model.distribution == "categorical" else given.float()
        if given.shape[0] != batch_size or given.shape[1] > steps:
            raise ValueError(f"generate: given must be ({batch_size}, at most {steps}), got {tuple(given.shape)}")
    _check_parameters(model)
    loop = _loop(model, dtype, backend)
    if state is None:
        state = initial_state(loop.weights, loop.dilations, model._start_samples(batch_size))
    else:
        _check_state(loop, state, batch_size)
    blocks = _blocks(model, local, batch_size, steps)
    gate_bias = model._gate_bias(speaker, batch_size)
    pair = () if model.distribution == "categorical" else (2,)
    # fixed by the shapes alone, so that two runs make the same calls and give the same bits
    work = sum(t.numel() for t in loop.weights) + LAYER_WORK * len(model.layers)
    call = LONGEST if loop.backend == "cuda" else max(1, min(LONGEST, CHUNK_WORK // (work * batch_size)))
    if loop.local_weight is not None and loop.backend != "cuda":
        call = max(1, min(call, CHUNK_CONDITIONING // (loop.local_weight[..., 0].numel() * batch_size)))

    def run(done: int, n: int, local: Tensor | None) -> Tensor:
        if uniforms is None:
            # drawn step by step, so that the samples do not depend on the size of the chunks
            where = None if generator is None else generator.device
            u = torch.rand(n, batch_size, *pair, generator=generator, dtype=torch.float32, device=where)
            u = u.transpose(0, 1).to(gate_bias.device)
        else:
            u = uniforms[:, done : done + n].float().clamp(max=1 - 2**-24)
        known = None if given is None or done >= given.shape[1] else given[:, done : done + n]
        return loop.run(
            state, u, gate_bias, local=local, temperature=temperature, top_k=top_k, top_p=top_p, given=known
        )[0]

    def chunks() -> Iterator[Tensor]:
        features = gate_bias.new_empty(batch_size, model.local_channels, 0)
        now = None
        with reporter("generate", progress, steps, "samples") as report:
            done = 0
            while done < steps:
                end = min(done + chunk, steps)
                parts = []
                with torch.no_grad():  # not around the yield: it would hold for the caller too
                    while done < end:
                        n = min(call, end - done)
                        if loop.local_weight is not None:
                            while features.shape[2] < n:
                                block = next(blocks, None)
                                if block is None:
                                    raise ValueError(
                                        f"stream: local ended after {done + features.shape[2]} samples, "
                                        f"{steps} are wanted"
                                    )
                                features = torch.cat([features, block.float()], 2)
                            now, features = features[:, :, :n].mT.contiguous(), features[:, :, n:]
                        parts.append(run(done, n, now))
                        done += n
                        report(done)
                yield torch.cat(parts, 1)

    return chunks()


def _loop(model: WaveNet, dtype: torch.dtype, backend: str | None) -> Generator:
    """The generation op with the model's weights as they are now, packed anew only where they have changed."""
    weights, local_weight = model.packed_weights(), model._local_weight()
    chosen = resolve("wavenet_generate", backend, weights.conv.device)
    key = (chosen, dtype, weights.conv.device, tuple(model.dilations), model.distribution, model.log_scale_min)
    loops = _loops.setdefault(model, {})
    # the values themselves are compared: version counters do not see what is written through `.data`
    now = [*weights] if local_weight is None else [*weights, local_weight]
    if key not in loops or not all(map(torch.equal, loops[key][1], now)):
        loop = Generator(
            weights, model.dilations, distribution=model.distribution, dtype=dtype,
            log_scale_min=model.log_scale_min, local_weight=local_weight,
            backend=chosen,
        )  # fmt: skip
        loops[key] = loop, [*loop.weights, *(w.clone() for w in now[len(weights) :])]
    return loops[key][0]


def _check_parameters(model: WaveNet) -> None:
    # a sum is not finite if an element is not; that of finite ones may overflow, so look closer then
    if bool(torch.isfinite(torch.stack([p.detach().sum().float() for p in model.parameters()])).all()):
        return
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"generate: the model's weights must be finite, {name} holds NaN or infinity")


def _check_state(loop: Generator, state: GenerationState, batch: int) -> None:
    if isinstance(state, GenerationState) and state.last.shape[0] != batch:
        raise ValueError(f"generate: state is for {state.last.shape[0]} streams, batch_size is {batch}")
    loop.check_state(state, batch)
    if not bool(torch.isfinite(state.history.sum())):
        raise ValueError("generate: state.history holds NaN, infinity or values near float32's largest")


def _blocks(model: WaveNet, local: Tensor | Iterable[Tensor] | None, batch: int, steps: int) -> Iterator[Tensor]:
    """Features at the sample rate, checked, as they arrive; a block without frames adds none."""
    if local is None or isinstance(local, Tensor):
        upsampled = model._upsampled(local, batch, steps)
        return iter(() if upsampled is None else (_finite(upsampled),))
    if not isinstance(local, Iterable):
        check_tensor("generate", "local", local, "or an iterable of tensors")
    if not model.local_channels:
        raise ValueError("WaveNet: local was given, but the model has local_channels=0")
    if model.upsample is not None and model.upsample.context:
        raise ValueError("stream: local must be one tensor: this model's upsampling looks at later frames")
    upsampled_blocks = (model._upsampled(block, batch, None) for block in local)
    return (_finite(block) for block in upsampled_blocks if block is not None)


def _finite(local: Tensor) -> Tensor:
    if not bool(torch.isfinite(local).all()):
        raise ValueError("generate: local holds NaN or infinity, or becomes so when upsampled")
    return local


def _check_uniforms(model: WaveNet, uniforms: Tensor, batch: int, steps: int) -> None:
    shape = (batch, steps) if model.distribution == "categorical" else (batch, steps, 2)
    check_tensor("generate", "uniforms", uniforms, f"{shape} in [0, 1)")
    if tuple(uniforms.shape) != shape:
        raise ValueError(f"generate: uniforms must be {shape}, got {tuple(uniforms.shape)}")
    if not uniforms.is_floating_point():
        raise TypeError(f"generate: uniforms must be floating point, got {uniforms.dtype}")
    model._check_device("uniforms", uniforms)
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(
            f"generate: uniforms must lie in [0, 1), got {float(uniforms.min())} to {float(uniforms.max())}"
        )
