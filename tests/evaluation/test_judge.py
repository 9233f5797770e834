import torch
from PIL import Image

from par_diffusers.evaluation.judge import GlyphJudge, accuracy, load_folder, main, train_judge


def coloured_squares(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes: the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randint(0, 60, (count, 3, 1, 1), generator=generator).expand(-1, -1, 16, 16).clone()
    images[torch.arange(count), labels] = 220
    return images.to(torch.uint8), labels


def test_judge_names_what_it_has_learnt():
    images, labels = coloured_squares(400)
    judge = train_judge(images, labels, steps=60, batch_size=64)
    held_out, answers = coloured_squares(100, seed=1)
    assert accuracy(judge, held_out, answers) > 0.95
    assert accuracy(judge, held_out, (answers + 1) % 3) < 0.05


def test_a_folder_is_loaded_at_the_size_of_its_images(tmp_path):
    for number, name in enumerate("abba"):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    images, labels, classes = load_folder(tmp_path)
    assert images.shape == (4, 3, 20, 20) and images[:, 0, 0, 0].tolist() == [0, 3, 1, 2]
    assert labels.tolist() == [0, 0, 1, 1] and classes == ["a", "b"]


def test_the_command_saves_what_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "__kwdefaults__", {"steps": 40, "batch_size": 32, "seed": 0})
    for split, seed in (("train", 0), ("validation", 1)):
        for number, (image, label) in enumerate(zip(*coloured_squares(60, seed), strict=True)):
            folder = tmp_path / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    main(["--data", str(tmp_path), "--output", str(tmp_path / "judge")])
    judge = GlyphJudge.from_pretrained(tmp_path / "judge")
    assert judge.config.image_size == 16 and judge.config.num_classes == 3
    images, labels, _ = load_folder(tmp_path / "validation")
    measured = accuracy(judge, images, labels)
    assert measured > 0.9
    assert f"{measured:.4f} of 60" in capsys.readouterr().out
