"""Memory of the device that trains: how much there is and was used, and the errors that say that it is used up."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def total_memory(device: "torch.device") -> int:
    """Memory of an accelerator, or of the host where `device` is the CPU, in bytes."""
    import psutil  # PEFT needs it, so it is there
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def reset_peak_memory(device: "torch.device") -> None:
    """Begin to measure the peak of an accelerator anew; that of the host is the process's."""
    statistics = _statistics(device)
    if statistics is not None:
        statistics.reset_peak_memory_stats(device)


def peak_memory(device: "torch.device") -> dict[str, int]:
    """Peak memory in bytes.

    Returns:
        ``host``: resident memory of the process. On an accelerator also ``allocated``, in tensors, and ``reserved``,
        taken from the device for them.
    """
    found = {"host": host_peak_memory()}
    statistics = _statistics(device)
    if statistics is not None:
        found["allocated"] = statistics.max_memory_allocated(device)
        found["reserved"] = statistics.max_memory_reserved(device)
    return found


def host_peak_memory() -> int:
    """Peak resident memory of the process so far, in bytes."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that memory was used up."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and should_reduce_batch_size(error)


def release_memory() -> None:
    """Give what nobody uses any more back to the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def _statistics(device: "torch.device") -> Any:
    """The module with the memory statistics of an accelerator; None for the CPU, and where there are none."""
    import torch

    module = torch.get_device_module(device) if device.type != "cpu" else None
    return module if hasattr(module, "max_memory_reserved") else None
