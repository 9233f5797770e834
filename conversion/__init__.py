"""Conversion: published checkpoints to pipeline folders."""

from par_diffusers.conversion.convert_llamagen import convert_llamagen


__all__ = ["convert_llamagen"]
