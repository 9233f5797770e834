"""One leg of a pipeline's journey, in a process of its own: load, draw, perhaps save or push.

    python travel.py package|remote SOURCE RESULT [--pipeline CLASS] [--save DIR] [--push REPOSITORY] [--variant fp16] [--dtype bfloat16]

`package` loads with the package's class of `--pipeline`; `remote` with `diffusers.DiffusionPipeline` where par_diffusers cannot be
imported. RESULT gets the tokens and pixels drawn, the classes used, and what of the package was imported.
"""

import argparse
import sys

import torch


torch.set_num_threads(1)
parser = argparse.ArgumentParser()
parser.add_argument("loader", choices=("package", "remote"))
parser.add_argument("source")
parser.add_argument("result")
parser.add_argument("--pipeline", default="PARPipeline")
parser.add_argument("--save")
parser.add_argument("--push")
parser.add_argument("--save-and-push")
parser.add_argument("--variant")
parser.add_argument("--dtype")
args = parser.parse_args()

options = {"variant": args.variant, "dtype": getattr(torch, args.dtype) if args.dtype else None}
options = {name: value for name, value in options.items() if value is not None}
if args.loader == "remote":
    sys.modules["par_diffusers"] = None  # importing it now fails, as where it is not installed
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(args.source, trust_remote_code=True, **options)
else:
    import par_diffusers

    pipe = getattr(par_diffusers, args.pipeline).from_pretrained(args.source, **options)
pipe.set_progress_bar_config(disable=True)
generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
(tokens,) = pipe(["three", "eight"], generator=generator, output_type="latent", return_dict=False)
generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
(pixels,) = pipe(["three", "eight"], generator=generator, output_type="pt", return_dict=False)
if args.save:
    pipe.save_pretrained(args.save, variant=args.variant)
if args.push:
    pipe.push_to_hub(args.push)
if args.save_and_push:
    folder, repository = args.save_and_push.split("=")
    pipe.save_pretrained(folder, push_to_hub=True, repo_id=repository)
classes = {name: type(component).__module__ for name, component in pipe.components.items()}
remote = sorted(name for name in sys.modules if name.startswith(("diffusers_modules", "transformers_modules")))
record = {"tokens": tokens, "pixels": pixels.float(), "pipeline": type(pipe).__module__, "classes": classes}
torch.save(record | {"remote": remote, "dtype": str(pipe.transformer.dtype)}, args.result)
