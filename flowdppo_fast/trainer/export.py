"""Trained weights of a run folder, from Python: into a pipeline, or into files that diffusers loads."""

from .recipe.export import SavedRun, apply_weights, export_run

__all__ = ["SavedRun", "apply_weights", "export_run"]
