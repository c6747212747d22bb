"""The memory that sampling takes: at its peak beyond what was there before, and for weights."""

from ..dha.peak import watch_peak

__all__ = ["count_weights", "watch_peak"]


def count_weights(model) -> int:
    """Bytes of a model patcher's weights, with those of the models that come with it, such as a student."""
    models = [model, *(other for others in model.additional_models.values() for other in others)]
    return sum(each.model_size() for each in models)
