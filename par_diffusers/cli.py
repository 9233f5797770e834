"""The command line: `par-diffusers COMMAND`, `python -m par_diffusers COMMAND`, `accelerate launch -m par_diffusers COMMAND`."""

import argparse
import importlib.util
import os
import secrets
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from par_diffusers._version import __version__
from par_diffusers.settings import (
    BenchmarkSettings,
    CallSettings,
    EntropySettings,
    EvaluationSettings,
    ExtractionSettings,
    FeatureSettings,
    LoadingSettings,
    SamplingSettings,
    TokenizerSettings,
    TrainingSettings,
    add_options,
    read_settings,
)


DEFAULT_MODEL = "par-glyphs-4x"


class _Parser(argparse.ArgumentParser):
    """Bad input is one line and exit code 2; options are written out."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def model_source(name: str) -> str | Path:
    """A folder or Hub repository as it is; anything else names an embedded model."""
    from par_diffusers.assets import embedded_model

    return name if Path(name).exists() or "/" in name else embedded_model(name)


def check_installed(package: str, extra: str) -> None:
    """Raises where an optional dependency is missing."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is needed: pip install 'par_diffusers[{extra}]'.")


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="images or clips from a pipeline",
        description="Draws images and writes them as one PNG, or clips as one GIF. Without --model it uses the embedded model "
        "of letters and digits.",
        epilog="""examples:
  par-diffusers generate "PAR"
  par-diffusers generate "HELLO 2026" --num-images 4 --seed 7 --output hello.png
  par-diffusers generate --model par-xl-4x --labels "golden retriever" 388 --guidance-scale 1.5
  par-diffusers generate --model llamagen-t2i-256 --prompt "a red fox in the snow" --num-images 4
  par-diffusers generate --model runs/ucf101-par-4x --labels Surfing YoYo""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="one image for each character (models of single characters)"
    )
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="label names or class ids, instead of TEXT")
    parser.add_argument("--prompt", nargs="+", metavar="PROMPT", help="texts, for models that draw from text")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="DIR",
        help="pipeline folder, Hub repository or embedded model (default: %(default)s)",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="images or clips of each label or prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, help="of the first image; image i uses seed + i (default: drawn and printed)"
    )
    add_options(parser, CallSettings, config=False)
    add_options(parser, LoadingSettings, config=False)
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)"
    )
    parser.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="PNG to write, or GIF for clips (default: generated.png, generated.gif)",
    )
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace, argv: list[str]) -> None:
    if [args.text, args.labels, args.prompt].count(None) != 2:
        raise ValueError("give either TEXT, --labels or --prompt.")
    if args.text is not None and not args.text.strip():
        raise ValueError("TEXT must have at least one character that is not a space.")
    if args.output is not None and args.output.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"--output must end in .png, or in .gif for clips, got {args.output}.")
    call = read_settings(CallSettings, args).call_arguments()
    loading = read_settings(LoadingSettings, args)
    import diffusers
    import torch
    import transformers

    from par_diffusers.pipelines import PARVideoPipeline
    from par_diffusers.sampling.generate import generate, lay_out, lay_out_clips, save_image, spell
    from par_diffusers.sampling.loading import check_condition, load_pipeline

    # the bars of loading; that of generating stays
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(model_source(args.model), loading, device, args.batch_size)
    check_condition(pipe, args.model, args.prompt is not None, call.get("num_frames"))
    is_video = isinstance(pipe, PARVideoPipeline)
    suffix = ".gif" if is_video else ".png"
    output = args.output or Path("generated" + suffix)
    if output.suffix.lower() != suffix:
        raise ValueError(f"--output must end in {suffix} for {args.model}, got {output}.")
    if args.prompt is not None:
        labels = args.prompt
    elif args.text is not None:
        labels = spell(pipe, args.text)
    else:
        labels = [int(name) if name.isdecimal() and name not in pipe.labels else name for name in args.labels]
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    images = generate(pipe, labels, num_images=args.num_images, seed=seed, batch_size=args.batch_size, **call)
    picture = (lay_out_clips if is_video else lay_out)(images, args.num_images, is_text=args.text is not None)
    save_image(picture, output, pipe.config.get("frame_rate"))
    again = shlex.join(["par-diffusers", *argv, *([] if args.seed is not None else ["--seed", str(seed)])])
    count = sum(image is not None for image in images)
    print(
        f"{output}: {count} {'clip' if is_video else 'image'}{'s' * (count > 1)} in {pipe.num_timesteps} steps each. "
        f"The same again: {again}"
    )


def _add_sample(commands) -> None:
    parser = commands.add_parser(
        "sample",
        help="many images, for evaluation",
        description="Draws many images into shards and an .npz, in one process or several. Image i depends on the seed and i "
        "alone. Called again, it goes on where it was interrupted.",
        epilog="""examples:
  accelerate launch -m par_diffusers sample --model par-xl-4x --output samples --image-size-eval 256 --labels random
  par-diffusers sample --model par-glyphs-4x --num-samples 720 --output glyph-samples --png
  par-diffusers sample --model par-xl-4x --labels "golden retriever" 388 --num-samples 64 --output pets
  par-diffusers sample --model llamagen-t2i-256 --prompts PartiPrompts.tsv --output parti --png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, SamplingSettings)
    parser.set_defaults(run=_sample)


