"""The inverse of a unit triangular matrix, which linear attention computes row by row, in few large steps.

The delta rule needs `(I - A)^-1 - I` of a strictly lower triangular A, one for each chunk of tokens::

    for i in range(1, n):
        row, sub = A[..., i, :i].clone(), A[..., :i, :i].clone()
        A[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)

Unrolled that is hundreds of nodes a layer. The inverse T of a block triangular matrix comes from those of its diagonal
blocks: with L = I - A, blocks of s rows, and M what lies below the diagonal within blocks of 2s rows,
`T <- T - T M(L) T`, from s = 1 on; as stable as substitution row by row.
"""

from __future__ import annotations

import ast

import torch
from torch import Tensor

NAME = "_sparse_onnx_substituted"
_FORM = (
    "for {i} in range(1, {n}):\n"
    "    {row} = {a}[..., {i}, :{i}].clone()\n"
    "    {sub} = {a}[..., :{i}, :{i}].clone()\n"
    "    {a}[..., {i}, :{i}] = {row} + ({row}.unsqueeze(-1) * {sub}).sum(-2)"
)


def replaced(loop: ast.For) -> ast.stmt | None:
    """The one statement that stands for the loop; None where it is another loop."""
    if len(loop.body) != 3 or not isinstance(loop.iter, ast.Call) or len(loop.iter.args) != 2:
        return None
    row, sub, store = loop.body
    if not (isinstance(row, ast.Assign) and isinstance(sub, ast.Assign) and isinstance(store, ast.Assign)):
        return None
    target = store.targets[0]
    if not isinstance(target, ast.Subscript):
        return None
    names = {
        "i": ast.unparse(loop.target),
        "n": ast.unparse(loop.iter.args[1]),
        "row": ast.unparse(row.targets[0]),
        "sub": ast.unparse(sub.targets[0]),
        "a": ast.unparse(target.value),
    }
    if ast.unparse(loop) != ast.unparse(ast.parse(_FORM.format(**names))):
        return None
    return ast.parse("{a} = {name}({a}, {n})".format(name=NAME, **names)).body[0]


def substituted(matrix: Tensor, size: int) -> Tensor:
    """What the loop leaves in `matrix` `[..., size, size]`, strictly lower triangular."""
    index = torch.arange(size)
    identity = torch.eye(size, dtype=matrix.dtype)
    lower, inverse, block = -matrix, identity, 1
    while block < size:
        same = index[:, None] // (2 * block) == index[None, :] // (2 * block)
        below = same & (index[:, None] // block > index[None, :] // block)
        inverse = inverse - inverse @ (lower * below.to(matrix.dtype)) @ inverse
        block *= 2
    return inverse - identity
