"""The vector quantization layer, with the call, the returns and the state of vector-quantize-pytorch's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer, check_positive, check_tensor, is_finite
from fastgen.nn.codebook import Codebook, look_up, project
from fastgen.nn.linear import Linear
from fastgen.ops.vector_quantize import Estimator

# what vector-quantize-pytorch has and this layer has not, with the value that leaves each out
UNOFFERED = {
    "commitment_use_cross_entropy_loss": False, "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False, "orthogonal_reg_max_codes": None, "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0, "straight_through": False, "directional_reparam": False,
    "directional_reparam_variance": 5e-3, "sync_affine_param": False, "vq_bridge": None,
    "in_place_codebook_optimizer": None, "manual_in_place_optimizer_update": False, "affine_param": False,
    "affine_param_batch_decay": 0.99, "affine_param_codebook_decay": 0.9, "sync_update_v": 0.0,
    "route_gradients_to_input": True,
}  # fmt: skip
UNOFFERED_IN_FORWARD = {"indices": None, "topk": None, "codebook_transform_fn": None, "ema_update_weight": None}


def refuse_unoffered(layer: str, given: dict[str, Any], unoffered: dict[str, Any]) -> None:
    """Raise for each of the peer's options that is given a value which asks for something."""
    for name, value in given.items():
        if name not in unoffered:
            raise TypeError(f"{layer}: unexpected option {name!r}")
        if value is not unoffered[name] and value != unoffered[name]:
            raise NotImplementedError(f"{layer}: {name}={value!r} is not offered; leave it at {unoffered[name]!r}")


