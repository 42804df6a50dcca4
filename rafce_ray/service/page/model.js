/** Which model answers, and what it is and is not for: from GET /v1/model. */

import { counted, element, facts, list } from "./dom.js";

/** The section's content for the answer of /v1/model. */
export function modelCard(info) {
  const { model, engine, taxonomy, architecture, input } = info;
  const tells = [];
  if (taxonomy.emotions.length) tells.push(counted(taxonomy.emotions.length, "emotion"));
  if (taxonomy.action_units.length) tells.push(counted(taxonomy.action_units.length, "action unit"));
  const about = [
    ["Model", `${model.name}, version ${model.version}`],
    ["Tells", tells.join(" and ")],
    ["Network", `${architecture} at ${input.network_px} px`],
    ["Engine", `${engine.name}, ${engine.precision}`],
  ];
  if (info.refused) about.push(["Refused", `a newer version${info.refused.version ? `, ${info.refused.version}` : ""}`]);
  return element(
    "div",
    { class: "card" },
    element("div", {}, facts(about)),
    element("div", {}, element("h3", {}, "What it tells"), element("p", {}, info.meaning)),
    element("div", {}, element("h3", {}, "Intended use"), list(info.intended_use)),
    element("div", {}, element("h3", {}, "Prohibited use"), list(info.prohibited_use)),
  );
}
