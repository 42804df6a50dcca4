"""What tests read of a study's folder."""

from rafce_ray.study_folder import StudyFolder


def results(study: StudyFolder) -> dict[str, int]:
    """When the result of each ended trial was written, ns."""
    found = {name: study.trial(name).stamp("result.json") for name in study.trial_names()}
    return {name: written for name, (size, written) in found.items() if size is not None}
