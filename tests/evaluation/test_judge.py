import torch
from PIL import Image

from par_diffusers.evaluation.judge import accuracy, load_folder, train_judge
from par_diffusers.training.images import to_pixels


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
    assert accuracy(judge, to_pixels(held_out), answers) > 0.95
    wrong = accuracy(judge, to_pixels(held_out), (answers + 1) % 3)
    assert wrong < 0.05


def test_a_folder_is_loaded_at_the_size_of_its_images(tmp_path):
    for number, name in enumerate("abba"):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    pixels, labels, classes = load_folder(tmp_path)
    assert pixels.shape == (4, 3, 20, 20) and pixels[:, 0, 0, 0].tolist() == [0, 3, 1, 2]
    assert labels.tolist() == [0, 0, 1, 1] and classes == ["a", "b"]
