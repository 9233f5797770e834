"""Schedulers: the plan of a token grid and the sampling of its tokens."""

from par_diffusers.schedulers.scheduling_par import PARScheduler, PARSchedulerOutput


__all__ = ["PARScheduler", "PARSchedulerOutput"]
