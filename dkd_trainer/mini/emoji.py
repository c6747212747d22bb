"""The emoji sets as one table of (style, concept) pictures with transparent background."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .packages import ICON_SETS, NAMES, archive_name, read_json

# emojibase's groups; people, symbols and flags are left out
GROUPS = {"smileys": 0, "animals": 3, "food": 4, "travel": 5, "activities": 6, "objects": 7}


@dataclass(frozen=True)
class Concept:
    """What an emoji shows: its Unicode code, its English name, its search words and its group."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str


def slug(text: str) -> str:
    """Icon-set style name: `Red apple` -> `red-apple`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[’']", "", text.lower())).strip("-")


def plain_code(code: str) -> str:
    """Code point sequence without the variation selector."""
    return code.lower().replace("-fe0f", "")


def load_concepts(folder: Path) -> dict[str, Concept]:
    """All concepts of the kept groups, by code."""
    table = read_json(folder / archive_name(*NAMES[:2]) / "en" / "data.json")
    names = {number: name for name, number in GROUPS.items()}
    return {
        e["hexcode"]: Concept(
            e["hexcode"], e["label"].lower(), tuple(t.lower() for t in e.get("tags", [])), names[e["group"]]
        )
        for e in table
        if e.get("group") in names
    }


class IconSet:
    """One style: which concepts it draws, and their SVG or WebP source."""

    def __init__(self, folder: Path, style: str, concepts: dict[str, Concept]):
        package, version, _ = ICON_SETS[style]
        self.root = folder / archive_name(package, version)
        self.by_code = {plain_code(c): c for c in concepts}
        self.by_slug = {slug(k.label): c for c, k in concepts.items()}
        self.names = self._webp_names() if style == "glossy 3d" else self._svg_names(folder, style)

    def _webp_names(self) -> dict[str, str]:
        files = sorted((self.root / "assets").glob("*.webp"))
        return {self.by_code[plain_code(f.stem)]: f.name for f in files if plain_code(f.stem) in self.by_code}

    def _svg_names(self, folder: Path, style: str) -> dict[str, str]:
        self.icons = read_json(self.root / "icons.json")
        # the gradient set lists no code points; it uses the names of the flat set
        source = folder / archive_name(*ICON_SETS["flat"][:2]) if style == "gradient" else self.root
        chars = read_json(source / "chars.json") if (source / "chars.json").exists() else {}
        found: dict[str, str] = {}
        for code, name in chars.items():
            if plain_code(code) in self.by_code and name in self.icons["icons"]:
                found.setdefault(self.by_code[plain_code(code)], name)
        squeezed = {k.replace("-", ""): v for k, v in self.by_slug.items()}
        for name in self.icons["icons"]:
            code = self.by_slug.get(name) or (squeezed.get(name.replace("-", "")) if style == "firefox" else None)
            if code:
                found.setdefault(code, name)
        return found

    def render(self, code: str, size: int) -> Image.Image:
        """RGBA picture of a concept, `size` x `size` pixels."""
        if not hasattr(self, "icons"):
            picture = Image.open(self.root / "assets" / self.names[code]).convert("RGBA")
            return picture.resize((size, size), Image.LANCZOS)
        import resvg_py

        icon = self.icons["icons"][self.names[code]]
        width, height = icon.get("width", self.icons.get("width", 16)), icon.get("height", self.icons.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{width}" height="{height}">'
            f"{icon['body']}</svg>"
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
        return Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.LANCZOS)


def render_all(folder: Path, cache: Path, size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Every (style, concept) picture as one memory-mapped array (n, size, size, 4) and its index."""
    import json

    array, index = cache / f"emoji{size}.npy", cache / f"emoji{size}.json"
    if not index.exists():
        concepts = load_concepts(folder)
        sets = {style: IconSet(folder, style, concepts) for style in ICON_SETS}
        pairs = [(style, code) for style, icons in sets.items() for code in icons.names]
        pictures = np.lib.format.open_memmap(array, mode="w+", dtype=np.uint8, shape=(len(pairs), size, size, 4))
        for i, (style, code) in enumerate(tqdm(pairs, desc=f"render {size}px")):
            pictures[i] = np.asarray(sets[style].render(code, size))
        pictures.flush()
        index.write_text(json.dumps(pairs))
    return np.load(array, mmap_mode="r"), [tuple(p) for p in json.loads(index.read_text())]


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone: the same split on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:6], "big") / 2**48


def is_held_out(style: str, code: str) -> bool:
    """Whether this (style, concept) pair is kept from training: about 8 % of concepts and 5 % of the other pairs."""
    return share("concept", code) < 0.08 or share("pair", style, code) < 0.05
