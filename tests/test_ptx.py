"""Triton's kernels by the code that they are compiled to for a GPU, and the machine that carries it out (tests/ptx)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from op_helpers import INTERPRETED
from ptx.machine import Fault, Machine, Memory
from ptx.program import parse

pytestmark = pytest.mark.skipif(INTERPRETED, reason="starts what is nested itself")

RESULTS = {  # files of tests, and which of them
    "layers": (
        ["wavenet_layer", "masked_conv2d", "triton_paths"],
        "(matches_reference and (local or constant) and 64) or (vertical_stacks and bfloat16) or as_large or "
        "nobody_keeps",
    ),
    "codes": (
        ["nearest_code", "code_statistics", "vector_quantize"],
        "(float32_answer and gaussian) or update_matches or (matches_reference and ((211 and rotation) or 1000))",
    ),
    "images": (["image_lstm"], "matches_reference and bfloat16 and not (anywhere or 28)"),
    "vectors": (["nade"], "(values and dtype0 and (sizes4 or sizes5 or sizes10 or sizes11)) or (samples_of and 0.5)"),
    "elements": (
        ["affine_coupling", "actnorm", "gaussian_rsample_kl"],
        "values_and_gradients and (((exp or actnorm) and sizes5) or 4099 or 33)",
    ),
    "paths": (["triton_paths"], "(gate or layer or images or memory) and not (as_large or nobody_keeps)"),
    "paths of single elements": (["triton_paths"], "sizes_of_one"),
    "paths of the search": (["triton_paths"], "long or undecided"),
}
TARGETS = {what: ("90",) if "paths" in what else ("80", "90", "90 late") for what in RESULTS}
TARGETS |= dict.fromkeys(("elements", "images", "vectors"), ("80", "90 late"))


@pytest.mark.parametrize(("what", "target"), [(what, target) for what in RESULTS for target in TARGETS[what]])
def test_results_by_the_code_for_a_gpu(what, target, again):
    pytest.importorskip("triton", reason="pip install triton")
    files, selection = RESULTS[what]
    environment = {
        "PYTEST_PLUGINS": "ptx.plugin",
        "PYTHONPATH": str(Path(__file__).parent),
        "FASTGEN_BACKEND": "triton",
    }
    check = "import ptx.plugin; from fastgen import backend; assert backend.why_not('actnorm', 'triton') is None"
    again(selection, *files, check=check, FASTGEN_TEST_PTX=target, **environment)


def ran(body, *arguments, threads=32, blocks=1, shared=0, late=False):
    """Carries out the body, of registers %p, %h (16 bits), %r (32) and %d (64); %d0, ... hold tensors' addresses."""
    registers = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<99>;"
    loads = " ".join(f"ld.param.b64 %d{n}, [k_param_{n}];" for n in range(len(arguments)))
    program = parse(f".visible .entry k(\n)\n.reqntid {threads}\n{{ {registers} {loads} {body} ret; }}")
    memory = Memory((t.data_ptr(), t.data_ptr() + t.nbytes) for t in arguments)
    Machine(program, [t.data_ptr() for t in arguments], range(blocks), blocks, shared, memory, late).run()


def computed(body, *operands, dtype=torch.int32):
    """What `body` makes of %r1, %r2, ..., the operands' elements, and leaves in %r0: a thread for each."""
    inputs = [torch.as_tensor(o, dtype=torch.float32 if isinstance(o[0], float) else torch.int32) for o in operands]
    inputs = [torch.nn.functional.pad(t, (0, 32 - len(t))) for t in inputs]
    out = torch.zeros(32, dtype=dtype)
    lines = ["mov.u32 %r90, %tid.x; mul.wide.u32 %d90, %r90, 4;"]
    for n in range(len(inputs)):
        lines.append(f"add.s64 %d91, %d{n + 1}, %d90; ld.global.b32 %r{n + 1}, [%d91];")
    ran("".join(lines) + body + "add.s64 %d92, %d0, %d90; st.global.b32 [%d92], %r0;", out, *inputs)
    return out[: len(operands[0])].tolist()


