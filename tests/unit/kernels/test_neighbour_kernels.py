"""The kernels of what stands between the products, without a GPU: they compile, stay in registers, and load 16 bytes.

Widths and strides are constants here, as they are (or are known to be multiples of 16) when a model runs.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

import triton

from quantkit_kernels import (
    embedding_kernel,
    hadamard_kernel,
    norm_kernel,
    rope_kernel,
    row_codes_kernel,
    sampling_kernel,
    silu_kernel,
)
from tests.triton_aot import CAPABILITIES, Resources, compile_for

HIDDEN, INNER, VOCAB = 4096, 14336, 128256
CODES = {"int8": (127.5, False), "fp8": (448.0, True)}
WIDE_LOAD = r"LDG\.E[.\w]*\.128"


def compile_kernel(kernel, capability, pointers, numbers, constants, num_warps) -> Resources:
    """Absent pointers are None; EARLY and HAS_FLOAT8 are what the capability allows."""
    types = pointers | numbers
    known = {"EARLY": capability >= 90, "HAS_FLOAT8": capability >= 89} | constants
    names = [name for name in kernel.arg_names if name not in types]
    return compile_for(kernel, capability, types, {name: known.get(name) for name in names}, num_warps)


def how(code, group=0):
    half_range, is_float8 = CODES[code]
    return {"GROUP": group, "HALF_RANGE": half_range, "IS_FLOAT8": is_float8}


def compile_norm(capability, *, width=HIDDEN, code="int8", group=0, dtype="*bf16"):
    block = triton.next_power_of_2(width)
    pointers = dict.fromkeys(("x", "residual", "weight"), dtype) | {"codes": "*i8", "scales": "*fp32"}
    constants = {"stride_x": width, "stride_residual": width, "stride_scale": 1, "PLUS_ONE": False}
    constants |= {"NUM_FEATURES": width, "BLOCK": block} | how(code, group)
    warps = row_codes_kernel.warps_for(block)
    return compile_kernel(norm_kernel.norm_kernel, capability, pointers, {"eps": "fp32"}, constants, warps)


def compile_activation(capability, *, width=INNER, code="int8", group=0, is_silu=True):
    block = silu_kernel.PART if group else triton.next_power_of_2(width)
    pointers = {"gate_up": "*bf16", "codes": "*i8", "scales": "*fp32"}
    constants = {"stride_gate_up": 2 * width, "stride_scale": 1, "NUM_FEATURES": width, "IS_SILU": is_silu}
    constants |= {"BLOCK": block} | how(code, group)
    warps = silu_kernel.PART_WARPS if group else row_codes_kernel.warps_for(block)
    return compile_kernel(silu_kernel.activation_kernel, capability, pointers, {}, constants, warps)


def compile_parts(capability, code):
    """The two kernels for few tokens."""
    pointers = {"gate_up": "*bf16", "product": "*bf16", "part_amax": "*fp32"}
    constants = {"stride_gate_up": 2 * INNER, "stride_scale": 0, "NUM_FEATURES": INNER, "IS_SILU": True}
    constants |= {"BLOCK": silu_kernel.FEW_PART} | how("int8")
    warps = silu_kernel.FEW_WARPS
    yield compile_kernel(silu_kernel.activation_kernel, capability, pointers, {}, constants, warps)
    pointers = {"x": "*bf16", "part_amax": "*fp32", "codes": "*i8", "scales": "*fp32"}
    constants = {"NUM_FEATURES": INNER, "NUM_PARTS": 28, "PARTS": 32, "BLOCK": silu_kernel.FEW_PART} | how(
        code
    )
    yield compile_kernel(silu_kernel.encode_parts_kernel, capability, pointers, {}, constants, warps)


def compile_rows(capability, code):
    pointers = {"x": "*bf16", "codes": "*i8", "scales": "*fp32"}
    constants = {"stride_x": HIDDEN, "stride_scale": 1, "NUM_FEATURES": HIDDEN, "BLOCK": HIDDEN} | how(code)
    warps = row_codes_kernel.warps_for(HIDDEN)
    return compile_kernel(row_codes_kernel.quantize_rows_kernel, capability, pointers, {}, constants, warps)


def compile_rope(capability, *, largest=0.0, is_per_token=False, is_normed=True):
    pointers = {"positions": "*i64", "slots": "*i64", "cos": "*fp32", "sin": "*fp32"}
    pointers |= dict.fromkeys(("qkv", "q"), "*bf16")
    pointers |= dict.fromkeys(("q_weight", "k_weight"), "*bf16") if is_normed else {}
    pointers |= dict.fromkeys(("keys", "values"), "*i8" if largest else "*bf16")
    pointers |= dict.fromkeys(("k_scale", "v_scale"), "*fp32") if largest else {}
    constants = {
        "stride_qkv": 48 * 128,
        "stride_block": 8 * 16 * 128,
        "stride_head": 16 * 128,
        "stride_slot": 128,
    }
    constants |= {"NUM_QUERIES": 32, "NUM_HEADS": 8, "HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 16}
    constants |= {
        "PLUS_ONE": False,
        "LARGEST": largest,
        "IS_PER_TOKEN": is_per_token,
        "HEADS": 8,
        "COLUMNS": 128,
    }
    kernel, warps = rope_kernel.rope_append_kernel, rope_kernel.NUM_WARPS
    return compile_kernel(kernel, capability, pointers, {"eps": "fp32"}, constants, warps)


def compile_hadamard(capability, dtype="*bf16"):
    constants = {"stride_x": HIDDEN, "PIECES_OF_A_ROW": HIDDEN // 128, "WIDTH": 128, "SCALE": 128**-0.5}
    rows, warps = hadamard_kernel.SHAPES[4 if dtype == "*fp32" else 2]
    constants |= {"ROWS": rows}
    pointers, numbers = {"x": dtype, "y": dtype}, {"num_pieces": "i32"}
    kernel = hadamard_kernel.hadamard_kernel
    return compile_kernel(kernel, capability, pointers, numbers, constants, warps)


def compile_gather(capability, bits):
    pointers = {"token_ids": "*i64", "packed": "*i32", "scale": "*bf16", "rows": "*bf16"}
    constants = {"NUM_WORDS": HIDDEN * bits // 32, "NUM_FEATURES": HIDDEN, "NUM_GROUPS": 32, "BITS": bits}
    constants |= {"HAS_MULTIPLIER": False, "WORDS": embedding_kernel.WORDS}
    numbers = {"multiplier": "fp32"}
    warps = embedding_kernel.NUM_WARPS
    return compile_kernel(embedding_kernel.gather_kernel, capability, pointers, numbers, constants, warps)


def compile_choices(capability):
    """The four kernels of argmax and top 64."""
    groups = -(-VOCAB // sampling_kernel.GROUP)
    pointers = {"logits": "*fp32", "keys": "*i64"}
    numbers = {"num_logits": "i32"}
    known = {
        "stride_logits": VOCAB,
        "PART": sampling_kernel.PART,
        "GROUP": sampling_kernel.GROUP,
        "BLOCK": 64,
    }
    known |= {"NUM_KEYS": 63, "NUM_GROUPS": groups, "KEPT": 64, "TOPS": 512}
    for kernel, types, counts, warps in (
        (sampling_kernel.best_of_parts_kernel, pointers, numbers, sampling_kernel.PART_WARPS),
        (sampling_kernel.argmax_kernel, {"keys": "*i64", "tokens": "*i64", "is_nan": "*i1"}, {}, 1),
        (
            sampling_kernel.best_of_groups_kernel,
            {"logits": "*fp32", "groups": "*i32"},
            numbers | {"num_groups": "i32"},
            sampling_kernel.PART_WARPS,
        ),
        (
            sampling_kernel.topk_kernel,
            {"logits": "*fp32", "groups": "*i32", "values": "*fp32", "tokens": "*i64"},
            numbers | {"num_kept": "i32"},
            sampling_kernel.TOPK_WARPS,
        ),
    ):
        yield compile_kernel(kernel, capability, types, counts, known, warps)


def assert_stays_in_registers(resources):
    assert resources.stack == 0
    assert "LDL" not in resources.sass and "STL" not in resources.sass


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_stay_in_registers(capability):
    for resources in (
        compile_norm(capability, code="fp8"),
        compile_activation(capability, code="fp8"),
        compile_rope(capability, largest=448.0, is_per_token=True),
        compile_hadamard(capability),
        compile_gather(capability, 4),
    ):
        assert_stays_in_registers(resources)
        waits, starts = "ACQBULK" in resources.sass, "PREEXIT" in resources.sass
        assert (
            waits == starts == (capability >= 90)
        )  # dependent launch: waits for the kernel before, lets the next in


@pytest.mark.parametrize("code", CODES)
def test_rows_are_read_16_bytes_at_a_time_and_stay_where_they_are(code):
    for resources, tensors in (
        (compile_norm(90, code=code), 3),  # 16 elements of a thread: two loads of each
        (compile_rows(90, code), 1),
        (compile_activation(90, code=code), 2),
    ):
        assert_stays_in_registers(resources)
        assert (
            len(re.findall(WIDE_LOAD, resources.sass))
            == len(re.findall("LDG", resources.sass))
            == 2 * tensors
        )
        assert resources.registers <= 64  # 32 warps on a multiprocessor
        assert resources.shared <= 4 * 32  # a number of each warp: rows are not laid out anew


@pytest.mark.parametrize("code", CODES)
def test_every_variant_stays_in_registers(code):
    largest = {"int8": 127.0, "fp8": 448.0}[code]
    for resources in (
        compile_norm(90, code=code, group=128),
        compile_norm(90, code=code, width=16384),
        compile_norm(90, code=code, width=5120),
        compile_norm(90, code=code, dtype="*fp16"),
        compile_activation(90, code=code, group=128),
        compile_activation(90, code=code, width=28672, is_silu=False),
        *compile_parts(90, code),
        compile_rope(90, largest=largest),
        compile_rope(90, largest=largest, is_per_token=True, is_normed=False),
    ):
        assert_stays_in_registers(resources)


def test_only_weights_are_read_before_the_kernel_in_front_has_ended():
    for resources, early_loads in (
        (compile_norm(90), 2),
        (compile_rows(90, "int8"), 0),
        (compile_activation(90), 0),
        (compile_rope(90, largest=448.0), 0),
        (compile_hadamard(90), 0),
        (compile_gather(90, 4), 0),
        *((resources, 0) for resources in compile_choices(90)),
    ):
        before = resources.sass.partition("ACQBULK")[0]
        assert before.count("LDG") == early_loads
        assert "STG" not in before


def test_float8_is_converted_by_an_instruction_where_there_is_one():
    for capability in CAPABILITIES:
        assert ("E4M3" in compile_rows(capability, "fp8").sass) == (capability >= 89)


def test_hadamard_multiplies_on_tensor_cores():
    assert "HGMMA" in compile_hadamard(90).sass
    assert "HMMA" in compile_hadamard(80).sass
    for capability in (80, 90):
        resources = compile_hadamard(capability, "*fp32")
        assert "TF32" in resources.sass
        assert_stays_in_registers(resources)


def test_choices_stay_in_registers():
    for resources in compile_choices(90):
        assert_stays_in_registers(resources)
