"""Error of methods without gradients on a net and on its int8 kinds, on CIFAR-10 images in folders.

    python tests/measure/int8.py --root ROOT --weights resnet20.safetensors

ROOT/train/<class>/* and ROOT/test/<class>/*; test images under ImageNet-C's functions (extra ``corruptions``) at one
severity, shuffled. All nets and methods see the same batches. The static kinds are calibrated on training images
without augmentation, a random choice by ``--seed``; ``output_shift`` takes the source's mean from others, through the
quantised net. PT2E and torchao weights need the extra ``int8``; without it their rows are left out, and the output says
so. A ``-`` is a refusal, with its reason below the table.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from lightning_tta import Backbone, UnsupportedModelError, adapt
from lightning_tta.backbones import create_backbone
from plumbing import arguments, digits_or_folder, header, row

METHODS: dict[str, dict[str, Any]] = {
    "source": {},
    "t3a": {"filter_k": 100},
    "lame": {},
    "norm": {"momentum": 0.05},
    "neo": {},
    "output_shift": {},
}


def static_fx(net: Backbone, images: Tensor) -> nn.Module:
    """All layers of the net inside; the normalisation of the pixels stays in float32."""
    with torch.no_grad():
        normalised = (images - net.mean) / net.std
    net.net = prepare_fx(net.net, get_default_qconfig_mapping(torch.backends.quantized.engine), (normalised[:2],))
    with torch.no_grad():
        net(images)
    net.net = convert_fx(net.net)
    return net


def static_pt2e(net: Backbone, images: Tensor) -> nn.Module:
    """All layers, in a graph of operations without modules."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    graph = torch.export.export(net, (images[:5],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        prepared(images)
    return quantize_pt2e.convert_pt2e(prepared)


def dynamic(net: Backbone, images: Tensor) -> nn.Module:
    """Linear layers alone, their inputs with the range of each batch."""
    return quantize_dynamic(net, {nn.Linear})


def torchao_weights(net: Backbone, images: Tensor) -> nn.Module:
    """The weights of linear layers alone."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(net.requires_grad_(False), Int8WeightOnlyConfig())
    return net


KINDS: dict[str, Callable[[Backbone, Tensor], nn.Module]] = {
    "float32": lambda net, images: net,
    "static, FX": static_fx,
    "static, PT2E": static_pt2e,
    "linear layer alone, dynamic": dynamic,
    "linear layer alone, torchao weights": torchao_weights,
}
OF_TORCHAO = ("static, PT2E", "linear layer alone, torchao weights")


def nets_of(net: Backbone, images: Tensor) -> dict[str, nn.Module]:
    """The kinds that can be made here, each of a copy of the net."""
    kinds = [kind for kind in KINDS if find_spec("torchao") or kind not in OF_TORCHAO]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao is deprecated: static nets by FX are made with it alone
        return {kind: KINDS[kind](copy.deepcopy(net), images) for kind in kinds}


def main(args: list[str] | None = None) -> dict[tuple[str, str, str], float | None]:
    """Print the table; returns errors in percent by domain, kind and method, None where the method refuses the net."""
    options = arguments(
        __doc__,
        args,
        root=str,
        weights=str,
        net="cifar/resnet20",
        domains=["gaussian_noise", "contrast"],
        function_set=("imagenet_c", "or builtin"),
        severity=1,
        methods=list(METHODS),
        images=(2000, "of each domain"),
        batch=200,
        calibration=(200, "training images"),
        source_images=(512, "training images for output_shift"),
        seed=(0, "of the choice of training images"),
    )
    torch.set_num_threads(1)
    stream = {"num_images": options.images, "batch_size": options.batch, "function_set": options.function_set}
    streams = {
        domain: digits_or_folder(options.root, {}, {}, domains=[domain], severity=options.severity, **stream)
        for domain in options.domains
    }
    data = next(iter(streams.values()))
    # one choice of training images: the first are for the calibration, the others for the source's mean
    (chosen,) = data.source_batches(options.calibration + options.source_images, 10**6, options.seed)
    calibration = chosen["image"][: options.calibration]
    source = [
        {name: value[options.calibration :][start : start + 128] for name, value in chosen.items()}
        for start in range(0, len(chosen["label"]) - options.calibration, 128)
    ]
    net = create_backbone(options.net, data.num_classes, weights=options.weights).eval()
    nets = nets_of(net, calibration)
    protocol = data.describe()
    print(f"{protocol['data']} ({protocol['data_digest']}), {options.images} images, {options.function_set} ", end="")
    print(f"{options.severity}; {options.net}, {net.preprocessing}; torch {torch.__version__}")
    print(
        f"calibration: {len(calibration)} training images, the first of source_batches(seed={options.seed}), "
        f"without augmentation; output_shift: the next {len(chosen['label']) - len(calibration)}"
    )
    if find_spec("torchao"):
        print(f"torchao {version('torchao')}")
    else:
        print(f"left out, as torchao is not installed (extra int8): {'; '.join(OF_TORCHAO)}")

    found: dict[tuple[str, str, str], float | None] = {}
    refusals: dict[tuple[str, str], str] = {}
    errors: dict[tuple[str, str], Tensor] = {}
    spreads: list[float] = []
    differences: list[float] = []
    header("domain", "net", *(f"`{name}`" for name in options.methods))
    for domain, shifted in streams.items():
        batches = list(shifted.predict_dataloader())
        for kind, quantised in nets.items():
            for name in options.methods:
                found[domain, kind, name] = None
                try:
                    method = adapt(quantised, name, **METHODS[name])
                except UnsupportedModelError as error:
                    refusals[kind, name] = str(error)
                    continue
                if not method.prepared:
                    method.prepare(source)
                wrong = torch.cat([method(batch["image"]).argmax(1) != batch["label"] for batch in batches]).double()
                found[domain, kind, name] = 100 * float(wrong.mean())
                spreads.append(100 * float(wrong.std()) / len(wrong) ** 0.5)
                change = wrong - errors.setdefault((domain, name), wrong)  # the first kind is float32
                differences.append(100 * float(change.std()) / len(change) ** 0.5)
            cells = [found[domain, kind, name] for name in options.methods]
            row(domain, kind, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    print(
        f"standard errors: up to {max(spreads):.1f} of an error, "
        f"up to {max(differences):.1f} of a difference to float32 on the same images"
    )
    for (kind, name), reason in refusals.items():
        print(f"- {kind}, {name}: {reason}")
    return found


if __name__ == "__main__":
    main()
