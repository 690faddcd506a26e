"""Kernels in C++ for a CPU: built once by the compiler that is there, kept in the user's cache folder.

The library knows nothing of Python or torch. It is called through ctypes with pointers, so it takes seconds to build
and fits every version of both. Its loops run on the threads of torch's own OpenMP, found when the library is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("decode.cpp", "tile.h", "lanes.h")]  # the first is compiled
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", "-w")
COMPILERS = ("c++", "g++", "clang++")  # where the variable CXX names none
PATIENCE = 300  # seconds for the compiler
NOTICE = (
    "keepkv: building its kernels in C++ for this processor, about five seconds, this once "
    "(KEEPKV_KERNELS=reference leaves them out)"
)


@lru_cache
def library() -> ctypes.CDLL | str:
    """The library, or in words why there is none; built if this source was never built on this processor, which it then
    says on stderr."""
    if sys.platform != "linux":
        return f"the kernels in C++ are tried on Linux alone, not on {sys.platform}"
    try:
        path = _built()
        found = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody's home folder
        return f"the kernels in C++ could not be built or loaded: {_in_one_line(error)}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    takes = {
        "keepkv_decode": [pointer],
        "keepkv_append": [pointer, number, pointer, number, number, pointer, number, number],
        "keepkv_decode_rows": [pointer, number, number, pointer, pointer, pointer, number, ctypes.c_double],
    }
    for name, types in takes.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def _built() -> Path:
    """The file of the library."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keepkv"
    path = folder / f"decode-{_fingerprint()}.so"
    if path.exists():
        return path
    import fcntl  # only here, since Windows has none

    compiler = _compiler()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds
        if not path.exists():
            print(NOTICE, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                _run([*compiler, *FLAGS, "-c", str(SOURCES[0]), "-o", f"{made}/decode.o"])
                # Without -fopenmp: the runtime is not linked, but found among what torch has loaded.
                _run([*compiler, "-shared", f"{made}/decode.o", "-o", f"{made}/decode.so"])
                os.replace(f"{made}/decode.so", path)
    return path


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise FileNotFoundError("no C++ compiler was found: install g++, or name one in the variable CXX")
    return [found]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)


def _fingerprint() -> str:
    """Of the source, how it is built, and what the processor can do."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(errors="replace").splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    sources = (path.read_text(encoding="utf-8") for path in SOURCES)
    parts = (*sources, *FLAGS, os.environ.get("CXX", ""), platform.machine(), features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _in_one_line(error: Exception) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or [repr(error)]
    return lines[0].strip()
