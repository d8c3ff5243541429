"""Confusion matrices of a frame: over the image, and over bands along its boundaries."""

import jax.numpy as jnp

from pwcrf_jax import metrics, piecewise

BAND_WIDTHS = (3, 5)  # pixels on either side of the boundaries that boundary IoU looks at


def confusions(predictions, labels, valid, num_classes):
    """int32 [1 + bands, K, K]: confusion matrices over the image and over the bands along its boundaries."""
    bands = [jnp.where(metrics.boundary_band(labels, w, valid), labels, piecewise.VOID) for w in BAND_WIDTHS]
    return jnp.stack([metrics.confusion_matrix(predictions, x, num_classes) for x in (labels, *bands)])
