# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_transformers: models of transformers, unpatched, patched, and with a core that is free.

Random weights, one image, inference. "free": the library's own layer around a core that costs nothing and returns
zeros; no other core in this layer can be faster. A model is timed only if its outputs agreed. Times are minima over
interleaved rounds.
"""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import vitkern
from benchmarks.harness import arguments, machine


class Case(NamedTuple):
    model: str
    size: tuple[int, int] = (640, 640)
    options: Callable[[Any], dict[str, Any]] = lambda library: {}
    texts: bool = False
    selects: bool = False  # whether it picks queries by a score, which near ties put in another order


def resnet(library: Any) -> dict[str, Any]:
    backbone = library.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return dict(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None
    )


def swin(library: Any) -> dict[str, Any]:
    backbone = library.SwinConfig(image_size=640, out_indices=[2, 3, 4])
    return dict(
        backbone_config=backbone, use_timm_backbone=False, apply_layernorm_after_vision_backbone=False
    )


CASES = {
    "deformable_detr": Case("DeformableDetrForObjectDetection", (800, 1333), resnet),
    "mask2former": Case("Mask2FormerForUniversalSegmentation", (512, 512)),
    "oneformer": Case("OneFormerForUniversalSegmentation", (512, 512), texts=True),
    "grounding_dino": Case("GroundingDinoForObjectDetection", texts=True, selects=True),
    "mm_grounding_dino": Case("MMGroundingDinoForObjectDetection", texts=True, selects=True),
    "omdet_turbo": Case("OmDetTurboForObjectDetection", options=swin, texts=True),
    "rt_detr": Case("RTDetrForObjectDetection"),
    "rt_detr_v2": Case("RTDetrV2ForObjectDetection"),
    "d_fine": Case("DFineForObjectDetection"),
    "deimv2": Case("Deimv2ForObjectDetection"),
    "lw_detr": Case("LwDetrForObjectDetection", options=lambda library: dict(projector_scale_factors=[1.0])),
    "rf_detr": Case("RfDetrForObjectDetection", (560, 560)),
    "pp_doclayout_v2": Case(
        "PPDocLayoutV2ForObjectDetection",
        options=lambda library: dict(num_labels=20, class_thresholds=[0.5] * 20, class_order=list(range(20))),
    ),
    "pp_doclayout_v3": Case("PPDocLayoutV3ForObjectDetection"),
    "pp_doclayout_v4": Case("PPDocLayoutV4ForObjectDetection"),
}


def build(case: Case) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{case.model.rpartition('For')[0]}Config")(**case.options(transformers))
    return getattr(transformers, case.model)(config).eval()


def inputs(name: str, case: Case) -> dict[str, Tensor]:
    given = dict(pixel_values=torch.randn(1, 3, *case.size))
    if name == "oneformer":
        given["task_inputs"] = torch.arange(77)[None]
    elif name == "omdet_turbo":
        texts = torch.tensor([[49406, 7, 49407]])
        given |= dict(classes_input_ids=texts, tasks_input_ids=texts, classes_structure=torch.tensor([1]))
        given |= dict(classes_attention_mask=texts * 0 + 1, tasks_attention_mask=texts * 0 + 1)
    elif case.texts:
        given["input_ids"] = torch.tensor([[101, 4937, 1012, 3899, 1012, 102]])
    return given


@contextmanager
def free(name: str, model: nn.Module) -> Iterator[None]:
    """A context in which the core of this family costs nothing."""

    def core(*tensors: Any, **named: Any) -> Tensor:
        *_, value, locations = [each for each in tensors if isinstance(each, Tensor) and each.dim() >= 4][:2]
        return value.new_zeros(1).expand(*locations.shape[:2], value.shape[2] * value.shape[3])

    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    patches = []
    for function in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"):
        if hasattr(module, function):
            patches.append(mock.patch.object(module, function, core))
    if hasattr(module, "MultiScaleDeformableAttention"):
        kind = module.MultiScaleDeformableAttention
        patches.append(mock.patch.object(kind, "forward", lambda self, *tensors: core(*tensors)))
    bound = [each for each in model.modules() if hasattr(each, "ms_deformable_attn_core")]
    patches += [mock.patch.object(each, "ms_deformable_attn_core", core) for each in bound]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def outputs(model: nn.Module, given: dict[str, Tensor], case: Case) -> list[Tensor]:
    output = model(**given)
    if case.selects:
        return [output.encoder_last_hidden_state_vision]
    return [each for each in output.values() if isinstance(each, Tensor) and each.is_floating_point()]


def agree(model: nn.Module, given: dict[str, Tensor], case: Case) -> bool:
    expected = outputs(model, given, case)
    with vitkern.patched(model) as table:
        found = outputs(model, given, case)
    return bool(table) and all(map(near, found, expected))


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the tensors agree to 1e-3 of the largest number; logits of padding may be infinite in both."""
    largest = theirs[theirs.isfinite()].abs().max()
    return torch.allclose(ours, theirs, rtol=0, atol=1e-3 * largest.item())


def minima(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of the best of at least two rounds; calls are so long that each is measured singly."""
    best = dict.fromkeys(runs, math.inf)
    deadline, done = time.perf_counter() + seconds, 0
    while done < 2 or time.perf_counter() < deadline:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - started) * 1e3)
        done += 1
    return best


@torch.inference_mode()
def measure(name: str, case: Case, seconds: float) -> str:
    model, given = build(case), inputs(name, case)
    if not agree(model, given, case):
        return "  outputs differ: not timed"

    # Another model of the same parameters.
    patched = copy.deepcopy(model, {id(each): each for each in model.parameters()})
    vitkern.patch(patched)

    def with_free_core() -> None:
        with free(name, model):
            model(**given)

    runs = {
        "as it comes": lambda: model(**given),
        "patched": lambda: patched(**given),
        "free": with_free_core,
    }
    best = minima(runs, seconds)
    times = "".join(f"{best[name]:>15.0f}" for name in runs)
    gains = "".join(f"{best['as it comes'] / best[name]:>9.2f}x" for name in ("patched", "free"))
    return f"{times}{gains}{best['free'] / best['patched']:>12.0%}"


def main() -> None:
    given = arguments(__doc__.splitlines()[0], seconds=60.0)
    import transformers

    print(f"{machine()}, transformers {transformers.__version__}, batch 1, float32")
    names = "".join(f"{name:>12} ms" for name in ("as it comes", "patched", "free"))
    print(f"{'model':<18}{'size':>10}{names}{'gain':>10}{'free':>10}{'of free':>12}")
    for name, case in CASES.items():
        if given.match in name and hasattr(transformers, case.model):
            size = "x".join(map(str, case.size))
            print(f"{name:<18}{size:>10}{measure(name, case, given.seconds)}", flush=True)


if __name__ == "__main__":
    main()
