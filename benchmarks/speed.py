# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.speed, or `make speed`: measures the shapes in the README's picture and draws it from the file.

`vitkern bench run` writes the file: every row was checked before it was timed. The picture names processor, threads,
torch and commit from the file. Without the file the README says that there is no picture. `--draw` only draws the
committed file again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vitkern.bench import store
from vitkern.bench.environment import in_words
from vitkern.bench.store import Record, Row
from vitkern.bench.style import SVG
from vitkern.bench.svg import Canvas

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "cpu.json", ROOT / "docs" / "speed.svg"
PAGE, BEGIN, END = ROOT / "README.md", "<!-- picture: make speed -->", "<!-- end of picture -->"
PICTURED = """![How many times as fast as plain torch each op is on a CPU](docs/speed.svg)

Drawn from `benchmarks/results/cpu.json`; its last line names processor, threads, torch, commit. `make speed` measures
and draws it on your machine. [Whole models, peers and memory](docs/performance.md)."""
NOTHING = """There is no speed chart of this commit: `make speed` measures the ops on your CPU and draws one.
[The tables](docs/performance.md) have figures for the ops, whole models and other implementations."""
SHOWN = (
    ("ms_deform_attn", "detr-encoder", "Deformable-DETR encoder, 800x1333"),
    ("ms_deform_attn", "detr-decoder", "Deformable-DETR decoder, 300 queries"),
    ("ms_deform_attn", "injector-B512", "ViT-Adapter-B injector, 512x512"),
    ("ms_deform_attn", "extractor-B512", "ViT-Adapter-B extractor, 512x512"),
    ("adapter_bottleneck", "adaptformer-image", "AdaptFormer's adapter"),
    ("token_pool", "vt-3136", "Visual Transformer's tokenizer"),
)
PASSES = {"forward": ("c0", "forward"), "both": ("c2", "forward and backward")}
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 250, 60, 13, 12, 62


def committed() -> Record | None:
    return store.read(RESULTS) if RESULTS.exists() else None


def block(record: Record | None) -> str:
    """The README's text between its marks."""
    return f"{BEGIN}\n{NOTHING if record is None else PICTURED}\n{END}"


def write(record: Record) -> None:
    PICTURE.write_text(draw(record), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{block(record)}{after}", encoding="utf-8")


def command() -> list[str]:
    """The command that measures all bars of the picture, on a CPU in float32."""
    words = ["bench", "run", "--device", "cpu", "--dtype", "fp32", "--backend", "cpu", "--backend", "torch"]
    for field, values in (("op", {op for op, _, _ in SHOWN}), ("case", {case for _, case, _ in SHOWN})):
        words += [word for value in sorted(values) for word in (f"--{field}", value)]
    return [*words, *(word for name in PASSES for word in ("--pass", name)), "--json", str(RESULTS)]


def ratios(record: Record) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """For each line of the picture and each pass, milliseconds of plain torch and of vitkern."""
    rows = {(row["op"], row["case"], row["pass"], row["backend"]): row for row in record["rows"]}
    for op, case, words in SHOWN:
        found = {}
        for name in PASSES:
            pair = [rows.get((op, case, name, backend)) for backend in ("torch", "cpu")]
            if all(row is not None and row["verified"] for row in pair):
                found[name] = _times(pair)
        if found:
            yield words, found


def _times(pair: list[Row]) -> tuple[float, float]:
    plain, ours = map(store.milliseconds, pair)
    return plain, ours


def draw(record: Record) -> str:
    """The picture as SVG, for light and dark pages."""
    lines = list(ratios(record))
    most = max(plain / ours for _, found in lines for plain, ours in found.values())
    height = TOP + sum(len(found) * BAR + GAP for _, found in lines) + 34
    canvas = Canvas(WIDTH, height, "How many times as fast as plain torch vitkern is on a CPU")
    canvas.text(
        0, 16, "Times as fast as plain torch (grid_sample, or the formula), float32, one image", "head"
    )
    for at, (look, words) in enumerate(PASSES.values()):
        canvas.bar(LEFT + 110 * at, 30, 12, 12, f"fill-{look}")
        canvas.text(LEFT + 110 * at + 18, 40, words)
    y = float(TOP)
    for words, found in lines:
        canvas.text(LEFT - 10, y + len(found) * BAR / 2 + 4, words, anchor="end")
        for name, (plain, ours) in found.items():
            length = plain / ours / most * (WIDTH - LEFT - RIGHT)
            says = f"{words}, {PASSES[name][1]}: torch {plain:.3g} ms, vitkern {ours:.3g} ms"
            canvas.bar(LEFT, y, length, BAR - 2, f"fill-{PASSES[name][0]}", says)
            canvas.text(LEFT + length + 6, y + BAR - 3, f"{plain / ours:.1f}x")
            y += BAR
        y += GAP
    canvas.text(0, height - 8, f"{in_words(record['environment'])}, {record['started'][:10]}", "tick")
    return canvas.markup(SVG) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the file that there is")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if not given.draw:
        threads = ["--threads", str(given.threads)]
        done = subprocess.run([sys.executable, "-m", "vitkern", *command(), *threads], check=False)
        if done.returncode:
            return done.returncode
    write(store.read(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
