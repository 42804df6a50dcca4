/** What the service said of one face, as elements. Every number has its unit and every bar its number beside it. */

import { counted, element, facts, percent, sentence } from "./dom.js";

const ALIGNMENTS = {
  eyes: "by both eyes",
  box: "by the box alone; roll unknown",
  landmarks: "by landmarks",
  given: "as given: the picture is the face",
};

const DETECTORS = { yunet: "by YuNet", cascades: "by OpenCV's cascades", given: "not looked for" };

const BASIC = "Basic emotions behind it";

/** What is said of `result.faces[index]`; `info` is the answer of /v1/model, or null. */
export function faceAnswer(answer, result, index, info) {
  const face = result.faces[index];
  return element(
    "div",
    {},
    ...headline(face, info),
    element("div", { class: "tables" }, emotions(face), actionUnits(face)),
    provenance(answer, result, face),
    element(
      "details",
      {},
      element("summary", {}, "The answer as JSON"),
      element("pre", { tabindex: "0", role: "region", "aria-label": "JSON" }, JSON.stringify(answer, null, 2)),
    ),
  );
}

/** One line about a face. */
export function faceSummary(face) {
  if (face.emotion === null) {
    const active = face.action_units.filter((unit) => unit.active).map((unit) => unit.code);
    return active.length ? `active: ${active.join(", ")}` : "no action unit is active";
  }
  return `${face.emotion.label}, ${percent(face.emotion.probability)}${face.emotion.unsure ? ", unsure" : ""}`;
}

function headline(face, info) {
  const emotion = face.emotion;
  if (emotion === null) return [element("p", {}, "This model tells action units and no emotions.")];
  const title = element(
    "h3",
    { class: "headline" },
    sentence(emotion.label),
    " ",
    element("span", { class: "number" }, percent(emotion.probability)),
  );
  if (!emotion.unsure) return [title];
  const limit = info?.unsure_below;
  const below = limit == null ? "this model's limit" : `${percent(limit)}, this model's limit`;
  const why = ` The probability is below ${below}: do not take the emotion at its word.`;
  return [title, element("p", { class: "note" }, element("strong", {}, "Unsure."), why)];
}

function emotions(face) {
  const emotion = face.emotion;
  if (emotion === null) return "";
  const falling = [...emotion.distribution].sort((a, b) => b.probability - a.probability);
  const parts = [element("h3", {}, "Emotions"), scores("Emotions", falling, emotion.label)];
  if (emotion.basic.length) {
    parts.push(
      element("h3", {}, BASIC),
      element("p", { class: "small muted" }, "Probability that each is one of the two in the compound emotion."),
      scores(BASIC, emotion.basic, null),
    );
  }
  return element("div", {}, ...parts);
}

function scores(name, entries, strongest) {
  const rows = entries.map(({ label, probability }) =>
    element(
      "tr",
      { class: label === strongest ? "strong" : false },
      element("th", { scope: "row" }, label),
      element("td", { class: "bar", "aria-hidden": "true" }, bar(probability)),
      element("td", { class: "number" }, percent(probability)),
    ),
  );
  return table(name, "scores", ["Emotion", null, "Probability"], rows);
}

function actionUnits(face) {
  const units = face.action_units;
  if (!units.length) return element("p", {}, "This model tells emotions and no action units.");
  const contradicting = new Set(face.consistency?.contradicting ?? []);
  const rows = units.map((unit) =>
    element(
      "tr",
      { class: unit.active ? "strong" : false },
      element(
        "th",
        { scope: "row" },
        element("span", { class: "code" }, unit.code),
        " ",
        element("span", { class: "name" }, unit.name),
      ),
      element("td", { class: "bar", "aria-hidden": "true" }, bar(unit.probability, unit.threshold)),
      element(
        "td",
        { class: "number" },
        percent(unit.probability),
        element("span", { class: "from" }, ` from ${percent(unit.threshold)}`),
      ),
      element("td", {}, ...state(unit, contradicting)),
    ),
  );
  return element(
    "div",
    {},
    element("h3", {}, "Action units"),
    table("Action units", "units", ["Code and FACS name", null, "Probability", "State"], rows),
    element("p", { class: "small muted" }, "The mark on a bar is the probability from which the action unit counts as active."),
    ...consistency(face),
  );
}

