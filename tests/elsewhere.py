"""A device that is not the CPU, on machines that have none: what mixes its tensors with the CPU's fails, as on a GPU.

By name it is PyTorch's "lazy", which needs no start and no streams. Its tensors' values are kept on the CPU, wrapped,
and ops run on those; fastgen's run the reference.
"""

import ctypes
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy:0")
ANYWHERE = ("copy_", "_to_copy", "index.Tensor", "index_put", "_index_put_impl")  # ops that take tensors of two devices

LAZY, META = 17, 14  # in c10::DeviceType
GUARDS = (ctypes.c_void_p * 18).in_dll(  # what PyTorch calls to make a device the current one
    ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
)


class Wrapped(torch.Tensor):
    """Says that it is elsewhere; `inner` is on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self):
        return f"Wrapped({self.inner!r})"

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within it `device=DEVICE` and `.to(DEVICE)` give such tensors; modules can go there and come back.

    `ops` counts what took any.
    """

    def __enter__(self):
        self.ops = 0
        torch._C._set_only_lift_cpu_tensors(True)
        self.guard, GUARDS[LAZY] = GUARDS[LAZY], GUARDS[META]
        self.swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_swap_module_params_on_conversion(self.swapped)
        torch._C._set_only_lift_cpu_tensors(False)
        GUARDS[LAZY] = self.guard
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += any(isinstance(x, Wrapped) for x in pytree.tree_leaves(args))
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    name, leaves = str(func).removeprefix("aten."), pytree.tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    wrapped = [x for x in tensors if isinstance(x, Wrapped)]
    asked = kwargs.get("device")
    there = bool(wrapped) if asked is None else torch.device(asked) == DEVICE
    if wrapped and not name.startswith(ANYWHERE):
        strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Wrapped) and x.dim()]
        assert not strangers, f"{name}: tensors elsewhere and on the CPU, {strangers}"
    assert not there or kwargs.get("generator") is None, f"{name}: the CPU's generator, for a tensor elsewhere"
    args, kwargs = pytree.tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, dict(kwargs)))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if not there:
        return out
    kept = {id(x.inner): x for x in wrapped}  # what ops in place return
    wrap = lambda x: (kept[id(x)] if id(x) in kept else Wrapped(x)) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return pytree.tree_map(wrap, out)
