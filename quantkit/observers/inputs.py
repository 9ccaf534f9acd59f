"""Statistics of one linear's input over the calibration tokens; linears that read the same input share one.

Shape suffixes: T tokens, K in_features, C columns of a block.
"""

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit_kernels.moments import moments

MIN_BLOCK, NUM_BLOCKS = 96, 6  # the Hessian is symmetric: of 6 × 6 blocks 21 are computed, 58 % of the work
ALIGNED = 256  # wide blocks are a multiple of it: a GPU's matrix units read whole rows of 16 bytes
CHUNK_ROWS = 4096
SAMPLE_ROWS = 2048


class InputStats:
    """Running means over the tokens of one input, float32. Rows with NaN or Inf are left out and counted.

    num_features: K. with_hessian: whether the K × K second moments are wanted, or only their diagonal.
    with_shift: whether `add` gets the input that the original model has at this place, too.
    Memory: one K × K matrix in float32 (two with the shift), and at most SAMPLE_ROWS rows as they came.
    """

    def __init__(
        self, num_features: int, *, device: torch.device, with_hessian: bool, with_shift: bool = False
    ) -> None:
        self.num_tokens = 0
        self.num_excluded = 0
        self.device = device
        self._sum_K, self._abs_K, self._square_K, self._max_K = (
            torch.zeros(num_features, device=device) for _ in range(4)
        )
        assert with_hessian or not with_shift, "a shift is of use only together with the Hessian"
        shape = (num_features, num_features)
        self._hessian_KK = torch.zeros(shape, device=device) if with_hessian else None
        self._shift_KK = torch.zeros(shape, device=device) if with_shift else None
        self._sample = _Sample()

    def add(self, x_TK: Tensor, original_TK: Tensor | None = None) -> None:
        """Count tokens, in any float dtype and leading shape. original_TK: the same tokens in the original model."""
        assert (original_TK is not None) == (self._shift_KK is not None), "given exactly if asked for"
        x_TK = x_TK.reshape(-1, x_TK.shape[-1])
        is_finite_T = _finite_rows(x_TK)
        if original_TK is not None:
            original_TK = original_TK.reshape(x_TK.shape)
            is_finite_T = is_finite_T & _finite_rows(original_TK)
        if not bool(is_finite_T.all()):
            self.num_excluded += int((~is_finite_T).sum())
            x_TK = x_TK[is_finite_T]
            original_TK = None if original_TK is None else original_TK[is_finite_T]
        # what is upcast or subtracted stays small; nothing is where a GPU reads 16 bits as they are
        num_rows = len(x_TK) if _is_read_as_it_is(x_TK) and original_TK is None else CHUNK_ROWS
        for start in range(0, len(x_TK), num_rows):
            rows = slice(start, start + num_rows)
            self._add_finite(x_TK[rows], None if original_TK is None else original_TK[rows])

    def _add_finite(self, x_TK: Tensor, original_TK: Tensor | None) -> None:
        self._sample.add(x_TK, self.num_tokens)
        before = self.num_tokens
        self.num_tokens += len(x_TK)
        keep, weight = before / self.num_tokens, 1 / self.num_tokens
        if self._hessian_KK is not None:
            _add_lower_products(self._hessian_KK, x_TK, keep, weight)
        if self._shift_KK is not None and original_TK is not None:
            _add_product(self._shift_KK, original_TK - x_TK, x_TK, keep, weight)
        self._add_moments(x_TK)

    def _add_moments(self, x_TK: Tensor) -> None:
        if x_TK.is_cuda:
            added = moments(x_TK)
            self._sum_K += added.sum_K
            self._abs_K += added.abs_K
            self._square_K += added.square_K
            self._max_K = torch.maximum(self._max_K, added.max_K)
            return
        x_TK = x_TK.float()
        self._sum_K += x_TK.sum(dim=0)
        magnitude_TK = x_TK.abs()
        self._abs_K += magnitude_TK.sum(dim=0)
        self._max_K = torch.maximum(self._max_K, magnitude_TK.amax(dim=0))
        if self._hessian_KK is None:
            self._square_K += magnitude_TK.square_().sum(dim=0)

    @property
    def has_hessian(self) -> bool:
        """Whether all second moments were asked for, not only their diagonal."""
        return self._hessian_KK is not None

    @property
    def has_shift(self) -> bool:
        """Whether the original's inputs were given, too."""
        return self._shift_KK is not None

    @property
    def hessian_KK(self) -> Tensor:
        """Mean of x xᵀ, float32 [K, K]; not a copy: the next `add` changes it. Asked for at construction."""
        assert self._hessian_KK is not None, "this input was observed without its Hessian"
        self._count()
        _mirror_lower(self._hessian_KK)
        return self._hessian_KK

    @property
    def shift_KK(self) -> Tensor:
        """Mean of (original x − x) xᵀ, float32 [K, K]; not a copy. Asked for at construction."""
        assert self._shift_KK is not None, "this input was observed without the original's"
        self._count()
        return self._shift_KK

    @property
    def second_moment_K(self) -> Tensor:
        """Mean of x², the diagonal of the Hessian: what an error of a weight costs at the output."""
        count = self._count()
        return self._square_K / count if self._hessian_KK is None else self._hessian_KK.diagonal().clone()

    @property
    def mean_K(self) -> Tensor:
        """Mean of x."""
        return self._sum_K / self._count()

    @property
    def absmean_K(self) -> Tensor:
        """Mean of |x|."""
        return self._abs_K / self._count()

    @property
    def absmax_K(self) -> Tensor:
        """Largest |x|."""
        self._count()
        return self._max_K

    def sample(self) -> Tensor:
        """Evenly spread rows, float32, SAMPLE_ROWS at most; they depend only on the order of the tokens."""
        self._count()
        return self._sample.rows()

    def _count(self) -> int:
        if self.num_tokens == 0:
            raise CalibrationError(
                f"no calibration token gives this linear a finite input ({self.num_excluded} were NaN or Inf)",
                fix="look at the model's weights: its activations overflow; or use a data-free recipe",
            )
        return self.num_tokens


