"""Statistics of one linear's input over the calibration tokens; linears that read the same input share one.

Shape suffixes: T tokens, K in_features, C columns of a block.
"""

import torch
from torch import Tensor

from quantkit.errors import CalibrationError

NUM_BLOCKS = 6  # the Hessian is symmetric: of 6 × 6 blocks 21 are computed, 58 % of the work
ALIGNED_FEATURES = 256  # what a block of a wide Hessian is a multiple of: matrix units need even more than 8
SAMPLE_ROWS = 4096


class InputStats:
    """Sums over tokens of one input, float32. Rows with NaN or Inf are left out and counted.

    num_features: K. with_hessian: whether the K × K second moments are wanted, or only their diagonal.
    with_shift: whether `add` gets the input that the original model has at this place, too. with_sample: whether
    `sample` will be asked for. What is read ends the adding.
    """

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device,
        with_hessian: bool,
        with_shift: bool = False,
        with_sample: bool = True,
    ) -> None:
        self.num_tokens = 0
        self.num_excluded = 0
        self._sum_K, self._abs_K, self._square_K, self._max_K = (
            torch.zeros(num_features, device=device) for _ in range(4)
        )
        assert with_hessian or not with_shift, "a shift is of use only together with the Hessian"
        shape = (num_features, num_features)
        self._hessian_KK = torch.zeros(shape, device=device) if with_hessian else None
        self._shift_KK = torch.zeros(shape, device=device) if with_shift else None
        self._with_sample = with_sample
        self._samples: list[Tensor] = []
        self._is_hessian_finished = False

    def add(self, x_TK: Tensor, original_TK: Tensor | None = None) -> None:
        """Count tokens, in any float dtype and leading shape. original_TK: the same tokens in the original model."""
        assert not self._is_hessian_finished, "the Hessian has been asked for"
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
        self.num_tokens += len(x_TK)
        if len(x_TK) == 0:
            return
        if self._hessian_KK is not None:
            _add_lower_products(self._hessian_KK, x_TK)
        if self._shift_KK is not None and original_TK is not None:
            self._shift_KK += _product(original_TK - x_TK, x_TK)
        self._add_moments(x_TK)
        if self._with_sample:
            self._samples.append(x_TK[:: max(1, len(x_TK) // SAMPLE_ROWS)][:SAMPLE_ROWS].clone())

    def _add_moments(self, x_TK: Tensor) -> None:
        if x_TK.is_cuda:
            from quantkit_kernels.moments import moments  # CUDA builds of torch have Triton, others need not

            added = moments(x_TK)
            self._sum_K += added.sum_K
            self._abs_K += added.abs_K
            self._square_K += added.square_K
            self._max_K = torch.maximum(self._max_K, added.max_K)
            return
        for chunk_TK in torch.split(x_TK, SAMPLE_ROWS):
            chunk_TK = chunk_TK.float()
            self._sum_K += chunk_TK.sum(dim=0)
            magnitude_TK = chunk_TK.abs()
            self._abs_K += magnitude_TK.sum(dim=0)
            self._max_K = torch.maximum(self._max_K, magnitude_TK.amax(dim=0))
            if self._hessian_KK is None:
                self._square_K += chunk_TK.square_().sum(dim=0)

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
        """Mean of x xᵀ, float32 [K, K]; asked for at construction."""
        assert self._hessian_KK is not None, "this input was observed without its Hessian"
        if not self._is_hessian_finished:
            _mirror(self._hessian_KK.div_(self._count()))
            self._is_hessian_finished = True
        return self._hessian_KK

    @property
    def shift_KK(self) -> Tensor:
        """Mean of (original x − x) xᵀ, float32 [K, K]; asked for at construction."""
        assert self._shift_KK is not None, "this input was observed without the original's"
        return self._shift_KK / self._count()

    @property
    def second_moment_K(self) -> Tensor:
        """Mean of x², the diagonal of the Hessian: what an error of a weight costs at the output."""
        if self._hessian_KK is None:
            return self._square_K / self._count()
        return self.hessian_KK.diagonal()

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
        return self._max_K

    def sample(self) -> Tensor:
        """Evenly spread rows, the same ones on every run, float32, at most 4096 for each `add`."""
        assert self._with_sample, "this input was observed without a sample"
        self._count()
        return torch.cat(self._samples).float()

    def _count(self) -> int:
        if self.num_tokens == 0:
            raise CalibrationError(
                f"no calibration token gives this linear a finite input ({self.num_excluded} were NaN or Inf)",
                fix="look at the model's weights: its activations overflow; or use a data-free recipe",
            )
        return self.num_tokens


def _finite_rows(x_TK: Tensor) -> Tensor:
    """Which rows hold neither NaN nor Inf, bool [T]."""
    # one pass over the data in the usual case: a sum is finite only if every addend is
    if bool(torch.isfinite(x_TK.sum(dtype=torch.float32))):
        return torch.ones(len(x_TK), dtype=torch.bool, device=x_TK.device)
    return torch.isfinite(x_TK).all(dim=-1)


def _blocks(num_features: int) -> list[slice]:
    """Rows of the Hessian that are computed together, from the first column to their own."""
    width = num_features
    if num_features >= 64 * NUM_BLOCKS:
        width = -(-num_features // NUM_BLOCKS)
    if width >= ALIGNED_FEATURES:
        width = -(-width // ALIGNED_FEATURES) * ALIGNED_FEATURES
    return [slice(start, min(start + width, num_features)) for start in range(0, num_features, width)]


def _add_lower_products(sum_KK: Tensor, x_TK: Tensor) -> None:
    """sum += XᵀX, only the blocks on and below the diagonal."""
    for rows in _blocks(x_TK.shape[1]):
        part_CK = sum_KK[rows, : rows.stop]
        if (
            x_TK.is_cuda and x_TK.dtype != torch.float32
        ):  # in place: the sum is as large as the product is costly
            left_CT, right_TK = x_TK[:, rows].T, x_TK[:, : rows.stop]
            torch.addmm(part_CK, left_CT, right_TK, out_dtype=torch.float32, out=part_CK)
        else:
            part_CK += _product(x_TK[:, rows], x_TK[:, : rows.stop])


def _mirror(lower_KK: Tensor) -> Tensor:
    """Copy what is below the diagonal to the other side, in place."""
    for rows in _blocks(len(lower_KK)):
        block_CC = lower_KK[rows, rows].tril()
        lower_KK[rows, rows] = block_CC + block_CC.tril(-1).T
        lower_KK[: rows.start, rows] = lower_KK[rows, : rows.start].T
    return lower_KK


def _product(left_TC: Tensor, right_TK: Tensor) -> Tensor:
    """leftᵀ · right in float32, [C, K]; on a GPU 16-bit inputs are multiplied as they are, summed in float32."""
    if left_TC.dtype == torch.float32 or not left_TC.is_cuda:
        return left_TC.float().T @ right_TK.float()
    return torch.mm(left_TC.T, right_TK, out_dtype=torch.float32)