function state(unit, contradicting) {
  const word = unit.active ? "active" : element("span", { class: "muted" }, "inactive");
  return contradicting.has(unit.code) ? [word, " ", element("span", { class: "rare" }, "rare here")] : [word];
}

function consistency({ consistency: remark, emotion, action_units: units }) {
  if (remark === null) return [];
  const named = units
    .filter((unit) => remark.contradicting.includes(unit.code))
    .map((unit) => `${unit.code}\u00a0${unit.active ? "active" : "inactive"}`);
  const verdict = named.length
    ? [element("strong", {}, `Contradicting: ${named.join(", ")}.`), ` Rare with ${emotion.label} in the training images.`]
    : [`No action unit contradicts ${emotion.label}.`];
  const scale = ` Consistency ${remark.score.toFixed(2)} of 1, for information only.`;
  return [element("p", { class: "consistency" }, ...verdict, scale)];
}

function provenance({ model, request_id: request, timings }, { width, height }, { box, alignment, detection }) {
  const ms = (value) => `${value.toFixed(1)}\u202fms`;
  const parts = [
    `${ms(timings.decode_ms)} reading the picture`,
    `${ms(timings.queue_ms)} in the queue`,
    `${ms(timings.inference_ms)} in the model`,
  ];
  return element(
    "div",
    { class: "provenance" },
    element("h3", {}, "How this was made"),
    facts([
      ["Model", `${model.name}, version ${model.version}`],
      ["Weights, sha256", element("code", {}, model.sha256)],
      ["Picture", `${width} × ${height} px`],
      ["Face", `${box.width} × ${box.height} px at ${box.x}, ${box.y}`],
      ["Found", found(detection)],
      ["Aligned", ALIGNMENTS[alignment] ?? alignment],
      ["Time", element("span", { class: "wide" }, `${ms(timings.total_ms)}: ${parts.join(", ")}`)],
      ["Request", element("code", {}, request)],
    ]),
  );
}

function found({ detector, score }) {
  return (DETECTORS[detector] ?? detector) + (score === null ? "" : `, confidence ${score.toFixed(2)} of 1`);
}

/** A table whose column without a heading holds bars, of which assistive technology is told nothing. */
function table(name, kind, headings, rows) {
  const cells = headings.map((heading) =>
    heading === null
      ? element("td", { class: "bar", "aria-hidden": "true" })
      : element("th", { scope: "col" }, heading),
  );
  return element(
    "table",
    { class: kind, "aria-label": name },
    element("thead", {}, element("tr", {}, ...cells)),
    element("tbody", {}, ...rows),
  );
}

/** A bar from 0 to 1, with a mark at the threshold where there is one. */
function bar(share, threshold = null) {
  const made = element("div", { class: "track" }, element("div", { class: "fill" }));
  made.style.setProperty("--share", share);
  if (threshold !== null) {
    made.style.setProperty("--threshold", threshold);
    made.append(element("div", { class: "mark" }));
  }
  return made;
}

/** What there is to choose from where a picture has several faces; `thumbnail(face)` gives the picture of one. */
export function faceChoice(result, thumbnail, choose) {
  const choices = result.faces.map((face, index) => {
    const radio = element("input", { type: "radio", name: "face", autocomplete: "off", checked: index === 0 });
    radio.addEventListener("change", () => choose(index));
    const text = element("span", {}, element("strong", {}, `Face ${index + 1}`), ` ${faceSummary(face)}`);
    return element("label", {}, radio, thumbnail(face), text);
  });
  const legend = `${counted(result.faces.length, "face")}, largest first`;
  return element("fieldset", { class: "faces" }, element("legend", {}, legend), ...choices);
}
