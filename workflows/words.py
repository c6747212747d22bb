"""Write what the nodes say anew from their schemas: the English locale, and the lists in the help pages."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from dha.whole_file import write_whole

from .formats import list_inputs
from .server import PACK, find_comfyui, serve

LOCALE = "locales/en/nodeDefs.json"
DOCS = "web/docs"
INPUTS = "\n## Inputs\n"  # from here on a help page is generated


def pick_ours(object_info: dict[str, Any]) -> dict[str, Any]:
    """The pack's nodes by id, from a server that has no other custom nodes."""
    return {key: info for key, info in object_info.items() if info["python_module"].startswith("custom_nodes.")}


def build_locale(ours: dict[str, Any]) -> dict[str, Any]:
    """`nodeDefs.json` as ComfyUI reads it: names, descriptions and tooltips by node id."""
    return {key: describe_node(info) for key, info in sorted(ours.items())}


def describe_node(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: {"name": name, **pick_tooltip(options.get("tooltip"))} for name, _, options in list_inputs(info)}
    outputs = {
        str(slot): {"name": name, **pick_tooltip(tooltip)} for slot, (name, tooltip) in enumerate(list_outputs(info))
    }
    words = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
    return {**words, "outputs": outputs} if outputs else words


def pick_tooltip(tooltip: str | None) -> dict[str, str]:
    return {"tooltip": tooltip} if tooltip else {}


def list_outputs(info: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Name and tooltip of every output."""
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    return list(zip(info["output_name"], tooltips, strict=True))


def build_page(page: str, info: dict[str, Any]) -> str:
    """A help page with its lists as the node is now; what stands before them is written by hand."""
    text = f"{page.split(INPUTS)[0].rstrip()}\n{INPUTS}\n"
    for name, kind, options in list_inputs(info):
        text += f"- **{name}** ({describe_kind(kind, options)}): {flow(options.get('tooltip'))}\n"
    if outputs := list_outputs(info):
        text += "\n## Outputs\n\n" + "".join(f"- **{name}**: {flow(tooltip)}\n" for name, tooltip in outputs)
    return text


def flow(tooltip: str | None) -> str:
    """A tooltip of several lines as one item of a list."""
    return (tooltip or "").replace("\n", "  \n  ")


def describe_kind(kind: Any, options: dict[str, Any]) -> str:
    """An input's type, and what it starts with."""
    shown = "choice" if isinstance(kind, list) or kind == "COMBO" else kind
    if "default" in options:
        return f"{shown}, `{json.dumps(options['default'])}`"
    return f"{shown}, not needed" if options["optional"] else shown


def build_files(ours: dict[str, Any], pack: Path) -> dict[str, str]:
    """Text of every generated file by its path in the pack; raises FileNotFoundError for a node without a help page.

    Every page is there twice: ComfyUI asks for the page in the user's language first, and falls back on the other.
    """
    files = {LOCALE: json.dumps(build_locale(ours), indent=2, ensure_ascii=False) + "\n"}
    for key, info in ours.items():
        path = pack / DOCS / f"{key}.md"
        if not path.is_file():
            raise FileNotFoundError(f"{DOCS}/{key}.md is missing: write there what {info['display_name']} is for")
        page = build_page(path.read_text(encoding="utf-8"), info)
        files[f"{DOCS}/{key}.md"] = files[f"{DOCS}/{key}/en.md"] = page
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: COMFYUI_PATH)")
    arguments = parser.parse_args()
    print("Asking a ComfyUI what its nodes say ...", flush=True)
    with tempfile.TemporaryDirectory() as base, serve(find_comfyui(arguments.comfyui), Path(base)) as server:
        ours = pick_ours(server.get("/object_info"))
    for name, text in build_files(ours, PACK).items():
        (PACK / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(PACK / name, text.encode())
        print(name)


if __name__ == "__main__":
    main()
