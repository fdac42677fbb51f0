"""Two processes that train one flow: the same initialisation and the same gradients on both, reversible or not."""

from distributed_helpers import run_two

WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fastgen.models import Glow
from fastgen.nn import ActNorm

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
torch.set_num_threads(1)


def same(module, what):
    for name, value in module.state_dict().items():
        other = [torch.empty_like(value.float()) for _ in range(2)]
        dist.all_gather(other, value.float().contiguous())
        assert torch.equal(*other), (what, name)


torch.manual_seed(0)
everything = torch.randn(30, 3, 4) * 3 + 1
alone = ActNorm(3)
both = ActNorm(3)
both(everything[:10] if rank == 0 else everything[10:])
same(both, "actnorm")
flat = everything.movedim(1, 0).flatten(1)
torch.testing.assert_close(both.log_scale, -flat.std(1, correction=0).log(), atol=1e-5, rtol=1e-5)
empty = ActNorm(3)
empty(everything[:10] if rank == 0 else everything[:0])
same(empty, "a rank without examples")

images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
finished = []
for reversible in (False, True):
    torch.manual_seed(1)
    model = Glow((1, 8, 8), scales=2, steps=2, hidden=8, reversible=reversible)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(4):
        x = images[rank::2]
        # DDP hooks forward: the whole likelihood is one call of it
        torch.manual_seed(10 * step + rank)
        v = (x.float() + torch.rand(x.shape)) / 256 - 0.5
        model.forward = model.flow.forward
        parts, log_det = parallel(v)
        loss = (sum(p.square().flatten(1).sum(1) for p in parts) / 2 - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(model, f"reversible={reversible}")
    finished.append([p.detach().clone() for p in model.parameters()])
for a, b in zip(*finished):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_two_processes_agree(tmp_path):
    run_two(tmp_path, WORKER)
