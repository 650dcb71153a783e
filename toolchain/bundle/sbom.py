"""What a bundle consists of, as a CycloneDX 1.6 document: programs, libraries, what is compiled in, and the model.

https://cyclonedx.org/docs/1.6/json/. No time and no random serial number: the same bundle has the same bytes.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from toolchain import __version__
from toolchain.gguf import llama_cpp
from toolchain.resources import versions

SPEC_VERSION = "1.6"
_LICENCE_IDS = {"MIT", "Apache-2.0", "BSD-2-Clause", "MIT-0", "Unlicense"}
"""SPDX identifiers that are used here as they are; anything else goes by its name."""
_GCC_LICENCE = "GPL-3.0-or-later WITH GCC-exception-3.1"
_COMPILER_LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1")


def render(
    description: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], *, compiler: str, model_licence: str | None
) -> dict[str, Any]:
    """The document. `description` is the manifest without its files, `files` path → facts with sha256.

    `compiler` names what compiled the programs, as they say themselves; its runtime is linked in or lies beside them.
    """
    pin = versions()["llama_cpp"]
    runtime, root = description["runtime"], _root(description)
    programs = [_file(path, files[path]) for path in sorted(files) if path.startswith(f"{runtime['folder']}/")]
    compiled = [
        {
            "type": "library",
            "bom-ref": "ggml",
            "name": "ggml",
            "version": pin["ggml"],
            "purl": f"pkg:github/ggml-org/ggml@{pin['ggml']}",
            "licenses": _licences("MIT"),
        },
        *(_vendored(part) for part in pin["vendored"]),
        {
            "type": "library",
            "bom-ref": "gcc-runtime",
            "name": "libstdc++ and libgcc",
            "version": compiler,
            "description": "beside the programs"
            if any(path.endswith(_COMPILER_LIBRARIES) for path in files)
            else "linked into the programs",
            "licenses": _licences(_GCC_LICENCE),
        },
    ]
    llama = {
        "type": "application",
        "bom-ref": "llama.cpp",
        "name": "llama.cpp",
        "version": runtime["llama_cpp_commit"],
        "purl": f"pkg:github/ggml-org/llama.cpp@{runtime['llama_cpp_commit']}",
        "licenses": _licences("MIT"),
        "pedigree": {
            "patches": [
                {"type": "unofficial", "diff": {"text": {"content": path.read_text(encoding="utf-8")}}}
                for path in llama_cpp.patches()
            ]
        },
        "externalReferences": [
            {
                "type": "source-distribution",
                "url": f"https://pypi.org/project/{pin['package']}/{pin['version']}/",
                "hashes": [{"alg": "SHA-256", "content": pin["sha256"]}],
            }
        ],
        "properties": [{"name": "toolchain:cmake", "value": flag} for flag in runtime["flags"]],
        "components": programs,
    }
    device = {
        "type": "application",
        "bom-ref": "edgectl",
        "name": "edgectl",
        "version": __version__,
        "licenses": _licences("Apache-2.0"),
        "components": [
            _file(path, files[path]) for path in sorted(files) if path == "edgectl" or path.startswith("device/")
        ],
    }
    parts = [part["bom-ref"] for part in compiled]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, _identity(description, files))}",
        "version": 1,
        "metadata": {
            "component": root,
            "tools": {"components": [{"type": "application", "name": "toolchain", "version": __version__}]},
        },
        "components": [_model(description, model_licence), llama, *compiled, device],
        "dependencies": [
            {"ref": root["bom-ref"], "dependsOn": ["model", "llama.cpp", "edgectl"]},
            {"ref": "llama.cpp", "dependsOn": parts},
            {"ref": "edgectl", "dependsOn": ["llama.cpp"]},
            *({"ref": part} for part in ["model", *parts]),
        ],
    }


def _identity(description: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    digests = "".join(f"{path} {files[path]['sha256']}\n" for path in sorted(files))
    return f"{description['name']} {description['version']} {description['target']['name']}\n{digests}"


def _root(description: Mapping[str, Any]) -> dict[str, Any]:
    target = description["target"]
    return {
        "type": "application",
        "bom-ref": "bundle",
        "name": f"{description['name']}-{target['name']}",
        "version": description["version"],
        "description": f"a language model and its server for {target['description']}",
    }


def _model(description: Mapping[str, Any], licence: str | None) -> dict[str, Any]:
    model, quality = description["model"], description["quality"]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": description["name"],
        "version": description["version"],
        "description": f"{model['architecture']}, {model['parameters']} parameters, as {model['file_type']}",
        "hashes": [{"alg": "SHA-256", "content": model["sha256"]}],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": model["architecture"],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            }
        },
        "properties": [
            {"name": "toolchain:file", "value": model["file"]},
            *(
                {"name": f"toolchain:lineage:{name}", "value": digest}
                for name, digest in sorted(description["lineage"].items())
            ),
        ],
    }
    if licence:
        component["licenses"] = _licences(licence)
    rows = (quality or {}).get("rows") or []
    if rows:
        figures = [
            {"type": kind, "value": f"{rows[-1][key]:.6g}"}
            for key, kind in (
                ("kl_to_teacher", "KL(teacher ‖ model), nats per answer token"),
                ("cross_entropy", "cross-entropy, nats per answer token"),
                ("top1_agreement", "top-1 agreement with the teacher"),
            )
            if rows[-1].get(key) is not None
        ]
        component["modelCard"]["quantitativeAnalysis"] = {"performanceMetrics": figures}
    return component


def _file(path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{path}",
        "name": path,
        "hashes": [{"alg": "SHA-256", "content": facts["sha256"]}],
    }


def _vendored(part: Mapping[str, str]) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "library", "bom-ref": f"vendored:{part['name']}", "name": part["name"]}
    if "version" in part:
        component["version"] = part["version"]
    if "url" in part:
        owner_and_name = part["url"].removeprefix("https://github.com/").lower()
        component["purl"] = f"pkg:github/{owner_and_name}" + (f"@{part['version']}" if "version" in part else "")
    component["licenses"] = _licences(part["licence"])
    return component


def _licences(text: str) -> list[dict[str, Any]]:
    """As CycloneDX has them: an SPDX id, an SPDX expression, or a name."""
    if text in _LICENCE_IDS:
        return [{"license": {"id": text}}]
    if " OR " in text or " WITH " in text:
        return [{"expression": text}]
    return [{"license": {"name": text.removeprefix("LicenseRef-")}}]
