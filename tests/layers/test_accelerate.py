"""accelerate: timm's transformers computed by fused blocks, in place, and what cannot be swapped named."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmim.layers import FusedAttention, FusedBlock, accelerate

VITS = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "init_values": 0.3, "reg_tokens": 2, "drop_path_rate": 0.2}),
    ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "proj_bias": False}),
    ("vit_tiny_patch16_224", {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "global_pool": "avg"}),
    ("beit_base_patch16_224", {"use_abs_pos_emb": True}),
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": None}),
    ("beitv2_base_patch16_224", {"drop_path_rate": 0.1}),
]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """A look-alike, so that the swap is tested where timm is not installed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.ls1, self.drop_path1 = LayerScale(dim), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)
        self.ls2, self.drop_path2 = LayerScale(dim), nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


for look_alike in (Attention, Block):
    look_alike.__module__ = "timm.models.vision_transformer"


def look_alike_vit() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(32, 4), Block(32, 4))


def gradients(module, x, *arguments):
    module.zero_grad()
    (module(x, *arguments).sin().sum()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_a_look_alike_is_swapped_with_the_same_result():
    vit, x = look_alike_vit().double(), torch.randn(2, 9, 32, dtype=torch.float64)
    plain, before = copy.deepcopy(vit), dict(vit.named_parameters())
    report = accelerate(vit)
    assert all(isinstance(block, FusedBlock) and isinstance(block.attn, FusedAttention) for block in vit)
    assert list(vit.state_dict()) == list(plain.state_dict())
    assert all(before[name] is parameter for name, parameter in vit.named_parameters())
    torch.testing.assert_close(vit(x), plain(x))
    expected = gradients(plain, x)
    for name, gradient in gradients(vit, x).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert report.kept == {}
    assert str(report) == "swapped 2 FusedAttention, 8 Linear, 2 FusedBlock"


@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_timm_mean_the_same(causal):
    vit, x = look_alike_vit(), torch.randn(2, 9, 32)
    masking = {"is_causal": True} if causal else {"attn_mask": torch.randn(2, 1, 9, 9)}
    expected = vit[0](x, **masking)
    accelerate(vit)
    torch.testing.assert_close(vit[0](x, **masking), expected)


def test_boolean_masks_of_keys_and_of_pairs_mean_the_same():
    vit, x = look_alike_vit(), torch.randn(2, 9, 32)
    of_keys = torch.rand(2, 1, 1, 9) < 0.6
    of_keys[..., 0] = True
    of_pairs = torch.eye(9, dtype=torch.bool) | (torch.rand(9, 9) < 0.5)
    expected = [vit[0](x, attn_mask=mask) for mask in (of_keys, of_pairs)]
    accelerate(vit)
    for mask, right in zip((of_keys, of_pairs), expected, strict=True):
        torch.testing.assert_close(vit[0](x, attn_mask=mask), right)


def test_what_cannot_be_swapped_is_named_and_left_alone():
    vit = look_alike_vit()
    vit[0].attn.register_forward_hook(lambda *_: None)
    vit[1].mlp.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    vit[1].extra = nn.Linear(2, 2)
    plain, x = copy.deepcopy(vit), torch.randn(2, 9, 32)
    report = accelerate(vit)
    assert report.kept == {
        "0.attn": "it carries hooks, which the new module would not run",
        "0": "its attention (Attention) was kept",
        "1": "it has extra, which FusedBlock lacks",
    }
    assert report.swapped["1.attn"] == "FusedAttention"
    assert "kept 0.attn: it carries hooks" in str(report)
    torch.testing.assert_close(vit(x), plain(x))


def test_unknown_attention_is_named():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    vit = nn.Sequential(Other())
    assert "Other is no class that accelerate knows" in accelerate(vit).kept["0"]


def test_a_module_without_attention_is_refused():
    with pytest.raises(ValueError, match="Sequential contains no attention"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_an_unknown_provider_is_refused_before_anything_is_touched():
    vit = look_alike_vit()
    with pytest.raises(ValueError, match="attention is one of fastmim, sdpa"):
        accelerate(vit, attention="fast")
    assert type(vit[0]) is Block


@pytest.mark.timm
@pytest.mark.parametrize("name, options", VITS, ids=str)
def test_timms_models_are_swapped_whole(timm, name, options):
    torch.manual_seed(0)
    vit = timm.create_model(name, **SMALL, **options).double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = copy.deepcopy(vit)
    before = dict(vit.named_parameters())
    report = accelerate(vit)
    assert report.kept == {}
    assert sum(kind.endswith("Block") for kind in report.swapped.values()) == 2
    assert list(vit.state_dict()) == list(plain.state_dict())
    assert all(before[key] is parameter for key, parameter in vit.named_parameters())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(vit(images), plain(images))
    expected = gradients(plain, images)
    for key, gradient in gradients(vit, images).items():
        torch.testing.assert_close(gradient, expected[key], msg=lambda text, key=key: f"{key}: {text}")
    rates = [[m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")] for model in (vit, plain)]
    assert rates[0] == rates[1]
    vit.train()(images).sum().backward()  # dropout and stochastic depth act
    vit.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.timm
def test_other_blocks_of_timm_are_refused_or_named(timm):
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    with pytest.raises(ValueError, match="contains no attention"):
        accelerate(timm.create_model("vit_tiny_patch16_224", **SMALL, block_fn=parallel))
    windows = nn.Sequential(timm.models.swin_transformer.WindowAttention(32, 2, window_size=(2, 2)))
    assert "WindowAttention is no class that accelerate knows" in accelerate(windows).kept["0"]
