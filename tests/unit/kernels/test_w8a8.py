"""Products with quantized activations without a GPU: operators on a CPU are the definitions, and kernels compile."""

from types import SimpleNamespace

import pytest
import torch

from quantkit_kernels import strip_weight, w4a8, w8a8_fp8, w8a8_int8
from quantkit_kernels.weight import LinearWeight
from tests.triton_aot import CAPABILITIES, compile_for

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import byte_tile_kernel, w4a8_kernel

HOPPER = 90
MMA = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "MMA", 120: "MMA"}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_weight(n, k, kind, *, tile=None, asymmetric=False):
    rows, cols = tile or (1, k)
    grid = (-(-n // rows), -(-k // cols))
    scale = torch.rand(grid, generator=generator(1)) * 0.01 + 0.001
    zero = torch.randint(-8, 8, grid, generator=generator(2), dtype=torch.int8) if asymmetric else None
    weight = LinearWeight(random_codes(n, k, kind, 3), scale, zero, (rows, cols), 4 if kind == "int4" else 8)
    by_weight = torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // cols
    w = weight.codes_NK.double() - (0 if zero is None else zero.double()[by_weight])
    return weight, w * scale.double()[by_weight]


def random_codes(rows, cols, kind, seed):
    if kind == "fp8":
        codes = torch.randn(rows, cols, generator=generator(seed)) * 100
        return codes.clamp(-448, 448).to(torch.float8_e4m3fn)
    limit = 8 if kind == "int4" else 128
    return torch.randint(-limit, limit, (rows, cols), generator=generator(seed), dtype=torch.int8)


def random_scale(m, *, is_static=False):
    return torch.rand((1,) if is_static else (m, 1), generator=generator(5)) + 0.1


def assert_close(y, x, w, bias=None):
    """One rounding of the output, and float32 sums."""
    expected = x @ w.T + (0 if bias is None else bias.double())
    half, sums = torch.finfo(y.dtype).eps / 2, 2.0**-20 * (x.abs() @ w.abs().T)
    bound = half * expected.abs() + (1 + half) * sums
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_static", [False, True])
def test_int8_is_its_definition(dtype, is_static):
    weight, w = random_weight(33, 77, "int8", tile=(11, 77))
    codes, scale, bias = (
        random_codes(5, 77, "int8", 4),
        random_scale(5, is_static=is_static),
        torch.randn(33).to(dtype),
    )
    operand = w8a8_int8.prepare(weight)
    y = w8a8_int8.multiply(codes, scale, None, operand, bias, dtype)
    assert y.dtype == dtype
    assert_close(y, codes.double() * scale.double(), w, bias)
    zero = torch.randint(-128, 128, scale.shape, generator=generator(6), dtype=torch.int8)
    y = w8a8_int8.multiply(codes, scale, zero, operand, None, dtype)
    assert_close(y, (codes.double() - zero.double()) * scale.double(), w)


def test_int8_sums_are_exact_with_and_without_vnni(monkeypatch):
    codes = torch.full((3, 3000), 127, dtype=torch.int8)
    weight = LinearWeight(torch.full((4, 3000), -128, dtype=torch.int8), torch.ones(4, 1), None, (1, 3000), 8)
    for has_vnni in {torch.cpu._is_vnni_supported(), False}:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has_vnni=has_vnni: has_vnni)
        y = w8a8_int8.multiply(codes, torch.ones(1), None, w8a8_int8.prepare(weight), None, torch.float32)
        assert torch.equal(y, torch.full((3, 4), -127.0 * 128 * 3000))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_static", [False, True])
def test_fp8_is_its_definition(dtype, is_static):
    weight, w = random_weight(33, 77, "fp8", tile=(11, 77))
    codes, scale, bias = (
        random_codes(5, 77, "fp8", 4),
        random_scale(5, is_static=is_static),
        torch.randn(33).to(dtype),
    )
    y = w8a8_fp8.multiply(codes, scale, w8a8_fp8.prepare(weight), bias, dtype)
    assert y.dtype == dtype and y.shape == (5, 33)
    assert_close(y, codes.double() * scale.double(), w, bias)


def test_fp8_in_blocks_is_its_definition():
    weight, w = random_weight(200, 300, "fp8", tile=(128, 128))
    codes, scale = random_codes(5, 300, "fp8", 4), torch.rand(5, 3, generator=generator(5)) + 0.1
    y = w8a8_fp8.multiply(codes, scale, w8a8_fp8.prepare(weight), None, torch.float32)
    assert_close(y, codes.double() * scale.double().repeat_interleave(128, dim=1)[:, :300], w)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_is_its_definition(group, kind, asymmetric):
    weight, w = random_weight(33, 200, "int4", tile=(1, group or 200), asymmetric=asymmetric)
    codes, scale, bias = random_codes(5, 200, kind, 4), random_scale(5), torch.randn(33)
    y = w4a8.multiply(codes, scale, None, strip_weight.prepare(weight), bias, torch.float32)
    assert_close(y, codes.double() * scale.double(), w, bias)
    if kind == "int8" and not asymmetric:
        zero = torch.randint(-128, 128, scale.shape, generator=generator(6), dtype=torch.int8)
        y = w4a8.multiply(
            codes, scale, zero, strip_weight.prepare(weight, with_row_sum=True), None, torch.bfloat16
        )
        assert_close(y, (codes.double() - zero.double()) * scale.double(), w)


def test_what_is_wrong_is_named():
    weight, _ = random_weight(32, 64, "int8")
    operand = w8a8_int8.prepare(weight)
    codes, scale = random_codes(5, 64, "int8", 4), random_scale(5)
    with pytest.raises(AssertionError, match="rows of 48 int8, padded"):
        w8a8_int8.multiply(codes[:, :48], scale, None, operand, None, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"scales of x: .*found float32 \(4, 1\)"):
        w8a8_int8.multiply(codes, scale[:4], None, operand, None, torch.bfloat16)
    with pytest.raises(AssertionError, match="x: expected rows of int8"):
        w8a8_int8.multiply(codes.view(torch.float8_e4m3fn), scale, None, operand, None, torch.bfloat16)
    with pytest.raises(AssertionError, match="zero points of x: expected int8"):
        w8a8_int8.multiply(codes, scale, scale, operand, None, torch.bfloat16)
    for bias in (torch.zeros(16), torch.zeros(64)[::2]):
        with pytest.raises(AssertionError, match="bias"):
            w8a8_int8.multiply(codes, scale, None, operand, bias, torch.bfloat16)


def test_weights_stay_as_they_are_on_disk():
    for module, kind in ((w8a8_int8, "int8"), (w8a8_fp8, "fp8")):
        weight, _ = random_weight(32, 64, kind)
        assert module.prepare(weight).codes_NK.data_ptr() == weight.codes_NK.data_ptr()


def compile_byte_tile(
    capability,
    kind,
    *,
    maps=False,
    blocks=False,
    zero=False,
    early=False,
    x_left=False,
    shape=(128, 64, 128, 8, 3),
):
    rows_w, rows_x, cols, num_warps, num_stages = shape
    numbers = (
        "num_rows",
        "num_outputs",
        "num_cols",
        "stride_x",
        "stride_w",
        "stride_y",
        "x_scale_step",
        "ahead",
    )
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("x_scale", "w_scale"), "*fp32")
    types |= {"y": "*bf16", "bias": "*bf16", "tickets": "*i32", "w_codes": f"*{kind}"}
    types |= {"partial": "*i32" if kind == "i8" else "*fp32"}
    for name, rows in (("x", rows_x), ("w", rows_w)):
        types[name] = f"tensordesc<{kind}[{rows}, {cols}]>" if maps else f"*{kind}"
    if zero:
        types |= {"x_zero_point": "*i8", "w_code_sum": "*i32"}
    constants = {} if zero else {"x_zero_point": None, "w_code_sum": None}
    constants |= {"IN_BLOCKS": blocks, "FROM_MAPS": maps, "EVEN": True, "EARLY": early, "X_LEFT": x_left}
    constants |= {"BN": rows_w, "BM": rows_x, "BK": cols, "STAGES": num_stages, "GROUP": 8}
    multiples = tuple(name for name in numbers if name not in ("num_rows", "x_scale_step", "ahead"))
    return compile_for(
        byte_tile_kernel.byte_tile_kernel, capability, types, constants, num_warps, multiples=multiples,
        num_stages=num_stages, launch_pdl=early,
    )  # fmt: skip


