"""Latency of a bundle's server under a mixed load: percentiles of the first token and of whole answers, by kind.

Starts the bundle's own `edgectl serve` with a key, asks from several clients at once, prints one JSON object with the
conditions, or the table of docs/device.md. Answers have at most 50 tokens; the clients run on the same machine, and
take a part of it.

    python benchmarks/load.py work/bundle/*/my-model-1.0-x86-cpu --clients 8 --requests 500 --table
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.device import load, served
from toolchain.device import files, meter, probe, serve
from toolchain.device.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--table", action="store_true", help="print Markdown in place of JSON")
    options = parser.parse_args()
    bundle = files.open_bundle(options.bundle.resolve())
    model = bundle.manifest["model"]
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder, "key")
        key_file.write_text("load\n", encoding="utf-8")
        with served.serving(bundle.root, Path(folder, "log"), "--api-key-file", str(key_file)) as running:
            client = Client("127.0.0.1", running.port, "load")
            load.run(client, context=model["context"], requests=len(load.KINDS), clients=1)  # warm
            before, start_s = running.usage(), time.perf_counter()
            asked = {"context": model["context"], "requests": options.requests, "clients": options.clients}
            with meter.ForeignCpu() as foreign:
                samples = load.run(client, **asked)
            elapsed_s = time.perf_counter() - start_s
            record = {
                "bundle": bundle.id,
                "model_bytes": model["bytes"],
                "parallel": model["parallel"],
                **asked,
                "processor": probe.cpu_model(),
                "threads": serve.threads(bundle),
                "foreign_cpu_share": round(foreign.share, 3),
                "elapsed_s": round(elapsed_s, 2),
                "requests_per_s": round(len(samples) / elapsed_s, 1),
                "usage_before": before,
                "usage_after": running.usage(),
                "kinds": load.summary(samples),
                "wrong": [f"{sample.kind}: {sample.wrong}" for sample in samples if sample.wrong is not None],
            }
    print(load.table(record) if options.table else json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
