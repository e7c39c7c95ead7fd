"""Photos: read and written, degraded, paired, and drawn for training."""
