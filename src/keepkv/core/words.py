"""Numbers in words, as receipts and messages say them."""

from __future__ import annotations

from collections.abc import Iterable

_BINARY = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_DECIMAL = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def size(count: int) -> str:
    """``count`` bytes with three digits: ``1.62 MiB``."""
    name = next((x for x in _BINARY if count >= _BINARY[x]), None)
    return f"{count} B" if name is None else f"{_rounded(count / _BINARY[name])} {name}"


def exact_size(count: int) -> str:
    """``count`` bytes as somebody asked for them: ``10 MB``, ``256 MiB``; as ``size`` says where no unit fits."""
    units = (_BINARY | _DECIMAL).items()
    whole = [f"{count // unit} {name}" for name, unit in units if count % unit == 0 < count // unit < 1024]
    return whole[0] if whole else size(count)


def percent(share: float) -> str:
    """``12.5%``, of a share of 1."""
    return f"{_rounded(100 * share)}%"


def spread(values: Iterable[float]) -> str:
    """``94``, or ``90 to 101`` where they differ."""
    said = [_rounded(x) for x in sorted(values)]
    return said[0] if said[0] == said[-1] else f"{said[0]} to {said[-1]}"


def counted(number: int, what: str) -> str:
    """``1 token``, ``1,856 tokens``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _rounded(x: float) -> str:
    """Three digits, or all that stand before the point; no zeros at the end."""
    digits = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    text = f"{x:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
