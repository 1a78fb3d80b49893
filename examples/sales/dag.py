"""The Python tasks of the sales example: plain functions, standard library only.

What a task returns is its XCom; what it takes comes from ``xcom_input`` and ``call_args`` of dag.json.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def totals(orders: list[dict[str, Any]]) -> dict[str, float]:
    """Sales in dollars per region."""
    found: dict[str, float] = defaultdict(float)
    for order in orders:
        found[order["region"]] += order["quantity"] * order["unit_price"]
    print(f"{len(orders)} orders in {len(found)} regions")
    return {region: round(amount, 2) for region, amount in sorted(found.items())}


def convert(totals: dict[str, float], exchange: dict[str, float], currency: str) -> dict[str, Any]:
    """The summary in another currency: what the run is for."""
    rate = exchange["rate"]
    print(f"one dollar is {rate} {currency}")
    amounts = {region: round(amount * rate, 2) for region, amount in totals.items()}
    best = max(amounts, key=amounts.__getitem__)
    return {"currency": currency, "total": round(sum(amounts.values()), 2), "best_region": best, "regions": amounts}
