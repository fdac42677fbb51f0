"""The codebook of a vector quantizer: its codes, the moving averages they follow, and how they agree across ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.ops import code_statistics, nearest_code, update_codebook_
from fastgen.ops.nearest_code import Metric
from fastgen.ops.vector_quantize import Estimator, Quantized, quantize, quantize_given

SCORES = 1 << 22  # in memory at a time while codes are sampled


def world() -> tuple[int, int]:
    """(rank, number of ranks) of torch.distributed; (0, 1) without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Codebook(nn.Module):
    """One codebook for each head, with the buffers of vector-quantize-pytorch's `_codebook`.

    State: initted () bool, cluster_size (H, K), embed_avg (H, K, D), embed (H, K, D); embed is a parameter where it is
    learned by gradients.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        heads: int,
        size: int,
        dim: int,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        cosine: bool,
        learnable: bool,
        ema_update: bool,
        manual_ema_update: bool,
        threshold_ema_dead_code: float,
        sync: bool | None,
        sync_kmeans: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.decay, self.eps, self.kmeans_iters = size, decay, eps, kmeans_iters
        self.metric: Metric = "cosine" if cosine else "euclidean"
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.threshold_ema_dead_code, self.sync, self.sync_kmeans = threshold_ema_dead_code, sync, sync_kmeans
        embed = torch.zeros(heads, size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = F.normalize(embed, dim=-1) if cosine else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(heads, size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.ready = not kmeans_init  # `initted`, known without asking the device
        self.pending: Tensor | None = None  # statistics of batches whose update was put off

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.ready = self.initted.device.type != "meta" and bool(self.initted)
        self.pending = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """As for any module, but codes and averages stay float32 where others become shorter."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in (self.cluster_size, self.embed_avg, self.embed):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        return self

    @property
    def synced(self) -> bool:
        """Whether the ranks share one codebook."""
        return self.sync is not False and world()[1] > 1

    def search(
        self, rows: list[Tensor], mask: Tensor | None, embed: Tensor, estimator: Estimator, temperature: float, op: str
    ) -> list[Quantized]:
        """Quantizes the rows (N, D) of each head with `embed` (H, K, D); samples codes at a temperature above 0."""
        if temperature > 0:
            return [_sample(x, c, mask, self.metric, estimator, temperature) for x, c in zip(rows, embed, strict=True)]
        return [
            quantize(op, x, c, mask=mask, metric=self.metric, estimator=estimator)
            for x, c in zip(rows, embed, strict=True)
        ]

    @torch.no_grad()
    def initialise(self, rows: list[Tensor], mask: Tensor | None) -> None:
        """k-means over the rows of all ranks, once; rows of no rank at all leave it for later."""
        if not self.ready:
            self.ready = bool(self.initted)
        if self.ready:
            return
        for head, x in enumerate(rows):
            x = x.detach().to(self.embed.dtype)
            found = self._kmeans(x if mask is None else x[mask])
            if found is None:
                return
            means, counts = found
            self.embed_avg[head].copy_(means * counts[:, None])
            self.cluster_size[head].copy_(counts)
        self.update_ema()
        self.initted.fill_(True)
        self.ready = True

    def _kmeans(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """means (K, D) and the counts of their last assignment."""
        synced = self.synced and self.sync_kmeans
        rank, ranks = world() if synced else (0, 1)
        numbers = torch.zeros(ranks, dtype=torch.int64, device=x.device)
        numbers[rank] = x.shape[0]
        self._sum(numbers, synced)
        if int(numbers.sum()) == 0:
            return None
        # which rank gives each first mean: shares by rows, every one a different row while there are enough
        begins = (numbers.cumsum(0) - numbers).tolist()
        total = int(numbers.sum())
        draws = torch.randperm(total) if total >= self.size else torch.randint(total, (self.size,))
        draws = draws[: self.size].to(x.device)
        if ranks > 1:
            torch.distributed.broadcast(draws, 0)
        mine = (draws >= begins[rank]) & (draws < begins[rank] + x.shape[0])
        means = x.new_zeros(self.size, x.shape[1])
        means[mine] = x[draws[mine] - begins[rank]]
        self._sum(means, synced)
        counts = x.new_zeros(self.size)
        for _ in range(self.kmeans_iters):
            indices, _ = nearest_code(x, means, metric=self.metric)
            counts, sums = code_statistics(x, indices, self.size)
            both = torch.cat((counts[:, None], sums), 1)
            self._sum(both, synced)
            counts, new = both[:, 0], both[:, 1:] / both[:, :1].clamp(min=1)
            if self.metric == "cosine":
                new = F.normalize(new, dim=-1, eps=1e-6)
            means = torch.where(counts[:, None] > 0, new, means)
        return means, counts

    def _sum(self, tensor: Tensor, synced: bool | None = None) -> None:
        if self.synced if synced is None else synced:
            torch.distributed.all_reduce(tensor)

    @torch.no_grad()
    def update(
        self,
        rows: list[Tensor],
        indices: list[Tensor],
        mask: Tensor | None,
        *,
        ema_update: bool | None = None,
        accumulate: bool = False,
    ) -> None:
        """Moves averages, codes and dead codes by one batch: rows (N, D), indices (N,) of each head, -1 left out.

        With `accumulate` the statistics are only kept, for the next update to include.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        replace = self.threshold_ema_dead_code > 0
        if not ema_update and not replace:
            return
        dim = self.embed.shape[-1]
        parts = []
        for x, index in zip(rows, indices, strict=True):
            counts, sums = code_statistics(x.detach(), index, self.size)
            part = [counts[:, None], sums]
            if replace and self.synced:
                part += self._offer(x.detach().to(self.embed.dtype), mask)
            parts.append(torch.cat(part, 1).to(self.embed.dtype))
        statistics = torch.stack(parts)  # (H, K, 1 + D), with a candidate (H, K, 2 + 2 D)
        self._sum(statistics)
        offered, statistics = statistics[..., 1 + dim :], statistics[..., : 1 + dim]
        if self.pending is not None:
            statistics = statistics + self.pending.to(statistics)
            self.pending = None
        if accumulate:
            self.pending = statistics
            return
        for head, (counts, sums) in enumerate((s[:, 0], s[:, 1:]) for s in statistics):
            if ema_update and not self.manual_ema_update:
                update_codebook_(
                    self.cluster_size[head], self.embed_avg[head], self.embed.data[head], counts, sums,
                    decay=self.decay, eps=self.eps, cosine=self.metric == "cosine",
                )  # fmt: skip
            else:
                self.cluster_size[head].lerp_(counts, 1 - self.decay)
                self.embed_avg[head].lerp_(sums, 1 - self.decay)
        if replace:
            self._replace([o if self.synced else None for o in offered], rows, mask)

    @torch.no_grad()
    def update_ema(self) -> None:
        """The codes anew from the averages as they are."""
        for head in range(len(self.embed)):
            size, average = self.cluster_size[head], self.embed_avg[head]
            update_codebook_(
                size, average, self.embed.data[head], size.clone(), average.clone(),
                decay=1.0, eps=self.eps, cosine=self.metric == "cosine",
            )  # fmt: skip

    @torch.no_grad()
    def expire(self, rows: list[Tensor], mask: Tensor | None = None) -> None:
        """Replaces dead codes by rows, the same on all ranks."""
        if self.threshold_ema_dead_code <= 0:
            return
        offers: list[Tensor | None] = [None] * len(rows)
        if self.synced:
            offered = torch.stack([torch.cat(self._offer(x.detach().to(self.embed.dtype), mask), 1) for x in rows])
            self._sum(offered)
            offers = list(offered)
        self._replace(offers, rows, mask)

    def _draw(self, x: Tensor, mask: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """`number` different rows (number, D), drawn without waiting for the device, and which of them exist."""
        n = x.shape[0]
        keys = torch.rand(n, device=x.device)
        if mask is not None:
            keys = keys.masked_fill(~mask, 2.0)
        best = keys.topk(min(number, n), largest=False)
        there = F.pad(best.values < 1.5, (0, number - len(best.values)))
        return F.pad(x[best.indices], (0, 0, 0, number - len(best.values))), there

    def _offer(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """A candidate for each code, from the rank whose turn it is: [whether there is one, the row], else zeros."""
        rank, ranks = world()
        turn = torch.arange(self.size, device=x.device) % ranks == rank
        rows, there = self._draw(x, mask, self.size)
        there = there & turn
        return [there[:, None].to(x.dtype), torch.where(there[:, None], rows, 0)]

    def _replace(self, offers: list[Tensor | None], rows: list[Tensor], mask: Tensor | None) -> None:
        dead = self.cluster_size < self.threshold_ema_dead_code
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(dead.any()):
            return
        for head, (offer, x) in enumerate(zip(offers, rows, strict=True)):
            if offer is None:
                candidates, there = self._draw(x.detach().to(self.embed.dtype), mask, self.size)
            else:
                order = offer[:, 0].argsort(descending=True, stable=True)  # those that exist come first
                candidates, there = offer[order, 1:], offer[order, 0] > 0
            place = (dead[head].cumsum(0) - 1).clamp(min=0)  # the n-th dead code takes the n-th candidate
            chosen = dead[head] & there[place]
            size = self.threshold_ema_dead_code
            new = candidates[place]
            self.embed.data[head].copy_(torch.where(chosen[:, None], new, self.embed.data[head]))
            self.embed_avg[head].copy_(torch.where(chosen[:, None], new * size, self.embed_avg[head]))
            self.cluster_size[head].copy_(torch.where(chosen, size, self.cluster_size[head]))


def look_up(op: str, indices: Tensor, codebook: Tensor) -> Tensor:
    """Codes (..., D) of indices (...), zeros for -1. On the CPU others outside the codebook are an error."""
    size = len(codebook)
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        least, most = int(indices.min()), int(indices.max())
        if least < -1 or most >= size:
            raise ValueError(f"{op}: indices must lie in [-1, {size}), got {least} to {most}")
    return torch.where(indices[..., None] < 0, 0, F.embedding(indices.clamp(min=0), codebook))


def project(layer: nn.Module, codes: Tensor) -> Tensor:
    """layer(codes), in the layer's dtype: a codebook stays float32 in a module that is cast."""
    weight = next(layer.parameters(), codes)
    return layer(codes.to(weight.dtype))  # type: ignore[no-any-return]


def _sample(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: Metric, estimator: Estimator, temperature: float
) -> Quantized:
    """Codes drawn with probability proportional to exp(-distance / temperature), or exp(cosine / temperature)."""
    rows, codes = x.detach().to(codebook.dtype), codebook.detach()
    parts = []
    for r in rows.split(max(1, SCORES // len(codes))):
        logits = r @ codes.T if metric == "cosine" else -torch.cdist(r, codes)
        gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
        parts.append((logits / temperature + gumbel).argmax(1))
    indices = torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.int64)
    return quantize_given(x, codebook, indices, mask, estimator=estimator)
