"""Tables in Markdown from rows of results."""

from typing import Any


def ops_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: per op, shape and direction our time and share of the copy bandwidth, peers' times over ours."""
    lines = ["| op | shape | pass | us | share of copy | against |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        shape = " x ".join(str(v) for v in row["shape"].values())
        groups.setdefault((row["op"], shape, row["direction"]), []).append(row)
    for (op, shape, direction), group in groups.items():
        ours = next(r for r in group if r["variant"] == "fusedlm")
        against = ", ".join(f"{r['variant']} {r['seconds'] / ours['seconds']:.2f}x" for r in group if r is not ours)
        share = f"{ours['share_of_copy']:.0%}"
        lines.append(f"| {op} | {shape} | {direction} | {ours['seconds'] * 1e6:.1f} | {share} | {against} |")
    return "\n".join(lines)
