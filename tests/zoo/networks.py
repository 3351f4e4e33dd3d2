"""Networks with BatchNorm from public packages, small, with random weights: nothing is downloaded.

`NETWORKS` has for each package the name of a network and a function that makes it and its inputs.
Those in `FAMILIES` are one of each kind of forward.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

Made = tuple[nn.Module, tuple[Tensor, ...]]
_VISION_OPERATORS = ("nms", "qnms")


def load(package: str) -> ModuleType:
    """Imports a package, or skips the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        if find_spec("torchvision") is not None:  # timm needs it, others import it if it is there
            _load_torchvision()
        return pytest.importorskip(package, reason=f"needs {package}; install the extra `zoo`")


def _load_torchvision() -> None:
    """Imports torchvision, also beside a torch for CPUs, with which its library does not load.

    Then torchvision cannot describe two of the library's operators, which nothing has declared.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in _VISION_OPERATORS:
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)
        importlib.import_module("torchvision")


def images(size: int, batch: int = 2, channels: int = 3, dimensions: int = 2) -> Tensor:
    """Random images (batch, channels, size, ...)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, *[size] * dimensions, generator=generator)


def make(package: str, name: str) -> Made:
    """Makes a network and its inputs, the same in every call, or skips the test."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NETWORKS[package][name](load(package))


def _timm(name: str, size: int = 32, batch: int = 2, **options: Any) -> Callable[[Any], Made]:
    return lambda timm: (
        timm.create_model(name, pretrained=False, num_classes=7, **options),
        (images(size, batch),),
    )


TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "resnet26d": {},
    "resnext26ts": {},
    "seresnext26t_32x4d": {},
    "ecaresnet26t": {},
    "skresnet18": {},
    "resnest14d": {},
    "resnetblur18": {},
    "gcresnext26ts": {},
    "dla34": {},
    "dla46x_c": {},
    "densenet121": {},
    "efficientnet_lite0": {},
    "efficientnet_b0": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "mnasnet_small": {},
    "semnasnet_075": {},
    "fbnetc_100": {},
    "tinynet_e": {},
    "lcnet_035": {},
    "mixnet_s": {},
    "hardcorenas_a": {},
    "ghostnet_050": {},
    "regnetx_002": {},
    "regnety_002": {},
    "hrnet_w18_small": {"size": 64},
    "selecsls42": {},
    "repvgg_a0": {},
    "mobileone_s0": {},
    "gernet_s": {},
    "hgnetv2_b0": {},
    "ese_vovnet19b_slim": {},
    "repvit_m0_9": {"size": 64},
    "mobilevit_xxs": {"size": 64},
    "mobilevitv2_050": {"size": 64},
    "fastvit_t8": {"size": 64},
    "starnet_s1": {},
    "fasternet_t0": {},
    "efficientvit_b0": {},
    "xcit_nano_12_p16_224": {"size": 64},
    "inception_next_atto": {},
    "cspresnet50": {},
    "legacy_xception": {"size": 64},
    "repghostnet_050": {},
    "selecsls60b": {},
}


def _transformers(
    model: str, config: str, *inputs: Tensor, **options: Any
) -> Callable[[Any], Made]:
    return lambda transformers: (
        getattr(transformers, model)(getattr(transformers, f"{config}Config")(**options)),
        inputs,
    )


def _without_feature_training(build: Callable[[Any], Made]) -> Callable[[Any], Made]:
    """Of a network that otherwise sets `requires_grad` on its input, which must be a leaf then."""

    def frozen(package: Any) -> Made:
        network, inputs = build(package)
        network.freeze_feature_encoder()
        return network, inputs

    return frozen


def _classifier(name: str, size: int = 64, **options: Any) -> Callable[[Any], Made]:
    return _transformers(f"{name}ForImageClassification", name, images(size), **options)


_SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TRANSFORMERS: dict[str, Callable[[Any], Made]] = {
    "resnet": _classifier(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2]
    ),
    "resnet_basic": _classifier(
        "ResNet",
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    ),
    "regnet": _classifier(
        "RegNet",
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[2, 2, 2, 2],
        groups_width=8,
    ),
    "regnet_x": _classifier(
        "RegNet",
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 2, 2],
        groups_width=8,
        layer_type="x",
    ),
    "mobilenet_v1": _classifier("MobileNetV1", depth_multiplier=0.25),
    "mobilenet_v2": _classifier("MobileNetV2", depth_multiplier=0.35),
    "mobilenet_v2_segmentation": _transformers(
        "MobileNetV2ForSemanticSegmentation", "MobileNetV2", images(64), depth_multiplier=0.35
    ),
    "efficientnet": _classifier(
        "EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
    ),
    "levit": _classifier(
        "Levit",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
    ),
    "mobilevit": _classifier(
        "MobileViT",
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64],
    ),
    "mobilevit_segmentation": _transformers(
        "MobileViTForSemanticSegmentation",
        "MobileViT",
        images(64),
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64],
        aspp_out_channels=16,
        atrous_rates=[1, 2, 3],
    ),
    "mobilevitv2": _classifier("MobileViTV2", image_size=64, width_multiplier=0.5),
    "hgnet_v2": _classifier(
        "HGNetV2",
        hidden_sizes=[16, 32, 32, 64],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 32, 32],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[16, 32, 32, 64],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
    ),
    "cvt": _classifier("Cvt", embed_dim=[16, 24, 32], num_heads=[1, 2, 2], depth=[1, 2, 10]),
    "swiftformer": _classifier("SwiftFormer", depths=[2, 2, 2, 2], embed_dims=[16, 24, 32, 48]),
    "textnet": _classifier(
        "TextNet",
        hidden_sizes=[8, 8, 16, 16, 32],
        stem_out_channels=8,
        image_size=[64, 64],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
        conv_layer_strides=[[2], [2, 1], [2, 1], [2]],
    ),
    "pp_lcnet": _classifier("PPLCNet", scale=0.25, class_expand=64),
    "segformer": _transformers(
        "SegformerForSemanticSegmentation",
        "Segformer",
        images(64),
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    "beit_segmentation": _transformers(
        "BeitForSemanticSegmentation",
        "Beit",
        images(64),
        image_size=64,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        out_indices=[1, 2, 3, 4],
        auxiliary_channels=16,
    ),
    "patchtst": _transformers(
        "PatchTSTForPrediction",
        "PatchTST",
        images(32, dimensions=1, channels=32)[..., :2],
        num_input_channels=2,
        d_model=16,
        ffn_dim=32,
        num_attention_heads=2,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
    ),
    "patchtsmixer": _transformers(
        "PatchTSMixerForPrediction",
        "PatchTSMixer",
        images(32, dimensions=1, channels=32)[..., :2],
        num_input_channels=2,
        d_model=16,
        prediction_length=4,
        norm_mlp="BatchNorm",
        context_length=32,
        patch_length=4,
        patch_stride=4,
    ),
    "wav2vec2_conformer": _without_feature_training(
        _transformers(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2Conformer",
            images(2000, dimensions=1, channels=1)[:, 0],
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 4, 4),
            layerdrop=0.0,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            **_SOUND,
        )
    ),
    "parakeet": _transformers(
        "ParakeetEncoder",
        "ParakeetEncoder",
        images(16, dimensions=1, channels=64),
        num_mel_bins=16,
        subsampling_conv_channels=8,
        layerdrop=0.0,
        **_SOUND,
    ),
    "clap": _transformers(
        "ClapAudioModelWithProjection",
        "ClapAudio",
        images(64, channels=1),
        num_mel_bins=64,
        spec_size=64,
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[1, 2],
        window_size=4,
        patch_size=4,
    ),
}


def _monai(name: str, *arguments: Any, **options: Any) -> Callable[[Any], Made]:
    """`size` and `dimensions` are those of the images, the rest goes to the network."""
    size, channels = options.pop("size", 32), options.pop("channels_in", 1)
    dimensions = options.pop("dimensions", options.get("spatial_dims", 2))
    return lambda monai: (
        getattr(monai.networks.nets, name)(*arguments, **options),
        (images(size, channels=channels, dimensions=dimensions),),
    )


_SEGMENTS = {"in_channels": 1, "out_channels": 2}
_PYRAMID = {"channels": (8, 16, 32), "strides": (2, 2)}
_BATCH = {"norm": "batch"}
_DYNAMIC = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
MONAI: dict[str, Callable[[Any], Made]] = {
    "unet": _monai("UNet", spatial_dims=2, **_SEGMENTS, **_PYRAMID, **_BATCH),
    "unet_residual": _monai(
        "UNet", spatial_dims=2, **_SEGMENTS, **_PYRAMID, **_BATCH, num_res_units=2
    ),
    "unet_3d": _monai(
        "UNet", spatial_dims=3, size=16, **_SEGMENTS, **_PYRAMID, **_BATCH, num_res_units=2
    ),
    "unet_relu_dropout": _monai(
        "UNet", spatial_dims=2, **_SEGMENTS, **_PYRAMID, **_BATCH, act="relu", dropout=0.1
    ),
    "unet_nda": _monai(
        "UNet", spatial_dims=2, **_SEGMENTS, **_PYRAMID, **_BATCH, adn_ordering="NDA"
    ),
    "basic_unet": _monai(
        "BasicUNet", spatial_dims=2, **_SEGMENTS, features=(8, 8, 16, 16, 32, 8), **_BATCH
    ),
    "basic_unet_plus_plus": _monai(
        "BasicUNetPlusPlus", spatial_dims=2, **_SEGMENTS, features=(8, 8, 16, 16, 32, 8), **_BATCH
    ),
    "attention_unet": _monai("AttentionUnet", spatial_dims=2, **_SEGMENTS, **_PYRAMID),
    "dyn_unet": _monai(
        "DynUNet", spatial_dims=2, **_SEGMENTS, **_DYNAMIC, filters=[8, 16, 16], norm_name="batch"
    ),
    "dyn_unet_residual": _monai(
        "DynUNet",
        spatial_dims=2,
        **_SEGMENTS,
        **_DYNAMIC,
        filters=[8, 16, 16],
        norm_name="batch",
        res_block=True,
    ),
    "seg_resnet": _monai("SegResNet", spatial_dims=2, **_SEGMENTS, init_filters=8, **_BATCH),
    "seg_resnet_ds": _monai("SegResNetDS", spatial_dims=2, **_SEGMENTS, init_filters=8, **_BATCH),
    "densenet": _monai(
        "DenseNet",
        spatial_dims=2,
        **_SEGMENTS,
        init_features=8,
        growth_rate=4,
        block_config=(2, 2, 2),
    ),
    "resnet_basic": _monai(
        "ResNet",
        "basic",
        [1, 1, 1, 1],
        [8, 16, 16, 32],
        spatial_dims=2,
        n_input_channels=1,
        num_classes=2,
    ),
    "resnet_bottleneck_3d": _monai(
        "ResNet",
        "bottleneck",
        [1, 1, 1, 1],
        [8, 8, 8, 8],
        spatial_dims=3,
        n_input_channels=1,
        num_classes=2,
    ),
    "se_resnet": _monai(
        "SEResNet50", spatial_dims=2, in_channels=1, num_classes=2, layers=(1, 1, 1, 1)
    ),
    "efficientnet": _monai(
        "EfficientNetBN", "efficientnet-b0", spatial_dims=2, in_channels=1, pretrained=False
    ),
    "high_res_net": _monai("HighResNet", spatial_dims=2, **_SEGMENTS, norm_type="batch", size=24),
    "vnet": _monai("VNet", spatial_dims=2, **_SEGMENTS),
    "auto_encoder": _monai(
        "AutoEncoder", spatial_dims=2, **_SEGMENTS, channels=(8, 16), strides=(2, 2), **_BATCH
    ),
    "classifier": _monai("Classifier", (1, 32, 32), 3, (8, 16, 16), (2, 2, 2), **_BATCH),
    "regressor": _monai("Regressor", (1, 32, 32), (1,), (8, 16, 16), (2, 2, 2), **_BATCH),
    "flexible_unet": _monai("FlexibleUNet", 3, 2, "efficientnet-b0", channels_in=3, size=64),
    "patch_discriminator": _monai("PatchDiscriminator", spatial_dims=2, channels=8, in_channels=1),
}


def _smp(architecture: str, encoder: str, size: int = 64, **options: Any) -> Callable[[Any], Made]:
    return lambda smp: (
        smp.create_model(architecture, encoder, encoder_weights=None, classes=2, **options),
        (images(size),),
    )


_SMALL = {"decoder_channels": (32, 16, 16, 8, 8)}
SMP: dict[str, Callable[[Any], Made]] = {
    "unet_resnet18": _smp("unet", "resnet18", **_SMALL),
    "unet_mobilenet_v2": _smp("unet", "mobilenet_v2", **_SMALL),
    "unet_efficientnet_b0": _smp("unet", "efficientnet-b0", **_SMALL),
    "unet_timm_mobilenetv3": _smp("unet", "tu-mobilenetv3_small_050", **_SMALL),
    "unet_densenet121": _smp("unet", "densenet121", **_SMALL),
    "unetplusplus_mobileone": _smp("unetplusplus", "mobileone_s0", **_SMALL),
    "fpn": _smp("fpn", "resnet18", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    "pspnet": _smp("pspnet", "resnet18", psp_out_channels=32),
    "linknet": _smp("linknet", "resnet18"),
    "pan": _smp("pan", "resnet18", size=128),
    "deeplabv3": _smp("deeplabv3", "resnet18", decoder_channels=16),
    "deeplabv3plus": _smp("deeplabv3plus", "mobilenet_v2", decoder_channels=16),
    "manet_timm_resnet10t": _smp("manet", "tu-resnet10t", **_SMALL),
    "upernet": _smp("upernet", "resnet18", decoder_channels=16),
    "segformer": _smp("segformer", "resnet18", decoder_segmentation_channels=16),
}

NETWORKS: dict[str, dict[str, Callable[[Any], Made]]] = {
    "timm": {name: _timm(name, **options) for name, options in TIMM.items()},
    "transformers": TRANSFORMERS,
    "monai": MONAI,
    "segmentation_models_pytorch": SMP,
}
