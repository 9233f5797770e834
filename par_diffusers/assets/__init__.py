"""Models that ship with the package."""

from pathlib import Path


def embedded_model(name: str) -> Path:
    """Pipeline folder of an embedded model, for `PARPipeline.from_pretrained`.

    ```py
    >>> from par_diffusers import embedded_model

    >>> embedded_model("par-glyphs-4x").name
    'par-glyphs-4x'
    ```
    """
    names = sorted(
        folder.name for folder in Path(__file__).parent.iterdir() if (folder / "model_index.json").is_file()
    )
    if name not in names:
        raise ValueError(f"`name` must be an embedded model, one of {names}, got {name!r}.")
    return Path(__file__).parent / name
