"""``keepkv info``: what runs here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from keepkv.cli.options import AsJson
from keepkv.cli.output import listing, one_line_errors, print_json


def versions_line() -> str:
    """keepkv and what it stands on, without importing any of it."""
    return f"keepkv {_version('keepkv')}, torch {_version('torch')}, transformers {_version('transformers')}, " + (
        f"Python {platform.python_version()}"
    )


@one_line_errors
def info(as_json: AsJson = False) -> None:
    """Print the versions that run here, whether they were tested, the devices and what computes on them.

    \b
    Examples:
      keepkv info
      keepkv info --json
    """
    import torch

    from keepkv.engine.versions import NEWEST, OLDEST, untested
    from keepkv.kernels.dispatch import computing
    from keepkv.measure.environment import versions

    here = versions() | {"triton": _version("triton"), "python": platform.python_version()}
    tested = {name: [str(OLDEST[name]), str(NEWEST[name])] for name in NEWEST}
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices = {"cpu": f"{torch.get_num_threads()} threads"} | {str(x): torch.cuda.get_device_name(x) for x in gpus}
    kernels = {name: computing(torch.device(name)) for name in devices}
    note = untested()
    if as_json:
        first = next((devices[str(x)] for x in gpus), "cpu")
        facts = {"versions": here, "tested": tested, "device": first, "devices": devices, "kernels": kernels}
        print_json(facts | {"note": note})
        return
    rows = [
        (name, here[name] + (f"  (tested: {' to '.join(tested[name])})" if name in tested else "")) for name in here
    ]
    rows += [(name, f"{what}; kernels: {kernels[name]}") for name, what in devices.items()]
    listing([*rows, *([] if note is None else [("note", note)])])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
