"""Write an encoder for timm: `python -m fastmim.export RUN` makes RUN/export/model.safetensors and config.json."""

from dataclasses import dataclass
from pathlib import Path

from fastmim.command_line import command
from fastmim.config import ConfigError, run_of
from fastmim.options import parse_options, writing
from fastmim.timm_folder import export_encoder, quoted, timm_line

__all__ = ["ExportConfig", "export_encoder", "main"]

USAGE = "python -m fastmim.export RUN [--out DIR]"
DESCRIPTION = (
    "Write a pre-trained encoder as model.safetensors and config.json, the layout of timm's models on the hub."
)


@dataclass
class ExportConfig:
    """Where the encoder goes."""

    out: Path | None = None
    """Folder to write into; RUN/export when not given."""


def main(argv: list[str]) -> None:
    place, cfg = parse_options(ExportConfig, argv, usage=USAGE, description=DESCRIPTION, word="RUN")
    from fastmim.evaluation import load_encoder

    if cfg.out is not None and cfg.out.exists() and not cfg.out.is_dir():
        raise ConfigError(f"out: {cfg.out} is a file, not a folder")
    try:
        encoder, meta = load_encoder(place)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if meta.path is None and cfg.out is None:
        raise ConfigError("out: is missing; a random encoder belongs to no run, say --out DIR")
    folder = cfg.out or run_of(Path(place) if Path(place).is_dir() else Path(place).parent) / "export"
    with writing("out", folder):
        file = export_encoder(encoder, folder, mean=meta.mean, std=meta.std, img_size=meta.img_size)
    averaged = ", averaged weights" if meta.averaged else ""
    print(f"{meta.name}{'' if meta.step is None else f' after {meta.step} steps'}{averaged}")
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB) and {file.with_name('config.json')}")
    print(f"load it with\n  import timm\n  {timm_line(encoder, file)}")
    print(f"or\n  model = timm.create_model({quoted(f'local-dir:{folder}')}, pretrained=True)")


if __name__ == "__main__":
    command(main)
