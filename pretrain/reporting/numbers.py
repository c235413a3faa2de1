"""Numbers as a person reads them; the unit is in the name of the metric."""

import math

# Metrics that are shares of a whole.
_SHARES = ("speed/mfu", "speed/hfu", "gpu/utilization", "progress/goodput")
_UNITS = {"_w": "W", "_c": "°C"}
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def plain(value: float, digits: int = 4, *, more: int = 0) -> str:
    """Up to four significant digits, without an exponent where that is short.

    Here and below, `more` digits than usual tell apart what lies close together.
    """
    digits += more
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        shown = f"{value:,.{places}f}"
        return shown.rstrip("0").rstrip(".") if places else shown
    return f"{value:.{digits - 1}g}".replace("e-0", "e-").replace("e+0", "e")


def scaled(value: float, *, more: int = 0) -> str:
    """Counts and rates: 102 k, 1.05 M, 2.40 T."""
    for size, letter in _SCALES:
        if abs(value) >= size and math.isfinite(value):
            return f"{value / size:.{3 + more}g} {letter}"
    return plain(value, 3, more=more)


def in_bytes(value: float, *, more: int = 0) -> str:
    """1.5 GiB."""
    for size, unit in _BYTES:
        if abs(value) >= size and math.isfinite(value):
            # up to 1,023 of a unit
            return f"{plain(value / size, 3, more=more)} {unit}"
    return f"{plain(value, more=more)} B"


def in_seconds(value: float, *, more: int = 0) -> str:
    """120 ms, 2.31 s."""
    if 0 < abs(value) < 1:
        return f"{value * 1e3:.{3 + more}g} ms"
    return f"{value:,.{3 + more}g} s" if abs(value) < 1000 else f"{value:,.{more}f} s"


def in_percent(share: float, *, more: int = 0) -> str:
    """0.5 %, 43 %."""
    return f"{plain(100 * share, 3, more=more)} %"


def by_name(metric: str, value: float, *, more: int = 0) -> str:
    """A value with the unit that its metric's name ends with."""
    if metric in _SHARES or metric.startswith("data/share_"):
        return in_percent(value, more=more)
    if metric.endswith("_bytes") or metric.endswith("/bytes"):
        return in_bytes(value, more=more)
    if metric.endswith("per_s") or "_per_s_" in metric or metric.endswith("tokens"):
        return scaled(value, more=more)
    if metric.endswith("_s"):
        return in_seconds(value, more=more)
    if metric.endswith("_hz"):
        return f"{scaled(value, more=more)}Hz"
    if metric[-2:] in _UNITS:
        return f"{plain(value, 3, more=more)} {_UNITS[metric[-2:]]}"
    return plain(value, more=more)


def counted(number: float, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,.0f} {noun}" + "s" * (number != 1)
