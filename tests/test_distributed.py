# SPDX-License-Identifier: Apache-2.0
"""Two processes: DistributedDataParallel and FSDP2 give the gradients of one process with the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vitkern.nn import MSDeformAttn

SHAPES, STARTS = torch.tensor([[6, 5], [3, 2]]), torch.tensor([0, 30])


def make_layer():
    torch.manual_seed(3)
    layer = MSDeformAttn(16, 2, 2, 3)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    return layer


def make_batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 5, 16, generator=generator), torch.randn(4, 36, 16, generator=generator)


def loss(layer, query, pixels):
    reference_points = torch.full((1, 5, 1, 2), 0.4)
    return layer(query, reference_points, pixels, SHAPES, STARTS).square().mean()


def worker(rank, kind, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    layer = make_layer()
    if kind == "ddp":
        layer = torch.nn.parallel.DistributedDataParallel(layer)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        layer = fully_shard(layer, mesh=mesh)
    query, pixels = (tensor[2 * rank : 2 * rank + 2] for tensor in make_batch())
    loss(layer, query, pixels).backward()
    gradients = {}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[name.removeprefix("module.")] = gradient.clone()
    if rank == 0:
        torch.save(gradients, results)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without the end of Python, in which gloo's threads may abort (torch 2.13)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_two_processes_are_those_of_one(kind, tmp_path):
    if kind == "fsdp2":
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            pytest.skip("this torch has no FSDP2")
    results = tmp_path / "gradients.pt"
    processes = mp.spawn(worker, (kind, tmp_path / "rendezvous", results), nprocs=2, join=False)
    if not any(processes.join(timeout=200) for _ in range(2)):  # each waits for one process
        for process in processes.processes:
            process.kill()
        pytest.fail("a process has not ended")
    layer = make_layer()
    loss(layer, *make_batch()).backward()
    distributed = torch.load(results)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(distributed[name], parameter.grad, msg=name)
