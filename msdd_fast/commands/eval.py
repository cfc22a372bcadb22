"""Measure reconstructions: PSNR and SSIM, and, given weights, LPIPS, a VGG-19 distance, FID and KID.

Images of a folder are encoded and decoded, or compared with those of a second folder (--reconstructions). The report
says everything that the figures depend on. Nothing is downloaded: a figure is measured when you name the weights of its
network. FID and KID are only those of InceptionV3 (--features inception=FILE); on another network they bear its name.

With --out, results lie in a folder as they come, and a run that was interrupted goes on there. Under torchrun, which
needs --out, or with --ray, several processes share the images; the figures are those of one. Images that cannot be read
are passed over and counted; the others keep their seeds. `msdd-fast table` makes tables of reports.
"""

from __future__ import annotations

import argparse

from msdd_fast.commands.arguments import add_batch_size, add_checkpoint, add_sampling, add_strict
from msdd_fast.commands.bulk.options import add_ray
from msdd_fast.commands.evaluation.options import CROPS, PIXELS, RESIZES, SSIMS
from msdd_fast.commands.output import add_json
from msdd_fast.io.arguments import DTYPES, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of images (searched recursively), or one image")
    parser.add_argument(
        "--reconstructions", metavar="DIR", help="compare with the images of the same names in DIR; nothing is decoded"
    )
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--set", metavar="NAME", help="name of the set, for the report (default: the folder)")
    protocol.add_argument("--split", metavar="NAME", help="its split, for the report: val, test, ...")
    protocol.add_argument(
        "--crop",
        choices=CROPS,
        help="center: the largest square; adm: the authors' (default: center; with --reconstructions none)",
    )
    protocol.add_argument(
        "--resize",
        choices=("auto", *RESIZES),
        default="auto",
        help="filter of the crop (default: auto, for center BOX at whole factors and else bicubic, for adm bicubic)",
    )
    protocol.add_argument("--count", type=positive_int, metavar="N", help="the first N images only")
    protocol.add_argument(
        "--pixels",
        choices=PIXELS,
        default="float",
        help="measure results as they are, or rounded as a PNG is (default: %(default)s; features are of rounded ones)",
    )
    protocol.add_argument(
        "--decoder",
        choices=("eager", "engine"),
        default="eager",
        help="the model in plain PyTorch, or the engine (default: %(default)s)",
    )
    protocol.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="arithmetic: autocast of encoder and decoder, or the engine's (default: %(default)s)",
    )
    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--ssim",
        nargs="+",
        choices=SSIMS,
        default=["ssim"],
        help="ssim_authors has the data range of the authors' script, which inflates it (default: ssim)",
    )
    figures.add_argument("--vgg19", metavar="FILE", help="vgg_normalised_conv3_1.pth, for the VGG-19 feature distance")
    figures.add_argument("--lpips-vgg", metavar="FILE", help="torchvision's vgg16-397923af.pth, for LPIPS")
    figures.add_argument("--lpips-alex", metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth, for LPIPS")
    figures.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="for Frechet and kernel distance: inception (FID, KID), vgg19 or squeezenet; may be repeated",
    )
    figures.add_argument(
        "--throughput", type=float, metavar="SECONDS", help="also img/s, timed for SECONDS, and in the authors' way"
    )
    output = parser.add_argument_group("output")
    add_json(output, "the report, with every image's figures,")
    output.add_argument("--name", help="of the row in tables (default: the checkpoint, or DIR)")
    output.add_argument("-o", "--out", metavar="DIR", help="folder for results as they come; an old run goes on there")
    output.add_argument("--overwrite", action="store_true", help="measure again what is in --out")
    add_strict(output)
    add_checkpoint(parser)
    add_sampling(parser)
    add_batch_size(parser)
    add_ray(parser)


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.evaluation.evaluate import run as evaluate

    evaluate(args)
