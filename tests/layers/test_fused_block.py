"""FusedAttention and FusedBlock: timm's keys and results, every provider, rows apart, gain and stochastic depth."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmim.layers import FusedAttention, FusedBeitAttention, FusedBlock
from fastmim.layers.attention_providers import PROVIDERS
from fastmim.layers.drop_path import DropPath
from fastmim.layers.fused_block import add_scaled

OPTIONS = [
    {},
    {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm},
    {"scale_norm": True, "norm_layer": nn.LayerNorm, "gated": True, "proj_bias": False},
    {"attn_head_dim": 32, "dim_out": 24, "proj_drop": 0.1, "attn_drop": 0.1},
]
FOR_CPU = ("fastmim", "sdpa", "sdpa_flash", "sdpa_math")


def attention(dtype=torch.float32, **options) -> FusedAttention:
    torch.manual_seed(0)
    return FusedAttention(64, 2, **options).to(dtype).eval()


def tokens(count=10, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, count, 64, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plain(layer: FusedAttention, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(layer.q_norm(q), layer.k_norm(k), v, attn_mask=mask)
    out = layer.norm(out.transpose(1, 2).flatten(2))
    return layer.proj(out if layer.gate is None else out * layer.gate(x).sigmoid())


@pytest.mark.timm
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_has_timms_signature_keys_and_result(timm, options):
    theirs = timm.models.vision_transformer.Attention(64, 2, **options).eval()
    ours = FusedAttention(64, 2, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    mask = torch.randn(10, 10)
    torch.testing.assert_close(ours(tokens(), attn_mask=mask), theirs(tokens(), attn_mask=mask))


@pytest.mark.timm
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qk_norm": True, "scale_mlp_norm": True, "mlp_ratio": 3}])
def test_block_has_timms_signature_keys_and_result(timm, options):
    theirs = timm.models.vision_transformer.Block(64, 2, **options).eval()
    ours = FusedBlock(64, 2, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if not options:  # timm's norm_layer has an eps of its own
        ours.norm1.eps = ours.norm2.eps = theirs.norm1.eps
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-4, atol=1e-5)


@pytest.mark.timm
def test_beit_attention_has_timms_signature_keys_and_result(timm):
    options = {"qkv_bias": True, "window_size": (3, 3), "attn_head_dim": 32}
    theirs, ours = timm.models.beit.Attention(64, 2, **options).eval(), FusedBeitAttention(64, 2, **options).eval()
    nn.init.normal_(theirs.relative_position_bias_table)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    shared = torch.randn(1, 2, 10, 10)
    torch.testing.assert_close(ours(tokens(), shared), theirs(tokens(), shared))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_the_formula(options):
    layer, x = attention(torch.float64, **options), tokens(dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer, x))


@pytest.mark.parametrize("provider", FOR_CPU)
def test_providers_agree(provider):
    layer, x, bias = attention(attention=provider), tokens(), torch.randn(1, 2, 10, 10)
    torch.testing.assert_close(layer(x), plain(layer, x))
    torch.testing.assert_close(layer.of_rows(x[:, 3:5], x), plain(layer, x)[:, 3:5])
    if provider != "sdpa_flash":
        torch.testing.assert_close(layer(x, bias), plain(layer, x, bias))
        keys = torch.ones(3, 1, 1, 10, dtype=torch.bool).index_fill(3, torch.tensor([2, 9]), False)
        torch.testing.assert_close(layer(x, keys), plain(layer, x, keys))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_rows_apart_are_rows_of_the_whole(options):
    layer, x = attention(torch.float64, **options), tokens(dtype=torch.float64)
    rows = x[:, [7, 2]]
    torch.testing.assert_close(layer.of_rows(rows, x), layer(x)[:, [7, 2]])


@pytest.mark.parametrize("provider", sorted(set(PROVIDERS) - set(FOR_CPU)))
def test_a_gpu_only_provider_says_so_on_a_cpu(provider, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    layer = attention(attention=provider)
    with pytest.raises(ValueError, match=f"attention='{provider}' has no CPU operator"):
        layer(tokens())


@pytest.mark.parametrize("provider, package", [("xformers", "xformers"), ("flash_attn", "flash-attn")])
def test_a_provider_that_is_not_installed_says_what_to_install(provider, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package {package}, which is not installed: `pip install"):
        attention(attention=provider)


def sdpa(q, k, v, mask=None, scale=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.fixture
def stand_ins(monkeypatch):
    """xformers and flash-attn as far as their calls go, on a CPU."""
    from fastmim.layers import attention_providers

    def memory_efficient(q, k, v, attn_bias=None, p=0.0, scale=None):
        assert p == 0.0
        assert attn_bias is None or attn_bias.stride(-2) % 8 == 0
        return sdpa(q, k, v, attn_bias, scale)

    xformers, operators, flash = ModuleType("xformers"), ModuleType("xformers.ops"), ModuleType("flash_attn")
    operators.memory_efficient_attention = memory_efficient
    flash.flash_attn_func = lambda q, k, v, dropout_p, softmax_scale: sdpa(q, k, v, None, softmax_scale)
    for module in (xformers, operators, flash):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention_providers, "_GPU_ONLY", ())


def test_xformers_is_given_what_it_takes(stand_ins):
    layer, x, bias = attention(attention="xformers"), tokens(), torch.randn(1, 2, 10, 10)
    torch.testing.assert_close(layer(x), plain(layer, x))
    torch.testing.assert_close(layer(x, bias), plain(layer, x, bias))


def test_flash_attn_is_given_what_it_takes(stand_ins):
    layer, x = attention(torch.bfloat16, attention="flash_attn"), tokens(dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="takes no bias"):
        layer(x, torch.zeros(1, 2, 10, 10))
    with pytest.raises(ValueError, match=r"takes fp16 and bf16, got torch.float32"):
        attention(attention="flash_attn")(tokens())


def test_dropout_of_weights_acts_in_training():
    layer = attention(attn_drop=0.5).train()
    torch.manual_seed(0)
    first = layer(tokens())
    assert not torch.equal(layer(tokens()), first)
    torch.manual_seed(0)
    assert torch.equal(layer(tokens()), first)
    assert torch.equal(layer.eval()(tokens()), layer(tokens()))


@pytest.mark.parametrize("gain", [None, torch.linspace(-1, 2, 5)])
def test_gain_and_stochastic_depth_are_one_factor(gain):
    x, branch, depth = torch.randn(64, 2, 5), torch.randn(64, 2, 5), DropPath(0.25).train()
    torch.manual_seed(3)
    found = add_scaled(x, branch, gain, depth)
    torch.manual_seed(3)
    scaled = branch if gain is None else gain * branch
    torch.testing.assert_close(found, x + depth(scaled))
    torch.testing.assert_close(add_scaled(x, branch, gain, depth.eval()), x + scaled)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="dim 64 is not divisible by num_heads 3"):
        FusedAttention(64, 3)
    with pytest.raises(ValueError, match="need a norm_layer"):
        FusedAttention(64, 2, qk_norm=True)


def test_block_is_one_graph_under_compile():
    torch.manual_seed(0)
    block = FusedBlock(64, 2, init_values=0.1)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), block(tokens()))