class LossBreakdown(NamedTuple):
    """The parts of the loss, before weights; the last three are of options that are not offered, and zero."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Replace vectors by their nearest codes, and let the codes follow the data.

    In training mode each call also moves the codebook: by moving averages of the vectors that chose each code, or, with
    `learnable_codebook`, by the gradient of the loss. Under torch.distributed the statistics of all ranks are summed
    with one all-reduce a step, and k-means and replacements agree on all ranks. Values that are not finite raise on the
    CPU; elsewhere, where finding them would make the host wait, they get code 0.

    Parameters
    ----------
    dim
        Features D of the input.
    codebook_size
        Codes K.
    codebook_dim
        Features of a code; D by default. Where codebook_dim * heads is not D, linear maps lead in and out.
    heads, separate_codebook_per_head
        Vectors that each input is split into, and whether each has a codebook of its own. Without codebook_dim, heads
        must divide dim.
    decay, eps
        Of the moving averages, in [0, 1], and of their Laplace smoothing.
    freeze_codebook
        Whether calls leave the codebook alone; also an argument of the call.
    kmeans_init, kmeans_iters, sync_kmeans
        Whether the first call sets the codes by k-means of its vectors, in how many steps, and whether of all ranks'.
    use_cosine_sim
        Compare directions: inputs and codes have unit length.
    layernorm_after_project_in
        Whether a LayerNorm follows the linear map in.
    threshold_ema_dead_code
        A code whose average count falls below it is replaced by a vector of the batch; 0 for never.
    channel_last, accept_image_fmap, accept_3d_fmap
        Inputs are (B, N, D) or (B, D); with channel_last=False (B, D, N); images (B, D, H, W); volumes (B, D, T, H, W).
    commitment_weight
        Of the mean squared distance between input and code in the loss.
    stochastic_sample_codes, sample_codebook_temp
        In training, draw codes with probability proportional to exp(-distance / temperature) instead of the nearest.
    rotation_trick
        Gradients reach the input by the rotation that takes it to its code (default for D > 1), or straight through.
    sync_codebook
        Whether ranks share the codebook; by default where there are several.
    ema_update, manual_ema_update
        Whether moving averages are kept, and whether codes wait for `_codebook.update_ema()`.
    learnable_codebook
        Learn codes by gradients; needs ema_update=False, which it implies.
    return_zeros_for_masked_padding
        What masked positions hold: zeros, or the input.
    options
        Others of vector-quantize-pytorch raise NotImplementedError, naming the option, unless they have the value that
        leaves them out.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        *,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        op = "VectorQuantize"
        refuse_unoffered(op, options, UNOFFERED)
        for name, size in (
            ("dim", dim), ("codebook_size", codebook_size), ("heads", heads), ("kmeans_iters", kmeans_iters),
            ("codebook_dim", dim if codebook_dim is None else codebook_dim),
        ):  # fmt: skip
            check_integer(op, name, size)
        if codebook_dim is None and dim % heads:
            raise ValueError(f"{op}: heads must divide dim = {dim}, or codebook_dim be given, got heads={heads}")
        if not is_finite(decay) or not 0 <= decay <= 1:
            raise ValueError(f"{op}: decay must lie in [0, 1], got {decay!r}")
        check_positive(op, "eps", eps)
        for name, number in (
            ("commitment_weight", commitment_weight), ("threshold_ema_dead_code", threshold_ema_dead_code),
            ("sample_codebook_temp", sample_codebook_temp),
        ):  # fmt: skip
            if not is_finite(number) or number < 0:
                raise ValueError(f"{op}: {name} must be finite and >= 0, got {number!r}")
        learnable = bool(learnable_codebook)
        ema_update = not learnable if ema_update is None else ema_update
        if learnable and ema_update:
            raise ValueError(f"{op}: learnable_codebook=True excludes ema_update=True")
        if learnable and use_cosine_sim:
            raise ValueError(f"{op}: learnable_codebook=True excludes use_cosine_sim=True")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError(f"{op}: accept_image_fmap and accept_3d_fmap exclude each other")
        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.separate_codebook_per_head = separate_codebook_per_head
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.freeze_codebook, self.use_cosine_sim, self.learnable_codebook = freeze_codebook, use_cosine_sim, learnable
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.estimator: Estimator = (
            "rotation" if (dim > 1 if rotation_trick is None else rotation_trick) else "straight_through"
        )
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = Linear(dim, inner)
            self.project_in = nn.Sequential(linear, nn.LayerNorm(inner)) if layernorm_after_project_in else linear
            self.project_out = Linear(inner, dim)
        self._codebook = Codebook(
            heads if separate_codebook_per_head else 1, codebook_size, self.codebook_dim,
            decay=decay, eps=eps, kmeans_init=kmeans_init, kmeans_iters=kmeans_iters, cosine=use_cosine_sim,
            learnable=learnable, ema_update=ema_update, manual_ema_update=manual_ema_update,
            threshold_ema_dead_code=threshold_ema_dead_code, sync=sync_codebook, sync_kmeans=sync_kmeans,
        )  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """(K, D), or (heads, K, D) where each head has its own; can be set."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes before the map out, zeros for -1: (B, ..., codebook_dim * heads), features where inputs have them."""
        if self.separate_codebook_per_head:
            pairs = zip(indices.unbind(-1), self.codebook, strict=True)
            codes = torch.stack([look_up("VectorQuantize", i, c) for i, c in pairs], -2)
        else:
            codes = look_up("VectorQuantize", indices, self.codebook)
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes if self._features_last else codes.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The layer's output for indices it returned."""
        codes = self.get_codes_from_indices(indices)
        if self._features_last:
            return project(self.project_out, codes)
        return project(self.project_out, codes.movedim(1, -1)).movedim(-1, 1)

    @property
    def _features_last(self) -> bool:
        return self.channel_last and not self.accept_image_fmap and not self.accept_3d_fmap

    def _check(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """Raise on an input that does not fit -> the mask (B, N)."""
        op = "VectorQuantize"
        check_tensor(op, "x", x)
        ranks = (4,) if self.accept_image_fmap else (5,) if self.accept_3d_fmap else (2, 3)
        features = -1 if self._features_last or x.dim() == 2 else 1
        if x.dim() not in ranks or x.shape[features] != self.dim:
            shape = "(B, D, H, W)" if self.accept_image_fmap else "(B, D, T, H, W)" if self.accept_3d_fmap else None
            shape = shape or ("(B, N, D) or (B, D)" if self.channel_last else "(B, D, N) or (B, D)")
            raise ValueError(f"{op}: x must have shape {shape} with D = {self.dim}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
        if x.device != self._codebook.embed.device:
            raise ValueError(f"{op}: x is on {x.device}, the codebook is on {self._codebook.embed.device}")
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError(f"{op}: give mask or lens, not both")
        if x.dim() != 3:
            raise ValueError(f"{op}: mask and lens need an input of three dimensions, got {tuple(x.shape)}")
        wanted = (x.shape[0], x.shape[1] if self.channel_last else x.shape[2])
        if lens is not None:
            check_tensor(op, "lens", lens)
            if lens.shape != wanted[:1] or lens.is_floating_point() or lens.dtype == torch.bool:
                raise ValueError(f"{op}: lens must be integers {wanted[:1]}, got {lens.dtype} {tuple(lens.shape)}")
            mask = torch.arange(wanted[1], device=lens.device) < lens[:, None]
        assert mask is not None
        check_tensor(op, "mask", mask)
        if mask.dtype != torch.bool or mask.shape != wanted:
            raise ValueError(f"{op}: mask must be bool {wanted}, got {mask.dtype} {tuple(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"{op}: mask is on {mask.device}, x is on {x.device}")
        return mask

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """(B, ..., D) -> the rows (N, D) of each codebook, and their mask (N,)."""
        x = self.project_in(x)
        wide = self._codebook.embed.dtype
        if x.dtype != wide and not (x.dtype == torch.bfloat16 and wide == torch.float32):
            x = x.to(wide)
        x = x.reshape(-1, self.heads, self.codebook_dim)
        if self.use_cosine_sim:
            x = F.normalize(x, dim=-1, eps=1e-6)
        if self.separate_codebook_per_head:
            return list(x.unbind(1)), None if mask is None else mask.reshape(-1)
        kept = None if mask is None else mask.reshape(-1, 1).expand(-1, self.heads).reshape(-1)
        return [x.reshape(-1, self.codebook_dim)], kept

    def _features_to_end(self, x: Tensor) -> Tensor:
        return x if self._features_last or x.dim() == 2 else x.movedim(1, -1)

    def _features_back(self, x: Tensor) -> Tensor:
        return x if self._features_last or x.dim() == 2 else x.movedim(-1, 1)

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: None = None,
        ema_update_weight: None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantize a batch.

        Parameters
        ----------
        x
            Of the shape that the layer was made for, floating point; computed with in the codebook's dtype.
        mask, lens
            (B, N) bool, False for padding, or (B,) lengths. Padding counts in nothing.
        sample_codebook_temp, freeze_codebook, ema_update
            In place of the layer's own, for this call.
        return_loss_breakdown
            Whether to return the parts of the loss as well.
        indices, topk, codebook_transform_fn, ema_update_weight
            Of vector-quantize-pytorch; not offered.
        accum_ema_update
            Only keep this batch's statistics, for the next call without it to include: one update for several batches.

        Returns
        -------
        quantized, as x, in training with a gradient for x, in evaluation the codes themselves; indices int64, x's shape
        without features, (..., heads) for several, -1 for padding; loss () float32, zero in evaluation. With
        return_loss_breakdown, also a LossBreakdown.

        Raises
        ------
        TypeError, ValueError
            For an input that does not fit or, on the CPU, is not finite.
        NotImplementedError
            For an option of vector-quantize-pytorch that is not offered.
        """
        given = (indices, topk, codebook_transform_fn, ema_update_weight)
        refuse_unoffered(
            "VectorQuantize.forward", dict(zip(UNOFFERED_IN_FORWARD, given, strict=True)), UNOFFERED_IN_FORWARD
        )
        mask = self._check(x, mask, lens)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        book = self._codebook
        moved = self._features_to_end(x)
        rows, kept = self._rows(moved, mask)
        if not self.training:
            rows = [part.detach() for part in rows]
        book.initialise(rows, kept)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        temperature = temperature if self.stochastic_sample_codes and self.training else 0.0
        embed = book.embed if self.learnable_codebook and not frozen else book.embed.detach()
        parts = book.search(rows, kept, embed, self.estimator, temperature, "VectorQuantize")
        if self.training and not frozen:
            book.update(rows, [p.indices for p in parts], kept, ema_update=ema_update, accumulate=accum_ema_update)

        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        commitment = torch.stack([p.commitment for p in parts]).mean()
        if embed.requires_grad:  # one value, two gradients
            error = torch.stack([p.codebook_error for p in parts]).mean()
            commitment = commitment + (error - error.detach())
        loss = zero
        if self.training and not torch.compiler.is_compiling():
            loss = zero.clone().requires_grad_()  # backward() of a loss without commitment does nothing, but works
        if self.training and self.commitment_weight > 0:
            loss = loss + commitment * self.commitment_weight

        passes = self.training and x.requires_grad
        quantized = self._outputs([p.quantized for p in parts], passes, embed, [p.indices for p in parts])
        quantized = self.project_out(quantized.to(x.dtype)).reshape(moved.shape)
        chosen = torch.stack([p.indices for p in parts], -1) if len(parts) > 1 else parts[0].indices
        chosen = chosen.reshape(*moved.shape[:-1], *((self.heads,) if self.heads > 1 else ()))
        if mask is not None:
            padding = quantized.new_zeros(()) if self.return_zeros_for_masked_padding else moved
            quantized = torch.where(mask[..., None], quantized, padding)
        parts_of_loss = (LossBreakdown(commitment, zero, zero, zero),) if return_loss_breakdown else ()
        return self._features_back(quantized), chosen, loss, *parts_of_loss

    def _outputs(self, quantized: list[Tensor], passes: bool, embed: Tensor, indices: list[Tensor]) -> Tensor:
        """(N, codebook_dim * heads). Where gradients do not pass to the input, they go to codes that are learned."""
        if not passes and embed.requires_grad:
            quantized = [look_up("VectorQuantize", i, c) for i, c in zip(indices, embed, strict=True)]
        elif not passes:
            quantized = [part.detach() for part in quantized]
        out = torch.stack(quantized, 1) if len(quantized) > 1 else quantized[0]
        return out.reshape(-1, self.codebook_dim * self.heads)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Move the codebook as if a call in training had found these indices for x."""
        mask = self._check(x, mask, None)
        rows, kept = self._rows(self._features_to_end(x), mask)
        chosen = list(indices.reshape(-1, self.heads).unbind(1)) if len(rows) > 1 else [indices.reshape(-1)]
        self._codebook.update(rows, [c if kept is None else torch.where(kept, c, -1) for c in chosen], kept)

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Replace dead codes by vectors of x."""
        mask = self._check(x, mask, None)
        self._codebook.expire(*self._rows(self._features_to_end(x), mask))
