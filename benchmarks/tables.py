"""Tables and sentences in Markdown from rows of results."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Group = tuple[Row, dict[str, Row]]  # ours, and the peers by name

PEERS = {
    "torch": "torch",
    "torch-topk": "torch, topk",
    "cublaslt": "cuBLASLt",
    "cudnn": "cuDNN",
    "flex": "flex attention",
    "compile": "torch.compile",
    "liger": "Liger",
}
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
LEFT = "† Ours, asked for by name: by itself the op leaves this to torch's own."
EVEN = 0.98  # of a peer's speed, from which on ours counts as no slower: runs differ by as much


def grouped(rows: Iterable[Row]) -> list[Group]:
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


def by_size(groups: Iterable[Group]) -> list[Group]:
    """The smallest first; of equal sizes, in the order they have."""
    return sorted(groups, key=lambda group: math.prod(sizes_of(group[0]["shape"]).values()))


def against_best(group: Group) -> tuple[float, str]:
    """The fastest peer's time over ours, and its name."""
    ours, peers = group
    best = min(peers, key=lambda name: peers[name]["seconds"])
    return peers[best]["seconds"] / ours["seconds"], best


def peer_names(groups: Iterable[Group]) -> list[str]:
    """Of all peers of some groups, in the order of PEERS; those it does not know last."""
    found = list(dict.fromkeys(name for _, peers in groups for name in peers))
    return sorted(found, key=lambda name: list(PEERS).index(name) if name in PEERS else len(PEERS))


