"""A run as one YAML file: what it says, what can be known before weights are loaded, and what a run leaves to load."""

from .recipe import PipelineConfig, PromptsConfig, QuantizationConfig, Recipe, load_prompts
from .training import PreparedRun

__all__ = ["PipelineConfig", "PreparedRun", "PromptsConfig", "QuantizationConfig", "Recipe", "load_prompts"]