@pytest.mark.parametrize(
    ("body", "operands", "expected"),
    [
        ("div.s32 %r0, %r1, %r2;", ([7, -7, 7, -7, -8], [2, 2, -2, -2, 2]), [3, -3, -3, 3, -4]),
        ("rem.s32 %r0, %r1, %r2;", ([7, -7, 7], [2, 2, -2]), [1, -1, 1]),
        ("div.u32 %r0, %r1, %r2;", ([-1], [2]), [2**31 - 1]),
        ("shl.b32 %r0, %r1, %r2;", ([1, 1, 3], [31, 32, 1]), [-(2**31), 0, 6]),
        ("shr.s32 %r0, %r1, %r2;", ([-8, -8, 8], [1, 40, 40]), [-4, -1, 0]),
        ("shr.u32 %r0, %r1, %r2;", ([-8, -8], [1, 32]), [2**31 - 4, 0]),
        ("bfe.s32 %r0, %r1, 4, 4;", ([0xF0, 0x70], [0, 0]), [-1, 7]),
        ("bfe.u32 %r0, %r1, 4, 4;", ([0xF5, 0x70], [0, 0]), [15, 7]),
        ("mul.hi.u32 %r0, %r1, %r2;", ([-1, 1 << 16], [-1, 1 << 16]), [-2, 1]),
        ("mad.lo.s32 %r0, %r1, %r2, -1;", ([3, 1 << 20], [5, 1 << 20]), [14, -1]),
        ("prmt.b32 %r0, %r1, %r2, 0x9174U;", ([0x04838201], [0x14131211]), [-0x7DEBEF]),
        ("shf.l.wrap.b32 %r0, %r1, %r2, 8;", ([-1], [0]), [255]),
        ("popc.b32 %r0, %r1;", ([-1, 5], [0, 0]), [32, 2]),
        ("cvt.s16.s32 %h1, %r1; cvt.s32.s16 %r0, %h1;", ([0x18000, 5], [0, 0]), [-0x8000, 5]),
        ("cvt.rzi.s32.f32 %r0, %r1;", ([1.7, -1.7, 3e38], [0.0] * 3), [1, -1, 2**31 - 1]),
        ("cvt.rni.s32.f32 %r0, %r1;", ([1.5, 2.5], [0.0] * 2), [2, 2]),
        ("min.f32 %r1, %r1, %r2; cvt.rni.s32.f32 %r0, %r1;", ([float("nan"), 2.0], [3.0, 1.0]), [3, 1]),
        ("setp.lt.f32 %p1, %r1, %r2; selp.b32 %r0, 1, 0, %p1;", ([float("nan"), 1.0], [1.0, 2.0]), [0, 1]),
        ("setp.geu.f32 %p1, %r1, %r2; selp.b32 %r0, 1, 0, %p1;", ([float("nan"), 1.0], [1.0, 2.0]), [1, 0]),
        ("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", ([1.0, 1.00390625], [-2.0, 1.01171875]), [0x3F80C000, 0x3F803F82]),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_instructions(body, operands, expected):
    assert computed(body, *operands) == expected


def test_sums_of_products_are_rounded_once():
    a, b = [1 + 2.0**-12, 3.0], [1 - 2.0**-12, 5.0]
    assert computed("fma.rn.f32 %r0, %r1, %r2, 0fBF800000;", a, b, dtype=torch.float32) == [-(2.0**-24), 14.0]


def test_exchanges_within_a_warp():
    values = list(range(32))
    assert computed("shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;", values) == [i ^ 5 for i in range(32)]
    assert computed("shfl.sync.idx.b32 %r0, %r1, 3, 31, -1;", values) == [3] * 32
    assert computed("shfl.sync.up.b32 %r0, %r1, 1, 0, -1;", values) == [0, *range(31)]
    with pytest.raises(Fault, match="have parted"):
        computed("setp.lt.s32 %p1, %r1, 7; @%p1 shfl.sync.idx.b32 %r0, %r1, 3, 31, -1;", values)


def test_threads_part_and_meet_again():
    """Each of them adds up the numbers below its own; all of them then meet at a barrier."""
    body = """
        mov.b32 %r0, 0; mov.b32 %r5, 0;
        again: setp.ge.s32 %p1, %r5, %r1; @%p1 bra done;
        add.s32 %r0, %r0, %r5; add.s32 %r5, %r5, 1; bra again;
        done: bar.sync 0; setp.eq.s32 %p1, %r1, 3; @!%p1 bra rest; mov.b32 %r0, -1; rest:
    """
    expected = [i * (i - 1) // 2 for i in range(32)]
    expected[3] = -1
    assert computed(body, list(range(32))) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %d1, %d0, 128; ld.global.b32 %r1, [%d1];", "in no tensor"),
        ("ld.global.b32 %r1, [%d0+-4];", "in no tensor"),
        ("ld.global.v2.b32 {%r1, %r2}, [%d0+4];", "not a multiple of 8"),
        ("st.global.b32 [%d0+126], %r1;", "in no tensor|not a multiple of 4"),
        ("mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 3; st.shared.b32 [%r1], %r1;", "of 128 of shared memory"),
        ("mov.u32 %r1, %tid.x; setp.eq.s32 %p1, %r1, 3; @%p1 bra far; bar.sync 0; far:", "have parted"),
        ("mov.b32 %r1, 0; mbarrier.init.shared::cta.b64 [%r1], 33; mov.b32 %r2, 0; again: "
         "mbarrier.try_wait.parity.shared.b64 %p1, [%r1], %r2; @!%p1 bra again;", "never comes"),
        ("add.sat.s32 %r1, %r2, %r3;", "clamped"),
        ("mov.u32 %r1, %tid.x; add.s32 %strange, %r1, 1;", "is no register"),
        ("unheard.of.b32 %r1, %r2;", "unheard"),
    ],
    ids=[
        "behind", "before", "unaligned", "half behind", "shared", "barrier", "waits", "clamped", "undeclared",
        "unknown",
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        ran(body, torch.zeros(32, dtype=torch.int32), shared=128)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_copies_that_nobody_waits_for(waits, late):
    out, x = torch.zeros(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32)
    ran(
        f"""
        mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 2; cvt.u64.u32 %d3, %r1; add.s64 %d2, %d1, %d3; add.s64 %d4, %d0, %d3;
        cp.async.ca.shared.global [%r1], [%d2], 4; cp.async.commit_group; {"cp.async.wait_group 0;" if waits else ""}
        bar.sync 0; ld.shared.b32 %r2, [%r1]; st.global.b32 [%d4], %r2;
        """,
        out, x, shared=128, late=late,
    )  # fmt: skip
    assert torch.equal(out, x) == (waits or not late)
    assert torch.equal(out, torch.full_like(out, -1)) == (late and not waits), "what was not written is not a number"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("meets", [False, True])
def test_what_other_warps_write_before_a_barrier(meets, late):
    out = torch.zeros(64, dtype=torch.int32)
    ran(
        f"""
        mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; {"bar.sync 0;" if meets else ""}
        xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d0, %d3;
        st.global.b32 [%d4], %r4;
        """,
        out, threads=64, shared=256, late=late,
    )  # fmt: skip
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32) == (meets or not late)


def test_blocks_add_to_one_number_and_have_shared_memory_of_their_own():
    out = torch.zeros(1, dtype=torch.int32)
    ran(
        """
        mov.b32 %r1, 0; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; setp.eq.s32 %p1, %r3, 0;
        @%p1 st.shared.b32 [%r1], %r2; bar.sync 0; ld.shared.b32 %r4, [%r1];
        @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%d0], %r4;
        """,
        out, blocks=5, shared=16,
    )  # fmt: skip
    assert out.item() == 10


def test_products_of_matrices():
    """ldmatrix and mma as their documentation has them: 16 x 16 by 16 x 8."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(-4, 5, size).astype("f4")) for size in ((16, 16), (8, 16)))
    out = torch.zeros(16, 8)
    ran(
        """
        mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 15; shr.u32 %r3, %r1, 4; shl.b32 %r4, %r2, 5; shl.b32 %r5, %r3, 4;
        mul.wide.u32 %d10, %r1, 16; add.s64 %d11, %d1, %d10; shl.b32 %r6, %r1, 4;
        ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d11]; st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};
        setp.lt.s32 %p1, %r1, 16; add.s64 %d12, %d2, %d10; @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d12];
        @%p1 st.shared.v4.b32 [%r6+512], {%r10, %r11, %r12, %r13}; bar.sync 0;
        add.s32 %r7, %r4, %r5; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r7];
        and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 5; bfe.u32 %r9, %r1, 3, 1; shl.b32 %r9, %r9, 4; add.s32 %r8, %r8, %r9;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r24, %r25}, [%r8+512]; mov.b32 %r30, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r40, %r41, %r42, %r43}, {%r20, %r21, %r22, %r23},
            {%r24, %r25}, {%r30, %r30, %r30, %r30};
        shr.u32 %r50, %r1, 2; and.b32 %r51, %r1, 3; shl.b32 %r50, %r50, 5; shl.b32 %r51, %r51, 3;
        add.s32 %r50, %r50, %r51; cvt.u64.u32 %d20, %r50; add.s64 %d20, %d20, %d0;
        st.global.v2.b32 [%d20], {%r40, %r41}; st.global.v2.b32 [%d20+256], {%r42, %r43};
        """,
        out, a.bfloat16(), b.bfloat16(), shared=1024,
    )  # fmt: skip
    assert torch.equal(out, a @ b.T)
