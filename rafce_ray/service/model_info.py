"""The answer of ``/v1/model``, the model card as data."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from rafce_ray.base.console import finite
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code
from rafce_ray.bundle.model_card import INTENDED_USE, PERCEIVED, PROHIBITED_USE
from rafce_ray.service.answers import ModelId, Record
from rafce_ray.service.config import RequestLimits, ServiceConfig
from rafce_ray.service.live import WINDOW_FACES, FailedSwap, Served


class Engine(Record):
    """What computes the model's outputs."""

    name: str = Field(description="torch, openvino or onnxruntime.")
    precision: str = Field(description="Numbers that it computes with.")
    remarks: tuple[str, ...] = Field(description="Why it is not the engine that was asked for, for example.")


class Refused(Record):
    """A newer model that may not be served; the service's log says why."""

    version: str | None = Field(description="Null where it was a bundle without a version.")
    at: datetime = Field(description="When that was found, UTC.")


class EmotionClass(Record):
    """One class of the model."""

    index: int = Field(ge=0)
    label: str
    components: tuple[str, str] | None = Field(description="The two basic emotions of a compound one.")


class ActionUnitClass(Record):
    """One action unit that the model tells."""

    code: str
    name: str
    threshold: float = Field(ge=0, le=1, description="Probability from which it counts as active.")


class ModelTaxonomy(Record):
    """All that the model tells."""

    emotions: tuple[EmotionClass, ...]
    basic_emotions: tuple[str, ...]
    action_units: tuple[ActionUnitClass, ...]


class ModelInput(Record):
    """What the model takes."""

    formats: tuple[str, ...]
    aligned_face_px: int = Field(ge=1, description="Side of the square to which every face is brought, px.")
    network_px: int = Field(ge=1, description="Side of the network's own input, px.")


class DriftStatistic(Record):
    """One distribution that is compared with that of validation."""

    name: str = Field(description="emotion, confidence, brightness, contrast, or the code of an action unit.")
    min_faces: int | None = Field(
        description="Faces from which its PSI is known; null: never, the reference has too few images to tell it from "
        "chance."
    )


class Drift(Record):
    """Whether the service knows if faces or answers differ from those of validation; the metrics have the figures."""

    watched: bool
    remark: str | None = Field(description="Why it is not known, or not of everything, and the remedy.")
    reference_images: int = Field(ge=0, description="Images of validation that faces are compared with.")
    window_faces: int = Field(ge=1, description="So many of the latest faces are compared, in each process by itself.")
    statistics: tuple[DriftStatistic, ...]


class ModelInfo(Record):
    """Answer of GET /v1/model: the model card as data."""

    model: ModelId
    since: datetime = Field(description="When this process began to answer with it, UTC.")
    engine: Engine
    refused: Refused | None = Field(description="Null where nothing newer was refused.")
    meaning: str = Field(description="What the outputs are and are not.")
    intended_use: tuple[str, ...]
    prohibited_use: tuple[str, ...]
    input: ModelInput
    taxonomy: ModelTaxonomy
    unsure_below: float | None = Field(
        description="Probability under which an emotion is marked unsure; null: none is."
    )
    drift: Drift
    architecture: str = Field(description="Name of the network.")
    metrics: dict[str, Any] = Field(description="Figures on the split that `split` names; null where undefined.")
    limits: RequestLimits
    model_card: str | None = Field(description="The bundle's MODEL_CARD.md, Markdown; null where it has none.")


def model_info(config: ServiceConfig, served: Served, failed: FailedSwap | None) -> ModelInfo:
    """The model card as data; NaN and infinities of its figures are null. It names no file of this machine."""
    bundle, engine, watch = served.predictor.bundle, served.predictor.engine, served.drift
    return ModelInfo(
        model=served.model,
        since=served.since,
        engine=Engine(name=engine.name, precision=engine.precision, remarks=served.remarks),
        refused=None if failed is None else Refused(version=failed.version, at=failed.at),
        meaning=PERCEIVED,
        intended_use=INTENDED_USE,
        prohibited_use=PROHIBITED_USE,
        input=ModelInput(
            formats=("image/jpeg", "image/png", "image/webp"),
            aligned_face_px=bundle.preprocessing.stored_px,
            network_px=bundle.preprocessing.image_px,
        ),
        taxonomy=_taxonomy(bundle.taxonomy, bundle.calibration.au_thresholds),
        unsure_below=bundle.calibration.unsure_below,
        drift=Drift(
            watched=any(number is not None for number in watch.min_faces.values()),
            remark=watch.remark,
            reference_images=watch.num_reference_images,
            window_faces=WINDOW_FACES,
            statistics=tuple(DriftStatistic(name=name, min_faces=number) for name, number in watch.min_faces.items()),
        ),
        architecture=bundle.architecture.backbone,
        metrics=finite(bundle.metrics),
        limits=config.limits,
        model_card=served.card,
    )


def _taxonomy(taxonomy: Taxonomy, thresholds: tuple[float, ...]) -> ModelTaxonomy:
    classes = enumerate(zip(taxonomy.emotions, taxonomy.components, strict=True))
    units = zip(taxonomy.action_units, thresholds, strict=True)
    return ModelTaxonomy(
        emotions=tuple(EmotionClass(index=index, label=label, components=pair) for index, (label, pair) in classes),
        basic_emotions=taxonomy.basic_emotions,
        action_units=tuple(
            ActionUnitClass(code=action_unit_code(number), name=ACTION_UNIT_NAMES.get(number, ""), threshold=threshold)
            for number, threshold in units
        ),
    )
