"""Configs of whole runs: `--config` takes their names."""