class _Sample:
    """Every stride-th row of a stream; the stride doubles whenever there are too many."""

    def __init__(self) -> None:
        self._stride = 1
        self._parts: list[Tensor] = []

    def add(self, x_TK: Tensor, first: int) -> None:
        """Take rows first … first + T − 1 of the stream into account."""
        while -(-(first + len(x_TK)) // self._stride) > SAMPLE_ROWS:
            self._stride *= 2
            if self._parts:
                self._parts = [torch.cat(self._parts)[::2].clone()]
        taken_TK = x_TK[-first % self._stride :: self._stride]
        if len(taken_TK):
            self._parts.append(taken_TK.clone())

    def rows(self) -> Tensor:
        """What was taken, float32."""
        return torch.cat(self._parts).float()


def _finite_rows(x_TK: Tensor) -> Tensor:
    """Which rows hold neither NaN nor Inf, bool [T]."""
    # one pass over the data in the usual case: a sum is finite only if every addend is
    if bool(torch.isfinite(x_TK.sum(dtype=torch.float32))):
        return torch.ones(len(x_TK), dtype=torch.bool, device=x_TK.device)
    return torch.isfinite(x_TK).all(dim=-1)


def _is_read_as_it_is(x_TK: Tensor) -> bool:
    """Whether products take the input in its 16 bits."""
    return x_TK.is_cuda and x_TK.dtype != torch.float32


def _blocks(num_features: int) -> list[slice]:
    width = max(MIN_BLOCK, -(-num_features // NUM_BLOCKS))
    if width > ALIGNED:
        width = -(-width // ALIGNED) * ALIGNED
    return [slice(start, min(start + width, num_features)) for start in range(0, num_features, width)]


def _add_lower_products(mean_KK: Tensor, x_TK: Tensor, keep: float, weight: float) -> None:
    """mean = keep · mean + weight · XᵀX, only the blocks on and below the diagonal."""
    for rows in _blocks(x_TK.shape[1]):
        _add_product(mean_KK[rows, : rows.stop], x_TK[:, rows], x_TK[:, : rows.stop], keep, weight)


def _add_product(mean_CK: Tensor, left_TC: Tensor, right_TK: Tensor, keep: float, weight: float) -> None:
    """mean = keep · mean + weight · leftᵀ · right, in float32."""
    if _is_read_as_it_is(left_TC):  # and summed in float32
        torch.addmm(
            mean_CK, left_TC.T, right_TK, out_dtype=torch.float32, beta=keep, alpha=weight, out=mean_CK
        )
    else:
        mean_CK.addmm_(left_TC.float().T, right_TK.float(), beta=keep, alpha=weight)


def _mirror_lower(matrix_KK: Tensor) -> None:
    """Copy what is below the diagonal to above it, in place."""
    for rows in _blocks(len(matrix_KK)):
        matrix_KK[: rows.start, rows] = matrix_KK[rows, : rows.start].T
        square_CC = matrix_KK[rows, rows].tril_()  # products are not symmetric to the last bit
        square_CC += square_CC.tril(-1).T
