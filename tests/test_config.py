"""What can be set, in which order layers win, and what a mistake is answered."""

import shlex
from pathlib import Path

import pytest

from fastmim.command_line import load_config, parse
from fastmim.config import RECIPES, ConfigError, list_recipes, to_dict, to_yaml


def says(argv: str) -> str:
    """The one message that these words are answered with."""
    with pytest.raises(ConfigError) as caught:
        parse(argv.split())
    return str(caught.value)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


# --- layers ---------------------------------------------------------------------------------------------------------


def test_no_words_mean_the_digits_recipe():
    cfg = parse([])
    assert (cfg.recipe, cfg.method_name, cfg.evaluate) == ("digits", "a2mim", True)


def test_command_line_wins_over_recipe_and_recipe_over_defaults():
    cfg = parse(["--recipe", "digits", "--batch_size", "64", "--optim.weight_decay=0.1"])
    assert cfg.batch_size == 64
    assert cfg.optim.weight_decay == 0.1
    assert cfg.img_size == 32  # of the recipe
    assert cfg.optim.betas == (0.9, 0.95)  # of the dataclass


def test_command_line_wins_over_a_config_file_and_that_over_its_recipe(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipe: digits\nbatch_size: 32\nseed: 7\nmodel: vit_small_patch16_224\n")
    cfg = parse(["--config", str(file), "--seed", "8"])
    assert (cfg.batch_size, cfg.seed, cfg.model.name, cfg.evaluate) == (32, 8, "vit_small_patch16_224", True)


def test_method_and_model_are_short_for_their_names(images):
    cfg = parse(f"--method mae --method.mask_ratio 0.6 --model vit_small_patch16_224 --data.root {images}".split())
    assert (cfg.method_name, type(cfg.method).__name__, cfg.method.mask_ratio) == ("mae", "MAEConfig", 0.6)
    assert cfg.model.name == "vit_small_patch16_224"


def test_settings_of_another_encoder_are_dropped_with_it():
    assert parse(["--recipe", "digits"]).model.patch_size == 8
    assert parse(["--recipe", "digits", "--model", "resnet18"]).model.patch_size is None
    assert parse(["--recipe", "digits", "--model.patch_size", "4"]).model.patch_size == 4


@pytest.mark.parametrize("text", ["192,256", "[192,256]", "[192, 256]"])
def test_images_may_be_rectangular(text, images):
    assert parse(["--img_size", text, "--data.root", str(images)]).size == (192, 256)


def test_one_of_two_ways_to_say_a_thing_replaces_the_other():
    cfg = parse(shlex.split("--recipe digits --max_steps 12 --optim.base_lr 1.5e-4 --optim.warmup_steps 3"))
    assert (cfg.epochs, cfg.max_steps, cfg.optim.lr, cfg.optim.base_lr) == (None, 12, None, 1.5e-4)
    assert (cfg.optim.warmup_epochs, cfg.optim.warmup_steps) == (None, 3)


@pytest.mark.parametrize("method", ["mae", "simmim", "a2mim", "mixedae"])
@pytest.mark.parametrize("size, patch", [(224, 16), (96, 16), (64, 8), (32, 4), (28, 4), (14, 2)])
def test_without_a_recipe_the_patch_suits_the_image(method, size, patch, images):
    cfg = parse(["--method", method, "--img_size", str(size), "--data.root", str(images)])
    assert (cfg.model.name, cfg.model.patch_size, cfg.epochs) == ("vit_tiny_patch16_224", patch, 100)


@pytest.mark.parametrize("method, encoder", [("spark", "resnet18"), ("fcmae", "convnextv2_atto")])
def test_methods_on_cnns_get_a_cnn_and_images_of_several_cells(method, encoder, tmp_path):
    cfg = parse(["--method", method])
    assert (cfg.model.name, cfg.img_size, cfg.model.patch_size) == (encoder, 96, None)
    cfg = parse(["--method", method, "--model", "resnet50", "--data.root", str(tmp_path)])
    assert (cfg.model.name, cfg.img_size) == ("resnet50", 224)


def test_dashes_are_as_good_as_underscores():
    assert parse(["--batch-size", "16"]).batch_size == 16


def test_free_form_arguments_reach_the_encoder_in_their_types():
    cfg = parse(["--model.kwargs.init_values", "0.1", "--model.kwargs.qkv_bias=false"])
    assert cfg.model.kwargs | {"init_values": 0.1, "qkv_bias": False} == cfg.model.kwargs


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_is_valid_and_survives_being_written_and_read(recipe, images, tmp_path):
    words = ["--recipe", recipe] + ([] if recipe.startswith("digits") else ["--data.root", str(images)])
    cfg = parse(words)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(cfg))
    assert to_dict(load_config(file)) == to_dict(cfg)
    assert (RECIPES / f"{recipe}.yaml").read_text().startswith("#"), "a recipe starts by stating its source"


