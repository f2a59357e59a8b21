# SPDX-License-Identifier: Apache-2.0
"""Other projects: this package's models in their registries, and its kernels under their names.

The import of ``mmdet``, ``mmseg`` or ``timm`` from here fills the registry of that project; neither timm nor mmengine
looks for plug-ins, so a script or the custom_imports of a config has to.

``deformable_detr`` and ``mmcv`` hold what these projects define. ``install`` puts it in their place as it is imported,
which ``imports`` hears of; ``run`` does so for a script. ``patching`` is for layers that are built: ``forms`` knows
them by their code, ``layers`` has the forwards they get, ``transformers`` is what that library asks for besides. Both
give back a ``table``. ``kernels`` is for the package of that name.
"""
