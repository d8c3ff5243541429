"""Networks of the model: images in, features and scores out. They know no loss and no inference."""

from pwcrf_jax.nets.convnext import ConvNeXtTiny
from pwcrf_jax.nets.efficientnet_lite import EfficientNetLite
from pwcrf_jax.nets.featmap_net import BACKBONES, FeatMapNet, grid_size
from pwcrf_jax.nets.heads import NNXPairwiseHead, PairwiseHead
from pwcrf_jax.nets.mobilenet_v2 import MobileNetV2
from pwcrf_jax.nets.pooling import max_pool_2x2, max_pool_same, sliding_pyramid
from pwcrf_jax.nets.potentials import PairwiseNet, PairwiseParts, UnaryNet, drop_channels
from pwcrf_jax.nets.pretrained import LoadReport, WeightsError, load_pretrained
from pwcrf_jax.nets.refinement_convs import RefinementConvs
from pwcrf_jax.nets.resnet import ResNet50, ResNet101
from pwcrf_jax.nets.scaling import INPUT_SCALINGS, scale_input
from pwcrf_jax.nets.tiny import Tiny
from pwcrf_jax.nets.vgg16 import VGG16
from pwcrf_jax.nets.vit import ViTBase, ViTSmall

__all__ = [
    "BACKBONES",
    "INPUT_SCALINGS",
    "VGG16",
    "ConvNeXtTiny",
    "EfficientNetLite",
    "FeatMapNet",
    "LoadReport",
    "MobileNetV2",
    "NNXPairwiseHead",
    "PairwiseHead",
    "PairwiseNet",
    "PairwiseParts",
    "RefinementConvs",
    "ResNet101",
    "ResNet50",
    "Tiny",
    "UnaryNet",
    "ViTBase",
    "ViTSmall",
    "WeightsError",
    "drop_channels",
    "grid_size",
    "load_pretrained",
    "max_pool_2x2",
    "max_pool_same",
    "scale_input",
    "sliding_pyramid",
]
