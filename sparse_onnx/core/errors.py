"""One error tree. Each error is one line for the user - what, where, what to do next - and an exit code."""

from __future__ import annotations

from typing import ClassVar


class SparseOnnxError(Exception):
    """Something that the user can act on.

    Args:
        message: what is wrong, one line.
        hint: what to do next, one line.
        where: the file, node or option that it is about.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.where = message, hint, where

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class OutsideError(SparseOnnxError):
    """Failed outside our control: no space left, a SOURCE that raises."""

    exit_code = 1


class UsageError(SparseOnnxError):
    """The request itself is wrong: an unknown target, pass or option."""

    exit_code = 2


class ModelError(SparseOnnxError):
    """The model is unreadable, invalid or unsafe."""

    exit_code = 3


class VerificationError(SparseOnnxError):
    """The result differs from its original; nothing was written."""

    exit_code = 4


class ImpossibleError(SparseOnnxError):
    """The target cannot run it, or the source cannot be exported faithfully."""

    exit_code = 5
