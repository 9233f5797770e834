"""Models that ship with the package."""

from pathlib import Path


def embedded_model(name: str) -> Path:
    """Folder of an embedded model: a pipeline, for `PARPipeline.from_pretrained`, or the judge of its images, `glyphs-judge`.

    ```py
    >>> from par_diffusers import embedded_model

    >>> embedded_model("par-glyphs-4x").name
    'par-glyphs-4x'
    ```
    """
    folders = [file.parent for file in Path(__file__).parent.glob("*/*.json")]
    names = sorted({folder.name for folder in folders})
    if name not in names:
        raise ValueError(f"`name` must be an embedded model, one of {names}, got {name!r}.")
    return Path(__file__).parent / name
