"""Networks built of :mod:`effkern.nn`, by name: ``create_model("resnet32")``."""

from effkern.models._registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
