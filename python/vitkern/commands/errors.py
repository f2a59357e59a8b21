# SPDX-License-Identifier: Apache-2.0
"""The one error of the commands, which vitkern.cli prints."""

INTERRUPTED = 130  # the exit status after Ctrl-C, as in shells


class CommandError(Exception):
    """A request that cannot be met; the message is one sentence that says why and what to do."""


def in_one_line(error: BaseException) -> str:
    """The error's message in one line, to be put into a sentence."""
    return " ".join(str(error).split())[:300]
