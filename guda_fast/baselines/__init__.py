"""Attribution without counterfactuals, to compare with."""

from guda_fast.baselines.similarity import pixel_similarity, similarity

__all__ = ["pixel_similarity", "similarity"]
