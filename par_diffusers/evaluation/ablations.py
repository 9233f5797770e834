"""The paper's ablations (table 4) in miniature: one training, sampling and measurement for each, all with the same budget."""

import argparse
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from par_diffusers.cli import model_source, one_line_errors
from par_diffusers.evaluation.evaluate import evaluate
from par_diffusers.folders import write_text
from par_diffusers.pipelines import PARPipeline
from par_diffusers.sampling.generate import generate, save_image
from par_diffusers.sampling.sample import sample
from par_diffusers.settings import (
    EvaluationSettings,
    SamplingSettings,
    TrainingSettings,
    add_options,
    read_settings,
    save_settings,
)
from par_diffusers.training.run import SETTINGS, refuse_changes
from par_diffusers.training.train import train


@dataclass
class Strategy:
    """A row of the study: its name in the paper's terms, what it changes, and FID and steps of the paper's row."""

    title: str
    changes: dict = field(default_factory=dict)
    paper_fid: float | None = None
    paper_steps: int | None = None


# the paper's rows are of PAR-XL, but n = 16 (PAR-XXL) and sizes
STRATEGIES = {
    "raster-one": Strategy("raster order, one token", {"num_parallel_tokens": 1, "order": "raster"}, 2.62, 576),
    "distant-one": Strategy("distant order, one token", {"num_parallel_tokens": 1, "region_grid": (2, 2)}, 2.64, 576),
    "raster-multi": Strategy("raster order, 4 tokens", {"order": "raster"}, 5.64, 147),
    "distant-multi": Strategy("distant order, 4 tokens (PAR-4x)", {}, 2.61, 147),
    "no-initial": Strategy("PAR-4x without initial tokens", {"initial_tokens": "parallel"}, 3.67, 144),
    "causal": Strategy("PAR-4x, causal attention in groups", {"group_attention": "causal"}, 3.64, 147),
    "distant-16": Strategy("distant order, 16 tokens (PAR-16x)", {"num_parallel_tokens": 16}, 3.02, 51),
    "small": Strategy(
        "PAR-4x, smaller",
        {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3},
        3.76,
        147,
    ),
}


def train_strategy(name: str, settings: TrainingSettings, folder: Path) -> None:
    """Trains what is not there yet. `accelerate` shares it among processes."""
    settings = dataclasses.replace(settings, output=str(folder / "model"), **STRATEGIES[name].changes)
    torch.compiler.reset()
    if not (folder / "model" / "model_index.json").is_file():
        train(settings, "latest" if (folder / "model" / SETTINGS).is_file() else None)