def test_help_explains_and_lists_recipes(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for word in (
        "--epochs",
        "--data.root",
        "--method.mask_ratio",
        "--engine.checkpoint_every",
        "digits",
        "a2mim, fcmae, mae",
    ):
        assert word in text


def test_print_config_prints_what_config_reads(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        parse(["--method", "mae", "--seed", "5", "--print_config"])
    assert left.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    cfg = load_config(file)
    assert (cfg.method_name, cfg.seed) == ("mae", 5)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--epohs 3", ["epohs", "did you mean epochs?"]),
        ("--mask_ratio 0.3", ["mask_ratio", "did you mean method.mask_ratio?"]),
        ("--lr 0.3", ["did you mean optim.lr?"]),
        ("--data.wrokers 3", ["did you mean data.workers?"]),
        ("--method.mask_ration 0.3", ["did you mean method.mask_ratio?"]),
        ("--method mea", ["'mea'", "did you mean mae?", "simmim"]),
        ("--recipe digit", ["'digit'", "did you mean digits?"]),
        ("--data x", ["data", "group of settings", "data.root"]),
        ("digits", ["digits", "--key value"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(words, parts):
    assert all(part in says(words) for part in parts), says(words)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--epochs abc", "epochs: 'abc' is not a number or null"),
        ("--batch_size 1.5", "batch_size: '1.5' is not a whole number"),
        ("--evaluate perhaps", "evaluate: 'perhaps' is not true or false"),
        ("--optim.schedule cosinus", "optim.schedule: 'cosinus' is not one of cosine, multistep, constant"),
        ("--optim.betas 0.9", "optim.betas: '0.9' is not 2 numbers with a comma between them"),
        ("--batch_size true", "batch_size: 'true' is not a whole number"),
        ("--data.root=", "data.root: needs a value, a path or null"),
        ("--epochs", "epochs: needs a value, a number or null"),
    ],
)
def test_a_wrong_type_is_answered_with_key_value_and_what_would_be_right(words, message):
    assert says(words) == message


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--method.mask_ratio 1.0", ["method.mask_ratio: 1", "between 0 and 1"]),
        ("--method.mask_ratio 0", ["method.mask_ratio: 0", "between 0 and 1"]),
        ("--method mae --img_size 100 --model.patch_size 16", ["img_size: 100", "patch size 16", "96 or 112"]),
        ("--data.root /does/not/exist", ["data.root: /does/not/exist", "does not exist"]),
        ("--data.source folder", ["data.root"]),
        ("--batch_size 0", ["batch_size: 0"]),
        ("--method mixedae --batch_size 30", ["batch_size: 30 images", "groups of 4", "28 or 32 would do"]),
        (
            "--method mixedae --method.group_size 3 --batch_size 64 --optim.accumulate 2",
            ["64 images in 2 micro-batches", "groups of 3", "60 or 66"],
        ),
        ("--epochs -1", ["epochs: -1"]),
        ("--epochs .inf", ["epochs: inf"]),
        ("--seed 99999999999999999999", ["seed", "2^63"]),
        ("--max_steps 0", ["max_steps: 0"]),
        ("--epochs 3 --max_steps 5", ["epochs: 3", "max_steps 5", "one of the two"]),
        ("--optim.lr 1 --optim.base_lr 2", ["optim.lr: 1", "optim.base_lr 2"]),
        ("--optim.lr -1", ["optim.lr", "-1"]),
        ("--log.every sometimes", ["log.every", "'sometimes'", "1ep"]),
        ("--data.workers -1", ["data.workers", "-1"]),
        ("--recipe digits --method mae", ["method: mae", "recipe digits", "a2mim"]),
        ("--out runs/../../x", ["out: runs/../../x", "'..'"]),
        ("--resume /does/not/exist", ["resume: /does/not/exist"]),
        ("--config /does/not/exist.yaml", ["/does/not/exist.yaml", "No such file"]),
    ],
)
def test_an_impossible_value_or_combination_is_one_sentence(words, parts):
    assert all(part in says(words) for part in parts), says(words)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a: !!python/object/apply:os.system ['true']", ["refused", "python/object"]),
        ("epochs: [1", ["not valid YAML"]),
        ("- 1", ["list", "mapping"]),
        ("epohs: 3", ["epohs", "own.yaml", "did you mean epochs?"]),
        ("optim: {lr: fast}", ["optim.lr: 'fast' is not a number", "own.yaml"]),
        ("method: {name: mae, mask_ration: 0.5}", ["method.mask_ration", "did you mean method.mask_ratio?"]),
        ("data: digits", ["data", "group of settings"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(text, parts, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    message = says(f"--config {file}")
    assert all(part in message for part in parts), message
