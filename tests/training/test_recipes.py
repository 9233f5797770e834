"""The files of docs/recipes are what the commands take."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from par_diffusers import PARConfig, PARScheduler
from par_diffusers.settings import TokenizerSettings, TrainingSettings, _read_yaml


RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_recipes_are_valid(name):
    if name.startswith("accelerate"):
        config = load_config_from_file(str(RECIPES / name))
        assert config.num_processes >= 8 and config.mixed_precision == "bf16"
        return
    kind = TokenizerSettings if "tokenizer" in name else TrainingSettings
    settings = kind(**{"output": "out"} | _read_yaml(RECIPES / name, kind))
    if kind is TrainingSettings and settings.hidden_size:
        PARConfig(
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
        )
        PARScheduler((24, 24), num_parallel_tokens=settings.num_parallel_tokens or 4)
