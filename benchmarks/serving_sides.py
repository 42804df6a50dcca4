"""What ``serve.py`` compares with: the same bundle behind LitServe, behind FastAPI one request at a time, and without any HTTP.

Run by ``serve.py``: python benchmarks/serving_sides.py litserve|fastapi|limit BUNDLE ENGINE PORT [FACES]
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rafce_ray.bundle import load_bundle
from rafce_ray.decode import decode_face
from rafce_ray.hardware import choose_device
from rafce_ray.inference.build import build_engine
from rafce_ray.predict import Predictor

BATCH = 32
WAIT_S = 0.005


def predictor_of(bundle: str, engine: str) -> Predictor:
    found = load_bundle(bundle)
    threads = len(os.sched_getaffinity(0))
    return Predictor(found, engine=build_engine(found, engine, choose_device("auto"), threads, "auto")[0])


def litserve(bundle: str, engine: str, port: int) -> None:
    import litserve as ls

    class FaceApi(ls.LitAPI):
        def setup(self, device: str) -> None:
            self.predictor = predictor_of(bundle, engine)
            self.px = self.predictor.bundle.preprocessing.stored_px
            self.predictor.predict(np.zeros((BATCH, self.px, self.px, 3), np.uint8))

        def decode_request(self, request) -> np.ndarray:
            return decode_face(request["files"].file.read(), self.px)

        def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
            return np.stack(inputs)

        def predict(self, batch: np.ndarray) -> list:
            return self.predictor.predict(batch)

        def unbatch(self, output: list) -> list:
            return output

        def encode_response(self, output) -> dict:
            return asdict(output)

    server = ls.LitServer(FaceApi(max_batch_size=BATCH, batch_timeout=WAIT_S), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def fastapi(bundle: str, engine: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, UploadFile

    predictor, app, one_at_a_time = predictor_of(bundle, engine), FastAPI(), threading.Lock()
    px = predictor.bundle.preprocessing.stored_px

    @app.post("/predict")
    def predict(files: UploadFile) -> dict:
        pixels = decode_face(files.file.read(), px)
        with one_at_a_time:
            (found,) = predictor.predict(pixels[None])
        return asdict(found)

    # Annotations of this module are strings, which FastAPI looks up in it.
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def limit(bundle: str, engine: str, faces: str) -> None:
    """On a line ``BATCH SECONDS``: decode and predict batches for so long, then print images, CPU seconds and median forward seconds.

    The next batch is decoded while the model runs, as a server does.
    """
    predictor = predictor_of(bundle, engine)
    px = predictor.bundle.preprocessing.stored_px
    files = [path.read_bytes() for path in sorted(Path(faces).iterdir())]

    def decoded(size: int) -> np.ndarray:
        return np.stack([decode_face(files[place % len(files)], px) for place in range(size)])

    predictor.predict(decoded(BATCH))
    print("ready", flush=True)
    with ThreadPoolExecutor(1) as reader:
        for line in sys.stdin:
            size, seconds = int(line.split()[0]), float(line.split()[1])
            predictor.predict(decoded(size))
            images, forwards, cpu = 0, [], time.process_time()
            begin = time.monotonic()
            waiting = reader.submit(decoded, size)
            while time.monotonic() < begin + seconds:
                faces_read, waiting = waiting.result(), reader.submit(decoded, size)
                since = time.monotonic()
                predictor.predict(faces_read)
                forwards.append(time.monotonic() - since)
                images += size
            took = time.monotonic() - begin
            waiting.result()
            print(images / took, (time.process_time() - cpu) / images, statistics.median(forwards), flush=True)


if __name__ == "__main__":
    side, *rest = sys.argv[1:]
    if side == "limit":
        limit(*rest)
    else:
        {"litserve": litserve, "fastapi": fastapi}[side](rest[0], rest[1], int(rest[2]))
