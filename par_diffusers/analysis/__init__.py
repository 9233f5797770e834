"""Analysis: what the method does, in text and pictures."""

from par_diffusers.analysis.plan import describe_plan, draw_plan


__all__ = ["describe_plan", "draw_plan"]
