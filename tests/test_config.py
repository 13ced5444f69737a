"""Recipes: presets, overrides, the way back to TOML, and one clear line for each thing that cannot be."""

import math
import tomllib
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import UsageError
from ul_train.config import Config, ObjectiveConfig, config_hash, config_toml, load_config, preset_names, validate

each_preset = pytest.mark.parametrize("preset", preset_names())


def tiny(*overrides: str) -> Config:
    return load_config("tiny", list(overrides))


def refusal(*overrides: str, recipe: str = "tiny") -> str:
    with pytest.raises(UsageError) as error:
        load_config(recipe, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_presets_for_tests_and_for_the_quickstart_are_there():
    assert {"tiny", "fashion-32"} <= set(preset_names())


@each_preset
def test_a_preset_is_whole_and_named_as_its_file(preset):
    assert load_config(preset, []).name == preset


@each_preset
def test_a_preset_comes_back_from_its_toml(preset):
    config = load_config(preset, [])
    assert validate(tomllib.loads(config_toml(config)), "resolved") == config


@each_preset
def test_in_every_preset_the_noise_of_z_0_is_at_logsnr_5(preset):
    assert load_config(preset, []).make_objective().schedule_z.ends == (-10.0, 5.0)


def test_without_a_word_about_it_the_noise_of_z_0_is_the_papers():
    logsnr = ObjectiveConfig().latent_logsnr
    assert (float(alpha(logsnr)), float(sigma(logsnr))) == pytest.approx((0.99665, 0.08181), abs=5e-6)


def test_the_objective_takes_its_numbers_from_the_recipe():
    objective = tiny(
        "objective.loss_factor=1.7", "objective.bias=-2", "objective.base_bias=1.5", "objective.latent_logsnr=6",
        "objective.latent_logsnr_min=-8", "objective.latent_schedule=cosine",
    ).make_objective()  # fmt: skip
    assert (objective.loss_factor, objective.bias, objective.base_bias) == (1.7, -2.0, 1.5)
    assert (objective.schedule_z.kind, objective.schedule_z.ends) == ("cosine", (-8.0, 6.0))


@pytest.mark.parametrize(("size", "shift"), [(64, 0.0), (32, 2 * math.log(2)), (128, -2 * math.log(2))])
def test_the_image_schedule_is_shifted_by_resolution_and_the_latent_schedule_is_not(size, shift):
    objective = tiny(f"image.size={size}").make_objective()
    assert objective.schedule_x.ends == pytest.approx((-10.0 + shift, 10.0 + shift))
    assert objective.schedule_z.shift == 0.0


def test_shapes_follow_from_size_patch_and_stages():
    config = tiny("image.channels=3", "image.size=24")
    assert (config.downsampling, config.latent_size) == (4, 6)
    assert (config.image_shape, config.latent_shape) == ((3, 24, 24), (2, 6, 6))


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("stages.joint.steps=500", "stages.joint", "steps", 500),
        ("stages.joint.learning_rate=3e-4", "stages.joint", "learning_rate", 3e-4),
        ("objective.bias=3", "objective", "bias", 3.0),
        ("objective.bias=-2.5", "objective", "bias", -2.5),
        ("image.flip=true", "image", "flip", True),
        ("image.background=white", "image", "background", "white"),
        ('image.background="#ff8000"', "image", "background", "#ff8000"),
        ("image.background=#ff8000", "image", "background", "#ff8000"),
        ("sampling.guidance_interval=[-2, 1.5]", "sampling", "guidance_interval", (-2.0, 1.5)),
        ("sampling.guidance_rescale=0.7", "sampling", "guidance_rescale", 0.7),
        (" sampling.sampler = ancestral", "sampling", "sampler", "ancestral"),
        ("encoder.channels=[32, 64]", "encoder", "channels", (32, 64)),
    ],
)
def test_set_takes_toml_values_and_bare_words(override, section, field, value):
    result = attrgetter(f"{section}.{field}")(tiny(override))
    assert result == value
    assert type(result) is type(value)


def test_set_reaches_top_level_fields_and_the_last_one_wins():
    config = tiny("seed=3", "seed=4", "name=mine")
    assert (config.seed, config.name) == (4, "mine")


