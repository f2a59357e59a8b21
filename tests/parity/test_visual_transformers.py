# SPDX-License-Identifier: Apache-2.0
"""The token modules against equations (1) to (5) of Visual Transformers (arXiv 2006.03677), recorded in float64.

``vt_equations.pt`` holds a map, tokens, the matrices of the equations and the result of each equation.
"""

from pathlib import Path

import pytest
import torch

import vitkern
from vitkern.nn import FilterTokenizer, RecurrentTokenizer, TokenProjector, TokenTransformer

RECORDED = torch.load(Path(__file__).parent / "vt_equations.pt", weights_only=True)
INPUTS, EXPECTED = RECORDED["inputs"], RECORDED["outputs"]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


def module(kind, *sizes, backend, **matrices):
    """A module whose Linear layers hold the paper's matrices, which multiply from the right."""
    made = kind(*sizes, backend=backend).double()
    made.load_state_dict({f"{name}.weight": matrix.T for name, matrix in matrices.items()}, strict=True)
    return made


def close(actual, name):
    torch.testing.assert_close(actual, EXPECTED[name], atol=1e-9, rtol=0)


@BACKENDS
def test_filter_tokenizer(backend):
    tokenizer = module(FilterTokenizer, 32, 16, backend=backend, attention=INPUTS["WA"])
    close(tokenizer(INPUTS["X"]), "T_filter")
    close(tokenizer.attention_map(INPUTS["X"]), "A")


@BACKENDS
def test_recurrent_tokenizer(backend):
    tokenizer = module(RecurrentTokenizer, 32, backend=backend, attention=INPUTS["WTR"])
    close(tokenizer(INPUTS["X"], INPUTS["Tin"]), "T_rec")
    close(tokenizer.attention_map(INPUTS["X"], INPUTS["Tin"]), "A_rec")


def out_tokens(backend):
    matrices = dict(key=INPUTS["K"], query=INPUTS["Q"], fc1=INPUTS["F1"], fc2=INPUTS["F2"])
    return module(TokenTransformer, 32, backend=backend, **matrices)(EXPECTED["T_filter"])


@BACKENDS
def test_transformer(backend):
    close(out_tokens(backend), "T_out")


@BACKENDS
def test_projector(backend):
    projector = module(TokenProjector, 32, backend=backend, query=INPUTS["WQ"], key=INPUTS["WK"])
    close(projector(INPUTS["X"], EXPECTED["T_out"]), "X_out")


@BACKENDS
def test_weights_of_the_projection(backend):
    """Tokens that are unit vectors, and a map of zeros, make token_project return its softmax."""
    query, key = INPUTS["X"] @ INPUTS["WQ"], EXPECTED["T_out"] @ INPUTS["WK"]
    units = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    weights = vitkern.token_project(query.new_zeros(2, 49, 16), query, key, units, backend=backend)
    close(weights, "P")
