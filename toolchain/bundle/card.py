"""MODEL_CARD.md of a bundle, from what its manifest says."""

from typing import Any

from toolchain.evaluate import ledger_text


def render(description: dict[str, Any]) -> str:
    """Markdown. `description` is the manifest without its files."""
    parts = [
        f"# {description['name']} {description['version']}",
        "A student model distilled from a larger teacher, quantized and packed with the server that runs it.",
        ledger_text.markdown((("", ""), _facts(description))),
    ]
    fallbacks = description["model"]["quantize"].get("fallbacks")
    if fallbacks:
        parts.append(f"{len(fallbacks)} tensors could not have the type asked for; manifest.json names what they got.")
    parts.append("## Use\n\n    ./edgectl verify\n    ./edgectl smoke\n    ./edgectl serve --port 8080")
    parts.append(
        "Then `http://127.0.0.1:8080` is a page to chat on, and `http://127.0.0.1:8080/v1` speaks the OpenAI API. "
        "Needs Python 3.10 or newer and no packages."
    )
    lineage = "\n".join(f"- {name}: `{digest}`" for name, digest in description["lineage"].items())
    parts.append(f"## Made from\n\n{lineage or 'Nothing recorded.'}")
    parts.append(
        "## On the device\n\nSpeed, start and memory are not measured in a bundle: it was built before it ran "
        "anywhere. `./edgectl bench` measures them where it lies."
    )
    parts.append("## What was lost on the way")
    parts += ["Not evaluated."] if description["quality"] is None else _quality(description["quality"])
    licence = description["model"]["licence"]
    of_model = f"`{licence}`, as its GGUF says" if licence else "that of the student it came from"
    parts.append(
        f"## Licences\n\nPrograms: `LICENSES/`; every part with its version and licence: `{description['sbom']}` "
        f"(CycloneDX). The model's licence is {of_model}."
    )
    return "\n\n".join(parts) + "\n"


def _facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    model, runtime, target = description["model"], description["runtime"], description["target"]
    return [
        ("Made for", f"{target['description']} ({target['arch']}, {_glibc(runtime['glibc_needed'])})"),
        ("Architecture", model["architecture"]),
        ("Parameters", f"{model['parameters']:,}"),
        ("File type", f"{model['file_type']}, {model['bits_per_weight']:.2f} bits per weight in fact"),
        ("Tensors", ", ".join(f"{count} × {kind}" for kind, count in model["tensor_types"].items())),
        ("Size", f"{model['bytes'] / 2**20:.1f} MiB"),
        ("Context", f"{model['context']} tokens, trained for {model['context_trained']}"),
        ("Ends at", f"`{model['eos']['text']}` (id {model['eos']['id']})"),
        ("llama.cpp", f"`{runtime['llama_cpp_commit']}`, {runtime['backend']}"),
    ]


def _glibc(needed: str) -> str:
    return "no C library needed" if needed == "none" else f"glibc {needed} or newer"


def _quality(ledger: dict[str, Any]) -> list[str]:
    parts = [
        ledger_text.held_out(ledger),
        ledger_text.markdown(ledger_text.table(ledger)),
        ledger_text.gain(ledger["gain"]),
        # One level down: they are parts of this part.
        "#" + ledger_text.quantization(ledger["quantization"], None),
    ]
    if ledger.get("gates"):
        parts.insert(3, "#" + ledger_text.gates(ledger["gates"]))
    return parts
