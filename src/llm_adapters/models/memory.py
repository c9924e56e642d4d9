"""Memory that is free where a model runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_memory(device: "torch.device") -> int:
    """Free bytes on `device`; of the host, no more than the process may still take."""
    import psutil  # PEFT needs it, so it is there
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return free
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed == resource.RLIM_INFINITY:
        return free
    return max(0, min(free, allowed - psutil.Process().memory_info().vms))
