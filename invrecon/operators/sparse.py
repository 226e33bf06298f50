"""A sparse matrix as a linear layer: the primitive behind the CT projectors."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_MAX_COLUMNS = 8
"""Columns of one sparse-dense product; wider right-hand sides fall out of the cache."""


class SparseMatrix(nn.Module):
    """A constant `(M, N)` CSR matrix `A` with its transpose stored: `forward` is `A x`, `adjoint` is `A^T y`.

    Both directions are row-parallel products, and each is the other's derivative. torch's own derivative of a
    CSR product costs 25 to 80 times the product, and sparse tensors in the module registry break `deepcopy`
    and distributed training; hence the two triples of plain, non-persistent buffers and the autograd
    function.

    A sample's result does not depend, to the last bit, on how many samples are multiplied together with it.

    Args:
        crow: Row pointers, int32, shape `(M + 1,)`.
        col: Column indices, int32, shape `(nnz,)`; their order within a row is free.
        values: Entries, shape `(nnz,)`.
        num_cols: `N`.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    crow_t: Tensor
    col_t: Tensor
    values_t: Tensor

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor, num_cols: int) -> None:
        super().__init__()
        self.shape = (crow.numel() - 1, num_cols)
        transpose = transpose_csr(crow, col, values, num_cols)
        for name, tensor in zip(("crow", "col", "values"), (crow, col, values), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        for name, tensor in zip(("crow_t", "col_t", "values_t"), transpose, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._csr: dict[bool, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of both copies, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """Returns `A x` for `x` of shape `(..., N)`, shape `(..., M)`."""
        return _SparseProduct.apply(x, self, False)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `A^T y` for `y` of shape `(..., M)`, shape `(..., N)`."""
        return _SparseProduct.apply(y, self, True)

    def csr(self, transpose: bool) -> Tensor:
        """Returns the torch CSR tensor over the buffers, made once and kept outside the registry."""
        if transpose not in self._csr:
            suffix = "_t" if transpose else ""
            crow, col, values = (getattr(self, name + suffix) for name in ("crow", "col", "values"))
            shape = self.shape[::-1] if transpose else self.shape
            with torch.inference_mode(False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                self._csr[transpose] = torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)
        return self._csr[transpose]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_csr": {}}  # copies and pickles rebuild it over their own buffers

    def _apply(self, fn: Any, recurse: bool = True) -> SparseMatrix:
        self._csr = {}  # a move between devices or precisions replaces the buffers
        return super()._apply(fn, recurse)


class _SparseProduct(torch.autograd.Function):
    """`x -> A x` or `A^T x`; the derivative is the other of the two, to any order and in both modes."""

    @staticmethod
    def forward(x: Tensor, matrix: SparseMatrix, transpose: bool) -> Tensor:
        csr = matrix.csr(transpose)
        columns = x.reshape(-1, x.shape[-1]).to(csr.dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would round the matrix to half precision
            products = [_product(csr, part) for part in columns.split(_MAX_COLUMNS)]
        product = torch.cat(products) if products else columns.new_empty(0, csr.shape[0])
        return product.reshape(*x.shape[:-1], csr.shape[0]).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SparseMatrix, bool], output: Tensor) -> None:
        x, ctx.matrix, ctx.transpose = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SparseProduct.apply(grad, ctx.matrix, not ctx.transpose).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _SparseProduct.apply(tangent, ctx.matrix, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, matrix: SparseMatrix, transpose: bool) -> tuple[Tensor, int]:
        return _SparseProduct.apply(x.movedim(in_dims[0], 0), matrix, transpose), 0


def _product(csr: Tensor, rows: Tensor) -> Tensor:
    """Returns `A` times at most `_MAX_COLUMNS` vectors, the rows of `rows`, as rows."""
    num = len(rows)
    missing = -num % _granule(csr.dtype) if csr.device.type == "cpu" else 0
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))
    return (csr @ rows.t().contiguous()).t()[:num]


@cache
def _granule(dtype: torch.dtype) -> int:
    """Returns of what number of columns a product has to have a multiple, for a column's bits not to depend on it.

    MKL sums a row's entries in another order for other numbers of columns on some processors (with AVX-512: 1, 2 and 3
    differ from 4 and 8, at no gain in time) and not on others. Asked once of this processor.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = torch.randn(16, 203, generator=generator, dtype=dtype).to_sparse_csr()
        x = torch.randn(203, _MAX_COLUMNS, generator=generator, dtype=dtype)
        widest = csr @ x
        same = [torch.equal(csr @ x[:, :n].contiguous(), widest[:, :n]) for n in range(1, _MAX_COLUMNS + 1)]
    return next(g for g in (1, 2, 4, _MAX_COLUMNS) if all(same[g - 1 :: g]))


def transpose_csr(crow: Tensor, col: Tensor, values: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the CSR triple of the transpose, its column indices sorted within each row."""
    rows = torch.arange(crow.numel() - 1, dtype=torch.int32, device=crow.device)
    rows = rows.repeat_interleave(crow.diff())
    order = torch.argsort(col, stable=True)
    counts = torch.bincount(col, minlength=num_cols)
    crow_t = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    return crow_t, rows[order], values[order]