def test_set_can_open_a_section_that_the_file_does_not_have(tmp_path):
    text = config_toml(tiny()).split("[sampling]")[0]
    (tmp_path / "recipe.toml").write_text(text)
    assert load_config(str(tmp_path / "recipe.toml"), ["sampling.steps=7"]).sampling.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.joint.stepz=4", "preset tiny: there is no key stages.joint.stepz; did you mean stages.joint.steps?"),
        (
            "objective.loss_facto=4",
            "preset tiny: there is no key objective.loss_facto; did you mean objective.loss_factor?",
        ),
        ("stages.join.steps=4", "preset tiny: there is no key stages.join; did you mean stages.joint?"),
        ("joint.steps=4", "preset tiny: there is no key joint; did you mean stages.joint?"),
        ("stages.joint.qqqq=4", "preset tiny: there is no key stages.joint.qqqq"),
        ("base.steps=4", "preset tiny: there is no key base.steps; did you mean stages.base.steps?"),
        ("seed", "--set 'seed': expected field=value, for example --set stages.joint.steps=500"),
        ("stages.joint.steps.x=4", "--set 'stages.joint.steps.x=4': steps is a value, not a section"),
        ("stages.joint.steps=0", "preset tiny: stages.joint.steps = 0: input should be greater than 0"),
        ("stages.joint.steps=many", "preset tiny: stages.joint.steps = 'many': input should be a valid integer"),
        ("stages.joint.steps=1.5", "preset tiny: stages.joint.steps = 1.5: input should be a valid integer"),
        ("stages.base.learning_rate=-1", "preset tiny: stages.base.learning_rate = -1: input should be greater than 0"),
        ("stages.joint.ema_decay=1", "preset tiny: stages.joint.ema_decay = 1: input should be less than 1"),
        ("base.dropout=-0.1", "preset tiny: base.dropout = -0.1: input should be greater than or equal to 0"),
        ("objective.loss_factor=0", "preset tiny: objective.loss_factor = 0: input should be greater than 0"),
        ("objective.bias=nan", "preset tiny: objective.bias = nan: input should be a finite number"),
        ("objective.loss_factor=inf", "preset tiny: objective.loss_factor = inf: input should be a finite number"),
        ("image.channels=2", "preset tiny: image.channels = 2: input should be 1 or 3"),
        ("image.fit=stretch", "preset tiny: image.fit = 'stretch': input should be 'crop' or 'pad'"),
        ("encoder.channels=[16, 0]", "preset tiny: encoder.channels.1 = 0: input should be greater than 0"),
        ("stages.joint=4", "preset tiny: stages.joint = 4: input should be a valid dictionary"),
        ("seed=-1", "preset tiny: seed = -1: input should be greater than or equal to 0"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_named(override, message):
    assert refusal(override).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.channels=[16]"], "encoder has 1 widths and 2 block counts; give one of each a stage"),
        (["decoder.blocks=[1, 1]"], "decoder has 1 widths and 2 block counts"),
        (["prior.widths=[32, 32]"], "prior has 2 widths and 1 block counts"),
        (["base.blocks=[1]"], "base has 2 widths and 1 block counts"),
        (["encoder.channels=[]", "encoder.blocks=[]"], "encoder has 0 widths"),
        (["image.size=18"], "image.size is 18, the encoder downsamples by 4; give a multiple"),
        (["decoder.patch=4"], "its middle is at 1/8 of the image, the latent at 1/4"),
        (["image.size=4"], "base has 2 levels, the latent is 1 px; give fewer levels"),
        (["prior.widths=[40]"], "prior.widths [40] must be multiples of head_dim 16"),
        (["decoder.width=40"], "decoder.width 40 must be a multiple of head_dim 16"),
        (["stages.joint.accumulate=3"], "stages.joint.batch_size 8 must be a multiple of accumulate 3"),
        (["stages.base.accumulate=5"], "stages.base.batch_size 8 must be a multiple of accumulate 5"),
        (
            ["objective.latent_logsnr_min=5"],
            "objective.latent_logsnr_min 5.0 must be below objective.latent_logsnr 5.0",
        ),
        (
            ["objective.image_logsnr_max=-11"],
            "objective.image_logsnr_min -10.0 must be below objective.image_logsnr_max -11.0",
        ),
        (
            ["sampling.sampler=ddmi"],
            "sampling.sampler 'ddmi' is not known; expected one of ddim, ancestral, dpmpp2m, ab2, ab3, sa2[:TAU]",
        ),
        (["sampling.decoder_grid=karas"], "sampling.decoder_grid 'karas' is not known; expected one of uniform"),
        (
            ["sampling.guidance_interval=[2, -2]"],
            "sampling.guidance_interval is [2.0, -2.0]; give the lower logsnr first",
        ),
        (
            ["sampling.guidance_rescale=1.5"],
            "sampling.guidance_rescale = 1.5: input should be less than or equal to 1",
        ),
        (
            ["objective.reconstruction=mse"],
            "objective.reconstruction is mse, whose decoder makes an image in one step, and sampling.decoder_steps is",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_named(overrides, message):
    assert message in refusal(*overrides)
    assert refusal(*overrides).startswith("preset tiny: ")


def test_several_faults_are_told_at_once():
    message = refusal("stages.joint.steps=0", "stages.joint.stepz=1")
    assert "stages.joint.steps = 0" in message
    assert "stages.joint.stepz" in message


def test_an_unknown_recipe_offers_the_nearest_preset():
    message = refusal(recipe="fashion-23")
    assert message.startswith("recipe 'fashion-23' is neither a preset nor a file; did you mean fashion-32? presets: ")


def earlier_form(config: Config) -> str:
    """As recipes were written before their stages stood in one section."""
    return config_toml(config).replace("[stages.joint]", "[joint]").replace("[stages.base]", "[base_stage]")


def test_a_recipe_in_the_earlier_form_is_read_as_it_was_meant(tmp_path):
    path, config = tmp_path / "recipe.toml", tiny("stages.joint.steps=21", "stages.base.steps=22")
    path.write_text(earlier_form(config))
    assert load_config(str(path), []) == config
    assert load_config(str(path), ["stages.base.steps=23"]).stages.base.steps == 23


def test_both_forms_in_one_recipe_are_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(config_toml(tiny()) + "[joint]\nsteps = 3\n")
    assert "there is no key joint; did you mean stages.joint?" in refusal(recipe=str(path))


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(config_toml(tiny()).replace("latent_channels = 2\n", ""))
    assert refusal(recipe=str(path)) == f"{path}: latent_channels is missing"


def test_a_misspelt_key_comes_before_the_keys_that_are_missing(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "mine"\nlatent_chanels = 2\n')
    message = refusal(recipe=str(path))
    assert message.startswith(
        f"{path}: there is no key latent_chanels; did you mean latent_channels?; latent_channels, "
    )
    assert message.endswith("base, stages are missing")


@pytest.mark.parametrize("content", [b"steps = = 4", b"\xff\xfe\x00", b"[joint\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    assert refusal(recipe=str(path)).startswith(f"{path}: not TOML: ")


def test_a_recipe_never_changes_after_loading():
    config = tiny()
    with pytest.raises(ValidationError):
        config.seed = 5
    with pytest.raises(ValidationError):
        config.stages.joint.steps = 5


@given(
    name=st.text(min_size=1, max_size=20).filter(str.isprintable),
    seed=st.integers(0, 2**63 - 1),
    bias=st.floats(-1e9, 1e9),
)
def test_any_recipe_comes_back_from_its_toml(name, seed, bias):
    config = tiny()
    objective = config.objective.model_copy(update={"bias": bias})
    changed = config.model_copy(update={"name": name, "seed": seed, "objective": objective})
    assert validate(tomllib.loads(config_toml(changed)), "resolved") == changed


def test_the_hash_changes_with_every_value_and_not_with_how_it_was_given(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(config_toml(tiny("stages.joint.steps=21")))
    assert config_hash(load_config(str(path), [])) == config_hash(tiny("stages.joint.steps=21"))
    assert len({config_hash(tiny()), config_hash(tiny("stages.joint.steps=21")), config_hash(tiny("seed=1"))}) == 3


@pytest.mark.case("R15", "a recipe that an editor saved with a byte order mark", "it is read")
def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    text = config_toml(load_config("tiny", []))
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8-sig")
    assert load_config(str(tmp_path / "mine.toml"), []) == load_config("tiny", [])
    (tmp_path / "wide.toml").write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match="not a text file in UTF-8"):
        load_config(str(tmp_path / "wide.toml"), [])
