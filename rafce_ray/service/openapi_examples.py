"""Examples of ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from rafce_ray.service.problems import PROBLEM_TYPES, ProblemType

Document = dict[str, Any]


def problem_example(kind: ProblemType) -> Document:
    """A problem document of this kind."""
    document = {
        "type": kind.uri,
        "title": kind.title,
        "status": kind.status,
        "detail": kind.meaning,
        "hint": kind.hint,
        "instance": "/v1/predict",
        "request_id": "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65",
    }
    return document | {"results": [ANSWER_EXAMPLE["results"][1]]} if kind.code == "no_image_read" else document


REQUEST_EXAMPLE: Document = {
    "images": [{"id": "left", "data": "/9j/4AAQSkZJRg..."}, {"data": "data:image/png;base64,iVBORw0KGgo..."}],
    "options": {"faces": "detect", "top_k": 2, "return_distribution": False},
}

ANSWER_EXAMPLE: Document = {
    "model": {
        "name": "rafce",
        "version": "3",
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    },
    "request_id": "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65",
    "results": [
        {
            "id": "left",
            "status": "ok",
            "width": 600,
            "height": 800,
            "faces": [
                {
                    "box": {"x": 142, "y": 200, "width": 318, "height": 318},
                    "alignment": "eyes",
                    "emotion": {
                        "label": "happily surprised",
                        "index": 0,
                        "probability": 0.71,
                        "unsure": False,
                        "top": [
                            {"label": "happily surprised", "index": 0, "probability": 0.71},
                            {"label": "happily sad", "index": 13, "probability": 0.12},
                        ],
                        "basic": [{"label": "surprised", "probability": 0.75}, {"label": "happy", "probability": 0.9}],
                    },
                    "action_units": [
                        {
                            "code": "AU12",
                            "name": "Lip corner puller",
                            "probability": 0.93,
                            "threshold": 0.4,
                            "active": True,
                        }
                    ],
                    "consistency": {"score": 0.97, "contradicting": []},
                }
            ],
            "faces_left_out": 0,
            "error": None,
        },
        {
            "id": "1",
            "status": "error",
            "width": None,
            "height": None,
            "faces": [],
            "faces_left_out": 0,
            "error": problem_example(PROBLEM_TYPES["undecodable"]),
        },
    ],
    "timings": {"decode_ms": 46.1, "queue_ms": 0.2, "inference_ms": 4.9, "total_ms": 52.3},
}
