"""par_diffusers: parallelized autoregressive visual generation (PAR) as a diffusers plugin."""

from pathlib import Path as _Path


# In a source checkout `pipelines/`, `schedulers/` and `conversion/` stand beside this folder (setup.cfg maps them); an
# installed package has them inside.
if not (_Path(__file__).parent / "pipelines").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from par_diffusers.models import PARConfig, PARForConditionalGeneration, PARModel
from par_diffusers.schedulers import PARScheduler
