"""The weights that are trained: what they are, how they are updated, and how the processes of a run hold them."""
