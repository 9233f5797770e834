"""Prints and draws the plan of a scheduler."""

import colorsys
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from par_diffusers.schedulers import PARScheduler


def step_grid(scheduler: PARScheduler) -> torch.LongTensor:
    """The step, from 0, at which each token is generated, in raster layout (*grid_size)."""
    steps = torch.empty(len(scheduler.token_order), dtype=torch.long)
    for step, tokens in enumerate(scheduler.step_tokens):
        steps[scheduler.token_order[tokens.start : tokens.stop]] = step
    return steps.view(scheduler.grid_size)


def describe_plan(scheduler: PARScheduler, max_steps: int = 12) -> str:
    """The plan as text: its sizes, the step of each token (from 1), and the slots and tokens of the first steps."""
    config, n = scheduler.config, scheduler.config.num_parallel_tokens
    num_tokens, slots = len(scheduler.token_order), scheduler.slot_tokens
    rows, columns = scheduler.region_grid
    singles = sum(len(tokens) == 1 for tokens in scheduler.step_tokens)
    regions = f", {rows} x {columns} regions" if config.order == "region" else ""
    lines = [
        f"grid              {' x '.join(map(str, scheduler.grid_size))} = {num_tokens} tokens",
        f"order             {config.order}{regions}",
        f"parallel tokens   {n}, {config.group_attention} attention in a group",
        f"initial tokens    {config.initial_tokens}",
        f"slots             {len(slots)}: {(slots < 0).sum()} prefix, {(slots >= num_tokens).sum()} learnable, "
        f"{((slots >= 0) & (slots < num_tokens)).sum()} tokens",
        f"steps             {scheduler.num_inference_steps} ({singles} of one token, "
        f"{scheduler.num_inference_steps - singles} of {n}): {num_tokens / scheduler.num_inference_steps:.2f} tokens a step",
        "",
        "step of each token:",
    ]
    steps = step_grid(scheduler) + 1
    width = len(str(scheduler.num_inference_steps))
    for frame, plane in enumerate(steps.view(-1, *scheduler.grid_size[-2:])):
        if len(scheduler.grid_size) == 3:
            lines.append(f"frame {frame}")
        lines += [" ".join(f"{step:{width}d}" for step in row) for row in plane.tolist()]
    lines += ["", "step  slots        predicts (raster index)"]
    for step, (slots, tokens) in enumerate(zip(scheduler.step_slots, scheduler.step_tokens, strict=True)):
        if step == max_steps:
            lines.append(f"... {scheduler.num_inference_steps - max_steps} more")
            break
        spans = f"{slots.start}-{slots.stop - 1}" if len(slots) > 1 else f"{slots.start}"
        places = " ".join(map(str, scheduler.token_order[tokens.start : tokens.stop].tolist()))
        lines.append(f"{step + 1:4d}  {spans:11s}  {places}")
    return "\n".join(lines)


def _colour(fraction: float) -> tuple[int, int, int]:
    """From blue (first) over green and yellow to red (last)."""
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(0.62 * (1 - fraction), 0.55, 0.95))


def draw_plan(scheduler: PARScheduler, max_side: int = 1200) -> Image.Image:
    """
    The plan as a picture: left the step of each token, regions outlined and the initial tokens ringed; right, where the
    sequence is short enough to be read, which slot (row) sees which (column).
    """
    steps = step_grid(scheduler)
    planes = steps.view(-1, *scheduler.grid_size[-2:])
    frames, height, width = planes.shape
    cell = max(12, min(44, max_side // max(height, width)))
    gap, title = 24, 34
    per_row = min(frames, max(1, max_side // (width * cell + gap)))
    font, heading = ImageFont.load_default(max(7, int(cell * 0.4))), ImageFont.load_default(16)
    num_slots = len(scheduler.slot_tokens)
    mask_cell = cell if num_slots * cell <= max_side else max(2, max_side // num_slots)
    show_mask = num_slots * mask_cell <= max_side

    grid_width = per_row * (width * cell + gap) - gap
    grid_height = math.ceil(frames / per_row) * (height * cell + gap) - gap
    mask_side = num_slots * mask_cell if show_mask else 0
    size = (
        gap + grid_width + (2 * gap + mask_side if show_mask else 0) + gap,
        title + max(grid_height, mask_side) + gap,
    )
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((gap, 8), f"step of each token ({scheduler.num_inference_steps} steps)", fill="black", font=heading)
    last = max(1, scheduler.num_inference_steps - 1)
    rows, columns = scheduler.region_grid
    for frame, plane in enumerate(planes.tolist()):
        left = gap + frame % per_row * (width * cell + gap)
        top = title + frame // per_row * (height * cell + gap)
        for row, line in enumerate(plane):
            for column, step in enumerate(line):
                box = (left + column * cell, top + row * cell, left + (column + 1) * cell, top + (row + 1) * cell)
                draw.rectangle(box, fill=_colour(step / last), outline=(255, 255, 255))
                if len(scheduler.step_tokens[step]) == 1 < scheduler.config.num_parallel_tokens:
                    draw.ellipse(
                        tuple(v + d for v, d in zip(box, (2, 2, -2, -2), strict=True)), outline="black", width=2
                    )
                centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                draw.text(centre, str(step + 1), fill="black", font=font, anchor="mm")
        for row in range(rows):
            for column in range(columns):
                tall, wide = height // rows * cell, width // columns * cell
                corner = (left + column * wide, top + row * tall)
                draw.rectangle((*corner, corner[0] + wide, corner[1] + tall), outline="black", width=2)
    if show_mask:
        left, top = gap + grid_width + 2 * gap, title
        draw.text((left, 8), "slot (row) sees slot (column)", fill="black", font=heading)
        groups, carried = scheduler.groups.tolist(), scheduler.slot_tokens.tolist()
        for row in range(num_slots):
            for column in range(num_slots):
                corner = (left + column * mask_cell, top + row * mask_cell)
                box = (*corner, corner[0] + mask_cell, corner[1] + mask_cell)
                if groups[column] > groups[row]:
                    fill = (238, 238, 238)
                elif groups[column] == groups[row]:
                    fill = (244, 162, 97)
                else:
                    fill = (69, 123, 157)
                draw.rectangle(box, fill=fill, outline="white" if mask_cell > 5 else None)
        if mask_cell >= 20:
            num_tokens = len(scheduler.token_order)
            for slot, token in enumerate(carried):
                name = "C" if token < 0 else f"M{token - num_tokens + 1}" if token >= num_tokens else str(token)
                centre = (left + (slot + 0.5) * mask_cell, top + (slot + 0.5) * mask_cell)
                draw.text(centre, name, fill="black", font=font, anchor="mm")
    return image
