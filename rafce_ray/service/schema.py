"""What requests and answers look like: the records of ``/openapi.json``, with units and ranges.

The hot route does not validate through them; a test holds real answers against them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1, description="Calibrated probability, 0 to 1.")]
Milliseconds = Annotated[float, Field(ge=0, description="Milliseconds.")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Of the weights file, hexadecimal.")]


class Record(BaseModel):
    """Every field is always there, and there are no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Box(Record):
    """A face's place in the upright picture (EXIF orientation applied), origin at its upper left corner."""

    x: int = Field(ge=0, description="Left edge, px.")
    y: int = Field(ge=0, description="Upper edge, px.")
    width: int = Field(ge=0, description="Width, px.")
    height: int = Field(ge=0, description="Height, px.")


class EmotionScore(Record):
    """One emotion class."""

    label: str = Field(description="Name of the class.")
    index: int = Field(ge=0, description="Label of the class in the training data, from 0.")
    probability: Probability


class BasicEmotionScore(Record):
    """One basic emotion behind the compound ones."""

    label: str = Field(description="Name of the basic emotion.")
    probability: Probability = Field(
        description="Probability, 0 to 1, that it is one of the two behind the compound emotion; these sum to 2 where every class is a "
        "compound one."
    )


class Emotion(Record):
    """The most probable emotion as people would perceive it."""

    label: str = Field(description="Name of the most probable class.")
    index: int = Field(ge=0, description="Its label in the training data, from 0.")
    probability: Probability
    unsure: bool = Field(description="Its probability is below the model's limit of trust: do not take it at its word.")
    top: tuple[EmotionScore, ...] = Field(description="The `top_k` most probable classes, in falling order.")
    basic: tuple[BasicEmotionScore, ...] = Field(description="Marginals; empty where no class is a compound one.")


class EmotionWithDistribution(Emotion):
    """An emotion with the probabilities of all classes: what `return_distribution` adds."""

    distribution: tuple[EmotionScore, ...] = Field(description="All classes by index; probabilities sum to 1.")


class ActionUnit(Record):
    """One facial action unit (FACS)."""

    code: str = Field(pattern="^AU[0-9]+$", description="Code, such as AU12.")
    name: str = Field(description="FACS's name, such as Lip corner puller.")
    probability: Probability
    threshold: float = Field(ge=0, le=1, description="Probability from which it counts as active.")
    active: bool = Field(description="Whether the probability reaches the threshold.")


class Consistency(Record):
    """How well the action units go with the emotion, as the training images had it; information only."""

    score: float = Field(gt=0, le=1, description="1: every action unit is as it mostly is in this emotion.")
    contradicting: tuple[str, ...] = Field(description="Codes of action units whose state is rare in this emotion.")


class Face(Record):
    """One face of a picture and what the model says of it."""

    box: Box
    alignment: Literal["eyes", "box", "landmarks", "given"] = Field(
        description="What the crop was aligned by: both eyes; the detector's box alone (roll unknown); a landmark detector; or given (the "
        "picture was said to be an aligned face)."
    )
    emotion: EmotionWithDistribution | Emotion | None = Field(
        description="Null where the model does not tell emotions."
    )
    action_units: tuple[ActionUnit, ...] = Field(description="All of them; empty where the model does not tell any.")
    consistency: Consistency | None = Field(description="Null where the model lacks what it takes.")


class ProblemDocument(Record):
    """What went wrong (RFC 9457), with its remedy. `type` is stable and has a page of its own."""

    type: str = Field(pattern="^/problems/[a-z0-9_]+$", description="Stable name of the kind of problem.")
    title: str = Field(description="The kind of problem in words.")
    status: int = Field(ge=400, le=599, description="HTTP status.")
    detail: str = Field(description="What was found and what was expected.")
    hint: str = Field(description="The remedy.")
    instance: str = Field(description="Path of the request.")
    request_id: str = Field(description="As in the x-request-id header.")


class Result(Record):
    """One picture of the request."""

    id: str = Field(description="The picture's id in the request or, where that has none, its position from 0.")
    status: Literal["ok", "error"]
    width: int | None = Field(ge=1, description="Of the upright picture, px; null where it was not read.")
    height: int | None = Field(ge=1, description="Of the upright picture, px; null where it was not read.")
    faces: tuple[Face, ...] = Field(description="Largest first; empty where status is error.")
    faces_left_out: int = Field(ge=0, description="Smaller faces beyond the service's limit, of which nothing is said.")
    error: ProblemDocument | None = Field(
        description="Why there is no answer for this picture; null where status is ok."
    )


class NoImageRead(ProblemDocument):
    """Problem `no_image_read`: a request of several pictures of which none could be answered."""

    results: tuple[Result, ...] = Field(description="In the order of the request; each has its error.")


class Model(Record):
    """The one model that all of an answer is from."""

    name: str
    version: str = Field(description="Version in the registry, or the first digits of sha256.")
    sha256: Sha256


class Timings(Record):
    """Where the time went. Pictures are read side by side, so that decode_ms is the slowest of them."""

    decode_ms: Milliseconds = Field(description="Decoding and face detection, ms.")
    queue_ms: Milliseconds = Field(description="Waiting for the model, ms.")
    inference_ms: Milliseconds = Field(description="The batch that the faces were in, ms.")
    total_ms: Milliseconds = Field(description="From the request's head to its answer, ms.")


class PredictAnswer(Record):
    """Answer of POST /v1/predict: a result for each picture, in order."""

    model: Model
    request_id: str = Field(description="As in the x-request-id header.")
    results: tuple[Result, ...]
    timings: Timings


class Image(Record):
    """One picture of a JSON request."""

    id: str | None = Field(default=None, description="Echoed in its result; by default its position from 0.")
    data: str = Field(description="The file, base64, with or without padding, line breaks and a data URI's prefix.")


class Options(Record):
    """What is to be answered, and how the pictures are to be read."""

    faces: Literal["detect", "aligned"] = Field(
        default="detect",
        description="detect: find and align the faces of photographs; aligned: each picture is one aligned face.",
    )
    top_k: int = Field(default=3, ge=1, description="Emotions listed per face, at most the model's number of classes.")
    return_distribution: bool = Field(default=False, description="Whether to list the probabilities of all emotions.")


class PredictRequest(Record):
    """JSON body of POST /v1/predict."""

    images: tuple[Image, ...] = Field(min_length=1)
    options: Options = Field(default_factory=Options)


class Status(Record):
    """The process works."""

    status: Literal["ok"]


class ReadyStatus(Record):
    """A canary went through this model and gave the stored answer."""

    status: Literal["ready"]
    model: Model
