"""Two processes that train one codebook: bit for bit the same on both, whatever each of them sees."""

from distributed_helpers import run_two

WORKER = """
import sys, torch
import torch.distributed as dist
from fastgen.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
torch.set_num_threads(1)
calls = []
original = dist.all_reduce
dist.all_reduce = lambda *a, **k: (calls.append(1), original(*a, **k))[1]


def same(module):
    for name, value in module.state_dict().items():
        other = [torch.empty_like(value.float()) for _ in range(2)]
        dist.all_gather(other, value.float().contiguous())
        assert torch.equal(*other), name


for case, options in enumerate((
    {}, {"use_cosine_sim": True}, {"kmeans_init": True}, {"threshold_ema_dead_code": 3},
    {"kmeans_init": True, "threshold_ema_dead_code": 3, "heads": 2, "codebook_dim": 4,
     "separate_codebook_per_head": True},
)):
    torch.manual_seed(0)
    b = VectorQuantize(8, 32, **options)
    torch.manual_seed(100 * case + rank)  # from here on, ranks draw differently
    for step in range(10):
        rows = 0 if (rank == 1 and step in (0, 4)) else 50 + 7 * rank
        calls.clear()
        b(torch.randn(1, rows, 8) + rank)
        assert step == 0 or len(calls) == 1, (options, step, len(calls))
    same(b)
    assert torch.isfinite(b.codebook).all()

# the sum over ranks is what one process sees of all rows
torch.manual_seed(0)
b, alone = VectorQuantize(8, 32), VectorQuantize(8, 32, sync_codebook=False)
alone.load_state_dict(b.state_dict())
x = torch.randn(2, 40, 8)
b(x[rank:rank + 1]); alone(x)
torch.testing.assert_close(b.codebook, alone.codebook)

torch.manual_seed(rank)
options = {"quantize_dropout": True, "kmeans_init": True, "threshold_ema_dead_code": 1}
r = ResidualVQ(dim=8, num_quantizers=4, codebook_size=16, **options)
g = GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=16, shared_codebook=True)
for module in (r, g):
    for p in [*module.parameters(), *module.buffers()]:
        dist.broadcast(p.data, 0)
    for _ in range(5):
        module(torch.randn(1, 30, 8))
    same(module)
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_two_processes_agree(tmp_path):
    run_two(tmp_path, WORKER)
