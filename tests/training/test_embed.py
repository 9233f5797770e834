import torch

from par_diffusers import PARPipeline, PARVideoPipeline
from par_diffusers.training.embed import main


def test_an_embedded_model_is_the_trained_one_in_half_precision_without_code(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "trained")
    main(["--model", str(tmp_path / "trained"), "--output", str(tmp_path / "small")])
    main(["--model", str(tmp_path / "trained"), "--output", str(tmp_path / "small")])  # replaces it
    assert capsys.readouterr().out.count("MB") == 2
    files = {str(file.relative_to(tmp_path / "small")) for file in (tmp_path / "small").rglob("*") if file.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
    }
    small = PARPipeline.from_pretrained(tmp_path / "small")
    for ours, theirs in zip(small.transformer.parameters(), pipe.transformer.parameters(), strict=True):
        assert ours.dtype == torch.float16 and torch.equal(ours, theirs.half())
    card = (tmp_path / "small" / "README.md").read_text()
    assert 'embedded_model("small")' in card and "trust_remote_code" not in card and "## Data and licence" in card
    assert "license: apache-2.0" in card and card.count("## Use") == card.count("## Model") == 1


def test_an_embedded_model_of_clips_shows_them(make_video_pipeline, tmp_path):
    make_video_pipeline().save_pretrained(tmp_path / "trained")
    main(["--model", str(tmp_path / "trained"), "--output", str(tmp_path / "small")])
    files = {str(file.relative_to(tmp_path / "small")) for file in (tmp_path / "small").rglob("*") if file.is_file()}
    assert "samples.gif" in files and "vae/config.json" in files and not any(name.endswith(".py") for name in files)
    card = (tmp_path / "small" / "README.md").read_text()
    assert 'PARVideoPipeline.from_pretrained(embedded_model("small")' in card and 'class_labels=["eight"]' in card
    assert "Trained from nothing on clips of letters" in card
    assert PARVideoPipeline.from_pretrained(tmp_path / "small").config.frame_rate == 8