def _sample(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(SamplingSettings, args)
    import diffusers
    import transformers

    from par_diffusers.sampling.sample import sample

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    settings.model = str(model_source(settings.model))
    sample(settings)


def _add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="FID, Inception score, precision and recall",
        description="Compares images, or videos, with others. Prints and stores what exactly was compared.",
        epilog="""examples:
  par-diffusers evaluate --samples samples --reference VIRTUAL_imagenet256_labeled.npz \\
      --extractor inception-2015-12-05.pt --output fid.json
  par-diffusers evaluate --samples glyph-samples --reference glyphs/validation --extractor glyphs-judge
  par-diffusers evaluate --samples imagenet/val --image-size 256 --extractor inception-2015-12-05.pt \\
      --metrics inception-score --save-statistics val-256.npz""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, EvaluationSettings)
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(EvaluationSettings, args)
    check_installed("torchmetrics", "evaluation")
    from par_diffusers.evaluation.evaluate import describe_result, evaluate

    print(describe_result(evaluate(settings)))


def _add_benchmark(commands) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="speed, memory, and how far from the machine's limits",
        description="Times pipelines of any size and relates the times to what the machine could do.",
        epilog="""examples:
  par-diffusers benchmark --model L --num-parallel-tokens 1 4 16 --output l
  par-diffusers benchmark --model XL 3B --dtype bfloat16 --batch-size 1 64 --num-parallel-tokens 4
  par-diffusers benchmark --model par-glyph-clips --num-parallel-tokens 1 4 --batch-size 1 8""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, BenchmarkSettings)
    parser.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(BenchmarkSettings, args)
    if settings.output is not None:
        check_installed("matplotlib", "evaluation")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    from par_diffusers.sampling.benchmark import benchmark, describe_benchmark, save_benchmark

    found = benchmark(settings)
    print(describe_benchmark(found))
    if settings.output is not None:
        save_benchmark(found, Path(settings.output))


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a published checkpoint to a pipeline folder",
        description="Converts a PAR or LlamaGen checkpoint and its VQ tokenizer to a pipeline folder.",
        epilog="""examples:
  par-diffusers convert --checkpoint PAR-XL-4x.pt --vq-checkpoint vq_ds16_c2i.pt --output par-xl-4x
  par-diffusers convert --checkpoint c2i_B_256.pt --vq-checkpoint vq_ds16_c2i.pt --output llamagen-b --image-size 256
  par-diffusers convert --checkpoint t2i_XL_stage1_256.pt --vq-checkpoint vq_ds16_t2i.pt --output llamagen-t2i-256 \\
      --image-size 256 --text-encoder google/flan-t5-xl""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="published .pt of the model")
    parser.add_argument("--vq-checkpoint", required=True, metavar="FILE", help="published .pt of the VQ tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--image-size", type=int, default=384, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--num-attention-heads", type=int, help="for sizes other than the published ones")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the model's weights (default: the file's)"
    )
    parser.add_argument("--guidance-scale", type=float, help="default of the pipeline (default: the published one)")
    parser.add_argument(
        "--labels", metavar="FILE", help="class names, JSON or one a line (default: ImageNet's for 1,000)"
    )
    parser.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="text-conditional models: folder or Hub repository of the T5 to put into the folder, or none (the default)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace, argv: list[str]) -> None:
    from par_diffusers.conversion import convert_llamagen_checkpoint
    from par_diffusers.schedulers import PARScheduler

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    if options["text_encoder"] == "none":
        options["text_encoder"] = None
    folder = convert_llamagen_checkpoint(**options)
    scheduler = PARScheduler.from_pretrained(folder, subfolder="scheduler")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{folder}: {size / 1e6:.1f} MB, {'x'.join(map(str, scheduler.grid_size))} tokens in "
        f"{scheduler.num_inference_steps} steps, guidance scale {scheduler.config.guidance_scale:g}"
    )


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="the order, groups and steps of a configuration",
        description="Prints the token plan of a configuration, or of a pipeline folder, and draws it.",
        epilog="""examples:
  par-diffusers plan --grid-size 8 8
  par-diffusers plan --grid-size 24 24 --num-parallel-tokens 16 --output plan.png
  par-diffusers plan --model par-glyphs-4x --output plan.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR", help="take the scheduler of a pipeline folder or embedded model")
    parser.add_argument(
        "--grid-size", type=int, nargs="+", metavar="N", help="height width, or frames height width (default: 24 24)"
    )
    parser.add_argument("--num-parallel-tokens", type=int, help="tokens of a parallel step (default: 4)")
    parser.add_argument("--order", help="region or raster (default: region)")
    parser.add_argument(
        "--region-grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="default: the most square one"
    )
    parser.add_argument("--initial-tokens", help="sequential or parallel (default: sequential)")
    parser.add_argument("--group-attention", help="full or causal (default: full)")
    parser.add_argument("--prefix-length", type=int, help="slots of the condition (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG to draw")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace, argv: list[str]) -> None:
    if args.output is not None and args.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {args.output}.")
    from par_diffusers.analysis.plan import describe_plan, draw_plan
    from par_diffusers.sampling.generate import save_image
    from par_diffusers.schedulers import PARScheduler

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "model", "output")}
    options = {name: value for name, value in options.items() if value is not None}
    if args.model is None:
        scheduler = PARScheduler(**options)
    else:
        scheduler = PARScheduler.from_pretrained(model_source(args.model), subfolder="scheduler", **options)
    print(describe_plan(scheduler))
    if args.output is not None:
        save_image(draw_plan(scheduler), args.output)
        print(f"drawn: {args.output}")


