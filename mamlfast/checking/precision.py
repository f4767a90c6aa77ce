"""A model in float64, although it may not want to be.

Central differences tell a missing term from rounding only where there is little rounding: in float64. A module runs
there on float64 tensors in place of its own; but most decoders cast norms, rotary tables, softmax and the loss to
float32 whatever their weights are. ``lifted`` sends those casts to float64. What a kernel does inside itself is out
of reach, and shows in the differences' own uncertainty.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mamlfast.swap import buffer_slots, filled, parameter_slots


class _Lifted(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **kwargs)


@contextmanager
def lifted(wanted: bool) -> Iterator[None]:
    """Send casts to float32 to float64 inside the block, if ``wanted``."""
    if not wanted:
        yield
        return
    with _Lifted():
        yield


@contextmanager
def constants_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the module on copies of its buffers and frozen parameters inside the block, in ``dtype`` if there is one.

    Trainable parameters are the caller's to replace.
    """
    slots = [*buffer_slots(module), *(slot for slot in parameter_slots(module) if not slot.tensor.requires_grad)]
    with filled(slots, [cast(slot.tensor.clone(), dtype) for slot in slots]):
        yield


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype`` if it is floating-point and there is one."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def oracle_dtypes(own: torch.dtype) -> list[torch.dtype]:
    """The precisions to try, best first: float64, and float32 for what no half type can resolve."""
    wide = torch.promote_types(own, torch.float32)
    return [torch.float64] if wide is torch.float64 else [torch.float64, wide]


def available_bytes(device: torch.device) -> int:
    """Memory that can be had on the device without asking anybody to give theirs back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    report = Path("/proc/meminfo")
    if report.exists():
        line = next(line for line in report.read_text().splitlines() if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # without what caches would give back
