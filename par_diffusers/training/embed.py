"""Makes an embedded model of this package from a trained glyph pipeline.

python -m par_diffusers.training.embed --model par-glyphs-4x --output par_diffusers/assets/par-glyphs-4x
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch

from par_diffusers.cli import one_line_errors
from par_diffusers.pipelines import PARVideoPipeline
from par_diffusers.sampling.generate import generate, lay_out, lay_out_clips
from par_diffusers.sampling.loading import check_condition, load_pipeline
from par_diffusers.settings import LoadingSettings


_USE = """```python
import torch
from par_diffusers import {pipeline}, embedded_model

pipe = {pipeline}.from_pretrained(embedded_model("{name}"), dtype=torch.float32)
{output} = pipe(class_labels={labels}, generator=torch.Generator().manual_seed(0)).{output}
```

This folder is part of the package and leaves its code to it; `pipe.save_pretrained(folder)` writes one that carries its code.
"""
_DATA = """
## Data and licence

Trained from nothing on {data} rendered from free fonts. Fonts are only rendered: no part of a font file is
in the data or the weights. The weights are licensed under Apache-2.0.
"""


def embed(model: str | Path, output: str | Path) -> Path:
    """Writes the pipeline folder `model` to `output` in half precision, without code, with samples and its card; replaces it."""
    output = Path(output)
    pipe = load_pipeline(model, LoadingSettings(), "cpu", batch_size=1)
    check_condition(pipe, model, is_text=False, num_frames=None)
    is_video = isinstance(pipe, PARVideoPipeline)
    drawn = generate(pipe, sorted(pipe.labels), seed=0)
    # 128 colours: half the bytes
    samples = lay_out_clips(drawn, 1, is_text=False) if is_video else lay_out(drawn, 1, is_text=False).quantize(128)
    facts = {name: pipe.config[name] for name in ("id2label", "frame_rate") if name in pipe.config}
    pipe = type(pipe)(**pipe.components, **facts, card_data={"license": "apache-2.0"})
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(partial, samples=samples)
    for code in partial.rglob("*.py"):
        code.unlink()
    card = (partial / "README.md").read_text(encoding="utf-8")
    use = _USE.format(
        name=output.name,
        pipeline=type(pipe).__name__,
        output="frames" if is_video else "images",
        labels=json.dumps(list(pipe.labels)[:1] if is_video else ["P", "A", "R"]),
    )
    data = _DATA.format(data="clips of letters" if is_video else "pictures of letters and digits")
    card = re.sub(r"```python.*?(?=\n## Model)", lambda _: use, card, flags=re.DOTALL)
    (partial / "README.md").write_text(card.rstrip() + "\n" + data, encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    os.rename(partial, output)
    return output


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m par_diffusers.training.embed", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder that `train` made")
    parser.add_argument("--output", type=Path, required=True, help="folder, named as the embedded model")
    args = parser.parse_args(arguments)
    folder = embed(args.model, args.output)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.training.embed"):
        main()
