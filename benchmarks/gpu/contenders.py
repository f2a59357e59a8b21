# SPDX-License-Identifier: Apache-2.0
"""The contenders of vitkern's kernels beside plain torch: torch.compile, torch's fused attention, every peer.

All take the inputs of a workload, and each is checked against the formula before it is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.bench_token_pool import pool_by_attention, project_by_attention
from benchmarks.peers import PEERS, Peer
from vitkern.cases import Case, Function, MsDeformAttnCase, MsDeformAttnInputs, levels_of, locations_of
from vitkern.cases.attention_ops import near_fused_inputs
from vitkern.cases.record import Op, Problem

OURS = ("cuda", "triton")
COMPILED, OURS_COMPILED, ATTENTION = "torch compiled", "vitkern compiled", "torch attention"
BY_ATTENTION = {"token_pool": pool_by_attention, "token_project": project_by_attention}
# These stand under the names above already.
OTHER_PEERS = {name: peer for name, peer in PEERS.items() if not name.startswith("grid_sample")}


def known() -> tuple[str, ...]:
    """All contenders of any op that `names` may return."""
    return COMPILED, OURS_COMPILED, ATTENTION, *OTHER_PEERS


def names(op: Op, device: str, without: Sequence[str] = ()) -> tuple[dict[str, Peer | None], dict[str, str]]:
    """An op's usable contenders, each with its peer if it has one, and the reasons why others cannot be used."""
    of_the_op = [COMPILED, OURS_COMPILED]
    if op.name in BY_ATTENTION:
        of_the_op.append(ATTENTION)
    if op.name.startswith("ms_deform_attn"):
        of_the_op += OTHER_PEERS
    reasons = {
        name: "left out by --without" if name in without else _why_not(name, device) for name in of_the_op
    }
    found = {name: OTHER_PEERS.get(name) for name, reason in reasons.items() if reason is None}
    return found, {name: reason for name, reason in reasons.items() if reason is not None}


def _why_not(name: str, device: str) -> str | None:
    if name in (COMPILED, OURS_COMPILED):
        return _no_compiler(device)
    return None if name == ATTENTION else _objection(OTHER_PEERS[name], device)


@functools.cache  # some look for a network before they give up
def _objection(peer: Peer, device: str) -> str | None:
    return peer.objection(device)


def _no_compiler(device: str) -> str | None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "absent: torch.compile needs triton for a GPU"
    return None


def functions(op: Op, case: Case, work: Problem, found: dict[str, Peer | None]) -> dict[str, Function]:
    """The contenders' functions of the work's inputs. They also fit a new copy of the work."""
    torch.compiler.reset()
    made: dict[str, Function] = {}
    for name, peer in found.items():
        if peer is not None:
            made[name] = _of_peer(op, case, work, peer)
        elif name == ATTENTION:
            made[name] = BY_ATTENTION[op.name]
        elif name == COMPILED:
            made[name] = torch.compile(work.by_torch, dynamic=False)
        else:
            made[name] = torch.compile(functools.partial(work.call, backend=None), dynamic=False)
    return made


def _of_peer(op: Op, case: Case, work: Problem, peer: Peer) -> Function:
    """The peer's function; no peer has the fused form, so softmax and locations are computed in torch before it."""
    assert isinstance(case, MsDeformAttnCase)
    value, *rest = work.inputs.values()
    levels = levels_of(case, str(value.device))
    attention = peer.attention(MsDeformAttnInputs(value, *levels, *rest))
    if op.name != "ms_deform_attn_fused":
        return attention
    points = _reference_points(case, value.dtype, str(value.device))

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        return attention(value, locations_of(points, offsets, levels[0]).to(value.dtype), weights)

    return fused


@functools.lru_cache(maxsize=1)  # to draw them takes seconds, and all peers have the same
def _reference_points(case: MsDeformAttnCase, dtype: torch.dtype, device: str) -> Tensor:
    (_, points, _, _), _ = near_fused_inputs(case, dtype, device)
    return points
