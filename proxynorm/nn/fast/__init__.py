"""Faster or smaller implementations of what norm_act.py computes."""