def compile_w4a8(capability, kind, *, group=128, maps=False, asymmetric=False, shape=(64, 64, 4, 3)):
    rows_w, rows_x, num_warps, num_stages = shape
    cols = 128 if group in (0, 128) else 64
    numbers = (
        "num_rows",
        "num_outputs",
        "num_cols",
        "num_blocks",
        "num_groups",
        "stride_x",
        "stride_y",
        "x_scale_step",
        "ahead",
    )
    types = dict.fromkeys(numbers, "i32") | {
        "y": "*bf16",
        "bias": "*bf16",
        "packed": "*i8",
        "tickets": "*i32",
    }
    types |= {"x_scale": "*fp32", "w_scale": "*bf16" if group else "*fp32"}
    types |= {"partial": "*i32" if kind == "i8" and not group else "*fp32"}
    types["x"] = f"tensordesc<{kind}[{rows_x}, {32 if group == 32 else cols}]>" if maps else f"*{kind}"
    constants = {
        "x_zero_point": None,
        "w_row_sum": None,
        "GROUP": group,
        "IS_INT8": kind == "i8",
        "FROM_MAPS": maps,
        "EARLY": maps,
    }
    if asymmetric:
        types["w_zero_point"] = "*i8"
    else:
        constants["w_zero_point"] = None
    constants |= {"BN": rows_w, "BM": rows_x, "BK": cols, "STAGES": num_stages, "RASTER": 8}
    multiples = ("num_outputs", "num_cols", "stride_x", "stride_y")
    return compile_for(
        w4a8_kernel.w4a8_kernel,
        capability,
        types,
        constants,
        num_warps,
        multiples=multiples,
        num_stages=num_stages,
    )


