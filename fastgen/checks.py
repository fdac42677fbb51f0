"""Checks of arguments: the errors name the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.weight_norm import WeightNorm

from fastgen.backend import HAS_BFLOAT16, ON_X86, TRITON_OPS

F = TypeVar("F", bound=torch.autograd.Function)

LISTED = 8  # names in one message
PYTORCH_OPS = ("causal_attention", "linear")  # that on a GPU are PyTorch's own, float16 too
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_integer(op: str, name: str, value: Any, least: int = 1, *, unit: str = "") -> None:
    """An int (SymInt while tracing) >= `least`; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise ValueError(f"{op}: {name} must be an integer >= {least}{unit}, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether `value` is a finite number (or one while tracing); True and False are none."""
    number = isinstance(value, int | float | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf


def check_positive(op: str, name: str, value: Any) -> None:
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and > 0, got {value!r}")


def check_temperature(op: str, temperature: Any) -> None:
    """Between bounds within which float32 can divide logits by it."""
    check_positive(op, "temperature", temperature)
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"{op}: temperature must lie in [1e-30, 1e30], got {temperature}")


def check_truncation(op: str, top_k: Any, top_p: Any, kind: str) -> None:
    """Of the distribution that a sample is drawn from, of a kind that `distributions` knows."""
    if top_k is not None:
        check_integer(op, "top_k", top_k)
    if top_p is not None and not (is_finite(top_p) and 0 < top_p <= 1):
        raise ValueError(f"{op}: top_p must be a float in (0, 1], got {top_p!r}")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and kind != "categorical":
            raise ValueError(f"{op}: {name} is for categorical outputs, got {value!r} where they are {kind}")


def check_generator(op: str, generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")


def check_tensor(op: str, name: str, value: Any, wanted: str = "") -> None:
    """`wanted` says in words what the tensor should hold."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor{wanted and ' '}{wanted}, got {type(value).__name__}")


def check(
    op: str, name: str, tensor: Tensor, like: Tensor, shape: tuple[int | None, ...], *, of: str = "x"
) -> None:  # fmt: skip
    """Rank, sizes (None: any), dtype and device of one argument, against those of x, or of the argument `of`."""
    check_tensor(op, name, tensor)
    size = tensor.shape
    fits = len(size) == len(shape)
    if fits:
        for n, m in zip(shape, size, strict=True):
            if n is not None and n != m:
                fits = False
    if not fits:
        wanted = tuple("any" if n is None else n for n in shape)
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(size)}")
    half = tensor.dtype == torch.float16 and tensor.is_cuda and (op in TRITON_OPS or op in PYTORCH_OPS)
    if tensor.dtype not in DTYPES and not half:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float64, got {tensor.dtype}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, {of} is {like.dtype}; all tensors must share one dtype")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, {of} is on {like.device}")


def check_channels(op: str, x: Tensor, weight: Tensor, *, of_x: int = 1, of_weight: int = 1) -> None:
    """x has as many channels as the weight has inputs. A layer's weight is as it should be: x is named."""
    if x.shape[of_x] != weight.shape[of_weight]:
        raise ValueError(
            f"{op}: x must have {weight.shape[of_weight]} channels, as the weight has, got {x.shape[of_x]}: "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}"
        )


def under_autocast(device: torch.device) -> bool:
    """Whether torch.autocast is on there; where PyTorch has none ("meta") it would raise."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast(op: str, x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """x and the others; under torch.autocast, in its dtype."""
    check_tensor(op, "x", x)
    device, tensors = x.device, (x, *others)
    if not under_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cpu" and dtype == torch.float16:  # which no kernel takes there
        return tensors
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _casts(t) else t for t in tensors)


def _casts(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def widest(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast all in the widest of their dtypes, at least float32: what is compared must be exact."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # which is then refused by name
    if not under_autocast(tensors[0].device):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def keep_dtype(op: str, x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """x and the others; under torch.autocast the others in x's dtype: what is inverted must stay exact."""
    check_tensor(op, "x", x)
    if not under_autocast(x.device):
        return x, *others
    return x, *(t.to(x.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in others)


class _Positional(inspect.Signature):
    """Of a function without defaults that is called by position: there is nothing to bind."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args)


class _Bound:
    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs = args, dict[str, Any]()

    def apply_defaults(self) -> None:
        pass


def quick_apply(function: type[F]) -> type[F]:
    """For an autograd function with `setup_context`, called by position: its signature is not bound at every call.

    That takes PyTorch 50 us.
    """
    forward: Any = function.forward
    forward.__signature__ = _Positional(list(inspect.signature(forward).parameters.values()))
    return function


class _FirstOrder(torch.autograd.Function):
    """Returns the first `count` tensors, as depending on all of them; to differentiate what it returns raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "fastgen: the kernels have first-order gradients only, and this is a derivative of a gradient; "
            "backend='reference' has all orders"
        )


class _Unpacked:
    """An autograd function's context whose saved tensors have been asked for already: hooks may allow it once."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For an autograd function's backward: what differentiates its gradients raises.

    PyTorch's `once_differentiable` drops terms in silence where the gradient that comes in needs no derivative itself.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        of = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        found = [t for t in results if isinstance(t, Tensor)]
        marked = iter(_FirstOrder.apply(len(found), *found, *of))  # type: ignore[no-untyped-call]
        return tuple(next(marked) if isinstance(t, Tensor) else t for t in results)

    return checked


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within it, products on x's device keep the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x.device) else contextlib.nullcontext()


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a call must go through autograd: for a backward pass, or to refuse forward-mode differentiation."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # a trace takes up ops, and of an autograd function nothing that would run again
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_target(op: str, name: str, tensor: Tensor) -> None:
    """Raise where PyTorch would not let a tensor be written into: it does not see what a kernel writes."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{op}: {name} must not require gradients, or call under torch.no_grad()")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: {name} is an inference tensor; write into it under torch.inference_mode()")


