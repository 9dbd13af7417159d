"""SVD-KG's truncation: a matrix cut to its leading singular triplets, fast for large matrices of which little is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ones_lib.ffn import compute_dtype

Factors = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r], V^T [r, n] of a matrix [m, n], r = min(m, n)

#: Largest ratio of squared singular values, within the subspace, that float32 resolves in the polynomial filter.
STEEP = 1e5
#: The same for bfloat16.
ROUGH = 50


def truncated(matrix: Tensor, rank: int, exact: bool | None = None) -> Tensor:
    """The matrix [m, n] cut to its ``rank`` leading singular triplets, in float32 at least.

    Args:
        exact: True for the full decomposition, False for the fast way (:func:`_projected`). None takes the fast way if
            min(m, n) is at least 512 and at least 4 times the directions that the fast way uses.
    """
    small, directions = min(matrix.shape), rank + max(32, rank // 16)
    if exact is None:
        exact = small < 512 or 4 * directions > small
    if not exact and directions <= small:
        wide = matrix.shape[0] < matrix.shape[1]
        cut = _projected(matrix.T if wide else matrix, rank, directions)
        if cut is not None:
            return cut.T if wide else cut
    u, s, vh = torch.linalg.svd(matrix.to(compute_dtype(matrix)), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def _projected(matrix: Tensor, rank: int, directions: int) -> Tensor | None:
    """A tall matrix, projected on an approximation of its leading singular subspace, then cut to ``rank`` triplets.

    The subspace has some more ``directions`` than ``rank``. It starts from a fixed random draw with one round of randomised
    subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). Two more rounds apply the Chebyshev
    polynomial that is small on the singular values to be left out (Zhou, Saad, Tiago and Chelikowsky, 2006). In the tests,
    flat spectra included, the part left out is less than 1% above the minimum in the Frobenius norm.

    A bfloat16 matrix uses bfloat16 products in these rounds, if the machine is fast at them and the singular values allow
    it: the rounds only find the subspace, and the projection itself is in float32.

    Returns None for a spectrum too steep for the precision of the filter.
    """
    precise = matrix.to(compute_dtype(matrix))
    rough = matrix if _multiplies_quickly(matrix) else precise
    dtype = precise.dtype

    drawn = torch.randn(precise.shape[1], directions, generator=torch.Generator().manual_seed(0), dtype=dtype)
    start = torch.linalg.qr(_product(rough.T, _product(rough, drawn.to(matrix.device))).to(dtype)).Q
    image = _product(rough, start)
    seen = image.to(dtype)
    squares = torch.linalg.eigvalsh((seen.T @ seen).double())  # approximate squared singular values, ascending
    if squares[-1] > STEEP * squares[0]:
        return None
    if rough is not precise and squares[-1] > ROUGH * squares[0]:
        rough, image = precise, _product(precise, start)

    # T_2 of 2 A^T A / c - 1. It maps the squares to be left out, those up to c, to [-1, 1].
    twice = 2 / squares[0].item()
    once = twice * _product(rough.T, image).to(dtype) - start
    filtered = 2 * (twice * _product(rough.T, _product(rough, once)).to(dtype) - once) - start
    basis = torch.linalg.qr(filtered).Q
    image = _product(precise, basis)
    rotation = torch.linalg.eigh((image.T @ image).double()).eigenvectors[:, -rank:].to(dtype)
    return _product(image @ rotation, (basis @ rotation).T)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, [m, k] and [k, n], in the dtype of ``a``."""
    b = b.to(a.dtype)
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return a @ b
    # As a 1x1 convolution it is computed by oneDNN: on AMD CPUs twice as fast as the MKL behind ``@``.
    m, k = a.shape
    pixels = a.reshape(1, m, 1, k).permute(0, 3, 1, 2)  # channels last: nothing is copied
    return F.conv2d(pixels, b.T.contiguous()[..., None, None]).permute(0, 2, 3, 1).reshape(m, -1)


def _multiplies_quickly(matrix: Tensor) -> bool:
    """Whether products in bfloat16 are faster than in float32, for a bfloat16 matrix on its device."""
    if matrix.dtype != torch.bfloat16:
        return False
    able = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.14 on; before that unknown
    return matrix.device.type != "cpu" or able.get("avx512_bf16", False) or able.get("amx_bf16", False)
