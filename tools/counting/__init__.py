# SPDX-License-Identifier: Apache-2.0
"""The census of other projects' layers: the ones that ``vitkern.patch`` replaces, and the reasons why others stay.

``records`` lists the classes. ``sources`` gets the code of a project and ``loading`` imports single files of it, with
stand-ins for missing packages. ``one`` tries one class and times it; ``table`` writes the results.
"""
