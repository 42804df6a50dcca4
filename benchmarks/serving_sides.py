"""What ``serve.py`` compares with: the same bundle behind LitServe, behind FastAPI one request at a time, without any
HTTP; and HTTP without it.

Run by ``serve.py``: python benchmarks/serving_sides.py litserve|fastapi BUNDLE ENGINE PORT, limit BUNDLE ENGINE FACES
or constant PORT
"""

from __future__ import annotations

import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import litserve
import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from serving import BATCH, predictor_of

from rafce_ray.faces.decode import decode_face
from rafce_ray.serve.launch import ray_serve

WAIT_S = 0.005
ANSWER_BYTES = 3000
"""About as long as the endpoint's answer for one face."""


class FaceApi(litserve.LitAPI):
    """Decoder, engine and answers of the project behind LitServe, whose worker process makes a copy of this."""

    def __init__(self, bundle: str, engine: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT_S)
        self.source = bundle, engine

    def setup(self, device: str) -> None:
        self.predictor = predictor_of(*self.source)
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


def serve_litserve(bundle: str, engine: str, port: int) -> None:
    server = litserve.LitServer(FaceApi(bundle, engine), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def serve_fastapi(bundle: str, engine: str, port: int) -> None:
    predictor, app, one_at_a_time = predictor_of(bundle, engine), FastAPI(), threading.Lock()
    px = predictor.bundle.preprocessing.stored_px

    @app.post("/predict")
    def predict(files: UploadFile) -> dict:
        pixels = decode_face(files.file.read(), px)
        with one_at_a_time:
            (found,) = predictor.predict(pixels[None])
        return asdict(found)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def serve_constant(port: int) -> None:
    """Bytes that never change from Ray Serve, on the path that ``rafce serve`` takes: what any endpoint of Serve costs
    at least.
    """
    answer = b"x" * ANSWER_BYTES

    async def application(scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        length = str(len(answer)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": answer})

    with ray_serve("127.0.0.1", port, dashboard=False):
        # Ray reads the environment, which is there now, when it is imported.
        from ray import serve

        @serve.ingress(lambda: application)
        class Constant:
            pass

        quiet = {"enable_access_log": False}
        serve.run(serve.deployment(Constant).options(max_ongoing_requests=512, logging_config=quiet).bind())
        signal.pause()


def limit(bundle: str, engine: str, faces: str) -> None:
    """On a line ``BATCH SECONDS``: decode and predict batches for so long, then print images, CPU seconds and median
    forward seconds.

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
    elif side == "constant":
        serve_constant(int(rest[0]))
    else:
        {"litserve": serve_litserve, "fastapi": serve_fastapi}[side](rest[0], rest[1], int(rest[2]))
