"""Residual vector quantization: each quantizer codes what the ones before left over."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fastgen.checks import check_integer, check_tensor, is_finite
from fastgen.nn.codebook import look_up, project, world
from fastgen.nn.linear import Linear
from fastgen.nn.vector_quantize import VectorQuantize, refuse_unoffered

UNOFFERED = {
    "diveq": False, "implicit_neural_codebook": False, "mlp_kwargs": {}, "beam_size": None, "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
}  # fmt: skip
UNOFFERED_IN_FORWARD = {"indices": None, "beam_size": None}


class ResidualVQ(nn.Module):
    """A chain of `VectorQuantize`: x is approximated by the sum of one code of each.

    Parameters
    ----------
    dim
        Features D of the input.
    num_quantizers, codebook_size
        Quantizers Q, and the codes of each: one number, or a tuple of Q.
    codebook_dim
        Features inside; D by default. Where it differs, linear maps lead in and out.
    shared_codebook
        Whether all quantizers have one codebook.
    quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        In training, use only the first quantizers: a random number of them, more than the cutoff index, rounded up to a
        multiple. The others have indices -1 and loss 0.
    quant_grad_frac
        Share of the gradient that passes from a quantizer to those before it through the residual.
    accept_image_fmap, return_zeros_for_masked_padding, options
        As in `VectorQuantize`, which gets the other options.

    Source: Zeghidour et al., "SoundStream" (2021), algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        op = "ResidualVQ"
        refuse_unoffered(op, {name: options.pop(name) for name in UNOFFERED if name in options}, UNOFFERED)
        if heads != 1:
            raise NotImplementedError(f"{op}: heads={heads!r} is not offered; leave it at 1")
        check_integer(op, "dim", dim)
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError(
                f"{op}: give num_quantizers, or a tuple of codebook_size; got codebook_size={codebook_size!r}"
            )
        number = len(codebook_size) if num_quantizers is None and isinstance(codebook_size, tuple) else num_quantizers
        check_integer(op, "num_quantizers", number)
        assert number is not None
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * number
        if len(sizes) != number:
            raise ValueError(f"{op}: codebook_size must have num_quantizers = {number} numbers, got {len(sizes)}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"{op}: shared_codebook=True needs one codebook_size, got {sizes}")
        check_integer(op, "quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, 0)
        check_integer(op, "quantize_dropout_multiple_of", quantize_dropout_multiple_of)
        if quantize_dropout and quantize_dropout_cutoff_index >= number:
            raise ValueError(
                f"{op}: quantize_dropout_cutoff_index must be below num_quantizers = {number}, "
                f"got {quantize_dropout_cutoff_index}"
            )
        if not is_finite(quant_grad_frac) or not 0 <= quant_grad_frac <= 1:
            raise ValueError(f"{op}: quant_grad_frac must lie in [0, 1], got {quant_grad_frac!r}")
        inner = dim if codebook_dim is None else codebook_dim
        self.dim, self.num_quantizers, self.codebook_sizes = dim, number, sizes
        self.project_in: nn.Module = Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out: nn.Module = Linear(inner, dim) if inner != dim else nn.Identity()
        self.accept_image_fmap, self.shared_codebook = accept_image_fmap, shared_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.quantize_dropout = quantize_dropout and number > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        if shared_codebook:
            options["manual_ema_update"] = True
        self.layers = nn.ModuleList(VectorQuantize(inner, size, codebook_dim=inner, **options) for size in sizes)
        for layer in self._quantizers if shared_codebook else ():
            layer._codebook = self._quantizers[0]._codebook

    @property
    def _quantizers(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def codebook_size(self) -> int:
        """Codes of the first quantizer."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """(Q, K, codebook_dim), or a tuple where sizes differ."""
        books = tuple(layer.codebook for layer in self._quantizers)
        return torch.stack(books) if len(set(self.codebook_sizes)) == 1 else books

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices (B, ..., Q' <= Q), -1 for none -> (Q', B, ..., codebook_dim)."""
        if indices.shape[-1] > self.num_quantizers:
            raise ValueError(
                f"ResidualVQ: indices must have at most num_quantizers = {self.num_quantizers} in the last dimension, "
                f"got {tuple(indices.shape)}"
            )
        codes = [
            look_up("ResidualVQ", i, layer.codebook)
            for i, layer in zip(indices.unbind(-1), self._quantizers, strict=False)
        ]
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output for indices it returned; fewer quantizers give a coarser one."""
        out = project(self.project_out, self.get_codes_from_indices(indices).sum(0))
        return out.movedim(-1, 1) if self.accept_image_fmap else out

    def last_quantizer(self, seed: int | None = None) -> int:
        """The last quantizer that a training step uses: random with quantize_dropout, the same on all ranks."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers - 1
        if seed is None:
            drawn = torch.randint(2**31, ())
            if world()[1] > 1:
                drawn = drawn.to(self._quantizers[0].codebook.device)
                torch.distributed.broadcast(drawn, 0)
            seed = int(drawn)
        number = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
        multiple = self.quantize_dropout_multiple_of
        return min(-(-number // multiple) * multiple, self.num_quantizers) - 1

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize a batch.

        Parameters
        ----------
        x
            (B, N, D) or (B, D), or with accept_image_fmap (B, D, H, W).
        mask
            (B, N) bool, False for padding.
        return_all_codes
            Whether to return the codes too.
        sample_codebook_temp, freeze_codebook
            As in `VectorQuantize`.
        indices, beam_size
            Of vector-quantize-pytorch; not offered.
        rand_quantize_dropout_fixed_seed
            Of the number of quantizers under quantize_dropout.

        Returns
        -------
        quantized, as x; indices (B, N, Q), or (B, H, W, Q); losses (Q,); with return_all_codes the codes
        (Q, B, N, codebook_dim).
        """
        refuse_unoffered("ResidualVQ.forward", {"indices": indices, "beam_size": beam_size}, UNOFFERED_IN_FORWARD)
        check_tensor("ResidualVQ", "x", x)
        if x.dim() == 2 and not self.accept_image_fmap:
            quantized, index, loss, *codes = self(
                x[:, None], None if mask is None else mask[:, None], None, return_all_codes, sample_codebook_temp,
                freeze_codebook, None, rand_quantize_dropout_fixed_seed,
            )  # fmt: skip
            return quantized[:, 0], index[:, 0], loss, *(c[:, :, 0] for c in codes)
        features = 1 if self.accept_image_fmap else -1
        if x.dim() != (4 if self.accept_image_fmap else 3) or x.shape[features] != self.dim:
            shape = "(B, D, H, W)" if self.accept_image_fmap else "(B, N, D) or (B, D)"
            raise ValueError(f"ResidualVQ: x must have shape {shape} with D = {self.dim}, got {tuple(x.shape)}")
        last_dim = x.movedim(1, -1) if self.accept_image_fmap else x
        moved = last_dim.flatten(1, -2)
        residual = self.project_in(moved)
        total = torch.zeros_like(residual)
        last = self.last_quantizer(rand_quantize_dropout_fixed_seed)
        chosen: list[Tensor] = []
        losses: list[Tensor] = []
        residuals: list[Tensor] = []
        for number, layer in enumerate(self._quantizers):
            if number > last:
                chosen.append(torch.full_like(chosen[0], -1))
                losses.append(torch.zeros_like(losses[0]))
                continue
            residuals.append(residual)
            quantized, index, loss = layer(
                residual, mask=mask, sample_codebook_temp=sample_codebook_temp, freeze_codebook=freeze_codebook
            )
            passed = quantized.detach()
            if self.quant_grad_frac > 0:
                passed = self.quant_grad_frac * quantized + (1 - self.quant_grad_frac) * passed
            residual = residual - passed
            total = total + quantized
            chosen.append(index)
            losses.append(loss)
        if self.training and self.shared_codebook and not freeze_codebook:
            book = self._quantizers[0]._codebook
            if book.ema_update:
                book.update_ema()
            masks = None if mask is None else torch.cat([mask] * len(residuals), 1)
            self._quantizers[0].expire_codes_(torch.cat(residuals, 1), masks)
        out = self.project_out(total)
        if mask is not None:
            padding = torch.zeros_like(out) if self.return_zeros_for_masked_padding else moved
            out = torch.where(mask[..., None], out, padding)
        out = out.reshape(last_dim.shape)
        index = torch.stack(chosen, -1).reshape(*last_dim.shape[:-1], self.num_quantizers)
        codes = (self.get_codes_from_indices(index),) if return_all_codes else ()
        return out.movedim(-1, 1) if self.accept_image_fmap else out, index, torch.stack(losses), *codes


class GroupedResidualVQ(nn.Module):
    """A `ResidualVQ` for each of several groups of features.

    Parameters
    ----------
    dim, groups
        Features D of the input, and groups G, which must divide it.
    accept_image_fmap, options
        As in `ResidualVQ`, which gets the other options.

    Source: Yang et al., "HiFi-Codec" (2023).
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **options: Any) -> None:
        super().__init__()
        check_integer("GroupedResidualVQ", "dim", dim)
        check_integer("GroupedResidualVQ", "groups", groups)
        if dim % groups:
            raise ValueError(f"GroupedResidualVQ: groups must divide dim = {dim}, got {groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **options) for _ in range(groups)
        )

    @property
    def _parts(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def codebooks(self) -> Tensor:
        """(G, Q, K, codebook_dim)."""
        return torch.stack([torch.stack(list(rvq.codebooks)) for rvq in self._parts])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(G, B, ..., Q) -> (G, Q, B, ..., codebook_dim)."""
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self._parts, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """(G, B, ..., Q) -> the output for indices it returned."""
        outputs = [rvq.get_output_from_indices(i) for rvq, i in zip(self._parts, indices, strict=True)]
        return torch.cat(outputs, 1 if self.accept_image_fmap else -1)

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """As `ResidualVQ.forward`: quantized, as x; indices (G, B, N, Q); losses (G, Q); G codes (Q, B, N, D / G)."""
        refuse_unoffered("GroupedResidualVQ.forward", {"indices": indices}, UNOFFERED_IN_FORWARD)
        features = 1 if self.accept_image_fmap else -1
        check_tensor("GroupedResidualVQ", "x", x)
        if x.dim() not in ((4,) if self.accept_image_fmap else (2, 3)) or x.shape[features] != self.dim:
            shape = "(B, D, H, W)" if self.accept_image_fmap else "(B, N, D) or (B, D)"
            raise ValueError(f"GroupedResidualVQ: x must have shape {shape} with D = {self.dim}, got {tuple(x.shape)}")
        seed: Tensor | None = None
        if self.training and self._parts[0].quantize_dropout:  # one number of quantizers for all groups and ranks
            seed = torch.randint(2**31, ())
            if world()[1] > 1:
                seed = seed.to(x.device)
                torch.distributed.broadcast(seed, 0)
        outs = [
            rvq(
                part, mask, return_all_codes=return_all_codes, sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=None if seed is None else int(seed),
            )
            for rvq, part in zip(self._parts, x.chunk(self.groups, features), strict=True)
        ]  # fmt: skip
        quantized, indices_of, losses, *codes = zip(*outs, strict=True)
        return torch.cat(quantized, features), torch.stack(indices_of), torch.stack(losses), *codes
