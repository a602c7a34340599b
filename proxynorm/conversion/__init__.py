"""Puts NormAct2d into a network that exists."""