def ops_without_backward(groups: Iterable[Group]) -> set[str]:
    """Ops that have one pass only, which is called "forward"."""
    passes: dict[str, set[str]] = {}
    for ours, _ in groups:
        passes.setdefault(ours["op"], set()).add(ours["direction"])
    return {op for op, found in passes.items() if found == {"forward"}}


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def our_time(row: Row) -> str:
    """In microseconds, and a mark where that is not what the op takes by itself."""
    return microseconds(row["seconds"]) + "†" * row.get("left_to_torch", False)


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
        cells = [ours["op"], shape_text(ours["shape"]), ours["direction"], our_time(ours)]
        cells += [f"{part:.0%}" + (" of matmul" if limit == "matmul" else ""), against]
        if memory:
            used = {"": ours, **peers} if "extra_bytes" in ours else {}
            cells.append(", ".join(f"{name} {_bytes(r['extra_bytes'])}".strip() for name, r in used.items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _some_sizes(groups: Sequence[Group], *, one: bool) -> list[Group]:
    """Of each op, option and pass the smallest size, the middle one and the largest, or the middle one alone."""
    alike: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        ours = group[0]
        alike.setdefault((ours["op"], ours["direction"], *option_texts(ours["shape"])), []).append(group)
    kept: set[int] = set()
    for found in alike.values():
        found = by_size(found)
        middle = found[len(found) // 2]
        kept |= {id(group) for group in ([middle] if one else [found[0], middle, found[-1]])}
    return [group for group in groups if id(group) in kept]


def _part(row: Row) -> str:
    part, _ = share(row)
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _ranges(groups: Sequence[Group]) -> str:
    """One sentence on all of an op's measurements."""
    several = len({tuple(option_texts(ours["shape"])) for ours, _ in groups}) > 1
    shares, ratios = [], []
    for direction in dict.fromkeys(ours["direction"] for ours, _ in groups):
        found = [group for group in groups if group[0]["direction"] == direction]
        shares.append(f"{PASSES[direction]} {_range([share(ours)[0] for ours, _ in found], '.0%')}")
        compared = [against_best(group)[0] for group in found if group[1]]
        if compared:
            ratios.append(f"{PASSES[direction]} {_range(compared, '.2f')}")
    shapes = {tuple(ours["shape"].items()) for ours, _ in groups}
    text = f"all {len(shapes)} sizes{' and options' * several}: {', '.join(shares)} of the limit"
    return text + (f"; the fastest peer's time over ours: {', '.join(ratios)}" if ratios else "")


def figures(rows: Iterable[Row], ops: Sequence[str], machine: str, *, whole: bool = False) -> str:
    """Markdown for a page about some ops: a table of three sizes each (of more than two ops, of one size), ranges over
    all, and what was measured on. whole: all sizes in the table.

    Peers' columns are their times over ours, and the memory that they allocate where that was measured.
    """
    every = [group for group in grouped(rows) if group[0]["op"] in ops]
    groups = every if whole else _some_sizes(every, one=len(ops) > 2)
    names = {" x ".join(sizes_of(ours["shape"])) for ours, _ in groups}
    passes = len(ops_without_backward(every)) < len(ops)
    memory = any("extra_bytes" in ours for ours, _ in groups)
    peers = peer_names(groups)
    limits = {"matmul": "share of the products' rate", "copy": "share of a copy"}
    limit = {limits[share(ours)[1]] for ours, _ in groups}
    heads = ["op"] * (len(ops) > 1) + [names.pop() if len(names) == 1 else "shape"] + ["pass"] * passes
    numbers = ["us", limit.pop() if len(limit) == 1 else "share", *(["memory"] if memory else [])]
    numbers += [PEERS.get(name, name) for name in peers]
    lines = ["| " + " | ".join(heads + numbers) + " |", "|" + "---|" * len(heads) + "---:|" * len(numbers)]
    for ours, found in groups:
        cells = [ours["op"]] * (len(ops) > 1) + [shape_text(ours["shape"])] + [PASSES[ours["direction"]]] * passes
        cells += [our_time(ours), _part(ours)]
        if memory:
            cells.append(_bytes(ours["extra_bytes"]))
        for name in peers:
            cell = ""
            if name in found:
                cell = f"{found[name]['seconds'] / ours['seconds']:.2f}x" + "*" * (not found[name].get("graph", True))
                cell += f", {_bytes(found[name]['extra_bytes'])}" if "extra_bytes" in found[name] else ""
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for op in ops:
        mine = [group for group in every if group[0]["op"] == op]
        if len(mine) > sum(ours["op"] == op for ours, _ in groups):
            lines.append(f"{op}, {_ranges(mine)}.\\")
    dtypes = " and ".join(dict.fromkeys(ours["dtype"] for ours, _ in groups))
    starred = any(not row.get("graph", True) for _, found in groups for row in found.values())
    notes = [f"{machine}; {dtypes}; peers' times over ours."]
    if memory:
        notes.append("Memory is the most that both passes allocate, gradients included.")
    if any(ours.get("left_to_torch") for ours, _ in groups):
        notes.append(LEFT)
    if starred:
        notes.append("\\* waits for the GPU inside, so it is timed from the host.")
    lines.append(" ".join(notes))
    return "\n".join(lines)


def summary(rows: Iterable[Row], machine: str) -> str:
    """One sentence on all ops: forward passes' share of the copy, and how ours compare with the fastest peer.

    What an op by itself leaves to torch's own is not counted.
    Raises ValueError where there is no forward pass (of an op that has a backward pass too) or no peer.
    """
    groups = [group for group in grouped(rows) if not group[0].get("left_to_torch")]
    alone = ops_without_backward(groups)
    shares = [
        row["share_of_copy"]
        for row, _ in groups
        if row["direction"] == "forward" and row["op"] not in alone and "share_of_copy" in row
    ]
    compared = [(against_best(group)[0], group[0]) for group in groups if group[1]]
    if not shares or not compared:
        raise ValueError(
            "a summary needs forward and backward passes and peers; there is no forward pass beside a peer"
        )
    ratios = [ratio for ratio, _ in compared]
    middle = f", half of them at {statistics.median(shares):.0%} or more" if len(shares) > 1 else ""
    (worst, where), (most, there) = (choose(compared, key=lambda found: found[0]) for choose in (min, max))
    peers = [PEERS.get(name, name) for name in peer_names(groups) if not name.startswith("torch-")]

    def told(row: Row) -> str:
        return row["op"] if row["op"] in alone or row["direction"] == "both" else f"{row['op']} {row['direction']}"

    others = peers[0] if len(peers) == 1 else f"the fastest of {', '.join(peers[:-1])} and {peers[-1]}"
    return (
        f"{machine}: forward passes run at {_range(shares, '.0%')} of the speed of a plain copy{middle}. "
        f"Of {len(ratios)} measurements, "
        f"{sum(ratio >= EVEN for ratio in ratios)} are as fast as {others} or faster (within {1 - EVEN:.0%}), "
        f"from {worst:.2f}x ({told(where)}) to {most:.2f}x ({told(there)})."
    )


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


def transformers_table(results: Mapping[str, Any]) -> str:
    """Markdown: models of transformers without and with the kernels, of examples/kernels_in_transformers.py."""
    lines = ["| model | work | transformers | with the kernels | faster |", "|---|---|---:|---:|---:|"]
    names = {"forward": "hidden states", "train": "loss and gradients"}
    for model, found in results.items():
        for work in names if isinstance(found, Mapping) and "B" in found else ():
            times = [found[f"{work} {variant} ms"] for variant in ("transformers", "fusedlm")]
            cells = [model, f"{names[work]}, {found['B']} x {found['T']} tokens"]
            for variant, ms in zip(("transformers", "fusedlm"), times, strict=True):
                cells.append(f"{ms:.1f} ms, {found[f'{work} {variant} GiB']:.1f} GiB")
            lines.append("| " + " | ".join([*cells, f"{times[0] / times[1]:.2f}x"]) + " |")
    return "\n".join(lines)
