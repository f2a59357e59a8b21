# SPDX-License-Identifier: Apache-2.0
"""The comparisons themselves: each one catches the mistake that it is made for."""

import pytest
import torch

from tests.helpers import guarded_memory


def test_guarded_memory_shows_what_was_not_written():
    with guarded_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2, 2).new_empty(4).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.int64))[0] == torch.iinfo(torch.int64).max


@pytest.mark.parametrize("offset", [-1, 3])
def test_guarded_memory_shows_a_write_outside(offset):
    with pytest.raises(AssertionError, match="outside its output"), guarded_memory():
        tensor = torch.empty(3)
        torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + offset).zero_()
