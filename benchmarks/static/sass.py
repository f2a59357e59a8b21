# SPDX-License-Identifier: Apache-2.0
"""The machine code of a kernel, read from its cubin without a GPU: resources, accesses, loops.

Instructions are counted along the longest path: of two alternatives the more expensive one counts, and of code in
sequence all. Code that only a diverged warp runs is left out.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_FLOW = ("BRA", "EXIT", "RET", "BSYNC", "BRX", "JMP")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # LDG.E.128.CONSTANT
    text: str
    conditional: bool  # runs under a predicate


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int]  # addresses of blocks

    def count(self, opcode: str) -> int:
        return sum(re.match(opcode, i.opcode) is not None for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]


@dataclass
class Kernel:
    """One entry function."""

    symbol: str
    registers: int = 0
    stack: int = 0  # bytes; spilled registers live there
    shared: int = 0  # bytes, without those that the launch asks for
    instructions: list[Instruction] = field(default_factory=list)

    def __post_init__(self):
        self.blocks = _blocks(self.instructions)
        self.loops = _loops(self.blocks)

    def opcodes(self, pattern: str) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions if re.match(pattern, i.opcode))

    def count(self, blocks: frozenset[int], opcode: str) -> int:
        return sum(self.blocks[b].count(opcode) for b in blocks)

    def longest_path(self, blocks: frozenset[int], head: int, cost: Callable[[int], int]) -> int:
        """The cost of the most expensive path from `head` through `blocks`, each of them passed at most once."""
        best: dict[int, int] = {}
        for block in reversed(_in_order(self.blocks, head, blocks)):
            after = [best.get(s, 0) for s in self.blocks[block].successors if s in blocks]
            best[block] = cost(block) + max(after, default=0)
        return best[head]

    def size(self, block: int) -> int:
        return len(self.blocks[block].instructions)


def cuobjdump() -> str | None:
    """The disassembler in Triton's package, or else that of a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.exists():
            return str(carried)
    return shutil.which("cuobjdump")


def _dumped(what: str, file: Path, *options: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump: neither Triton's package nor a CUDA toolkit is here")
    # To standard error goes a warning where tool and compiler differ in age.
    return subprocess.check_output([tool, what, *options, file], text=True, stderr=subprocess.DEVNULL)


def architectures(file: Path) -> set[int]:
    """The cards, as in 90 for sm_90, that an object file has machine code for."""
    return set(map(int, re.findall(r"\.sm_(\d+)\.cubin", _dumped("--list-elf", file))))


def read(file: Path, arch: int | None = None) -> dict[str, Kernel]:
    """Every kernel of a cubin, or of one architecture of an object file, by its symbol."""
    options = () if arch is None else ("--gpu-architecture", f"sm_{arch}")
    usage, text = (_dumped(what, file, *options) for what in ("--dump-resource-usage", "--dump-sass"))
    code = {re.match(r"\S+", part)[0]: _instructions(part) for part in text.split("Function : ")[1:]}
    kernels = {}
    for symbol, figures in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        resources = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", figures)}
        stack = resources["STACK"] + resources["LOCAL"]
        kernels[symbol] = Kernel(symbol, resources["REG"], stack, resources["SHARED"], code.get(symbol, []))
    return kernels


def _instructions(text: str) -> list[Instruction]:
    found = []
    for address, line in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text, re.M):
        predicate, opcode = re.match(r"(@!?U?P\w+\s+)?(\S+)", line).groups()
        if opcode != "NOP":
            found.append(Instruction(int(address, 16), opcode, line, predicate is not None))
    return found


def _target(instruction: Instruction) -> int | None:
    numbers = re.findall(r"0x([0-9a-f]+)", instruction.text)
    return int(numbers[-1], 16) if numbers else None


def _blocks(instructions: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by their first address. A branch target that is a NOP moves to what follows it."""
    addresses = [i.address for i in instructions]

    def at(address: int | None) -> int | None:
        return next((a for a in addresses if address is not None and a >= address), None)

    reconverge: dict[str, int | None] = {}  # where BSYNC of a barrier register leads
    jumps: dict[int, list[int | None]] = {}  # by the address of the jump
    for i, instruction in enumerate(instructions):
        opcode = instruction.opcode.split(".")[0]
        after = addresses[i + 1] if i + 1 < len(instructions) else None
        if opcode == "BSSY":
            reconverge[re.search(r"\bB\d+", instruction.text)[0]] = at(_target(instruction))
        if opcode not in _FLOW or instruction.opcode.startswith("BRA.DIV"):
            continue
        if opcode == "BSYNC":
            jumps[instruction.address] = [reconverge.get(re.search(r"\bB\d+", instruction.text)[0], after)]
        else:
            jumps[instruction.address] = [at(_target(instruction))] if opcode in ("BRA", "JMP") else []
            if instruction.conditional or re.search(r"\bBRA\S* !?U?P\d", instruction.text):
                jumps[instruction.address].append(after)
    heads = {t for targets in jumps.values() for t in targets if t is not None} | set(addresses[:1])
    blocks: dict[int, Block] = {}
    for i, instruction in enumerate(instructions):
        if instruction.address in heads or i == 0 or instructions[i - 1].address in jumps:
            blocks[instruction.address] = current = Block([], [])
        current.instructions.append(instruction)
        if instruction.address in jumps:
            current.successors = [t for t in jumps[instruction.address] if t is not None]
        elif i + 1 < len(instructions):
            current.successors = [addresses[i + 1]]
    return blocks


def _in_order(blocks: dict[int, Block], head: int, within: frozenset[int]) -> list[int]:
    """Blocks in reverse postorder: each before its successors, except for jumps back in loops."""
    seen, order = {head}, []
    stack = [(head, iter(blocks[head].successors))]
    while stack:
        block, successors = stack[-1]
        following = next((s for s in successors if s in within and s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return order[::-1]


def _loops(blocks: dict[int, Block]) -> list[Loop]:
    """Natural loops: a jump back to a dominating block, and the blocks that reach the jump without passing that one."""
    if not blocks:
        return []
    entry = next(iter(blocks))
    order = _in_order(blocks, entry, frozenset(blocks))
    before: dict[int, set[int]] = {block: set() for block in order}
    for block in order:
        for successor in blocks[block].successors:
            before[successor].add(block)
    dominators = {block: set(order) for block in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            own = set.intersection(*(dominators[b] for b in before[block])) | {block}
            changed |= own != dominators[block]
            dominators[block] = own
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in set(blocks[block].successors) & dominators[block]:
            body, todo = bodies.setdefault(head, {head}), [block]
            while todo:
                inner = todo.pop()
                if inner not in body:
                    body.add(inner)
                    todo += before[inner]
    # A block that only jumps to itself at the end is the padding behind the code.
    return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]
