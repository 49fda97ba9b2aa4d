"""Flow-DPPO against ratio clipping on models that two CPU cores can train."""
