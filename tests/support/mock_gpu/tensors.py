"""A device that is not there: PyTorch's PrivateUse1 slot, implemented in Python on the CPU.

A `DeviceTensor` reports the device ``mockgpu:0`` and holds a CPU tensor with the real values. What a program does with
it arrives in `_dispatch`, below autograd, which checks what CUDA would check, counts it, and computes on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mock_gpu.counts import COUNTS

NAME = "mockgpu"
DEVICE = torch.device("privateuseone", 0)  # the name that the slot has before `register`; afterwards it prints as NAME

# No kernel runs for these, nor for views.
_FREE = {"empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty", "_unsafe_view", "set_", "resize_"}
_FREE |= {"_local_scalar_dense"}
# Questions about tensors of any device, which the host answers.
_ASKING = {"_has_compatible_shallow_copy_type", "is_same_size"}
# The shape of the result, or what the host does next, depends on values: CUDA waits for them.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique2", "equal"}
_WAITING |= {"is_nonzero", "bincount", "_linalg_check_errors", "repeat_interleave"}
_COPYING = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "_foreach_copy_"}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"}
_JOINING = {"cat", "stack"}  # not even a CPU tensor without dimensions
# What PyTorch calls on devices of the PrivateUse1 slot alone.
_SLOT = ("_copy_from", "convolution_overrideable", "convolution_backward_overrideable")
_ANY_SIZE = 1 << 50  # bytes claimed for a wrapper's storage, which is not there: no view of it is out of bounds


class DeviceTensor(Tensor):
    """A tensor on the device; `held` has its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            storage_size=_ANY_SIZE,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        """Everything is done in ``__new__``."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy it first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return DeviceTensor(self.held)  # with a version counter of its own

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError(f"incompatible tensor type: expected one on {DEVICE}, got one on {value.device}")
        self.held = value.held
        _restate(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        if id(self) not in memo:
            made = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made.requires_grad_(self.requires_grad)
            if self.grad is not None:
                made.grad = self.grad.__deepcopy__(memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds CPU tensors, which load on a machine without the device."""
        COUNTS.waited()
        held = self.held.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            held = torch.nn.Parameter(held, self.requires_grad)
        return held.__reduce_ex__(protocol)


@dataclass(frozen=True)
class _Operation:
    """What there is to know about an operator of PyTorch.

    Args:
        name: without namespace and overload.
        composite: whether it is made of others; in inference mode such ones arrive whole.
        free: no kernel runs for it.
        view: whether the result may share memory with an argument.
        changes: whether it writes to an argument.
        reshapes: whether it may change the shape of an argument.
    """

    name: str
    composite: bool
    free: bool
    view: bool
    changes: bool
    reshapes: bool


