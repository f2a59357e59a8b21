# SPDX-License-Identifier: Apache-2.0
"""Other projects: this package's models in their registries, and its kernels under their names.

The import of ``mmdet``, ``mmseg`` or ``timm`` from here fills the registry of that project; neither timm nor mmengine
looks for plug-ins, so a script or the custom_imports of a config has to.

``deformable_detr`` and ``mmcv`` hold the definitions of these projects. ``install`` puts them in place on import, by
the hooks of ``imports``; ``run`` does so for a script. ``patching`` is for built layers: ``forms`` recognises them by
their code, ``layers`` has the forwards they get, and ``transformers`` has the extra parts for that library. Both
return a ``table``. ``kernels`` is for the package of that name.
"""
