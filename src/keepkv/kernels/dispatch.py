"""The one rule that decides what computes: Triton on a GPU that can run it, C++ on a CPU, otherwise plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from keepkv.errors import KeepKVError, UnknownName, UnsupportedInput
from keepkv.kernels.native import library

VARIABLE = "KEEPKV_KERNELS"  # environment: one of ``BACKENDS`` where a call does not say
BACKENDS = ("auto", "triton", "reference")
CPU = "cpu"  # a call of a kernel that has a form in C++ may insist on it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256  # a tile of keys and one of values must fit into shared memory
CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


def choose(
    backend: str | None, *tensors: Tensor | None, beside: Iterable[Tensor] = (), obstacle: str | None = None
) -> str:
    """``"triton"`` or ``"reference"`` for a computation on ``tensors``, whose last dimension is that of a head.

    beside: tensors of any dtype and shape that it reads too. obstacle: what else stands against Triton.
    backend: "auto" takes Triton on CUDA tensors where nothing stands against it; "triton" insists, and raises
    ``KeepKVError`` with what stands against it; None: what the environment variable ``KEEPKV_KERNELS`` says, else
    "auto". Tensors on the CPU are served by Triton when that is asked for and its interpreter is switched on.
    """
    if backend is None and torch.compiler.is_compiling():
        return "reference"
    asked = _asked(backend)
    if asked == "reference":
        return asked
    given = [x for x in tensors if x is not None]
    interpreted = asked == "triton" and interpreting()
    obstacle = _obstacle_in_call([*given, *beside], interpreted) or _obstacle_in_type(given) or obstacle
    if asked == "triton" and obstacle:
        raise KeepKVError(f"the Triton kernels were asked for, but {obstacle}. Use backend='auto' or 'reference'.")
    return "reference" if obstacle else "triton"


def by_cpp(backend: str | None, obstacle: Callable[[], str | None]) -> bool:
    """Whether a kernel with a form in C++ takes it, rather than what ``choose`` says.

    obstacle: what stands against it, None if nothing does; asked only where it matters, since it may build the library.
    backend: "auto" takes it where nothing stands against it; "cpu" insists, and raises ``KeepKVError`` with what does.
    """
    if backend != CPU and _asked(backend) != "auto":
        return False
    found = obstacle()
    if backend == CPU and found:
        raise KeepKVError(f"the kernel in C++ was asked for, but {found}. Use backend='auto' or 'reference'.")
    return found is None


def _asked(backend: str | None) -> str:
    asked = backend or os.environ.get(VARIABLE) or "auto"
    if asked not in BACKENDS:
        raise UnknownName("kernel backend", asked, BACKENDS)
    return asked


def computing(device: torch.device) -> str:
    """What computes on ``device`` where a call does not say, in words: kernels, or plain torch and the reason.

    For a CPU the library in C++ is built, unless it was before.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked == "reference":
        return f"plain torch, as {VARIABLE}=reference asks"
    if device.type == "cpu":
        built = library()
        return f"plain torch, for {built}" if isinstance(built, str) else "C++ for one token, else plain torch"
    obstacle = (
        "it is no CUDA device" if device.type != "cuda" else _obstacle_in_call([torch.empty(0, device=device)], False)
    )
    return "Triton" if obstacle is None else f"plain torch, for {obstacle}"


def prepare(device: torch.device) -> None:
    """Have what computes on ``device`` built now, so that no token waits for it."""
    if device.type == "cpu" and _asked(None) == "auto":
        library()


def interpreting() -> bool:
    """Whether the environment told Triton to run kernels on the CPU, in Python; Triton reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def _obstacle_in_call(tensors: list[Tensor], interpreted: bool) -> str | None:
    """Why Triton cannot run where ``tensors`` are and as it is called; None where it can."""
    device = tensors[0].device
    if not (device.type == "cuda" or interpreted):
        return f"the tensors are on {device}, not on a CUDA device (TRITON_INTERPRET=1 is not set either)"
    if not _installed():
        return "triton is not installed: pip install 'keepkv[triton]'"
    if any(x.device != device for x in tensors):
        return f"the tensors are on several devices: {', '.join(sorted({str(x.device) for x in tensors}))}"
    if torch.compiler.is_compiling():
        return "they have not been tried inside a compiled graph"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "they have no backward: wrap the call in torch.no_grad()"
    return _obstacle_in_device(device) if device.type == "cuda" else None


def _obstacle_in_type(tensors: list[Tensor]) -> str | None:
    """Why the kernels do not take the dtypes and shapes of ``tensors``; None where they do."""
    dtypes = {x.dtype for x in tensors}
    if not dtypes <= set(DTYPES):
        return f"they take {', '.join(map(str, DTYPES))}, not {', '.join(map(str, dtypes - set(DTYPES)))}"
    if len(dtypes) > 1:
        return f"the tensors differ in dtype: {', '.join(sorted(map(str, dtypes)))}"
    if (widest := max(x.shape[-1] for x in tensors)) > MAX_HEAD_DIM:
        return f"they take head dimensions up to {MAX_HEAD_DIM}, not {widest}"
    return None


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _obstacle_in_device(device: torch.device) -> str | None:
    """Why the kernels do not run on a CUDA ``device``; None where they do."""
    if torch.version.hip is not None:
        return "they have not been tried on ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"the device has compute capability {capability}, below {CAPABILITY}"
    return None


def check(condition: bool, message: str) -> None:
    """Raise ``UnsupportedInput`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UnsupportedInput(message)
