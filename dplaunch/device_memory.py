"""Memory of a CUDA device that a trainer and the ranks on that device both see: weights need not leave it.

By CUDA IPC, as torch does it (torch/multiprocessing/reductions.py). Whether a rank can see it is not guessed from where
it is but tried, with a `DeviceMark`: containers, and allocators that share nothing, stand between.
"""

from __future__ import annotations

import pickle
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SECRET_BYTES = 32

_STORAGE_DEVICE = 6
"""The place of the device's number among the arguments of torch's `rebuild_cuda_tensor`: each process has its own."""

_COUNTER = slice(11, 13)
"""Those of the counter by which the process that opened memory says that it has let go of it."""

_SHARED = Path("/dev/shm")
"""Where torch's counters are files."""

_HEAD_BYTES, _COUNT = 64, struct.Struct("=q")
"""What comes before the counters of such a file, and one of them."""


def name_of(device: Any) -> str:
    """The UUID of a torch device, which is the same in every process; "" for one that is not CUDA's, or has none."""
    import torch

    return "" if device.type != "cuda" else str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def own_devices() -> dict[str, Any]:
    """The devices, by name, on which this process has memory by now; no context is made on any."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    numbers = [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
    devices = [torch.device("cuda", number) for number in numbers]
    return {name: device for device in devices if (name := name_of(device))}


class DeviceMemory:
    """Bytes on a device, written here and read by ranks, until `free`.

    torch keeps memory that it has a handle of until one process, which opened it, lets go of it: for good, if that one
    has died, and for good as well if two have. So what it gets here is a view, which keeps no memory, for each reader,
    and after `free` it waits for none.

    Args:
        device: torch's.
        nbytes: how many.

    Raises:
        RuntimeError: when there is not so much memory (torch's OutOfMemoryError).
    """

    def __init__(self, device: Any, nbytes: int) -> None:
        import torch

        self.name = name_of(device)
        self._bytes: Any = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._views: list[Any] = []
        self._handles: list[bytes] = []
        self._counters: list[tuple[bytes, int]] = []

    def write(self, start: int, flat: Any) -> None:
        """Copies a tensor's bytes to where they belong, in the device's own time."""
        self._bytes[start : start + flat.numel()].copy_(flat)

    def share(self, readers: int) -> None:
        """Makes a handle for each of so many readers; all that was written is there for them.

        Raises:
            RuntimeError: when it cannot be shared.
        """
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize(self._bytes.device)
        for _ in range(readers):
            view = view_of(self._bytes)
            _, arguments = reduce_tensor(view)
            self._views.append(view)
            self._handles.append(pickle.dumps(arguments))
            # Another torch may keep them elsewhere: this one has just begun to count.
            if readers_of(*arguments[_COUNTER]) == 1:
                self._counters.append(arguments[_COUNTER])

    def handle(self) -> bytes:
        """One of those, by which one other process opens it, once."""
        return self._handles.pop()

    def free(self) -> None:
        """Gives the memory back, whoever has it open. Idempotent."""
        import torch

        for counter in self._counters:
            if readers_of(*counter) == 1:
                torch.UntypedStorage._release_ipc_counter_cuda(*counter)
        self._handles, self._counters, self._views, self._bytes = [], [], [], None


def view_of(owner: Any) -> Any:
    """A tensor's bytes, as a tensor that keeps no memory.

    What torch has shared it may free after Python is gone, so there must be nothing of Python in what it calls then,
    as there is in what `torch.as_tensor` makes of a `__cuda_array_interface__`: such a process aborts at its end.
    """
    import torch

    bytes_of = torch._C._construct_storage_from_data_pointer(owner.data_ptr(), owner.device, owner.nbytes)
    return torch.empty(0, dtype=torch.uint8, device=owner.device).set_(bytes_of, 0, (owner.nbytes,), (1,))


def readers_of(counter: bytes, offset: int) -> int | None:
    """What torch's counter of a handle says: 1 until its reader has let go, dead or not.

    None when there is no such counter. It is one of many in a file of torch's, behind what `RefcountedMapAllocator`
    keeps there for itself (CudaIPCTypes.cpp, MapAllocator.cpp).
    """
    try:
        with (_SHARED / counter.decode().lstrip("/")).open("rb") as file:
            file.seek(_HEAD_BYTES + _COUNT.size * offset)
            return int(_COUNT.unpack(file.read(_COUNT.size))[0])
    except (OSError, struct.error):
        return None


class DeviceMark:
    """Memory on a device with a secret in it: a rank that reads it may be given weights there.

    Args:
        device: torch's.
        readers: how many will look.

    Raises:
        RuntimeError: when the device's memory cannot be shared.
    """

    def __init__(self, device: Any, readers: int) -> None:
        import torch

        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._memory = DeviceMemory(device, SECRET_BYTES)
        self._memory.write(0, torch.tensor(list(self.secret), dtype=torch.uint8))
        self._memory.share(readers)

    def handle(self) -> bytes:
        """By what one of them finds it."""
        return self._memory.handle()

    def free(self) -> None:
        """All have looked. Idempotent."""
        self._memory.free()


# In a rank, on the device.


def opened(handle: bytes, number: int) -> Any:
    """What a handle stands for: bytes on this process's device of that number."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(pickle.loads(handle))
    arguments[_STORAGE_DEVICE] = number
    return rebuild_cuda_tensor(*arguments)


def sees(handle: bytes, secret: bytes, number: int) -> bool:
    """Whether this process reads what a `DeviceMark` on its device says."""
    try:
        return bytes(opened(handle, number).cpu().tolist()) == secret
    except Exception:
        return False  # Whatever it is that stands between: the weights go another way.


def tensors_in(handle: bytes, number: int, entries: Iterable[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors of a bucket, each a copy: its owner uses that memory again when the bucket is loaded."""
    import torch

    content = opened(handle, number)
    for name, dtype, shape, start, nbytes in entries:
        flat = content[start : start + nbytes].clone().view(getattr(torch, dtype))
        yield name, flat.view(tuple(shape))