def _add_entropy(commands) -> None:
    parser = commands.add_parser(
        "entropy",
        help="how much tokens depend on each other",
        description="The paper's dependency analysis: conditional entropies of the codebook vectors of codes.",
        epilog="""examples:
  par-diffusers entropy --data codes --vqvae par-xl-4x --output entropy
  par-diffusers entropy --data glyphs-codes-train --vqvae par-glyphs-4x --num-parallel-tokens 16 --output entropy""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, EntropySettings)
    parser.set_defaults(run=_entropy)


def _entropy(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(EntropySettings, args)
    from par_diffusers.analysis.entropy import describe_entropy, entropy

    settings.vqvae = str(model_source(settings.vqvae))
    print(describe_entropy(entropy(settings)))


def _add_extract_codes(commands) -> None:
    parser = commands.add_parser(
        "extract-codes",
        help="an image folder to the codes that training reads",
        description="Encodes an image folder with the tokenizer of a pipeline, into shards. Called again, it goes on where "
        "it was interrupted.",
        epilog="""examples:
  accelerate launch -m par_diffusers extract-codes --data imagenet/train --vqvae par-xl-4x --output codes
  accelerate launch -m par_diffusers extract-codes --data imagenet/train --vqvae par-xl-4x --output codes-ten-crop \\
      --augmentation ten-crop --dataloader-num-workers 8
  par-diffusers extract-codes --data pictures --vqvae par-glyphs-4x --image-size 48 --augmentation none --output codes""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, ExtractionSettings)
    parser.set_defaults(run=_extract_codes)


