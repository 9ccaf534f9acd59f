"""Attention over pages without a GPU: the torch version against its definition, and the kernels' machine code."""

import re
import subprocess

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import (
    attention_decode,
    attention_few,
    attention_prefill,
    attention_tile,
    attention_widen,
    paged_kv,
    paged_operators,
)
from quantkit_kernels.paged_kv import KVPool, Masking, Pages
from tests.gpu.attention_cases import Case, build
from tests.triton_aot import CAPABILITIES, CUOBJDUMP, Resources, compile_for

HOPPER = 90
STORED = {
    "bf16": {"dtype": torch.bfloat16},
    "e4m3": {"dtype": torch.float8_e4m3fn},
    "int8 per token": {"dtype": torch.int8, "per_token": True},
}
FORMATS = {"bf16": ("16-bit", False), "e4m3": ("e4m3", False), "int8 per token": ("int8", True)}


def by_definition(q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """Query by query, key by key, in float64."""
    out_TQD = torch.zeros(q_TQD.shape, dtype=torch.float64)
    group = q_TQD.shape[1] // pool.k_PHSD.shape[1]
    block_size = pool.k_PHSD.shape[2]

    def element(codes: Tensor, scale: Tensor | None, block: int, head: int, slot: int) -> Tensor:
        if scale is None:
            return codes[block, head, slot].double()
        return codes[block, head, slot].double() * (
            scale[head] if scale.dim() == 1 else scale[block, head, slot]
        )

    for sequence, length in enumerate(pages.lengths_B.tolist()):
        first, last = pages.cu_seqlens_q[sequence : sequence + 2].tolist()
        for row in range(first, last):
            position = length - (last - row)
            seen = range(max(0, position - masking.window + 1) if masking.window else 0, position + 1)
            for query in range(q_TQD.shape[1]):
                at = [
                    (int(pages.block_table_BL[sequence, c // block_size]), query // group, c % block_size)
                    for c in seen
                ]
                k_CD, v_CD = (
                    torch.stack([element(codes, scale, *place) for place in at])
                    for codes, scale in ((pool.k_PHSD, pool.k_scale), (pool.v_PHSD, pool.v_scale))
                )
                score_C = k_CD @ q_TQD[row, query].double() * masking.softmax_scale
                if masking.soft_cap:
                    score_C = masking.soft_cap * torch.tanh(score_C / masking.soft_cap)
                out_TQD[row, query] = torch.softmax(score_C, dim=0) @ v_CD
    return out_TQD


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (5, 0.0), (20, 3.0)])
def test_torch_attention_is_the_definition(stored, window, soft_cap):
    case = Case(lengths=(1, 40, 17), q_lens=(1, 3, 17), head_dim=16, num_queries=6, window=window, soft_cap=soft_cap,
                **stored)  # fmt: skip
    q_TQD, pool, pages = build(case, "cpu")
    expected_TQD = by_definition(q_TQD, pool, pages, case.masking())
    got_TQD = paged_kv.attend(q_TQD.double(), pool, pages, case.masking())
    assert torch.allclose(got_TQD, expected_TQD, rtol=1e-12, atol=1e-12)


def test_operators_on_a_cpu():
    case = Case(lengths=(30, 40), q_lens=(2, 16), **STORED["int8 per token"])
    q_TQD, pool, pages = build(case, "cpu")
    exact_TQD = paged_kv.attend(q_TQD.double(), pool, pages, case.masking())
    bound_TQD = 2**-8 * exact_TQD.abs() + 1e-5 * exact_TQD.abs().max()
    decoded = paged_operators.paged_decode(q_TQD, pool, pages, case.masking())
    prefilled = paged_operators.paged_prefill(q_TQD, pool, pages, case.masking())
    for got_TQD in (decoded, prefilled):
        assert got_TQD.dtype == torch.bfloat16
        assert ((got_TQD.double() - exact_TQD).abs() <= bound_TQD).all()


def test_a_sequence_of_nothing_is_zeros():
    q_TQD, pool, pages = build(Case(lengths=(20,), q_lens=(1,)), "cpu")
    pages = pages._replace(lengths_B=torch.zeros(1, dtype=torch.int32))
    assert not paged_kv.attend(q_TQD.float(), pool, pages, Masking(0.1)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_TQD": torch.zeros(2, 8, 64, dtype=torch.bfloat16)}, "heads of 128"),
        ({"q_TQD": torch.zeros(2, 9, 128, dtype=torch.bfloat16)}, "9 query heads share 2"),
        ({"k_scale": torch.ones(3)}, "scales torch.Size"),
        ({"k_scale": None}, "8-bit codes have float32 scales"),
        ({"v_PHSD": torch.zeros(1, 2, 16, 128, dtype=torch.int8)}, "k torch.Size"),
        ({"lengths_B": torch.ones(2, dtype=torch.int64)}, "int32"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    q_TQD, pool, pages = build(Case(lengths=(30, 40), q_lens=(1, 1), **STORED["e4m3"]), "cpu")
    q_TQD = change.get("q_TQD", q_TQD)
    pool = pool._replace(**{name: value for name, value in change.items() if name in KVPool._fields})
    pages = pages._replace(**{name: value for name, value in change.items() if name in Pages._fields})
    with pytest.raises(AssertionError, match=message):
        paged_operators.paged_decode(q_TQD, pool, pages, Masking(0.1))


def test_a_pool_starts_as_zeros_of_scale_one():
    pool = paged_kv.create_pool(5, 2, 64, torch.int8, scale_shape=(5, 2, 16))
    assert not pool.k_PHSD.any() and (pool.v_scale == 1).all()
    assert paged_kv.create_pool(5, 2, 64, torch.bfloat16).k_scale is None


def test_cuts_fill_the_device_and_spare_full_batches():
    assert attention_decode.cut(1, 8, 32768, 132, 64) == (33, 2)
    assert attention_decode.cut(1, 8, 256, 132, 64)[0] == 2
    assert attention_decode.cut(256, 8, 1024, 132, 64)[0] == 1
    for batch in (1, 2, 5, 16, 100, 1000):
        for context in (1, 64, 1000, 131072):
            assert 1 <= attention_decode.cut(batch, 8, context, 132, 64)[0] <= 64


def test_one_launch_as_far_as_it_is_faster():
    def pays(batch: int, context: int, dtype: torch.dtype, scale_shape: tuple[int, ...] | None) -> bool:
        pool = paged_kv.create_pool(1, 8, 128, dtype, scale_shape=scale_shape)
        numbers = torch.zeros(batch + 1, dtype=torch.int32)
        return attention_few.pays(pool, Pages(numbers[:, None], numbers[1:], numbers, 1, context), 132)

    per_token = (1, 8, 16)
    assert [attention_few.cluster_of(8 * batch, 132) for batch in (1, 2, 4, 8, 16, 64)] == [8, 4, 2, 2, 1, 1]
    assert attention_few.warps_of(8, 512, 8, 132) == 4 and attention_few.warps_of(8, 513, 8, 132) == 8
    assert attention_few.span_of(torch.int8, 4096, 8) == 1 and attention_few.span_of(torch.int8, 4097, 8) == 2
    assert (
        attention_few.span_of(torch.int8, 100, 1) == 2 and attention_few.span_of(torch.bfloat16, 9999, 1) == 1
    )
    assert pays(1, 131072, torch.bfloat16, None) and not pays(17, 1024, torch.bfloat16, None)
    assert pays(1, 8192, torch.int8, (8,)) and not pays(1, 8193, torch.int8, (8,))
    assert pays(16, 32768, torch.int8, (8,)) and not pays(64, 1024, torch.int8, (8,))
    assert pays(64, 1024, torch.int8, per_token) and not pays(256, 1024, torch.int8, per_token)


def compile_attention(
    kernel,
    capability: int,
    stored: str,
    constants: dict,
    num_warps: int,
    *,
    element: str,
    words: int,
    planes: int,
    others: dict[str, str] | None = None,
) -> Resources:
    form, per_token = FORMATS[stored]
    pointers = dict.fromkeys(("k_scale", "v_scale", "partial", "lse"), "*fp32")
    pointers |= dict.fromkeys(("block_table", "lengths", "cu_seqlens_q"), "*i32")
    pointers |= {"q": "*bf16", "k": element, "v": element, "out": "*bf16"} | (others or {})
    names = ("max_q_len", "num_splits", "tiles_of_split", "window", "stride_table")
    numbers = dict.fromkeys(names, "i32")
    numbers |= {"softmax_scale": "fp32", "soft_cap": "fp32"}
    constants = {"GROUP": 4, "FORMAT": form, "BLOCK_SIZE": 16} | constants
    constants |= {"HAS_SCALE": form != "16-bit", "PER_TOKEN": per_token, "D": 128}
    constants |= {
        "NORMALISE": constants["FORMAT"] != "16-bit",
        "CONVERTS": form != "e4m3" or capability >= 89,
    }
    constants |= {"HAS_CAP": False, "WORDS": words, "PLANES": planes}
    constants |= {"stride_q": 6144, "stride_query": 128}  # as in a model with 32 and 8 heads
    constants |= {"stride_block": 128 * words, "stride_head": 16 * words, "stride_token": words}
    types = {name: kind for name, kind in (pointers | numbers).items() if name in kernel.arg_names}
    return compile_for(kernel, capability, types, constants, num_warps)


def compile_decode(capability: int, stored: str, num_rows: int = 4) -> Resources:
    rows, tile, num_warps, stages = attention_decode.program_shape(num_rows, 128, is_8_bit=stored != "bf16")
    constants = {"ROWS": rows, "TILE": tile, "STAGES": stages, "IS_WHOLE": False, "HAS_WINDOW": True}
    constants |= {"OVERLAPS": capability >= 90, "ROW_TILES": 1}
    element, words, planes = "*bf16", 128, 1
    if stored != "bf16":
        element, words, planes = (
            ("*i32", 32, 4) if rows < attention_tile.WARPGROUP_ROWS.value else ("*i8", 128, 1)
        )
    return compile_attention(
        attention_decode.decode_kernel, capability, stored, constants, num_warps,
        element=element, words=words, planes=planes,
    )  # fmt: skip


def compile_prefill(
    capability: int, stored: str, *, shape: tuple[int, int, int, int] | None = None
) -> Resources:
    rows, tile, num_warps, stages = shape or attention_prefill.program_shape(128)
    is_wide = stored != "bf16"
    constants = {"ROWS": rows, "TILE": tile, "STAGES": stages, "HAS_WINDOW": False, "FORMAT": "16-bit"}
    constants |= {"IS_WIDE": FORMATS[stored][1], "BLOCK_SIZE": attention_widen.SLOTS if is_wide else 16}
    return compile_attention(
        attention_prefill.prefill_kernel, capability, stored, constants, num_warps,
        element="*bf16", words=128, planes=1, others={"v": "*fp16"} if is_wide else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "stored"),
    [(capability, "e4m3") for capability in CAPABILITIES] + [(90, "bf16"), (90, "int8 per token")],
)
def test_decode_stays_in_registers_and_reads_words(capability, stored):
    resources = compile_decode(capability, stored)
    assert resources.stack == 0
    assert "HMMA" in resources.sass
    assert "LDS.U8" not in resources.sass  # no code goes through shared memory on its own
    assert ("F2FP.F16.E4M3" in resources.sass) == (stored == "e4m3" and capability >= 89)


@pytest.mark.parametrize("num_rows", [20, 64])
@pytest.mark.parametrize("stored", STORED)
def test_verification_of_many_tokens_stays_in_registers(stored, num_rows):
    assert compile_decode(HOPPER, stored, num_rows).stack == 0


@pytest.mark.parametrize("stored", STORED)
def test_prefill_uses_the_warpgroup_mma(stored):
    resources = compile_prefill(HOPPER, stored)
    assert resources.stack <= 32  # a few values that wait outside the loops
    assert "HGMMA" in resources.sass


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stored", ["e4m3", "int8 per token"])
def test_codes_become_16_bits(capability, stored):
    form, per_token = FORMATS[stored]
    types = dict.fromkeys(("k_scale", "v_scale", "records"), "*fp32") | {"k": "*i8", "v": "*i8"}
    types |= dict.fromkeys(("block_table", "lengths", "cu_seqlens_q", "wide_table"), "*i32")
    types |= {
        "wide_k": "*bf16",
        "wide_v": "*fp16",
        "softmax_scale": "fp32",
        "window": "i32",
        "stride_table": "i32",
    }
    constants = {"stride_block": 16384, "stride_head": 2048, "stride_token": 128, "FORMAT": form, "D": 128}
    constants |= {"PER_TOKEN": per_token, "HAS_WINDOW": True, "CONVERTS": form == "int8" or capability >= 89}
    constants |= {
        "ELEMENTS": 128,
        "BLOCK_SIZE": 16,
        "SLOTS": attention_widen.SLOTS,
        "TOKENS": attention_widen.TOKENS,
    }
    resources = compile_for(attention_widen.widen_kernel, capability, types, constants, 4)
    assert resources.stack == 0
    assert "STG.E.128" in resources.sass and "LDG.E.128" in resources.sass


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("stored", STORED)
def test_one_launch_keeps_keys_and_values_in_registers(stored, rows, capability, tmp_path):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings comes with CUDA builds of torch")
    from quantkit_kernels import nvrtc

    per_token = STORED[stored].get("per_token", False)
    dtype = STORED[stored]["dtype"]
    span = 1 if stored == "bf16" else 2
    kind = attention_few.Kind(torch.bfloat16, dtype, per_token, True, True, 128, 16, rows, 8, 8, span)
    path = tmp_path / "decode.cubin"
    path.write_bytes(nvrtc.compile_cubin("decode.cu", "decode", attention_few.defines_of(kind), capability))
    sass = subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout
    assert f"HMMA.16816.F32{'.BF16' if stored == 'bf16' else ' '}" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"
    assert len(re.findall(r"LDG\.E\.NA\.128", sass)) == 2 * 16  # the first, and the next
    assert "LDS.U" not in sass and "LDGSTS" not in sass


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_prefill_compiles(capability):
    assert "MMA" in compile_prefill(capability, "e4m3").sass
