"""Rollouts that other programs sample: how one travels, who is asked for it, and how the trainer takes it."""
