import math

import pytest
import torch

from fastmim.command_line import parse
from fastmim.config import RECIPES, list_recipes
from fastmim.engine.schedule import Schedule
from fastmim.methods import Method, create_method
from fastmim.models import create_encoder

PAPERS = [
    name for name in list_recipes() if name.split("_")[0] in ("mae", "simmim", "a2mim", "spark", "fcmae", "mixedae")
]
NAMED = (
    [f"a2mim_vit_{size}" for size in ("small", "base", "large")]
    + [f"a2mim_resnet{depth}" for depth in (50, 101, 152, 200)]
    + [f"a2mim_convnext_{size}" for size in ("tiny", "small", "base")]
    + [f"mae_vit_{size}" for size in ("base", "large", "huge")]
    + [f"spark_resnet{depth}" for depth in (50, 101, 152, 200)]
    + [f"spark_convnext_{size}" for size in ("small", "base", "large")]
    + [f"fcmae_convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")]
    + [f"mixedae_vit_base_{epochs}" for epochs in ("300ep", "800ep", "1600ep", "pairs")]
    + ["simmim_vit_base", "a2mim_resnet50_tiles"]
)


def settings(name: str, tmp_path, *words: str):
    return parse(["--recipe", name, "--data.root", str(tmp_path), *words])


def build(cfg) -> Method:
    """The method on the meta device: shapes without memory."""
    with torch.device("meta"):
        options = {**cfg.model.kwargs, "img_size": cfg.size, "drop_path_rate": cfg.model.drop_path_rate}
        if cfg.model.patch_size is not None:
            options["patch_size"] = cfg.model.patch_size
        return create_method(cfg.method_name, create_encoder(cfg.model.name, **options), cfg.method, cfg.size)


def test_the_papers_encoders_have_their_recipes():
    assert set(NAMED) <= set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_builds_its_method_and_states_its_source(name, tmp_path):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("#")
    assert "Source: arXiv" in text
    cfg = settings(name, tmp_path)
    method = build(cfg)
    assert method.name == name.split("_")[0]
    assert method.lr_scales().keys() <= dict(method.named_parameters()).keys()
    assert method.no_weight_decay() <= dict(method.named_parameters()).keys()


@pytest.mark.parametrize("name", PAPERS)
def test_fits_itself_to_smaller_images(name, tmp_path):
    patch = 14 if "vit_huge" in name else 16
    side = 96 if patch == 16 else 98
    build(settings(name, tmp_path, "--img_size", str(side)))


@pytest.mark.parametrize(
    "prefix, peak, batch, betas, decay",
    [
        ("mae_", 2.4e-3, 4096, (0.9, 0.95), 0.05),
        ("mixedae_vit_base_1600ep", 2.4e-3, 4096, (0.9, 0.95), 0.05),
        ("simmim_", 4e-4, 2048, (0.9, 0.999), 0.05),
        ("a2mim_vit", 4e-4, 2048, (0.9, 0.999), 0.05),
        ("a2mim_resnet", 1.2e-3, 2048, (0.9, 0.999), 0.05),
        ("a2mim_convnext", 1.2e-3, 2048, (0.9, 0.999), 0.05),
        ("spark_resnet", 3.2e-3, 4096, (0.9, 0.95), 0.04),
        ("spark_convnext", 3.2e-3, 4096, (0.9, 0.999), 0.04),
        ("fcmae_", 2.4e-3, 4096, (0.9, 0.95), 0.05),
    ],
)
def test_peak_rates_are_the_papers(prefix, peak, batch, betas, decay, tmp_path):
    for name in (name for name in PAPERS if name.startswith(prefix)):
        cfg = settings(name, tmp_path)
        assert math.isclose(cfg.optim.peak_lr(cfg.batch_size), peak), name
        assert (cfg.batch_size, cfg.optim.betas, cfg.optim.weight_decay) == (batch, betas, decay), name


@pytest.mark.parametrize("name", [name for name in PAPERS if not name.startswith(("mae", "mixedae"))])
def test_thirty_of_49_cells_of_32_pixels_are_removed_and_29_in_spark(name, tmp_path):
    method = build(settings(name, tmp_path))
    assert (method.cell, method.num_cells, method.num_keep) == (32, 49, 20 if name.startswith("spark") else 19)


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("spark")])
def test_spark_trains_by_lamb_with_its_schedules(name, tmp_path):
    cfg = settings(name, tmp_path)
    assert (cfg.optim.name, cfg.optim.eps, cfg.optim.clip_grad_norm) == ("lamb", 1e-6, 5.0)
    schedule = Schedule.of(cfg.optim, peak=3.2e-3, total_steps=1600 * 312, steps_per_epoch=312)
    assert schedule.lr(0) == pytest.approx(0.005 * 3.2e-3)
    assert schedule.lr(40 * 312) == pytest.approx(3.2e-3)
    assert schedule.lr(1600 * 312 - 1) == pytest.approx(0.001 * 3.2e-3, rel=1e-3)
    assert (schedule.weight_decay(0), schedule.weight_decay(1600 * 312 - 1)) == pytest.approx((0.04, 0.2))
    assert cfg.model.drop_path_rate > 0


@pytest.mark.parametrize(
    "name, millions", [("a2mim_vit_small", 48.8), ("a2mim_vit_base", 86.7), ("a2mim_vit_large", 304.6)]
)
def test_encoders_have_the_parameters_of_the_papers_table(name, millions, tmp_path):
    encoder = build(settings(name, tmp_path)).encoder
    classifier = 1001 * encoder.num_features  # the table counts 1000 classes
    count = sum(p.numel() for p in encoder.parameters()) + classifier
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    "name, weight, focal",
    [
        ("a2mim_vit_base", 0.1, True),
        ("a2mim_resnet50", 0.5, True),
        ("a2mim_resnet101", 0.1, False),
        ("a2mim_resnet152", 0.0, None),
        ("a2mim_convnext_small", 0.0, None),
    ],
)
def test_fourier_weights_are_those_of_the_released_runs(name, weight, focal, tmp_path):
    freq = settings(name, tmp_path).method.freq
    assert freq.weight == weight
    if focal is not None:
        assert (freq.form, freq.focal, freq.replacement) == ("code", focal, "mixed")


def test_the_resnet_recipe_takes_another_resnet(tmp_path):
    method = build(
        settings("a2mim_resnet50", tmp_path, "--model", "resnet18", "--img_size", "96", "--batch_size", "16")
    )
    assert method.encoder.name == "resnet18"
    assert method.mask_token.token.shape == (256,)
    assert method.lr_scales() == {"mask_token.token": 0.1}