def assert_in_registers(resources, mma):
    assert "LDL" not in resources.sass, "what was spilled is read again"
    assert mma in resources.sass


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_products_compile(capability):
    maps = capability >= HOPPER
    assert_in_registers(compile_byte_tile(capability, "i8", zero=True, maps=maps), MMA[capability])
    assert_in_registers(compile_w4a8(capability, "i8", maps=maps), MMA[capability])


@pytest.mark.parametrize("capability", [capability for capability in CAPABILITIES if capability >= 89])
def test_fp8_products_compile(capability):
    maps, mma = capability >= HOPPER, "QGMMA" if capability == HOPPER else "MMA"
    assert_in_registers(compile_byte_tile(capability, "fp8e4nv", blocks=capability > 89, maps=maps), mma)
    assert_in_registers(compile_w4a8(capability, "fp8e4nv", maps=maps), mma)


@pytest.mark.parametrize(("capability", "shared_kb"), [(HOPPER, 227), (120, 99)])
@pytest.mark.parametrize(("rows", "dtype"), [(17, "i8"), (64, "fp8e4nv"), (256, "i8")])
def test_the_shapes_that_are_chosen_stay_in_registers_and_fit(
    monkeypatch, rows, dtype, capability, shared_kb
):
    device = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=shared_kb << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(byte_tile_kernel, "starts_early", lambda _: True)
    torch_dtype = torch.int8 if dtype == "i8" else torch.float8_e4m3fn
    shape = byte_tile_kernel.shape_for(rows, 4096, torch_dtype, torch.device("cuda"))
    resources = compile_byte_tile(
        capability, dtype, maps=True, early=True, x_left=shape.x_left,
        shape=(shape.rows_w, shape.rows_x, shape.cols, shape.num_warps, shape.num_stages),
    )  # fmt: skip
    assert_in_registers(resources, "GMMA" if capability == HOPPER else "MMA")
    assert resources.shared <= shared_kb << 10


@pytest.mark.parametrize("kind", ["i8", "fp8e4nv"])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_int4_fits_where_a_block_has_99_kb(kind, group, monkeypatch):
    monkeypatch.setattr(w4a8_kernel, "starts_early", lambda _: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=170)
    )
    shape = w4a8_kernel.shape_for(128, 4096, group, torch.device("cuda"))
    how = (shape.rows_w, shape.rows_x, shape.num_warps, shape.num_stages)
    assert compile_w4a8(120, kind, group=group, maps=True, shape=how).shared <= 99 << 10


@pytest.mark.parametrize(
    ("kind", "group", "asymmetric"), [("i8", 0, False), ("fp8e4nv", 32, False), ("fp8e4nv", 64, True)]
)
def test_int4_becomes_8_bit_codes_without_conversions(kind, group, asymmetric):
    """The codes are made by moving bits: no instruction that converts numbers, but for the sums of groups."""
    resources = compile_w4a8(HOPPER, kind, group=group, asymmetric=asymmetric, maps=True)
    assert_in_registers(resources, "IGMMA" if kind == "i8" else "QGMMA")
    assert "F2F" not in resources.sass.replace("F2FP.BF16", "")
