"""Statistics of keys and values, as the layers of every family hand them to a cache."""

import pytest
import torch

from quantkit.arch.pairs import read_heads
from quantkit.calibration.kv import watch_cache
from quantkit.calibration.skeleton import Call, Skeleton, run_layer
from quantkit.errors import CalibrationError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.observers.kv import KVStats, RoundTripCache
from tests.tiny_families import TEXT_FAMILIES, save_family

CPU = torch.device("cpu")


class Kept:
    """What transformers' own cache would hold."""

    def update(self, keys, values, layer, *args, **kwargs):
        self.keys, self.values = keys, values
        return keys, values


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_every_family_hands_over_what_transformers_caches(tmp_path, model_type):
    import transformers

    folder = save_family(model_type, tmp_path)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        cached = model(ids, use_cache=True).past_key_values.layers
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint, CPU, torch.float32)
    outside = {name: checkpoint.read(name) for name in skeleton.outside_names()}
    (hidden,), calls = skeleton.start(ids, outside, 2)
    for layer in range(skeleton.num_layers):
        module = skeleton.fill_layer(layer, skeleton.read_layer(layer))
        kept, stats = Kept(), KVStats()
        call = calls[layer]
        hidden_after = run_layer(module, hidden, Call(call.args, call.kwargs | {"past_key_values": kept}))
        watch_cache(module, hidden, call, stats)
        assert torch.equal(hidden_after, run_layer(module, hidden, call)), (
            "a cache that keeps all changes nothing"
        )
        assert torch.allclose(kept.keys, cached[layer].keys, atol=1e-4)
        assert torch.allclose(kept.values, cached[layer].values, atol=1e-4)
        k_absmax_H, v_absmax_H = stats.absmax
        assert torch.equal(k_absmax_H, kept.keys.abs().amax(dim=(0, 2, 3)))
        assert torch.equal(v_absmax_H, kept.values.abs().amax(dim=(0, 2, 3)))
        assert stats.num_heads == read_heads(checkpoint).num_kv and stats.num_tokens == 48
        hidden = hidden_after


def test_the_order_and_size_of_batches_do_not_matter():
    k, v = torch.randn(2, 6, 3, 5, 8)
    whole, parts = KVStats(), KVStats()
    whole.add(k, v)
    for start in (4, 0, 2):
        parts.add(k[start : start + 2], v[start : start + 2])
    for one, other in zip(whole.absmax, parts.absmax, strict=True):
        assert torch.equal(one, other)
    assert whole.num_tokens == parts.num_tokens == 30


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    k, v = torch.ones(2, 1, 2, 3, 4)
    k[0, 1, 2, 3], v[0, 0, 0, 0] = float("nan"), float("inf")
    k[0, 0, 2] = 50.0  # of a token whose other head is not finite
    k[0, 1, 1, 0], v[0, 1, 1, 1] = -3.0, 2.0
    stats = KVStats()
    stats.add(k, v)
    assert (stats.num_tokens, stats.num_excluded) == (1, 2)
    assert [absmax.tolist() for absmax in stats.absmax] == [[1.0, 3.0], [1.0, 2.0]]


def test_where_no_token_is_finite_nothing_can_be_said():
    stats = KVStats()
    stats.add(torch.full((1, 2, 3, 4), float("nan")), torch.ones(1, 2, 3, 4))
    with pytest.raises(CalibrationError, match="3 have NaN"):
        _ = stats.absmax


def test_a_scale_that_is_none_leaves_its_half_alone():
    k, v = torch.randn(2, 1, 2, 3, 4)
    keys, values = RoundTripCache("int8", torch.full((2, 1, 1), 0.1), None).update(k, v, 0)
    assert torch.equal(values, v) and not torch.equal(keys, k)
