"""What `fastmim.export` writes is loaded by timm, strictly, in both of timm's ways, and computes the same."""

import pytest
import torch

from fastmim.export import export_encoder
from fastmim.models import create_encoder
from fastmim.timm_folder import timm_line

ENCODERS = [
    ("vit_tiny_patch16_224", {"img_size": (32, 48), "patch_size": 8, "depth": 2, "in_chans": 1}, (1, 32, 48)),
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 5, "drop_path_rate": 0.1}, (3, 32, 32)),
    ("beit_base_patch16_224", {"img_size": 32, "depth": 2}, (3, 32, 32)),
    ("resnet18", {"in_chans": 13, "img_size": 64}, (13, 64, 64)),
    ("convnext_atto", {"img_size": 64, "ls_init_value": 0.1}, (3, 64, 64)),
    ("convnextv2_atto", {"in_chans": 1, "num_classes": 3}, (1, 224, 224)),
]


@pytest.mark.timm
@pytest.mark.parametrize("name, options, shape", ENCODERS, ids=[f"{name}-{shape[0]}" for name, _, shape in ENCODERS])
def test_timm_loads_the_export(timm, tmp_path, name, options, shape):
    torch.manual_seed(0)
    encoder = create_encoder(name, **options).eval()
    mean, std = [0.3] * shape[0], [0.4] * shape[0]
    file = export_encoder(encoder, tmp_path / "export", mean=mean, std=std)
    images = torch.randn(2, *shape)
    scope = {"timm": timm}
    exec(timm_line(encoder, file), scope)  # the very line that the command prints
    models = [scope["model"], timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)]
    for model in models:
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images), encoder(images), atol=1e-5, rtol=1e-5)
        assert model.state_dict().keys() == encoder.state_dict().keys()
    data = timm.data.resolve_model_data_config(models[1])
    assert (tuple(data["input_size"]), list(data["mean"]), list(data["std"])) == (shape, mean, std)