@functools.cache
def _operation(func: Any) -> _Operation:
    schema = func._schema
    name = schema.name.partition("::")[2]
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    changes = any(alias.is_write for alias in aliases)
    moved = torch.Tag.inplace_view in func.tags
    out = any(argument.is_out for argument in schema.arguments)
    view = bool(aliases) and not changes
    free = name in _FREE or moved or view
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Operation(
        name, composite, free, view, changes, moved or out or name in ("resize_", "set_", "_copy_from_and_resize")
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check, count and compute one operation of which a tensor, or the result, is on the device."""
    op = _operation(func)
    if op.composite and op.name not in _ASKING:
        return func.decompose(*args, **kwargs)
    leaves = [leaf for value in (*args, *kwargs.values()) for leaf in _leaves(value)]
    here = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
    asked = kwargs.get("device")
    to_device = bool(here) if asked is None else torch.device(asked).type == NAME
    if op.name in _ASKING:
        pass
    elif op.name in _COPYING:
        _count_copy(op.name, args, kwargs, to_device)
    else:
        _check(op, func, args, leaves, there)
        _count(op, args)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    func, args = _on_cpu(func, op.name, args)
    # A view of an ordinary tensor is an ordinary tensor, even in inference mode.
    ordinary = op.view and torch.is_inference_mode_enabled() and not any(tensor.is_inference() for tensor in here)
    with torch.inference_mode(False) if ordinary else contextlib.nullcontext():
        return _compute(func, op, args, kwargs, here, to_device)


def _compute(
    func: Any, op: _Operation, args: Any, kwargs: dict[str, Any], here: list[DeviceTensor], to_device: bool
) -> Any:
    values, options = tree_map(_held, (args, kwargs))
    result = func(*values, **options)
    if op.reshapes:
        for tensor in here:
            _restate(tensor)
    if not to_device:
        return result
    known = {id(tensor.held): tensor for tensor in here}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return value if any(value is argument for argument in args) else DeviceTensor(value)

    return tree_map(placed, result)


def _on_cpu(func: Any, name: str, args: Any) -> tuple[Any, Any]:
    """The operation that computes on the CPU what is named otherwise for devices of the PrivateUse1 slot."""
    if name == "_copy_from":
        return torch.ops.aten.copy_.default, (args[1], args[0])
    if name == "convolution_overrideable":
        return torch.ops.aten.convolution.default, args
    if name == "convolution_backward_overrideable":
        gradient, image, weight, *settings, wanted = args
        bias = [weight.shape[0] * settings[-1] if settings[-3] else weight.shape[0]] if wanted[2] else None
        return torch.ops.aten.convolution_backward.default, (gradient, image, weight, bias, *settings, wanted)
    return func, args


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _restate(tensor: DeviceTensor) -> None:
    """Tell the wrapper the shape that its values have taken."""
    held = tensor.held
    python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
    with torch._C._ExcludeDispatchKeyGuard(python):
        torch.ops.aten.as_strided_.default(tensor, held.shape, held.stride(), held.storage_offset())


def _check(op: _Operation, func: Any, args: Any, leaves: list[Any], there: list[Tensor]) -> None:
    """Raise what CUDA raises for tensors and generators of the CPU."""
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    refused = there
    if op.name in _INDEXING and isinstance(args[0], DeviceTensor):
        refused = [value for value in args[2:3] if any(value is tensor for tensor in there)]  # indices may be there
    if op.name not in _JOINING and not (op.changes and any(args[0] is tensor for tensor in there)):
        refused = [tensor for tensor in refused if tensor.ndim]
    if refused:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({func})"
        )


def _count(op: _Operation, args: Any) -> None:
    COUNTS.kernels += not op.free
    if op.name in _WAITING:
        COUNTS.waited()
    if op.name in _INDEXING:
        for index in args[1]:
            if isinstance(index, DeviceTensor) and index.dtype in (torch.bool, torch.uint8):
                COUNTS.waited()
            elif isinstance(index, Tensor) and not isinstance(index, DeviceTensor):
                COUNTS.copied_in(blocking=True)


def _count_copy(name: str, args: Any, kwargs: dict[str, Any], to_device: bool) -> None:
    if name == "_to_copy":
        source, target_here = args[0], to_device
    elif name.startswith("_copy_from"):
        source, target_here = args[0], isinstance(args[1], DeviceTensor)
    else:
        source, target_here = args[1], isinstance(args[0], DeviceTensor)
    if name == "_foreach_copy_":
        blocking = not (len(args) > 2 and args[2])
        for target, value in zip(args[0], args[1], strict=True):
            _count_one_copy(isinstance(value, DeviceTensor), isinstance(target, DeviceTensor), blocking, kernel=False)
        COUNTS.kernels += 1
        return
    blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    _count_one_copy(isinstance(source, DeviceTensor), target_here, blocking)


def _count_one_copy(source_here: bool, target_here: bool, blocking: bool, kernel: bool = True) -> None:
    if target_here and not source_here:
        COUNTS.copied_in(blocking)
    elif source_here and not target_here:
        if blocking:
            COUNTS.waited()
    else:
        COUNTS.kernels += kernel


# ---- registration ----


def _backend_module() -> types.ModuleType:
    """What PyTorch looks for as ``torch.mockgpu``."""
    module = types.ModuleType(f"torch.{NAME}")
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "manual_seed": lambda seed: None,  # what is drawn on the device comes from the CPU's generator
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: COUNTS.waited(),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    vars(module).update(functions)
    return module


_PRIVATE = (
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
    "torch.Tensor._make_wrapper_subclass",
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._dispatch_get_registrations_for_dispatch_key",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
)


def why_unavailable() -> str:
    """The reason why this PyTorch cannot have the device, empty where it can. It registers nothing."""
    missing = []
    for path in _PRIVATE:
        try:
            functools.reduce(getattr, path.split(".")[1:], torch)
        except AttributeError:
            missing.append(path)
    if not hasattr(sys.modules["torch.optim.optimizer"], "_foreach_supported_types"):
        missing.append("torch.optim.optimizer._foreach_supported_types")
    return f"this PyTorch has no {', '.join(missing)}" if missing else ""


@functools.cache
def register() -> torch.library.Library:
    """Make the device known to this process, for good: a process that does other things should not."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_backend_module())
    torch.autograd.set_multithreading_enabled(False).__enter__()  # the backward pass keeps the lines that caused it
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to(device)` keeps a module's parameter objects
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(DeviceTensor)  # as CUDA's tensors
    library = torch.library.Library("aten", "IMPL")
    # Where a tensor's own `__torch_dispatch__` is not asked: factories, and code that leaves Python's dispatch out.
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        if name.startswith("aten::") and not composite:
            library.impl(name, _kernel(name), "PrivateUse1")
    for name in _SLOT:
        library.impl(name, _kernel(f"aten::{name}"), "PrivateUse1")
    library.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    return library


def _kernel(name: str) -> Any:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _dispatch(func, args, kwargs)
