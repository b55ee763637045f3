"""Low-rank matrices: what a product of two thin matrices can and cannot hold.

A matrix of `out x in` numbers is cut in four steps:

1. The singular value decomposition writes it as a sum of rank-1 sheets, `s_i * u_i v_i^T`,
   sorted by their strength `s_i`. Every sheet changes every cell; none of them is "a row".
2. `truncate` keeps the `rank` strongest sheets as two thin factors, B (out x rank) and
   A (rank x in): the shapes that LoRA trains.
3. What is thrown away is known without looking at the result: Eckart and Young say that the
   error is the root of the sum of the squared singular values left out, and that no other
   matrix of that rank does better. `truncation_error` therefore reads the singular values only.
4. `energy` and `effective_rank` put one number on how fast the singular values fall;
   `subspace_similarity` and `amplification` are the two measurements by which the LoRA paper
   compares an update with another update and with the weight.

The choice made here: a full SVD in at least float32. A randomised SVD would be faster on a
4096 x 4096 weight and would make the error only approximately the one that the theorem names,
which is what the chapter is about.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from qlora_lab.errors import InputError, needs, shown


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two thin factors whose product is the best rank-`rank` copy of `matrix`.

    Args:
        matrix: (out, in), any floating-point dtype.
        rank: How many singular directions to keep, 1..min(out, in).

    Returns:
        (B, A) with B (out, rank) and A (rank, in), float32 (float64 for a float64 input);
        the rows of A are orthonormal and B carries the singular values, so `B @ A` is the copy.

    Raises:
        InputError: The matrix is not 2-D or not finite, or `rank` is out of range.

    Source:
        Eckart and Young (1936); numpy's and torch's `linalg.svd`.
    """
    matrix = _checked(matrix)
    _check_rank(rank, matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def truncation_error(matrix: Tensor, rank: int) -> float:
    """Return the Frobenius distance between `matrix` and its best rank-`rank` copy.

    Args:
        matrix: (out, in), any floating-point dtype.
        rank: 0..min(out, in); 0 keeps nothing, so the error is the norm of the matrix.

    Returns:
        sqrt(sum of s_i^2 for i > rank), in the unit of the matrix's entries.

    Raises:
        InputError: The matrix is not 2-D or not finite, or `rank` is out of range.

    Source:
        Eckart and Young (1936).
    """
    matrix = _checked(matrix)
    _check_rank(rank, matrix, lowest=0)
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


def energy(matrix: Tensor, rank: int) -> float:
    """Return the share of the squared entries that the `rank` strongest directions hold.

    Args:
        matrix: (out, in), any floating-point dtype, not all zero.
        rank: 0..min(out, in).

    Returns:
        sum of s_i^2 for i <= rank, over the sum of all: 0 (nothing) to 1 (everything).

    Raises:
        InputError: The matrix is not 2-D, not finite or all zero, or `rank` is out of range.

    Source:
        The squared Frobenius norm is the sum of the squared singular values.
    """
    matrix = _checked(matrix, allow_zero=False)
    _check_rank(rank, matrix, lowest=0)
    squares = torch.linalg.svdvals(matrix).square()
    return float(squares[:rank].sum() / squares.sum())


def effective_rank(matrix: Tensor) -> float:
    """Return the rank that the matrix seems to have: exp of the entropy of its singular values.

    Args:
        matrix: (out, in), any floating-point dtype, not all zero.

    Returns:
        A real number from 1 (one direction holds all) to min(out, in) (all equally strong).

    Raises:
        InputError: The matrix is not 2-D, not finite or all zero.

    Source:
        Roy and Vetterli, "The effective rank" (EUSIPCO 2007), definition 1: p_i = s_i / sum(s).
    """
    s = torch.linalg.svdvals(_checked(matrix, allow_zero=False))
    return float(torch.special.entr(s / s.sum()).sum().exp())


def subspace_similarity(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """Return how much of the top-`i` input directions of `first` lies in the top-`j` of `second`.

    Args:
        first: (rows, in), for example a LoRA matrix A of rank `rows`, or a whole update.
        second: (other rows, in): the same input width.
        i: How many right singular vectors of `first`, 1..min(rows, in).
        j: How many right singular vectors of `second`, 1..min(other rows, in).

    Returns:
        phi = ||U_i^T U_j||_F^2 / min(i, j): 0 (orthogonal) to 1 (the smaller lies in the larger).

    Raises:
        InputError: The widths differ, a matrix is not 2-D or not finite, or i or j out of range.

    Source:
        Hu et al., LoRA (arXiv 2106.09685), section 7.2, equation 4.
    """
    first, second = _checked(first), _checked(second)
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"input widths {first.shape[1]} and {second.shape[1]} differ: directions can be "
            "compared only in the same space"
        )
    _check_rank(i, first, name="i")
    _check_rank(j, second, name="j")
    directions_i = torch.linalg.svd(first, full_matrices=False).Vh[:i]
    directions_j = torch.linalg.svd(second, full_matrices=False).Vh[:j]
    return float((directions_i @ directions_j.to(directions_i).T).square().sum() / min(i, j))


def amplification(weight: Tensor, delta: Tensor, rank: int) -> float:
    """Return how much stronger an update is than the weight in the update's own directions.

    Args:
        weight: (out, in), the frozen weight.
        delta: (out, in), the update that training added to it.
        rank: How many of the update's singular directions to look along, 1..min(out, in).

    Returns:
        ||delta||_F / ||U^T weight V||_F, where U and V are the update's top singular vectors;
        large means that the update amplifies what the weight holds but hardly uses.

    Raises:
        InputError: The shapes differ, a matrix is not 2-D or not finite, the update or the
            weight along it is all zero, or `rank` is out of range.

    Source:
        Hu et al., LoRA (arXiv 2106.09685), section 7.3 and Table 7 (21.5 at r = 4).
    """
    weight, delta = _checked(weight), _checked(delta, allow_zero=False)
    if weight.shape != delta.shape:
        raise InputError(
            f"weight {tuple(weight.shape)} and update {tuple(delta.shape)} differ in shape: "
            "give the update of this very weight"
        )
    _check_rank(rank, delta)
    u, _, vh = torch.linalg.svd(delta, full_matrices=False)
    along = (u[:, :rank].T @ weight.to(delta) @ vh[:rank].T).norm()
    if along == 0:
        raise InputError(
            "the weight is zero along the update's directions: there is nothing to amplify"
        )
    return float(delta.norm() / along)


def _checked(matrix: Tensor, allow_zero: bool = True) -> Tensor:
    needs("tensor", matrix, "matrix")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"shape {tuple(matrix.shape)} is not a matrix: give a 2-D tensor")
    if not matrix.is_floating_point():
        raise InputError(f"dtype {matrix.dtype} has no SVD: convert the matrix to float32")
    if not torch.isfinite(matrix).all():
        raise InputError("the matrix holds NaN or infinity: its singular values are undefined")
    if not allow_zero and not matrix.any():
        raise InputError("the matrix is all zero: it has no directions to measure")
    # LAPACK knows float32 and float64 only.
    return matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))


def _check_rank(rank: int, matrix: Tensor, name: str = "rank", lowest: int = 1) -> None:
    highest = min(matrix.shape)
    whole_number = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole_number or not lowest <= rank <= highest:
        raise InputError(
            f"{name} {shown(rank)} is out of range: a {matrix.shape[0]} x {matrix.shape[1]} matrix "
            f"allows whole numbers from {lowest} to {highest}"
        )
