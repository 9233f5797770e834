"""par_diffusers: parallelized autoregressive visual generation (PAR) as a diffusers plugin."""

import importlib as _importlib
from pathlib import Path as _Path


# In a source checkout `pipelines/`, `schedulers/` and `conversion/` stand beside this folder (setup.cfg maps them); an
# installed package has them inside.
if not (_Path(__file__).parent / "pipelines").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from par_diffusers._version import __version__


_LAZY = {
    "PARConfig": "models",
    "PARForConditionalGeneration": "models",
    "PARModel": "models",
    "PARPipeline": "pipelines",
    "PARScheduler": "schedulers",
    "convert_llamagen_checkpoint": "conversion",
    "embedded_model": "assets",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"par_diffusers.{_LAZY[name]}"), name)


def __dir__():
    return sorted([*globals(), *_LAZY])


# transformers' Auto classes know the model as soon as the package is imported
_importlib.import_module("par_diffusers.models")
