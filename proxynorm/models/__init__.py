"""Models by name, with every norm."""

from proxynorm.models.factory import MODELS, create_model

__all__ = ["MODELS", "create_model"]
