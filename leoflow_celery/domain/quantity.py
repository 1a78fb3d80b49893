"""Kubernetes resource quantities: ``500m``, ``1.5``, ``128Mi``, ``1e3``.

The grammar is the API server's (apimachinery ``resource.Quantity``). An invalid quantity is refused at the door;
dropping it silently would run the task without the limit its author asked for.
"""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(
    r"\+?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([eE][+-]?[0-9]{1,2})|(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei))?"
)
_FACTOR = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def parse_quantity(text: str) -> Decimal:
    """The value in base units (cores, bytes).

    Raises:
        ValueError: the text is no quantity, or it is negative.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a Kubernetes quantity; write for example 500m, 2, 128Mi or 1Gi")
    number, exponent, unit = match.groups()
    return Decimal(number + (exponent or "")) * _FACTOR[unit or ""]


def format_bytes(number: int) -> str:
    """A number of bytes as a quantity: whole Mi where it is that, plain bytes otherwise."""
    mebibytes, rest = divmod(number, 1024 * 1024)
    return str(number) if rest or not mebibytes else f"{mebibytes}Mi"
