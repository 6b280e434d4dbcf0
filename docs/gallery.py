"""The gallery: every labelled figure of every page, as a thumbnail that leads to its place."""

import base64
import io
import re

WIDTH = 440


def picture(output):
    """The PNG that an output shows, in base64: of its own or inside of its HTML; None where
    there is none"""
    data = output.get("data", {})
    inside = re.search(
        r'<img[^>]*src="data:image/png;base64,([^"]+)"', "".join(data.get("text/html", ""))
    )
    return data.get("image/png") or (inside[1] if inside else None)


def thumbnail(png):
    "A small WebP of a PNG in base64"
    from PIL import Image

    im = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    im.thumbnail((WIDTH, WIDTH))
    im.save(out := io.BytesIO(), "webp", quality=80)
    return out.getvalue()


def tile(page, fig):
    html = page["page"].removesuffix(".ipynb") + ".html"
    alt = " ".join(fig["alt"].split())
    return (
        f":::{{container}} tile\n```{{image}} figures/{fig['label']}.webp\n"
        f":target: {html}#{fig['label']}\n:alt: {alt}\n:loading: lazy\n```\n\n"
        f"{fig['caption']}\n\n[{page['title']}]({page['page']})\n:::\n"
    )


def page(pages, rooms, folder):
    "The gallery's page; writes the thumbnails into a folder"
    folder.mkdir()
    out = [
        "# Gallery of figures\n\n_Every figure of every page; a click leads to where it is made_\n"
    ]
    for room, caption in rooms.items():
        tiles = []
        for p in pages:
            if p["page"].rpartition("/")[0] != room:
                continue
            for fig in p["figures"]:
                (folder / f"{fig['label']}.webp").write_bytes(fig["thumb"])
                tiles.append(tile(p, fig))
        if tiles:
            out.append(f"## {caption}\n\n::::{{container}} gallery\n" + "\n".join(tiles) + "::::\n")
    return "\n".join(out)
