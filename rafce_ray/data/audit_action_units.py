"""Checks of a dataset's action-unit labels."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from rafce_ray.data import reference
from rafce_ray.data.audit_case import Case, value_counts
from rafce_ray.data.records import MAX_UNREADABLE_SHARE, Evidence, Finding, Level, evidence_of
from rafce_ray.taxonomy import SEED18, action_unit_code, parse_action_unit_token


def action_unit_findings(case: Case) -> list[Finding]:
    """Whether there is something to learn, what could not be read, and what lies outside the vocabulary."""
    checks = (
        _check_targets,
        _check_unreadable,
        _check_vocabulary,
        _check_each,
        _check_token_shapes,
    )
    return [finding for check in checks for finding in check(case)]


def _check_targets(case: Case) -> list[Finding]:
    labels, data = case.labels, case.data
    if not labels.has_action_units or data.action_units == "none":
        return []
    if not case.taxonomy.action_units:
        wanted = (
            f"{data.min_train_positives} train positives" if data.action_units == "auto" else "a column in the table"
        )
        message = f"no action unit of the vocabulary {data.action_units!r} has {wanted}"
        remedy = "Set data.action_units to a list, to auto with a lower data.min_train_positives, or to none."
        return [Finding("refusal", "no_action_unit_positives", message, remedy)]
    if case.train_positives.any() or case.all_images_missing:
        return []
    states = dict(value_counts(labels.table["au_state"]))
    evidence = [
        evidence
        for finding in labels.findings
        if finding.code == "unreadable_action_units"
        for evidence in finding.evidence
    ]
    evidence += [Evidence(f"{count} rows are {state}") for state, count in states.items()]
    message = "there are action-unit labels, but no train image has a positive one: there is nothing to learn"
    remedy = (
        "Check how the labels are written (1+4+25 in RAF-CE's file; 1, 0 or blank in a table) and data.action_units; "
        "data.action_units=none leaves the task out."
    )
    return [Finding("refusal", "no_action_unit_positives", message, remedy, 1, tuple(evidence))]


def _check_unreadable(case: Case) -> list[Finding]:
    """Refuse where more than one in a hundred labels that say something cannot be read."""
    labels = case.labels
    if case.data.action_units == "none":
        return []
    states = dict(value_counts(labels.table["au_state"]))
    unreadable = states.get("unreadable", 0)
    labelled = unreadable + states.get("full", 0) + states.get("partial", 0)
    if not labelled or unreadable / labelled <= MAX_UNREADABLE_SHARE:
        return []
    reported = [
        evidence
        for finding in labels.findings
        if finding.code == "unreadable_action_units"
        for evidence in finding.evidence
    ]
    mask = np.asarray(pc.equal(labels.table["au_state"], "unreadable"))
    evidence = tuple(reported) or case.rows(mask, labels.au_file, "au_line", None)
    share = unreadable / labelled
    message = (
        f"{unreadable} of {labelled} non-null action-unit rows ({share:.1%}) cannot be read; "
        f"at most {MAX_UNREADABLE_SHARE:.0%} may be"
    )
    remedy = "Write action units as numbers joined by '+', such as 1+4+L12, or null; in a table as 1, 0 or blank."
    return [Finding("refusal", "too_many_unreadable_action_units", message, remedy, unreadable, evidence)]


def _check_vocabulary(case: Case) -> list[Finding]:
    labels, taxonomy, data = case.labels, case.taxonomy, case.data
    if not taxonomy.action_units:
        return []
    findings = []
    level: Level
    wanted = (
        SEED18 if data.action_units == "seed18" else data.action_units if isinstance(data.action_units, tuple) else ()
    )
    left_out = [number for number in wanted if number not in taxonomy.action_units]
    if left_out:
        level = "info" if data.action_units == "seed18" else "warning"
        message = f"no column for {', '.join(map(action_unit_code, left_out))}: left out of the vocabulary"
        findings.append(Finding(level, "action_units_without_column", message, "", len(left_out)))
    outside: dict[str, int] = {}
    for token, count in labels.token_counts.items():
        number = parse_action_unit_token(token)
        if number is not None and number not in taxonomy.action_units:
            outside[token] = outside.get(token, 0) + count
    if outside:
        ordered = sorted(outside.items(), key=lambda item: -item[1])
        evidence = evidence_of(Evidence(f"{token}: {count}") for token, count in ordered)
        message = f"{sum(outside.values())} action-unit tokens of {len(outside)} kinds are outside the vocabulary"
        remedy = f"data.action_units=auto takes every action unit with {data.min_train_positives} train positives."
        # The makers of a table chose its columns: each one that is left out is reported.
        enough = max(outside.values()) >= data.min_train_positives
        chosen = labels.layout != "table" or isinstance(data.action_units, tuple)
        level = "warning" if enough and not chosen else "info"
        findings.append(Finding(level, "tokens_outside_vocabulary", message, remedy, sum(outside.values()), evidence))
    return findings


def _check_each(case: Case) -> list[Finding]:
    if not case.train_positives.any():
        return []
    never: dict[Level, list[Evidence]] = {"info": [], "warning": []}
    always = []
    num_reference = reference.SPLIT_SIZES["train"] - reference.NUM_NULL_TRAIN
    for number, count, num_known in zip(
        case.taxonomy.action_units, case.train_positives.tolist(), case.train_known.tolist(), strict=True
    ):
        code = action_unit_code(number)
        if count == 0:
            level: Level = "warning"
            if case.has_rafce_classes and case.data.action_units == "seed18":
                expected = reference.TRAIN_POSITIVES.get(number, 0) * num_known / num_reference
                level = "warning" if reference.is_surprisingly_few(0, expected) else "info"
            never[level].append(Evidence(f"{code}: 0 of {num_known} known train rows"))
        elif count == num_known:
            always.append(Evidence(f"{code}: all {num_known} known train rows"))
    findings = []
    for level, evidence in never.items():
        if evidence:
            message = f"{len(evidence)} action units of the vocabulary have no positive in train and cannot be learned"
            remedy = "Leave them out: data.action_units=auto, or a list."
            findings.append(
                Finding(level, "action_units_without_positives", message, remedy, len(evidence), tuple(evidence))
            )
    if always:
        message = (
            f"{len(always)} action units are present in every known train row: the model would learn to always say yes"
        )
        remedy = "If null means that none is there, set data.null_policy=negative; else leave them out."
        findings.append(
            Finding("warning", "action_units_without_negatives", message, remedy, len(always), tuple(always))
        )
    return findings


def _check_token_shapes(case: Case) -> list[Finding]:
    """Tokens that are more than a number: read as their base action unit, and counted."""
    if case.labels.layout != "rafce":
        return []
    shaped = [
        (token, count)
        for token, count in case.labels.token_counts.items()
        if not token.isdecimal() and parse_action_unit_token(token) is not None
    ]
    if not shaped:
        return []
    shaped.sort(key=lambda item: -item[1])
    total = sum(count for _, count in shaped)
    evidence = evidence_of(Evidence(f"{token}: {count}") for token, count in shaped)
    message = f"{total} action-unit tokens carry a side, prefix or intensity and count for their base action unit"
    return [Finding("info", "shaped_tokens", message, "", total, evidence)]
