"""Take README's picture: the landing page by day and by night, `python -m tools.screenshots`.

It needs Chromium and the built book. The two modes are photographed at the same size and laid over
each other along a diagonal; a palette of few colours keeps the file small.
"""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

from PIL import Image, ImageDraw

from tools import book

TARGET = book.ROOT / "book" / "_static" / "readme.png"
SIZE = {"width": 1180, "height": 640}
COLOURS = 256


def photograph(browser: str, name: str, size: dict[str, int], html: Path) -> list[Image.Image]:
    """Return a page as it looks in light and in dark mode."""
    from playwright.sync_api import sync_playwright

    server = book.serve(0, html)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shots = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for mode in ("light", "dark"):
            page = chromium.new_page(viewport=size, color_scheme=mode)
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/{name}")
            page.wait_for_load_state("networkidle")
            shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        chromium.close()
    server.shutdown()
    return shots


def diagonal(left: Image.Image, right: Image.Image) -> Image.Image:
    """Lay one picture over the other, parted by a slanted line right of the middle."""
    width, height = left.size
    top, bottom = round(width * 0.78), round(width * 0.5)
    mask = Image.new("L", left.size, 0)
    ImageDraw.Draw(mask).polygon(
        [(top, 0), (width, 0), (width, height), (bottom, height)], fill=255
    )
    return Image.composite(right, left, mask)


def main() -> int:
    """Write the picture; return the exit code."""
    import shutil

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not book.HTML.is_dir():
        print("needs Chromium, and the book: make book", file=sys.stderr)
        return 2
    picture = diagonal(*photograph(browser, "book/intro.html", SIZE, book.HTML))
    # Maximum coverage: the other methods drop the rare orange, which means something.
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(TARGET, optimize=True)
    print(f"{TARGET.relative_to(book.ROOT).as_posix()}: {TARGET.stat().st_size // 1024} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
