/** A new element; `attributes` as in HTML (true: there, false: not), children are nodes or texts, never HTML. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A description list of [term, value] pairs; values are texts or nodes. */
export function facts(pairs) {
  return element(
    "dl",
    {},
    ...pairs.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))),
  );
}

/** A list of texts. */
export function list(texts) {
  return element("ul", {}, ...texts.map((text) => element("li", {}, text)));
}

/** A probability in percent; what is not quite 0 or 1 is not rounded to it. */
export function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "< 0.1\u202f%";
  if (probability < 1 && probability >= 0.9995) return "> 99.9\u202f%";
  return `${(100 * probability).toFixed(1)}\u202f%`;
}

/** `1 face`, `2 faces`. */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** The text with a capital first letter. */
export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
