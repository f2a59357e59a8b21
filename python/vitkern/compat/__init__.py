# SPDX-License-Identifier: Apache-2.0
"""This package's models in the registries of other projects, each filled by the import of the module of its name.

Neither timm nor mmengine looks for plug-ins, so a script or the custom_imports of a config has to import these.
"""
