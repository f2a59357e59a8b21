# SPDX-License-Identifier: Apache-2.0
"""Shared by the examples: arguments, devices and processes, a progress bar, checkpoints that survive a kill, a loop.

A script makes a :class:`Run` from its arguments, passes its model to :meth:`Run.parallel` and the rest to :func:`fit`.
``python`` starts one process; ``torchrun`` trains with DDP, or with FSDP2 if given ``--fsdp``. The batches are the same
for any number of processes. Started again after a kill, a script resumes from its last epoch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

Samples = TypeVar(
    "Samples", bound=tuple[Tensor, ...]
)  # a NamedTuple, whose fields have a row for each sample
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(description: str | None, *, output: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the common arguments; `defaults` are for epochs, batch_size and lr."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="batch size of all processes together")
    parser.add_argument("--samples", type=int, help="a quick try: the first so many of each set, not all")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ..."
    )
    parser.add_argument("--amp", choices=AMP, default="off", help="train under autocast")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: shard parameters, not only data")
    parser.add_argument("--threads", type=int, help="number of CPU threads; default: torch's")
    parser.add_argument(
        "--output", type=Path, default=Path(output), help="folder for checkpoints and pictures"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start anew instead of resuming from a checkpoint"
    )
    parser.set_defaults(**defaults)
    return parser


def leave(status: int) -> NoReturn:
    """Ends the process. Under torchrun it skips the end of Python, in which gloo's threads may abort (torch 2.13)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Run:
    """A run of a script: its device, its rank among the processes, its precision. A context manager."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = self._device(options.device)
        self.amp: torch.dtype | None = AMP[options.amp]
        if self.amp is torch.float16 and self.device.type == "cpu":
            raise SystemExit("--amp fp16 needs a GPU: use --amp bf16 on a CPU")
        if options.fsdp and self.world_size == 1:
            raise SystemExit("--fsdp shards over processes: start the script with torchrun")
        self.fsdp, self.seed = options.fsdp, options.seed
        self.output: Path = options.output
        self.fresh = options.fresh
        self.samples: int | None = options.samples
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(self.seed)

    def _device(self, wanted: str) -> torch.device:
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(wanted)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return device

    def __enter__(self) -> Run:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.output.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def say(self, *text: object) -> None:
        if self.main:
            print(*text, flush=True)

    def parallel(self, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> nn.Module:
        """Moves the model to the device and shares its gradients between processes; FSDP2 shards block by block."""
        model = model.to(self.device)
        if self.world_size == 1:
            return model
        if not self.fsdp:
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def some(self, data: Samples) -> Samples:
        """A set of samples on the device, or the first --samples of it."""
        return type(data)(*(part[: self.samples].to(self.device) for part in data))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.amp) if self.amp else nullcontext()

    def batches(self, samples: int, batch_size: int, epoch: int | None = None) -> Iterator[Tensor]:
        """This process's share of each batch of sample numbers: in an epoch shuffled and whole, else in order."""
        if batch_size % self.world_size:
            raise SystemExit(f"--batch-size {batch_size} cannot be shared by {self.world_size} processes")
        order = torch.arange(samples)
        if epoch is not None:
            shuffle = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(samples, generator=shuffle)[: samples // batch_size * batch_size]
        for batch in order.split(batch_size):
            yield batch.tensor_split(self.world_size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sums over all processes."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values


class Progress:
    """A bar with the time left; if the output is not a terminal, a line for each note."""

    WIDTH = 24

    def __init__(self, label: str, total: int, done: int = 0, *, show: bool = True) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.show, self.live = show, show and sys.stderr.isatty()
        self.start = time.monotonic()

    def step(self, note: str = "") -> None:
        self.done += 1
        if self.live:
            print(f"\r\033[K{self}", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self.show:
            print(f"\r\033[K{self}  {text}" if self.live else f"{self}  {text}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        filled = self.WIDTH * self.done // max(self.total, 1)
        elapsed = time.monotonic() - self.start
        left = elapsed / max(self.done - self.first, 1) * (self.total - self.done)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        return f"{self.label} [{bar}] {self.done}/{self.total}, {left:.0f} s left"


def write(state: Any, path: Path) -> None:
    """As torch.save, but atomic: after a kill at any time the file is the old or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def cosine(lr: float, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    *,
    label: str,
    samples: int,
    batch_size: int,
    epochs: int,
    lr: float,
    evaluate: Callable[[], str] | None = None,
    warmup_epochs: float = 1.0,
) -> None:
    """Trains, and writes `label`.pt after each epoch; the next start resumes from it.

    Args:
        model: the result of :meth:`Run.parallel`. Only its trained parameters are written.
        optimizer: an optimizer of one group; its learning rate follows a cosine from `lr`.
        loss: a function from sample numbers to their mean loss. Called in training mode, under autocast if requested.
        samples: number of samples.
        evaluate: a function that returns a note for after an epoch. Called in evaluation mode, in all processes.
    """
    path = run.output / f"{label}.pt"
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    first = 0
    if path.exists() and not run.fresh:
        first = _resume(path, model, optimizer, scaler)
        run.say(f"{label}: {first} of {epochs} epochs are done in {path}")
    steps = samples // batch_size
    if not steps:
        raise SystemExit(f"--batch-size {batch_size} is more than the {samples} samples")
    progress = Progress(label, epochs * steps, first * steps, show=run.main)
    for epoch in range(first, epochs):
        torch.manual_seed((run.seed * 1000 + epoch) * run.world_size + run.rank)
        model.train()
        for batch in run.batches(samples, batch_size, epoch):
            for group in optimizer.param_groups:
                group["lr"] = cosine(lr, progress.done, epochs * steps, int(warmup_epochs * steps))
            with run.autocast():
                value = loss(batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            progress.step()
        model.eval()
        with torch.no_grad():
            said = evaluate() if evaluate else ""
        progress.note(f"epoch {epoch + 1}: loss {value.item():.3f} {said}")
        _save(path, model, optimizer, scaler, epoch + 1, run.main)
    model.eval()


OPTIONS = dict(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def _save(path: Path, model: nn.Module, optimizer: Any, scaler: Any, epochs: int, main: bool) -> None:
    state = {
        "epochs": epochs,
        "model": get_model_state_dict(model, options=StateDictOptions(**OPTIONS)),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**OPTIONS)),
        "scaler": scaler.state_dict(),
    }
    if main:
        write(state, path)
    if dist.is_initialized():
        dist.barrier()  # other processes read the file next


def _resume(path: Path, model: nn.Module, optimizer: Any, scaler: Any) -> int:
    options = StateDictOptions(**OPTIONS, strict=False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        scaler.load_state_dict(state["scaler"])
        return int(state["epochs"])
    except Exception as error:  # a damaged file may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SystemExit(f"{path} is torn, or of another model ({why}): --fresh starts anew") from error
