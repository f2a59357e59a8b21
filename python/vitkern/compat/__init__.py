# SPDX-License-Identifier: Apache-2.0
"""Other projects: this package's models in their registries, and its kernels under their names.

The import of ``mmdet``, ``mmseg`` or ``timm`` from here fills the registry of that project; neither timm nor mmengine
looks for plug-ins, so a script or the custom_imports of a config has to. ``deformable_detr``, ``mmcv`` and
``groundingdino`` hold what these projects define, and ``install`` puts it in their place.
"""
