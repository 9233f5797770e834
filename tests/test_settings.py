import argparse

import pytest

from par_diffusers.settings import (
    ExtractionSettings,
    SamplingSettings,
    TokenizerSettings,
    TrainingSettings,
    add_options,
    read_settings,
    save_settings,
)


def read(settings_type, *words, echo=None):
    parser = argparse.ArgumentParser()
    add_options(parser, settings_type)
    return read_settings(settings_type, parser.parse_args(words), echo)


def test_defaults_are_the_papers():
    settings = read(TrainingSettings, "--data", "codes", "--output", "out")
    paper = {
        "learning_rate": 1e-4,
        "global_batch_size": 256,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.05,
    }
    paper |= {"lr_scheduler": "cosine", "max_grad_norm": 1.0}
    paper |= dict.fromkeys(("token_dropout", "residual_dropout", "attention_dropout", "condition_dropout"), 0.1)
    for name, value in paper.items():
        assert getattr(settings, name) == value


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: codes\nlearning-rate: 1e-3\nglobal_batch_size: 64\nregion_grid: [2, 2]\ncompile: true\n")
    settings = read(
        TrainingSettings, "--config", str(file), "--output", "out", "--global-batch-size", "32", "--no-compile"
    )
    assert (settings.learning_rate, settings.global_batch_size, settings.region_grid) == (1e-3, 32, (2, 2))
    assert settings.compile is False and settings.seed == 0


def test_what_is_saved_is_read_back(tmp_path):
    options = ["--data", "a", "--output", "b", "--block-out-channels", "8", "16", "--learning-rate", "0.00025"]
    settings = read(TokenizerSettings, *options)
    save_settings(settings, tmp_path / "echo.yaml")
    assert read(TokenizerSettings, echo=str(tmp_path / "echo.yaml")) == settings
    changed = read(TokenizerSettings, "--seed", "3", echo=str(tmp_path / "echo.yaml"))
    assert changed.seed == 3 and changed.block_out_channels == (8, 16)


@pytest.mark.parametrize(
    "line, message",
    [
        ("learning_rate: 0", "`learning_rate` must be a number above 0, got 0"),
        ("learning_rate: fast", "`learning_rate` must be a number above 0, got 'fast'"),
        ("global_batch_size: 1.5", "`global_batch_size` must be a whole number of at least 1, got 1.5"),
        ("global_batch_size: true", "`global_batch_size` must be a whole number of at least 1, got True"),
        ("compile: 1", "`compile` must be true or false, got 1"),
        ("order: columns", "`order` must be 'region' or 'raster', got 'columns'"),
        ("region_grid: 4", "`region_grid` must be whole numbers of at least 1, got 4"),
        ("token_dropout: .nan", "`token_dropout` must be a number of at least 0, got nan"),
        ("learning_rat: 1", "unknown names: learning_rat"),
        ("- 1", "must be a YAML file of `name: value` lines"),
        ("a: [", "must be a YAML file"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        read(TrainingSettings, "--config", str(file), "--data", "codes", "--output", "out")
    assert message in str(error.value)


def test_lists_of_text_are_read(tmp_path):
    assert read(SamplingSettings, "--model", "m", "--output", "o", "--labels", "tench", "3").labels == ("tench", "3")
    file = tmp_path / "run.yaml"
    for line, labels in (("labels: random", ("random",)), ("labels: [tench, 3]", ("tench", "3"))):
        file.write_text(line + "\nmodel: m\noutput: o\n")
        assert read(SamplingSettings, "--config", str(file)).labels == labels


def test_what_is_needed_is_asked_for():
    with pytest.raises(ValueError, match="--output, --vqvae"):
        read(ExtractionSettings, "--data", "pictures")