class ColourLayout(nn.Module):
    """Images uint8 (B, 3, H, W) -> mean colours of 4 x 4 parts in [0, 1], (B, 48): what a judge of shapes does not see."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def judge_strategy(folder: Path, num_samples: int, batch_size: int, reference: str, extractor: str) -> None:
    """Draws and measures what is not there yet. `accelerate` shares the drawing among processes."""
    samples = SamplingSettings(
        model=str(folder / "model"), output=str(folder / "samples"), num_samples=num_samples, batch_size=batch_size
    )
    sample(samples)
    if PartialState().is_main_process:
        for file, name, network in (
            (folder / "result.json", extractor, None),
            (folder / "colours.json", "mean colours of 4 x 4 parts", ColourLayout()),
        ):
            if not file.is_file():
                evaluate(EvaluationSettings(folder / "samples", name, reference, output=file), network)
    PartialState().wait_for_everyone()


@torch.no_grad()
def measure_time(pipes: dict[str, PARPipeline], batch_size: int, rounds: int = 3) -> dict[str, float]:
    """Seconds an image in batches of `batch_size`, tokens and pixels: medians of rounds in which all take turns."""
    num_classes = next(iter(pipes.values())).transformer.config.num_classes
    labels = [i % num_classes for i in range(batch_size)]
    seconds = {name: [] for name in pipes}
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            started = time.perf_counter()
            pipe(labels, generator=torch.Generator(pipe.device).manual_seed(turn), output_type="np")
            seconds[name].append((time.perf_counter() - started) / batch_size)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up


def report(names: list[str], output: Path, labels: list[str], batch_size: int) -> str:
    """Table, plot and pictures of what was measured; returns the table as Markdown."""
    state = PartialState()
    pipes = {name: PARPipeline.from_pretrained(output / name / "model").to(state.device) for name in names}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    seconds = measure_time(pipes, batch_size)
    rows = {}
    for name in names:
        found, colours = (
            json.loads((output / name / file).read_text(encoding="utf-8")) for file in ("result.json", "colours.json")
        )
        lines = (output / name / "model" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = {
            "parameters": sum(p.numel() for p in pipes[name].transformer.parameters()),
            "steps": pipes[name].scheduler.num_inference_steps,
            "validation_loss": json.loads(lines[-1]).get("validation_loss"),
            "seconds_per_image": seconds[name],
            **found["metrics"],
            "colours": colours["metrics"],
        }
    facts = {"device": str(state.device), "batch_size": batch_size, "rows": rows}
    write_text(output / "ablations.json", json.dumps(facts, indent=1) + "\n")
    save_image(draw_rows(pipes, labels), output / "strategies.png")
    plot(rows, output / "ablations.png")
    table = _table(rows)
    write_text(output / "ablations.md", table + "\n")
    return table


_COLUMNS = {
    "M parameters": lambda row: f"{row['parameters'] / 1e6:.2f}",
    "steps": lambda row: str(row["steps"]),
    "ms an image": lambda row: f"{1000 * row['seconds_per_image']:.1f}",
    "validation loss": lambda row: "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}",
    "Fréchet distance": lambda row: f"{_distance(row):.3f}",
    "accuracy": lambda row: f"{row['accuracy']:.3f}" if "accuracy" in row else "",
    "precision": lambda row: f"{row['precision']:.3f}",
    "recall": lambda row: f"{row['recall']:.3f}",
    "distance of colours": lambda row: f"{row['colours']['frechet_distance']:.3f}",
}


def _distance(row: dict) -> float:
    return next(row[name] for name in ("frechet_distance", "fid") if name in row)


def _table(rows: dict[str, dict]) -> str:
    lines = [f"| strategy | {' | '.join(_COLUMNS)} | paper: FID | paper: steps |", "|---" * (len(_COLUMNS) + 3) + "|"]
    for name, row in rows.items():
        paper = STRATEGIES[name]
        values = [column(row) for column in _COLUMNS.values()]
        lines.append(f"| {paper.title} | {' | '.join(values)} | {paper.paper_fid} | {paper.paper_steps} |")
    return "\n".join(lines)


def draw_rows(pipes: dict[str, PARPipeline], labels: list[str], seed: int = 0) -> Image.Image:
    """The same labels from the same seeds, a row for each strategy (as the paper's figure 5)."""
    font, margin, gap = ImageFont.load_default(15), 300, 4
    drawn = {name: generate(pipe, labels, seed=seed) for name, pipe in pipes.items()}
    width, height = next(iter(drawn.values()))[0].size
    picture = Image.new("RGB", (margin + len(labels) * (width + gap), len(drawn) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, images) in enumerate(drawn.items()):
        top = gap + row * (height + gap)
        draw.text((gap, top + height // 2), STRATEGIES[name].title, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture.paste(image, (margin + column * (width + gap), top))
    return picture


def plot(rows: dict[str, dict], file: Path) -> None:
    """Distances, of shapes and of colours, over time for each image."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    distances = {
        "Fréchet distance to held-out images": _distance,
        "the same of mean colours": lambda row: row["colours"]["frechet_distance"],
    }
    for axes, (title, distance) in zip(panels, distances.items(), strict=True):
        for number, (name, row) in enumerate(rows.items()):
            point = (1000 * row["seconds_per_image"], distance(row))
            axes.scatter(*point, s=60, marker="osD^vP*X"[number % 8], label=STRATEGIES[name].title)
        axes.set(xlabel="ms an image", ylabel=title, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.evaluation.ablations",
        description=__doc__,
        epilog="All other options are those of `par-diffusers train`, for all strategies. Called again, it goes on where it was.",
    )
    parser.add_argument("--reference", required=True, help="what samples are compared with, as `evaluate` takes it")
    parser.add_argument("--extractor", default="glyphs-judge", help="network of the features (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="default: all")
    parser.add_argument("--num-samples", type=int, default=6200, help="images of each strategy (default: %(default)s)")
    parser.add_argument("--sampling-batch-size", type=int, default=50, help="images at a time (default: %(default)s)")
    parser.add_argument("--show", nargs="+", default=list("ABEGHKMQRSWY2358"), help="labels in the picture of rows")
    add_options(parser, TrainingSettings)
    args = parser.parse_args(arguments)
    settings = read_settings(TrainingSettings, args)
    if settings.vqvae is not None:
        settings.vqvae = str(model_source(settings.vqvae))
    output = Path(settings.output)
    if (output / SETTINGS).is_file():
        refuse_changes(settings, output)  # the budget is the same for all
    elif PartialState().is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_settings(settings, output / SETTINGS)
    # first all trainings: they set accelerate's precision, which a process cannot change later
    for name in args.strategies:
        train_strategy(name, settings, output / name)
    for name in args.strategies:
        judge_strategy(output / name, args.num_samples, args.sampling_batch_size, args.reference, args.extractor)
    if PartialState().is_main_process:
        print(report(args.strategies, output, args.show, args.sampling_batch_size))


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.evaluation.ablations"):
        main()
