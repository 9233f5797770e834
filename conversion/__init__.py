"""Conversion: published checkpoints to pipeline folders."""


def __getattr__(name: str):
    # late, so that `python -m par_diffusers.conversion.convert_llamagen` runs a module that is not imported yet
    if name != "convert_llamagen_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from par_diffusers.conversion.convert_llamagen import convert_llamagen_checkpoint

    return convert_llamagen_checkpoint


__all__ = ["convert_llamagen_checkpoint"]