def count_writes(*tensors: Tensor) -> None:
    """Count up the versions of tensors that a kernel has written into: autograd then refuses to use former values."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def renew_weights(module: torch.nn.Module) -> None:
    """Compute the weights of `torch.nn.utils.weight_norm` anew: it does so only when a module is called."""
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                hook(part, ())


def check_weights(name: str, module: torch.nn.Module) -> None:
    """Parameters that are finite, before anything is drawn with them."""
    bad = next((n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all())), None)
    if bad is not None:
        raise ValueError(f"{name}: weights must be finite, {bad} is not")


def readable(x: Tensor) -> bool:
    """Whether values can be asked for: not on the device meta, nor in code that is being compiled or traced."""
    return x.device.type != "meta" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _vectorises() -> bool:
    """Within torch.vmap, under which PyTorch's own ops take a batch at once, and the kernels each example alone."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.maybe_current_level() is None:
        return False
    return any(level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack())


def stands_in(x: Tensor, *, bfloat16: bool = False) -> bool:
    """Whether a layer that stands in for PyTorch's may run a kernel for the CPU.

    torch.jit.trace and torch.vmap are left to PyTorch, and so are processors other than x86, whose PyTorch has not been
    compared. Of bfloat16, by autocast or not, only what `bfloat16` says is faster, unless the processor has no
    instructions for it: PyTorch is slow there.
    """
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not ON_X86:
        return False
    if torch.jit.is_tracing() or _vectorises():  # type: ignore[attr-defined]
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and (bfloat16 or not HAS_BFLOAT16))


def permutation_fault(order: Tensor, size: int) -> str | None:
    """Why `order` does not hold each of 0 to size - 1 once."""
    fits = order.shape == (size,) and order.dtype == torch.int64
    if fits and (not readable(order) or torch.equal(order.sort().values.cpu(), torch.arange(size, device="cpu"))):
        return None
    shown = f" {order.tolist()[:10]}{' ...' if size > 10 else ''}" if fits else ""
    return f"must hold each of 0 to {size - 1} once, got {order.dtype} {tuple(order.shape)}{shown}"


def refuses_order(name: str, own: Tensor, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> bool:
    """Whether a state that is being loaded has an order of the right shape that is none; says so among the errors."""
    order = state_dict.get(f"{prefix}order")
    fault = permutation_fault(order, len(own)) if isinstance(order, Tensor) and order.shape == own.shape else None
    if fault:
        errors.append(f"{name}: {prefix}order {fault}")
    return fault is not None


def check_unit_range(op: str, name: str, x: Tensor) -> None:
    """Values in [-1, 1]; NaN is outside."""
    if x.numel() and readable(x) and not bool((x.detach().abs() <= 1).all()):
        raise ValueError(f"{op}: {name} must lie in [-1, 1], got {float(x.min())} to {float(x.max())}")


def check_classes(op: str, name: str, x: Tensor, classes: int) -> None:
    """Integers in [0, classes), where they can be read."""
    if not x.numel() or not readable(x):
        return
    low, high = torch.stack(x.aminmax()).tolist()  # a GPU is waited for once
    if not 0 <= low <= high < classes:
        raise ValueError(f"{op}: {name} must lie in [0, {classes}), got {int(low)} to {int(high)}")


def check_progress(op: str, progress: Any) -> None:
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"{op}: progress must be True, False or a function, got {progress!r}")


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _, mark, text = str(error).partition("fastgen: ")  # torch puts the place in the source before it
        if not mark:
            raise
        raise ValueError(text.splitlines()[0]) from None


def refused() -> contextlib.AbstractContextManager[None]:
    """Within it, what a C++ kernel refuses is a ValueError; traced code keeps the kernel's RuntimeError."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _value_errors()


def listed(names: Sequence[str]) -> str:
    """The names, or the first few and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
