"""Quantizers with the calls and the state of other projects: taming-transformers and EnCodec."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer, check_positive, check_tensor, is_finite
from fastgen.nn.codebook import Codebook, look_up, project
from fastgen.nn.linear import Linear
from fastgen.nn.vector_quantize import refuse_unoffered
from fastgen.ops.vector_quantize import quantize


class VectorQuantizer2(nn.Module):
    """taming-transformers' `VectorQuantizer2`: a learned codebook for feature maps; state `embedding.weight`.

    Parameters
    ----------
    n_e, e_dim
        Codes K, features D of each.
    beta
        Weight of the commitment loss; with `legacy`, as in that project's first version, of the codebook loss instead.
    sane_index_shape
        Whether indices come as (B, H, W) instead of (B * H * W,).
    remap, unknown_index
        Not offered: other values than the default raise NotImplementedError.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: None = None,
        unknown_index: str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        given = {"remap": remap, "unknown_index": unknown_index}
        refuse_unoffered("VectorQuantizer2", given, {"remap": None, "unknown_index": "random"})
        check_integer("VectorQuantizer2", "n_e", n_e)
        check_integer("VectorQuantizer2", "e_dim", e_dim)
        if not is_finite(beta) or beta < 0:
            raise ValueError(f"VectorQuantizer2: beta must be finite and >= 0, got {beta!r}")
        self.n_e, self.e_dim, self.beta, self.remap, self.re_embed = n_e, e_dim, beta, None, n_e
        self.sane_index_shape, self.legacy = sane_index_shape, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, D, H, W) -> quantized as z, loss (), (None, None, indices (B * H * W,) or (B, H, W))."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise NotImplementedError("VectorQuantizer2: temp, rescale_logits and return_logits are not offered")
        check_tensor("VectorQuantizer2", "z", z)
        if z.dim() != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"VectorQuantizer2: z must have shape (B, {self.e_dim}, H, W), got {tuple(z.shape)}")
        rows = z.movedim(1, -1)  # (B, H, W, D)
        out = quantize("VectorQuantizer2", rows.reshape(-1, self.e_dim), self.embedding.weight)
        first, second = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = first * out.commitment + second * out.codebook_error
        indices = out.indices.reshape(rows.shape[:-1]) if self.sane_index_shape else out.indices
        return out.quantized.reshape(rows.shape).movedim(-1, 1), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Codes of indices; with shape (B, H, W, D) as a feature map (B, D, H, W)."""
        codes = look_up("VectorQuantizer2", indices.reshape(-1), self.embedding.weight)
        return codes if shape is None else codes.reshape(shape).movedim(-1, 1).contiguous()


class _EncodecCodebook(Codebook):
    """State: inited (1,) float32, cluster_size (K,), embed_avg (K, D), embed (K, D)."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "inited"] = self.initted.detach().float()[None]
        for name in ("cluster_size", "embed", "embed_avg"):
            destination[prefix + name] = getattr(self, name).detach()[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours = dict(state_dict)
        if prefix + "inited" in ours:
            ours[prefix + "initted"] = ours.pop(prefix + "inited").reshape(()) > 0
        for name in ("cluster_size", "embed", "embed_avg"):
            if prefix + name in ours:
                ours[prefix + name] = ours[prefix + name][None]
        super()._load_from_state_dict(ours, prefix, *args)
        unexpected = args[3]
        unexpected[:] = [key for key in unexpected if key != prefix + "inited"]


class VectorQuantization(nn.Module):
    """EnCodec's `VectorQuantization`: moving-average codebook, features in the second dimension.

    Parameters
    ----------
    dim, codebook_size, codebook_dim
        Features D of the input, codes K, features of a code (D by default; linear maps lead in and out where it
        differs).
    decay, epsilon, kmeans_init, kmeans_iters, threshold_ema_dead_code, commitment_weight
        As in `VectorQuantize`. A replaced code starts its averages anew.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        kmeans_init: bool = True,
        kmeans_iters: int = 50,
        threshold_ema_dead_code: float = 2,
        commitment_weight: float = 1.0,
    ) -> None:
        super().__init__()
        inner = dim if codebook_dim is None else codebook_dim
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("codebook_dim", inner)):
            check_integer("VectorQuantization", name, size)
        check_integer("VectorQuantization", "kmeans_iters", kmeans_iters)
        check_positive("VectorQuantization", "epsilon", epsilon)
        for name, number, most in (
            ("decay", decay, 1.0), ("threshold_ema_dead_code", threshold_ema_dead_code, math.inf),
            ("commitment_weight", commitment_weight, math.inf),
        ):  # fmt: skip
            if not is_finite(number) or not 0 <= number <= most:
                raise ValueError(f"VectorQuantization: {name} must lie in [0, {most:g}], got {number!r}")
        self.dim, self.codebook_size, self.commitment_weight = dim, codebook_size, commitment_weight
        self.project_in: nn.Module = Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out: nn.Module = Linear(inner, dim) if inner != dim else nn.Identity()
        self._codebook = _EncodecCodebook(
            1, codebook_size, inner, decay=decay, eps=epsilon, kmeans_init=kmeans_init, kmeans_iters=kmeans_iters,
            cosine=False, learnable=False, ema_update=True, manual_ema_update=False,
            threshold_ema_dead_code=threshold_ema_dead_code, sync=None,
        )  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """(K, codebook_dim)."""
        return self._codebook.embed[0]

    def _rows(self, x: Tensor) -> Tensor:
        check_tensor("VectorQuantization", "x", x)
        if x.dim() != 3 or x.shape[1] != self.dim:
            raise ValueError(f"VectorQuantization: x must have shape (B, {self.dim}, N), got {tuple(x.shape)}")
        return self.project_in(x.mT)  # type: ignore[no-any-return]

    def encode(self, x: Tensor) -> Tensor:
        """x (B, D, N) -> indices (B, N)."""
        rows = self._rows(x)
        flat = rows.detach().reshape(-1, rows.shape[-1])
        return quantize("VectorQuantization", flat, self.codebook).indices.reshape(rows.shape[:-1])

    def decode(self, embed_ind: Tensor) -> Tensor:
        """indices (B, N) -> (B, D, N)."""
        return project(self.project_out, look_up("VectorQuantization", embed_ind, self.codebook)).mT

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, D, N) -> quantized as x, indices (B, N), loss (1,), zero in evaluation."""
        rows = self._rows(x)
        flat = rows.reshape(-1, rows.shape[-1])
        if not self.training:
            flat = flat.detach()
        self._codebook.initialise([flat], None)
        out = quantize("VectorQuantization", flat, self.codebook)
        if self.training:
            self._codebook.update([flat], [out.indices], None)
        quantized = self.project_out(out.quantized.reshape(rows.shape)).mT
        loss = out.commitment[None] * self.commitment_weight if self.training else torch.zeros(1, device=x.device)
        return quantized, out.indices.reshape(rows.shape[:-1]), loss
