"""Conversion of existing networks to NormAct2d."""
