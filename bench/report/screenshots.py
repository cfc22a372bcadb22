"""Screenshots of a report in Chromium: wide and phone, light and dark. For docs/images.

    python -m msdd_fast.bench.report.screenshots out/bench/report.html docs/images [--browser chromium]

Writes bench-light.png, bench-dark.png, bench-phone-light.png and bench-phone-dark.png. The browser
resolves no names, so a page that needs the network would show.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.program import run_program

SIZES = {"bench": (940, 9000), "bench-phone": (390, 12000)}
THEMES = {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}
OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
MARGIN = 16


def take(page: Path, target: Path, size: tuple[int, int], options: Sequence[str], browser: str) -> None:
    """One screenshot, cropped to the page."""
    with tempfile.TemporaryDirectory() as profile:
        window, taken = f"--window-size={size[0]},{size[1]}", Path(profile, "taken.png")
        command = [browser, *OFFLINE, *options, f"--user-data-dir={profile}", window, f"--screenshot={taken}"]
        subprocess.run([*command, page.absolute().as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(taken, formats=["PNG"]) as opened:
            shown = opened.convert("RGB")
    empty = Image.new("RGB", shown.size, shown.getpixel((0, shown.height - 1)))
    box = ImageChops.difference(shown, empty).getbbox()
    bottom = shown.height if box is None else min(box[3] + MARGIN, shown.height)
    with atomic_write(target) as temporary:
        shown.crop((0, 0, shown.width, bottom)).quantize(64).save(temporary, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome (default: %(default)s)")
    args = parser.parse_args(arguments)
    if shutil.which(args.browser) is None:
        raise BackendUnavailableError(f"screenshots need the browser {args.browser!r} on the PATH")
    if not args.report.is_file():
        raise InputError(f"report must be a file of msdd-fast bench --html, got {args.report}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        for theme, options in THEMES.items():
            target = args.folder / f"{name}-{theme}.png"
            take(args.report, target, size, options, args.browser)
            print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(run_program(main))
