"""FFCV's side of loading."""
