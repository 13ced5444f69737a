"""Samplers and grids as users type them, through the one function that settings, manifests and recipes share."""

import re
from dataclasses import fields

import numpy as np
import pytest
from tiny_bundle import info_fields

from ul_runtime.cli.options import SamplingOptions
from ul_runtime.errors import UsageError
from ul_runtime.manifest import BundleInfo
from ul_runtime.samplers import GRID_NUMBERS, GRIDS, SAMPLER_NUMBERS, SAMPLERS, mix_grid, parse_grid, parse_sampler, sa2
from ul_runtime.settings import SamplerSettings
from ul_train.config import load_config

KNOWN = "ddim, ancestral, dpmpp2m, ab2, ab3, sa2[:TAU], unipc2, heun"
NODES = np.linspace(-10.0, 5.0, 8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_name_without_numbers_is_the_sampler_with_its_own(name):
    assert parse_sampler(name) is SAMPLERS[name]


@pytest.mark.parametrize("name", GRIDS)
def test_a_name_without_numbers_is_the_grid_with_its_own(name):
    assert parse_grid(name) is GRIDS[name]


def test_numbers_go_to_the_arguments_in_their_order():
    assert parse_sampler("sa2:0.6")(NODES, 3) == sa2(NODES, 3, tau=0.6)
    assert parse_sampler("sa2:0.6")(NODES, 3) != sa2(NODES, 3)
    expected = mix_grid(9, -10.0, 5.0, rho=0.9, centre=-1.0, width=2.0)
    assert np.array_equal(parse_grid("mix:0.9,-1,2")(9, -10.0, 5.0), expected)
    assert not np.array_equal(parse_grid("mix")(9, -10.0, 5.0), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddmi", f"sampler 'ddmi' is not known; expected one of {KNOWN}; did you mean ddim?"),
        ("UniPC", f"sampler 'UniPC' is not known; expected one of {KNOWN}; did you mean unipc2?"),
        ("xyz:3", f"sampler 'xyz:3' is not known; expected one of {KNOWN}"),
        ("ddim:3", "sampler 'ddim:3': ddim takes no numbers; give ddim"),
        ("ddim:", "sampler 'ddim:': ddim takes no numbers; give ddim"),
        *(
            (text, f"sampler '{text}': expected sa2:TAU with tau 0 to 10")
            for text in ("sa2:", "sa2:x", "sa2:-0.1", "sa2:10.1", "sa2:nan", "sa2:inf", "sa2:1,1", "sa2:0.6:1")
        ),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_with_what_can(text, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse_sampler(text)


@pytest.mark.parametrize("text", ["mix:", "mix:0.9", "mix:0.9,-1", "mix:1,-1,1.5", "mix:0.9,-1,0", "mix:0.9,-1,1.5,2"])
def test_a_mix_that_cannot_be_is_refused_with_its_ranges(text):
    message = f"grid '{text}': expected mix:RHO,CENTRE,WIDTH with rho 0 to 0.99, centre -20 to 20, width 0.25 to 20"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse_grid(text)


def manifest_with(field: str, text: str) -> None:
    fields = info_fields()
    fields["defaults"]["decoder"] = fields["defaults"]["decoder"] | {field: text}
    BundleInfo.model_validate(fields)


SETTINGS = {"sampler": "ddim", "grid": "mix", "num_steps": 4}
PLACES = {
    "settings": lambda field, text: SamplerSettings(**(SETTINGS | {field: text})),
    "manifest": manifest_with,
    "recipe": lambda field, text: load_config("tiny", [f"sampling.decoder_{field}={text}"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_takes_and_refuses_the_same_spellings(place):
    for field, texts in (("sampler", ("sa2:0.6", *SAMPLERS)), ("grid", ("mix:0.9,-1,1.5", *GRIDS))):
        for text in texts:
            PLACES[place](field, text)
        for text in ("no", "ddim:1", "mix:1", "sa2:-1"):
            with pytest.raises((UsageError, ValueError), match=f"{field} '{text}'"):
                PLACES[place](field, text)


@pytest.mark.parametrize(
    ("field", "known", "numbers"),
    [
        ("sampler", SAMPLERS, SAMPLER_NUMBERS),
        ("decoder_sampler", SAMPLERS, SAMPLER_NUMBERS),
        ("grid", GRIDS, GRID_NUMBERS),
        ("decoder_grid", GRIDS, GRID_NUMBERS),
    ],
)
def test_the_help_of_an_option_names_all_spellings_and_no_other(field, known, numbers):
    (help,) = (each.metadata["option"]["help"] for each in fields(SamplingOptions) if each.name == field)
    _, names = help.split(": ", 1)
    with_numbers = [f"{name}:{','.join(ends).upper()}" for name, ends in numbers.items()]
    assert sorted(re.findall(r"[a-z]\w+(?::[A-Z,]*[A-Z])?", re.sub(r"\(.*?\)| or ", " ", names))) == sorted(
        [*known, *with_numbers]
    )
