# SPDX-License-Identifier: Apache-2.0
"""PART=table: the table of cards in docs/performance.md, made only from the newest file of each card."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.common import DONE, FAILED, ROOT
from benchmarks.gpu.contenders import COMPILED, OURS, OURS_COMPILED
from vitkern.bench import store
from vitkern.bench.environment import commit_in_words

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- gpu table: python -m benchmarks.gpu table -->", "<!-- end of gpu table -->"
NOTHING = (
    "No card has been measured yet: `make gpu PART=bench` on one writes the table that stands here then."
)
NOT_PEERS = {*OURS, "torch", COMPILED, OURS_COMPILED, "reference", "cpu"}
# (op, case, what stands in the table): of each op one or two that people run.
SHOWN = (
    ("ms_deform_attn", "detr-encoder", "Deformable-DETR encoder 800x1333"),
    ("ms_deform_attn_uniform", "detr-encoder", "the same, random locations"),
    ("ms_deform_attn", "detr-decoder", "Deformable-DETR decoder, 300 queries"),
    ("ms_deform_attn", "injector-B512", "ViT-Adapter-B injector 512"),
    ("ms_deform_attn", "extractor-B512", "ViT-Adapter-B extractor 512"),
    ("ms_deform_attn_fused", "detr-encoder", "the encoder with softmax and locations inside"),
    ("adapter_bottleneck", "adaptformer-video", "adapter, 1568 tokens, 768 to 64 and back"),
    ("token_pool", "vt-3136", "token pool, 3136 pixels, 16 tokens"),
    ("token_project", "vt-3136", "token projection of these"),
)
DTYPES = ("bfloat16", "float32")
PASSES = {"forward": "forward", "both": "training step"}
HEADINGS = "|  | dtype | pass | vitkern ms | torch | compiled | best peer | of the limit | GB/s | peak MB |"
ALIGNED = "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"


def main(results: Path, *, check: bool = False) -> int:
    """Writes the table into the page; with `check`, only compares it with the page."""
    wanted = made_of(results)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    now, after = rest.split(END)
    if check:
        if now.strip() == wanted.strip():
            return DONE
        print(f"{PAGE.name} is not made of {results}: run python -m benchmarks.gpu table", file=sys.stderr)
        return FAILED
    PAGE.write_text(f"{before}{BEGIN}\n{wanted}\n{END}{after}", encoding="utf-8")
    return DONE


def committed() -> str:
    """The tables in the page."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def made_of(results: Path) -> str:
    newest = {path.parent.name: path for path in sorted(results.glob("*/*.json"))}
    tables = [of_card(store.read(path), path.relative_to(results)) for path in newest.values()]
    return "\n\n".join(tables) or NOTHING


def of_card(record: store.Record, path: Path) -> str:
    rows = [row for row in record["rows"] if row["verified"]]
    text = [*_facts(record, path), "", HEADINGS, ALIGNED]
    text += [
        f"| {' | '.join(cells)} |"
        for op, case, words in SHOWN
        for dtype in DTYPES
        for what in PASSES
        if (cells := _cells(_group(rows, op, case, dtype, what), words))
    ]
    return "\n".join([*text, "", *_means(rows)]).strip()


def _facts(record: store.Record, path: Path) -> Iterator[str]:
    found, ceilings = record["environment"], record["ceilings"]
    driver = found["gpu_clocks"][0].split(",")[1].strip() if found["gpu_clocks"] else "unknown"
    yield (
        f"**{found['cuda']['devices'][0]['name']}**, driver {driver}, torch {found['torch']['version']}, "
        f"{record['started'][:10]}, vitkern {commit_in_words(found)}"
        f"{'' if record['status'] == 'complete' else ' (not all shapes measured yet)'}."
    )
    copy = max(ceilings["copy"].values())
    products = ", ".join(
        f"{rate / 1e3:.3g} TFLOP/s in {store.short(name)}" for name, rate in ceilings["product"].items()
    )
    page = Path("../benchmarks/results") / path.with_suffix(".md")
    yield (
        f"A copy runs at {copy:.4g} GB/s, a product at {products}. Figures in the columns torch, compiled and best "
        f"peer are how many times as long they take. [All rows]({page.as_posix()})."
    )


def _group(rows: Sequence[store.Row], op: str, case: str, dtype: str, what: str) -> dict[str, store.Row]:
    wanted = {"op": op, "case": case, "dtype": dtype, "pass": what}
    return {row["backend"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}


def _cells(group: dict[str, store.Row], words: str) -> list[str]:
    """The cells of a line for a group of contenders; empty if none of our kernels has a time."""
    ours = best_of(group, OURS)
    if ours is None:
        return []
    row, taken = group[ours], store.milliseconds(group[ours])

    def times(name: str | None) -> str:
        return "-" if name not in group else f"{store.milliseconds(group[name]) / taken:.2f}x"

    peer = best_of(group, [name for name in group if name not in NOT_PEERS])
    return [
        f"{words} x{row['batch']}",
        store.short(row["dtype"]),
        PASSES[row["pass"]],
        f"{taken:.3g} ({ours})",
        times("torch"),
        times(COMPILED),
        "-" if peer is None else f"{times(peer)} ({peer})",
        f"{row['share']:.0%} ({row['bound']})",
        f"{row['gb_per_s']:.0f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
    ]


def best_of(group: dict[str, store.Row], names: Sequence[str]) -> str | None:
    there = [name for name in names if name in group]
    return min(there, key=lambda name: store.milliseconds(group[name]), default=None)


def _means(rows: Sequence[store.Row]) -> Iterator[str]:
    """Sentences on the best other contender's time relative to ours, over all shapes, not only those in the table."""
    groups: dict[tuple[object, ...], dict[str, store.Row]] = {}
    for row in rows:
        groups.setdefault(store.key(row)[:-1], {})[row["backend"]] = row
    found: dict[tuple[str, str], list[float]] = {}
    for group in groups.values():
        ours = best_of(group, OURS)
        others = best_of(group, [name for name in group if name not in (*OURS, OURS_COMPILED)])
        if ours and others:
            ratio = store.milliseconds(group[others]) / store.milliseconds(group[ours])
            found.setdefault((group[ours]["op"], group[ours]["pass"]), []).append(ratio)
    for (op, what), ratios in found.items():
        yield (
            f"- {op}, {PASSES[what]}: the best of all others takes {statistics.geometric_mean(ratios):.2f}x as long "
            f"in the geometric mean of {len(ratios)} rows, {min(ratios):.2f}x at the least."
        )
