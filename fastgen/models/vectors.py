"""What autoregressive models of vectors share: the order of the inputs, the likelihood, and sampling."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import (
    check_classes,
    check_generator,
    check_integer,
    check_temperature,
    check_tensor,
    check_weights,
    permutation_fault,
    readable,
    refuses_order,
)
from fastgen.ops import distributions


class VectorModel(nn.Module):
    """An autoregressive model of vectors of `inputs` values, each 0 or 1, or in [0, values).

    Subclasses make the parameters of each input's distribution, from the inputs before it in `order`.

    Parameters
    ----------
    inputs
        D, their number.
    values
        2 for binary inputs, else as many as an input has.
    order
        A permutation of 0 ... D - 1: the inputs in the order in which they are modelled; by default as they lie.

    Raises
    ------
    TypeError, ValueError
        For a parameter outside its range, and an order that is no permutation; the message names it.
    """

    order: Tensor

    def __init__(self, inputs: int, values: int = 2, order: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        self._name = name = type(self).__name__
        check_integer(name, "inputs", inputs)
        check_integer(name, "values", values, 2)
        self.inputs, self.values = inputs, values
        self.outputs = 1 if values == 2 else values
        self.config: dict[str, Any] = {"inputs": inputs, "values": values}
        if order is None:
            order = torch.arange(inputs)
        try:
            order = order.detach() if isinstance(order, Tensor) else torch.tensor(list(order))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: order must be {inputs} whole numbers, got {order!r}") from None
        if order.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
            order = order.long()
        if fault := permutation_fault(order, inputs):
            raise ValueError(f"{name}: order {fault}")
        self.register_buffer("order", order.clone().to(torch.get_default_device()))  # where the parameters will be

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not refuses_order(self._name, self.order, state_dict, prefix, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)

    @abstractmethod
    def parameters_in_order(self, x: Tensor, backend: str | None) -> Tensor:
        """x (B, D) int64 in the model's order -> (B, D, O), logits of 1 against 0 or of every value."""

    @abstractmethod
    def sample_in_order(self, uniforms: Tensor, given: Tensor, temperature: float, backend: str | None) -> Tensor:
        """(B, D) int64 in the model's order, by uniforms (B, D), where `given` (B, D) is below 0."""

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """Parameters (B, D, O) of every input's distribution given those before it: O = 1, the logit of 1 against 0, or
        O = values logits.

        Parameters
        ----------
        x
            (B, D): whole numbers in [0, values), of any dtype.
        backend
            See `fastgen.backend`.

        Raises
        ------
        TypeError, ValueError
            For x of another size, or other values.
        """
        out = self.parameters_in_order(self._check(x)[:, self.order], backend)
        return out[:, self.order.argsort()]

    def log_prob(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """Log-probability (B,) in nats; arguments as in `forward`."""
        x = self._check(x)
        out = self.forward(x, backend=backend)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        kind = "bernoulli" if self.values == 2 else "categorical"
        return distributions.log_prob(kind, out, x).sum(1)

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """-log2 p(x) over the number of inputs, (B,)."""
        return -self.log_prob(x) / (math.log(2) * self.inputs)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        given: Tensor | None = None,
        known: Tensor | None = None,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Draw vectors, one input after another.

        Parameters
        ----------
        batch_size
            B, 0 or more.
        given, known
            Vectors to complete, (B, D) int64, and which of their inputs are known: bool, of a shape that broadcasts to
            it. Without `known`, those that are not negative.
        temperature
            > 0; below 1 samples are likelier and less varied.
        uniforms
            (B, D) in [0, 1), one for each input where it lies; drawn from `generator` by default.
        generator
            Of the uniforms.
        backend
            See `fastgen.backend`.

        Returns
        -------
        (B, D) int64.

        Raises
        ------
        TypeError, ValueError
            For an argument of another shape, or outside its range.
        """
        name, shape, device = self._name, (batch_size, self.inputs), self.order.device
        check_integer(name, "batch_size", batch_size, 0)
        check_temperature(name, temperature)
        check_generator(name, generator)
        if uniforms is None:
            where = device if generator is None else generator.device
            uniforms = torch.rand(shape, generator=generator, device=where).to(device)
        check_tensor(name, "uniforms", uniforms, str(shape))
        if tuple(uniforms.shape) != shape or not uniforms.is_floating_point():
            raise ValueError(
                f"{name}: uniforms must be {shape} of floats, got {tuple(uniforms.shape)} {uniforms.dtype}"
            )
        if uniforms.numel() and not 0 <= float(uniforms.min()) <= float(uniforms.max()) < 1:
            raise ValueError(f"{name}: uniforms must lie in [0, 1)")
        fixed = torch.full(shape, -1, device=device)
        if given is not None:
            check_tensor(name, "given", given, str(shape))
            if tuple(given.shape) != shape or given.dtype != torch.int64:
                raise ValueError(f"{name}: given must be {shape} int64, got {tuple(given.shape)} {given.dtype}")
            known = given >= 0 if known is None else known
            check_tensor(name, "known", known, f"bool, {shape}")
            if known.dtype != torch.bool:
                raise TypeError(f"{name}: known must be bool, got {known.dtype}")
            try:
                known = known.expand(shape)
            except RuntimeError:
                raise ValueError(f"{name}: known must broadcast to {shape}, got {tuple(known.shape)}") from None
            fixed = torch.where(known, given, fixed)
            check_classes(name, "given", given[known], self.values)
        elif known is not None:
            raise ValueError(f"{name}: known was given without the vectors, given=")
        check_weights(name, self)
        u = uniforms.float().clamp(max=1 - 2**-24)[:, self.order]
        drawn = self.sample_in_order(u, fixed[:, self.order], temperature, backend)
        return drawn[:, self.order.argsort()]

    def _check(self, x: Tensor) -> Tensor:
        name = self._name
        check_tensor(name, "x", x, f"(B, {self.inputs})")
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"{name}: x must be (B, {self.inputs}), got {tuple(x.shape)}")
        if x.is_complex():
            raise TypeError(f"{name}: x must be real, got {x.dtype}")
        if x.dtype == torch.int64:
            whole = x
        else:
            whole = x.long()
            if readable(x) and not bool((whole == x).all()):
                wrong = x[whole != x][0].item()
                hint = "; binarise images first, e.g. torch.bernoulli(x)" if self.values == 2 else ""
                raise ValueError(f"{name}: x must hold whole numbers in [0, {self.values}), got {wrong:g}{hint}")
        check_classes(name, "x", whole, self.values)
        return whole
