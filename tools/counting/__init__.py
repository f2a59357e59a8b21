# SPDX-License-Identifier: Apache-2.0
"""The layers of other projects, counted: which of them ``vitkern.patch`` replaces, and why it leaves the others.

``records`` lists the classes. ``sources`` gets the text of a project and ``loading`` imports single files of it,
with stand-ins for all packages that are not there. ``one`` tries one class and times it; ``table`` writes the results.
"""
