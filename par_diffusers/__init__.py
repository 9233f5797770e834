"""par_diffusers: parallelized autoregressive visual generation (PAR) as a diffusers plugin."""

import importlib as _importlib
import sys as _sys
from importlib.abc import MetaPathFinder as _MetaPathFinder
from importlib.util import find_spec as _find_spec
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
    "PARTextToImagePipeline": "pipelines",
    "PARVideoPipeline": "pipelines",
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


class _RegisterWithTransformers(_MetaPathFinder):
    """
    Imports our models, which register themselves with the Auto classes, right after transformers: `import par_diffusers`
    and `par-diffusers --help` do not wait for it, and `AutoModel` knows PAR whichever is imported first.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        _sys.meta_path.remove(self)
        spec = _find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _importlib.import_module("par_diffusers.models")

            spec.loader.exec_module = exec_module
        return spec


if "transformers" in _sys.modules:
    _importlib.import_module("par_diffusers.models")
else:
    _sys.meta_path.insert(0, _RegisterWithTransformers())