def _extract_codes(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(ExtractionSettings, args)
    from par_diffusers.training.extract_codes import extract_codes

    settings.vqvae = str(model_source(settings.vqvae))
    extract_codes(settings)


def _add_extract_features(commands) -> None:
    parser = commands.add_parser(
        "extract-features",
        help="captions to the features that training reads",
        description="Encodes captions with a T5, into shards. Called again, it goes on where it was interrupted.",
        epilog="""examples:
  accelerate launch -m par_diffusers extract-features --data codes --text-encoder google/flan-t5-xl --output features""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, FeatureSettings)
    parser.set_defaults(run=_extract_features)


def _extract_features(args: argparse.Namespace, argv: list[str]) -> None:
    settings = read_settings(FeatureSettings, args)
    from par_diffusers.training.extract_features import extract_features

    extract_features(settings)


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="a PAR model on codes",
        description="Trains a backbone on codes and leaves a pipeline folder. The defaults are the paper's for ImageNet.",
        epilog="""examples:
  accelerate launch -m par_diffusers train --data codes --vqvae par-xl-4x --output par-l-4x
  accelerate launch -m par_diffusers train --data codes --model llamagen-b --num-parallel-tokens 4 --output par-b-4x
  accelerate launch -m par_diffusers train --config par-b-4x.yaml --output par-b-4x
  accelerate launch -m par_diffusers train --output par-b-4x --resume""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, TrainingSettings)
    _add_resume(parser)
    parser.set_defaults(run=_train)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="continue the run in --output from its latest checkpoint, or from the one named; its settings hold",
    )


def _settings_of_run(settings_type: type, args: argparse.Namespace):
    from par_diffusers.training.run import SETTINGS

    echo = Path(args.output) / SETTINGS if args.resume and "output" in args else None
    return read_settings(settings_type, args, echo if echo and echo.is_file() else None)


def _train(args: argparse.Namespace, argv: list[str]) -> None:
    settings = _settings_of_run(TrainingSettings, args)
    from par_diffusers.training.train import train

    for name in ("vqvae", "model"):
        if getattr(settings, name) is not None:
            setattr(settings, name, str(model_source(getattr(settings, name))))
    train(settings, args.resume)


def _add_train_tokenizer(commands) -> None:
    parser = commands.add_parser(
        "train-tokenizer",
        help="a tokenizer of images or of videos",
        description="Trains a diffusers VQModel with an l2-normalised codebook on a folder of images, or an AutoencoderVidTok "
        "with finite scalar quantization on a folder of videos.",
        epilog="""examples:
  accelerate launch -m par_diffusers train-tokenizer --data imagenet/train --validation-data imagenet/val --output vq
  accelerate launch -m par_diffusers train-tokenizer --output vq --resume
  accelerate launch -m par_diffusers train-tokenizer --vqvae llamagen-c2i-256 --data flowers/train --output vq-flowers
  accelerate launch -m par_diffusers train-tokenizer --architecture AutoencoderVidTok --data videos/train --output vidtok""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, TokenizerSettings)
    _add_resume(parser)
    parser.set_defaults(run=_train_tokenizer)


def _train_tokenizer(args: argparse.Namespace, argv: list[str]) -> None:
    settings = _settings_of_run(TokenizerSettings, args)
    from par_diffusers.training.train_tokenizer import train_tokenizer

    if settings.vqvae is not None:
        settings.vqvae = str(model_source(settings.vqvae))
    train_tokenizer(settings, args.resume)


@contextmanager
def one_line_errors(prog: str):
    """What a user can mend (a bad value, a missing file) ends with one line and exit code 2."""
    try:
        yield
    except BrokenPipeError:  # `par-diffusers plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            # what all processes of a launch find wrong is said by the first, and ends the others while they wait
            time.sleep(5)
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def main(argv: list[str] | None = None) -> None:
    """Runs a command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        prog="par-diffusers",
        description="Parallelized autoregressive visual generation (PAR).",
        epilog="`par-diffusers COMMAND --help` says more and gives examples.",
    )
    parser.add_argument("--version", action="version", version=f"par_diffusers {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (
        _add_generate,
        _add_sample,
        _add_evaluate,
        _add_benchmark,
        _add_convert,
        _add_plan,
        _add_entropy,
        _add_extract_codes,
        _add_extract_features,
        _add_train,
        _add_train_tokenizer,
    )
    for add in adders:
        add(commands)
    args = parser.parse_args(argv)
    with one_line_errors(f"par-diffusers {args.command}"):
        args.run(args, argv)
