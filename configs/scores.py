"""Contextual relations on the scores of a network of your own, beside your images and masks.

    pip install -e ".[train,weights]"
    pwcrf check image_folder --source_dir PATH --scores SCORES
    pwcrf train --config scores --workdir runs/scores \\
        --config.data.source_dir=PATH --config.data.scores.dir=SCORES
    pwcrf tune --workdir runs/scores --split "val[:50%]" --method nll
    pwcrf eval --workdir runs/scores --split "val[50%:]"

PATH is described in docs/your-data.md, SCORES in docs/relations-on-scores.md: one file an image, of images that your
network has not seen in its own training. The first row of the table is your scores. The third command gives them a
temperature, and each relation a weight, by the likelihood of held-out labels.
"""

from pwcrf_jax.configs import image_folder


def get_config():
    config = image_folder.get_config()
    config.model.unary = "scores"
    # Nothing but the pair terms trains the features here.
    config.model.pairwise_trains_features = True
    config.loss.dice_weight = 0.0
    # Relations of true frequencies: what weighs rare classes up would be taken from the scores' calibration.
    config.loss.balance_power = 0.0
    return config
