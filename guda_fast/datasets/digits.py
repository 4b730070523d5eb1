"""The handwritten digits that scikit-learn ships: 1,797 grey images of 8x8 pixels in ten classes."""

from __future__ import annotations

import torch

from guda_fast.datasets.grouped import GroupedImages


def load_digits() -> GroupedImages:
    """The digits, grouped by class "0" to "9", with pixels 0..16 mapped to [-1, 1].

    Raises ImportError when scikit-learn is missing.
    Source: Alpaydin and Kaynak 1998, through ``sklearn.datasets.load_digits``.

    >>> len(load_digits())
    1797
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'guda_fast[demo]'") from error
    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return GroupedImages.by_label(images, torch.from_numpy(data.target).long(), [str(digit) for digit in range(10)])
