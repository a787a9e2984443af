"""Builds the images, and writes those that were built as an archive.

python -m infra.images build OUT --torch 2.13.0 [--device cpu] [--image core …]
python -m infra.images archive OUT --image core > core.tar
"""

import argparse
import sys
import tempfile
from pathlib import Path

from infra.images.build import Builder, missing_tools
from infra.images.lock_parts import IMAGES
from infra.images.oci import Layout
from pipelines.recipe.kfp_pipeline import image as image_name


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.images", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("build", "archive"))
    parser.add_argument("out", type=Path, help="folder of the images, in the layout of OCI")
    parser.add_argument("--image", choices=IMAGES, action="append", help="one of the images; all by default")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="whose lock to install")
    parser.add_argument("--torch", help="version of torch to install")
    options = parser.parse_args()
    images = [image for image in IMAGES if image in (options.image or IMAGES)]
    if options.command == "archive":
        if not Layout(options.out).manifests():
            return _refuse(f"{options.out} has no images; build them with `make images OUT={options.out}`")
        Layout(options.out).write_archive(map(image_name, images), sys.stdout.buffer)
        return 0
    if missing := missing_tools():
        return _refuse(f"building images needs {', '.join(missing)}; mmdebstrap is a package of Debian")
    if not options.torch:
        return _refuse("--torch is not given; `make images` gives the version that the Makefile pins")
    layout = Layout(options.out)
    layout.create()
    with tempfile.TemporaryDirectory(dir=options.out, prefix="build-") as scratch:
        sizes = Builder(layout, Path(scratch), options.device, options.torch).build(images)
    layout.remove_unused()
    for size in sizes:
        sys.stdout.write(f"{size.image:6} {size.part:13} {size.size / 2**20:8.1f} MiB\n")
    return 0


def _refuse(reason: str) -> int:
    sys.stderr.write(f"{reason}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
