"""The dense CRF on a photograph, in place of pydensecrf.

    python examples/dense_crf_photo.py                             # a drawn picture with wrong labels
    python examples/dense_crf_photo.py photo.jpg --output out.png  # labels: the photograph's main colours

With pydensecrf                                             With pwcrf_jax (one image; any leading axes are a batch)

    d = dcrf.DenseCRF2D(width, height, K)
    d.setUnaryEnergy(-log_p.reshape(-1, K).T)                   params = dense_crf.Params(
    d.addPairwiseGaussian(sxy=3, compat=3)                          smoothness_sxy=3, smoothness_compat=3,
    d.addPairwiseBilateral(sxy=80, srgb=13,                         appearance_sxy=80, appearance_srgb=13,
                           rgbim=image, compat=10)                  appearance_compat=10)
    q = d.inference(10)              # [K, H W]                 log_q, _ = dense_crf.refine(log_p, image, params, 10)
    labels = np.argmax(q, 0).reshape(height, width)             labels = log_q.argmax(-1)    # log_q [H, W, K]

Writes image, labels before and labels after side by side. Where pydensecrf is installed, it is run and compared too.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw

from pwcrf_jax import dense_crf

PARAMS = dense_crf.Params(
    smoothness_sxy=3.0, smoothness_compat=3.0, appearance_sxy=80.0, appearance_srgb=13.0, appearance_compat=10.0
)
COLOURS = np.array([(40, 90, 160), (90, 140, 60), (190, 60, 50), (220, 190, 120)], np.uint8)


def drawing(rng):
    """A picture of three things on a ground, uint8 [120, 160, 3], and its labels int [120, 160]."""
    canvas = Image.new("L", (160, 120), 0)
    draw = ImageDraw.Draw(canvas)
    draw.polygon([(0, 119), (0, 80), (60, 60), (159, 90), (159, 119)], fill=1)
    draw.ellipse((20, 15, 60, 75), fill=2)
    draw.rectangle((90, 30, 140, 85), fill=3)
    labels = np.array(canvas, int)
    return np.clip(COLOURS[labels] + rng.normal(0, 8, (120, 160, 3)), 0, 255).astype(np.uint8), labels


def log_probs(labels, num_classes, sure=0.5):
    """Log-probabilities [H, W, K] of one who holds each label for right with probability `sure`."""
    other = (1 - sure) / (num_classes - 1)
    return np.log(np.where(labels[..., None] == np.arange(num_classes), sure, other)).astype(np.float32)


def pydensecrf(log_p, image):
    import pydensecrf.densecrf as dcrf

    height, width, num_classes = log_p.shape
    d = dcrf.DenseCRF2D(width, height, num_classes)
    d.setUnaryEnergy(np.ascontiguousarray(-log_p.reshape(-1, num_classes).T))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=np.ascontiguousarray(image), compat=10)
    return np.argmax(d.inference(10), 0).reshape(height, width)


def main():
    parser = argparse.ArgumentParser(description="Dense CRF on a photograph; example: photo.jpg --output out.png")
    parser.add_argument("image", nargs="?", help="a photograph (default: a drawn picture)")
    parser.add_argument("--output", default="dense_crf.png", help="the picture to write (default: %(default)s)")
    args = parser.parse_args()
    rng, truth, palette = np.random.default_rng(0), None, COLOURS
    if args.image:
        small = Image.open(args.image).convert("RGB")
        small.thumbnail((500, 500))
        few = small.quantize(4)
        image, labels = np.array(small), np.array(few, int)
        palette = np.array(few.getpalette()[: 3 * 4], np.uint8).reshape(-1, 3)
    else:
        image, truth = drawing(rng)
        labels = np.where(rng.random(truth.shape) < 0.4, rng.integers(0, 4, truth.shape), truth)
    log_p = log_probs(labels, 4)
    log_q, info = dense_crf.refine(log_p, image, PARAMS, num_iterations=10)
    refined = np.array(log_q.argmax(-1))
    assert not info.exceeded, "noise needs more room than photographs: pass capacity=6 * height * width"
    print(f"changed: {np.mean(refined != labels):.1%} of the pixels")
    if truth is not None:
        print(f"right before: {np.mean(labels == truth):.1%}")
        print(f"right after: {np.mean(refined == truth):.1%}")
    try:
        print(f"same label as pydensecrf: {np.mean(pydensecrf(log_p, image) == refined):.2%}")
    except ImportError:
        print("pydensecrf is not installed, so nothing to compare with")
    Image.fromarray(np.concatenate([image, palette[labels], palette[refined]], axis=1)).save(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
