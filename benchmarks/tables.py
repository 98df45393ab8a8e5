"""Tables in Markdown from rows of results."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def grouped(rows: Iterable[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """Ours, and the peers by name, for each op, shape and direction, in the order of the rows."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], tuple(row["shape"].items()), row["direction"])
        groups.setdefault(key, {})[row["variant"]] = row
    return [(group.pop("fusedlm"), group) for group in groups.values()]


def sizes_of(shape: Mapping[str, Any]) -> dict[str, int]:
    """Those of a shape's entries that are sizes, M and N: named by one capital letter."""
    return {k: v for k, v in shape.items() if len(k) == 1 and k.isupper()}


def option_texts(shape: Mapping[str, Any]) -> list[str]:
    """What a shape says beside sizes: "approximate=tanh"."""
    return [f"{k}={v}" for k, v in shape.items() if k not in sizes_of(shape)]


def shape_text(shape: Mapping[str, Any]) -> str:
    """32768 x 768, approximate=tanh."""
    return ", ".join((" x ".join(map(str, sizes_of(shape).values())), *option_texts(shape)))


def share(row: Row) -> tuple[float, str]:
    """Which part of the limit a row reaches, and which limit that is: "copy" or "matmul"."""
    return (row["share_of_matmul"], "matmul") if "share_of_matmul" in row else (row["share_of_copy"], "copy")


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ops_table(rows: Iterable[Row]) -> str:
    """Markdown: per op, shape and direction our time and share of the limit, peers' times over ours, extra memory."""
    groups = grouped(rows)
    memory = any("extra_bytes" in ours for ours, _ in groups)
    head = "| op | shape | pass | us | share | against |"
    lines = [head + " extra memory |" if memory else head, "|---|---|---|---:|---:|---|" + ("---|" if memory else "")]
    for ours, peers in groups:
        against = ", ".join(
            f"{name} {r['seconds'] / ours['seconds']:.2f}x" + ("" if r.get("graph", True) else "*")
            for name, r in peers.items()
        )
        part, limit = share(ours)
        cells = [ours["op"], shape_text(ours["shape"]), ours["direction"], microseconds(ours["seconds"])]
        cells += [f"{part:.0%}" + (" of matmul" if limit == "matmul" else ""), against]
        if memory:
            used = {"": ours, **peers} if "extra_bytes" in ours else {}
            cells.append(", ".join(f"{name} {_bytes(r['extra_bytes'])}".strip() for name, r in used.items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def embedding_table(rows: Iterable[Row], op: str = "embedding") -> str:
    """Markdown: a line for each B x T x C and direction, times of torch, torch.compile and ours, and the two ratios."""
    lines = ["| size | pass | torch, us | compile, us | ours, us | torch / ours | compile / ours |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for ours, peers in grouped(row for row in rows if row["op"] == op):
        times = [peers[name]["seconds"] if name in peers else None for name in ("torch", "compile")]
        cells = [" x ".join(str(ours["shape"][letter]) for letter in "BTC"), ours["direction"]]
        cells += [microseconds(t) if t else "" for t in (*times, ours["seconds"])]
        cells += [f"{t / ours['seconds']:.2f}x" if t else "" for t in times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def host_table(rows: Iterable[Row]) -> str:
    """Markdown: an op's host time in microseconds, ours, torch's and an addition's, without and with gradients."""
    found: dict[str, dict[tuple[str, bool], float]] = {}
    for row in rows:
        found.setdefault(row["op"], {})[row["variant"], row["grad"]] = row["seconds"]
    lines = ["| op | ours | torch | x + x | ours, grad | torch, grad | x + x, grad |", "|---|" + "---:|" * 6]
    for op, times in found.items():
        keys = [(variant, grad) for grad in (False, True) for variant in ("fusedlm", "torch", "addition")]
        cells = [f"{times[key] * 1e6:.1f}" if key in times else "" for key in keys]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
