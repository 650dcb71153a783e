"""Pictures of what quantization loses, as SVG: size against KL, and how much each tensor matters."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_STYLE: Any = {
    "svg.hashsalt": "toolchain",  # names inside the file do not change from run to run
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SIZE, SENSITIVITY = "quantization-size.svg", "quantization-sensitivity.svg"


def write(allocation: Mapping[str, Any], folder: Path) -> list[Path]:
    """Both pictures of an error-aware quantization's record; where they are."""
    with mpl.rc_context(_STYLE):
        made = [
            (folder / SIZE, size_against_kl(allocation["held_out"]["forms"])),
            (folder / SENSITIVITY, sensitivity_map(allocation["search"]["sensitivity"], allocation["plan_types"])),
        ]
        for path, figure in made:
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return [path for path, _ in made]


def size_against_kl(forms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Each form at its size in MB and its mean KL to 16-bit, logarithmic."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = {name: form for name, form in forms.items() if form["kl"] > 0}
    for name, form in shown.items():
        axes.plot(form["file_bytes"] / 1e6, form["kl"], "o", color="C0" if "error" in name else "0.35")
        label = f"{name}\n{form['bits_per_weight']:.2f} bits, same top {form['same_top']:.1%}"
        axes.annotate(label, (form["file_bytes"] / 1e6, form["kl"]), (6, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.45, y=0.25)
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL(16-bit ‖ this), nats per token")
    return figure


def sensitivity_map(sensitivity: Mapping[str, float], types: Mapping[str, str]) -> Figure:
    """Layer by role: colour is the KL with that tensor alone at four bits, the text is the type that it got."""
    cells: dict[tuple[str, int], str] = {}
    other = []
    for name in sensitivity:
        found = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        if found:
            cells[found[2], int(found[1])] = name
        else:
            other.append(name)
    roles = sorted({role for role, _ in cells})
    layers = max((layer for _, layer in cells), default=-1) + 1

    def value(role: str, layer: int) -> float:
        name = cells.get((role, layer))
        return math.nan if name is None else math.log10(max(sensitivity[name], 1e-9))

    values = [[value(role, layer) for role in roles] for layer in range(layers)]
    figure = Figure(figsize=(1.6 + 0.85 * len(roles), 1.4 + 0.22 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    known = [value(*key) for key in cells]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    for (role, layer), name in cells.items():
        at = roles.index(role)
        color = "black" if values[layer][at] > middle else "white"
        axes.text(at, layer, types.get(name, ""), ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(roles)), roles, rotation=30, ha="right")
    axes.set_ylabel("layer")
    axes.set_title(
        "\n".join(f"{name}: KL {sensitivity[name]:.1e}, {types.get(name, '')}" for name in other), fontsize=8
    )
    figure.colorbar(image, label="log₁₀ KL, this tensor alone at 4 bits")
    return figure
