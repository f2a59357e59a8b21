# SPDX-License-Identifier: Apache-2.0
"""The contract of all backends once more, for the CUDA kernels that sum grad_value in order instead of by atomics."""

from __future__ import annotations

import pytest

from tests import test_ms_deform_attn, test_ms_deform_attn_fused
from tests.runners import ORDERED

pytestmark = list(ORDERED.marks)


@pytest.fixture
def runner():
    with ORDERED.active():
        yield ORDERED


PLAIN = (
    "test_matches_the_oracle",
    "test_matches_the_oracle_on_shapes_of_real_models",
    "test_16_bit_values_with_float32_coordinates",
    "test_levels_with_their_own_number_of_points",
    "test_nearest",
    "test_extreme_locations_add_nothing_and_get_no_gradient",
    "test_locations_exactly_on_edges_and_centres",
    "test_non_finite_gradients_propagate",
    "test_empty_inputs_give_empty_or_zero_results",
    "test_any_strides",
    "test_only_the_gradients_that_are_asked_for",
)
FUSED = (
    "test_matches_the_oracle",
    "test_levels_with_their_own_number_of_points",
    "test_nearest",
    "test_softmax_of_extreme_logits",
    "test_offsets_that_are_not_finite_add_nothing_but_take_their_share",
    "test_only_the_gradients_that_are_asked_for",
    "test_empty_inputs",
)
# Collected here as tests of this module, whose runner they then take.
globals().update({name: getattr(test_ms_deform_attn, name) for name in PLAIN})
globals().update({f"{name}_fused": getattr(test_ms_deform_attn_fused, name) for name in FUSED})
